# SPDX-License-Identifier: Apache-2.0
"""The types of the computation and of the weights, for devices that are not here too."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device, find_device
from llm_trainer.model.precision import check_arguments, choose_precision, find_stored_dtype, set_adapter_types
from support.adapted_models import GPT2, LLAMA, SIZES, TOKENS

GPU = torch.device("cuda", 0)
T4 = Device(GPU, "Tesla T4", (7, 5))
A100, B200 = Device(GPU, "NVIDIA A100", (8, 0)), Device(GPU, "NVIDIA B200", (10, 0))
CPU = Device(torch.device("cpu"))
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def choose(device, **options):
    settings = Settings(**options)
    return choose_precision(settings.model, settings.adapter, device)


@pytest.mark.parametrize(
    ("device", "settings", "compute", "weights"),
    [
        (A100, {}, B16, B16),
        (B200, {}, B16, B16),
        (T4, {}, F16, F16),
        (CPU, {}, F32, F32),
        (A100, {"use_peft": False}, B16, F32),
        (T4, {"use_peft": False}, F16, F32),
        (CPU, {"use_peft": False}, F32, F32),
        (A100, {"torch_dtype": "float32"}, F32, F32),
        (A100, {"torch_dtype": "float16"}, F16, F16),
        (A100, {"torch_dtype": "bfloat16", "use_peft": False}, B16, B16),
        (T4, {"torch_dtype": "float32"}, F32, F32),
        (CPU, {"torch_dtype": "bfloat16"}, B16, B16),
    ],
)
def test_types_fit_the_device(device, settings, compute, weights):
    precision = choose(device, **settings)
    assert (precision.compute, precision.weights) == (compute, weights)


@pytest.mark.parametrize(("name", "kind"), [("bf16", "bfloat16"), ("bf16_full_eval", "bfloat16"), ("tf32", "TF32")])
def test_a_type_that_the_trainer_is_told_and_the_gpu_lacks_is_refused(name, kind):
    t4, a10g = (Device(torch.device("cuda"), gpu, version) for gpu, version in (("T4", (7, 5)), ("A10G", (8, 6))))
    asked = Settings(**{name: True}).training
    with pytest.raises(
        UserError, match=rf"{name}=true: T4 \(7\.5\) has no {kind}, which takes compute capability 8\.0"
    ):
        check_arguments(asked, t4)
    check_arguments(asked, a10g)
    check_arguments(asked, find_device(use_cpu=True))
    check_arguments(Settings(**{name: False}).training, t4)
    check_arguments(Settings().training, t4)


def test_a_type_that_the_device_cannot_compute_in_is_refused():
    with pytest.raises(
        UserError, match=r"^torch_dtype=bfloat16: Tesla T4 \(7\.5\) only emulates it, .* leave it out\.$"
    ):
        choose(T4, torch_dtype="bfloat16")
    with pytest.raises(UserError, match=r"^torch_dtype=float16: training in it needs an NVIDIA GPU .* leave it out\.$"):
        choose(CPU, torch_dtype="float16")


@pytest.mark.parametrize(
    ("device", "settings", "stored", "line"),
    [
        (A100, {}, B16, "Precision: bfloat16 (auto: NVIDIA A100 (8.0) has it)"),
        (A100, {"use_peft": False}, F32, "Precision: bfloat16, weights in float32 (auto: NVIDIA A100 (8.0) has it)"),
        (T4, {}, B16, "Precision: float16 (auto: Tesla T4 (7.5) has no bfloat16)"),
        (CPU, {}, None, "Precision: float32 (auto: on a CPU)"),
        (CPU, {"torch_dtype": "bfloat16"}, B16, "Precision: bfloat16 (torch_dtype=bfloat16)"),
    ],
)
def test_the_log_tells_the_types_and_why(device, settings, stored, line):
    assert choose(device, **settings).describe(stored) == line


@pytest.mark.parametrize("stored", [F32, F16])
def test_the_log_tells_when_the_checkpoint_is_rounded(stored):
    line = choose(A100).describe(stored)
    name = str(stored).removeprefix("torch.")
    assert line.endswith(f"has it; the checkpoint's {name} weights are rounded to it)")


@pytest.mark.parametrize("stored", [B16, F32])
@pytest.mark.parametrize("is_stated", [True, False])
def test_the_checkpoints_own_type_is_that_of_its_config_or_its_files(tmp_path, stored, is_stated):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(stored).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.dtype == stored
    if not is_stated:
        config.dtype = None
    assert find_stored_dtype(str(tmp_path), config) == stored


def test_the_real_device_is_found():
    device = find_device(use_cpu=True)
    assert str(device) == "the CPU"
    assert not device.is_gpu
    assert find_device(use_cpu=False).is_gpu == torch.cuda.is_available()


MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4)
CASES = {
    "llama": (LLAMA, {"target_modules": "all-linear"}),
    "gpt2": (GPT2, {"target_modules": "all-linear"}),
    "modules": (LLAMA, {"target_modules": ["embed_tokens", "q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
    "experts": (MIXTRAL, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    "4 bit": (LLAMA, {"target_modules": "all-linear"}),
    "dropout": (LLAMA, {"target_modules": "all-linear", "lora_dropout": 0.3}),
    "dora": (LLAMA, {"target_modules": "all-linear", "use_dora": True}),
}


def adapt(folder, leaves, in_4bit=False, **options):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16) if in_4bit else None
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)).train()
    if leaves:
        set_adapter_types(model)
    return model


def compute_gradients(model, dtype=torch.bfloat16):
    """Return the loss, the gradients, and the bytes that wait for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss, gradients, sum(kept.values())


def assert_same_bits(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() != set()
    assert [name for name, gradient in expected[1].items() if not torch.equal(found[1][name], gradient)] == []


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_the_same_to_the_last_bit(make_base, case):
    config, options = CASES[case]
    folder = make_base(config)
    expected, found = (compute_gradients(adapt(folder, leaves, case == "4 bit", **options)) for leaves in (False, True))
    assert_same_bits(found, expected)


def test_the_same_with_layers_computed_again_and_in_float16(make_base):
    folder = make_base(LLAMA)
    for dtype in (torch.bfloat16, torch.float16):
        results = []
        for leaves in (False, True):
            model = adapt(folder, leaves, target_modules="all-linear")
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            results.append(compute_gradients(model, dtype))
        assert_same_bits(results[1], results[0])


def test_no_copy_of_the_inputs_waits_for_the_backward_pass(make_base):
    folder = make_base(LLAMA)
    with_cast, without = (
        compute_gradients(adapt(folder, leaves, target_modules="all-linear"))[2] for leaves in (False, True)
    )
    spared = 3 * LLAMA.num_hidden_layers  # of q, k and v one is left, and of gate and up
    assert with_cast - without >= spared * 2 * TOKENS.numel() * LLAMA.hidden_size


def test_the_cast_stays_without_autocast(make_base):
    folder = make_base(LLAMA)
    expected, found = (adapt(folder, leaves, target_modules="all-linear").eval() for leaves in (False, True))
    with torch.no_grad():
        assert torch.equal(found(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)
