# SPDX-License-Identifier: Apache-2.0
"""A job with a global batch trains the same rows in the same steps on any devices, and goes on from any others."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from support.sagemaker_tree import metrics_of

pytestmark = pytest.mark.long

# Float32, and sums in another order. Adam divides by the gradient's size: with its epsilon a gradient that is but
# rounding would move a weight by a whole learning rate, and how a sum is rounded depends on the processor.
TOLERANCE = 1e-5
# Of 32 rows a step has 12, and the last one of an epoch 8: there 3 ranks have a row to fill.
HYPERPARAMETERS = {
    "global_batch_size": "12",
    "num_train_epochs": "2",
    "per_device_train_batch_size": None,
    "gradient_accumulation_steps": None,
    "save_steps": "1",
    "save_total_limit": "99",
    "lora_dropout": "0",
    "adam_epsilon": "1e-5",
}
FULL = {"use_peft": "false", "lora_r": None, "lora_alpha": None, "lora_dropout": None}


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


@pytest.fixture(scope="module", params=[{}, FULL], ids=["adapter", "all weights"])
def alone(request, make_job):
    tree = make_job(1, **request.param)
    return tree, run(tree), request.param


def weights_of(tree):
    (file,) = (tree.base_dir / "model").glob("*model.safetensors")
    return load_file(file)


def assert_same_end(tree, log, alone):
    other, other_log, _ = alone
    num_lines = len(metrics_of(log, "train_loss"))
    for name in ("step", "epoch", "learning_rate", "tokens"):
        assert metrics_of(log, name)[-num_lines:] == metrics_of(other_log, name)[-num_lines:]
    assert metrics_of(log, "train_loss") == pytest.approx(
        metrics_of(other_log, "train_loss")[-num_lines:], abs=TOLERANCE
    )
    for name, tensor in weights_of(other).items():
        assert (weights_of(tree)[name] - tensor).abs().max() < TOLERANCE, name


@pytest.mark.parametrize(("num_ranks", "distribution"), [(2, "fsdp"), (3, "ddp"), (4, "fsdp")])
def test_ranks_train_what_one_process_would(make_job, alone, num_ranks, distribution):
    tree = make_job(num_ranks, **alone[2], distribution=distribution)
    assert_same_end(tree, run(tree), alone)


def test_a_run_goes_on_with_other_devices_sharded_or_not(make_job, alone):
    """Begun by two ranks, it goes on by one, by four and by one again. Each step leaves a checkpoint."""
    tree = make_job(2, **alone[2], distribution="fsdp")
    run(tree)
    others = [{"nproc_per_node": "1", "distribution": None}, {"nproc_per_node": "4", "distribution": "fsdp"}]
    others += [{"nproc_per_node": "3", "distribution": "ddp"}, {"nproc_per_node": "1", "distribution": None}]
    for step, other in enumerate(others, 1):
        for later in tree.checkpoints[step:]:
            shutil.rmtree(tree.base_dir / f"checkpoints/checkpoint-{later}")
        tree.change(**other)
        log = run(tree)
        assert f"Resuming from {tree.base_dir}/checkpoints/checkpoint-{step}" in log
        assert_same_end(tree, log, alone)


@pytest.mark.parametrize("kinds", [("fsdp", "ddp"), ("ddp", "fsdp")], ids=" then ".join)
def test_dropout_draws_by_rank_and_the_best_checkpoint_may_be_of_the_other_kind(make_job, kinds):
    """Four ranks go on twice; two of them drew nothing before. The loss falls, and the highest wins."""
    options = {"lora_dropout": "0.5", "load_best_model_at_end": "true", "greater_is_better": "true"}
    options |= {"eval_strategy": "steps", "eval_steps": "1"}
    tree = make_job(2, **options, distribution=kinds[0])
    begun, best, losses = run(tree), weights_of(tree), []
    assert tree.checkpoints == [1, 2, 3, 4, 5, 6]
    tree.change(nproc_per_node="4", distribution=kinds[1])
    for _ in range(2):
        for later in tree.checkpoints[1:]:
            shutil.rmtree(tree.base_dir / f"checkpoints/checkpoint-{later}")
        log = run(tree)
        assert f"Resuming from {tree.base_dir}/checkpoints/checkpoint-1" in log
        for name in ("step", "learning_rate", "tokens"):
            values = metrics_of(log, name)
            assert values == metrics_of(begun, name)[-len(values) :], name
        assert all(torch.equal(tensor, best[name]) for name, tensor in weights_of(tree).items())
        losses.append(metrics_of(log, "train_loss"))
    assert losses[0] == losses[1] != metrics_of(begun, "train_loss")[1:]
