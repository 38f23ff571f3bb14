# SPDX-License-Identifier: Apache-2.0
"""Every instance type, one to sixteen of it: the cheapest first, and in each what the job takes there."""

import re
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from llm_trainer.planning.candidates import list_candidates
from llm_trainer.planning.choice import find_unable_gpus
from llm_trainer.planning.instances import read_instances
from support.planned_jobs import PRICES, outline_job

LARGE = LlamaConfig(
    vocab_size=1024, hidden_size=16_384, intermediate_size=65_536, num_hidden_layers=4, num_attention_heads=64,
    num_key_value_heads=64,
)  # fmt: skip
FIXED = {"instance_type", "count", "fits", "how", "gib_per_gpu", "tokens_per_second", "hours", "dollars"}


@pytest.fixture(scope="module")
def candidates():
    return list_candidates(outline_job(lengths={100: 100_000}, prices=PRICES, gradient_accumulation_steps=4))


def find(candidates, name, count):
    return next(each for each in candidates if (each.host.name, each.count) == (name, count))


def test_each_type_comes_in_one_to_sixteen_and_the_cheapest_first(candidates):
    assert len(candidates) == 16 * len(read_instances().types)
    assert all(candidate.fits for candidate in candidates)
    dollars = [candidate.dollars for candidate in candidates]
    priced = [value for value in dollars if value is not None]
    assert priced == sorted(priced)
    assert dollars[: len(priced)] == priced  # what has no price comes behind
    assert [candidate.offered for candidate in candidates] == [value is not None for value in dollars]
    assert {*candidates[0].describe()} >= FIXED


def test_only_places_that_are_asked_about_are_planned(candidates):
    places = (("ml.g5.xlarge", 4), ("ml.p5.48xlarge", 1), ("ml.nothing", 1))
    asked = replace(outline_job(lengths={100: 100_000}, prices=PRICES, gradient_accumulation_steps=4), places=places)
    found = list_candidates(asked)
    assert [each.describe() for each in found] == [find(candidates, *place).describe() for place in places[:2]]


def test_more_instances_take_fewer_steps_and_more_dollars(candidates):
    one, four = (find(candidates, "ml.g5.xlarge", count) for count in (1, 4))
    assert (one.steps, four.steps) == (3 * 100_000 // 8, 3 * 100_000 // 32)
    assert four.run.hours < one.run.hours
    assert four.dollars == pytest.approx(4 * 1.4 * four.run.hours)
    assert four.instance_hours == pytest.approx(4 * four.run.hours)
    assert four.spot.hours > four.run.hours
    assert four.spot_dollars == pytest.approx(0.5 * 4 * 1.4 * four.spot.hours)
    assert one.how == "training, batch 2 x 1 x 4"


def test_an_assumed_saving_of_spot_is_marked():
    prices = PRICES.model_copy(update={"spot_savings": {"ml.g5.xlarge": 0.6}})
    places = (("ml.g5.xlarge", 1), ("ml.g5.12xlarge", 1), ("ml.p5.48xlarge", 1))
    found = list_candidates(replace(outline_job(lengths={100: 1000}, prices=prices), places=places))
    told = {each.host.name: each.describe() for each in found}
    marks = {name: (each["spot_saving"], each["spot_saving_is_assumed"]) for name, each in told.items()}
    assert marks == {"ml.g5.xlarge": (0.6, False), "ml.g5.12xlarge": (0.5, True), "ml.p5.48xlarge": (None, None)}


def test_as_many_gpus_of_a_host_count_as_the_settings_ask_for():
    found = list_candidates(outline_job(nproc_per_node=2))
    fits = {name: find(found, name, 2).fits for name in ("ml.g5.xlarge", "ml.g5.12xlarge", "ml.p5.48xlarge")}
    assert fits == {"ml.g5.xlarge": False, "ml.g5.12xlarge": True, "ml.p5.48xlarge": True}
    assert find(found, "ml.p5.48xlarge", 2).num_gpus == 4
    (told,) = find_unable_gpus(found)
    assert "ml.g5.xlarge (A10G)" in told
    assert "ml.p5.48xlarge" not in told
    assert told.endswith(": nproc_per_node=2 is more than its GPUs.")


def test_all_numbers_of_devices_share_the_same_global_batch():
    found = list_candidates(outline_job(per_device_train_batch_size=None, global_batch_size=48))
    batches = {each.num_gpus: each.how for each in found if each.fits}
    assert {*batches} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 48}
    for num_gpus, how in batches.items():
        rows, devices, pieces = (int(number) for number in how.partition("batch ")[2].split(" x "))
        assert rows * devices * pieces == 48, how
        assert devices == num_gpus


def test_what_gpus_cannot_do_is_told_with_their_types():
    (told,) = find_unable_gpus(list_candidates(outline_job(base_compute="fp8")))
    assert told.startswith("Out for their GPUs: ")
    assert {"T4 (ml.g4dn)", "A10G (ml.g5)"} <= {f"{gpu} ({name})" for name, gpu in re.findall(r"(\S+) \((\w+)\)", told)}
    assert "L4" not in told.partition(": base_compute")[0]
    assert ": base_compute=fp8: such a GPU cannot multiply in float8, which takes" in told
    assert not list(find_unable_gpus(list_candidates(outline_job(global_batch_size=7, per_device_train_batch_size=7))))


def test_without_data_the_speed_is_known_and_no_hours():
    first = list_candidates(outline_job())[0].describe()
    assert first["offered"]
    assert first["tokens_per_second"] > 0
    assert (first["steps"], first["hours"], first["dollars"]) == (None, None, None)


def test_what_does_not_fit_says_why_and_more_gpus_hold_it():
    found = list_candidates(outline_job(LARGE))
    alone = find(found, "ml.g5.xlarge", 1)
    assert not alone.fits
    assert "a GPU, " in alone.refusal
    assert not alone.describe()["tokens_per_second"]
    assert find(found, "ml.g5.12xlarge", 8).fits
    assert [candidate.fits for candidate in found] == sorted((each.fits for each in found), reverse=True)
