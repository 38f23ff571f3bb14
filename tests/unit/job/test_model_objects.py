# SPDX-License-Identifier: Apache-2.0
"""A model's small files are read before a library has to, and a sentence names the one that cannot be."""

import json
import os

import pytest

from llm_trainer.job.model_objects import OBJECTS, TEMPLATE, find_broken_objects
from support.hostile_files import HOSTILE, is_object

NAMED = "additional_chat_templates/tool_use.jinja"


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_without_an_object_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    problems = list(find_broken_objects(tmp_path))
    assert len(problems) == (0 if is_object(content) else 1)
    assert all(problem.startswith(f"{tmp_path / name} ") for problem in problems)


def test_a_template_is_text(tmp_path):
    (tmp_path / TEMPLATE).write_text("{{ messages }}ü", encoding="utf-8")
    assert list(find_broken_objects(tmp_path)) == []
    (tmp_path / TEMPLATE).write_text("{{ messages }}ü", encoding="utf-16")
    (problem,) = find_broken_objects(tmp_path)
    assert problem.startswith(f"{tmp_path / TEMPLATE} is not UTF-8 text")


@pytest.mark.parametrize("name", ["tokenizer_config.json", NAMED])
def test_a_pipe_keeps_nobody_waiting(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    (problem,) = find_broken_objects(tmp_path)
    assert f"{name} is no regular file" in problem


def test_templates_with_names_are_read_as_transformers_does(tmp_path):
    folder = (tmp_path / NAMED).parent
    folder.mkdir()
    (folder / "notes.txt").write_bytes(b"\xff")  # which nothing reads
    (tmp_path / NAMED).write_text("{{ tools }}ü", encoding="utf-8")
    assert list(find_broken_objects(tmp_path)) == []
    (tmp_path / NAMED).write_text("{{ tools }}ü", encoding="utf-16")
    (folder / "folder.jinja").mkdir()
    (folder / "link.jinja").symlink_to("nowhere")
    beginnings = ("folder.jinja cannot be read", "link.jinja cannot be read", "tool_use.jinja is not UTF-8")
    for problem, beginning in zip(find_broken_objects(tmp_path), beginnings, strict=True):
        assert problem.startswith(f"{folder}/{beginning}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"model_max_length": 1000000000000000019884624838656}'),  # most models on the Hub
        ("config.json", '{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}'),
        ("special_tokens_map.json", r'{"eos_token": "\u0000", "unk_token": "\ud83d"}'),
    ],
)
def test_what_models_on_the_hub_hold_is_taken(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert list(find_broken_objects(tmp_path)) == []


@pytest.mark.parametrize("config", [{"num_hidden_layers": 10**30}, {"text_config": {"n_layer": 1e300}}])
def test_layers_without_end_are_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (problem,) = find_broken_objects(tmp_path)
    assert "of more than 10,000: download the model again." in problem


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 0}, {"n_layer": -1}, {"hidden_size": 0}, {"text_config": {"vocab_size": 0}}]
)
def test_a_model_of_nothing_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (problem,) = find_broken_objects(tmp_path)
    assert problem.endswith(", and a model has at least 1: download the model again.")
