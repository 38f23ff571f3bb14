# SPDX-License-Identifier: Apache-2.0
"""The earlier adapter, from which a training goes on: its place, what is wrong with it, and what it tells of itself.

It comes from an earlier job, or from another tool. Whether it fits the model is for `model/adapter_file.py`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.common.files import compute_digest, write_verbatim
from llm_trainer.common.hub import download_adapter
from llm_trainer.common.ranks import run_on_local_rank_zero
from llm_trainer.common.safetensors_files import ADAPTER_CONFIG, ADAPTER_FILE, read_header
from llm_trainer.config.environment import Environment
from llm_trainer.config.schema import show_value
from llm_trainer.config.sections import ADDRESS, HUB_ID, AdapterSettings
from llm_trainer.job.model_archive import find_archive
from llm_trainer.job.model_place import locate_adapter
from llm_trainer.journal.manifest import MANIFEST, read_leftover_manifest
from llm_trainer.readers.sources import HUB_DATA_ID

PICKLE = "adapter_model.bin"
# The field of adapter_config.json that tells each setting.
FIELD_OF = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
# These change what the adapter computes. Targets are compared on the model, as there are many ways to write them.
FIXED = ("lora_r", "lora_alpha", "use_rslora", "use_dora")
TOLD = ("training_job_name", "num_steps", "model")  # by an adapter's manifest, of the job that made it
MAX_LINEAGE = 100  # entries
NOTHING_TO_MERGE = (
    "merge_adapter=true without an earlier adapter: give one as channel 'adapter' or with adapter_path, or remove "
    "merge_adapter."
)
NOTHING_TO_TRAIN_ON = (
    "channel 'adapter' with use_peft=false: full fine-tuning has no adapter to go on from; remove the channel, or set "
    "merge_adapter=true."
)


def name_adapter(settings: AdapterSettings, environment: Environment) -> str:
    """Return the place that the user names for the earlier adapter: a Hub id, a path, or the channel; "" for none."""
    return settings.adapter_path or str(environment.channels.get("adapter", ""))


def find_adapter(settings: AdapterSettings, environment: Environment, unpacks: bool = True) -> tuple[str, list[str]]:
    """Return the earlier adapter's folder or Hub id, "" for none, and a sentence for each thing wrong with it.

    Without `unpacks`, an adapter in an archive is left for later, and nothing is said of it.
    """
    place = name_adapter(settings, environment)
    if not place:
        return "", [NOTHING_TO_MERGE] if settings.merge_adapter else []
    if not (settings.use_peft or settings.merge_adapter):  # a rule tells of the setting
        return "", [] if settings.adapter_path else [NOTHING_TO_TRAIN_ON]
    if ADDRESS.match(place):
        return "", [
            f"adapter_path={place!r} is an address, and an adapter is read from a folder: give its S3 prefix as "
            "channel 'adapter', or the Hugging Face id."
        ]
    try:
        if not unpacks and find_archive(Path(place)):
            return "", []
        found = locate_adapter(place)
    except UserError as error:
        return "", list(error.problems)
    if not os.path.isdir(found):
        return (found, []) if HUB_ID.fullmatch(found) else ("", [describe_no_place(found)])
    problems = list(check_adapter(settings, Path(found)))
    return ("" if problems else found), problems


def describe_no_place(place: str) -> str:
    """Return the sentence on an adapter's name that is neither a folder nor a Hub id."""
    return (
        f"adapter_path={place!r} is neither a folder in the container nor a Hugging Face id: give the folder that "
        f"holds {ADAPTER_CONFIG}, or an id such as 'organization/name'."
    )


def check_adapter(settings: AdapterSettings, folder: Path) -> Iterator[str]:
    """Yield sentences about an adapter's folder: files that are missing or damaged, and settings that contradict it."""
    try:
        config = read_config(folder)
    except UserError as error:
        yield from error.problems
    else:
        if not settings.merge_adapter:  # whose new adapter is as the settings say
            yield from find_contradictions(settings, config, folder)
    yield from check_weights(folder)


