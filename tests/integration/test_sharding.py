# SPDX-License-Identifier: Apache-2.0
"""FSDP2 over CPU ranks learns what one process would have, saves shards, resumes on other ranks, exports it whole."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_trainer.config.rules.table import find_missing_package, updates_shards
from llm_trainer.config.trl_config_fields import read_snapshot
from llm_trainer.model.kinds.tower import list_tower
from support import reduced_gradients, sharded_base, sharded_optimizers
from support.image_sweep import write_base
from support.sagemaker_tree import ROWS, metrics_of

# Eight rows a step on any number of ranks. Float32, and sums in another order: 1e-6 was seen of losses around 5.
pytestmark = pytest.mark.long

LOSS_TOLERANCE = 1e-4
# Adam divides by the gradient's size, so that an element whose gradient is but rounding may move by a learning rate.
WEIGHT_TOLERANCE = 1e-4
TOKENS = torch.arange(3, 40)[None]


@pytest.fixture
def make_job(make_tree):
    def make(ranks, **hyperparameters):
        tree = make_tree()
        tree.environment["OMP_NUM_THREADS"] = "1"
        distribution = {"distribution": "fsdp", "nproc_per_node": str(ranks)} if ranks > 1 else {}
        tree.change(**{"per_device_train_batch_size": str(8 // ranks), **distribution, **hyperparameters})
        return tree

    return make


def run(tree):
    result = tree.run()
    assert result.returncode == 0, result.stdout
    return result.stdout


def curve(log):
    """Losses and gradient norms, of training and evaluation."""
    return torch.tensor([metrics_of(log, key) for key in ("train_loss", "grad_norm")]), metrics_of(log, "eval_loss")


def assert_same_curve(log, other, tolerance=LOSS_TOLERANCE):
    steps, evaluations = curve(log)
    assert steps.numel()
    torch.testing.assert_close(steps, curve(other)[0], rtol=0, atol=tolerance)
    assert evaluations == pytest.approx(curve(other)[1], abs=tolerance)
    assert metrics_of(log, "tokens") == metrics_of(other, "tokens")


def weights_of(tree):
    (file,) = (tree.base_dir / "model").glob("*model.safetensors")
    return load_file(file)


def assert_same_weights(tree, other, tolerance=WEIGHT_TOLERANCE):
    weights, others = weights_of(tree), weights_of(other)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=tolerance, msg=name)


@torch.no_grad()
def logits_of(tree, kind):
    return kind.from_pretrained(tree.base_dir / "model")(input_ids=TOKENS).logits


def test_an_adapter_of_two_ranks_is_that_of_one_process(make_job):
    alone, sharded = make_job(1), make_job(2, gradient_checkpointing="true", merge_weights="true")
    assert_same_curve(run(sharded), run(alone))
    assert sharded.manifest["export"]["checks"][1]["relative_logit_difference"] < 1e-4
    difference = logits_of(sharded, AutoModelForCausalLM) - logits_of(alone, AutoPeftModelForCausalLM)
    assert difference.abs().max() < 1e-3
    adapter = load_file(sharded.base_dir / "model/adapter/adapter_model.safetensors")
    for name, tensor in weights_of(alone).items():
        torch.testing.assert_close(adapter[name], tensor, rtol=0, atol=WEIGHT_TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("kind", "use_peft", "tolerance"),
    [("smolvlm", "true", LOSS_TOLERANCE), ("gemma4", "false", 1e-3)],  # norms of gradients of 4 and of 20
)
def test_a_model_that_sees_learns_from_texts_on_two_ranks_what_it_does_on_one(make_job, kind, use_peft, tolerance):
    """Gemma 4 has buffers that are saved, which no rank shards."""
    jobs = make_job(1, use_peft=use_peft), make_job(2, use_peft=use_peft)
    for job in jobs:
        folder = job.base_dir / "input/data/model"
        shutil.rmtree(folder)
        base = write_base(kind, folder)
        for name in base.state_dict().keys() - dict(base.named_parameters(remove_duplicate=False)).keys():
            base.get_buffer(name).fill_(0.9)
        base.save_pretrained(folder)
    logs = [run(job) for job in jobs]
    assert_same_curve(*logs, tolerance)
    assert_same_weights(*jobs)
    assert re.search(r"Vision: model\.vision_\w+, model\.\w+ \([\d,]+ weights\) are frozen", logs[1])
    if use_peft == "false":
        weights = weights_of(jobs[1])
        assert all(torch.equal(weights[name], base.get_parameter(name)) for name in list_tower(base))


def test_whole_weights_stopped_on_four_ranks_go_on_with_two(make_job, start):
    options = {"use_peft": "false", "num_train_epochs": "20", "learning_rate": "0.001"}
    alone, sharded = make_job(1, **options, use_checkpoints="false"), make_job(4, **options)
    run(alone)
    job = start(sharded)
    job.wait_for("step=3;")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    (step,) = sharded.checkpoints
    assert 3 <= step < sharded.manifest["total_steps"]
    shards = (sharded.base_dir / f"checkpoints/checkpoint-{step}/optimizer_0").glob("*.distcp")
    assert len({shard.name for shard in shards}) == 4
    assert "model.safetensors" in sharded.model_files
    sharded.change(nproc_per_node="2", gradient_accumulation_steps="2")
    log = run(sharded)
    assert len(metrics_of(log, "train_loss")) == sharded.manifest["total_steps"] - step
    assert_same_weights(sharded, alone)
    assert torch.allclose(logits_of(sharded, AutoModelForCausalLM), logits_of(alone, AutoModelForCausalLM), atol=1e-3)


@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_a_stop_within_a_long_step_is_agreed_on_by_two_ranks(make_job, start, distribution):
    batches = 200
    options = {"distribution": distribution, "per_device_train_batch_size": "1", "lora_dropout": "0.3"}
    options |= {"gradient_accumulation_steps": str(batches), "save_steps": "100", "max_steps": "3"}
    stopped, whole = make_job(2, **options), make_job(2, **options)
    for tree in (stopped, whole):
        tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in ROWS) * 40)
    job = start(stopped)
    job.wait_for("step=1;")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    (told,) = re.findall(r"The stop came within step (\d), after (\d+) of its batches: the next start begins", job.log)
    assert int(told[1]) < batches - 1
    assert stopped.checkpoints == [int(told[0]) - 1] == [stopped.manifest["num_steps"]]
    log = run(stopped)
    assert metrics_of(log, "step")[0] == int(told[0])
    assert stopped.manifest["num_steps"] == 3
    run(whole)
    assert_same_weights(stopped, whole, tolerance=0)


def test_a_quantized_base_is_sharded_and_trained_as_by_one_process(make_job):
    pytest.importorskip("bitsandbytes")
    alone, sharded = (make_job(ranks, load_in_4bit="true", use_checkpoints="false") for ranks in (1, 2))
    # The adapter is in bfloat16, as QLoRA's authors advise.
    assert_same_curve(run(sharded), run(alone), tolerance=5e-3)
    assert_same_weights(sharded, alone, tolerance=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_4_bit_base_is_quantized_once_and_its_shards_have_the_bytes_of_one_process(tmp_path, tiny_model, dtype):
    command = [sys.executable, sharded_base.__file__, str(tmp_path), str(tiny_model), dtype]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = [f"rank {rank} quantized {count} of 14 matrices" for rank, count in ((0, 14), (1, 0))]
    assert sorted(line for line in result.stdout.splitlines() if line) == counts


def test_hosts_have_their_own_shards_and_go_on_together_after_a_worker_was_killed(make_job, ports_of_hosts, start):
    hosts = ["127.0.0.1", "127.0.0.2"]
    options = {"num_train_epochs": "10", "save_steps": "5", "logging_steps": "5"}
    trees = [make_job(2, **options, nproc_per_node="1", max_restarts="1") for _ in hosts]
    for tree, host in zip(trees, hosts, strict=True):
        resources = {"current_host": host, "hosts": hosts, "network_interface_name": "lo"}
        tree.write("input/config/resourceconfig.json", resources)
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=10;")
    jobs[1].workers()[0].kill()
    for job, other in zip(jobs, reversed(jobs), strict=True):
        assert job.end() == 0, job.log + "OTHER HOST\n" + other.log
    assert "Resuming from" in jobs[0].log
    newest = [tree.base_dir / f"checkpoints/checkpoint-{tree.checkpoints[-1]}" for tree in trees]
    assert [sorted(file.name for file in folder.rglob("*.distcp")) for folder in newest] == [
        ["__0_0.distcp"] * 2,
        ["__1_0.distcp"] * 2,
    ]
    assert (newest[0] / "complete.json").read_text() == (newest[1] / "complete.json").read_text()
    alone = make_job(1, **options, use_checkpoints="false")
    run(alone)
    assert_same_weights(trees[0], alone, tolerance=1e-3)


def test_gradients_of_ranks_are_summed_in_float32(tmp_path):
    command = [sys.executable, reduced_gradients.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    mean = sum(reduced_gradients.ADDENDS) / len(reduced_gradients.ADDENDS)
    assert result.stdout == f"torch.float32 [{reduced_gradients.BATCHES * mean}]\n"


def test_the_optimizers_that_update_shards_are_those_that_the_rules_let_through(tmp_path):
    command = [sys.executable, sharded_optimizers.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    optimizers = [optim for optim in read_snapshot()["optim"].choices if not find_missing_package(optim)]
    assert result.stdout.split() == [optim for optim in optimizers if updates_shards(optim)]
