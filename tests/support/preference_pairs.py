# SPDX-License-Identifier: Apache-2.0
"""Tokenized pairs, and trainers that learn from them without a job."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.config.schema import Settings
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.training.methods import choose_method
from llm_trainer.training.resumable import ResumableMixin
from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer
from support.trainers import build_run_context, collect_sources


def build_pairs(num_pairs: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Return pairs of ids as TRL takes them."""
    draw = random.Random(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    sizes = [(draw.randint(1, 9), draw.randint(1, 12), draw.randint(1, 12)) for _ in range(num_pairs)]
    return [
        {name: [draw.randrange(5, 90) for _ in range(size)] for name, size in zip(names, pair, strict=True)}
        for pair in sizes
    ]


def join_pair(pair: dict[str, list[int]], number: int) -> dict[str, Any]:
    """Return a pair as a row of ours."""
    prompt, chosen, rejected = pair.values()
    hidden = [IGNORED] * len(prompt)
    ids, labels = [*prompt, *chosen, *prompt, *rejected], [*hidden, *chosen, *hidden, *rejected]
    lengths = [len(prompt) + len(chosen), len(prompt) + len(rejected)]
    return {"input_ids": ids, "labels": labels, "length": len(ids), "seq_lengths": lengths, "row": number}


def build_rows(num_pairs: int, seed: int = 0) -> Dataset:
    """Return rows of ours."""
    return Dataset.from_list([join_pair(pair, number) for number, pair in enumerate(build_pairs(num_pairs, seed))])


def build_lora() -> LoraConfig:
    """Return an adapter that does not begin at zero, so that it differs from the reference at once."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def build_pair_trainer(
    model: Any,
    rows: Dataset,
    folder: Path,
    collator: Any = None,
    lora: LoraConfig | None = None,
    run: dict[str, Any] | None = None,
    **settings: Any,
) -> ResumableMixin:
    """Return a trainer of pairs on the CPU. `run` are values of its RunContext."""
    method = choose_method("dpo")
    sources = collect_sources(Settings(method="dpo", use_peft=lora is not None, **settings), folder)
    arguments = build_arguments(method, sources, torch.device("cpu"), torch.float32)
    tokenizer, base = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    parts = TrainerParts(base, tokenizer, arguments, {"train": rows}, collator, lora)
    return build_trainer(method, parts, build_run_context(**(run or {})), patience=None)
