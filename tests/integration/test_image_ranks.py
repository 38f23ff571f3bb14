# SPDX-License-Identifier: Apache-2.0
"""Two ranks learn from rows with images what one process does, in steps in which only one of them has an image."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llm_trainer.model.kinds.tower import list_tower
from support.compared_jobs import check_metrics_are_alike
from support.image_rows import ROWS
from support.image_sweep import write_base
from support.sagemaker_tree import finish
from support.seeing_jobs import give_images
from support.tiny_processors import KINDS

pytestmark = pytest.mark.long

SEEN, TEXT = ROWS[:2]
# Of each four rows of a step, the first rank gets two with images and the second one two without, and then the reverse.
ORDERED = [SEEN, SEEN, TEXT, TEXT, TEXT, TEXT, SEEN, SEEN] * 2
OPTIONS = {
    "num_train_epochs": "1",
    "shuffle_dataset": "false",
    "train_sampling_strategy": "sequential",
    "logging_steps": "1",
    "learning_rate": "0.001",
    "lora_dropout": "0",
    "dataloader_num_workers": "0",
}
KEYS = ("train_loss", "grad_norm", "tokens")


@pytest.fixture
def make_job(make_tree):
    def make(kind, ranks, **hyperparameters):
        tree = make_tree()
        tree.environment["OMP_NUM_THREADS"] = "1"
        divided = {"per_device_train_batch_size": str(4 // ranks)} | OPTIONS | hyperparameters
        if ranks > 1:
            divided["nproc_per_node"] = str(ranks)
        else:
            divided.pop("distribution")
        return tree, give_images(tree, kind, ORDERED, **divided)

    return make


def load_weights(tree):
    (file,) = (tree.base_dir / "model").glob("*model.safetensors")
    return load_file(file)


def check_ranks_equal_one_process(make_job, kind, **hyperparameters):
    """Train a job with one process and with two. Return the latter, and the base."""
    (alone, base), (ranks, _) = (make_job(kind, number, **hyperparameters) for number in (1, 2))
    logs = [finish(ranks), finish(alone)]
    check_metrics_are_alike(*logs, KEYS, abs=1e-4)
    found, expected = load_weights(ranks), load_weights(alone)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=name)
    return ranks, base


FSDP = [(kind, "fsdp", train_vision) for kind in KINDS for train_vision in ("true", "false")]


@pytest.mark.parametrize(("kind", "distribution", "train_vision"), [*FSDP, ("idefics", "ddp", "true")])
def test_an_adapter(make_job, kind, distribution, train_vision):
    options = {"distribution": distribution, "train_vision": train_vision, "gradient_checkpointing": "true"}
    tree, _ = check_ranks_equal_one_process(make_job, kind, **options)
    in_tower = {name: weight for name, weight in load_weights(tree).items() if "vision" in name or "visual" in name}
    assert bool(in_tower) == (train_vision == "true")
    assert all(weight.any() for name, weight in in_tower.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("kind", "distribution", "train_vision"),
    [("idefics", "fsdp", "true"), ("qwen", "fsdp", "false"), ("qwen", "ddp", "true")],
)
def test_all_weights(make_job, kind, distribution, train_vision):
    options = {"distribution": distribution, "train_vision": train_vision, "use_peft": "false"}
    tree, base = check_ranks_equal_one_process(make_job, kind, **options)
    trained = AutoModelForImageTextToText.from_pretrained(tree.base_dir / "model")
    is_moved = [not torch.equal(trained.get_parameter(name), base.get_parameter(name)) for name in list_tower(base)]
    assert any(is_moved) == (train_vision == "true")


def test_all_weights_though_texts_reach_but_some_layers(make_tree):
    """Texts pass over the layers of Mllama that attend to an image."""
    trees = [make_tree(), make_tree()]
    for ranks, tree in enumerate(trees, start=1):
        shutil.rmtree(tree.base_dir / "input/data/model")
        write_base("mllama", tree.base_dir / "input/data/model")
        tree.environment["OMP_NUM_THREADS"] = "1"
        tree.change(use_peft="false", max_steps="3", per_device_train_batch_size=str(8 // ranks))
    trees[1].change(nproc_per_node="2", distribution="ddp")
    logs = [finish(tree) for tree in trees]
    check_metrics_are_alike(*logs, KEYS, abs=1e-4)
