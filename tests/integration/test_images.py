# SPDX-License-Identifier: Apache-2.0
"""A job trains an image-text model on rows with images and rows without, and stops at a bad image before it loads."""

import json
import shutil

import pytest

from support.image_rows import ROWS, save_pictures
from support.sagemaker_tree import metrics_of
from support.tiny_processors import KINDS, save_processor
from support.tiny_vision_models import build_vision_model

pytestmark = pytest.mark.long


@pytest.fixture(params=KINDS)
def seeing_tree(request, tree):
    """A tree with a model of one of the kinds, and rows of which every second has an image."""
    data = tree.base_dir / "input/data"
    shutil.rmtree(data / "model")
    processor = save_processor(request.param, data / "model")
    build_vision_model(request.param, processor).save_pretrained(data / "model")
    save_pictures(data / "train")
    rows = ROWS[:2] * 8
    (data / "train/train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree.write_job({"num_train_epochs": "2", "per_device_train_batch_size": "4"}, ("train", "model"))
    return tree


def test_a_job_learns_from_rows_with_and_without_images(seeing_tree):
    result = seeing_tree.run()
    assert result.returncode == 0, result.stdout
    assert "Packing off: rows have images; train_sampling_strategy=group_by_length" in result.stdout
    assert "16 rows, 8 images" in result.stdout
    losses = metrics_of(result.stdout, "train_loss")
    assert losses[-1] < losses[0]
    assert {"adapter_model.safetensors", "processor_config.json"} <= seeing_tree.model_files


def test_an_image_that_is_not_there_stops_the_job_before_it_loads(seeing_tree):
    (seeing_tree.base_dir / "input/data/train/0.png").unlink()
    result = seeing_tree.run()
    assert result.returncode == 1
    assert "train.jsonl row 1 names the image file '0.png', which is not there" in seeing_tree.failure
    assert "Starting from the base model" not in result.stdout
