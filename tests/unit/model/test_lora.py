# SPDX-License-Identifier: Apache-2.0
"""Adapters on tiny models of many kinds: what they sit on, that they learn, and that PEFT alone loads what is saved."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from trl import SFTConfig

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model import lora, lora_init
from llm_trainer.model.loading import build_skeleton
from llm_trainer.training.methods.sft import ResumableSFTTrainer
from support.adapted_models import (
    GPT2,
    LAYERS,
    LLAMA,
    SIZES,
    TOKENS,
    adapt_base,
    compute_logits,
    load_base,
    plan_adapter,
    train_adapter,
)
from support.tiny_architectures import build_tiny_config
from support.tiny_image_models import build_tiny_config as build_seeing_config
from support.trainers import build_run_context

BASE = lora_init.BaseReference("base", None)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4)
MAMBA = MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=LAYERS, state_size=8)
BART = BartConfig(vocab_size=300, d_model=64, decoder_layers=LAYERS, decoder_attention_heads=4, decoder_ffn_dim=64)
MODELS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **MOE, head_dim=16, mlp_only_layers=[0]),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16),
    "gpt-oss": GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "llama4": Llama4TextConfig(
        **SIZES, intermediate_size_mlp=64, num_local_experts=4, interleave_moe_layer_step=1, head_dim=16
    ),
    "deepseek-v3": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
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


@pytest.mark.parametrize("name", MODELS)
def test_auto_hits_all_linear_layers_and_all_experts_and_plain_peft_loads_the_result(name, make_base, tmp_path):
    base = make_base(MODELS[name])
    model = adapt_base(base, MODELS[name])
    assert lora.count_targets(model) == TARGETS[name]
    frozen = {key: weight.clone() for key, weight in model.named_parameters() if not weight.requires_grad}
    losses = train_adapter(model)
    assert losses[-1] < losses[0] - 0.05
    named = dict(model.named_parameters())
    assert all(torch.equal(named[key], weight) for key, weight in frozen.items())
    assert all(weight.any() for key, weight in named.items() if "lora_B" in key)  # each adapter has learned
    trained = compute_logits(model)
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, None)
    torch.testing.assert_close(
        compute_logits(PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")), trained
    )
    torch.testing.assert_close(compute_logits(model.merge_and_unload()), trained)


def test_dropout_is_left_out_where_peft_has_none():
    assert plan_adapter(LLAMA, lora_dropout=0.1).lora_dropout == 0.1
    assert plan_adapter(MIXTRAL, target_modules=["q_proj"], lora_dropout=0.1).lora_dropout == 0.1
    assert plan_adapter(MIXTRAL).lora_dropout == 0


def test_there_is_no_dropout_unless_it_is_asked_for():
    assert plan_adapter(LLAMA).lora_dropout == Settings().adapter.lora_dropout == 0


def test_experts_adapters_are_trained_alike_when_activations_are_recomputed(make_base):
    """PEFT puts them into the parameters for the time of a forward pass alone."""
    base = make_base(MODELS["qwen3-moe"])

    def gradients(recomputes):
        model = adapt_base(base, MODELS["qwen3-moe"]).train()
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
            get_peft_model(build_skeleton("", config, trust_remote_code=False), plan_adapter(config, **settings))
        )

    assert hit(LLAMA, target_modules="q_proj") == {"self_attn.q_proj": 2}
    assert hit(LLAMA, target_modules=["layers.1.mlp.up_proj"]) == {"mlp.up_proj": 1}
    assert hit(LLAMA, target_modules=r".*\.(q|v)_proj") == {"self_attn.q_proj": 2, "self_attn.v_proj": 2}
    assert hit(LLAMA, target_modules="all-linear") == TARGETS["llama"]
    assert hit(MIXTRAL, target_parameters=["experts.down_proj"]) == {**ATTENTION, "mlp.experts.down_proj": 2}
    # The experts' names of Transformers 4.
    assert hit(MIXTRAL, target_modules=["w1", "w2", "w3"]) == EXPERTS


def test_auto_takes_only_layers_that_a_text_passes_through():
    """A weight that is read without a call, and attention to an encoder that is not there, get no gradients."""
    assert plan_adapter(MAMBA).target_modules == {"in_proj", "x_proj"}
    targets = plan_adapter(BART).target_modules
    assert {"fc1", "model.decoder.layers.0.self_attn.q_proj"} <= targets
    assert not any("encoder_attn" in target for target in targets)


@pytest.mark.parametrize(
    ("model_type", "taken", "left_out"),
    [
        ("deepseek_v32", ("q_a_proj", "kv_b_proj", "o_proj"), ("wq_b", "weights_proj")),  # the indexer only chooses
        ("deepseek_v4", ("o_b_proj",), ("o_a_proj", "scorer")),  # o_a_proj is many matrices in one
        ("falcon", ("dense", "query_key_value"), ()),  # its class of linear layers computes what others do
        ("zamba", ("in_proj",), ("shared_transf",)),  # one weight in several layers
    ],
)
def test_auto_takes_only_layers_whose_adapters_are_trained_and_can_be_merged(model_type, taken, left_out):
    targets = plan_adapter(build_tiny_config(model_type)).target_modules
    assert not [name for name in taken if not any(target.endswith(name) for target in targets)]
    assert not [target for target in targets if any(name in target for name in left_out)]


def test_a_layer_whose_output_is_changed_in_place_is_trained():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_tiny_config("roc_bert"))
    assert "roc_bert.embeddings.map_inputs_layer" in lora.find_trained_layers(model)


def test_a_model_that_asks_for_numbers_is_probed_the_slower_way():
    """The other finds the same where it can be followed."""
    asking, other = (build_skeleton("", each, trust_remote_code=False) for each in (build_tiny_config("gpt2"), LLAMA))
    assert lora.probe_layers(copy.deepcopy(asking), torch.device("meta")) is None
    assert lora.find_trained_layers(asking)
    by_meta, by_fake = (
        lora.probe_layers(copy.deepcopy(other), mode) for mode in (torch.device("meta"), FakeTensorMode())
    )
    assert by_meta and by_meta == by_fake


def test_the_trained_layers_of_a_model_are_found_once(monkeypatch):
    """A plan, a validation and each estimate of memory ask for them."""
    probed = []
    monkeypatch.setattr(lora, "PROBED", {})
    monkeypatch.setattr(lora, "probe_layers", lambda model, _: probed.append(model) or {"model.layers.0.mlp.up_proj"})
    assert plan_adapter(LLAMA).target_modules == plan_adapter(LLAMA).target_modules == {"model.layers.0.mlp.up_proj"}
    plan_adapter(MIXTRAL)
    assert [type(model).__name__ for model in probed] == ["LlamaForCausalLM", "MixtralForCausalLM"]


def test_an_adapter_on_mamba_learns_everywhere(make_base):
    model = adapt_base(make_base(MAMBA), MAMBA)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    losses = train_adapter(model)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(before[name], model.get_parameter(name)) for name in before)


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
        (LLAMA, {"target_modules": ["q_proj", "lm_head"]}, ["target_modules: lm_head is the output layer, whose"]),
        (LLAMA, {"target_modules": ".*(q_proj|lm_head)"}, ["target_modules: lm_head is the output layer, whose"]),
        (
            LLAMA,
            {"target_modules": "q_proj", "target_parameters": ["lm_head.weight"]},
            ["target_parameters: lm_head.weight is the output layer's weight"],
        ),
        (MAMBA, {"target_modules": "all-linear"}, ["target_modules: backbone.layers.0.mixer.out_proj: PEFT puts no"]),
        (MAMBA, {"target_modules": ["conv1d"]}, ["target_modules: backbone.layers.0.mixer.conv1d: PEFT puts no"]),
        (
            build_tiny_config("deepseek_v4"),
            {"target_modules": ["o_a_proj", "o_b_proj"]},
            ["target_modules: model.layers.0.self_attn.o_a_proj is a DeepseekV4GroupedLinear, which computes"],
        ),
        (
            build_tiny_config("inkling_text"),
            {"target_modules": ["embed_tokens"]},
            ["target_modules: model.embed_tokens is a InklingNormedEmbedding, which computes something else than the"],
        ),
        (
            MODELS["llama4"],
            {"target_modules": ["router"]},
            ["target_modules: model.layers.0.feed_forward.router is a Llama4Router, which computes something else"],
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
        plan_adapter(config, **settings)
    for problem, sentence in zip(raised.value.problems, sentences, strict=True):
        assert problem.startswith(sentence)


def test_dora_on_4_bit_weights_learns(make_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(LLAMA)
    model = adapt_base(base, LLAMA, in_4bit=True, use_dora=True)
    losses = train_adapter(model)
    assert losses[-1] < losses[0] - 0.05
    lora_init.save_adapter(model, tmp_path / "adapter", BASE, None)
    loaded = PeftModel.from_pretrained(load_base(base, in_4bit=True), tmp_path / "adapter")
    torch.testing.assert_close(compute_logits(loaded), compute_logits(model))


def test_weights_in_4_bit_count_their_numbers(make_base):
    pytest.importorskip("bitsandbytes")
    base = make_base(LLAMA)
    assert lora.count_parameters(adapt_base(base, LLAMA, in_4bit=True)) == lora.count_parameters(
        adapt_base(base, LLAMA)
    )
    size = sum(weight.numel() for weight in load_base(base).parameters())
    assert lora.count_parameters(load_base(base)) == (size, size)
    trainable, total = lora.count_parameters(adapt_base(base, LLAMA))
    assert total == size + trainable


def test_loraplus_gives_b_the_higher_rate_and_keeps_the_optimizer_that_was_asked_for(make_base, tmp_path):
    trainer = ResumableSFTTrainer.__new__(ResumableSFTTrainer)
    trainer.model = adapt_base(make_base(LLAMA), LLAMA)
    trainer.args = SFTConfig(
        output_dir=str(tmp_path),
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta1=0.8,
        optim="adamw_torch",
        use_cpu=True,
    )
    trainer.optimizer, trainer.run = None, build_run_context(loraplus_lr_ratio=16.0)
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


def test_a_model_without_layers_is_refused():
    settings, model = Settings(), build_skeleton("", LlamaConfig(**{**SIZES, "num_hidden_layers": 0}), False)
    with pytest.raises(UserError, match="target_modules=auto: the model has no linear layer"):
        lora.build_lora_config(settings.model, settings.adapter, model)


VISION = ("model.vision_model.", "model.connector.")


def find_adapted(**settings):
    config = build_seeing_config("smolvlm")
    planned = plan_adapter(config, **settings)
    model = build_skeleton("", config, trust_remote_code=False)
    adapted = get_peft_model(model, planned, low_cpu_mem_usage=True).base_model.targeted_module_names
    assert set(adapted) == {
        name for name, module in model.named_modules() if lora.is_target(planned, name, module, model)
    }
    return adapted


@pytest.mark.parametrize("targets", ["auto", "all-linear", ["q_proj", "fc1"], r".*\.(q_proj|fc1)"])
def test_an_adapter_stays_out_of_a_tower_that_is_not_trained(targets):
    adapted = find_adapted(target_modules=targets)
    assert len(adapted) == (2 * 7 if targets in ("auto", "all-linear") else 2)
    assert all(name.startswith("model.text_model.") for name in adapted)
    opened = find_adapted(target_modules=targets, train_vision=True)
    assert {*adapted} < {*opened}
    assert all(name.startswith(VISION) for name in {*opened} - {*adapted})


def test_targets_in_a_frozen_tower_alone_are_refused():
    with pytest.raises(UserError, match=r"^target_modules=\['fc1'\] lies in model.vision_model, .*: set train_vision"):
        plan_adapter(build_seeing_config("smolvlm"), target_modules=["fc1"])


@pytest.mark.parametrize(("model_type", "passes"), [("mllama", True), ("gemma3", False), ("qwen2_5_vl", False)])
def test_layers_that_texts_pass_over_are_known(model_type, passes):
    skeleton = build_skeleton("", build_seeing_config(model_type), trust_remote_code=False)
    assert lora.has_idle_layers(skeleton) == passes
