# SPDX-License-Identifier: Apache-2.0
"""Settings read from a YAML file, the hyperparameters and the command line. The later wins over the earlier."""

import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llm_trainer.common import bounded_parsing
from llm_trainer.common.bounded_parsing import UnreadableTextError
from llm_trainer.common.errors import cut_quote
from llm_trainer.common.files import find_denial
from llm_trainer.common.redaction import note_secrets
from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.environment import PRICE_FILE, Environment
from llm_trainer.config.hyperparameter_decoding import decode_value
from llm_trainer.config.plain_values import PATHS, find_path_fault, find_unusable_part
from llm_trainer.config.schema import FIELDS, Settings, list_plain_types, show_value, split_union
from llm_trainer.config.sections import ALIASES, OWN_DEFAULTS

# Names from other tools, and the settings that they mean. No spelling distance would find these.
SYNONYMS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "dataset": "train_dataset_path",
    "base_model": "model_id",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "global_batch_size",
}
# Bounds of a field, as pydantic names them -> how they are told.
COMPARISONS = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most", "min_length": "of a length of at least"}
JOB_SECTION = "job"  # of a YAML file: what `submit` tells SageMaker (aws/options.py), and no setting


def read_settings(environment: Environment, arguments: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """Return the settings, and a sentence for every mistake in them. A mistaken setting keeps its default.

    `arguments` are the settings of the command line.
    """
    problems: list[str] = []
    given = {**environment.hyperparameters, **arguments}
    note_secrets(given)
    in_file = read_yaml(find_config_file(environment, given), problems)
    in_file.pop(JOB_SECTION, None)
    asked = resolve_names(in_file, "YAML key", problems)
    note_secrets(asked)
    asked |= resolve_names(given, "Hyperparameter", problems)
    values = {}
    for name, raw in asked.items():
        types, nullable = list_plain_types(name)
        value = restore_no(name, decode_value(raw, types, nullable) if isinstance(raw, str) else raw)
        if value is None and not nullable:
            continue  # null asks for the default
        problem = find_problem(name, value, raw)
        if problem:
            problems.append(problem)
        else:
            values[name] = value
    settings = Settings(**values)
    return settings, problems + list(find_contradictions(settings))


def find_config_file(environment: Environment, given: Mapping[str, Any]) -> Path | None:
    """Return the YAML file that `config` names, or the channel of that name, or None."""
    named = decode_value(str(given.get("config") or ""), frozenset({"str"}), nullable=True)
    if named is not None:
        return Path(named)
    return environment.channels.get("config")


def find_yaml_file(folder: Path, problems: list[str]) -> Path | None:
    """Return the only YAML file of a folder, None for one with prices alone. Another number adds to `problems`."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    if len(files) == 1:
        return files[0]
    if files or not (folder / PRICE_FILE).exists():
        names = ", ".join(file.name for file in files) or "none"
        problems.append(
            f"config: {folder} must hold exactly one .yaml file but has {names}: name one with config=PATH."
        )
    return None


def read_yaml(path: Path | None, problems: list[str]) -> dict[str, Any]:
    """Return the settings in a YAML file, or in the only YAML file of a folder. Mistakes are added to `problems`."""
    if path is None:
        return {}
    if denied := list(find_denial(path, depth=1)):
        problems += denied
        return {}
    if path.is_dir():
        found = find_yaml_file(path, problems)
        if found is None:
            return {}
        path = found
    if not path.exists():
        problems.append(f"config={str(path)!r} does not exist: give the path of a YAML file in a channel.")
        return {}
    try:
        value = bounded_parsing.read_yaml(path)
    except UnreadableTextError as error:
        problems.append(f"{path} {error.reason}: write it as `key: value` lines.")
        return {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds a YAML {type(value).__name__}: write it as `key: value` lines.")
        return {}
    return value


def resolve_names(given: Mapping[Any, Any], source: str, problems: list[str]) -> dict[str, Any]:
    """Return the given values under the settings' own names. Unknown names and clashing aliases become problems."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        key = str(key)
        if key.startswith("sagemaker_") or key == "_tuning_objective_metric":
            continue  # SageMaker's own
        name = ALIASES.get(key, key)
        if name not in FIELDS:
            problems.append(f"{source} {key!r} is not a setting: {suggest_name(key, list_valid_names())}")
        elif name != key and name in given:
            problems.append(f"{source}s {key!r} and {name!r} are the same setting given twice: remove {key!r}.")
        else:
            values[name] = value
    return values


def list_valid_names() -> list[str]:
    """Return all names by which a setting may be given."""
    return [*FIELDS, *ALIASES]


def suggest_name(key: str, names: list[str]) -> str:
    """Return the end of a sentence about an unknown name: what the user may have meant."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    name = SYNONYMS.get(key.lower()) or (close[0] if close else None)
    if name:
        return f"the nearest valid name is {name!r}."
    return "remove it (`llm-trainer train --help` lists the valid names)."


def restore_no(name: str, value: Any) -> Any:
    """Return "no" for a false that is given to a setting with this choice, since YAML reads a bare no as false."""
    return "no" if str(value).lower() == "false" and "no" in list_choices(name) else value


def list_choices(name: str) -> list[str]:
    """Return the texts among which a setting is one, or an empty list where it is free."""
    return collect_choices(FIELDS[name])


def collect_choices(field: FieldInfo) -> list[str]:
    """Return the texts among which a field is one, of all methods that have it."""
    parts = split_union(field.annotation)
    return [choice for part in parts if typing.get_origin(part) is Literal for choice in typing.get_args(part)]


def find_problem(name: str, value: Any, raw: Any) -> str | None:
    """Return a sentence where the value breaks the rule of its field: key, value as given, rule, fix. Else None."""
    field = FIELDS[name]
    adapter = TypeAdapter[Any](Annotated[field.annotation, field], config=Settings.model_config)  # type: ignore[arg-type]
    is_stray_bool = isinstance(value, bool) and "bool" not in list_plain_types(name)[0]
    fault = find_unusable_part(value) or (find_path_fault(value) if name in PATHS else None)
    try:
        valid = None if fault else adapter.validate_python(value)
    except ValidationError:
        pass
    else:
        fault = fault or find_unusable_part(valid.get_secret_value() if isinstance(valid, SecretStr) else valid)
        if not (is_stray_bool or fault):
            return None
    shown = show_cut(raw)
    if fault:
        return f"{name}={shown} is not valid: {fault}."
    return f"{name}={shown} is not valid: it must be {describe_rule(field)}; {suggest_value(name, value)}"


def show_cut(value: Any) -> str:
    """Return a value as it is given, on one line and cut to what a sentence holds."""
    try:
        return cut_quote(repr(value))
    except (RecursionError, ValueError):  # nested deeply, or a number of more digits than Python prints
        return f"a {type(value).__name__}"


def describe_rule(field: FieldInfo) -> str:
    """Return what a field takes, such as "a number, at least 0 and below 1"."""
    words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
    words |= {"dict": "a JSON object", "list": "a list"}
    choices = collect_choices(field)
    kinds = [f"one of {', '.join(choices)}"] if choices else []
    for part in split_union(field.annotation):
        origin = typing.get_origin(part) or part
        if origin is Literal:
            continue  # among the choices
        if part is type(None):
            kinds.append("null")
        elif origin is list and typing.get_origin(typing.get_args(part)[0]) is Literal:
            kinds.append("a list of these")
        else:
            kinds.append("a text" if origin is SecretStr else words[origin.__name__])
    bounds = [
        f"{phrase} {getattr(constraint, key):g}"
        for constraint in field.metadata
        for key, phrase in COMPARISONS.items()
        if getattr(constraint, key, None) is not None
    ]
    rule = " or ".join(kinds)
    return f"{rule}, {' and '.join(bounds)}" if bounds else rule


def suggest_value(name: str, value: Any) -> str:
    """Return the end of a sentence about a wrong value: the nearest right one, or the default."""
    choices = list_choices(name)
    longer = [choice for choice in choices if choice.startswith(str(value))]
    close = longer or difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    if close and value != "":
        return f"the nearest is {close[0]!r}."
    default = describe_default(name)
    return f"its default is {default}." if default else "leave it out for none."


def describe_default(name: str) -> str:
    """Return the default of a setting as a job has it, or an empty text where there is none."""
    default = FIELDS[name].default
    return OWN_DEFAULTS.get(name) or ("" if default is None else show_value(default))
