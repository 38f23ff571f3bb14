# SPDX-License-Identifier: Apache-2.0
"""A quantized base: read as it is stored, or quantized by bitsandbytes, and trained through an adapter."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3MoeConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from llm_trainer.common.safetensors_files import list_shapes
from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import ModelSettings
from llm_trainer.model.device import Device
from llm_trainer.model.loading import LoadOptions, build_on_meta, build_skeleton, load_model, read_config
from llm_trainer.model.parameter_roles import assign_roles, measure_linear_share
from llm_trainer.model.precision import set_adapter_types
from llm_trainer.model.quantization import (
    build_packed_weight,
    build_quantization,
    describe_quantization,
    find_quantization_problems,
    find_stored_method,
    keep_tower,
    list_packed_layers,
    prepare_layers,
    quantize_on,
)
from support.tiny_gpt_oss import EXPERTS, build_tiny_gpt_oss, dequantize, quantize
from support.tiny_image_models import build_tiny_config

CPU = Device(torch.device("cpu"))
TOKENS = torch.arange(3, 40)[None]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True},
    "nf4, single": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    return str(build_tiny_gpt_oss(tmp_path_factory.mktemp("gpt-oss")))


def load(model, dtype=torch.float32, sharded=False, **settings):
    settings = Settings(**settings).model
    quantization = build_quantization(read_config(model, settings), settings, dtype, CPU)
    if sharded:
        quantization.bnb_4bit_quant_storage = dtype  # as fsdp.store_as_float does
    return load_model(model, settings, LoadOptions(dtype, "eager", quantization), CPU.torch)


def find_problems(model, config, **options):
    settings = Settings(**options)
    return list(find_quantization_problems(model, config, settings.model, settings.adapter, settings.parallelism))


def add_adapter(base):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0)
    return get_peft_model(base, config)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_an_adapter_learns_on_a_quantized_base(tiny_model, name, dtype, recomputes):
    model = add_adapter(load(str(tiny_model), dtype, **BITSANDBYTES[name]))
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    stored = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert stored.dtype == (torch.int8 if name == "int8" else torch.uint8)
    if recomputes:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in adapter)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_the_4_bit_types_differ_and_are_as_asked_for(tiny_model):
    def weight(name):
        return load(str(tiny_model), **BITSANDBYTES[name]).model.layers[0].mlp.up_proj.weight

    assert weight("nf4").quant_state.quant_type == "nf4"
    assert weight("fp4").quant_state.quant_type == "fp4"
    assert weight("nf4").quant_state.nested
    assert not weight("nf4, single").quant_state.nested
    assert not torch.equal(weight("nf4"), weight("fp4"))


def test_4_bit_weights_are_kept_in_the_computations_type_where_they_are_sharded(tiny_model):
    whole = load(str(tiny_model), torch.bfloat16, load_in_4bit=True)
    sharded = load(str(tiny_model), torch.bfloat16, sharded=True, load_in_4bit=True)
    assert sharded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    logits = [model(input_ids=TOKENS).logits for model in (whole, sharded)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_evaluation_leaves_4_bit_weights_as_they_were_on_a_cpu_that_would_pack_them(tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    model = load(str(tmp_path), load_in_4bit=True).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested


def test_a_checkpoint_of_bitsandbytes_is_trained_as_it_is(tiny_model, tmp_path):
    stored = str(tmp_path / "stored")
    load(str(tiny_model), load_in_4bit=True).save_pretrained(stored)
    config = read_config(stored, ModelSettings())
    assert find_stored_method(config) == "bitsandbytes"
    assert build_quantization(config, ModelSettings(), torch.float32, CPU) is None
    assert build_skeleton(stored, config, trust_remote_code=False).num_parameters() > 0
    trained = add_adapter(load(stored))
    assert trained.get_base_model().is_quantized
    (problem,) = find_problems(stored, config, use_peft=False)
    assert problem.startswith("use_peft=false: ")


def test_a_base_on_the_cpu_is_quantized_on_the_gpu_one_matrix_at_a_time(monkeypatch):
    seen = []

    def record(operation, input_dict, **options):
        seen.append({name: (matrix.device.type, options["model"]) for name, matrix in input_dict.items()})
        return input_dict

    monkeypatch.setattr(Bnb4bitQuantize, "convert", record)
    with FakeTensorMode(), quantize_on(torch.device("cuda", 0)):  # tensors that are on a GPU by their own words
        for matrix in (torch.empty(4, 64), [torch.empty(4, 64)]):  # both forms in which Transformers gives them
            (packed,) = Bnb4bitQuantize(None).convert({"weight": matrix}, model="the model").values()
            assert packed.device.type == "cpu"
    assert seen == [{"weight": ("cuda", "the model")}] * 2
    assert Bnb4bitQuantize.convert is record


@pytest.mark.parametrize("name", ["nf4", "nf4, single", "fp4"])
def test_a_rank_without_weights_has_the_layers_of_one_with_them(tiny_model, name):
    """Where it gets their scales and packed numbers, it computes the same."""
    settings = Settings(**BITSANDBYTES[name]).model
    quantization = build_quantization(read_config(str(tiny_model), settings), settings, torch.float32, CPU)
    options = LoadOptions(torch.float32, "eager", quantization)
    with quantize_on(CPU.torch):
        loaded = load_model(str(tiny_model), settings, options, CPU.torch)
    empty = load_model(str(tiny_model), settings, options, None)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    for attribute in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(empty, attribute) == getattr(loaded, attribute)
    pairs = list(zip(list_packed_layers(empty), list_packed_layers(loaded), strict=True))
    assert len(pairs) == 14
    for layer, whole in pairs:
        data, scales = whole.weight.data.clone(), whole.weight.quant_state.as_dict(packed=True)
        layer.weight = build_packed_weight(data, scales, layer)
        inputs = torch.ones(2, layer.in_features)
        assert torch.equal(layer(inputs), whole(inputs))
        assert layer.weight.quant_type == whole.weight.quant_type
        assert layer.weight.compress_statistics == whole.weight.compress_statistics


def test_an_adapter_that_trl_has_rounded_is_put_back_to_float32(tiny_model):
    model = add_adapter(load(str(tiny_model), torch.bfloat16, load_in_4bit=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    frozen = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    set_adapter_types(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad} == frozen


def test_mxfp4_follows_the_specification():
    """The 16 numbers of E2M1, and that rounding to them moves a number by half a step at most."""
    every_code = torch.arange(0, 256, 17, dtype=torch.uint8).view(1, 16)  # both halves of byte 17 n are n
    one = torch.tensor([127], dtype=torch.uint8)
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert dequantize(every_code, one).tolist()[::2] == [*positive, *(-number for number in positive)]
    assert dequantize(every_code, one + 3).tolist()[14] == 48
    weights = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    moved = (dequantize(*quantize(weights)) - weights).abs().unflatten(-1, (-1, 32))
    assert (moved / weights.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) <= 0.25 + 1e-6).all()


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_mxfp4_checkpoint_is_loaded_as_the_numbers_that_it_holds(gpt_oss, asked, dtype):
    model = load(gpt_oss, dtype, use_mxfp4=asked)
    stored = load_file(f"{gpt_oss}/model.safetensors")
    compared = 0
    for name, weight in model.state_dict().items():
        if name.endswith(EXPERTS):
            compared += 1
            expected = dequantize(stored[f"{name}_blocks"], stored[f"{name}_scales"]).transpose(1, 2)
            assert weight.dtype == dtype
            assert torch.equal(weight, expected.to(dtype))
    assert compared == 4
    assert "quantization_config" not in model.config.to_dict()


def test_what_an_mxfp4_checkpoint_grows_to_is_said_before_it_is_loaded(gpt_oss):
    config = read_config(gpt_oss, ModelSettings())
    quantization = build_quantization(config, ModelSettings(), torch.bfloat16, CPU)
    skeleton = build_skeleton(gpt_oss, config, trust_remote_code=False)
    line = describe_quantization(gpt_oss, skeleton, quantization, torch.bfloat16)
    assert line.startswith(
        "Quantization: the checkpoint's MXFP4 is dequantized to bfloat16 for training: 0 MiB on disk"
    )
    model = load(gpt_oss, torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert sum(torch.Size(shape).numel() for shape in list_shapes(Path(gpt_oss))) == numbers


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SMALL), 2 * (4 * 64 * 64 + 3 * 64 * 256)),
        (Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=8, moe_intermediate_size=256), 2 * (4 * 64 * 64)),
    ],
)
def test_the_share_that_bitsandbytes_quantizes_is_told(tmp_path, config, expected):
    """Of a mixture of experts it is small: Transformers 5 keeps the experts in one parameter, which is no layer."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(str(tmp_path), load_in_4bit=True)
    quantized = sum(weight.numel() * 2 for weight in model.parameters() if weight.dtype == torch.uint8)
    assert quantized == expected
    skeleton = build_skeleton("", config, trust_remote_code=False)
    assert measure_linear_share(skeleton) == pytest.approx(quantized / skeleton.num_parameters())
    quantization = build_quantization(config, Settings(load_in_4bit=True).model, torch.float32, CPU)
    line = describe_quantization("", skeleton, quantization, torch.float32)
    assert line.startswith("Quantization: nf4, its scales too: ")
    assert line.endswith("% of the weights, as the others stay in float32")


