# SPDX-License-Identifier: Apache-2.0
"""What is generated at once holds whole groups of completions, and a sentence tells the nearest numbers."""

import pytest

from llm_trainer.config.generation import (
    GenerationSettings,
    choose_eval_rows,
    count_batches,
    count_generated,
    count_scorings,
    find_generation_problem,
    show_divisors,
)
from llm_trainer.config.schema import Settings


def select(method, **settings):
    given = Settings(method=method, **settings)
    return GenerationSettings(given.data, given.methods, given.training)


def find(num_devices=1, has_validation=False, **settings):
    return [*find_generation_problem(select("grpo", **settings), num_devices, has_validation)]


@pytest.mark.parametrize(
    ("settings", "num_devices", "expected"),
    [
        ({}, 2, 16),
        ({"gradient_accumulation_steps": 3}, 1, 24),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, 1, 16),
        ({"generation_batch_size": 48}, 1, 48),
        ({"global_batch_size": 64}, 8, 64),
    ],
)
def test_what_is_generated_at_once(settings, num_devices, expected):
    assert count_generated(select("grpo", **settings), num_devices) == expected


@pytest.mark.parametrize(
    ("method", "settings", "batches", "scorings"),
    [
        ("grpo", {}, 1, 0),
        ("grpo", {"gradient_accumulation_steps": 4}, 4, 0),
        ("grpo", {"beta": 0.04}, 1, 1),
        ("grpo", {"num_iterations": 2}, 2, 1),
        ("grpo", {"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 2, 0),
        ("grpo", {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.04}, 4, 2),
        ("grpo", {"generation_batch_size": 48, "gradient_accumulation_steps": 6}, 3, 0),
        ("rloo", {"beta": 0.0}, 1, 1),
        ("rloo", {}, 1, 2),
    ],
)
def test_completions_are_scored_where_later_steps_go_on_with_them_and_by_a_reference(
    method, settings, batches, scorings
):
    generation = select(method, **settings)
    assert (count_batches(generation, 2), count_scorings(generation, 2)) == (batches, scorings)


def test_a_group_that_does_not_fit_is_told_with_the_nearest_numbers():
    assert find(num_generations=8) == []
    (text,) = find(num_generations=6)
    assert text == (
        "num_generations=6 does not divide the 8 completions that are generated at once (per_device_train_batch_size=8 "
        "x 1 devices x gradient_accumulation_steps=1): give num_generations=4 or 8, or a batch that is a multiple of 6."
    )
    (text,) = find(num_generations=6, global_batch_size=32, num_devices=4)
    assert "the 32 completions that are generated at once (global_batch_size): give num_generations=4 or 8" in text
    assert find(num_generations=6, global_batch_size=48, num_devices=4) == []


def test_a_generation_of_part_of_a_batch_is_told():
    (text,) = find(generation_batch_size=24, per_device_train_batch_size=16)
    assert text.endswith("per_device_train_batch_size x devices = 16: give 32, or leave it out.")


def test_a_batch_of_an_evaluation_holds_whole_groups():
    assert find(has_validation=True, num_generations=4, per_device_eval_batch_size=6) != []
    assert find(has_validation=False, num_generations=4, per_device_eval_batch_size=6) == []
    assert find(has_validation=True, num_generations=4, per_device_eval_batch_size=6, num_generations_eval=3) == []
    assert find(has_validation=True, num_generations=8, per_device_eval_batch_size=4, num_devices=2) == []


@pytest.mark.parametrize(
    ("given", "num_devices", "expected"),
    [({}, 1, 8), ({"num_generations": 16}, 1, 16), ({"num_generations": 6}, 1, 12), ({"num_generations": 6}, 4, 9)],
)
def test_the_default_of_an_evaluation_holds_whole_groups(given, num_devices, expected):
    assert choose_eval_rows(given, 8, num_devices) == expected
    assert choose_eval_rows(given, 8, num_devices) * num_devices % given.get("num_generations", 8) == 0


def test_other_methods_generate_nothing():
    assert [*find_generation_problem(select("dpo"), 3, has_validation=True)] == []


def test_nearest_divisors():
    assert show_divisors(12, 5) == "4 or 6"
    assert show_divisors(7, 3) == "7"
    assert show_divisors(1, 2) == "more completions at once"
