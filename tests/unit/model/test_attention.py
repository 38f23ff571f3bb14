# SPDX-License-Identifier: Apache-2.0
"""The attention kernel: the fastest that computes this model's attention, for devices that are not here too."""

from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3MoeConfig,
)

from llm_trainer.common.errors import UserError
from llm_trainer.model.attention import KERNELS, PACKAGES, choose_attention, find_faults, find_obstacle, read_needs
from llm_trainer.model.device import Device
from llm_trainer.model.loading import build_skeleton
from support.tiny_image_models import build_tiny_config

GPU = torch.device("cuda", 0)
DEVICES = {
    "T4": Device(GPU, "Tesla T4", (7, 5)),
    "A100": Device(GPU, "NVIDIA A100", (8, 0)),
    "L40S": Device(GPU, "NVIDIA L40S", (8, 9)),
    "H100": Device(GPU, "NVIDIA H100", (9, 0)),
    "B200": Device(GPU, "NVIDIA B200", (10, 0)),
    "RTX 5090": Device(GPU, "NVIDIA RTX 5090", (12, 0)),
    "CPU": Device(torch.device("cpu")),
}
SMALL = {"vocab_size": 300, "num_hidden_layers": 2}
CONFIGS = {  # with the heads of the real models
    "llama": LlamaConfig(**SMALL, hidden_size=512, num_attention_heads=4),
    "gemma2 9B": Gemma2Config(**SMALL, hidden_size=512, num_attention_heads=2, num_key_value_heads=1, head_dim=256),
    "gemma2 27B": Gemma2Config(**SMALL, hidden_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=128),
    "gemma3": Gemma3TextConfig(**SMALL, hidden_size=512, num_attention_heads=2, num_key_value_heads=1, head_dim=256),
    "gemma4": Gemma4TextConfig(**{**SMALL, "num_hidden_layers": 6}, hidden_size=512, num_attention_heads=2),
    "gpt-oss": GptOssConfig(**SMALL, hidden_size=512, num_attention_heads=8, head_dim=64, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, hidden_size=512, num_attention_heads=4, head_dim=128, num_experts=8),
    "deepseek-v3": DeepseekV3Config(
        **SMALL, hidden_size=512, num_attention_heads=2, num_key_value_heads=2, first_k_dense_replace=2
    ),
    "gpt2": GPT2Config(vocab_size=300, n_layer=2),
    "short heads": LlamaConfig(**SMALL, hidden_size=32, num_attention_heads=4),
    "odd heads": LlamaConfig(**SMALL, hidden_size=400, num_attention_heads=4),
    "large heads": LlamaConfig(**SMALL, hidden_size=416, num_attention_heads=2),
    "mamba": MambaConfig(**SMALL, hidden_size=64),
}
ALL = frozenset(PACKAGES)
IMAGE = frozenset({"flash_attention_2", "flex_attention"})  # what the CUDA image carries


@cache
def needs_of(model):
    return read_needs(build_skeleton(model, CONFIGS[model], trust_remote_code=False))


def choose(model, device, installed, dtype=torch.bfloat16, attn_implementation="auto"):
    faults = dict.fromkeys(ALL - installed, "is not installed")
    return choose_attention(needs_of(model), attn_implementation, dtype, DEVICES[device], faults)


@pytest.mark.parametrize(
    ("model_type", "lacks"),
    [
        ("qwen2_5_vl", {"flex_attention"}),
        ("gemma3", set()),
        ("aria", {"flex_attention"}),  # of its decoder
        ("lfm2_vl", {kernel for kernel in KERNELS if "fl" in kernel}),  # of its tower
    ],
)
def test_a_kernel_is_one_of_all_parts_of_a_model_that_sees(model_type, lacks):
    needs = read_needs(build_skeleton("base", build_tiny_config(model_type), trust_remote_code=False))
    assert {*KERNELS} - needs.supported == lacks


