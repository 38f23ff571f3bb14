# SPDX-License-Identifier: Apache-2.0
"""Jobs of image-text models on rows with images and rows without."""

import json
import shutil

from support.image_rows import ROWS, save_pictures
from support.tiny_processors import save_processor
from support.tiny_vision_models import build_vision_model


def give_images(tree, kind, rows=(), **hyperparameters):
    """Give a job a model that sees, and rows; every second one has an image. Return the model."""
    data = tree.base_dir / "input/data"
    shutil.rmtree(data / "model")
    processor = save_processor(kind, data / "model")
    base = build_vision_model(kind, processor)
    base.save_pretrained(data / "model")
    save_pictures(data / "train")
    text = "".join(f"{json.dumps(row)}\n" for row in rows or ROWS[:2] * 8)
    tree.write("input/data/train/train.jsonl", text)
    tree.write_job({"num_train_epochs": "2", "per_device_train_batch_size": "4"} | hyperparameters, ("train", "model"))
    return base
