# SPDX-License-Identifier: Apache-2.0
"""Tokenized pairs and judged answers, and trainers that learn from them without a job."""

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


def build_judged(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return judged answers as TRL takes them, the mismatched ones rotated as it rotates those of a batch."""
    pairs = build_pairs(num_rows, seed)
    answers = [pair["chosen_ids"] for pair in pairs]
    others = [answers[-1], *answers[:-1]]
    return [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": answer, "KL_completion_ids": other, "label": place % 3 > 0}
        for place, (pair, answer, other) in enumerate(zip(pairs, answers, others, strict=True))
    ]


def build_judged_rows(num_rows: int, seed: int = 0) -> Dataset:
    """Return rows of ours with the same."""
    rows = []
    for number, row in enumerate(build_judged(num_rows, seed)):
        prompt, answer, other = row["prompt_ids"], row["completion_ids"], row["KL_completion_ids"]
        hidden = [IGNORED] * len(prompt)
        ids = [*prompt, *answer]
        made = {"input_ids": ids, "labels": [*hidden, *answer], "length": len(ids), "seq_lengths": [len(ids)]}
        mismatched = {"other_ids": [*prompt, *other], "other_labels": [*hidden, *other]}
        rows.append({**made, "row": number, "desirable": row["label"], **mismatched})
    return Dataset.from_list(rows)


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
    base: Any = None,
    **settings: Any,
) -> ResumableMixin:
    """Return a trainer on the CPU, of pairs unless `method` says otherwise. `run` are values of its RunContext.

    `model` is a folder, and `base` what is trained in the place of its causal language model.
    """
    settings = {"method": "dpo", **settings}
    method = choose_method(settings["method"])
    sources = collect_sources(Settings(use_peft=lora is not None, **settings), folder)
    arguments = build_arguments(method, sources, torch.device("cpu"), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model) if base is None else base
    parts = TrainerParts(base, tokenizer, arguments, {"train": rows}, collator, lora)
    return build_trainer(method, parts, build_run_context(**(run or {})), patience=None)


def compute_step(trainer, rows=None):
    """Return the loss of all rows, and its gradients."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows or trainer.train_dataset)))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: each.grad for name, each in trainer.model.named_parameters() if each.requires_grad}
