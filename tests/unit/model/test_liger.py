# SPDX-License-Identifier: Apache-2.0
"""Fused kernels: when Liger's are used, and that TRL's chunked loss is the plain one. Liger's own run on a GPU only."""

import sys
from types import MethodType, ModuleType

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers.models.llama import modeling_llama
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.model.device import Device
from llm_trainer.model.liger import (
    KNOWN_TYPES,
    LigerChoice,
    apply_liger,
    choose_liger,
    find_known_types,
    leave_out_experts,
    try_on,
)
from llm_trainer.model.loading import build_skeleton
from llm_trainer.model.parameter_roles import has_experts
from llm_trainer.training.packing import PackingCollator
from support.tiny_model import build_tokenizer
from support.trainers import build_full_trainer

H100 = Device(torch.device("cuda", 0), "NVIDIA H100", (9, 0))
CPU = Device(torch.device("cpu"))
KNOWN = frozenset({"llama", "qwen3"})
BASE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**BASE),
    "gemma2": Gemma2Config(**BASE, head_dim=8, final_logit_softcapping=5.0),
    "granite": GraniteConfig(**BASE, logits_scaling=4.0),
}


def choose(config=CONFIGS["llama"], device=H100, known=KNOWN, **settings):
    return choose_liger(config, Settings(**settings).model, device, known)


def test_types_that_liger_knows_are_known_without_it():
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch", reason="liger-kernel is not installed here")
    known = frozenset(patches.MODEL_TYPE_TO_APPLY_LIGER_FN)
    assert known - KNOWN_TYPES == {"qwen3_5_moe", "qwen3_5_moe_text"}
    assert known > KNOWN_TYPES


def test_kernels_are_those_that_no_option_switches_off():
    assert choose().kernels == {"rope", "rms_norm", "swiglu", "geglu"}
    assert choose(liger_kernel_config={"rope": False}).kernels == {"rms_norm", "swiglu", "geglu"}
    assert not choose(use_liger_kernel=False).kernels


def test_liger_is_on_where_it_can_be():
    assert choose().is_on
    assert choose(use_liger_kernel=True).is_on
    assert str(choose(use_liger_kernel=False)) == "Liger kernels: off (use_liger_kernel=false)"


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ({"rms_norm"}, "RMSNorm; the loss is TRL's"),
        ({"rope", "rms_norm"}, "RMSNorm and rotary embeddings; the loss is TRL's"),
        ({"swiglu", "rope", "rms_norm"}, "RMSNorm, rotary embeddings and SwiGLU; the loss is TRL's"),
        (set(), "the loss is TRL's"),
    ],
)
def test_the_log_names_the_kernels_that_the_model_gets(kernels, words):
    assert str(LigerChoice(True, "the loss is TRL's", frozenset(kernels))) == f"Liger kernels: on ({words})"


MIXTURE = MixtralConfig(**BASE, num_local_experts=4)


@pytest.mark.parametrize(
    ("config", "given", "off"),
    [
        (MIXTURE, {}, {"swiglu"}),
        (MIXTURE, {"liger_kernel_config": {"rope": False}}, {"rope", "swiglu"}),
        (MIXTURE, {"liger_kernel_config": {"swiglu": True}}, set()),
        (CONFIGS["llama"], {}, set()),
    ],
)
def test_experts_are_left_out_of_every_training(config, given, off):
    settings = Settings(**given).model
    choice = choose(config, known=frozenset({"llama", "mixtral"}), **given)
    skeleton = build_skeleton(config.model_type, config, trust_remote_code=False)
    left = leave_out_experts(choice, settings, has_experts(skeleton))
    assert left.is_on
    options = left.collect_options(settings)
    assert {name for name, value in options.items() if value is False} == off
    assert ("not the experts; the loss is TRL's" in str(left)) == ("swiglu" in off)


CANNOT = [
    ({"device": CPU}, "they need an NVIDIA GPU"),
    ({"known": None}, "liger-kernel is not installed"),
    ({"config": PreTrainedConfig.from_dict({"model_type": "own"})}, "liger-kernel has none for model type"),
]


@pytest.mark.parametrize(("lack", "reason"), CANNOT)
def test_liger_is_off_or_refused_where_it_cannot_be(lack, reason):
    assert not choose(**lack).is_on
    assert reason in str(choose(**lack))
    with pytest.raises(UserError, match=f"^use_liger_kernel=true: {reason}"):
        choose(**lack, use_liger_kernel=True)
    with pytest.raises(UserError, match=f"^liger_kernel_config: {reason}"):
        choose(**lack, liger_kernel_config={"rope": False})


def test_ligers_own_loss_is_refused():
    with pytest.raises(UserError, match=r"^liger_kernel_config has fused_linear_cross_entropy=true: the loss is TRL's"):
        choose(liger_kernel_config={"fused_linear_cross_entropy": True})
    assert find_known_types(CPU) is None


