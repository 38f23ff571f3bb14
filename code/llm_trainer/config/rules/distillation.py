# SPDX-License-Identifier: Apache-2.0
"""Rules about the settings of method=distill: those of its teacher, and what TRL would refuse late or do wrongly."""

import re

from llm_trainer.config.rules.rule import Rule
from llm_trainer.config.sections import DataSettings

OUTPUT_LAYER = "lm_head"  # the name that it has in nearly all models


def distills(data: DataSettings) -> bool:
    """Tell whether a job learns from a teacher."""
    return data.method == "distill"


def targets_output_layer(targets: str | list[str]) -> bool:
    """Tell whether names of modules, or a regular expression of them, mean the output layer."""
    if isinstance(targets, list):
        return any(name.rpartition(".")[2] == OUTPUT_LAYER for name in targets)
    try:
        return re.fullmatch(targets, OUTPUT_LAYER) is not None
    except (re.error, RecursionError, OverflowError):  # told by another rule
        return False


DISTILLATION_RULES = (
    Rule(
        ("teacher_model_revision", "teacher_model_name_or_path"),
        lambda s: bool(s.methods.teacher_model_revision) and not s.methods.teacher_model_name_or_path,
        "teacher_model_revision={teacher_model_revision!r} without teacher_model_name_or_path: it would do nothing; "
        "give the teacher's Hub id, or remove it.",
    ),
    Rule(
        ("teacher_load_in_4bit", "teacher_load_in_8bit"),
        lambda s: s.methods.teacher_load_in_4bit and s.methods.teacher_load_in_8bit,
        "teacher_load_in_4bit=true with teacher_load_in_8bit=true: a teacher has one quantization; remove one of them.",
    ),
    Rule(
        ("beta", "method"),
        lambda s: distills(s.data) and (s.methods.beta or 0) > 1,
        "beta={beta} with method=distill: it lies between 0, the teacher's divergence from the student, and 1, the "
        "student's from the teacher; lower it.",
    ),
    Rule(
        ("target_modules", "method"),
        lambda s: distills(s.data) and targets_output_layer(s.adapter.target_modules),
        f"target_modules={{target_modules!r}} with method=distill: its loss reads {OUTPUT_LAYER} without the adapter, "
        "which would never learn; leave that out.",
    ),
    Rule(
        ("torch_compile", "method"),
        lambda s: distills(s.data) and bool(s.training.torch_compile),
        "torch_compile=true with method=distill: its loss calls the layers below the compiled model; remove it.",
    ),
    Rule(
        ("activation_offloading", "method"),
        lambda s: distills(s.data) and bool(s.parallelism.activation_offloading),
        "activation_offloading=true with method=distill: TRL's trainer has no offloading; use "
        "gradient_checkpointing=true.",
    ),
)
