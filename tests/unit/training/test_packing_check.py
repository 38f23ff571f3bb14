# SPDX-License-Identifier: Apache-2.0
"""The check on a model tells whether it keeps packed rows apart."""

import copy

import pytest
import torch

from llm_trainer.model.loading import build_on_meta
from llm_trainer.training.packing import PackingCollator, list_axes
from llm_trainer.training.packing_check import build_proxy_model, find_cross_row_attention
from support.packed_models import KEEP_APART, LEAK, build_model, stack
from support.tiny_image_models import build_tiny_config


@pytest.mark.parametrize("name", LEAK)
def test_a_model_that_lets_rows_see_each_other_is_found_out(name):
    reason = find_cross_row_attention(build_model(LEAK[name]), stack())
    assert "ForCausalLM with eager attention lets a row see the one before it" in reason


@pytest.mark.parametrize("name", [*KEEP_APART, *LEAK])
def test_a_small_proxy_tells_what_the_model_would(name):
    """Twelve layers, of which the last kind comes late; and none of its weights may be needed."""
    config = copy.deepcopy((KEEP_APART | LEAK)[name])
    if kinds := vars(config).get("layer_types"):
        config.layer_types = [kinds[0]] * 3 + kinds[1:] + [kinds[0]] * 8
    config.num_hidden_layers = 12
    with torch.device("meta"):
        model = build_model(config)
    proxy = build_proxy_model(model, torch.device("cpu"))
    assert len(proxy.base_model.layers if hasattr(proxy.base_model, "layers") else proxy.base_model.h) <= 4
    assert type(proxy) is type(model)
    reason = find_cross_row_attention(proxy, stack(max_length=None))
    assert (reason is None) == (name in KEEP_APART), reason


@pytest.mark.parametrize("model_type", ["emu3", "ernie4_5_vl_moe", "gemma4", "step3p7"])
def test_a_proxy_of_a_model_that_sees_is_built_whatever_its_config_takes(model_type):
    """Some take no pad token of None, others have lists of sizes."""
    model = build_on_meta(build_tiny_config(model_type), torch.float32, trust_remote_code=False)
    proxy = build_proxy_model(model, torch.device("cpu"))
    assert None in [find_cross_row_attention(proxy, stack(num_axes=axes)) for axes in list_axes(proxy)]


def test_a_leak_in_the_batch_itself_is_found_out():
    class Contiguous(PackingCollator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
            return batch

    class Shifted(PackingCollator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            batch["position_ids"] = batch["position_ids"] + torch.arange(3, 3 + len(batch["input_ids"]))[:, None]
            return batch

    model = build_model(KEEP_APART["gpt2"])
    assert "lets a row see the one before it" in find_cross_row_attention(model, Contiguous(0, None, False))
    assert "does not begin anew with a row" in find_cross_row_attention(model, Shifted(0, None, False))


def test_a_model_without_position_ids_is_found_out_and_stays_in_its_mode():
    model = build_model(KEEP_APART["llama"]).train()
    forward = model.forward
    model.forward = lambda input_ids, use_cache=None: forward(input_ids=input_ids)
    assert "LlamaForCausalLM does not take packed rows" in find_cross_row_attention(model, stack())
    assert model.training
