# SPDX-License-Identifier: Apache-2.0
"""A model that TRL's loss would train wrongly is refused before its first step, whatever its class is called."""

import copy

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification, MambaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from llm_trainer.common.errors import UserError
from llm_trainer.model.layers.reward_head import describe_rewards, read_last_tokens
from llm_trainer.training.batches.batch_facts import use_facts
from llm_trainer.training.loss_check import check_loss, check_rewards
from support.adapted_models import LLAMA
from support.packed_models import LEAK


class ScaledLlama(LlamaForCausalLM):
    """Scales its logits, as TRL cannot know."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 30 * output.logits
        return output


class OtherOutput(LlamaForCausalLM):
    """Has no name that TRL reads."""

    base_model_prefix = "nothing"


def check(model, dtype=torch.float32):
    torch.manual_seed(0)
    use_facts(model.base_model)
    add_fused_lm_head(model, outputs=("log_probs",))
    model.train()
    check_loss(model, 300, torch.device("cpu"), dtype)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [lambda: LlamaForCausalLM(LLAMA), lambda: MambaForCausalLM(LEAK["mamba"])])
def test_a_decoder_passes(build, dtype):
    check(build(), dtype)


def test_the_check_passes_through_the_model_twice():
    """Each pass takes a twentieth of a job's start on a CPU."""
    model, passes = LlamaForCausalLM(LLAMA), []
    model.model.register_forward_hook(lambda _, inputs, output: passes.append(output.last_hidden_state.shape))
    check(model)
    assert len(passes) == 2


def test_logits_that_trl_does_not_compute_are_refused():
    with pytest.raises(UserError, match=r"^TRL's loss of the model is 5\.\d+, and its own logits give \d"):
        check(ScaledLlama(LLAMA))


def test_an_encoder_is_refused():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UserError, match=r"^The model lets a token see those after it"):
        check(BertLMHeadModel(BertConfig(vocab_size=300, **sizes)))


def test_code_that_fails_with_trls_loss_is_refused():
    with pytest.raises(UserError, match=r"^The model does not compute with TRL's loss \(.*last_hidden_state"):
        check(OtherOutput(LLAMA))


class ScaledRewards(LlamaForSequenceClassification):
    """Scales its rewards, as the trainer cannot know."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 30 * output.logits + 1
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewards_are_compared_with_those_of_transformers(dtype):
    config = copy.deepcopy(LLAMA)
    describe_rewards(config)
    for build in (LlamaForSequenceClassification, ScaledRewards):
        model = build(config).train()
        read_last_tokens(model)
        if build is LlamaForSequenceClassification:
            check_rewards(model, 300, torch.device("cpu"), dtype)
        else:
            with pytest.raises(UserError, match="its head does more than that; give another model"):
                check_rewards(model, 300, torch.device("cpu"), dtype)
        assert model.training
