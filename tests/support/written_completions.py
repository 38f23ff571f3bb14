# SPDX-License-Identifier: Apache-2.0
"""Prompts, a reward, and trainers whose model writes what it learns, without a job."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.config.schema import Settings
from llm_trainer.training.methods import choose_method
from llm_trainer.training.resumable import ResumableMixin
from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer
from support.trainers import build_run_context, collect_sources

PROMPTS = [[{"role": "user", "content": f"Say {word}."}] for word in ("one", "two and three", "four")]


def count_letters(completions: list[Any], **columns: Any) -> list[float]:
    """Return a reward for each completion: the share of its characters that are letters."""
    return [sum("a" <= letter <= "z" for letter in each[-1]["content"]) / 8 for each in completions]


def build_prompt_rows(model: Any) -> Dataset:
    """Return rows of prompts, as the job's data have them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        rows.append({"input_ids": ids, "labels": [-100] * len(ids), "length": len(ids)})
        rows[-1]["content"] = json.dumps({"prompt": prompt, "answer": len(ids)})
    return Dataset.from_list(rows)


def build_writing_trainer(
    method: str,
    model: Any,
    folder: Path,
    lora: LoraConfig | None = None,
    run: dict[str, Any] | None = None,
    **more: Any,
) -> ResumableMixin:
    """Return a trainer of a method that writes completions, on the CPU. `run` are values of its RunContext."""
    settings = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 12, **more}
    sources = collect_sources(Settings(method=method, use_peft=lora is not None, **settings), folder)
    described = choose_method(method)
    arguments = build_arguments(described, sources, torch.device("cpu"), torch.float32)
    tokenizer, base = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    parts = TrainerParts(base, tokenizer, arguments, {"train": build_prompt_rows(model)}, None, lora)
    context = build_run_context(**{"rewards": [count_letters], **(run or {})})
    return build_trainer(described, parts, context, patience=None)
