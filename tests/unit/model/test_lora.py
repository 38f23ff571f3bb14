# SPDX-License-Identifier: Apache-2.0
"""Adapters on tiny models of many kinds: what they sit on, that they learn, and that PEFT alone loads what is saved."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from trl import SFTConfig

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model import lora, lora_init
from llm_trainer.model.loading import build_skeleton
from llm_trainer.model.quantization import keep_trainable
from llm_trainer.training.resumable_trainer import ResumableTrainer

LAYERS = 2
BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA = LlamaConfig(**BASE)
GPT2 = GPT2Config(
    vocab_size=300,
    n_embd=64,
    n_layer=LAYERS,
    n_head=4,
    bos_token_id=0,
    eos_token_id=0,
    **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTRAL = MixtralConfig(**BASE, num_local_experts=4)
MODELS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "qwen3-moe": Qwen3MoeConfig(**BASE, **MOE, head_dim=16, mlp_only_layers=[0]),
    "qwen2-moe": Qwen2MoeConfig(**BASE, **MOE, shared_expert_intermediate_size=16),
    "gpt-oss": GptOssConfig(**BASE, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "llama4": Llama4TextConfig(
        **BASE, intermediate_size_mlp=64, num_local_experts=4, interleave_moe_layer_step=1, head_dim=16
    ),
    "deepseek-v3": DeepseekV3Config(
        **{**BASE, "num_key_value_heads": 4},
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
        **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group"), 1),
        qk_rope_head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
}
ATTENTION = {f"self_attn.{name}": LAYERS for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
EXPERTS = {"mlp.experts.gate_up_proj": LAYERS, "mlp.experts.down_proj": LAYERS}
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {
    "llama": {**ATTENTION, **{f"mlp.{name}": LAYERS for name in MLP}},
    "gpt2": dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), LAYERS),
    "mixtral": {**ATTENTION, **EXPERTS},
    "gpt-oss": {**ATTENTION, **EXPERTS},
    # PEFT would take the names of the dense layer for the experts', so that it gets its adapters as bare weights.
    "qwen3-moe": {**ATTENTION, **dict.fromkeys(EXPERTS, 1), **{f"mlp.{name}.weight": 1 for name in MLP}},
    "qwen2-moe": {**ATTENTION, **EXPERTS, **{f"mlp.shared_expert.{name}": LAYERS for name in MLP}},
    "llama4": {
        **ATTENTION,
        **{f"feed_forward.shared_expert.{name}": LAYERS for name in MLP},
        **{f"feed_forward.experts.{name}": LAYERS for name in ("gate_up_proj", "down_proj")},
    },
    "deepseek-v3": {
        **{f"self_attn.{name}": LAYERS for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")},
        "self_attn.o_proj": LAYERS,
        **dict.fromkeys(EXPERTS, 1),
        **{f"mlp.{name}.weight": 1 for name in MLP},
        **{f"mlp.shared_experts.{name}.weight": 1 for name in MLP},
    },
}
TOKENS = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_base(tmp_path):
    """Saves a model of random weights, and gives a function that loads it."""

    def make(config):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def load(folder, in_4bit=False):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization if in_4bit else None)
    return keep_trainable(model).eval()


BASE = lora_init.BaseReference("base", None)


def plan(config, **settings):
    settings = Settings(**{"lora_r": 4, **settings})
    return lora.build_lora_config(settings.model, settings.adapter, build_skeleton("", config, trust_remote_code=False))


def adapt(base, config, in_4bit=False, **settings):
    model = load(base, in_4bit)
    torch.manual_seed(0)
    return get_peft_model(model, plan(config, load_in_4bit=in_4bit, **settings)).eval()


def train(model, num_steps=4):
    """The loss of each step."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits_of(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", MODELS)
def test_auto_hits_all_linear_layers_and_all_experts_and_plain_peft_loads_the_result(name, make_base, tmp_path):
    base = make_base(MODELS[name])
    model = adapt(base, MODELS[name])
    assert lora.count_targets(model) == TARGETS[name]
    frozen = {key: weight.clone() for key, weight in model.named_parameters() if not weight.requires_grad}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    named = dict(model.named_parameters())
    assert all(torch.equal(named[key], weight) for key, weight in frozen.items())
    assert all(weight.any() for key, weight in named.items() if "lora_B" in key)  # each adapter has learned
    trained = logits_of(model)
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, None)
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(load(base), tmp_path / "adapter")), trained)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), trained)


