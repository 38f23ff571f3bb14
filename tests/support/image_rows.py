# SPDX-License-Identifier: Apache-2.0
"""Rows with images and without, the same as conversations for a processor, and their preparation."""

import io

from datasets import Dataset, Image, List

from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.formats.detection import detect_format
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.data.images.processors import load_processor
from llm_trainer.data.tokenize import Preparer
from llm_trainer.readers.images import ImageFolder
from llm_trainer.readers.rows import Chunk
from support.image_families import save_family
from support.tiny_processors import TURN_ENDS, draw, save_processor

SIZES = [(100, 60), (40, 90), (30, 30)]
PICTURES = [draw(*size, seed) for seed, size in enumerate(SIZES)]


def encode(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def say(role, *parts):
    texts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": texts}


def show(image):
    return {"type": "image", "image": image}


ROWS = [
    {
        "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."}],
        "images": ["0.png"],
    },
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Me."}]},
    {
        "messages": [
            say("user", show({"bytes": encode(PICTURES[1]), "path": None}), " and ", show("2.png"), " differ?"),
            say("assistant", "Much."),
            say("user", "Sure?"),
            say("assistant", "Yes."),
        ]
    },
]
CONVERSATIONS = [
    [say("user", show(PICTURES[0]), "\nWhat is it?"), say("assistant", "A cat.")],
    [say("user", "Who are you?"), say("assistant", "Me.")],
    [
        say("user", show(PICTURES[1]), " and ", show(PICTURES[2]), " differ?"),
        say("assistant", "Much."),
        say("user", "Sure?"),
        say("assistant", "Yes."),
    ],
]


def save_pictures(folder):
    for number, picture in enumerate(PICTURES):
        picture.save(folder / f"{number}.png")


PAIRS = [
    {
        "prompt": [{"role": "user", "content": "<image>\nWhat is it?"}],
        "chosen": [{"role": "assistant", "content": "A cat."}],
        "rejected": [{"role": "assistant", "content": "No idea at all."}],
        "images": ["0.png"],
    },
    {
        "prompt": [say("user", show({"bytes": encode(PICTURES[1]), "path": None}), " and ", show("2.png"), " differ?")],
        "chosen": [{"role": "assistant", "content": "Much, and more."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
]


def build_raw_pairs():
    """The pairs as TRL takes them: with a column of images."""
    prompts = [CONVERSATIONS[0][:1], CONVERSATIONS[2][:1]]
    images = [[{"bytes": encode(picture), "path": None} for picture in own] for own in (PICTURES[:1], PICTURES[1:])]
    rows = [
        {"prompt": plain, **{side: [say("assistant", pair[side][0]["content"])] for side in ("chosen", "rejected")}}
        for plain, pair in zip(map(leave_marks, prompts), PAIRS, strict=True)
    ]
    return Dataset.from_list(rows).add_column("images", images).cast_column("images", List(Image()))


def leave_marks(conversation):
    """A conversation with places for images, and none of them."""

    def without_image(part):
        return part if part["type"] == "text" else {"type": "image"}

    return [{**turn, "content": [*map(without_image, turn["content"])]} for turn in conversation]


def build_raw_rows():
    """The conversations as TRL takes them: messages with placeholders, and a column of images."""

    rows = [{"messages": leave_marks(conversation)} for conversation in CONVERSATIONS]
    parts = [[part for turn in conversation for part in turn["content"]] for conversation in CONVERSATIONS]
    images = [[{"bytes": encode(part["image"]), "path": None} for part in own if "image" in part] for own in parts]
    return Dataset.from_list(rows).add_column("images", images).cast_column("images", List(Image()))


def build_vocabulary(kind, folder, sizes=None, options=None):
    """What the encoding of rows needs to know of a model whose processor is in the folder."""
    save_processor(kind, folder, sizes, options)
    processor = load_processor(str(folder), False, {})
    tokenizer = processor.tokenizer
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_ENDS[kind])}
    images = ImageProcessing(str(folder), processor.image_token_id)
    return Vocabulary(tokenizer, frozenset(stops), len(tokenizer), images)


def build_family_vocabulary(name, folder):
    """What the encoding of rows needs to know of a model of a family, whose processor is put into the folder."""
    save_family(name, folder)
    processor = load_processor(str(folder), False, {})
    tokenizer = processor.tokenizer
    images = ImageProcessing(str(folder), processor.image_token_id)
    return Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer), images)


def prepare_rows(vocabulary, rows, folder, **settings):
    """The rows as they are trained on, and the report on them. Their images are in the folder."""
    data = Settings(**settings).data
    row_format = detect_format(rows[0], data)
    preparer = Preparer(Encoder(vocabulary, data, row_format), data, row_format, "a.jsonl row 1", ImageFolder(folder))
    numbers = list(range(1, len(rows) + 1))
    prepared = preparer.prepare_chunk(Chunk("a.jsonl", numbers, rows, folder / "a.jsonl"))
    return Dataset(prepared.table), prepared.report
