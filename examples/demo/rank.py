# SPDX-License-Identifier: Apache-2.0
"""The share of pairs that a model ranks right: the chosen answer has a higher probability than the rejected one."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from evaluate import Row, load, read_rows

BATCH = 25  # pairs
SIDES = ("chosen", "rejected")


def log_probabilities(model: Any, tokenizer: Any, rows: list[Row]) -> Iterator[tuple[Row, list[float]]]:
    """Each pair with the logarithms of the probabilities of its two answers, up to the token that ends them."""
    rows = sorted(rows, key=lambda row: len(row["prompt"][0]["content"]))
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        encoded = [encode(tokenizer, row["prompt"], row[side]) for row in batch for side in SIDES]
        longest = max(len(ids) for ids, _ in encoded)
        ids = torch.tensor([ids + [tokenizer.eos_token_id] * (longest - len(ids)) for ids, _ in encoded])
        place = torch.arange(longest)
        is_real = torch.stack([place < len(ids) for ids, _ in encoded])
        is_answer = torch.stack([(place >= first) & (place < len(ids)) for ids, first in encoded])[:, 1:]
        with torch.inference_mode():
            logits = model(ids, attention_mask=is_real.long()).logits[:, :-1]
        of_tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums = (of_tokens * is_answer).sum(-1).view(-1, 2)
        yield from zip(batch, sums.tolist(), strict=True)


def encode(tokenizer: Any, prompt: list[Row], answer: list[Row]) -> tuple[list[int], int]:
    """The tokens of a chat up to the end of its answer, and the place at which that begins."""
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    while whole[-1] != tokenizer.eos_token_id:  # the template's line break after it, which no one generates
        whole.pop()
    return whole, len(start)


def ranked_right(model_dir: Path, rows: list[Row], adapter_dir: Path | None = None) -> float:
    """The share of pairs that are ranked right, in total; each share of those with and without a detail is printed."""
    model, tokenizer = load(model_dir, adapter_dir)
    right: dict[str, list[bool]] = {}
    for row, (chosen, rejected) in log_probabilities(model, tokenizer, rows):
        kind = f"{row.get('wording', 'any')} wording, {'a detail' if row['detail'] else 'no detail'}"
        right.setdefault(kind, []).append(chosen > rejected)
    for kind, hits in sorted(right.items()):
        print(f"demo: {kind}: {sum(hits)}/{len(hits)} ranked right", flush=True)
    return sum(map(sum, right.values())) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("rows", type=Path, help="jsonl file of pairs")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter")
    arguments = parser.parse_args()
    print(f"ranked right {ranked_right(arguments.model, read_rows(arguments.rows), arguments.adapter):.2f}")


if __name__ == "__main__":
    main()
