# SPDX-License-Identifier: Apache-2.0
"""A model with Liger's kernels has the loss and the gradients of the plain one. Needs a GPU and liger-kernel."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.liger_families import build_families

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here, and Triton kernels run on nothing else", allow_module_level=True)
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed here")
kernels = pytest.importorskip("llm_trainer.model.liger", exc_type=ImportError)

BASE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = build_families(num_experts=8, window=32, **BASE)

FUSED_EXPERTS = {"qwen3-moe", "mixtral"}  # of these Liger also has the experts in one kernel


def build(name, dtype=torch.float32, fused=False):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model = model.to("cuda", dtype).train()
    if fused:
        kernels.apply_liger(model, {})
        assert any("Liger" in module._get_name() for module in model.modules())
    return model


def loss_and_gradients(model):
    """In float32: the loss, and the gradient of every parameter by its name."""
    torch.manual_seed(1)
    tokens = torch.randint(512, (2, 100), device="cuda")
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return loss.float(), gradients


def distance(gradients, reference):
    """The largest distance of a parameter's gradient, as a share of that gradient."""
    assert gradients.keys() == reference.keys()
    return max(((gradients[name] - own).norm() / own.norm().clamp(min=1e-6)).item() for name, own in reference.items())


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - FUSED_EXPERTS))
def test_float32_agrees(name):
    check_float32(name, 1e-3)


def check_float32(name, tolerance):
    plain_loss, plain = loss_and_gradients(build(name))
    fused_loss, fused = loss_and_gradients(build(name, fused=True))
    torch.testing.assert_close(fused_loss, plain_loss, rtol=1e-5, atol=1e-5)
    assert distance(fused, plain) < tolerance


@pytest.mark.parametrize(
    "name", sorted(CONFIGS.keys() - {*FUSED_EXPERTS, "gpt-oss"})
)  # rounding moves tokens to other experts
def test_bfloat16_is_as_near_to_float32_as_without_liger(name):
    exact_loss, exact = loss_and_gradients(build(name))
    plain_loss, plain = loss_and_gradients(build(name, torch.bfloat16))
    fused_loss, fused = loss_and_gradients(build(name, torch.bfloat16, fused=True))
    assert abs(fused_loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 5e-3
    assert distance(fused, exact) <= 2 * distance(plain, exact) + 1e-2


def test_a_model_on_the_cpu_still_runs_beside_one_with_liger():
    """As when a quantized base is merged after the training, in the same process."""
    build("llama", fused=True)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]), attn_implementation="eager")
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", ["qwen3-moe"])
def test_fused_experts_agree_as_far_as_their_products_are_exact(name):
    """Triton multiplies float32 in TF32, which keeps 11 bits. The kernel tries its variants for two minutes."""
    check_float32(name, 10 * 2**-11)
