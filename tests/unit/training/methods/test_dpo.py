# SPDX-License-Identifier: Apache-2.0
"""DPO: the loss of packed and padded pairs is that of TRL's own trainer, for every loss that it has."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from llm_trainer.common.metric_definitions import list_metrics
from llm_trainer.config.sections import METHOD_FIELDS
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.model.kinds.tower import freeze_tower
from llm_trainer.readers.images import ImageRules
from llm_trainer.training.methods.dpo import DPO, ResumableDPOTrainer
from llm_trainer.training.packing import PackingCollator
from support.image_rows import PAIRS, build_raw_pairs, build_vocabulary, prepare_rows, save_pictures
from support.preference_pairs import build_lora, build_pair_trainer, build_pairs, build_rows, compute_step
from support.tiny_processors import KINDS, read_template
from support.tiny_vision_models import build_vision_model

LOSSES = {
    **{name: {"loss_type": [name]} for name in METHOD_FIELDS["loss_type"]["dpo"].choices},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "several": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "length": {"ld_alpha": 0.5},
    "weighted": {"use_weighting": True},
    "divergence": {"f_divergence_type": "js_divergence"},
}
NUM_PAIRS = 6
PACKINGS = {"stacked": PackingCollator(0, None, flattens=False), "padded": None}


class TokenizedDPOTrainer(DPOTrainer):
    def _prepare_dataset(self, dataset, *args):
        return dataset


def build_trls(model, folder, lora, **options):
    arguments = DPOConfig(str(folder), per_device_train_batch_size=NUM_PAIRS, report_to="none", bf16=False, **options)
    base = AutoModelForCausalLM.from_pretrained(model)
    return TokenizedDPOTrainer(
        base,
        ref_model=copy.deepcopy(base) if lora is None else None,
        args=arguments,
        train_dataset=Dataset.from_list(build_pairs(NUM_PAIRS)),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora,
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_trls_own_trainer(tiny_model, tmp_path, loss, packing):
    theirs = build_trls(tiny_model, tmp_path, build_lora(), **LOSSES[loss])
    ours = build_pair_trainer(
        tiny_model, build_rows(NUM_PAIRS), tmp_path, PACKINGS[packing], build_lora(), **LOSSES[loss]
    )
    adapter = {name: value for name, value in theirs.model.state_dict().items() if "lora_" in name}
    ours.model.load_state_dict(adapter, strict=False)
    (found, gradients), (expected, expected_gradients) = compute_step(ours), compute_step(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    trls = {name: values[-1] for name, values in theirs._metrics["train"].items() if name in ours.metric_names}
    means = {name: mean for name, mean in ours.line_sums.means.items() if name != "loss"}
    assert means == pytest.approx(trls, rel=1e-4, abs=1e-4)


def test_all_weights_have_the_loss_of_a_second_model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    theirs = build_trls(tiny_model, tmp_path, None)
    ours = build_pair_trainer(tiny_model, build_rows(NUM_PAIRS), tmp_path, PACKINGS["stacked"])
    assert ours.ref_model is None
    ours.prepare_reference()
    for trainer in (ours, theirs):  # away from the reference
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.mul_(1.01)
    (found, gradients), (expected, expected_gradients) = compute_step(ours), compute_step(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_the_mean_over_its_pairs_however_they_are_cut(tiny_model, tmp_path, size):
    """Six pairs in one batch, or in batches of which the last may be smaller."""
    options = {"lora": build_lora(), "max_steps": 1, "learning_rate": 1e-3, "optim": "sgd", "seed": 3}
    batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-NUM_PAIRS // size)}
    trainers = [
        build_pair_trainer(tiny_model, build_rows(NUM_PAIRS), tmp_path / str(n), PACKINGS["stacked"], **options, **more)
        for n, more in enumerate(({"per_device_train_batch_size": NUM_PAIRS}, batches))
    ]
    losses = [trainer.train().metrics["train_loss"] for trainer in trainers]
    whole, cut = ({n: w for n, w in each.model.named_parameters() if w.requires_grad} for each in trainers)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_its_metrics_are_defined():
    logged = {*ResumableDPOTrainer.metric_names} - {*DPO.hidden_metrics}
    assert {DPO.metric_names.get(name, name) for name in logged} <= list_metrics("dpo").keys()


def build_trls_on_images(model, processor, kind, folder):
    processor.chat_template = read_template(kind)
    arguments = DPOConfig(
        str(folder), per_device_train_batch_size=2, report_to="none", bf16=False, max_length=None, use_cpu=True
    )
    return DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=build_raw_pairs(),
        processing_class=processor,
    )


@pytest.mark.parametrize("train_vision", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_pairs_with_images_is_that_of_trls_own_trainer(kind, train_vision, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    save_pictures(tmp_path)
    vocabulary = build_vocabulary(kind, tmp_path)
    rows, report = prepare_rows(vocabulary, PAIRS, tmp_path, method="dpo")
    assert (report.num_rows, report.num_images, report.num_rows_with_images) == (2, 3, 2)
    processor = vocabulary.images.processor
    model, other = (build_vision_model(kind, processor) for _ in range(2))
    if not train_vision:
        freeze_tower(model)
        freeze_tower(other)
    collator = ImageCollator(vocabulary.images, ImageRules(10**7), vocabulary.tokenizer.pad_token_id)
    theirs = build_trls_on_images(other, processor, kind, tmp_path / "trl")
    rows = rows.remove_columns("digest").add_column("row", [*range(len(rows))])
    ours = build_pair_trainer(tmp_path, rows, tmp_path, collator, base=model)
    ours.prepare_reference()
    for trainer in (ours, theirs):  # away from the reference
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.mul_(1.05)
    (found, gradients), (expected, expected_gradients) = compute_step(ours), compute_step(theirs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
    assert any("vision" in name or "visual" in name for name in gradients) == train_vision
