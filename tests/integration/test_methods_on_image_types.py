# SPDX-License-Identifier: Apache-2.0
"""Every method trains image-text models on rows of text, and refuses rows with images before weights load."""

import json
import os
import shutil
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from llm_trainer.cli.validate import examine_job
from llm_trainer.model.kinds.tower import list_tower
from support.image_sweep import write_base
from support.sagemaker_tree import finish

PAIR = {"prompt": "What is 1 plus 1?", "chosen": "2 it is", "rejected": "3 3 3"}
JUDGED = [{"prompt": "What?", "completion": "2 it is", "label": good} for good in (True, False)]
ANSWER = {"role": "assistant", "content": "Hello"}
ASKED = {"messages": [{"role": "user", "content": "Hi"}, ANSWER]}
REWARDED = {
    "reward_functions": '["length"]',
    "reward_options": '{"length": {"max_tokens": 2}}',
    "num_generations": "2",
    "max_completion_length": "4",
    "per_device_train_batch_size": "4",
    "sample_prompts": "0",
}
METHODS = {
    "dpo": ([PAIR], {}),
    "kto": (JUDGED, {}),
    "distill": ([ASKED], {}),
    "grpo": ([{"question": "What is 1 plus 1?"}], {**REWARDED, "beta": "0.1"}),
    "rloo": ([{"prompt": "1, 2, 3"}], REWARDED),
    "reward": ([PAIR], {}),
}

SMOKE = [("qwen2_5_vl", "grpo")]
TYPES = {**dict.fromkeys(METHODS, ("gemma3", "qwen2_5_vl", "smolvlm", "llama4")), "reward": ("gemma3", "qwen3_5")}
LONG = [(each, method) for method, types in TYPES.items() for each in types if (each, method) not in SMOKE]
IMAGE = {"type": "image", "image": "a.png"}


@pytest.fixture
def make_job(make_tree):
    def make(method, model_type, rows=(), **hyperparameters):
        tree, data = make_tree(), "input/data"
        own_rows, options = METHODS[method]
        shutil.rmtree(tree.base_dir / data / "model")
        base = write_base(model_type, tree.base_dir / data / "model")
        if method == "distill":
            shutil.copytree(tree.base_dir / data / "model", tree.base_dir / data / "teacher")
        text = "".join(f"{json.dumps(row)}\n" for row in rows or own_rows * 8)
        tree.write(f"{data}/train/train.jsonl", text)
        tree.write(f"{data}/validation/validation.json", own_rows * 2)
        tree.change(method=method, max_steps="2", **options, **hyperparameters)
        return tree, base

    return make


def check_rows_of_text_train(make_job, model_type, method):
    """A job's result is of the base's kind, and its tower is the base's."""
    tree, base = make_job(method, model_type, merge_weights="true")
    finish(tree)
    assert tree.manifest["export"]["proven"]
    auto_class = AutoModelForSequenceClassification if method == "reward" else AutoModelForImageTextToText
    trained = auto_class.from_pretrained(tree.base_dir / "model")
    assert method == "reward" or type(trained) is type(base)
    assert all(torch.equal(trained.get_parameter(name), base.get_parameter(name)) for name in list_tower(base))


@pytest.mark.parametrize(("model_type", "method"), SMOKE)
def test_rows_of_text_train(make_job, model_type, method):
    check_rows_of_text_train(make_job, model_type, method)


@pytest.mark.long
@pytest.mark.parametrize(("model_type", "method"), LONG)
def test_rows_of_text_train_more_types(make_job, model_type, method):
    check_rows_of_text_train(make_job, model_type, method)


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("reward", {**PAIR, "images": ["a.png"]}),
        pytest.param("distill", {"messages": [{"role": "user", "content": [IMAGE]}, ANSWER]}, marks=pytest.mark.long),
    ],
)
def test_images_are_refused_before_weights_load(make_job, method, row):
    tree, _ = make_job(method, "gemma3", [row])
    reason = f"train.jsonl row 1 has images, which method={method} does not take: set method=sft, or remove them."
    with patch.dict(os.environ, SAGEMAKER_BASE_DIR=str(tree.base_dir)):
        assert reason in "\n".join(examine_job([], in_colour=False).list_texts("error"))
    result = tree.run()
    assert result.returncode == 1
    assert reason in tree.failure
    assert "Starting from the base model" not in result.stdout


@pytest.mark.long
def test_a_type_without_a_head_for_rewards_is_refused_in_one_sentence(make_job):
    tree, _ = make_job("reward", "smolvlm")
    assert tree.run().returncode == 1
    assert "is of type smolvlm, for which Transformers has no model with a head for rewards: give" in tree.failure
