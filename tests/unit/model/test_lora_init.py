# SPDX-License-Identifier: Apache-2.0
"""Adapters that begin at the base, by each start, and are exported as adapters of the base as it is on disk."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from llm_trainer.common.errors import UserError
from llm_trainer.model import lora_init
from support.adapted_models import GPT2, LLAMA, adapt_base, compute_logits, load_base, plan_adapter, train_adapter

BASE = lora_init.BaseReference("base", None)


def initialize(model, init, base, scratch_dir):
    """Give the adapter its first values, and return the folder that holds them."""
    start = lora_init.find_adapter_start(init, scratch_dir)
    if start is not None:
        lora_init.initialize_adapter(model, init, base, start)
    return start


@pytest.mark.parametrize(
    "variant",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16", "use_rslora": True},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_each_variant_begins_at_the_base_and_ends_as_an_adapter_of_it(variant, make_base, tmp_path):
    base = make_base(LLAMA)
    model = adapt_base(base, LLAMA, **variant)
    start = initialize(model, variant.get("init_lora_weights", "default"), str(base), tmp_path)
    untrained = compute_logits(load_base(base))
    torch.testing.assert_close(compute_logits(model), untrained, rtol=0, atol=1e-5)
    losses = train_adapter(model)
    assert losses[-1] < losses[0] - 0.05
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, start)
    loaded = compute_logits(PeftModel.from_pretrained(load_base(base), tmp_path / "adapter"))
    torch.testing.assert_close(loaded, compute_logits(model), rtol=0, atol=1e-5)
    assert (loaded - untrained).abs().max() > 0.1


def test_pissa_on_the_transposed_matrices_of_gpt2(make_base, tmp_path):
    base = make_base(GPT2)
    model = adapt_base(base, GPT2, init_lora_weights="pissa")
    start = initialize(model, "pissa", str(base), tmp_path)
    train_adapter(model)
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, start)
    loaded = compute_logits(PeftModel.from_pretrained(load_base(base), tmp_path / "adapter"))
    torch.testing.assert_close(loaded, compute_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_resumed_run_gets_the_base_of_its_own_decomposition(config, make_base, tmp_path):
    """The second machine decomposes otherwise: another random seed stands for it."""
    base, init = make_base(config), "pissa_niter_16"
    first = adapt_base(base, config, init_lora_weights=init)
    lora_init.save_initial_adapter(initialize(first, init, str(base), tmp_path / "first"), tmp_path)
    second = load_base(base)
    torch.manual_seed(1)
    second = get_peft_model(second, plan_adapter(config, init_lora_weights=init))
    other = initialize(second, init, str(base), tmp_path / "second")

    def weights(model):
        return [layer.get_base_layer().weight for _, layer in lora_init.list_lora_layers(model)]

    assert not all(map(torch.allclose, weights(first), weights(second)))
    lora_init.restore_initial_adapter(tmp_path, second, other)
    for ours, theirs in zip(weights(second), weights(first), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    before = [weight.clone() for weight in weights(second)]
    lora_init.restore_initial_adapter(tmp_path, second, other)  # which is its own by now
    assert all(map(torch.equal, before, weights(second)))


def test_a_checkpoint_without_its_start_is_refused(make_base, tmp_path):
    model = adapt_base(make_base(LLAMA), LLAMA, init_lora_weights="pissa")
    start = initialize(model, "pissa", "", tmp_path)
    with pytest.raises(UserError, match="checkpoint-3 does not hold the values that its adapter began with"):
        lora_init.restore_initial_adapter(tmp_path / "checkpoint-3", model, start)


def test_loftq_begins_nearer_to_the_unquantized_base_than_zero(make_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(LLAMA)
    whole = load_base(base)
    model = adapt_base(base, LLAMA, in_4bit=True, init_lora_weights="loftq", lora_r=16)
    from_zero = (compute_logits(model) - compute_logits(whole)).norm()
    start = initialize(model, "loftq", str(base), tmp_path)
    assert (compute_logits(model) - compute_logits(whole)).norm() < 0.8 * from_zero
    for name, layer in lora_init.list_lora_layers(model):
        stored = whole.get_submodule(name).weight
        error = stored - lora_init.dequantize_module_weight(layer.get_base_layer())
        assert (error - layer.get_delta_weight("default")).norm() < 0.85 * error.norm()
    losses = train_adapter(model)
    assert losses[-1] < losses[0] - 0.05
    # The difference from the start is an adapter of the stored base: as near to what was trained as 4 bit are.
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, start)
    loaded = compute_logits(PeftModel.from_pretrained(load_base(base), tmp_path / "adapter"))
    assert (loaded - compute_logits(model)).norm() < from_zero < (loaded - compute_logits(whole)).norm()


def test_loftq_needs_the_matrices_in_the_files(tmp_path):
    with pytest.raises(UserError, match=r"and model\.q_proj\.weight is none there: use init_lora_weights=default"):
        lora_init.read_weight("model.q_proj.weight", {}, "model")


def test_older_releases_of_peft_know_every_field_of_an_exported_config(make_base, tmp_path):
    """They refuse the others. Those of PEFT 0.11 are listed: no release since has taken one away."""
    model = adapt_base(make_base(LLAMA), LLAMA)
    lora_init.save_adapter(model, tmp_path, lora_init.BaseReference("owner/base", "main"), None)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    known = {"alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "r", "revision"}
    known |= {"init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "rank_pattern"}
    known |= {"target_modules", "task_type", "use_dora", "use_rslora"}
    assert config.keys() == known
    assert (config["base_model_name_or_path"], config["r"]) == ("owner/base", 4)
