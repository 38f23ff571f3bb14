# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.export import logits_check
from llm_trainer.export.logits_check import (
    CheckPlace,
    Expectation,
    attempt_logits,
    choose_check_rows,
    choose_place,
    compare_logits,
    compute_logits,
    cut_behind_image,
    measure_difference,
)
from llm_trainer.model.device import Device
from llm_trainer.model.kinds.tower import list_tower
from llm_trainer.model.loading import LoadOptions, load_model
from llm_trainer.readers.images import ImageRules
from support.image_rows import ROWS as ROWS_OF_IMAGES
from support.image_rows import build_family_vocabulary, build_vocabulary, prepare_rows, save_pictures
from support.tiny_processors import KINDS
from support.tiny_vision_models import build_vision_model

CPU = Device(torch.device("cpu"))
WHOLE = CheckPlace(torch.device("cpu"), "whole on the CPU")
ROWS = [[3, 4, 5, 6, 7], [9, 8, 7], [5, 5]]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_rows_are_cut_and_as_many_wherever_they_are_chosen():
    rows = choose_check_rows(Dataset.from_dict({"input_ids": [list(range(500)), [1, 2]]}))
    assert [len(row) for row in rows] == [logits_check.CHECKED_TOKENS, 2, logits_check.CHECKED_TOKENS]


def test_a_difference_is_relative_to_the_largest_logit():
    expected = [torch.tensor([[4.0, -8.0]]), torch.tensor([[2.0, 0.0]])]
    assert measure_difference(expected, [expected[0], torch.tensor([[2.0, -0.4]])]) == pytest.approx(0.05)


def test_what_was_lost_of_an_adapter_is_noticed(tiny_model, tmp_path):
    model = get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    expected = compute_logits(model, ROWS, torch.device("cpu"))
    same = PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter")
    record = compare_logits("The adapter", Expectation(ROWS, expected, 1e-4), same, WHOLE)
    assert record["relative_logit_difference"] <= 1e-6
    assert (record["rows"], record["tokens"], record["loaded"]) == (3, 10, "whole on the CPU")
    with pytest.raises(UserError, match=r"^The adapter does not compute what was trained: logits differ by "):
        compare_logits("The adapter", Expectation(ROWS, expected, 1e-4), load(tiny_model), WHOLE)
    assert (
        compare_logits("Another base", Expectation(ROWS, expected, None), load(tiny_model), WHOLE)[
            "relative_logit_difference"
        ]
        > 1e-4
    )


def raise_error(error):
    def forward(**_):
        raise error

    return forward


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "there was no room for the trained model's logits ("),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "there was no room for the trained model's logits",
        ),
        (KeyError("x"), "the trained model's logits could not be computed (KeyError: 'x')"),
    ],
)
def test_a_failure_leaves_the_trained_model_without_logits(tiny_model, monkeypatch, capsys, error, reason):
    model = load(tiny_model)
    monkeypatch.setattr(model, "forward", raise_error(error))
    logits, told = attempt_logits(model, ROWS, torch.device("cpu"))
    assert logits is None
    assert told.startswith(reason)
    assert f"Warning: The result will be in place, and not proven: {told}." in capsys.readouterr().out


def test_not_a_number_is_nobodys_rounding(tiny_model):
    expected = compute_logits(load(tiny_model), ROWS, torch.device("cpu"))
    broken = load(tiny_model)
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="The export does not compute"):
        compare_logits("The export", Expectation(ROWS, expected, None), broken, WHOLE)
    logits = compute_logits(broken, ROWS, torch.device("cpu"))
    with pytest.raises(UserError, match=r"diverged; lower learning_rate\.$"):
        compare_logits("The export", Expectation(ROWS, logits, None), broken, WHOLE)


def test_a_model_larger_than_the_memory_is_asked_layer_by_layer(tiny_model, tmp_path, monkeypatch):
    weights_bytes = 4 * load(tiny_model).num_parameters()
    assert choose_place(weights_bytes, CPU, tmp_path).words == "whole on the CPU"
    monkeypatch.setattr(logits_check, "find_free_memory", lambda device: weights_bytes // 2)
    place = choose_place(weights_bytes, CPU, tmp_path)
    assert place.words == "layer by layer on the CPU"
    options = LoadOptions(torch.float32, "sdpa")
    model = load_model(str(tiny_model), Settings().model, options, place.device, **place.placement)
    assert "disk" in model.hf_device_map.values()
    expected = compute_logits(load(tiny_model), ROWS, torch.device("cpu"))
    assert compare_logits("The export", Expectation(ROWS, expected, 1e-6), model, place)["loaded"] == place.words


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_was_lost_is_noticed_by_rows_with_images(kind, tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_vocabulary(kind, tmp_path)
    sample, _ = prepare_rows(vocabulary, [ROWS_OF_IMAGES[1], ROWS_OF_IMAGES[2], ROWS_OF_IMAGES[0]], tmp_path)
    collator = ImageCollator(vocabulary.images, ImageRules(10**7), vocabulary.tokenizer.pad_token_id)
    rows = choose_check_rows(sample, collator)
    assert ["pixel_values" in row for row in rows] == [True, True, False]
    model = build_vision_model(kind, vocabulary.images.processor)
    expected = compute_logits(model, rows, torch.device("cpu"))
    assert all(len(logits) <= logits_check.CHECKED_TOKENS for logits in expected)
    record = compare_logits("The same", Expectation(rows, expected, 1e-4), model, WHOLE)
    assert record["tokens"] == sum(row["input_ids"].numel() for row in rows)
    with torch.no_grad():
        for name in list_tower(model):
            model.get_parameter(name).mul_(2)
    with pytest.raises(UserError, match="does not compute what was trained"):
        compare_logits("Another tower", Expectation(rows, expected, 1e-4), model, WHOLE)


def test_a_checked_row_has_all_images_where_they_depend_on_each_other(tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_family_vocabulary("llava_onevision", tmp_path)
    sample, _ = prepare_rows(vocabulary, [ROWS_OF_IMAGES[2]], tmp_path)
    collator = ImageCollator(vocabulary.images, ImageRules(10**7), vocabulary.tokenizer.pad_token_id)
    assert all(len(row["pixel_values"]) == 2 for row in choose_check_rows(sample, collator))


def test_a_checked_row_ends_before_a_second_image():
    pictures = [{"start": 3, "tokens": 500}, {"start": 600, "tokens": 20}]
    row = {"input_ids": [*range(700)], "labels": [*range(700)], "pictures": pictures}
    assert len(cut_behind_image(row)["input_ids"]) == 600
    assert len(cut_behind_image({**row, "pictures": pictures[:1]})["input_ids"]) == 503 + logits_check.CHECKED_TOKENS
    assert len(cut_behind_image({**row, "pictures": []})["input_ids"]) == logits_check.CHECKED_TOKENS