def test_dropout_is_left_out_where_peft_has_none():
    assert plan(LLAMA).lora_dropout == Settings().adapter.lora_dropout > 0
    assert plan(MIXTRAL).lora_dropout == 0
    assert plan(MIXTRAL, target_modules=["q_proj"]).lora_dropout > 0


def test_experts_adapters_are_trained_alike_when_activations_are_recomputed(make_base):
    """PEFT puts them into the parameters for the time of a forward pass alone."""
    base = make_base(MODELS["qwen3-moe"])

    def gradients(recomputes):
        model = adapt(base, MODELS["qwen3-moe"]).train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    torch.testing.assert_close(gradients(recomputes=True), gradients(recomputes=False))


def test_routers_are_no_targets():
    skeleton = build_skeleton("", MODELS["llama4"], trust_remote_code=False)
    assert set(lora.find_routers(skeleton)) == {f"model.layers.{layer}.feed_forward.router" for layer in (0, 1)}
    skeleton = build_skeleton("", MODELS["qwen2-moe"], trust_remote_code=False)
    assert set(lora.find_routers(skeleton)) == {f"model.layers.{layer}.mlp.shared_expert_gate" for layer in (0, 1)}


def test_targets_by_name_pattern_and_parameter(make_base):
    def hit(config, **settings):
        return lora.count_targets(
            get_peft_model(build_skeleton("", config, trust_remote_code=False), plan(config, **settings))
        )

    assert hit(LLAMA, target_modules="q_proj") == {"self_attn.q_proj": 2}
    assert hit(LLAMA, target_modules=["layers.1.mlp.up_proj"]) == {"mlp.up_proj": 1}
    assert hit(LLAMA, target_modules=r".*\.(q|v)_proj") == {"self_attn.q_proj": 2, "self_attn.v_proj": 2}
    assert hit(LLAMA, target_modules="all-linear") == TARGETS["llama"]
    assert hit(MIXTRAL, target_parameters=["experts.down_proj"]) == {**ATTENTION, "mlp.experts.down_proj": 2}
    # The experts' names of Transformers 4.
    assert hit(MIXTRAL, target_modules=["w1", "w2", "w3"]) == EXPERTS


