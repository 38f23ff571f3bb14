# SPDX-License-Identifier: Apache-2.0
"""How fast a collator makes batches of rows with images, beside Pillow alone, and whether it keeps a step of 1 s fed.

    .venv/bin/python bench/images.py [ROUNDS]

Pictures are JPEGs of 1280 x 960 with gradients, shapes and noise, as photographs have them. The processors are those
of SmolVLM and of Qwen2-VL. Pillow alone decodes, resizes to the same size, and normalizes: the least that any
processor does. Rounds are paired: in each one every way takes the same pictures, on one core.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))

SIZE = 1280, 960
NUM_PICTURES, ROWS_A_BATCH, NUM_STEPS = 16, 4, 12
# kind -> sizes of its images, and other options of its processor
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "idefics": ({"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, {"image_seq_len": 64}),
    "qwen": ({"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}, {}),
}
# The width and height that a picture gets, and how.
RESIZED = {"idefics": (2048, 1536), "qwen": (1148, 868)}
FILTERS = {"idefics": Image.Resampling.LANCZOS, "qwen": Image.Resampling.BICUBIC}


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-images-") as name:
        folder = Path(name)
        draw_pictures(folder)
        for kind in KINDS:
            rows, collator = prepare(kind, folder)
            compare(kind, rows, collator, rounds)
            feed(kind, rows, collator)


def draw_pictures(folder: Path) -> None:
    """Write JPEGs that take about as many bytes as photographs of their size do."""
    draw = np.random.default_rng(0)
    width, height = SIZE
    for number in range(NUM_PICTURES):
        across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        colours = draw.uniform(0, 255, (3, 3))
        values = sum(part[..., None] * own for part, own in zip((across, down, 1 - across), colours, strict=True)) / 2
        values = values + draw.normal(0, 8, values.shape)
        picture = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8), "RGB")
        for left, top, size, shade in draw.integers(0, (width, height, 300, 255), (40, 4)).tolist():
            ImageDraw.Draw(picture).ellipse((left, top, left + size, top + size), fill=(shade, 255 - shade, size % 256))
        picture.filter(ImageFilter.GaussianBlur(1)).save(folder / f"{number}.jpg", quality=90)


def prepare(kind: str, folder: Path) -> tuple[Any, Any]:
    """Rows of a picture each, tokenized, and what makes batches of them."""
    from llm_trainer.data.images.collator import ImageCollator
    from llm_trainer.readers.images import ImageRules
    from support.image_rows import build_vocabulary, prepare_rows

    vocabulary = build_vocabulary(kind, folder, *KINDS[kind])
    asked = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A picture."}]
    rows, _ = prepare_rows(
        vocabulary, [{"messages": asked, "images": [f"{number}.jpg"]} for number in range(NUM_PICTURES)], folder
    )
    return rows, ImageCollator(vocabulary.images, ImageRules(10**8), vocabulary.tokenizer.pad_token_id)


def process_by_pillow(kind: str, rows: list[dict[str, Any]]) -> list[Any]:
    """The rows' pictures, decoded, resized and normalized."""
    made = []
    for row in rows:
        with Image.open(row["pictures"][0]["path"]) as picture:
            small = picture.convert("RGB").resize(RESIZED[kind], FILTERS[kind])
        values = np.asarray(small).transpose(2, 0, 1).astype(np.float32)
        values *= 1 / (255 * 0.5)
        values -= 1.0
        made.append(values)
    return made


def compare(kind: str, rows: Any, collator: Any, rounds: int) -> None:
    """Print the pictures a second of both ways, and their ratio in each round."""
    import torch

    torch.set_num_threads(1)
    batches = [[rows[place + n] for n in range(ROWS_A_BATCH)] for place in range(0, NUM_PICTURES, ROWS_A_BATCH)]
    ways: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
        "collator": collator,
        "Pillow": lambda batch: process_by_pillow(kind, batch),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            for batch in batches:
                way(batch)
            rates[name].append(NUM_PICTURES / (time.process_time() - began))
    for name, found in rates.items():
        print(f"{kind}: {name}: {describe(found)} pictures a second of processor time")
    ratios = [own / floor for own, floor in zip(rates["collator"], rates["Pillow"], strict=True)]
    print(f"{kind}: collator / Pillow: {describe(ratios)}", flush=True)


def feed(kind: str, rows: Any, collator: Any) -> None:
    """Print how long a training step of a second has to wait for its batch, which two processes make."""
    from torch.utils.data import DataLoader

    order = [number % NUM_PICTURES for number in range(ROWS_A_BATCH * NUM_STEPS)]
    loader = DataLoader(rows, ROWS_A_BATCH, sampler=order, num_workers=2, collate_fn=collator)
    waits = list(measure_waits(iter(loader)))[2:]  # after the first two, which the processes begin with
    print(f"{kind}: {ROWS_A_BATCH} rows a step, 2 processes: a step of 1 s waits {describe(waits)} s", flush=True)


def measure_waits(batches: Iterator[Any]) -> Iterator[float]:
    """Yield the seconds until each batch is there, a second after the one before."""
    for _ in range(NUM_STEPS):
        began = time.monotonic()
        next(batches)
        yield time.monotonic() - began
        time.sleep(1)


def describe(values: list[float]) -> str:
    """The median of some figures, and the least and the most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