def test_settings_that_contradict_the_checkpoint_are_refused(gpt_oss, tiny_model):
    config, plain = read_config(gpt_oss, ModelSettings()), read_config(str(tiny_model), ModelSettings())

    def problem(config=config, **settings):
        (sentence,) = find_problems("the-model", config, **settings)
        return sentence

    assert problem(use_mxfp4=False) == (
        "use_mxfp4=false: the-model is an MXFP4 checkpoint and can only be read as one: remove use_mxfp4."
    )
    for name in ("load_in_4bit", "load_in_8bit"):
        assert problem(**{name: True}).startswith(f"{name}=true: the-model is stored in mxfp4 already")
    assert problem(plain, use_mxfp4=True) == (
        "use_mxfp4=true: the-model is not quantized and is not an MXFP4 checkpoint: remove use_mxfp4."
    )
    assert not list(find_problems("", config, use_mxfp4=True, use_peft=False))
    assert not list(find_problems("", plain, use_mxfp4=False, load_in_8bit=True))
    assert not list(find_problems("", plain, base_compute="fp8"))
    assert problem(base_compute="fp8") == (
        "base_compute=fp8: the-model is stored in mxfp4, and is for bases in 16 bit: remove base_compute."
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_checkpoint_of_another_method_is_refused_by_its_name(method):
    config = LlamaConfig()
    config.quantization_config = {"quant_method": method, "bits": 4}
    (problem,) = find_problems("the-model", config)
    assert f"stored in {method}, which cannot be trained on here" in problem
    (four_bit, other) = find_problems("the-model", config, load_in_4bit=True)
    assert four_bit.startswith(f"load_in_4bit=true: the-model is stored in {method} already")
    assert method in other


def test_the_stored_method_is_read_from_every_form_of_it():
    config = copy.deepcopy(LlamaConfig())
    assert find_stored_method(config) is None
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert find_stored_method(config) == "bitsandbytes"
    config.quantization_config = {"load_in_8bit": True}
    assert find_stored_method(config) == "bitsandbytes"


def test_the_config_file_tells_of_mxfp4(gpt_oss):
    assert find_stored_method(AutoConfig.from_pretrained(gpt_oss)) == "mxfp4"


def test_the_tower_of_a_model_that_sees_is_left_as_it_is():
    skeleton = build_on_meta(build_tiny_config("smolvlm"), torch.bfloat16, False)
    quantization = keep_tower(BitsAndBytesConfig(load_in_4bit=True), skeleton)
    prepare_layers(skeleton, quantization)
    packed = {id(layer) for layer in list_packed_layers(skeleton)}
    names = [name for name, layer in skeleton.named_modules() if id(layer) in packed]
    assert len(names) == 2 * 7
    assert all(name.startswith("model.text_model.layers.") for name in names)
    roles = dict(assign_roles(build_on_meta(build_tiny_config("smolvlm"), torch.bfloat16, False)))
    assert {name for name, role in roles.items() if role == "linear"} == {f"{name}.weight" for name in names}
    assert keep_tower(None, skeleton) is None
