# SPDX-License-Identifier: Apache-2.0
"""Follows a step of the product's trainer on CUDA tensors without numbers, and prints what a GPU would have to do.

    python fake_gpu.py GUARD traced_step.py '{"layers": 2, "settings": {"lora_r": 16}, "recomputes": false}'...

The model is an 8B Llama of so many layers, and a batch has eight rows of 1,024 tokens. Each argument is a case, and
gives a line of JSON.
"""

import json
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, Trainer

from llm_trainer.config.schema import Settings
from llm_trainer.model import lora
from llm_trainer.model.layers import torch_flash
from llm_trainer.model.liger import KERNELS, apply_liger
from llm_trainer.model.loading import build_on_meta
from llm_trainer.model.memory import fused_kernels
from llm_trainer.training.methods import choose_method, sft
from llm_trainer.training.packing import PackingCollator
from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.tiny_model import build_tokenizer
from support.trainers import build_run_context, collect_sources
from support.waits import INDEXED, READS

CUDA = torch.device("cuda", 0)
ROWS, ROW_TOKENS = 8, 1024
# Operations that start no kernel: they look at a tensor in another way, or take memory.
VIEWS = frozenset(
    {"view", "_unsafe_view", "transpose", "t", "expand", "slice", "unsqueeze", "squeeze", "select", "alias", "detach"}
    | {"permute", "as_strided", "split", "reshape", "unbind", "_reshape_alias", "lift_fresh", "empty", "empty_like"}
    | {"empty_strided", "new_empty", "new_empty_strided", "set_", "is_same_size", "unflatten", "chunk"}
)
PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm"})
SMALL_RANK = 16  # a product with so few rows or columns waits for memory, and counts as bytes


class Done(Exception):  # noqa: N818
    """The step is over, and its line would be logged."""


class GpuWork(TorchDispatchMode):
    """Counts kernels, their bytes and operations while `computes`, and while `is_on` what the host waits for."""

    def __init__(self):
        super().__init__()
        self.computes = self.is_on = False
        self.kernels, self.bytes, self.waits, self.flops = Counter(), Counter(), Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.note_wait(name, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if self.computes and name not in VIEWS and func.namespace != "prim":
            self.note_kernel(name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)], out)
        return out

    def note_wait(self, name, args, kwargs):
        by_mask = name in INDEXED and any(each is not None and each.dtype == torch.bool for each in args[1])
        target = kwargs.get("device") if name == "_to_copy" else args[0].device if name == "copy_" else None
        source = args[0 if name == "_to_copy" else 1].device if target is not None else None
        crosses = target is not None and torch.device(target).type != source.type
        if self.is_on and (name in READS or by_mask or (crosses and not kwargs.get("non_blocking"))):
            self.waits[name] += 1

    def note_kernel(self, name, tensors, out):
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        size = sum(map(count_bytes, tensors + made))  # what changes in place is read and written
        self.kernels[name] += 1
        if name in PRODUCTS:
            left, right = tensors[-2:]
            self.flops += 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
            name = "small products" if min(*left.shape[-2:], right.shape[-1]) <= SMALL_RANK else "products"
        self.bytes[name] += size


def count_bytes(tensor):
    """Of a tensor that is read or written once; what is expanded lies there once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * tensor.element_size()


@contextmanager
def count_launches(work):
    """Count Triton's kernels, such as those of TRL's loss, in the place of launching them."""
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime.jit import KernelInterface

    def launch(kernel, grid):
        def call(*args, **_):
            work.note_kernel(f"triton {kernel.__name__}", [x for x in args if isinstance(x, torch.Tensor)], ())

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", launch)
        yield


@contextmanager
def count_stand_ins(work, base):
    """Give the model stand-ins of Liger's functions. A pass of one is a kernel, which reads what was saved, too."""

    def counted(function, name):
        def call(ctx, *args):
            saved = ctx.saved_tensors if name.endswith("backward") else ()  # which may be read once
            inner = SimpleNamespace(saved_tensors=saved, needs_input_grad=ctx.needs_input_grad) if saved else ctx
            work.computes, out = False, function(inner, *args)
            work.computes = True
            work.note_kernel(name, [x for x in (*args, *saved) if isinstance(x, torch.Tensor)], out)
            return out

        return staticmethod(call)

    with pytest.MonkeyPatch.context() as patch:
        for kernel in (fused_kernels.FusedNorm, fused_kernels.FusedGate, fused_kernels.FusedRope):
            for part in ("forward", "backward"):
                patch.setattr(kernel, part, counted(getattr(kernel, part), f"{kernel.__name__} {part}"))
        fused_kernels.replace_modules(base, frozenset(KERNELS))
        with fused_kernels.replace_rope(base, frozenset(KERNELS)):
            yield


