# SPDX-License-Identifier: Apache-2.0
"""Models with PyTorch's flash attention compute what plain attention does, forward and backward.

The operators have no code for a CPU. What stands in for it checks what the GPU's would refuse.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from llm_trainer.model.layers import torch_flash
from llm_trainer.training.packing import PackingCollator
from llm_trainer.training.packing_check import find_cross_row_attention
from support.flash_reference import flash_attention_on_the_cpu

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_attention_heads=4),
    "grouped-query": Qwen3Config(**SMALL, **HEADS, head_dim=16),
    "sliding-window": MistralConfig(**SMALL, **HEADS, head_dim=16, sliding_window=4),
    "short values": DeepseekV3Config(
        **SMALL, num_attention_heads=2, num_key_value_heads=2, first_k_dense_replace=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip
LENGTHS = (21, 9, 1, 13)


def build_models(name):
    """The same model with PyTorch's flash attention and with plain attention."""
    models = []
    for kernel in (torch_flash.NAME, "eager"):
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIGS[name])  # a model writes its kernel into its config
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval())
    return models


def make_rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator) for length in LENGTHS]


def pad(rows, side):
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


@pytest.fixture(autouse=True)
def calls():
    with flash_attention_on_the_cpu() as calls:
        yield calls


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_have_the_logits_and_gradients_that_they_have_alone(name, calls):
    flash, plain = build_models(name)
    rows = make_rows()
    collate = PackingCollator(pad_token_id=0, max_length=None, flattens=True)
    batch = collate([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])
    del batch["num_tokens"], batch["labels"]
    packed = flash(**batch, use_cache=False).logits[0]
    alone = torch.cat([plain(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert len(calls) == CONFIGS[name].num_hidden_layers
    assert calls[0] == (CONFIGS[name].num_attention_heads, CONFIGS[name].num_key_value_heads)

    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    for logits in (packed, alone):
        (logits * weights).sum().backward()
    for found, expected in zip(flash.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert find_cross_row_attention(flash, collate) is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_seen(name, side):
    flash, plain = build_models(name)
    batch = pad(make_rows(), side)
    seen = batch["attention_mask"].bool()
    found, expected = (model(**batch, use_cache=False).logits[seen] for model in (flash, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [slice(1), slice(None)], ids=["one row", "padded rows"])
def test_answers_are_those_of_plain_attention(name, rows):
    """With a cache: many keys for one query, beyond the window."""
    flash, plain = build_models(name)
    batch = pad(make_rows()[rows], "left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    found, expected = (model.generate(**batch, **options) for model in (flash, plain))
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=0, atol=1e-4)
    assert found.sequences.tolist() == expected.sequences.tolist()


def test_dropout_is_not_forgotten():
    config = LlamaConfig(**SMALL, num_attention_heads=4, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=torch_flash.NAME).train()
    with pytest.raises(NotImplementedError, match="no dropout: give attn_implementation=sdpa"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_flash_attention_of_packages_is_loaded_as_ever(tmp_path, monkeypatch):
    functions = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
    (tmp_path / "flash_attn_interface.py").write_text("".join(f"def {name}(q): ...\n" for name in functions))
    monkeypatch.syspath_prepend(tmp_path)
    found, _ = lazy_import_flash_attention("flash_attention_3")
    assert [function.__name__ for function in found[:2]] == functions[:2]
    found, _ = lazy_import_flash_attention(torch_flash.NAME)
    assert found[:2] == (torch_flash.attend_sequences, torch_flash.attend_rows)
