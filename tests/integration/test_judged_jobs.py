# SPDX-License-Identifier: Apache-2.0
"""Jobs that train on judged answers: like any other job they are stopped, resumed, spread over ranks and proven."""

import json

import pytest

from support.compared_jobs import check_metrics_are_alike, check_stop_changes_nothing
from support.sagemaker_tree import finish, metrics_of

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"{a + b} it is" if good else f"{a + b + 1} " * 3, "label": good}
    for a in range(8)
    for b in range(2)
    for good in (True, False)
]
KEYS = ("train_loss", "rewards/margins", "logps/chosen", "kl", "tokens", "grad_norm")
FULL = {"use_peft": "false", "learning_rate": "0.001"}


@pytest.fixture
def make_job(make_tree):
    def make(rows=ROWS, **hyperparameters):
        tree = make_tree()
        tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        tree.write("input/data/validation/validation.json", ROWS[:5])
        tree.change(method="kto", **hyperparameters)
        return tree

    return make


def test_a_job_learns_to_tell_desirable_answers_apart(make_job):
    tree = make_job(num_train_epochs="4", merge_weights="true", per_device_train_batch_size="8")
    log = finish(tree)
    margins = metrics_of(log, "rewards/margins")
    assert margins[-1] > margins[0]
    assert metrics_of(log, "eval_rewards/margins")[-1] > 0
    assert tree.manifest["export"]["proven"]
    assert tree.manifest["data"]["train"]["judged"]["desirable_share"] == 0.5
    assert "50.0% of the answers are desirable: 16 desirable, tokens mean" in log


@pytest.mark.long
def test_labels_that_are_all_alike_end_the_job_before_weights_load(make_job):
    result = make_job([row for row in ROWS if row["label"]]).run()
    assert result.returncode != 0
    assert "All 16 rows of the train data are desirable, so there is nothing to compare" in result.stdout


@pytest.mark.long
def test_pairs_are_judged_answers_too_and_uneven_ones_are_weighed(make_job):
    pair = {"prompt": "What is 1 plus 1?", "chosen": "2 it is", "rejected": "3 3 3"}
    tree, uneven = make_job([pair, {**pair, "prompt": "What?"}]), make_job(ROWS[:-8:2] + ROWS[1::8])
    assert "50.0% of the answers are desirable" in finish(tree)
    ranges = "set either desirable_weight between 0.33 and 0.44, or undesirable_weight between 2.26 and 3.00."
    assert ranges in finish(uneven)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
def test_a_stopped_run_ends_with_the_same_weights(make_job, start, options):
    shared = {"num_train_epochs": "3", "per_device_train_batch_size": "5", "save_steps": "1", **options}
    whole, stopped = make_job(**shared), make_job(**shared)
    check_stop_changes_nothing(whole, stopped, start)
    assert whole.manifest["num_steps"] == 21


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_ranks_are_one(make_job, distribution, options):
    """They compute the same rows at once, over which the divergence is a mean. An epoch ends in a smaller batch."""
    one = make_job(num_train_epochs="2", per_device_train_batch_size="6", **options)
    ranks = {"nproc_per_node": "2", "distribution": distribution}
    two = make_job(num_train_epochs="2", per_device_train_batch_size="3", **ranks, **options)
    logs = finish(one), finish(two)
    check_metrics_are_alike(
        logs[1], logs[0], (*KEYS, "eval_loss", "eval_rewards/margins", "eval_kl"), rel=1e-3, abs=1e-5
    )


@pytest.mark.long
def test_packed_answers_learn_what_padded_ones_do(make_job):
    shared = {"train_sampling_strategy": "random"}
    packed, padded = make_job(**shared), make_job(**shared, packing="false")
    logs = finish(packed), finish(padded)
    assert "Packing: the rows of a batch share sequences" in logs[0]
    check_metrics_are_alike(logs[0], logs[1], KEYS, rel=1e-4, abs=1e-6)
