# SPDX-License-Identifier: Apache-2.0
"""The reference is the model as it was before its first step, whatever has been trained since."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from llm_trainer.model.lora_init import REFERENCE, copy_adapter, hide_copy
from llm_trainer.training.methods.reference import use_adapter
from support.preference_pairs import build_lora, build_pair_trainer, build_rows

ROWS = build_rows(5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))


def build(model, folder, **values):
    return build_pair_trainer(model, ROWS, folder, lora=build_lora(), learning_rate=1e-2, max_steps=2, **values)


def ask(trainer):
    """Return what the reference says of all rows."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(ROWS)))
    trainer.model.eval()
    return trainer.ask_reference(batch)


def test_an_adapter_that_adds_nothing_at_first_is_switched_off(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path)
    with trainer.model.disable_adapter():
        expected = ask(trainer)
    trainer.train_from(None)
    assert REFERENCE not in trainer.model.peft_config
    assert torch.equal(ask(trainer), expected)


def test_an_adapter_that_begins_elsewhere_is_copied_and_stays(tiny_model, tmp_path):
    """Its adapter draws its first values, as if it went on from an earlier one."""
    trainer = build(tiny_model, tmp_path, run={"goes_on": True})
    copied = build(tiny_model, tmp_path)
    copied.model.load_state_dict(trainer.model.state_dict())
    copy_adapter(copied.model)
    expected = ask(copied)
    trainer.train_from(None)
    assert torch.equal(ask(trainer), expected)
    with trainer.model.disable_adapter():
        assert not torch.allclose(ask(copied), trainer.ask_reference(trainer.data_collator(list(ROWS))))
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert trained
    assert not any(REFERENCE in name.split(".") for name in trained)


def test_checkpoints_hold_the_trained_adapter_alone(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path, run={"goes_on": True}, save_steps=1)
    trainer.train_from(None)
    checkpoint = tmp_path / "checkpoint-2"
    assert not any(path.is_dir() for path in checkpoint.iterdir())
    assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == 4
    assert REFERENCE in trainer.model.peft_config


def test_a_model_without_adapter_has_nothing_to_hide():
    with hide_copy(torch.nn.Linear(1, 1)):
        pass


def test_what_it_says_is_kept_by_content(tiny_model, tmp_path, capsys):
    def prepare(**values):
        trainer = build_pair_trainer(tiny_model, ROWS, tmp_path, run={"base_digest": "a", **values})
        trainer.prepare_reference()
        return trainer.reference["train"]

    first = prepare()
    assert first.shape == (5, 2)
    assert "Computing the reference" in capsys.readouterr().out
    assert torch.equal(prepare(), first)
    assert "are those of an earlier job" in capsys.readouterr().out
    prepare(base_digest="b")
    assert "Computing the reference" in capsys.readouterr().out
    assert len([path for path in Path(tmp_path, "cache/reference").iterdir() if path.is_dir()]) == 2


def test_it_is_asked_before_other_weights_load(tiny_model, tmp_path):
    """A run that goes on from a checkpoint has the reference of the run that began."""
    options = {"learning_rate": 1e-2, "max_steps": 2, "save_steps": 1, "seed": 1}
    first = build_pair_trainer(tiny_model, ROWS, tmp_path, **options)
    first.train_from(None)
    again = build_pair_trainer(tiny_model, ROWS, tmp_path, **options)
    again.train_from(tmp_path / "checkpoint-1")
    assert torch.equal(again.reference["train"], first.reference["train"])
    for weight, other in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_with_an_adapter_it_is_asked_first_on_wish(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path, precompute_ref_log_probs=True)
    trainer.prepare_reference()
    assert isinstance(trainer.model, PeftModel)
    torch.testing.assert_close(trainer.reference["train"], ask(trainer))


def test_weights_that_are_whole_for_a_while_train_on_as_shards(tiny_model, tmp_path):
    """FSDP2 has other parameters in their places from the reference's forward pass on."""
    model = build(tiny_model, tmp_path).model
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj.lora_A.default"))
    shard = layer.weight
    with use_adapter(model, None):
        assert not shard.requires_grad
        layer.weight = torch.nn.Parameter(shard.detach().clone(), requires_grad=False)
    assert shard.requires_grad and layer.weight.requires_grad
