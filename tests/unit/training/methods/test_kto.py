# SPDX-License-Identifier: Apache-2.0
"""KTO: the loss of packed and padded answers is that of TRL's own trainer, and no order of rows is asked for."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

from llm_trainer.common.metric_definitions import list_metrics
from llm_trainer.training.batches.whole_batches import fill_batches
from llm_trainer.training.methods.kto import KTO, ResumableKTOTrainer
from llm_trainer.training.packing import PackingCollator
from support.preference_pairs import build_judged, build_judged_rows, build_lora, build_pair_trainer, compute_step

LOSSES = {
    "kto": {},
    "weighted": {"desirable_weight": 0.7, "undesirable_weight": 1.3, "beta": 0.5},
    "apo": {"loss_type": "apo_zero_unpaired"},
}
NUM_ROWS = 6
PACKINGS = {"stacked": PackingCollator(0, None, flattens=False), "padded": None}


class TokenizedKTOTrainer(KTOTrainer):
    def _prepare_dataset(self, dataset, *args):
        return dataset


def build_trls(model, folder, lora, **options):
    arguments = KTOConfig(str(folder), per_device_train_batch_size=NUM_ROWS, report_to="none", bf16=False, **options)
    base = AutoModelForCausalLM.from_pretrained(model)
    rows = Dataset.from_list(build_judged(NUM_ROWS))
    if "loss_type" in options:
        rows = rows.remove_columns("KL_completion_ids")
    return TokenizedKTOTrainer(
        base,
        ref_model=copy.deepcopy(base) if lora is None else None,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora,
    )


def build_ours(model, folder, packing="stacked", lora=None, rows=None, **options):
    rows = build_judged_rows(NUM_ROWS) if rows is None else rows
    return build_pair_trainer(model, rows, folder, PACKINGS[packing], lora, method="kto", **options)


def move_away(*trainers):
    """Change all weights, so that a model differs from its reference."""
    with torch.no_grad():
        for trainer in trainers:
            for weight in trainer.model.parameters():
                weight.mul_(0.9)


def test_rows_come_in_random_order_and_no_row_is_alone(tiny_model, tmp_path):
    """TRL would refuse both."""
    ours = build_ours(tiny_model, tmp_path, lora=build_lora(), gradient_accumulation_steps=2)
    ours.args.per_device_train_batch_size = 1
    assert (ours.args.train_sampling_strategy, ours.loss_type, ours.args.loss_type) == ("random", "kto", "kto")


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_trls_own_trainer(tiny_model, tmp_path, loss, packing):
    theirs = build_trls(tiny_model, tmp_path, build_lora(), **LOSSES[loss])
    ours = build_ours(tiny_model, tmp_path, packing, build_lora(), **LOSSES[loss])
    state = theirs.model.state_dict()
    # Turned round and small, as the divergence of these first values is below zero, and then counts as zero.
    adapter = {name: -0.05 * value if "lora_B" in name else value for name, value in state.items() if "lora_" in name}
    for trainer in (ours, theirs):
        trainer.model.load_state_dict(adapter, strict=False)
    (found, gradients), (expected, expected_gradients) = compute_step(ours), compute_step(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    means = ours.compute_means(ours.line_sums)
    assert (theirs._metrics["train"]["kl"][-1] > 0) == (loss != "apo")
    assert means.keys() == {*ours.metric_names, "rewards/margins"} - {"aux_loss"}
    trls = {name: theirs._metrics["train"][name][-1] for name in means if name != "loss"}
    assert {name: mean for name, mean in means.items() if name != "loss"} == pytest.approx(trls, rel=1e-4, abs=1e-4)


def test_all_weights_have_the_loss_of_a_second_model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    theirs, ours = build_trls(tiny_model, tmp_path, None), build_ours(tiny_model, tmp_path)
    assert ours.ref_model is None
    ours.prepare_reference()
    move_away(ours, theirs)
    (found, gradients), (expected, expected_gradients) = compute_step(ours), compute_step(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    assert theirs._metrics["train"]["kl"][-1] > 0


def test_each_loss_has_its_own_reference(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    kinds = [build_ours(tiny_model, tmp_path, run={"base_digest": "a"}, **LOSSES[loss]) for loss in ("apo", "kto")]
    for trainer in kinds:
        trainer.prepare_reference()
    apo, kto = (trainer.reference["train"] for trainer in kinds)
    assert torch.equal(apo[:, 0], kto[:, 0])
    assert not torch.equal(apo[:, 1], kto[:, 1])


def test_the_order_of_rows_changes_nothing(tiny_model, tmp_path):
    ours = build_ours(tiny_model, tmp_path, lora=build_lora())
    rows = list(ours.train_dataset)
    first, _ = compute_step(ours, rows)
    torch.testing.assert_close(compute_step(ours, rows[::-1])[0], first, rtol=1e-5, atol=1e-5)


def test_means_are_over_the_rows_of_each_kind_however_they_are_cut(tiny_model, tmp_path):
    """Batches of two, one of them without an undesirable answer, and one that only fills a rank's."""
    ours = build_ours(tiny_model, tmp_path, lora=build_lora(), loss_type="apo_zero_unpaired")
    rows = list(fill_batches(ours.train_dataset, 4))
    compute_step(ours, rows)
    whole, ours.line_sums = ours.line_sums, type(ours.line_sums)()
    for place in range(0, len(rows), 2):
        compute_step(ours, rows[place : place + 2])
    assert ours.compute_means(ours.line_sums) == pytest.approx(ours.compute_means(whole), rel=1e-5)
    assert ours.line_sums.num_tokens == whole.num_tokens


def test_a_side_without_rows_has_no_metric(tiny_model, tmp_path):
    ours = build_ours(tiny_model, tmp_path, lora=build_lora())
    compute_step(ours, [row for row in ours.train_dataset if row["desirable"]])
    means = ours.compute_means(ours.gather_sums(ours.line_sums))
    assert means.keys() == {"loss", "kl", "rewards/chosen", "logps/chosen"}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_the_mean_over_its_rows_however_they_are_cut(tiny_model, tmp_path, size):
    """Without a divergence, which is that of the rows of a batch."""
    options = {"lora": build_lora(), "max_steps": 1, "learning_rate": 1e-3, "optim": "sgd", "seed": 3}
    options["loss_type"] = "apo_zero_unpaired"
    batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-NUM_ROWS // size)}
    trainers = [
        build_ours(tiny_model, tmp_path / str(n), **options, **more)
        for n, more in enumerate(({"per_device_train_batch_size": NUM_ROWS}, batches))
    ]
    losses = [trainer.train().metrics["train_loss"] for trainer in trainers]
    whole, cut = ({n: w for n, w in each.model.named_parameters() if w.requires_grad} for each in trainers)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_its_metrics_are_defined():
    logged = {*ResumableKTOTrainer.metric_names, "rewards/margins"}
    assert {KTO.metric_names.get(name, name) for name in logged} <= list_metrics("kto").keys()
