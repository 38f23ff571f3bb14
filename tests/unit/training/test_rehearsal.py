# SPDX-License-Identifier: Apache-2.0
"""A mistake in what only the first step reads is told before anything is loaded.

tests/integration/test_every_choice.py runs a whole job with each choice of each setting.
"""

import os

import pytest
import torch

from llm_trainer.common.errors import UserError
from llm_trainer.config.checks import find_missing_hardware
from llm_trainer.config.load import read_settings
from llm_trainer.config.schema import Settings
from llm_trainer.training.methods import choose_method
from llm_trainer.training.rehearsal import rehearse_step
from llm_trainer.training.trainer_config import build_arguments
from support.environments import build_environment
from support.every_choice import list_choices
from support.trainers import collect_sources

CPU = torch.device("cpu")
# Of these the rules say nothing, since only Transformers knows what they need.
REFUSED_BY_THE_REHEARSAL = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}


@pytest.fixture(autouse=True)
def own_determinism(monkeypatch):
    """Leave the process as it was: full_determinism changes it for good."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def rehearse(folder, **values):
    sources = collect_sources(Settings(**values), folder)
    rehearse_step(build_arguments(choose_method(), sources, CPU, torch.float32), CPU)


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"optim": "sgd", "optim_args": "momentum"}, "optim=sgd with optim_args='momentum' is refused"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "optim=sgd with optim_args='momentum=x' is refused"),
        ({"optim_args": "momentum=0.9"}, "optim=adamw_torch_fused with optim_args='momentum=0.9' is refused"),
        ({"optim": "rmsprop_bnb", "optim_args": "foo=1"}, "optim=rmsprop_bnb with optim_args='foo=1' is refused"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type=warmup_stable_decay with"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr with"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type=linear with lr_scheduler_kwargs={'foo': 1}"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
            "lr_scheduler_type=polynomial with lr_scheduler_kwargs={'lr_end': 1.0}",
        ),
        ({"activation_checkpointing_kwargs": {"foo": 1}}, "activation_checkpointing_kwargs="),
        ({"torch_compile": True, "torch_compile_backend": "foo"}, "torch_compile_backend='foo'"),
        ({"torch_compile": True, "torch_compile_mode": "foo"}, "torch_compile_backend="),
        ({"accelerator_config": {"foo": 1}}, "Transformers refuses these settings"),
        ({"lr_scheduler_type": "greedy"}, "Transformers refuses these settings"),
    ],
)
def test_what_the_first_step_would_refuse_is_refused(tmp_path, values, start):
    with pytest.raises(UserError) as refusal:
        rehearse(tmp_path, **values)
    assert str(refusal.value).startswith(start)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "ademamix_8bit", "optim_args": "beta3=0.999,alpha=4"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_steps": 20},
        {"activation_checkpointing_kwargs": {"preserve_rng_state": False}, "warmup_steps": 0.1},
        {"accelerator_config": {"split_batches": False}},
        {"optim_target_modules": ["q_proj"]},
    ],
)
def test_what_the_first_step_takes_is_taken(tmp_path, values):
    rehearse(tmp_path, **values)


@pytest.mark.parametrize("choice", list(list_choices()), ids="=".join)
def test_a_choice_is_refused_by_a_rule_or_takes_a_step(tmp_path, choice):
    environment = build_environment(hyperparameters={choice.name: choice.value})
    settings, problems = read_settings(environment, {})
    if problems or list(find_missing_hardware(settings, environment)):
        return
    arguments = build_arguments(choose_method(), collect_sources(settings, tmp_path, True), CPU, torch.float32)
    if choice.value in REFUSED_BY_THE_REHEARSAL:
        with pytest.raises(UserError, match=f"^lr_scheduler_type={choice.value} with lr_scheduler_kwargs=None"):
            rehearse_step(arguments, CPU)
    else:
        rehearse_step(arguments, CPU)


def test_full_determinism_begins_before_the_first_product(tmp_path, monkeypatch):
    """Torch reads cuBLAS's variable once in a process: later, a job on a GPU would end at its first step."""
    seen, forward = [], torch.nn.Linear.forward

    def note(layer, numbers):
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return forward(layer, numbers)

    monkeypatch.setattr(torch.nn.Linear, "forward", note)
    rehearse(tmp_path, full_determinism=True)
    assert set(seen) == {":16:8"}
    assert torch.are_deterministic_algorithms_enabled()
