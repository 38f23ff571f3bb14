# SPDX-License-Identifier: Apache-2.0
"""The operations of a token agree with what PyTorch counts of a real step; peaks with data sheets."""

from collections import Counter
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma4TextConfig, GptOssConfig, LlamaConfig, PreTrainedConfig

from llm_trainer.config.schema import Settings
from llm_trainer.data.images.processors import process_images
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model import lora
from llm_trainer.model.device import Device
from llm_trainer.model.memory.flops import (
    count_attention,
    count_flops,
    find_peak_flops,
    find_peak_tokens_per_second,
    measure_row_tokens,
)
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target
from llm_trainer.model.memory.shape import UnknownShapeError, count_cache_bytes, read_shape
from support.tiny_processors import build_processor
from support.tiny_vision_models import build_config

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
TINY = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
ROW = 48


def plan_job(config, **options) -> MemoryScenario:
    """A job on one H100."""
    given = Settings(**options)
    sections = MemorySettings(given.model, given.adapter, given.data, given.training, given.parallelism, given.methods)
    h100 = Device(torch.device("cuda"), "NVIDIA H100 80GB HBM3", (9, 0))
    return MemoryScenario(config, sections, 4096, Target(h100, 1, 0))


def shape_of(config, settings, dtype):
    return read_shape(config, settings.model, settings.adapter, dtype)


def count_by_torch(config: PreTrainedConfig, settings: Settings) -> float:
    """Of a forward and a backward pass of one row, a token."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if settings.adapter.use_peft:
        model = get_peft_model(model, lora.build_lora_config(settings.model, settings.adapter, model))
    ids = torch.randint(0, 320, (1, ROW))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops() / ROW


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tokens_operations_are_those_of_a_real_step(use_peft, tied):
    # Layers enough that it does not matter that nothing needs the gradient of the first one's input.
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 8}, tie_word_embeddings=tied)
    settings = Settings(use_peft=use_peft, lora_dropout=0.0)
    shape = shape_of(config, settings, torch.float32)
    assert count_flops(shape, config, ROW) == pytest.approx(count_by_torch(config, settings), rel=0.02)


def test_of_a_mixture_the_experts_count_that_a_token_goes_to():
    sizes = {**SIZES, "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2, "sliding_window": 16}
    settings = Settings(use_peft=False)

    def count(**experts):
        config = GptOssConfig(**sizes, **experts)
        return count_flops(shape_of(config, settings, torch.float32), config, ROW)

    two_of_8, four_of_8 = (
        count(num_local_experts=8, num_experts_per_tok=2),
        count(num_experts_per_tok=4, num_local_experts=8),
    )
    weights = 3 * 3 * 64 * 128  # of an expert in each layer
    assert four_of_8 - two_of_8 == pytest.approx(6 * 2 * weights, rel=0.03)  # and biases
    assert count(num_local_experts=4, num_experts_per_tok=4) == pytest.approx(four_of_8, rel=0.02)


def test_a_window_and_layers_without_attention_see_less():
    config = LlamaConfig(**TINY)
    shape = shape_of(config, Settings(), torch.float32)
    full = count_flops(shape, config, 1000)
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention", "linear_attention"], 100
    assert full - count_flops(shape, config, 1000) == 12 * 64 * (900 + 1000)


def test_heads_of_layers_may_have_two_sizes():
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma4TextConfig(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=50,
        per_layer_config={"2": {"head_dim": 32}},
        **sizes,
    )
    assert count_attention(config, 100) == 12 * 4 * (2 * 16 * 50 + 32 * 100)
    assert count_cache_bytes(config, 7, torch.bfloat16) == 2 * 2 * (2 * 16 + 32) * 7 * 2


def test_the_row_of_a_token_weighs_long_rows_by_their_tokens():
    assert measure_row_tokens(Counter({10: 3}), None) == 10
    assert measure_row_tokens(Counter({10: 10, 100: 1}), None) == 55
    assert measure_row_tokens(Counter({10: 10, 500: 1}), 100) == 55
    assert measure_row_tokens(Counter(), 100) == 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("Tesla T4", 65),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480),
        ("NVIDIA RTX PRO 4500 Blackwell Server Edition", 209.2),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GH200 480GB", None),
        ("the CPU", None),
    ],
)
def test_peaks_of_the_devices_that_sagemaker_has(name, teraflops):
    peak = find_peak_flops(Device(torch.device("cuda"), name, (9, 0)))
    assert peak == (teraflops * 1e12 if teraflops else None)


def test_the_speed_at_the_peak():
    llama_8b = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    job = plan_job(llama_8b, use_peft=False, max_length=2048)

    def find_peak(passes, job=job):
        with patch.object(MemoryScenario, "untrained_passes", passes):
            return find_peak_tokens_per_second(job, {4096: 1})

    # 8.03e9 weights but 0.53e9 of embeddings, and 12 x 32 layers x 4096 x 2048 tokens.
    assert find_peak(0) == pytest.approx(989.4e12 / (6 * 7.505e9 + 3.22e9), rel=1e-3)
    with_reference, with_divergence = find_peak(1), find_peak(3)
    assert with_reference == pytest.approx(989.4e12 / (8 * 7.505e9 + 3.22e9 * 4 / 3), rel=1e-3)
    assert with_divergence == pytest.approx(989.4e12 / (12 * 7.505e9 + 3.22e9 * 2), rel=1e-3)
    assert find_peak(0, replace(job, target=Target(Device(torch.device("cpu")), 1, 0))) is None


# In a piece of 32 x 32 pixels are 16 patches of 8 x 8 in 3 colours. Two layers of width 32 follow, with 4 matrices of
# attention, 2 of 64 numbers, and attention. The connector makes 4 tokens of the 16.
PIECE = 2 * 16 * 3 * 8 * 8 * 32 + 2 * (2 * 16 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 16 * 16 * 32) + 2 * 4 * (4 * 32) * 32
PATCHES = 2 * 16 * 3 * 8 * 8 * 32  # whose pixels need no gradient


@pytest.mark.parametrize(
    ("options", "tower"),
    [
        ({"use_peft": False}, PIECE),
        ({"use_peft": False, "train_vision": True}, 3 * PIECE - PATCHES),
        ({"use_peft": False, "train_vision": True, "gradient_checkpointing": True}, 3 * PIECE - PATCHES),
        ({"method": "dpo"}, 2 * PIECE),
    ],
    ids=str,
)
def test_images_take_the_operations_of_the_tower(options, tower):
    processor = build_processor("idefics")
    config = build_config("idefics", processor)
    made, _ = process_images(processor, [processor.image_token], [[Image.new("RGB", (100, 60), "white")]])
    images = replace(RowImages.of({**made, "input_ids": torch.zeros(1, 1)}), mean_share=0.5)
    lengths = {100: 2, 400: 2}
    texts, seen = (replace(plan_job(config, **options), images=each) for each in (None, images))
    of_texts, of_images = (989.4e12 / find_peak_tokens_per_second(job, lengths) for job in (texts, seen))
    num_pieces = made["pixel_values"].shape[1]
    assert of_images - of_texts == pytest.approx(num_pieces * 0.5 * tower / 250, rel=1e-6)


def test_operations_of_a_tower_that_asks_for_numbers_are_not_known(monkeypatch):
    processor = build_processor("idefics")
    job = plan_job(build_config("idefics", processor))
    monkeypatch.setattr("llm_trainer.model.memory.flops.trace_tower", Mock(side_effect=UnknownShapeError("numbers")))
    assert find_peak_tokens_per_second(job, {100: 1}) is None
