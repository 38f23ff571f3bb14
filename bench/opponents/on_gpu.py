# SPDX-License-Identifier: Apache-2.0
"""One trainer's LoRA of the model and rows of bench/gpu_peers.py: on_gpu.py PEER FOLDER PACKED_TOKENS.

FOLDER holds base/ and rows/rows.jsonl, and gets PEER.json. It imports at once, and trains when a line comes on the
standard input. Two packed sequences of so many tokens are a step.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which -P leaves out

RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-3
SEQUENCES = 2
STEPS, LOGGING_STEPS = 18, 6
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all linear layers


@dataclass(frozen=True)
class Task:
    """What to train, and where."""

    peer: str
    folder: Path
    packed_tokens: int

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    def wait_for_turn(self) -> None:
        """Put the clock in, and wait until the peer before has ended."""
        from step_clock import watch_every_trainer

        watch_every_trainer(self.folder / f"{self.peer}.json")
        sys.stdin.readline()

    def load_rows(self) -> Any:
        from datasets import Dataset

        rows, cache = self.folder / "rows/rows.jsonl", self.folder / f"{self.peer}-cache"
        return Dataset.from_json(str(rows), cache_dir=str(cache))

    def list_arguments(self) -> dict[str, Any]:
        """What TRL and Unsloth are told beside their own defaults."""
        import torch

        on_gpu = torch.cuda.is_available()
        return {
            "output_dir": str(self.folder / "output"),
            "packing": True,
            "max_length": self.packed_tokens,
            "per_device_train_batch_size": SEQUENCES,
            "gradient_accumulation_steps": 1,  # Unsloth's own default is 2
            "max_steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "logging_steps": LOGGING_STEPS,
            "bf16": on_gpu,
            "use_cpu": not on_gpu,
            "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
            "report_to": "none",
            "save_strategy": "no",
        }


def train_with_trl(task: Task, dropout: float, **arguments: Any) -> None:
    """TRL's SFTTrainer, without Liger on a CPU."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    task.wait_for_turn()
    place = {"attn_implementation": "flash_attention_2", "device_map": "cuda"} if torch.cuda.is_available() else {}
    if not place:
        arguments.pop("use_liger_kernel", None)
    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.bfloat16, **place)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    SFTTrainer(
        model=model,
        args=SFTConfig(**task.list_arguments(), **arguments),
        train_dataset=task.load_rows(),
        processing_class=AutoTokenizer.from_pretrained(task.base),
        peft_config=lora,
    ).train()


def train_with_unsloth(task: Task, checkpointing: str | bool) -> None:
    """Unsloth's model in TRL's SFTTrainer, as its notebooks have it."""
    import unsloth  # before the others, which it changes

    import torch  # isort: skip
    from trl import SFTConfig, SFTTrainer

    task.wait_for_turn()
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        task.base,
        max_seq_length=task.packed_tokens,
        dtype=torch.bfloat16,
        load_in_4bit=False,
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    adapted = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=PROJECTIONS,
        use_gradient_checkpointing=checkpointing,
    )
    SFTTrainer(
        model=adapted,
        args=SFTConfig(**task.list_arguments()),
        train_dataset=task.load_rows(),
        processing_class=tokenizer,
    ).train()


def train_with_llm_trainer(task: Task) -> int:
    """`llm-trainer train`, whose worker is started by this file."""
    from llm_trainer.cli.main import main as launch
    from llm_trainer.launcher.worker_processes import WorkerProcesses

    settings = {
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "packing": True,
        "max_length": task.packed_tokens,
        "per_device_train_batch_size": SEQUENCES,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "logging_steps": LOGGING_STEPS,
        "use_checkpoints": False,
        "sample_prompts": 0,
    }
    tree = task.folder / "tree"
    (tree / "input/config").mkdir(parents=True)
    (tree / "input/data").mkdir()
    (tree / "input/data/model").symlink_to(task.folder / "base")
    (tree / "input/data/train").symlink_to(task.folder / "rows")
    words = {name: str(value).lower() for name, value in settings.items()}
    (tree / "input/config/hyperparameters.json").write_text(json.dumps(words))
    os.environ["SAGEMAKER_BASE_DIR"] = str(tree)
    worker = [sys.executable, "-P", str(Path(__file__).resolve()), "worker", str(task.folder), "0"]
    WorkerProcesses.build_command = lambda processes: worker
    sys.argv[1:] = ["train"]
    sys.stdin.readline()
    return launch()


def work(folder: Path) -> int:
    """Be the worker of `llm-trainer train`, with the clock put in once it has imported what it needs."""
    from llm_trainer import worker

    mark = worker.Timeline.mark

    def mark_and_watch(timeline: worker.Timeline, name: str) -> None:
        mark(timeline, name)
        if name == "imports":
            from step_clock import watch_every_trainer

            watch_every_trainer(folder / "llm-trainer.json")

    worker.Timeline.mark = mark_and_watch
    return worker.main()


def main() -> None:
    """Train as the peer does."""
    task = Task(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    match task.peer:
        case "worker":
            sys.exit(work(task.folder))
        case "llm-trainer":
            sys.exit(train_with_llm_trainer(task))
        case "trl":
            train_with_trl(task, dropout=0.05)  # the default of `trl sft`
        case "trl-tuned":
            train_with_trl(task, dropout=0.0, use_liger_kernel=True, gradient_checkpointing=False)
        case "unsloth":
            train_with_unsloth(task, "unsloth")
        case "unsloth-tuned":
            train_with_unsloth(task, False)


if __name__ == "__main__":
    main()
