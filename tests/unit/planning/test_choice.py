# SPDX-License-Identifier: Apache-2.0
"""The three candidates that matter, and the settings with which a job gets there what was planned."""

from dataclasses import replace

import pytest

from llm_trainer.planning.candidates import list_candidates
from llm_trainer.planning.choice import choose, describe_choice, list_settings
from support.planned_jobs import PRICES, outline_job


@pytest.fixture(scope="module")
def candidates():
    return list_candidates(outline_job(lengths={100: 1_000_000}, prices=PRICES))


def test_no_candidate_is_cheaper_faster_or_of_better_value(candidates):
    chosen = choose(candidates)
    priced = [candidate for candidate in candidates if candidate.dollars]
    assert chosen["cheapest"] is candidates[0]
    assert chosen["fastest"].run.hours == min(each.run.hours for each in priced)
    value = chosen["best_value"]
    assert value.run.hours * value.dollars == min(each.run.hours * each.dollars for each in priced)
    assert chosen["cheapest"].dollars <= value.dollars <= chosen["fastest"].dollars


def test_the_settings_are_those_of_the_plan(candidates):
    for candidate in choose(candidates).values():
        settings = list_settings(candidate)
        assert settings["per_device_train_batch_size"] == 2
        assert ("distribution" in settings) == (candidate.num_gpus > 1)
        assert describe_choice(candidate)["settings"] == settings


def test_without_data_only_the_cheapest_is_known():
    found = list_candidates(outline_job())
    assert [*choose(found)] == ["cheapest"]
    assert choose([]) == {}


def test_what_is_not_offered_is_chosen_only_where_no_other_fits(candidates):
    one = [replace(each, offered=each.host.name == "ml.p4d.24xlarge") for each in candidates]
    assert {each.host.name for each in choose(one).values()} == {"ml.p4d.24xlarge"}
    none = [replace(each, offered=False) for each in candidates]
    assert not any(each.offered for each in choose(none).values())
