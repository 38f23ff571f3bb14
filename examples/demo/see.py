# SPDX-License-Identifier: Apache-2.0
"""The demo of models that see: one of random weights learns to count shapes in pictures and to name their colour."""

import argparse
import os
import sys
from collections import Counter
from operator import eq
from pathlib import Path
from typing import Any

import torch
from evaluate import Row, read_rows
from make_pictures import SPLITS, write_pictures
from make_vision_model import write_model
from PIL import Image
from run import lay_out, train_between
from transformers import AutoModelForImageTextToText, AutoProcessor

BATCH = 80
# Random weights take a high learning rate and several epochs, and all of them have to learn.
HYPERPARAMETERS = {
    "use_peft": "false",
    "train_vision": "true",
    "learning_rate": "0.003",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": "0.1",
    "num_train_epochs": "6",
    "per_device_train_batch_size": "32",
    "logging_steps": "25",
}


def right_answer(row: Row) -> str:
    return str(row["messages"][-1]["content"])


def write_answers(model: Any, processor: Any, rows: list[Row], pictures: Path) -> list[str]:
    """What the model writes greedily about each row's picture, stopped once it is longer than any right answer."""
    prompts = [
        processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    images = [[Image.open(pictures / name) for name in row["images"]] for row in rows]
    inputs = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(model_dir: Path, rows: list[Row], pictures: Path) -> float:
    """The share of rows that the model of a folder answers exactly right."""
    processor = AutoProcessor.from_pretrained(model_dir, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(model_dir, local_files_only=True, dtype=torch.float32).eval()
    right = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        expected, texts = [*map(right_answer, batch)], write_answers(model, processor, batch, pictures)
        right += sum(map(eq, texts, expected))
        done = f"{start + len(batch)}/{len(rows)} answered"
        print(f"demo: {done}; expected {expected[-1]!r}, got {texts[-1]!r}", flush=True)
    return right / len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path, help="where pictures, model and /opt/ml are laid out")
    # Layers this small gain little from a second thread, and lose much where other programs keep it waiting.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work_dir = parser.parse_args().work_dir.absolute()
    base_dir, pictures, model = work_dir / "opt/ml", work_dir / "pictures", work_dir / "model"
    write_pictures(pictures, SPLITS)
    write_model(model)
    channels = {name: sorted((pictures / name).iterdir()) for name in ("train", "validation")}
    lay_out(base_dir, HYPERPARAMETERS, channels, model)
    held_out = pictures / "heldout"
    rows = read_rows(held_out / "heldout.jsonl")
    chance = max(Counter(map(right_answer, rows)).values()) / len(rows)
    asks = f"asking about {len(rows)} held-out pictures (chance is {chance:.2f})"
    return train_between(
        base_dir, "demo-vision", "accuracy", lambda trained: accuracy(trained or model, rows, held_out), asks
    )


if __name__ == "__main__":
    sys.exit(main())
