# SPDX-License-Identifier: Apache-2.0
"""bf16 LoRA and nf4 QLoRA learn, and take the memory that was estimated for them."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gpu

MAX_DEVIATION = 0.10  # of the estimate from the measured peak


def make_plan(size: str, method: str) -> gpu.Plan:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    return gpu.Plan(size, method, tokens=64 if size == "tiny" else 2048)


@pytest.mark.parametrize("method", gpu.METHODS)
def test_a_few_steps_reduce_the_loss(method, size, device):
    measurement = gpu.train(make_plan(size, method), device, num_steps=4, warm_up=1)
    print(
        f"{size} {method}: losses {[round(loss, 3) for loss in measurement.losses]}, {measurement.peak_bytes:,} bytes"
    )
    assert measurement.losses[-1] < measurement.losses[0] - 0.05


def test_a_matrix_for_the_cpu_is_quantized_as_one_that_stays_on_the_gpu(device, tmp_path):
    """FSDP's first rank quantizes on its GPU, matrix by matrix, and keeps the base on the CPU."""
    pytest.importorskip("bitsandbytes")
    quantization = pytest.importorskip("llm_trainer.model.quantization", exc_type=ImportError)
    config = copy.deepcopy(gpu.SIZES["tiny"])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    there = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": device}, **options)
    with quantization.quantize_on(device):
        here = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, **options)
    assert {parameter.device.type for parameter in here.parameters()} == {"cpu"}
    expected = there.state_dict()
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, expected[name].cpu()), name


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize("method", gpu.METHODS)
def test_the_peak_is_the_estimated_one(method, checkpointing, size, device):
    if device.type != "cuda":
        pytest.skip("torch measures peaks on a GPU alone")
    memory = pytest.importorskip("llm_trainer.model.memory.estimate", exc_type=ImportError)
    from llm_trainer.config.schema import Settings
    from llm_trainer.model.memory.shape import read_shape
    from llm_trainer.model.memory.step_trace import Step

    plan = gpu.Plan(**{**vars(make_plan(size, method)), "checkpointing": checkpointing, "rows": 1})
    settings = Settings(
        lora_r=gpu.LORA_RANK, load_in_4bit=method == "qlora", attn_implementation=plan.attention, lora_dropout=0
    )
    step = Step(
        num_sequences=plan.sequences,
        length=plan.tokens,
        has_mask=False,
        stores_scores=plan.attention == "eager",
        compute_dtype=torch.bfloat16,
        recompute_activations=checkpointing,
        offload_activations=False,
        sharded=False,
        on_gpu=True,
    )
    setup = memory.Setup(step, world_size=1, optimizer="adamw_torch_fused", accumulates=False)
    shape = read_shape(gpu.SIZES[size], settings.model, settings.adapter, torch.bfloat16)
    estimate = memory.estimate_memory(shape, setup).peak_bytes
    measured = gpu.train(plan, device, num_steps=2, warm_up=1).peak_bytes
    print(
        f"{size} {method}: {estimate:,} bytes estimated, {measured:,} measured, off by {estimate / measured - 1:+.1%}"
    )
    assert abs(estimate / measured - 1) <= MAX_DEVIATION
