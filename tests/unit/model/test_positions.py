# SPDX-License-Identifier: Apache-2.0
"""No row is longer than a model's table of positions, and the table is found wherever a model fails without it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_trainer.cli.validate import bound_rows
from llm_trainer.cli.validation import Validation
from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model.positions import bound_length, count_positions, find_length_warnings
from support.tiny_architectures import build_tiny_config

LIMIT = 128  # of the tiny models
TABLES = ("gpt2", "gpt_bigcode", "opt", "biogpt", "bart", "openai-gpt", "ctrl", "mpt", "gptj", "codegen")
COMPUTED = ("llama", "mistral", "gemma2", "gemma4_text", "gpt_neox", "falcon", "bloom", "xglm", "mamba")


def build(kind, device="cpu"):
    config = build_tiny_config(kind)
    if kind in ("gptj", "codegen"):
        config.rotary_dim = 8
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def takes(model, num_tokens):
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, num_tokens), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", [*TABLES, *COMPUTED])
def test_the_limit_is_the_longest_row_that_the_model_computes(kind):
    """Of OPT, BioGPT and BART, whose tables begin with two other rows, too."""
    limit = count_positions(build(kind, "meta"))
    assert limit == (LIMIT if kind in TABLES else None)
    model = build(kind)
    assert takes(model, LIMIT)
    assert takes(model, LIMIT + 1) == (limit is None)


def test_an_embedding_that_happens_to_have_as_many_rows_is_no_table():
    model = build("llama", "meta")
    model.embed_other = torch.nn.Embedding(LIMIT, 4, device="meta")
    assert count_positions(model) is None


def test_the_default_length_stays_within_the_table():
    bounded = bound_length(Settings().data, 1024)
    assert bounded.max_length == 1024
    assert not bounded.is_given("max_length")
    assert bound_length(Settings().data, 4096).max_length == 2048
    assert bound_length(Settings(max_length=None).data, None).max_length is None
    assert bound_length(Settings(max_length=1024).data, 1024).max_length == 1024


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"max_length": 1025},
            "max_length=1025 and the model has a table of 1024 positions: give at most max_length=1024",
        ),
        ({"max_length": None}, "max_length=null and the model has a table of 1024 positions"),
        ({"pad_to_multiple_of": 1000}, "pads rows of max_length=1024 to 2000 tokens and the model has a table of 1024"),
    ],
)
def test_settings_that_exceed_the_table_are_refused(given, problem):
    with pytest.raises(UserError) as refusal:
        bound_length(Settings(**given).data, 1024)
    assert problem in str(refusal.value)


def test_rows_beyond_computed_positions_are_a_warning():
    config = AutoConfig.for_model("llama", max_position_embeddings=4096)
    assert list(find_length_warnings(config, 9000, 4096)) == []
    (warning,) = find_length_warnings(config, 9000, None)
    assert "rows have up to 9000 tokens and the model's config names 4096" in warning


def test_validate_refuses_a_length_that_the_table_does_not_have():
    validation = Validation()
    assert bound_rows(1024, Settings(), validation).max_length == 1024
    assert validation.findings == []
    bound_rows(1024, Settings(max_length=4096), validation)
    assert "at most max_length=1024" in validation.list_texts("error")[0]
