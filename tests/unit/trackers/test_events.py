# SPDX-License-Identifier: Apache-2.0
"""Trackers get every number of every record, and texts of what was asked for."""

import math

import pytest

from llm_trainer.readers.thumbnails import write_thumbnail
from llm_trainer.trackers.events import (
    MAX_LISTED_FILES,
    build_columns,
    choose_run_name,
    find_data_sets,
    find_parameters,
    find_surroundings,
    read_rows,
    renew_answers,
)
from support.tiny_processors import draw

JOB = {
    "time": 1_790_000_000.0,
    "kind": "job",
    "name": "trial",
    "arn": None,
    "hosts": ["algo-1", "algo-2"],
    "world_size": 2,
    "attempt": 1,
    "settings": {"learning_rate": 0.01, "model_id": "org/model/"},
    "environment": {"image": "sha256:12", "revision": None, "packages": {"torch": "2"}},
}


@pytest.mark.parametrize(
    ("record", "axis", "step", "values"),
    [
        ({"kind": "metrics", "step": 5, "values": {"loss": 1, "odd": math.nan, "no": None}}, "step", 5, {"loss": 1.0}),
        ({"kind": "system", "values": {"host/a/cpu": 7.5}}, "seconds", 90, {"host/a/cpu": 7.5}),
        ({"kind": "phase", "name": "data", "seconds": 2.5}, "step", 0, {"phase/data": 2.5}),
        ({"kind": "checkpoint", "step": 8, "seconds": 0.5}, "step", 8, {"checkpoint_seconds": 0.5}),
        ({"kind": "manifest", "num_steps": 9, "metrics": {"a": 1, "b": "x"}}, "step", 9, {"final/a": 1.0}),
    ],
)
def test_each_record_with_numbers_is_a_row(record, axis, step, values):
    (row,) = read_rows([{"time": 1090.0, **record}], started=1000.0)
    assert row == (axis, step, 1090.0, values)


@pytest.mark.parametrize("kind", ["job", "data", "model", "generation", "event", "end"])
def test_other_records_have_no_numbers(kind):
    assert list(read_rows([{"time": 1.0, "kind": kind, "of_a_newer_version": 5}], 0.0)) == []


def test_parameters_are_the_settings_and_what_is_trained():
    model = {"time": 1.0, "kind": "model", "model": "m", "parameters": 9, "adapter": {"r": 8}}
    assert find_parameters([JOB, model]) == {
        "learning_rate": "0.01",
        "model_id": "org/model/",
        "world_size": "2",
        "model": "m",
        "parameters": "9",
        "adapter": '{"r": 8}',
    }


def test_surroundings_are_the_job_its_hosts_and_the_image():
    assert find_surroundings([JOB]) == {
        "training_job_name": "trial",
        "hosts": "algo-1, algo-2",
        "attempt": "1",
        "environment.image": "sha256:12",
        "environment.packages": '{"torch": "2"}',
    }


def test_a_data_set_lists_its_first_files():
    files = [{"name": str(number)} for number in range(MAX_LISTED_FILES + 5)]
    sizes = {"rows": 1, "tokens": 2, "supervised_tokens": 3}
    record = {"time": 1.0, "kind": "data", "split": "train", "digest": "ab", "sources": files, **sizes}
    (data,) = find_data_sets([JOB, record])
    assert (data.split, data.digest, data.sizes) == ("train", "ab", sizes)
    assert data.source == {"num_files": MAX_LISTED_FILES + 5, "files": files[:MAX_LISTED_FILES]}


@pytest.mark.parametrize(
    ("changes", "given", "name"),
    [
        ({"settings": {"run_name": "asked"}}, "given", "asked"),
        ({}, "given", "given"),
        ({}, None, "trial"),
        ({"name": None}, None, "model 2026-09-21 14:13"),
        ({"name": None, "settings": {}}, None, "fine-tuning 2026-09-21 14:13"),
    ],
)
def test_the_runs_name_is_the_most_particular_one(changes, given, name):
    assert choose_run_name({**JOB, **changes}, given) == name


def test_control_characters_reach_no_tracker():
    hostile = "a\x1b[31m\u202eb\nc\x00"
    job = {**JOB, "name": hostile, "settings": {"run_name": hostile, "note": hostile}}
    for name in (choose_run_name(job, None), choose_run_name({**job, "settings": {}}, hostile)):
        assert name == "a\\x1b[31m\\u202eb c\\x00"
    shown = "a\\x1b[31m\\u202eb\nc\\x00"
    assert find_parameters([job])["note"] == find_surroundings([job])["training_job_name"] == shown


def answer_record(*images, **texts):
    return {"time": 1.0, "kind": "generation", "prompt": "Why\x1b?", "after": "So.", **texts, "images": list(images)}


def test_answers_are_a_table_with_the_images_of_their_prompts_side_by_side():
    image = {"name": "cat.png", "thumbnail": write_thumbnail(draw(40, 30))}
    answers = renew_answers([], [JOB, answer_record(), answer_record(image, image, {"name": "far.png"})])
    columns = build_columns(answers)
    assert columns["prompt"] == [r"Why\x1b?"] * 2 and columns["before"] == [""] * 2
    assert [sheet.width for sheet in columns["images"]][1] == 80
    assert "images" not in build_columns(answers[:1])
    address = {"name": "cat.png", "thumbnail": "https://example.com/cat.jpg"}
    assert "images" not in build_columns(renew_answers([], [answer_record(address)]))


def test_an_attempt_that_answers_again_doubles_no_answer():
    first = renew_answers([], [JOB, answer_record(after="No."), answer_record()])
    assert [answer.texts["after"] for answer in renew_answers(first, [JOB, answer_record()])] == ["So."]
