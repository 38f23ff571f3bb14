# SPDX-License-Identifier: Apache-2.0
"""Fused kernels: when Liger's are used, and that TRL's chunked loss is the plain one. Liger's own run on a GPU only."""

import sys
from types import ModuleType

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
from llm_trainer.data.formats import IGNORED
from llm_trainer.model.device import Device
from llm_trainer.model.liger import KNOWN_TYPES, apply_liger, choose_liger, find_known_types, leave_out_experts
from llm_trainer.model.loading import build_skeleton
from llm_trainer.model.precision import Precision
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
    assert frozenset(patches.MODEL_TYPE_TO_APPLY_LIGER_FN) == KNOWN_TYPES


def test_kernels_are_those_that_no_option_switches_off():
    assert choose().kernels == {"rope", "rms_norm", "swiglu", "geglu"}
    assert choose(liger_kernel_config={"rope": False}).kernels == {"rms_norm", "swiglu", "geglu"}
    assert not choose(use_liger_kernel=False).kernels


def test_liger_is_on_where_it_can_be():
    assert str(choose()) == "Liger kernels: on (RMSNorm, rotary embeddings and SwiGLU; the loss is TRL's)"
    assert choose(use_liger_kernel=True).is_on
    assert str(choose(use_liger_kernel=False)) == "Liger kernels: off (use_liger_kernel=false)"


MIXTURE = MixtralConfig(**BASE, num_local_experts=4)
MIXED = Precision(torch.bfloat16, torch.float32, "full fine-tuning")
PLAIN = Precision(torch.bfloat16, torch.bfloat16, "LoRA")


@pytest.mark.parametrize(
    ("config", "precision", "given", "off"),
    [
        (MIXTURE, MIXED, {}, {"swiglu"}),
        (MIXTURE, MIXED, {"liger_kernel_config": {"rope": False}}, {"rope", "swiglu"}),
        (MIXTURE, MIXED, {"liger_kernel_config": {"swiglu": True}}, set()),
        (MIXTURE, PLAIN, {}, set()),
        (CONFIGS["llama"], MIXED, {}, set()),
    ],
)
def test_experts_with_float32_weights_are_left_out(config, precision, given, off):
    choice = choose(config, known=frozenset({"llama", "mixtral"}), **given)
    skeleton = build_skeleton(config.model_type, config, trust_remote_code=False)
    left = leave_out_experts(choice, Settings(**given).model, skeleton, precision)
    assert left.is_on
    assert left.switched_off == dict.fromkeys(off, False)
    if "swiglu" in off:
        assert str(left) == (
            "Liger kernels: on (RMSNorm and rotary embeddings; not the experts, which Liger would compute in the "
            "weights' float32; the loss is TRL's)"
        )
    else:
        assert left == choice


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


def test_liger_changes_one_model_and_leaves_the_others(monkeypatch):
    """Its import needs Triton, which is not here: a stand-in does to Llama what Liger 0.8.5 does."""
    asked = {}

    class FusedNorm(torch.nn.Module):
        pass

    def fused_rotary(tensor, *args):
        raise AssertionError("Triton was called for a tensor on the CPU")

    def apply_to_instance(model, **options):
        asked.update(options)
        modeling_llama.apply_rotary_pos_emb = fused_rotary
        modeling_llama.LlamaRMSNorm = FusedNorm
        model.model.norm.forward = lambda hidden: hidden * 0

    liger = ModuleType("liger_kernel.transformers")
    liger._apply_liger_kernel_to_instance = apply_to_instance
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back after

    tokens = torch.arange(8)[None]
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    before = other(input_ids=tokens).logits
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    apply_liger(model, {"rope": True, "cross_entropy": True})
    assert not model(input_ids=tokens).logits.any()
    torch.testing.assert_close(other(input_ids=tokens).logits, before, rtol=0, atol=0)
    assert modeling_llama.LlamaRMSNorm is not FusedNorm
    assert asked == {
        "rope": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
        "layer_norm": False,
    }


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
