# SPDX-License-Identifier: Apache-2.0
"""A job's settings are those of its method, and combinations that TRL would refuse late are told first."""

import pytest

from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.rules.methods import is_of_method, list_losses
from llm_trainer.config.schema import Settings


def problems_of(**values):
    return list(find_contradictions(Settings(**values)))


def test_a_setting_of_another_method_is_told_with_its_method():
    (problem,) = problems_of(beta=0.2)
    methods = "dpo or kto or distill or grpo or rloo"
    assert problem.startswith(f"beta is a setting of method={methods} and this job has method=sft: remove")
    (problem,) = problems_of(method="dpo", completion_only_loss=True)
    assert problem.startswith("completion_only_loss is a setting of method=sft or distill and this job has method=dpo")


def test_a_format_of_another_method_is_refused():
    (problem,) = problems_of(dataset_format="preference")
    assert problem.startswith("dataset_format=preference with method=sft, whose rows are pretokenized or messages or")
    assert problems_of(method="dpo", dataset_format="preference") == []


def test_null_asks_for_the_default_in_every_method():
    assert problems_of(beta=None) == []


def test_what_all_methods_have_belongs_to_each():
    assert all(is_of_method(name, "dpo") for name in ("max_length", "lora_r", "learning_rate", "beta", "loss_type"))
    assert not is_of_method("packing_strategy", "dpo")


def test_losses_are_the_methods_own():
    assert list_losses("sft", None) == ["nll"]
    assert list_losses("dpo", None) == ["sigmoid"]
    assert list_losses("dpo", ["sigmoid", "sft"]) == ["sigmoid", "sft"]
    (problem,) = problems_of(method="dpo", loss_type="nll")
    assert problem.startswith("loss_type=nll with method=dpo, which has sigmoid, hinge")


@pytest.mark.parametrize("method", ["kto", "reward", "distill", "grpo", "rloo"])
def test_a_tower_is_trained_by_methods_whose_rows_may_have_images(method):
    assert problems_of(train_vision=True) == problems_of(train_vision=True, method="dpo") == []
    (problem,) = [text for text in problems_of(train_vision=True, method=method) if "train_vision" in text]
    assert problem.startswith(f"train_vision=true with method={method}: its rows have no images")


@pytest.mark.parametrize(
    ("values", "begin"),
    [
        ({"packing": True}, "packing=true with method=dpo"),
        ({"dataset_format": "text"}, "dataset_format=text with method=dpo, whose rows are preference: leave it out"),
        ({"streaming": True, "max_steps": 1}, "streaming=true with method=dpo"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights=[1.0] with loss_type=sigmoid, sft"),
        ({"loss_type": "exo_pair"}, "loss_type=exo_pair without label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "loss_type=robust with label_smoothing=0.5"),
        ({"loss_type": "aot", "f_divergence_type": "forward_kl"}, "f_divergence_type=forward_kl with loss_type=aot"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting=true with loss_type=aot"),
        ({"sync_ref_model": True}, "sync_ref_model=true"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 with method=dpo"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 with method=dpo"),
    ],
)
def test_what_trl_would_refuse_late_is_refused_first(values, begin):
    (problem,) = problems_of(method="dpo", **values)
    assert problem.startswith(begin)


@pytest.mark.parametrize(
    ("values", "begin"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1 with method=kto: its divergence is a mean"),
        ({"global_batch_size": 1}, "global_batch_size=1 with method=kto: its divergence is a mean"),
        ({"loss_type": "sigmoid"}, "loss_type=sigmoid with method=kto, which has kto, apo_zero_unpaired"),
        ({"label_smoothing": 0.1}, "label_smoothing is a setting of method=dpo and this job has method=kto"),
    ],
)
def test_kto_has_one_loss_that_compares_several_rows(values, begin):
    (problem,) = problems_of(method="kto", **values)
    assert problem.startswith(begin)
    assert problems_of(method="kto", loss_type="apo_zero_unpaired", per_device_train_batch_size=1) == []


@pytest.mark.parametrize(
    ("values", "begin"),
    [
        ({"beta": 0.1}, "beta is a setting of method=dpo or kto or distill or grpo or rloo and this job has"),
        ({"loss_type": "sigmoid"}, "loss_type is a setting of method="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa with method=reward: the adapter holds the head too"),
        ({"sample_prompts": 1}, "sample_prompts=1 with method=reward: a reward model answers no prompts"),
        ({"adapter_path": "/a"}, "adapter_path=/a with method=reward: a reward model begins with a base; set "),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 with method=reward"),
    ],
)
def test_what_a_reward_model_cannot_be_given_is_refused(values, begin):
    (problem,) = problems_of(method="reward", **values)
    assert problem.startswith(begin)


def test_a_reward_model_takes_its_own_settings():
    assert problems_of(method="reward", center_rewards_coefficient=0.01, sample_prompts=0) == []
