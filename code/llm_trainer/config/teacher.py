# SPDX-License-Identifier: Apache-2.0
"""The settings of a teacher, by the names that those of a base have: both are found, checked and loaded alike."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llm_trainer.common.errors import UserError
from llm_trainer.config.sections import MethodSettings, ModelSettings

TEACHER_CHANNEL = "teacher"
# Settings of a base -> those of a teacher.
TEACHER_NAMES = {
    "model_id": "teacher_model_name_or_path",
    "model_revision": "teacher_model_revision",
    "load_in_4bit": "teacher_load_in_4bit",
    "load_in_8bit": "teacher_load_in_8bit",
}
WORDS = {
    **{rf"\b{name}\b": theirs for name, theirs in TEACHER_NAMES.items()},
    "channel 'model'": f"channel '{TEACHER_CHANNEL}'",
    r"\bModel (folder|file)\b": r"Teacher's \1",
    r"\b([Tt])he (?:model|base)\b": r"\1he teacher",
    "another model": "another teacher",
}
# Settings that a teacher shares with the base.
SHARED = (
    *("trust_remote_code", "token", "torch_dtype", "attn_implementation", "use_snapshot_download"),
    *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
)


def derive_teacher(model: ModelSettings, methods: MethodSettings, channels: Mapping[str, Path]) -> ModelSettings:
    """Return the settings of the teacher, by the names of a base's. Its `model_id` is None where nothing names it."""
    values = {name: methods.value(theirs) for name, theirs in TEACHER_NAMES.items()}
    place = values.pop("model_id") or channels.get(TEACHER_CHANNEL)
    shared = {name: model.value(name) for name in SHARED}
    return ModelSettings().fill_in(**shared, **values, model_id=str(place) if place else None)


def speak_of_teacher(text: str) -> str:
    """Return a sentence about a base as one about the teacher, with the names of its settings."""
    for word, theirs in WORDS.items():
        text = re.sub(word, theirs, text)
    return text


@contextmanager
def about_teacher() -> Iterator[None]:
    """Have each sentence of a UserError in the block speak of the teacher, in place of a base."""
    try:
        yield
    except UserError as error:
        raise UserError(*map(speak_of_teacher, error.problems)) from error