class FusedNorm(torch.nn.Module):
    def forward(self, hidden):
        return hidden * 0


def fused_rotary(tensor, *args):
    raise AssertionError("Triton was called for a tensor on the CPU")


FusedNorm.forward.__module__, fused_rotary.__module__ = "liger_kernel.transformers.rms_norm", "liger_kernel.ops.rope"


@pytest.fixture
def liger(monkeypatch):
    """A stand-in does to Llama what Liger 0.8.5 does, whose import needs Triton. It keeps the options that it gets."""
    asked = {}

    def apply_to_instance(model, **options):
        asked.update(options)
        modeling_llama.LlamaRMSNorm = FusedNorm
        model.model.norm.forward = MethodType(FusedNorm.forward, model.model.norm)
        if "fault" in asked:
            raise asked["fault"]
        if options.get("rope", True):
            modeling_llama.apply_rotary_pos_emb = fused_rotary

    liger = ModuleType("liger_kernel.transformers")
    liger._apply_liger_kernel_to_instance = apply_to_instance
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back after
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm)
    return asked


def test_liger_changes_one_model_and_leaves_the_others(liger):
    tokens = torch.arange(8)[None]
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    before = other(input_ids=tokens).logits
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    apply_liger(model, {"rope": True, "cross_entropy": True})
    assert not model(input_ids=tokens).logits.any()
    torch.testing.assert_close(other(input_ids=tokens).logits, before, rtol=0, atol=0)
    assert modeling_llama.LlamaRMSNorm is not FusedNorm
    assert liger == {
        "rope": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
        "layer_norm": False,
    }


@pytest.mark.parametrize(("given", "kernels"), [({}, {"rms_norm", "rope"}), ({"rope": False}, {"rms_norm"})])
def test_the_plan_names_the_kernels_that_liger_really_gives(liger, given, kernels):
    settings = Settings(liger_kernel_config=given or None).model
    skeleton = build_skeleton("llama", CONFIGS["llama"], trust_remote_code=False)
    plain = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    tried = try_on(choose(liger_kernel_config=given or None), settings, skeleton)
    assert tried.kernels == kernels
    assert tried.collect_options(settings)["swiglu"] is False
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm) == plain
    assert "forward" not in vars(skeleton.model.norm)


def test_a_model_that_ligers_code_fails_at_is_trained_without(liger):
    """As Liger 0.8.5 does at qwen3_5_moe."""
    skeleton = build_skeleton("llama", CONFIGS["llama"], trust_remote_code=False)
    plain = modeling_llama.LlamaRMSNorm
    liger["fault"] = ImportError("cannot import name LigerOutput")
    reason = "liger-kernel's code for model type llama fails: cannot import name LigerOutput"
    tried = try_on(choose(), Settings().model, skeleton)
    assert str(tried) == f"Liger kernels: off ({reason})"
    assert modeling_llama.LlamaRMSNorm is plain
    with pytest.raises(UserError, match=f"^use_liger_kernel=true: {reason}: leave it out.$"):
        try_on(choose(), Settings(use_liger_kernel=True).model, skeleton)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_chunked_loss_is_the_plain_one(tmp_path, name, packs):
    """Loss and gradients of our trainer, against the cross-entropy of all logits at once."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    rows = [torch.randint(3, 259, (length,)).tolist() for length in (30, 17, 9, 4)]
    labels = [[IGNORED] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]
    data = Dataset.from_dict({"input_ids": rows, "labels": labels, "length": [len(row) for row in rows]})
    packing = PackingCollator(tokenizer.pad_token_id, 64, flattens=False) if packs else None
    trainer = build_full_trainer(model, tokenizer, data, packing, tmp_path)
    batch = (packing or DataCollatorForLanguageModeling(tokenizer.pad_token_id))(
        [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    )
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "num_tokens")}
    num_items = (batch["labels"][:, 1:] != IGNORED).sum()
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    plain = [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    loss.backward()
    torch.testing.assert_close([loss.detach(), *(parameter.grad for parameter in model.parameters())], plain)


def test_the_lm_head_scores_only_positions_with_a_label(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    tokens, labels = torch.randint(3, 259, (2, 16)), torch.full((2, 16), IGNORED)
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist(), "length": [16, 16]})
    trainer = build_full_trainer(model, build_tokenizer(), rows, None, tmp_path)

    def count_operations(number):
        labels[0, 1 : 1 + number] = 7
        with FlopCounterMode(display=False) as operations:
            batch = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
            loss = trainer.compute_loss(model, batch, num_items_in_batch=1)
        loss.backward()  # that of a batch without a label is zero, and may be the only one of a rank
        return loss.item(), operations.get_total_flops()

    (no_loss, without), (_, with_ten) = count_operations(0), count_operations(10)
    assert no_loss == 0
    assert with_ten - without == 10 * 2 * model.config.hidden_size * model.config.vocab_size
