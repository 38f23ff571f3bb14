# SPDX-License-Identifier: Apache-2.0
"""Jobs that train on pairs: like any other job they are stopped, resumed, spread over ranks, merged and proven."""

import json

import pytest

from support.compared_jobs import check_metrics_are_alike, check_stop_changes_nothing
from support.sagemaker_tree import finish, metrics_of

PAIRS = [
    {"prompt": f"What is {a} plus {b}?", "chosen": f"{a + b} it is", "rejected": f"{a + b + 1} " * (1 + b)}
    for a in range(8)
    for b in range(3)
]
KEYS = ("train_loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "tokens", "grad_norm")


@pytest.fixture
def make_job(make_tree):
    def make(**hyperparameters):
        tree = make_tree()
        tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in PAIRS))
        tree.write("input/data/validation/validation.json", PAIRS[:5])
        tree.change(method="dpo", **hyperparameters)
        return tree

    return make


def test_a_job_learns_to_prefer_the_chosen_answers(make_job):
    tree = make_job(num_train_epochs="4", merge_weights="true", per_device_train_batch_size="6")
    log = finish(tree)
    assert metrics_of(log, "rewards/accuracies")[-1] > 0.9
    assert metrics_of(log, "eval_rewards/accuracies")[-1] > 0.9
    assert metrics_of(log, "rewards/margins")[-1] > 0
    assert tree.manifest["export"]["proven"]
    assert tree.manifest["settings"]["method"] == "dpo"
    assert tree.manifest["num_steps"] == 16


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"use_peft": "false", "learning_rate": "0.001"}], ids=["lora", "full"])
def test_a_stopped_run_ends_with_the_same_weights(make_job, start, options):
    shared = {"num_train_epochs": "3", "per_device_train_batch_size": "4", "save_steps": "1", **options}
    whole, stopped = make_job(**shared), make_job(**shared)
    check_stop_changes_nothing(whole, stopped, start)
    assert whole.manifest["num_steps"] == 18


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"use_peft": "false", "learning_rate": "0.001"}], ids=["lora", "full"])
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_ranks_are_one(make_job, distribution, options):
    shared = {"num_train_epochs": "2", "global_batch_size": "10", "per_device_train_batch_size": None, **options}
    one, two = make_job(**shared), make_job(**shared, nproc_per_node="2", distribution=distribution)
    logs = finish(one), finish(two)
    check_metrics_are_alike(logs[1], logs[0], (*KEYS, "eval_loss", "eval_rewards/margins"), rel=1e-3, abs=1e-5)


@pytest.mark.long
def test_packed_pairs_learn_what_padded_ones_do(make_job):
    shared = {"train_sampling_strategy": "random"}
    packed, padded = make_job(**shared), make_job(**shared, packing="false")
    logs = finish(packed), finish(padded)
    assert "Packing: the rows of a batch share sequences" in logs[0]
    check_metrics_are_alike(logs[0], logs[1], KEYS, rel=1e-4, abs=1e-6)


@pytest.mark.long
def test_a_run_goes_on_from_an_earlier_adapter(make_job, make_tree):
    """Its reference is the earlier adapter: at the first step no answer has a reward."""
    first = make_tree()
    finish(first)
    tree = make_job(learning_rate="0.001")
    for file in (first.base_dir / "model").glob("adapter_*"):
        tree.write(f"input/data/adapter/{file.name}", file.read_bytes())
    tree.write_job({"method": "dpo", "logging_steps": "1"}, ("model", "adapter", "train", "validation"))
    log = finish(tree)
    assert metrics_of(log, "rewards/margins")[0] == 0
    assert tree.manifest["export"]["proven"]


@pytest.mark.long
def test_the_reference_of_a_run_is_the_model_that_an_earlier_adapter_was_merged_into(make_job, make_tree):
    first, base = make_tree(), make_job(max_steps="1")
    first.change(learning_rate="0.01")
    finish(first)
    trees = {"continued": {}, "merged": {"merge_adapter": "true", "merge_weights": "true"}}
    found = {"base": metrics_of(finish(base), "logps/chosen")[0]}
    for name, options in trees.items():
        tree = make_job()
        for file in (first.base_dir / "model").glob("adapter_*"):
            tree.write(f"input/data/adapter/{file.name}", file.read_bytes())
        given = {"method": "dpo", "logging_steps": "1", "max_steps": "1", **options}
        tree.write_job(given, ("model", "adapter", "train", "validation"))
        log = finish(tree)
        found[name] = metrics_of(log, "logps/chosen")[0]
        assert metrics_of(log, "rewards/margins")[0] == 0
        assert tree.manifest["export"]["proven"]
        assert tree.manifest["lineage"]
    assert "merged into it" in log
    assert found["merged"] == pytest.approx(found["continued"], rel=1e-5)
    assert found["merged"] != pytest.approx(found["base"], rel=1e-3)
