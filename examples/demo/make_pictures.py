# SPDX-License-Identifier: Apache-2.0
"""Draws the vision demo's data set: pictures of a few shapes in one colour, each with its answer, such as `3 red`.

Kinds, sizes, places and shades of the shapes, and the grey behind them, are drawn by lot from a fixed seed. So the same
pictures come again, and no picture comes twice.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_dataset import SEED, write_files
from PIL import Image, ImageDraw

SIDE = 64  # pixels
SPLITS = {"train": 6000, "validation": 64, "heldout": 320}  # pictures
QUESTION = "How many shapes are there, and of which colour?"
COLOURS = {"red": (215, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 215), "yellow": (230, 200, 30)}
ANSWERS = tuple(f"{count} {colour}" for count in range(1, 5) for colour in COLOURS)
Place = tuple[int, int, int]  # a shape's middle, and half of its width


def choose_places(draw: random.Random, count: int) -> list[Place]:
    """Places of shapes that lie within the picture and do not touch each other."""
    places: list[Place] = []
    while len(places) < count:
        half = draw.randint(6, 8)
        x, y = (draw.randint(half + 1, SIDE - half - 2) for _ in range(2))
        if all(max(abs(x - place[0]), abs(y - place[1])) > half + place[2] + 2 for place in places):
            places.append((x, y, half))
    return places


def draw_shape(draw: random.Random, canvas: ImageDraw.ImageDraw, place: Place, colour: str) -> None:
    """Draw a circle, a square or a triangle."""
    x, y, half = place
    box = (x - half, y - half, x + half, y + half)
    red, green, blue = (part + draw.randint(-20, 20) for part in COLOURS[colour])
    fill = (red, green, blue)
    kind = draw.choice(("circle", "square", "triangle"))
    if kind == "circle":
        canvas.ellipse(box, fill=fill)
    elif kind == "square":
        canvas.rectangle(box, fill=fill)
    else:
        canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)


def draw_picture(draw: random.Random, answer: str) -> Image.Image:
    """A picture that the answer is right for."""
    count, colour = answer.split()
    grey = draw.randint(200, 255)
    picture = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    canvas = ImageDraw.Draw(picture)
    for place in choose_places(draw, int(count)):
        draw_shape(draw, canvas, place, colour)
    return picture


def make_row(name: str, answer: str) -> dict[str, Any]:
    question = {"role": "user", "content": f"<image>{QUESTION}"}
    return {"messages": [question, {"role": "assistant", "content": answer}], "images": [name]}


def draw_new_pictures(draw: random.Random, answers: list[str], drawn: set[bytes]) -> Iterator[Image.Image]:
    """A picture for each answer, unlike all that were drawn before."""
    for answer in answers:
        picture = draw_picture(draw, answer)
        while picture.tobytes() in drawn:
            picture = draw_picture(draw, answer)
        drawn.add(picture.tobytes())
        yield picture


def write_pictures(folder: Path, splits: dict[str, int]) -> None:
    """Write a folder for each split: its pictures, and a data file that names them. Answers are equally frequent."""
    draw = random.Random(SEED)
    drawn: set[bytes] = set()
    for split, count in splits.items():
        answers = [ANSWERS[number % len(ANSWERS)] for number in range(count)]
        draw.shuffle(answers)
        rows = [make_row(f"{number:04}.png", answer) for number, answer in enumerate(answers)]
        write_files(folder / split, {split: rows})
        for row, picture in zip(rows, draw_new_pictures(draw, answers, drawn), strict=True):
            picture.save(folder / split / row["images"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the pictures")
    for split, count in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="pictures")
    arguments = parser.parse_args()
    write_pictures(arguments.output, {split: getattr(arguments, split) for split in SPLITS})


if __name__ == "__main__":
    main()
