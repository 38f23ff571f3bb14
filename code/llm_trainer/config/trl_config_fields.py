# SPDX-License-Identifier: Apache-2.0
"""The fields of TRL's configs, one a training method, from a snapshot: the launcher reads them without torch.

`python -m llm_trainer.config.trl_config_fields` writes the snapshot anew; a test fails when it is stale.
"""

import ast
import dataclasses
import enum
import functools
import inspect
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llm_trainer.common.files import write_verbatim

SNAPSHOT = Path(__file__).with_suffix(".json")

# The training methods, and TRL's config of each.
CONFIG_CLASSES = {
    "sft": "SFTConfig",
    "dpo": "DPOConfig",
    "kto": "KTOConfig",
    "reward": "RewardConfig",
    "distill": "DistillationConfig",
    "grpo": "GRPOConfig",
    "rloo": "RLOOConfig",
}
# Fields that torchrun sets, and never a user; and those that TRL is about to remove.
NOT_SETTINGS = ("local_rank", "use_transformers_paged", "vllm_importance_sampling_cap")
# Fields about what a model writes itself, as TRL's student does: here it learns on the answers of the rows. The last
# one could load other files of a teacher than were checked.
WRITING = (
    *("max_completion_length", "ds3_gather_for_generation", "top_p", "top_k", "min_p", "generation_kwargs"),
    *("chat_template_kwargs", "repetition_penalty", "cache_implementation", "max_tool_calling_iterations"),
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "teacher_model_init_kwargs"),
)
# Texts that TRL compares in its code alone, so that a wrong one would end the first step.
CHOICES = {
    "dpo loss_type": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
        *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "grpo loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}


class Argument(typing.NamedTuple):
    """A field of a config: the names of its plain types, such as "bool" or "list", its default and its choices.

    `packages` names what a choice imports when it is used, beside torch.
    """

    types: list[str]
    nullable: bool
    default: Any
    choices: list[str] | None
    help: str
    packages: Mapping[str, str] = MappingProxyType({})


@functools.cache
def read_snapshot(method: str = "sft") -> dict[str, Argument]:
    """Return all fields of a method's config by name, as the snapshot has them."""
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    own, shared = snapshot[method]["own"], snapshot[method]["shared"]
    fields = {**{name: snapshot["sft"]["own"][name] for name in shared}, **own}
    return {name: Argument(**field) for name, field in fields.items()}


def take_snapshot() -> dict[str, Any]:
    """Return the fields of the installed configs by method, ready for JSON: its own, and those that are SFT's."""
    sft = describe_config("sft")
    sft["optim"]["packages"] = find_optimizer_packages()
    snapshot: dict[str, Any] = {"sft": {"shared": [], "own": sft}}
    for method in [name for name in CONFIG_CLASSES if name != "sft"]:
        fields = describe_config(method)
        shared = [name for name, field in fields.items() if name in sft and is_same(field, sft[name])]
        snapshot[method] = {"shared": shared, "own": {name: fields[name] for name in fields if name not in shared}}
    return snapshot


def describe_config(method: str) -> dict[str, dict[str, Any]]:
    """Return what the snapshot holds of each field of a method's config."""
    import trl

    config = getattr(trl, CONFIG_CLASSES[method])
    hints = typing.get_type_hints(config)
    fields = {
        field.name: describe_field(field, hints[field.name])
        for field in dataclasses.fields(config)
        if field.name not in NOT_SETTINGS and not (method == "distill" and is_about_writing(field.name))
    }
    for name, field in fields.items():
        field["choices"] = field["choices"] or CHOICES.get(f"{method} {name}") or CHOICES.get(name)
    return fields


def is_about_writing(name: str) -> bool:
    """Tell whether a field of a config is about what a model writes itself."""
    return name in WRITING or name.startswith(("vllm_", "use_vllm"))


def is_same(field: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two fields of one name take the same and have the same default. Their help may differ."""
    return all(field[key] == other[key] for key in field if key != "help")


def find_optimizer_packages() -> dict[str, str]:
    """Return the package that Transformers imports for each optimizer that torch lacks, by the optimizer's name."""
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS

    found: dict[str, str] = {}
    for name, handler in _OPTIMIZER_HANDLERS.items():
        statements = ast.walk(ast.parse(inspect.getsource(handler)))
        modules = [statement.module for statement in statements if isinstance(statement, ast.ImportFrom)]
        packages = {str(module).partition(".")[0] for module in modules} - {"torch"}
        found |= {str(getattr(name, "value", name)): package for package in packages}
    return found


def describe_field(field: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    """Return what the snapshot holds of a field, whose type annotation is `hint`: the fields of `Argument`."""
    parts = typing.get_args(hint) if is_union(hint) else (hint,)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    choices = field.metadata.get("choices") or ([member.value for member in enums[0]] if enums else None)
    factory = field.default_factory
    default = factory() if factory is not dataclasses.MISSING else field.default
    return {
        "types": sorted({find_plain_type(part) for part in parts if part is not type(None)}),
        "nullable": type(None) in parts,
        "default": default.value if isinstance(default, enum.Enum) else default,
        "choices": list(choices) if choices else None,
        "help": cut_first_sentence(field.metadata.get("help", "")),
    }


def is_union(hint: Any) -> bool:
    """Tell whether a type annotation is a union, in either of its spellings."""
    return typing.get_origin(hint) is typing.Union or type(hint).__name__ == "UnionType"


def find_plain_type(hint: Any) -> str:
    """Return the name of the plain type that a user gives for a type annotation."""
    origin = typing.get_origin(hint) or hint
    if origin in (list, tuple) and typing.get_args(hint)[:1] == (float,):
        return "list[float]"
    if origin in (bool, int, float, str, list, dict):
        return str(origin.__name__)
    if origin is typing.Literal:
        return "bool"  # no config has another literal than `Literal[False]`
    return "str" if issubclass(origin, enum.Enum) else "dict"  # e.g. accelerate's ParallelismConfig, from its fields


def cut_first_sentence(text: str) -> str:
    """Return the first sentence of a help text of argparse."""
    text = " ".join(text.replace("%%", "%").split())
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", text, maxsplit=1)[0]


if __name__ == "__main__":
    write_verbatim(SNAPSHOT, json.dumps(take_snapshot(), indent=1) + "\n")
