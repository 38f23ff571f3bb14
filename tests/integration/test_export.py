# SPDX-License-Identifier: Apache-2.0
"""What whole jobs leave in /opt/ml/model, also where the merge or the training has failed."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.small_disk import small_disk

pytestmark = pytest.mark.long


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_merge_that_fails_loses_nothing_and_can_be_done_later(tree):
    tree.change(merge_weights="true")
    model_dir = tree.base_dir / "model"
    with small_disk(model_dir, 180):
        result = tree.run()
        assert result.returncode == 1, result.stdout
        assert tree.failure.startswith("merge_weights=true: the merge failed, and nothing is lost: the adapter is in ")
        assert re.search(r"The merged model needs [\d,]+ bytes in .*, and [\d,]+ are free there: ", tree.failure)
        assert tree.model_files == {"adapter"}
        adapted = PeftModel.from_pretrained(load(tree.base_dir / "input/data/model"), model_dir / "adapter")
        assert AutoTokenizer.from_pretrained(model_dir / "adapter").chat_template
        manifest = json.loads((model_dir / "adapter/training_manifest.json").read_text())
        (check,) = manifest["export"]["checks"]
        assert check["what"] == "The adapter on its base"
        assert check["relative_logit_difference"] <= check["tolerance"]
        assert logits_of(adapted).isfinite().all()


def test_a_merge_leaves_the_adapter_beside_it_and_the_next_run_removes_both(tree):
    tree.change(merge_weights="true", use_checkpoints="false")
    assert tree.run().returncode == 0
    whole = {"adapter", "model.safetensors", "config.json", "training_manifest.json", "serving.properties"}
    assert whole <= tree.model_files
    assert "adapters" not in tree.model_files
    assert [check["what"] for check in tree.manifest["export"]["checks"]] == [
        "The adapter on its base",
        "The merged model",
    ]
    tree.change(merge_weights=None)
    assert tree.run().returncode == 0
    assert not {"adapter", "model.safetensors", "config.json"} & tree.model_files
    assert {"adapter_config.json", "adapters", "serving.env"} <= tree.model_files


def test_an_adapter_names_its_base_and_not_the_folder_it_was_loaded_from(tree):
    assert tree.run().returncode == 0
    config = json.loads((tree.base_dir / "model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tree.base_dir / "input/data/model")
    assert config["revision"] is None
    assert config["r"] == 8
    assert "q_proj" in config["target_modules"]


@pytest.mark.parametrize(("method", "base"), [("load_in_4bit", "dequantized"), ("load_in_8bit", "bf16")])
def test_a_quantized_jobs_merge_goes_into_the_base_that_was_asked_for(tree, method, base):
    pytest.importorskip("bitsandbytes")
    tree.change(merge_weights="true", merge_base=base, **{method: "true"})
    result = tree.run()
    assert result.returncode == 0, result.stdout
    checks = {check["what"]: check for check in tree.manifest["export"]["checks"]}
    assert checks["The adapter on its base"]["relative_logit_difference"] <= 1e-4
    assert checks["The merged model"]["relative_logit_difference"] <= 1e-4
    beside = "The merged model, beside the adapter on its quantized base,"
    assert (beside in checks) == (base == "bf16")
    if base == "bf16":  # another base, and no mistake
        assert checks[beside]["relative_logit_difference"] > 1e-3
        assert checks[beside]["tolerance"] is None


def test_a_base_that_is_gone_by_the_end_leaves_a_result_without_proof(tree, start):
    tree.change(max_steps="40", use_checkpoints="false")
    job = start(tree)
    job.wait_for("step=1;")
    shutil.rmtree(tree.base_dir / "input/data/model")
    assert job.end() == 0, job.log
    assert "adapter_model.safetensors" in tree.model_files
    outcome = tree.manifest["export"]
    assert (outcome["proven"], outcome["checks"]) == (False, [])
    told = f"Warning: The result in {tree.base_dir / 'model'} is whole, and not proven: {outcome['reason']}."
    assert [line for line in job.log.splitlines() if line.strip()][-1] == told


def test_a_training_that_diverged_is_no_success(tree):
    tree.change(learning_rate="1e30", max_grad_norm="0")
    assert tree.run().returncode == 1
    assert tree.failure.startswith("The trained model computes not-a-number: the training diverged; lower learning")
    assert tree.model_files == set()
    assert (tree.base_dir / "output/data/rejected_export/adapter_model.safetensors").is_file()
