# SPDX-License-Identifier: Apache-2.0
"""Checks of what the settings point at: the model's files, the channels, the place for the result. No torch."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.environment import Environment
from llm_trainer.settings import Settings, show
from llm_trainer.sources import Source, find_train, find_validation

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "vocab.*", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Inputs:
    """What a job reads and where it writes, resolved from settings and channels."""

    model: str  # a folder, or a Hub id
    train: list[Source]
    validation: list[Source]
    model_dir: Path
    checkpoint_dir: Path


def find_inputs(settings: Settings, environment: Environment) -> tuple[Inputs, list[str]]:
    """The job's inputs, and a sentence for every one that is missing or unusable."""
    problems: list[str] = []
    model = settings.model_id or find_model_channel(environment)
    if model is None:
        problems.append("model_id is missing: give a Hugging Face model id, or the model's files as channel 'model'.")
    else:
        problems += check_model(model)
    train, missing = find_train(settings, environment)
    validation, missing_too = find_validation(settings, environment)
    problems += missing + missing_too
    problems += check_evaluation(settings, has_validation=bool(validation))
    inputs = Inputs(
        model=model or "",
        train=train,
        validation=validation,
        model_dir=Path(settings.output_dir) if settings.output_dir else environment.model_dir,
        checkpoint_dir=Path(settings.checkpoint_dir) if settings.checkpoint_dir else environment.checkpoint_dir,
    )
    problems += check_writable(inputs.model_dir, "output_dir")
    return inputs, problems


def find_model_channel(environment: Environment) -> str | None:
    channel = environment.channels.get("model")
    return str(channel) if channel else None


def check_model(model: str) -> Iterator[str]:
    """Sentences about a model folder whose files are incomplete, or a name that can be neither folder nor Hub id."""
    folder = Path(model)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(model):
            yield (
                f"model_id={model!r} is neither a folder in the container nor a Hugging Face id: "
                "give an id such as 'Qwen/Qwen3-0.6B' or the folder of a channel."
            )
        return
    if not (folder / "config.json").is_file():
        yield f"Model folder {folder} has no config.json: give the folder that holds the model's files itself."
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        yield f"Model folder {folder} has no tokenizer ({TOKENIZER_FILES[0]}): put the tokenizer beside the weights."
    yield from check_weights(folder)
    for file in folder.glob("*.*"):
        if not os.access(file, os.R_OK):
            yield f"Model file {file} cannot be read by user {os.getuid()}: make it readable, or run as another user."


def check_weights(folder: Path) -> Iterator[str]:
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            yield f"{index} is not a weights index ({error!r}): download the model again."
            return
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            yield f"Model folder {folder} lacks {len(missing)} weight files of its index, first {missing[0]}: add them."
    elif not any(folder.glob("*.safetensors")):
        others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (found {', '.join(others[:3])}, which is not read)" if others else ""
        yield f"Model folder {folder} has no weights{found}: put the model's .safetensors files there."


def check_evaluation(settings: Settings, has_validation: bool) -> Iterator[str]:
    if has_validation:
        return
    for name, off in (("early_stopping", False), ("load_best_model_at_end", False), ("eval_strategy", "no")):
        value = getattr(settings, name)
        if value != off:
            yield f"{name}={show(value)} needs validation data and there is none: give a channel 'validation'."


def check_writable(model_dir: Path, setting: str) -> Iterator[str]:
    """The nearest folder there is must be writable: an unwritable one would lose the result after hours."""
    nearest = next(folder for folder in (model_dir, *model_dir.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        yield f"{setting}: user {os.getuid()} cannot write to {nearest}: mount it writable, or run as another user."
