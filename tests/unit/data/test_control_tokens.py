# SPDX-License-Identifier: Apache-2.0
"""A control token that a row holds is counted, or is plain characters, and the template's own stay what they are."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.control_tokens import ControlTokens
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.formats.examples import IGNORED, Conversation, RowError, Text
from support.tiny_model import SPECIAL_TOKENS, build_tokenizer
from support.tokenizer_kinds import BUILDERS, EOS, build_byte_level, build_unigram, build_word_piece, wrap

QUOTE = "write <|im_end|> and <|im_start|>system"
WHOLE_WORDS = (build_unigram, build_word_piece)  # these find the control tokens in their vocabulary of pieces
ANSWER = "it is <|im_end|> so"
QUOTING = Conversation([{"role": "user", "content": QUOTE}, {"role": "assistant", "content": ANSWER}])
CLEAN = Conversation([{"role": "user", "content": "hi  1234\n"}, {"role": "assistant", "content": " yo we won"}])


def encode(tokenizer, *examples, row_format="messages", escape=True, **settings):
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    encoder = Encoder(vocabulary, Settings(escape_control_tokens=escape, **settings).data, row_format)
    return encoder.encode(list(examples))


def count_specials(tokenizer, ids):
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return sum(token in special for token in ids.tolist())


@pytest.mark.parametrize("build", [builder for builder in BUILDERS if builder not in WHOLE_WORDS])
def test_a_quoted_control_token_is_characters_and_the_templates_are_tokens(build):
    tokenizer = wrap(build())
    [row] = encode(tokenizer, QUOTING)
    assert count_specials(tokenizer, row.input_ids) == 4
    [read] = encode(tokenizer, QUOTING, escape=False)
    assert count_specials(tokenizer, read.input_ids) == 7
    plain = tokenizer.decode(row.input_ids, skip_special_tokens=True)
    assert "".join(plain.split()) == "".join(f"user{QUOTE}assistant{ANSWER}".split())
    assert tokenizer.decode(row.labels[row.labels != IGNORED], skip_special_tokens=True) == ANSWER
    assert row.labels[row.labels != IGNORED].tolist()[-1] == tokenizer.eos_token_id


def test_the_characters_are_tokenized_as_the_model_would_write_them():
    tokenizer = wrap(build_byte_level())
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", EOS))
    turns = [f"user\n{QUOTE}", f"assistant\n{ANSWER}"]
    newline = plain.encode("\n").ids
    expected = [[begin, *plain.encode(turn).ids, end, *newline] for turn in turns]
    [row] = encode(tokenizer, QUOTING)
    assert row.input_ids.tolist() == [*expected[0], *expected[1]]


@pytest.mark.parametrize("build", BUILDERS)
def test_a_text_without_quotes_is_tokenized_the_same_with_swapped_marks(build):
    tokenizer = wrap(build())
    tokens = ControlTokens(tokenizer)
    text = "<|im_start|>user\nhi  1234\n<|im_end|>\n<|im_start|>assistant\n yo we won<|im_end|>\n<|endoftext|>"
    own = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    swapped = tokens.for_templates.backend.encode(tokens.swap_marks(text), add_special_tokens=False)
    assert tokens.for_templates.real_ids[swapped.ids].tolist() == own.ids
    assert swapped.offsets == own.offsets


def test_tokens_outside_of_the_vocabulary_of_the_model_keep_their_numbers():
    tokenizer = build_tokenizer()
    added = [AddedToken("<think>", special=False), AddedToken("<extra>", special=True), AddedToken("☃", special=True)]
    tokenizer.add_tokens(added)
    chat = Conversation([{"role": "user", "content": "<think><extra>☃"}, {"role": "assistant", "content": "yo☃"}])
    [row] = encode(tokenizer, chat)
    assert tokenizer.convert_tokens_to_ids("<think>") in row.input_ids  # which is no control token
    assert not {tokenizer.convert_tokens_to_ids(token) for token in ("<extra>", "☃")} & {*row.input_ids.tolist()}
    assert tokenizer.decode(row.input_ids) == (
        "<|im_start|>user\n<think><extra>☃<|im_end|>\n<|im_start|>assistant\nyo☃<|im_end|>\n"
    )


def test_tools_calls_and_thoughts_are_escaped_too():
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": ["<|im_end|>", 1]}}}
    messages = [*QUOTING.messages, {"role": "assistant", "content": "", "reasoning": EOS, "tool_calls": [call]}]
    tokens = ControlTokens(build_tokenizer())
    conversation = Conversation(messages, [{"description": "<|endoftext|>"}], 2)
    assert tokens.find_in_conversation(conversation) == {*SPECIAL_TOKENS}
    marked = tokens.mark_conversation(conversation)
    assert tokens.find_in_conversation(marked) == set()
    assert json.loads(tokens.swap_marks(json.dumps(marked.messages, ensure_ascii=False))) == messages
    assert marked.num_prompt_messages == 2


@pytest.mark.parametrize("content", ["<|im_<|im_end|>end|>", "\ufdd0|im_end|> <|im_end|>", "<|im_end|><|im_end|>"])
def test_no_content_forges_a_control_token(content):
    tokenizer = build_tokenizer()
    [row] = encode(tokenizer, Conversation([{"role": "user", "content": content}, CLEAN.messages[1]]))
    assert count_specials(tokenizer, row.input_ids) == 4


def test_a_template_that_splits_at_a_control_token_does_not_split_a_quote():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] }}", "message['content'].split('<|im_start|>')[0] }}"
    )
    [row] = encode(tokenizer, QUOTING)
    assert QUOTE in tokenizer.decode(row.input_ids)


@pytest.mark.parametrize("row_format", ["text", "prompt_completion"])
def test_all_of_a_text_is_characters(row_format):
    tokenizer = build_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    [row] = encode(tokenizer, Text(f"<|im_start|>{QUOTE}", 14), row_format=row_format)
    assert tokenizer.decode(row.input_ids) == f"<|im_start|><|im_start|>{QUOTE}{EOS}"
    assert count_specials(tokenizer, row.input_ids) == 2
    assert not tokenizer.backend_tokenizer.encode_special_tokens


@pytest.mark.parametrize("build", WHOLE_WORDS)
def test_a_vocabulary_that_has_control_tokens_among_its_pieces_makes_a_bad_row(build):
    bad, clean = encode(wrap(build()), QUOTING, CLEAN)
    assert isinstance(bad, RowError)
    assert "has a control token in a text, which this tokenizer cannot write in characters" in str(bad)
    assert not isinstance(clean, RowError)


def test_what_is_not_escaped_is_told():
    counting, clean = encode(build_tokenizer(), QUOTING, CLEAN, escape=False)
    assert counting.control_tokens == {"<|im_end|>", "<|im_start|>"}
    assert clean.control_tokens == frozenset()
    assert encode(build_tokenizer(), QUOTING)[0].control_tokens == frozenset()
    [text] = encode(build_tokenizer(), Text(QUOTE), row_format="text", escape=False)
    assert text.control_tokens == frozenset()  # whoever writes whole texts writes control tokens, too


def test_tokens_cannot_be_escaped():
    with pytest.raises(UserError, match="needs rows with texts and the data has pretokenized rows"):
        encode(build_tokenizer(), row_format="pretokenized")
