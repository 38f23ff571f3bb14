# SPDX-License-Identifier: Apache-2.0
"""The types of the computation and of the weights, for devices that are not here too."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device, find_device
from llm_trainer.model.precision import choose_precision, find_stored_dtype

GPU = torch.device("cuda", 0)
T4, V100 = Device(GPU, "Tesla T4", (7, 5)), Device(GPU, "Tesla V100", (7, 0))
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
        (V100, {}, F16, F16),
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
