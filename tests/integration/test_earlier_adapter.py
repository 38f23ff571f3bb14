# SPDX-License-Identifier: Apache-2.0
"""A training that goes on from the adapter of an earlier job ends as one that never stopped in between."""

import json
import shutil
import tarfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_trainer.common.files import compute_digest
from support.sagemaker_tree import ROWS, metrics_of
from support.tiny_gpt_oss import build_tiny_gpt_oss

pytestmark = pytest.mark.long

# No step depends on an earlier one but by the weights: no momentum, no schedule, no dropout.
STATELESS = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": "0.5",
    "train_sampling_strategy": "sequential",
    "sample_prompts": "0",
}
WEIGHT_TOLERANCE = 1e-5  # of ranks, which add gradients up in another order
KIND = {"lora_r": "3", "lora_alpha": "5", "target_modules": '["q_proj", "down_proj"]', "use_rslora": "true"}


def give_rows(tree, rows):
    tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))


def run_job(tree):
    """Run the job as a new one, and return its log."""
    for folder in ("checkpoints", "model"):
        shutil.rmtree(tree.base_dir / folder, ignore_errors=True)
    result = tree.run()
    assert result.returncode == 0, result.stdout
    return result.stdout


def read_config(tree):
    """Return the result's config. PEFT writes the set of targets in any order."""
    config = json.loads((tree.base_dir / "model/adapter_config.json").read_text())
    return config | {"target_modules": sorted(config["target_modules"])}


def pack_result(tree):
    """Give the last job's result to the next one, as SageMaker packs it, in the channel `adapter`."""
    channel = tree.base_dir / "input/data/adapter"
    shutil.rmtree(channel, ignore_errors=True)
    channel.mkdir()
    with tarfile.open(channel / "model.tar.gz", "w:gz") as archive:
        archive.add(tree.base_dir / "model", ".")
    tree.write("input/config/inputdataconfig.json", {name: {} for name in ("model", "train", "adapter")})


def test_two_jobs_end_with_the_very_adapter_of_one(tree):
    shutil.rmtree(tree.base_dir / "input/data/validation")
    tree.write("input/config/inputdataconfig.json", {name: {} for name in ("model", "train")})
    tree.change(**STATELESS, **KIND)
    weights = tree.base_dir / "model/adapter_model.safetensors"
    run_job(tree)
    whole, config = load_file(weights), read_config(tree)

    give_rows(tree, ROWS[:16])
    tree.environment["TRAINING_JOB_NAME"] = "first-half"
    run_job(tree)
    half, digest = load_file(weights), compute_digest(weights)

    give_rows(tree, ROWS[16:])
    tree.change(**dict.fromkeys(KIND))  # they come from the adapter
    tree.environment["TRAINING_JOB_NAME"] = "second-half"
    pack_result(tree)
    log = run_job(tree)
    assert "Starting from the adapter " in log
    assert "Adapter: rsLoRA of rank 3 and alpha 5, as in " in log
    ended = load_file(weights)
    assert ended.keys() == whole.keys() == half.keys()
    assert all(ended[name].equal(whole[name]) for name in whole)
    assert not all(half[name].equal(whole[name]) for name in whole)
    assert read_config(tree) == config
    (earlier,) = tree.manifest["lineage"]
    assert earlier["training_job_name"] == "first-half"
    assert earlier["num_steps"] == 2
    assert earlier["sha256"] == digest
    assert tree.manifest["settings"]["lora_r"] == 3
    assert digest in (tree.base_dir / "model/README.md").read_text()

    tree.change(nproc_per_node="2", distribution="ddp", per_device_train_batch_size="4")  # the same rows a step
    run_job(tree)
    assert tree.manifest["world_size"] == 2
    by_two = load_file(weights)
    assert by_two.keys() == ended.keys()
    for name, tensor in by_two.items():
        torch.testing.assert_close(tensor, ended[name], rtol=0, atol=WEIGHT_TOLERANCE, msg=name)


def make_adapter(tree, seed=0, **options):
    """Give the job an adapter that another tool made, which adds something from the first step."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tree.base_dir / "input/data/model"), config)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.02)
    model.save_pretrained(tree.base_dir / "input/data/adapter")
    tree.write("input/config/inputdataconfig.json", {name: {} for name in ("model", "train", "adapter")})


def test_sharded_ranks_go_on_and_resume_from_checkpoints_of_this_adapter_alone(tree):
    make_adapter(tree, modules_to_save=["lm_head"])
    tree.change(nproc_per_node="2", distribution="fsdp", per_device_train_batch_size="4", save_steps="2")
    tree.change(merge_weights="true")
    log = run_job(tree)
    losses = metrics_of(log, "train_loss")
    assert losses[-1] < losses[0]
    assert tree.manifest["export"]["proven"] is True
    merged = (tree.base_dir / "model/model.safetensors").read_bytes()

    shutil.rmtree(tree.base_dir / "checkpoints/checkpoint-4")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert f"Resuming from {tree.base_dir / 'checkpoints/checkpoint-2'}" in result.stdout
    assert (tree.base_dir / "model/model.safetensors").read_bytes() == merged

    make_adapter(tree, seed=1, modules_to_save=["lm_head"])
    assert tree.run().returncode == 1
    assert "is a checkpoint of another run (earlier adapter was " in tree.failure


@pytest.mark.parametrize("kind", ["4bit", "mxfp4"])
def test_a_quantized_base_goes_on_with_an_adapter_that_another_tool_made(tree, kind):
    base = tree.base_dir / "input/data/model"
    if kind == "mxfp4":
        shutil.rmtree(base)
        build_tiny_gpt_oss(base)
    options = {"use_dora": True} if kind == "4bit" else {"rank_pattern": {"v_proj": 2}}
    make_adapter(tree, **options)
    tree.change(merge_weights="true", **({"load_in_4bit": "true"} if kind == "4bit" else {}))
    log = run_job(tree)
    losses = metrics_of(log, "train_loss")
    assert losses[-1] < losses[0]
    assert tree.manifest["export"]["proven"] is True
    ended = json.loads((tree.base_dir / "model/adapter/adapter_config.json").read_text())
    assert ended["r"] == 4
    assert ended.items() >= options.items()