@pytest.mark.parametrize(
    ("config", "settings", "sentences"),
    [
        (
            LLAMA,
            {"target_modules": ["q_proj", "v_prj", "mlp"]},
            [
                "target_modules: 'mlp' is a LlamaMLP, which takes no adapter; there are embed_tokens, q_proj, k_proj,",
                "target_modules: the model has no 'v_prj'; the nearest is 'v_proj', and there are embed_tokens,",
            ],
        ),
        (LLAMA, {"target_modules": r".*\.nothing"}, [r"target_modules='.*\\.nothing' matches no module's path: there"]),
        (
            LLAMA,
            {"target_parameters": ["experts.up"]},
            ["target_parameters: the model has no 'experts.up'; there are no experts in one parameter."],
        ),
        (
            MIXTRAL,
            {"target_parameters": ["experts.gate_up"]},
            ["target_parameters: the model has no 'experts.gate_up'; the nearest is 'mlp.experts.gate_up_proj', and"],
        ),
        (
            MIXTRAL,
            {"lora_dropout": 0.1, "use_dora": True, "init_lora_weights": "pissa"},
            [
                "lora_dropout=0.1 with adapters on parameters (mlp.experts.down_proj, mlp.experts.gate_up_proj): PEFT",
                "use_dora=true with adapters on parameters",
                "init_lora_weights=pissa with adapters on parameters",
            ],
        ),
        (MIXTRAL, {"target_modules": ["w1"]}, ["target_modules=['w1']: Cannot convert PEFT target(s) w1 without also"]),
        (GPT2, {"init_lora_weights": "olora"}, ["init_lora_weights=olora: PEFT cannot decompose the Conv1D layers of"]),
        (
            LLAMA,
            {"init_lora_weights": "pissa", "lora_r": 33},
            ["lora_r=33 with init_lora_weights=pissa: the matrix of model.layers.0.self_attn.k_proj has only rank 32;"],
        ),
    ],
)
def test_what_peft_cannot_do_is_told_before_weights_load(config, settings, sentences):
    with pytest.raises(UserError) as raised:
        plan(config, **settings)
    for problem, sentence in zip(raised.value.problems, sentences, strict=True):
        assert problem.startswith(sentence)


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
    model = adapt(base, LLAMA, **variant)
    start = lora_init.initialize_adapter(model, variant.get("init_lora_weights", "default"), str(base), tmp_path)
    untrained = logits_of(load(base))
    torch.testing.assert_close(logits_of(model), untrained, rtol=0, atol=1e-5)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, start)
    loaded = logits_of(PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    torch.testing.assert_close(loaded, logits_of(model), rtol=0, atol=1e-5)
    assert (loaded - untrained).abs().max() > 0.1


def test_pissa_on_the_transposed_matrices_of_gpt2(make_base, tmp_path):
    base = make_base(GPT2)
    model = adapt(base, GPT2, init_lora_weights="pissa")
    start = lora_init.initialize_adapter(model, "pissa", str(base), tmp_path)
    train(model)
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, start)
    loaded = logits_of(PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    torch.testing.assert_close(loaded, logits_of(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_resumed_run_gets_the_base_of_its_own_decomposition(config, make_base, tmp_path):
    """The second machine decomposes otherwise: another random seed stands for it."""
    base, init = make_base(config), "pissa_niter_16"
    first = adapt(base, config, init_lora_weights=init)
    lora_init.save_initial_adapter(lora_init.initialize_adapter(first, init, str(base), tmp_path / "first"), tmp_path)
    second = load(base)
    torch.manual_seed(1)
    second = get_peft_model(second, plan(config, init_lora_weights=init))
    other = lora_init.initialize_adapter(second, init, str(base), tmp_path / "second")

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
    model = adapt(make_base(LLAMA), LLAMA, init_lora_weights="pissa")
    start = lora_init.initialize_adapter(model, "pissa", "", tmp_path)
    with pytest.raises(UserError, match="checkpoint-3 does not hold the values that its adapter began with"):
        lora_init.restore_initial_adapter(tmp_path / "checkpoint-3", model, start)


def test_loftq_begins_nearer_to_the_unquantized_base_than_zero(make_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(LLAMA)
    whole = load(base)
    model = adapt(base, LLAMA, in_4bit=True, init_lora_weights="loftq", lora_r=16)
    from_zero = (logits_of(model) - logits_of(whole)).norm()
    start = lora_init.initialize_adapter(model, "loftq", str(base), tmp_path)
    assert (logits_of(model) - logits_of(whole)).norm() < 0.8 * from_zero
    for name, layer in lora_init.list_lora_layers(model):
        stored = whole.get_submodule(name).weight
        error = stored - lora_init.dequantize_module_weight(layer.get_base_layer())
        assert (error - layer.get_delta_weight("default")).norm() < 0.85 * error.norm()
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    # The difference from the start is an adapter of the stored base: as near to what was trained as 4 bit are.
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, start)
    loaded = logits_of(PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    assert (loaded - logits_of(model)).norm() < from_zero < (loaded - logits_of(whole)).norm()


def test_loftq_needs_the_matrices_in_the_files(tmp_path):
    with pytest.raises(UserError, match=r"and model\.q_proj\.weight is none there: use init_lora_weights=default"):
        lora_init.read_weight("model.q_proj.weight", {}, "model")


def test_dora_on_4_bit_weights_learns(make_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(LLAMA)
    model = adapt(base, LLAMA, in_4bit=True, use_dora=True)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, None)
    loaded = PeftModel.from_pretrained(load(base, in_4bit=True), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_weights_in_4_bit_count_their_numbers(make_base):
    pytest.importorskip("bitsandbytes")
    base = make_base(LLAMA)
    assert lora.count_parameters(adapt(base, LLAMA, in_4bit=True)) == lora.count_parameters(adapt(base, LLAMA))
    size = sum(weight.numel() for weight in load(base).parameters())
    assert lora.count_parameters(load(base)) == (size, size)
    trainable, total = lora.count_parameters(adapt(base, LLAMA))
    assert total == size + trainable


def test_loraplus_gives_b_the_higher_rate_and_keeps_the_optimizer_that_was_asked_for(make_base, tmp_path):
    trainer = ResumableTrainer.__new__(ResumableTrainer)
    trainer.model = adapt(make_base(LLAMA), LLAMA)
    trainer.args = SFTConfig(
        output_dir=str(tmp_path),
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta1=0.8,
        optim="adamw_torch",
        use_cpu=True,
    )
    trainer.optimizer, trainer.loraplus_lr_ratio = None, 16.0
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    rates = {names[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {16e-3}
    assert len(rates) == 2 * LAYERS * 7
    assert {(group["weight_decay"], group["betas"]) for group in optimizer.param_groups if group["params"]} == {
        (0.1, (0.8, 0.999))
    }