@pytest.mark.parametrize(
    ("model", "device", "installed", "kernel"),
    [
        ("llama", "H100", ALL, "flash_attention_3"),
        ("llama", "B200", ALL, "flash_attention_4"),
        ("llama", "A100", ALL, "flash_attention_2"),
        ("llama", "L40S", ALL, "flash_attention_2"),
        ("llama", "RTX 5090", ALL, "flash_attention_2"),
        ("llama", "H100", IMAGE, "flash_attention_2"),
        ("llama", "B200", IMAGE, "flash_attention_2"),
        *[("llama", device, frozenset(), "flash_attention_torch") for device in ("A100", "H100", "B200", "RTX 5090")],
        ("llama", "T4", frozenset(), "sdpa"),
        ("llama", "CPU", frozenset(), "sdpa"),
        ("qwen3-moe", "H100", frozenset(), "flash_attention_torch"),
        ("gemma3", "L40S", frozenset(), "flash_attention_torch"),
        ("deepseek-v3", "H100", frozenset(), "flash_attention_torch"),
        ("gemma2 9B", "H100", frozenset(), "eager"),
        ("gemma4", "H100", frozenset(), "sdpa"),
        ("gpt2", "H100", frozenset(), "sdpa"),
        ("odd heads", "H100", frozenset(), "sdpa"),
        ("odd heads", "H100", IMAGE, "flash_attention_2"),
        ("large heads", "H100", frozenset(), "flash_attention_torch"),
        ("large heads", "L40S", frozenset(), "sdpa"),
        ("large heads", "RTX 5090", frozenset(), "sdpa"),
        ("llama", "T4", ALL, "sdpa"),
        ("llama", "CPU", ALL, "sdpa"),
        ("qwen3-moe", "H100", IMAGE, "flash_attention_2"),
        ("gemma2 9B", "H100", ALL, "flash_attention_3"),
        ("gemma2 9B", "B200", ALL, "flash_attention_2"),  # flash-attention 4 caps no scores for heads of 256 there
        ("gemma2 27B", "B200", ALL, "flash_attention_4"),
        ("gemma2 9B", "A100", frozenset({"flex_attention"}), "eager"),
        ("gemma2 9B", "T4", ALL, "eager"),
        ("gemma2 9B", "CPU", ALL, "eager"),
        ("gemma3", "A100", IMAGE, "flash_attention_2"),
        ("gemma3", "B200", ALL, "flash_attention_4"),
        ("gemma4", "H100", ALL, "sdpa"),  # some heads are of 512
        ("gpt-oss", "H100", IMAGE, "eager"),
        ("gpt-oss", "H100", ALL, "flash_attention_4"),
        ("gpt-oss", "A100", ALL, "eager"),
        ("gpt-oss", "A100", frozenset(), "eager"),
        ("gpt-oss", "CPU", ALL, "eager"),
        ("deepseek-v3", "H100", ALL, "flash_attention_3"),
        ("deepseek-v3", "B200", ALL, "flash_attention_2"),  # values are padded to the keys' 192
        ("gpt2", "A100", IMAGE, "flash_attention_2"),
        ("gpt2", "A100", frozenset({"flex_attention"}), "sdpa"),
        ("mamba", "H100", ALL, "eager"),
    ],
)
def test_auto_takes_the_fastest_kernel_that_is_right(model, device, installed, kernel):
    attention = choose(model, device, installed)
    assert attention.name == kernel
    assert str(attention).startswith(f"Attention: {kernel} (auto: the fastest that can run here")


def test_the_log_tells_why_faster_kernels_were_passed_over():
    assert str(choose("gpt-oss", "H100", IMAGE)) == (
        "Attention: eager (auto: the fastest that can run here; flash_attention_3, flash_attention_2, "
        "flash_attention_torch, sdpa: does not know the attention sinks of GptOssForCausalLM; flash_attention_4: is "
        "not installed; flex_attention: compiles anew for rows of other lengths, and is taken only where it is asked "
        "for)"
    )
    assert choose("gpt-oss", "H100", IMAGE, attn_implementation="flex_attention").name == "flex_attention"
    assert str(choose("llama", "H100", ALL)) == "Attention: flash_attention_3 (auto: the fastest that can run here)"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", CONFIGS)
def test_flash_attention_is_not_given_float32(model, device):
    assert not choose(model, device, ALL, dtype=torch.float32).name.startswith("flash")


