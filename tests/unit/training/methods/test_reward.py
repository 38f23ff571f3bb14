# SPDX-License-Identifier: Apache-2.0
"""Reward models: the loss of packed and padded pairs is that of TRL's own trainer, and their rows are counted."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from llm_trainer.common.metric_definitions import list_metrics
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.training.methods.answers import ANSWERS
from llm_trainer.training.methods.reward import REWARD, ResumableRewardTrainer, RewardCollator
from llm_trainer.training.packing import PackingCollator
from support.preference_pairs import build_pair_trainer, build_pairs, build_rows, compute_step

NUM_PAIRS = 6
MARGINS = [0.0, 0.5, 1.0, -0.5, 0.0, 2.0]
PACKINGS = {
    "stacked": PackingCollator(0, None, flattens=False),
    "padded": None,
}
LORA = LoraConfig(
    r=4,
    target_modules=["q_proj", "v_proj"],
    init_lora_weights=False,
    task_type="SEQ_CLS",
    modules_to_save=["score"],
)


def build_reward_model(folder):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=tokenizer.pad_token_id)


def build_margin_rows():
    return build_rows(NUM_PAIRS).add_column("margin", MARGINS)


def build_ours(folder, tmp_path, packing, lora=LORA, **options):
    options |= {"method": "reward", "base": build_reward_model(folder)}
    return build_pair_trainer(folder, build_margin_rows(), tmp_path, PACKINGS[packing], lora, **options)


def build_trls(folder, tmp_path, lora, **options):
    rows = [
        {
            "chosen_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"],
        }
        for pair in build_pairs(NUM_PAIRS)
    ]
    arguments = RewardConfig(
        str(tmp_path), per_device_train_batch_size=NUM_PAIRS, report_to="none", bf16=False, max_length=None, **options
    )
    return RewardTrainer(
        build_reward_model(folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows).add_column("margin", MARGINS),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora,
    )


@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.1}], ids=["margins", "centred"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_loss_is_that_of_trls_own_trainer(tiny_model, tmp_path, packing, lora, options):
    theirs = build_trls(tiny_model, tmp_path, lora, **options)
    ours = build_ours(tiny_model, tmp_path, packing, lora, **options)
    ours.model.load_state_dict(theirs.model.state_dict())
    (found, gradients), (expected, expected_gradients) = compute_step(ours), compute_step(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    trls = {name: theirs._metrics["train"][name][-1] for name in ("accuracy", "margin", "mean_reward")}
    assert {name: ours.line_sums.means[name] for name in trls} == pytest.approx(trls, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("flattens", [False, True])
def test_ends_are_the_last_tokens_wherever_the_answers_stand(flattens):
    rows = list(build_margin_rows())
    batch = RewardCollator(PackingCollator(0, None, flattens))(rows)
    last = [row["input_ids"][row["seq_lengths"][0] - 1] for row in rows] + [row["input_ids"][-1] for row in rows]
    assert batch["input_ids"].flatten()[batch[ANSWERS].ends].tolist() == last
    assert batch[ANSWERS].margins.tolist() == MARGINS
    assert (batch[ANSWERS].num_rows, batch[ANSWERS].num_tokens) == (NUM_PAIRS, sum(row["length"] for row in rows))


def test_a_row_that_fills_a_batch_counts_for_nothing():
    blank = {"input_ids": [7, 7], "labels": [IGNORED] * 2, "seq_lengths": [1, 1], "margin": 0.0}
    collate = RewardCollator(PACKINGS["stacked"])
    answers = collate([blank])[ANSWERS]
    assert (answers.num_rows, answers.num_tokens, len(answers.ends)) == (0, 0, 2)
    assert collate([next(iter(build_margin_rows())), blank])[ANSWERS].num_rows == 1


def test_metrics_are_means_over_pairs_in_whatever_batches(tiny_model, tmp_path):
    whole, cut = (build_ours(tiny_model, tmp_path / str(number), "stacked") for number in range(2))
    cut.model.load_state_dict(whole.model.state_dict())
    rows = list(whole.train_dataset)
    for trainer, batches in ((whole, [rows]), (cut, [rows[:1], rows[1:3], rows[3:]])):
        trainer.model.eval()
        with torch.no_grad():
            for batch in batches:
                trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(batch)))
    assert set(whole.eval_sums.means) == set(ResumableRewardTrainer.metric_names)
    assert cut.eval_sums.means == pytest.approx(whole.eval_sums.means, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_the_mean_over_its_pairs_however_they_are_cut(tiny_model, tmp_path, size):
    """Six pairs in one batch, or in batches of which the last may be smaller."""
    options = {"max_steps": 1, "learning_rate": 1e-3, "optim": "sgd", "seed": 3}
    batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-NUM_PAIRS // size)}
    trainers = [
        build_ours(tiny_model, tmp_path / str(number), "stacked", **options, **more)
        for number, more in enumerate(({"per_device_train_batch_size": NUM_PAIRS}, batches))
    ]
    losses = [trainer.train().metrics["train_loss"] for trainer in trainers]
    whole, cut = ({n: w for n, w in each.model.named_parameters() if w.requires_grad} for each in trainers)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_its_metrics_are_defined():
    logged = {*ResumableRewardTrainer.metric_names} - {*REWARD.hidden_metrics}
    assert {REWARD.metric_names.get(name, name) for name in logged} <= list_metrics("reward").keys()
