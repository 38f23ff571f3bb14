# SPDX-License-Identifier: Apache-2.0
"""The real SageMaker SDKs train with the image in their local mode, and what they leave loads."""

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_mode.job import HYPERPARAMETERS
from support.sagemaker_tree import ROWS

pytestmark = pytest.mark.timeout(540)

ROWS_A_DEVICE = 4
GIVEN = HYPERPARAMETERS | {"lora_r": 4}


@pytest.fixture
def tree(tree):
    tree.write("input/data/config/job.yaml", f"per_device_train_batch_size: {ROWS_A_DEVICE}\nlearning_rate: 1\n")
    return tree


@pytest.mark.parametrize(
    ("script", "instances"),
    [("model_trainer_sdk3", 1), ("model_trainer_sdk3", 2), ("model_trainer_sdk2", 1), ("estimator_sdk2", 2)],
)
def test_a_job_trains_an_adapter_that_loads(tree, run_script, script, instances):
    job = run_script(script, instances)
    assert job.exit_code == 0, job.log
    model_dir = job.unpack("model.tar.gz")

    manifest = json.loads((model_dir / "training_manifest.json").read_text())
    assert manifest["training_job_name"].startswith("local-mode")
    assert manifest["world_size"] == instances
    assert manifest["num_steps"] == len(ROWS) // (ROWS_A_DEVICE * instances)
    assert {name: manifest["settings"][name] for name in GIVEN} == GIVEN

    base = AutoModelForCausalLM.from_pretrained(tree.base_dir / "input/data/model")
    adapted = PeftModel.from_pretrained(base, model_dir)
    trained = {name: weight for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert len(trained) == 2 * base.config.num_hidden_layers
    assert all(weight.any() for weight in trained.values())
    assert AutoTokenizer.from_pretrained(model_dir).chat_template


def test_the_example_of_source_code_trains_too(tree, run_script):
    job = run_script("source_code_sdk3")
    assert job.exit_code == 0, job.log
    model_dir = job.unpack("model.tar.gz")
    assert (model_dir / "adapter_model.safetensors").exists()
    settings = json.loads((model_dir / "training_manifest.json").read_text())["settings"]
    given = GIVEN | {"run_name": "the 1st run"}
    assert {name: settings[name] for name in given} == given


@pytest.mark.parametrize("script", ["model_trainer_sdk3", "source_code_sdk3", "estimator_sdk2"])
def test_a_mistake_is_told_in_the_sdks_output(tree, run_script, script):
    tree.write("input/data/config/job.yaml", "learnig_rate: 1\n")
    job = run_script(script)
    assert job.exit_code != 0
    failure = (job.unpack("output.tar.gz") / "failure").read_text()
    assert failure.startswith("YAML key 'learnig_rate'")
    assert failure in job.log
