# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning as a training method: found by its name, it counts the tokens of packed rows."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llm_trainer.common.metric_definitions import METRICS
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.model.kinds.tower import freeze_tower, list_tower
from llm_trainer.readers.images import ImageRules
from llm_trainer.training.methods import choose_method
from llm_trainer.training.methods.sft import SFT
from llm_trainer.training.packing import PackingCollator
from support.image_rows import ROWS, build_raw_rows, build_vocabulary, prepare_rows, save_pictures
from support.tiny_processors import KINDS, read_template
from support.tiny_vision_models import build_vision_model
from support.trainers import build_full_trainer


def test_methods_are_found_by_name_and_sft_is_the_default():
    assert choose_method() is choose_method("sft") is SFT
    with pytest.raises(KeyError):
        choose_method("none")


def test_its_metrics_are_defined():
    assert set(SFT.metric_names.values()) <= METRICS.keys()
    assert not set(SFT.hidden_metrics) & METRICS.keys()


def test_the_tokens_of_packed_rows_are_counted_and_not_their_slots(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"input_ids": [5] * length, "labels": [5] * length, "length": length} for length in (9, 4, 3)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    collator = PackingCollator(0, 16, flattens=False, pad_to_multiple_of=8)
    trainer = build_full_trainer(model, tokenizer, Dataset.from_list(rows[:1]), collator, tmp_path)
    trainer.model.train()
    trainer.compute_loss(trainer.model, collator(rows))
    assert trainer.count_tokens() == 16
    trainer.model.eval()
    trainer.prediction_step(trainer.model, collator(rows), prediction_loss_only=True)
    assert trainer.count_tokens() == 16


def test_rows_of_another_method_are_refused(tiny_model, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = Dataset.from_list([{"chosen": [5], "rejected": [6], "length": 1}])
    with pytest.raises(AssertionError, match="sft needs rows with"):
        build_full_trainer(model, tokenizer, rows, None, tmp_path)


STEPS = {
    "per_device_train_batch_size": 3,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
}


def list_losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def train_with_trl(model, processor, kind, folder):
    """The losses of TRL's own trainer, on the conversations and images themselves."""
    processor.chat_template = read_template(kind, "_training")
    model.config.get_text_config().pad_token_id = processor.tokenizer.pad_token_id
    fixed = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    data = {"max_length": None, "assistant_only_loss": True, "remove_unused_columns": False}
    arguments = SFTConfig(str(folder), gradient_checkpointing=False, **fixed, **data, **STEPS)
    trainer = SFTTrainer(model, arguments, train_dataset=build_raw_rows(), processing_class=processor)
    trainer.train()
    return list_losses(trainer)


@pytest.mark.parametrize("train_vision", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_rows_with_and_without_images_are_those_of_trls_own_trainer(kind, train_vision, tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_vocabulary(kind, tmp_path)
    rows, _ = prepare_rows(vocabulary, ROWS, tmp_path)
    processor, tokenizer = vocabulary.images.processor, vocabulary.tokenizer
    collator = ImageCollator(vocabulary.images, ImageRules(10**7), tokenizer.pad_token_id)
    model, theirs, base = (build_vision_model(kind, processor) for _ in range(3))
    if not train_vision:
        freeze_tower(model)
        freeze_tower(theirs)
    trainer = build_full_trainer(model, tokenizer, rows, collator, tmp_path, dataloader_num_workers=1, **STEPS)
    trainer.train_from(None)
    losses = list_losses(trainer)
    expected = train_with_trl(theirs, processor, kind, tmp_path / "trl")
    assert losses == pytest.approx(expected, abs=1e-5) and losses[1] < losses[0]
    kept = [torch.equal(model.get_parameter(name), base.get_parameter(name)) for name in list_tower(base)]
    assert not any(kept) if train_vision else all(kept)