@pytest.mark.parametrize(
    ("model", "device", "kernel", "dtype", "reason"),
    [
        ("llama", "A100", "flash_attention_3", torch.bfloat16, "is not made for NVIDIA A100 (8.0)"),
        ("llama", "T4", "flash_attention_2", torch.float16, "is not made for Tesla T4 (7.5)"),
        ("llama", "RTX 5090", "flash_attention_4", torch.bfloat16, "is not made for NVIDIA RTX 5090 (12.0)"),
        ("llama", "T4", "flex_attention", torch.float16, "is not made for Tesla T4 (7.5)"),
        ("llama", "CPU", "flex_attention", torch.float32, "needs an NVIDIA GPU"),
        ("llama", "H100", "flash_attention_2", torch.float32, "computes in bfloat16 or float16, not in float32"),
        ("gpt-oss", "H100", "flash_attention_2", torch.bfloat16, "does not know the attention sinks of GptOssForC"),
        ("gpt-oss", "H100", "sdpa", torch.bfloat16, "does not know the attention sinks of GptOssForCausalLM"),
        ("gemma2 9B", "A100", "sdpa", torch.bfloat16, "does not know the soft-capping of Gemma2ForCausalLM"),
        (
            "gemma4",
            "H100",
            "flash_attention_2",
            torch.bfloat16,
            "takes heads of at most 256 and Gemma4ForCausalLM has 5",
        ),
        (
            "short heads",
            "A100",
            "flex_attention",
            torch.bfloat16,
            "takes heads of at least 16 and LlamaForCausalLM has 8",
        ),
        ("gpt2", "A100", "flex_attention", torch.bfloat16, "is not among those of GPT2LMHeadModel"),
        ("mamba", "A100", "sdpa", torch.bfloat16, "is not among those of MambaForCausalLM"),
        ("llama", "CPU", "flash_attention_torch", torch.bfloat16, "needs an NVIDIA GPU"),
        ("llama", "T4", "flash_attention_torch", torch.float16, "is not made for Tesla T4 (7.5)"),
        ("llama", "H100", "flash_attention_torch", torch.float32, "computes in bfloat16 or float16, not in float32"),
        ("gemma2 9B", "H100", "flash_attention_torch", torch.bfloat16, "does not know the soft-capping of Gemma2For"),
        ("gpt-oss", "H100", "flash_attention_torch", torch.bfloat16, "does not know the attention sinks of GptOss"),
        ("mamba", "H100", "flash_attention_torch", torch.bfloat16, "is not among those of MambaForCausalLM"),
        ("gpt2", "H100", "flash_attention_torch", torch.bfloat16, "has no dropout and GPT2LMHeadModel has attention_"),
        ("odd heads", "H100", "flash_attention_torch", torch.bfloat16, "takes heads of a multiple of 8 and LlamaFor"),
        (
            "large heads",
            "L40S",
            "flash_attention_torch",
            torch.bfloat16,
            "takes no heads of 193 to 224 on NVIDIA L40S (8.9) and LlamaForCausalLM has 208",
        ),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_those_that_can(model, device, kernel, dtype, reason):
    with pytest.raises(UserError) as refusal:
        choose(model, device, ALL, dtype, attn_implementation=kernel)
    sentence = str(refusal.value)
    assert sentence.startswith(f"attn_implementation={kernel}: {kernel} {reason}")
    usable = sentence.removesuffix(").").rpartition("can run here (")[2].split(", ")
    assert choose(model, device, ALL, dtype).name == usable[0]
    assert all(choose(model, device, ALL, dtype, attn_implementation=name).name == name for name in usable)


def test_a_kernel_that_is_not_installed_is_refused():
    with pytest.raises(
        UserError, match=r"flash_attention_2 is not installed: .* run here \(flash_attention_torch, sdpa, eager\)\.$"
    ):
        choose("llama", "A100", frozenset(), attn_implementation="flash_attention_2")
    assert find_faults(DEVICES["CPU"])["flash_attention_3"] == "is not installed"


def test_a_package_that_does_not_import_is_told(tmp_path, monkeypatch):
    """As of flash-attn, compiled for another PyTorch."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info/METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    (tmp_path / "flash_attn_4-4.0.0b4.dist-info").mkdir()
    (tmp_path / "flash_attn_4-4.0.0b4.dist-info/METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0b4\n")
    monkeypatch.syspath_prepend(tmp_path)
    faults = find_faults(DEVICES["H100"])
    assert faults["flash_attention_2"] == "cannot be used (undefined symbol: _ZN3c10)"
    assert "flash-attn-4>=4.0.0b36 is required" in faults["flash_attention_4"]
    assert "flash_attention_2" not in find_faults(DEVICES["CPU"])


def test_a_pytorch_without_flash_attention_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    faults = find_faults(DEVICES["H100"])
    assert faults["flash_attention_torch"] == "is not in this build of PyTorch"
    needs = needs_of("llama")
    assert choose_attention(needs, "auto", torch.bfloat16, DEVICES["H100"], faults).name == "sdpa"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert "flash_attention_torch" not in find_faults(DEVICES["H100"])


@pytest.mark.parametrize("model", ["llama", "gemma2 9B", "gemma3", "gpt-oss", "qwen3-moe", "deepseek-v3", "gpt2"])
def test_what_is_said_to_be_right_on_a_cpu_is_so(model):
    """Every kernel that is not refused gives the logits of the model's own plain attention."""
    torch.manual_seed(0)
    config = CONFIGS[model]
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(300, (1, 40))
    expected = reference(input_ids=tokens, use_cache=False).logits
    for kernel in KERNELS:
        if find_obstacle(kernel, needs_of(model), torch.float32, DEVICES["CPU"]) is None:
            reference.set_attn_implementation(kernel)
            torch.testing.assert_close(reference(input_ids=tokens, use_cache=False).logits, expected, rtol=0, atol=2e-5)
