# SPDX-License-Identifier: Apache-2.0
"""Each attention kernel that is there computes what eager attention in float32 does, forward and backward."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from support.attention_kernels import KERNELS, find_lack

BASE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 64,
}
CONFIGS = {
    "causal": LlamaConfig(**BASE, num_key_value_heads=8),
    "grouped-query": LlamaConfig(**BASE, num_key_value_heads=2),
    "sliding-window": MistralConfig(**BASE, num_key_value_heads=2, sliding_window=64),
}
SHAPE = (2, 300)  # no multiple of a kernel's block
# Share of the reference's norm. bfloat16 rounds to 0.4 %, and each of some ten operations of a layer rounds.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


def build_model(config, kernel: str, dtype: torch.dtype, device: torch.device):
    torch.manual_seed(0)
    config = type(config)(**config.to_dict())  # a model writes its kernel into its config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel)
    return model.to(device=device, dtype=dtype)


def draw_tokens(device: torch.device) -> torch.Tensor:
    return torch.randint(BASE["vocab_size"], SHAPE, generator=torch.Generator().manual_seed(1)).to(device)


def run(config, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the embeddings, in float32."""
    model, tokens = build_model(config, kernel, dtype, device), draw_tokens(device)
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    return output.logits.detach().float(), model.get_input_embeddings().weight.grad.float()


@torch.no_grad()
def run_padded(config, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of rows that are padded at the left, and of one more token each, whose keys are in a cache, in float32."""
    model, tokens = build_model(config, kernel, dtype, device), draw_tokens(device)
    mask = torch.ones_like(tokens)
    mask[1, : SHAPE[1] // 3] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    first = {name: value[:, :-1] for name, value in (("attention_mask", mask), ("position_ids", positions))}
    output = model(input_ids=tokens[:, :-1], **first, use_cache=True)
    more = {"attention_mask": mask, "position_ids": positions[:, -1:], "past_key_values": output.past_key_values}
    following = model(input_ids=tokens[:, -1:], **more, use_cache=True).logits
    return output.logits[first["attention_mask"].bool()].float(), following.float()


def check_distances(name: str, kernel: str, dtype: torch.dtype, found, expected, subjects: tuple[str, str]) -> None:
    for subject, ours, reference in zip(subjects, found, expected, strict=True):
        distance = ((ours - reference).norm() / reference.norm()).item()
        print(f"{name} {kernel} {dtype}: {subject} off by {distance:.2g}")
        assert distance <= TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_eager_attention_in_float32(name, kernel, device):
    if lack := find_lack(kernel, device):
        pytest.skip(lack)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found, expected = run(CONFIGS[name], kernel, dtype, device), run(CONFIGS[name], "eager", torch.float32, device)
    check_distances(name, kernel, dtype, found, expected, ("logits", "gradient"))


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "flex_attention"])  # it compiles anew
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_a_cache_change_nothing(name, kernel, device):
    if lack := find_lack(kernel, device):
        pytest.skip(lack)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = CONFIGS[name]
    found, expected = run_padded(config, kernel, dtype, device), run_padded(config, "eager", torch.float32, device)
    check_distances(name, kernel, dtype, found, expected, ("logits", "next logits"))


def test_a_sliding_window_is_told_from_none(device):
    """What the comparison above could not fail by: the window changes the logits of the tokens beyond it."""
    sliding, _ = run(CONFIGS["sliding-window"], "eager", torch.float32, device)
    config = MistralConfig(**{**CONFIGS["sliding-window"].to_dict(), "sliding_window": None})
    whole, _ = run(config, "eager", torch.float32, device)
    torch.testing.assert_close(sliding[:, :64], whole[:, :64], rtol=1e-3, atol=1e-3)
    assert (sliding - whole)[:, 64:].norm() / whole[:, 64:].norm() > TOLERANCE[torch.bfloat16]
