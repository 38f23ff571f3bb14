# SPDX-License-Identifier: Apache-2.0
"""Liger's kernels in Triton's interpreter, which runs them on a CPU. Needs TRITON_INTERPRET=1, liger-kernel and triton.

liger_on_cpu.py compare [NAME...]  prints a JSON line a family: how far loss and gradients are from the plain model's
liger_on_cpu.py train ...          is `llm-trainer train ...`, whose worker gets the kernels as on a GPU
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

from llm_trainer.common import log
from llm_trainer.common.processes import exit_without_teardown

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
launched: set[str] = set()  # names of the Triton kernels that have run


def prepare_interpreter() -> None:
    """Mend what the pinned interpreter lacks, have it note its kernels, and let the product see a GPU's Triton.

    It takes no floats as arguments, and Liger imports functions of CUDA's device library by name.
    """
    import liger_kernel.transformers  # noqa: F401  # all of its kernels
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from llm_trainer.model import liger

    convert, launch = interpreter._implicit_cvt, interpreter.InterpretedFunction.__getitem__

    def convert_float(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def note_launch(kernel: Any, grid: Any) -> Any:
        launched.add(kernel.fn.__name__)
        return launch(kernel, grid)

    interpreter._implicit_cvt = convert_float
    interpreter.InterpretedFunction.__getitem__ = note_launch
    functions = {"rsqrt": lambda x: tl.math.rsqrt(x), "tanh": lambda x: 2 * tl.sigmoid(2 * x) - 1}
    for name, module in list(sys.modules.items()):
        if name.startswith("liger_kernel.ops"):
            vars(module).update({key: value for key, value in functions.items() if key in vars(module)})
    liger.find_obstacle = lambda *_: None
    liger.dispatch_by_device = lambda fused, plain: fused


def compare(name: str, config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return how far a model with the kernels that the product gives it is from the plain one, and which ran."""
    import torch

    from llm_trainer.config.schema import Settings
    from llm_trainer.model import liger
    from llm_trainer.model.device import Device
    from llm_trainer.model.parameter_roles import has_experts

    settings, plain = Settings(**given).model, build_model(config)
    choice = liger.choose_liger(config, settings, Device(torch.device("cpu")), None)
    choice = liger.try_on(liger.leave_out_experts(choice, settings, has_experts(plain)), settings, plain)
    plain_loss, plain_gradients = compute_gradients(plain)
    assert not launched
    shared, fused = list(liger.list_shared_names(plain)), build_model(config)
    liger.apply_liger(fused, choice.collect_options(settings))
    loss, gradients = compute_gradients(fused)
    for module, function, own in shared:
        setattr(module, function, own)
    assert gradients.keys() == plain_gradients.keys()
    distances = [(gradients[key] - own).norm() / own.norm().clamp(min=1e-6) for key, own in plain_gradients.items()]
    ran = sorted(launched)
    launched.clear()
    differences = {"loss": abs(loss / plain_loss - 1), "gradients": max(distances).item()}
    return {"name": name, **differences, "ran": ran, "told": sorted(choice.kernels)}


def build_model(config: Any) -> Any:
    """Return a model of random weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").train()


def compute_gradients(model: Any) -> tuple[float, dict[str, Any]]:
    """Return the loss on tokens that are always the same, and the gradients of all weights by name."""
    import torch

    torch.manual_seed(1)
    tokens = torch.randint(64, (2, 10))
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare_families(names: list[str]) -> None:
    """Print how each family compares, and Qwen's mixture with the experts that have to be asked for."""
    from support.liger_families import build_families

    families = build_families(num_experts=4, window=8, **SIZES)
    cases = {name: (config, {}) for name, config in families.items()}
    cases["qwen3-moe with experts"] = families["qwen3-moe"], {"liger_kernel_config": {"swiglu": True}}
    for name in names or cases:
        print(json.dumps(compare(name, *cases[name])), flush=True)


def main() -> int:
    """Do what the first argument says. Return the exit code."""
    role = sys.argv[1]
    if role == "train":
        from llm_trainer.cli.main import main as launch
        from llm_trainer.launcher.worker_processes import WorkerProcesses

        worker = [sys.executable, "-P", str(Path(__file__).resolve()), "worker"]
        WorkerProcesses.build_command = lambda processes: worker
        return launch()
    if role == "worker":
        from llm_trainer import worker as work

        configure = work.configure_trackers  # before which nothing may import Transformers

        def configure_and_prepare(*sections: Any) -> None:
            configure(*sections)
            prepare_interpreter()

        work.configure_trackers = configure_and_prepare
        return work.main()
    prepare_interpreter()
    compare_families(sys.argv[2:])
    return 0


if __name__ == "__main__":
    log.guard_output()
    exit_without_teardown(main())
