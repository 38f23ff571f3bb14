# SPDX-License-Identifier: Apache-2.0
"""A job trains an image-text model on rows with images and rows without, and stops at a bad image before it loads."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llm_trainer.data.images.processors import load_processor
from llm_trainer.model.kinds.tower import list_tower
from llm_trainer.readers.thumbnails import MAX_CHARACTERS
from support.compared_jobs import check_stop_changes_nothing
from support.image_rows import PAIRS
from support.sagemaker_tree import finish, metrics_of
from support.seeing_jobs import give_images
from support.tiny_processors import KINDS, draw

pytestmark = pytest.mark.long


@pytest.fixture(params=KINDS)
def seeing_tree(request, tree):
    """A tree with a model of one of the kinds, and rows; every second one has an image."""
    give_images(tree, request.param)
    return tree


def test_a_job_learns_from_rows_with_and_without_images(seeing_tree):
    result = seeing_tree.run()
    assert result.returncode == 0, result.stdout
    assert "Packing off: rows have images; train_sampling_strategy=group_by_length" in result.stdout
    assert "16 rows, 8 images" in result.stdout
    losses = metrics_of(result.stdout, "train_loss")
    assert losses[-1] < losses[0]
    assert {"adapter_model.safetensors", "processor_config.json"} <= seeing_tree.model_files
    assert 'OPTION_LIMIT_MM_PER_PROMPT={"image":2}' in (seeing_tree.base_dir / "model/serving.env").read_text()
    assert '"type": "image_url"' in (seeing_tree.base_dir / "model/README.md").read_text()


def test_the_report_shows_small_images_beside_the_answers_to_them(seeing_tree):
    picture = seeing_tree.base_dir / "input/data/train/0.png"
    draw(1200, 900).save(picture)
    shutil.rmtree(seeing_tree.base_dir / "input/data/validation")
    seeing_tree.change(num_train_epochs=None, max_steps="1")
    result = seeing_tree.run()
    assert result.returncode == 0, result.stdout
    assert "Data train, the first row with images" in result.stdout
    assert "image 1: 0.png, 1200 x 900 pixels, " in result.stdout
    page = (seeing_tree.base_dir / "output/data/report.html").read_text()
    thumbnails = re.findall(r'<img src="(data:image/jpeg;base64,[^"]*)" alt="0.png, 1200 x 900 pixels, ', page)
    assert len(thumbnails) == 2  # of the row of the data, and of the prompt
    assert max(map(len, thumbnails)) <= MAX_CHARACTERS < picture.stat().st_size
    records = map(json.loads, (seeing_tree.base_dir / "output/data/metrics.jsonl").read_text().splitlines())
    answers = [record for record in records if record["kind"] == "generation"]
    assert sorted(len(record["images"]) for record in answers) == [0, 1]
    assert all(record["before"] and record["after"] for record in answers)


def test_an_image_that_is_not_there_stops_the_job_before_it_loads(seeing_tree):
    (seeing_tree.base_dir / "input/data/train/0.png").unlink()
    result = seeing_tree.run()
    assert result.returncode == 1
    assert "train.jsonl row 1 names the image file '0.png', which is not there" in seeing_tree.failure
    assert "Starting from the base model" not in result.stdout


@pytest.mark.parametrize(
    ("kind", "use_peft", "train_vision"),
    [("qwen", "true", "true"), ("idefics", "false", "true"), ("idefics", "true", "false"), ("qwen", "false", "false")],
)
def test_the_tower_is_trained_where_it_is_asked_for_and_the_result_sees(tree, kind, use_peft, train_vision):
    options = {"use_peft": use_peft, "merge_weights": use_peft, "train_vision": train_vision}
    base = give_images(tree, kind, gradient_checkpointing="true", **options)
    finish(tree)
    export = tree.manifest["export"]
    assert export["proven"] and len(export["checks"]) == (2 if use_peft == "true" else 1)
    assert all(check["tokens"] > 100 for check in export["checks"])  # those of images, too
    trained = AutoModelForImageTextToText.from_pretrained(tree.base_dir / "model")
    kept = [torch.equal(trained.get_parameter(name), base.get_parameter(name)) for name in list_tower(base)]
    assert all(kept) == (train_vision == "false")


@pytest.mark.parametrize(("kind", "num_workers"), [("idefics", "0"), ("qwen", "2")])
def test_a_stop_changes_nothing(make_tree, start, kind, num_workers):
    options = {"num_train_epochs": "15", "lora_dropout": "0.1", "logging_steps": "1", "train_vision": "true"}
    options["dataloader_num_workers"] = num_workers
    whole, stopped = make_tree(), make_tree()
    for tree in (whole, stopped):
        tree.environment["OMP_NUM_THREADS"] = "1"
        give_images(tree, kind, **options)
    check_stop_changes_nothing(whole, stopped, start)


TWO_IMAGES = {
    "prompt": "<image> and <image> differ?",
    "chosen": "Much.",
    "rejected": "No.",
    "images": ["1.png", "2.png"],
}
NO_IMAGE = {"prompt": [{"role": "user", "content": "Who?"}], "chosen": "Me, and you.", "rejected": "Them."}


def give_pairs(tree, kind, **hyperparameters):
    give_images(tree, kind, [PAIRS[0], TWO_IMAGES, NO_IMAGE] * 4, method="dpo", **hyperparameters)
    tree.write("input/data/validation/validation.json", [NO_IMAGE] * 2)


@pytest.mark.parametrize("distribution", ["", "fsdp"])
def test_pairs_with_images_and_without_train(tree, distribution):
    options = {"num_train_epochs": "3", "train_vision": "true", "merge_weights": "true"}
    ranks = {"distribution": distribution, "nproc_per_node": "2"} if distribution else {}
    give_pairs(tree, "qwen", **options, **ranks, per_device_train_batch_size="2")
    log = finish(tree)
    assert "12 pairs" in log and "12 images" in log
    assert metrics_of(log, "rewards/accuracies")[-1] > 0.5
    assert tree.manifest["export"]["proven"]
    assert all(check["tokens"] > 60 for check in tree.manifest["export"]["checks"])


def test_a_stopped_run_of_pairs_with_images_ends_with_the_same_weights(make_tree, start):
    options = {"num_train_epochs": "9", "use_peft": "false", "dataloader_num_workers": "1"}
    whole, stopped = make_tree(), make_tree()
    for tree in (whole, stopped):
        tree.environment["OMP_NUM_THREADS"] = "1"
        give_pairs(tree, "idefics", **options, logging_steps="1")
    check_stop_changes_nothing(whole, stopped, start)


def test_a_quantized_language_part_learns_from_images(tree):
    pytest.importorskip("bitsandbytes")
    options = {"image_processor_options": '{"max_pixels": 3136}'}
    give_images(tree, "qwen", load_in_4bit="true", learning_rate="0.01", merge_weights="true", **options)
    log = finish(tree)
    served = load_processor(str(tree.base_dir / "model"), False, {}).image_processor
    assert served.size["longest_edge"] == 3136  # as the training saw them
    losses = metrics_of(log, "train_loss")
    assert losses[-1] < losses[0]
    assert tree.manifest["export"]["proven"]
    assert all(check["tokens"] > 100 for check in tree.manifest["export"]["checks"])
