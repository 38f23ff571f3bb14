# SPDX-License-Identifier: Apache-2.0
"""Trained tokens are the text that is trained on, and its end, in every script and with every kind of tokenizer."""

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.formats.detection import parse_example
from llm_trainer.data.formats.examples import IGNORED
from support.tiny_model import CHAT_TEMPLATE
from support.tokenizer_kinds import BUILDERS, EOS, LETTERS, build_byte_level, build_trimming, build_word_piece, wrap

PARTY = "\N{PARTY POPPER}"


def encode(tokenizer, rows, row_format):
    settings = Settings().data
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    encoder = Encoder(vocabulary, settings, row_format)
    return encoder.encode([parse_example(row, row_format, settings, True) for row in rows])


def decode_trained(tokenizer, row):
    return tokenizer.decode([label for label in row.labels.tolist() if label != IGNORED])


ROWS = {
    "prompt_completion": lambda text: {"prompt": "Mood:", "completion": f" {text}"},
    "messages": lambda text: {"messages": chat(text, "role", "content", "user", "assistant")},
    "sharegpt": lambda text: {"conversations": chat(text, "from", "value", "human", "gpt")},
    "alpaca": lambda text: {"instruction": "Mood?", "output": text},
}


def chat(text, role, content, *names):
    return [{role: name, content: said} for name, said in zip(names * 2, ("a", text, "b", text), strict=True)]


@pytest.mark.parametrize("row_format", ROWS)
@pytest.mark.parametrize("build", BUILDERS)
def test_what_is_trained_on_is_the_answers_text_and_its_end(build, row_format):
    tokenizer = wrap(build())
    rows = encode(tokenizer, [ROWS[row_format](text) for text in LETTERS], row_format)
    for text, row in zip(LETTERS, rows, strict=True):
        turns = 2 if row_format in ("messages", "sharegpt") else 1
        assert decode_trained(tokenizer, row).replace(" ", "") == f"{text}{EOS}" * turns
        assert row.labels[-1] != IGNORED or tokenizer.decode(row.input_ids[-1:]).isspace()


def test_an_emoji_at_the_end_is_trained_on_with_the_end():
    tokenizer = wrap(build_byte_level())
    [row] = encode(tokenizer, [{"prompt": "Mood of: we won\nMood:", "completion": f" {PARTY}"}], "prompt_completion")
    assert decode_trained(tokenizer, row) == f" {PARTY}{EOS}"


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("prompt", ["Mood: ", "Mood:  ", "Mood:\n", "Mood: po", "Mood: 12", "Mood:"])
@pytest.mark.parametrize("completion", ["positive", "34", "\npositive", " positive", "  positive"])
def test_a_prompt_is_tokenized_as_a_server_does(build, prompt, completion):
    """A server sends the prompt alone, and the model answers with the tokens that the answer itself is made of."""
    tokenizer = wrap(build())
    [row] = encode(tokenizer, [{"prompt": prompt, "completion": completion}], "prompt_completion")
    served = tokenizer(prompt)["input_ids"]
    assert row.input_ids[: len(served)].tolist() == served
    assert (row.labels[: len(served)] == IGNORED).all()
    assert (row.labels[len(served) :] != IGNORED).all()
    if build is not build_word_piece:  # whose tokens hold no white space
        assert decode_trained(tokenizer, row) == f"{completion}{EOS}"


def test_rows_in_pieces_are_told_apart():
    tokenizer = wrap(build_byte_level())
    rows = [{"prompt": "Mood: ", "completion": "positive"}, {"prompt": "Mood:", "completion": " positive"}]
    assert [row.is_in_pieces for row in encode(tokenizer, rows, "prompt_completion")] == [True, False]


def test_an_answer_that_begins_with_the_white_space_of_its_turn_is_tokenized_apart():
    tokenizer = wrap(build_trimming())
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    messages = chat("\npositive", "role", "content", "user", "assistant")
    [row] = encode(tokenizer, [{"messages": messages}], "messages")
    assert decode_trained(tokenizer, row) == f"\npositive{EOS}" * 2
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert row.input_ids[: len(prompt)].tolist() == prompt
