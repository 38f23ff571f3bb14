# SPDX-License-Identifier: Apache-2.0
"""Exact-match accuracy of a model, with or without a LoRA adapter, on chats whose last message is the right answer."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, Any]
BATCH = 50


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def load(model_dir: Path, adapter_dir: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer from local files only; the adapter is merged, which saves two products a layer and token."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True, dtype=torch.float32)
    if adapter_dir:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    return model.eval(), tokenizer


def answers(model: Any, tokenizer: Any, rows: list[Row]) -> Iterator[tuple[Row, str]]:
    """Each row with what the model answers greedily, stopped once it is longer than any right answer.

    Short rows come first, so that the rows of a batch need little padding.
    """
    rows = sorted(rows, key=lambda row: len(row["messages"][0]["content"]))
    longest = max(len(tokenizer(row["messages"][-1]["content"])["input_ids"]) for row in rows)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        chats = [row["messages"][:-1] for row in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=longest + 1)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from zip(batch, texts, strict=True)


def accuracy(model_dir: Path, rows: list[Row], adapter_dir: Path | None = None) -> float:
    """The share of rows answered exactly right, in total; for rows that name their wording, each share is printed."""
    model, tokenizer = load(model_dir, adapter_dir)
    right: dict[str, list[bool]] = {}
    for done, (row, text) in enumerate(answers(model, tokenizer, rows), start=1):
        expected = row["messages"][-1]["content"]
        right.setdefault(row.get("wording", "any"), []).append(text.strip() == expected)
        if done % BATCH == 0 or done == len(rows):
            print(f"demo: {done}/{len(rows)} answered; expected {expected!r}, got {text.strip()[:60]!r}", flush=True)
    for wording, hits in sorted(right.items()):
        print(f"demo: {wording} wording: {sum(hits)}/{len(hits)} right", flush=True)
    return sum(map(sum, right.values())) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("rows", type=Path, help="jsonl file of chats")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter")
    arguments = parser.parse_args()
    print(f"accuracy {accuracy(arguments.model, read_rows(arguments.rows), arguments.adapter):.2f}")


if __name__ == "__main__":
    main()
