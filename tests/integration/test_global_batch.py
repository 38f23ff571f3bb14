# SPDX-License-Identifier: Apache-2.0
"""A job with a global batch trains the same rows in the same steps on any devices, and goes on from any others."""

import signal

import pytest
from safetensors.torch import load_file

from support.sagemaker_tree import metrics_of

pytestmark = pytest.mark.long

# Float32, and sums in another order.
TOLERANCE = 1e-5
# Of 20 rows a step has 12, and the last one of an epoch 8: there 3 ranks have a row to fill.
HYPERPARAMETERS = {
    **{"global_batch_size": "12", "num_train_epochs": "2", "per_device_train_batch_size": None},
    **{"gradient_accumulation_steps": None, "save_steps": "1", "save_total_limit": "99", "lora_dropout": "0"},
}


@pytest.fixture(scope="module")
def make_job(make_tree):
    def make(num_ranks, **hyperparameters):
        tree = make_tree()
        tree.environment["OMP_NUM_THREADS"] = "1"
        tree.change(**{**HYPERPARAMETERS, "nproc_per_node": str(num_ranks), **hyperparameters})
        return tree

    return make


def run(tree):
    result = tree.run()
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def alone(make_job):
    tree = make_job(1)
    return tree, run(tree)


def adapter_of(tree):
    return load_file(tree.base_dir / "model/adapter_model.safetensors")


def assert_same_run(tree, log, alone):
    other, other_log = alone
    for name in ("step", "epoch", "learning_rate", "tokens"):
        assert metrics_of(log, name) == metrics_of(other_log, name)[-len(metrics_of(log, name)) :]
    losses = metrics_of(log, "train_loss")
    assert losses == pytest.approx(metrics_of(other_log, "train_loss")[-len(losses) :], abs=TOLERANCE)
    for name, tensor in adapter_of(other).items():
        assert (adapter_of(tree)[name] - tensor).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_train_what_one_process_would(make_job, alone, num_ranks, distribution):
    tree = make_job(num_ranks, distribution=distribution)
    assert_same_run(tree, run(tree), alone)
