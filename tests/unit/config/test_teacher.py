# SPDX-License-Identifier: Apache-2.0
"""A teacher has the settings of a base by other names, and messages about it name these."""

from pathlib import Path

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.config.teacher import about_teacher, derive_teacher, speak_of_teacher

CHANNELS = {"model": Path("/in/model"), "teacher": Path("/in/teacher")}


def derive(channels=CHANNELS, **values):
    settings = Settings(method="distill", **values)
    return derive_teacher(settings.model, settings.methods, channels)


def test_a_teacher_comes_from_its_setting_or_its_channel():
    assert derive(teacher_model_name_or_path="org/large").model_id == "org/large"
    assert derive().model_id == "/in/teacher"
    assert derive({"model": Path("/in/model")}).model_id is None


def test_a_teacher_shares_what_is_the_jobs_and_not_what_is_the_models():
    given = {"model_id": "org/small", "load_in_4bit": True, "model_revision": "v1", "trust_remote_code": True}
    theirs = derive(**given, torch_dtype="bfloat16", model_init_kwargs={"rope_theta": 1}, pad_token="<pad>")
    assert (theirs.torch_dtype, theirs.trust_remote_code) == ("bfloat16", True)
    assert (theirs.load_in_4bit, theirs.model_revision, theirs.model_init_kwargs, theirs.pad_token) == (
        *(False, None, None, None),
    )
    theirs = derive(teacher_load_in_4bit=True, bnb_4bit_quant_type="fp4", teacher_model_revision="v2")
    assert (theirs.load_in_4bit, theirs.bnb_4bit_quant_type, theirs.model_revision) == (True, "fp4", "v2")


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("model_id='a/b' is gated.", "teacher_model_name_or_path='a/b' is gated."),
        ("load_in_4bit=true: bitsandbytes", "teacher_load_in_4bit=true: bitsandbytes"),
        ("check model_revision.", "check teacher_model_revision."),
        ("give the model's files as channel 'model'.", "give the teacher's files as channel 'teacher'."),
        ("Model folder /a has no config.json", "Teacher's folder /a has no config.json"),
        ("The model lets a token see; give another model.", "The teacher lets a token see; give another teacher."),
    ],
)
def test_sentences_about_a_base_become_sentences_about_a_teacher(text, spoken):
    assert speak_of_teacher(text) == spoken
    with pytest.raises(UserError) as caught, about_teacher():
        raise UserError(text, "another")
    assert caught.value.problems == (spoken, "another")