def build_step_trainer(case, base, folder):
    """The trainer that a job builds, with a model on the meta device, and its batch."""
    settings = Settings(**case["settings"])
    memory_plan = SimpleNamespace(
        sharded=False, gradient_checkpointing=case.get("recomputes", False), activation_offloading=False
    )
    method = choose_method()
    arguments = build_arguments(method, collect_sources(settings, folder), CUDA, torch.bfloat16, memory_plan)
    rows = [{"input_ids": [5] * ROW_TOKENS, "labels": [5] * ROW_TOKENS, "length": ROW_TOKENS}] * ROWS
    collator = PackingCollator(pad_token_id=0, max_length=None, flattens=True)
    adapter = lora.build_lora_config(settings.model, settings.adapter, base)
    parts = TrainerParts(base, build_tokenizer(), arguments, {"train": Dataset.from_list(rows)}, collator, adapter)
    begin_sums = sft.begin_sums
    sft.begin_sums = lambda device: begin_sums(torch.device("meta"))
    trainer = build_trainer(method, parts, build_run_context(), patience=None)
    sft.begin_sums = begin_sums
    collate = trainer.data_collator if case.get("finds_facts", True) else collator
    return trainer, collate(rows)


def put_on_gpu(trainer, batch, mode):
    """Give the model tensors of a GPU without numbers, and return such a batch, copied as Accelerate copies it."""

    def fill(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)

    for module in trainer.model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(fill(weight), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fill(buffer)
    trainer.line_sums, trainer.run_sums, trainer.eval_sums = (sft.begin_sums(CUDA) for _ in range(3))
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    copied = {name: mode.from_tensor(value).to(CUDA, non_blocking=True) for name, value in tensors.items()}
    return {**batch, **copied}


def switch(work, trainer):
    """Count between a step's beginning and its line, and kernels within the passes."""

    def switched(function, name):
        def call(*args, **kwargs):
            setattr(work, name, True)
            try:
                return function(*args, **kwargs)
            finally:
                work.computes = False

        return call

    def end(*_, **__):
        work.is_on = False
        raise Done

    trainer._get_num_items_in_batch = switched(trainer._get_num_items_in_batch, "is_on")
    trainer.training_step = switched(trainer.training_step, "computes")
    trainer._maybe_log_save_evaluate = end


def follow(case, folder):
    """Follow the step of a case to its end, or to the first number that the host asks for."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=case["layers"],
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    base = build_on_meta(config, torch.bfloat16, False)
    base.set_attn_implementation(case.get("attention", torch_flash.NAME))
    trainer, batch = build_step_trainer(case, base, folder)
    work, mode, ended = GpuWork(), FakeTensorMode(allow_non_fake_inputs=True), "the step is over"
    switch(work, trainer)
    trainer.accelerator.device_placement = False  # all is there
    liger = apply_liger(base, {}) or nullcontext() if case.get("own_liger") else count_stand_ins(work, base)
    with mode:
        batch = put_on_gpu(trainer, batch, mode)
        trainer.get_train_dataloader = lambda: [batch]
        try:
            with count_launches(work), liger, work:
                trainer.train()
        except Done:
            pass
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            ended = f"the host asks for numbers: {error}"
    return {"kernels": work.kernels, "bytes": work.bytes, "flops": work.flops, "waits": work.waits, "ended": ended}


def make_number(data, *args, make=torch.tensor, device=None, **kwargs):
    """As torch.tensor, which cannot put a number on a GPU that is not there."""
    on_gpu = device is not None and torch.device(device).type == "cuda"
    return torch.full([], data, device=device, **kwargs) if on_gpu else make(data, *args, device=device, **kwargs)


if __name__ == "__main__":
    torch.tensor = make_number
    Trainer._move_model_to_device = lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        for text in sys.argv[1:]:
            print(json.dumps(follow(json.loads(text), Path(folder))), flush=True)
