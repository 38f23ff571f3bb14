# SPDX-License-Identifier: Apache-2.0
"""The head of a reward model is told by the config, and reads the tokens that it is asked for."""

import copy

import pytest
import torch
from transformers import AutoConfig, BertConfig, GraniteConfig, LlamaForSequenceClassification

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model.layers.reward_head import (
    check_classifier,
    compute_states,
    describe_rewards,
    find_head,
    is_reward_model,
    read_last_tokens,
)
from llm_trainer.model.loading import LoadOptions, WrongWeightsError, build_skeleton, check_fit, load_model, read_config
from support.adapted_models import LLAMA

ROWS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def build_reward_model():
    torch.manual_seed(0)
    config = copy.deepcopy(LLAMA)
    describe_rewards(config)
    return LlamaForSequenceClassification(config).eval()


def test_a_config_tells_of_a_reward_model(tiny_model):
    plain, rewarding = (read_config(str(tiny_model), Settings().model, is_reward) for is_reward in (False, True))
    assert (is_reward_model(plain), is_reward_model(rewarding)) == (False, True)
    assert rewarding.architectures == ["LlamaForSequenceClassification"]
    assert (rewarding.num_labels, rewarding.problem_type) == (1, "regression")
    skeleton = build_skeleton(str(tiny_model), rewarding, False)
    assert find_head(skeleton) is skeleton.score
    plain_skeleton = build_skeleton(str(tiny_model), plain, False)
    assert find_head(plain_skeleton) is plain_skeleton.lm_head


def test_rewards_are_those_of_transformers_and_of_any_token():
    model = build_reward_model()
    rows = ROWS % model.config.vocab_size
    with torch.no_grad():
        model.config.pad_token_id = None
        own = torch.cat([model(input_ids=row[None]).logits for row in rows])
        states = compute_states(model, input_ids=rows)
        read_last_tokens(model)
        torch.testing.assert_close(model(input_ids=rows).logits, own)
        asked = model(input_ids=rows, ends=torch.tensor([7, 1])).logits
        torch.testing.assert_close(asked, torch.stack([model.score(states[1, 3]), model.score(states[0, 1])]))


def test_a_head_computes_in_its_own_type():
    model = build_reward_model().bfloat16()
    model.score.float()
    read_last_tokens(model)
    assert model(input_ids=ROWS % model.config.vocab_size).logits.dtype == torch.float32


def test_models_that_cannot_give_rewards_are_refused():
    with pytest.raises(UserError, match="is of type granite, for which Transformers has no model with a head"):
        check_classifier("a", GraniteConfig())
    with pytest.raises(UserError, match="is a classifier with 3 labels, and a reward model has one"):
        config = AutoConfig.for_model("llama", num_labels=3)
        config.architectures = ["LlamaForSequenceClassification"]
        check_classifier("a", config)
    encoder = BertConfig(num_hidden_layers=1, is_decoder=True)
    describe_rewards(encoder)
    with pytest.raises(UserError, match="is a BertForSequenceClassification, whose head does not read the last token"):
        build_skeleton("a", encoder, False)


def test_only_a_new_head_may_lack_weights(tiny_model, tmp_path):
    settings, options = Settings().model, LoadOptions(torch.float32, "eager", is_reward=True)
    cpu = torch.device("cpu")
    load_model(str(tiny_model), settings, options, cpu).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), settings, options, cpu)
    assert loaded.config.architectures == ["LlamaForSequenceClassification"]
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification, which gives numbers and no text"):
        read_config(str(tmp_path), settings)
    state = {name: value for name, value in loaded.state_dict().items() if name != "score.weight"}
    loaded.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(WrongWeightsError, match=r"lack 1 tensors of the model, first score\.weight"):
        load_model(str(tmp_path), settings, options, cpu)
    with pytest.raises(WrongWeightsError, match=r"first score\.weight"):
        check_fit(str(tmp_path), read_config(str(tmp_path), settings, True), settings)
    assert check_fit(str(tiny_model), read_config(str(tiny_model), settings, True), settings) == ["lm_head.weight"]
