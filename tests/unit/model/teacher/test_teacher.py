# SPDX-License-Identifier: Apache-2.0
"""A teacher is checked by its config and tokenizer, and loaded frozen in the type that its student computes in."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import list_weights
from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import ModelSettings
from llm_trainer.config.teacher import derive_teacher
from llm_trainer.model.device import Device
from llm_trainer.model.teacher.teacher import (
    StudentVocabulary,
    TeacherSource,
    fetch_teacher,
    load_teacher,
    plan_teacher,
)
from support.fake_hub import MODEL
from support.image_sweep import write_base
from support.teachers import write_teacher

CPU = Device(torch.device("cpu"), "a CPU", None)


@pytest.fixture
def folder(tiny_model, tmp_path):
    return write_teacher(tiny_model, tmp_path / "teacher")


@pytest.fixture
def fetch(tiny_model, folder, tmp_path):
    words = AutoTokenizer.from_pretrained(tiny_model).get_vocab()
    student = StudentVocabulary(AutoConfig.from_pretrained(tiny_model), words)

    def call(**values):
        settings = Settings(method="distill", teacher_model_name_or_path=str(folder), **values)
        theirs = derive_teacher(settings.model, settings.methods, {})
        return fetch_teacher(TeacherSource(str(folder), theirs), student, tmp_path)

    return call


def test_a_teacher_is_loaded_frozen(fetch):
    teacher = fetch()
    assert teacher.describe().startswith("Teacher: LlamaForCausalLM of ")
    plan = plan_teacher(teacher, torch.bfloat16, CPU, "eager")
    model = load_teacher(plan, CPU.torch)
    assert not model.training
    assert {(weight.dtype, weight.requires_grad) for weight in model.parameters()} == {(torch.bfloat16, False)}
    assert model.config._attn_implementation == "eager"


def test_a_teacher_comes_from_the_hub_like_a_model(fake_hub, tiny_model, tmp_path):
    student = StudentVocabulary(AutoConfig.from_pretrained(tiny_model), None)
    teacher = fetch_teacher(TeacherSource(MODEL, ModelSettings(model_id=MODEL)), student, tmp_path)
    assert list_weights(Path(teacher.folder))
    assert not (tmp_path / "model_folder").exists()  # where the model's own folder is noted
    fake_hub.refuse(404, times=9)
    with pytest.raises(UserError, match=r"^teacher_model_name_or_path='tiny/gone' is not on the Hugging Face Hub"):
        fetch_teacher(TeacherSource("tiny/gone", ModelSettings(model_id="tiny/gone")), student, tmp_path / "other")


def test_a_teacher_that_lacks_the_students_kernel_has_its_own(fetch):
    assert plan_teacher(fetch(), torch.float32, CPU, "flash_attention_2").options.attention == "sdpa"


def test_the_tower_of_a_quantized_teacher_is_left_as_it_is(tmp_path):
    write_base("gemma3", tmp_path)
    settings = ModelSettings(model_id=str(tmp_path), load_in_8bit=True)
    student = StudentVocabulary(AutoConfig.from_pretrained(tmp_path), None)
    teacher = fetch_teacher(TeacherSource(str(tmp_path), settings), student, tmp_path)
    skipped = plan_teacher(teacher, torch.float32, CPU, "sdpa").options.quantization.llm_int8_skip_modules
    assert {"model.vision_tower", "model.multi_modal_projector", "lm_head"} <= set(skipped)


def test_an_identity_tells_weights_and_how_they_are_rounded(fetch, folder):
    plain = fetch().identity
    assert len(plain) == 12
    assert fetch(teacher_load_in_4bit=True).identity == f"{plain} load_in_4bit nf4"
    weights = folder / "model.safetensors"
    weights.write_bytes(flip(weights))
    assert fetch().identity != plain


def flip(file):
    """Return a file's bytes with other weights."""
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in range(begin, len(content), 2):
        content[place] ^= 1
    return bytes(content)


def test_what_is_wrong_with_a_teacher_is_told_by_its_own_settings(fetch, folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UserError, match=r"^teacher_model_name_or_path: .* is stored in gptq"):
        fetch()
    file.write_text(json.dumps({**config, "num_hidden_layers": 99}))
    with pytest.raises(UserError, match=r"lack .* tensors of the teacher"):
        fetch()
    file.write_text(json.dumps({**config, "model_type": "novel"}))
    with pytest.raises(UserError, match=r"^teacher_model_name_or_path=.* is of type novel"):
        fetch()
