# SPDX-License-Identifier: Apache-2.0
"""config.json of a result: the base's own with what the training changed, in the words of Transformers 4 and of 5.

Transformers 5 renamed fields, and leaves the older names out of what it writes. Transformers 4 takes its default for a
name that it does not find, without a word. It would serve a model trained with a rope_theta of 500,000 with 10,000.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from llm_trainer.common.bounded_parsing import read_json
from llm_trainer.common.files import write_text

# A change of one of them is a change of all: the base's older words may not stay beside new ones.
DTYPE_NAMES = ("dtype", "torch_dtype")
ROPE_NAMES = (
    *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct"),
    *("rope_local_base_freq", "global_rope_theta", "local_rope_theta"),
)
# Families that Transformers 4 knows with one rope for full and another for sliding attention: its names of their bases.
LAYER_BASES: dict[str, tuple[str, str | None]] = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),
}
ROTARY_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}


def write_config(folder: Path, base: Path, result: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Write config.json to a folder: the base's, with what `result` has otherwise."""
    loaded = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    config = build_config(json.loads((base / CONFIG_NAME).read_text(encoding="utf-8")), loaded, result)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def write_generation_config(folder: Path, base: Path, result: GenerationConfig | None) -> None:
    """Write generation_config.json to a folder: the base's, with what `result` has otherwise.

    Do nothing where the base has none.
    """
    if result is None or not (base / GENERATION_CONFIG_NAME).is_file():
        return
    before = GenerationConfig.from_pretrained(base).to_diff_dict()
    stored = json.loads((base / GENERATION_CONFIG_NAME).read_text(encoding="utf-8"))
    config = apply_changes(stored, before, result.to_diff_dict())
    write_text(folder / GENERATION_CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def add_stop_tokens(folder: Path, base: Path, tokens: Iterable[int]) -> list[int]:
    """Add tokens that end an answer to a result's generation_config.json, and return those that it lacked.

    An adapter's folder gets the base's file only where there is one to add. Fields that contradict each other stay.
    """
    places = [place / GENERATION_CONFIG_NAME for place in (folder, base)]
    stored = next((read_json(file, is_plain=False) for file in places if file.is_file()), None)
    if stored is None:  # Transformers and vLLM read the model's config then
        config = read_json(base / CONFIG_NAME, is_plain=False)
        stored = {"eos_token_id": config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))}
    stops = stored.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    added = [token for token in dict.fromkeys(tokens) if token not in stops]
    if added:
        write_text(
            folder / GENERATION_CONFIG_NAME, json.dumps({**stored, "eos_token_id": [*stops, *added]}, indent=2) + "\n"
        )
    return added


def drop_contradictions(config: GenerationConfig) -> list[str]:
    """Remove the fields with which Transformers refuses to write a generation config, and return their names.

    It is built up field by field, and those that never fit the others are left.
    """
    sound, waiting, num_tried = GenerationConfig(), dict(vars(config)), 0
    while waiting and len(waiting) != num_tried:
        num_tried = len(waiting)
        for name, value in list(waiting.items()):
            before = getattr(sound, name, None)
            setattr(sound, name, value)
            try:
                sound.validate(strict=True)
                del waiting[name]  # it may be what another one needs, as do_sample is for temperature
            except ValueError:
                setattr(sound, name, before)
    for name in waiting:
        setattr(config, name, getattr(sound, name))
    return sorted(waiting)


def build_config(stored: dict[str, Any], loaded: PreTrainedConfig, result: PreTrainedConfig) -> dict[str, Any]:
    """Return the content of a result's config.json.

    `stored` is the content of the base's, `loaded` is what Transformers makes of it.
    """
    before, after = (json.loads(config.to_json_string(use_diff=True)) for config in (loaded, result))
    config = apply_changes(stored, before, after) if before.get("model_type") == after.get("model_type") else after
    for name in ("", *loaded.sub_configs):
        part = config.get(name) if name else config
        if isinstance(part, dict):
            add_older_names(part)
    return config


def apply_changes(stored: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is stored, with the fields that differ between two readings as the second has them."""
    result = dict(stored)
    for name in sorted({*before, *after} - {"transformers_version"}):
        old, new = before.get(name), after.get(name)
        if name in before and name in after and old == new:
            continue
        if all(isinstance(part, dict) and "model_type" in part for part in (stored.get(name), old, new)):
            result[name] = apply_changes(stored[name], old or {}, new or {})
            continue
        for same in next((names for names in (DTYPE_NAMES, ROPE_NAMES) if name in names), (name,)):
            result.pop(same, None)
        if name in after:
            result[name] = new
    return result


def add_older_names(part: dict[str, Any]) -> None:
    """Add Transformers 4's names of number type and rope beside those of Transformers 5, where they are absent."""
    dtype = next((part[name] for name in DTYPE_NAMES if part.get(name)), None)
    if dtype:
        part |= dict.fromkeys(DTYPE_NAMES, dtype)
    rope = part.get("rope_parameters")
    if isinstance(rope, dict):
        for name, value in name_rope(str(part.get("model_type")), rope).items():
            part.setdefault(name, value)


def name_rope(family: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Return Transformers 4's names of what Transformers 5 calls rope_parameters."""
    if not any(isinstance(value, dict) for value in rope.values()):
        return name_flat_rope(family, rope)
    if family not in LAYER_BASES:  # Transformers 4 does not know the family
        return {}
    full, sliding = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    full_name, sliding_name = LAYER_BASES[family]
    named = {full_name: full.get("rope_theta"), "rope_scaling": find_scaling(full)}
    return {**named, sliding_name: sliding.get("rope_theta")} if sliding_name else named


def name_flat_rope(family: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Return Transformers 4's names of a rope that all layers share."""
    base, share = ROTARY_NAMES.get(family, ("rope_theta", "partial_rotary_factor"))
    named = {base: rope.get("rope_theta"), "rope_scaling": find_scaling(rope)}
    return {**named, share: rope["partial_rotary_factor"]} if "partial_rotary_factor" in rope else named


def find_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Return the parameters of a scaled rope, without those that have names of their own; None for a plain one."""
    if rope.get("rope_type", "default") == "default" and "mrope_section" not in rope:
        return None
    return {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