def check_weights(folder: Path) -> Iterator[str]:
    """Yield a sentence where the adapter's weights are missing, pickled or damaged."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        if (folder / PICKLE).is_file():
            yield (
                f"Adapter folder {folder} has {PICKLE} and no {ADAPTER_FILE}, and pickled weights are not read: save "
                "the adapter as safetensors."
            )
        elif (folder / ADAPTER_CONFIG).is_file():
            yield f"Adapter folder {folder} has no {ADAPTER_FILE}: put the adapter's weights beside {ADAPTER_CONFIG}."
        return
    try:
        read_header(file)
    except (ValueError, OSError) as error:
        yield f"{file} {error}" if isinstance(error, ValueError) else f"{file} cannot be read: make it readable."


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings that an adapter's config tells, by their names. Raises UserError where it is no LoRA's."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise UserError(
            f"Adapter folder {folder} has no {ADAPTER_CONFIG}: give the folder that an adapter was saved to."
        )
    try:
        config = read_json(file)
    except UnreadableTextError as error:
        raise UserError(f"{file} {error.reason}: give the file as PEFT saved it.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{file} has peft_type={kind!r}: only a LoRA adapter can be gone on from; give one.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{file} has task_type={config['task_type']!r}: give the adapter of a causal language model.")
    values = {name: config[field] for name, field in FIELD_OF.items() if config.get(field) is not None}
    values.setdefault("target_modules", [])  # one on parameters alone
    try:
        checked = AdapterSettings.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        field = FIELD_OF.get(str(fault["loc"][0]), "a field")
        raise UserError(
            f"{file} has {field}={cut_quote(repr(fault['input']))}, which no LoRA adapter has: give the file as PEFT "
            "saved it."
        ) from error
    return {name: checked.value(name) for name in FIELD_OF}


def find_contradictions(settings: AdapterSettings, told: dict[str, Any], folder: Path) -> Iterator[str]:
    """Yield a sentence for each setting that the user gave and that is another than the adapter's."""
    for name in FIXED:
        if settings.is_given(name) and settings.value(name) != told[name]:
            yield (
                f"{name}={show_value(settings.value(name))}: the adapter in {folder}, which the training goes on from, "
                f"has {show_value(told[name])}; remove {name}."
            )
    if settings.init_lora_weights != "default":
        yield (
            f"init_lora_weights={settings.init_lora_weights} with the adapter in {folder}: the training goes on from "
            "its values; remove init_lora_weights."
        )


def find_base_warnings(folder: Path, model: str, revision: str | None) -> Iterator[str]:
    """Yield a sentence where an adapter names another base on the Hub than the job's model, or another revision of it.

    Copies of a model have other names, and folders have any. A manifest that tells the base's weights is better.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = read_json(file)
    except UnreadableTextError:  # told of with what else is wrong with the adapter
        return
    named, its_revision = config.get("base_model_name_or_path"), config.get("revision")
    are_ids = all(isinstance(name, str) and HUB_DATA_ID.fullmatch(name) for name in (named, model))
    if not are_ids or read_leftover_manifest(folder)[0].get("base_digest"):
        return
    if named.rpartition("/")[2].lower() != model.rpartition("/")[2].lower():
        yield f"{file} names {named!r} as the adapter's base, and the job's model is {model!r}: give the same weights."
    elif revision and its_revision and revision != its_revision:
        yield f"{file} names revision {its_revision!r} of the adapter's base, and model_revision is {revision!r}."


def take_over(settings: AdapterSettings, folder: str) -> AdapterSettings:
    """Return the settings with the adapter's own values where the user gave none, and with the folder as its path.

    An adapter that is merged tells nothing of the new one.
    Raises UserError for what is wrong with the adapter.
    """
    if problems := list(check_adapter(settings, Path(folder))):
        raise UserError(*problems)
    told = {} if settings.merge_adapter else read_config(Path(folder))
    own = {name: value for name, value in told.items() if not settings.is_given(name)}
    return settings.fill_in(**own, adapter_path=folder)


def fetch_adapter(place: str, revision: str | None, scratch_dir: Path) -> str:
    """Return the folder of an adapter's files. Download one from the Hub once a host.

    Raises UserError when it cannot be downloaded.
    """
    if os.path.isdir(place):
        return place
    note = scratch_dir / "adapter_folder"
    run_on_local_rank_zero(
        scratch_dir / "adapter.done", lambda: write_verbatim(note, download_adapter(place, revision, [MANIFEST]))
    )
    return note.read_text(encoding="utf-8")


def describe_lineage(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return one entry for the adapter that a training went on from, and one for each that this one came from.

    `name` is the adapter's as the job names it. What its own manifest tells is taken as it is.
    """
    manifest, _ = read_leftover_manifest(folder)
    told = {key: manifest.get(key) for key in TOLD}
    entry = {"adapter": name, "sha256": compute_digest(folder / ADAPTER_FILE), **told}
    earlier: Any = manifest.get("lineage")
    entries = [each for each in earlier if isinstance(each, dict)] if isinstance(earlier, list) else []
    return [entry, *({key: each.get(key) for key in entry} for each in entries)][:MAX_LINEAGE]
