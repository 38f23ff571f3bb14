# SPDX-License-Identifier: Apache-2.0
"""Settings of a distillation that contradict each other, or that TRL would refuse late, are told first."""

import pytest

from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.rules.distillation import targets_output_layer
from llm_trainer.config.schema import Settings


def problems_of(**values):
    return list(find_contradictions(Settings(**values)))


@pytest.mark.parametrize(
    ("values", "begin"),
    [
        ({"beta": 1.5}, "beta=1.5 with method=distill: it lies between 0"),
        ({"teacher_model_revision": "main"}, "teacher_model_revision='main' without teacher_model_name_or_path"),
        ({"teacher_load_in_4bit": True, "teacher_load_in_8bit": True}, "teacher_load_in_4bit=true with teacher_load"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules=['q_proj', 'lm_head'] with method=distill"),
        ({"torch_compile": True}, "torch_compile=true with method=distill"),
        ({"activation_offloading": True}, "activation_offloading=true with method=distill: TRL's trainer has no"),
        ({"streaming": True, "max_steps": 1}, "streaming=true with method=distill"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 with method=distill"),
    ],
    ids=str,
)
def test_what_a_distillation_cannot_do_is_refused(values, begin):
    (problem,) = problems_of(method="distill", **values)
    assert problem.startswith(begin)


@pytest.mark.parametrize(
    ("values", "methods"),
    [
        ({"teacher_load_in_4bit": True}, "distill"),
        ({"teacher_model_name_or_path": "a/b"}, "distill"),
        ({"temperature": 2.0}, "distill or grpo or rloo"),
    ],
    ids=str,
)
def test_a_teacher_belongs_to_distillation(values, methods):
    (name,) = values
    (problem,) = problems_of(**values)
    assert problem == f"{name} is a setting of method={methods} and this job has method=sft: remove it, or set method."
    assert problems_of(method="distill", **values) == []


def test_rows_are_those_of_sft():
    values = {"packing": True, "max_length": 64, "assistant_only_loss": True, "dataset_format": "messages"}
    assert problems_of(method="distill", **values) == []


def test_settings_of_writing_belong_to_other_methods():
    (problem,) = problems_of(method="distill", max_completion_length=4)
    assert problem.startswith("max_completion_length is a setting of method=grpo or rloo and this job has method=dist")


@pytest.mark.parametrize(
    ("targets", "is_meant"),
    [("auto", False), (["model.lm_head"], True), (".*proj", False), (".*", True), ("(", False), (["q_proj"], False)],
)
def test_the_output_layer_is_told_by_its_name(targets, is_meant):
    assert targets_output_layer(targets) is is_meant
