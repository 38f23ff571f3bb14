# SPDX-License-Identifier: Apache-2.0
"""Token ids and labels of whole rows: what is trained on, where a row ends and begins."""

from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.formats.examples import IGNORED, Conversation, Pair, RowError, Text, Tokens
from support.row_parsing import parse
from support.tiny_model import build_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
FORMATS = {Conversation: "messages", Text: "text", Tokens: "pretokenized"}


def build_bos_tokenizer():
    """One that puts BOS before every text, as Llama's does."""
    tokenizer = build_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert tokenizer("abc")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def encode(*examples, tokenizer=None, stop_ids=(), row_format=None, **settings):
    tokenizer = tokenizer or build_tokenizer()
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id, *stop_ids}), len(tokenizer))
    encoder = Encoder(vocabulary, Settings(**settings).data, row_format or FORMATS[type(examples[0])])
    return tokenizer, encoder, encoder.encode(list(examples))


def trained(tokenizer, row):
    return tokenizer.decode([label for label in row.labels.tolist() if label != IGNORED])


def test_the_assistants_turns_and_their_ends_are_trained_on():
    tokenizer, encoder, [row] = encode(Conversation(CHAT * 2))
    assert tokenizer.decode(row.input_ids) == RENDERED * 2
    assert trained(tokenizer, row) == "yo<|im_end|>" * 2
    assert encoder.loss_on == "assistant turns"


def test_all_of_a_conversation_is_trained_on_where_that_is_asked_for():
    _, encoder, [row] = encode(Conversation(CHAT), assistant_only_loss=False)
    assert (row.labels == row.input_ids).all()
    assert encoder.loss_on == "all tokens"


def test_all_of_a_conversation_is_trained_on_where_the_template_does_not_tell_turns():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    _, encoder, [row] = encode(Conversation(CHAT), tokenizer=tokenizer)
    assert (row.labels == row.input_ids).all()
    assert "since the chat template does not tell turns" in encoder.loss_on
    with pytest.raises(UserError, match="does not tell where the assistant's turns end"):
        encode(Conversation(CHAT), tokenizer=tokenizer, assistant_only_loss=True)


def test_a_rendered_text_and_its_conversation_give_the_same_tokens():
    _, _, [chat] = encode(Conversation(CHAT))
    _, _, [text] = encode(Text(RENDERED))
    assert chat.input_ids.tolist() == text.input_ids.tolist()


def test_completions_are_trained_on_from_the_character_where_they_begin():
    tokenizer, encoder, [row] = encode(Text("a: b", 2), row_format="prompt_completion")
    assert tokenizer.decode(row.input_ids) == "a: b<|im_end|>"
    assert trained(tokenizer, row) == " b<|im_end|>"
    assert encoder.loss_on == "completions"
    _, _, [row] = encode(Text("a: b", 2), row_format="prompt_completion", completion_only_loss=False)
    assert (row.labels == row.input_ids).all()
    tokenizer, _, [row] = encode(Conversation(CHAT * 2, None, 3), row_format="prompt_completion")
    assert trained(tokenizer, row) == "yo<|im_end|>"


def test_a_text_ends_in_the_supervised_eos_once():
    tokenizer, _, rows = encode(Text("abc"), Text("abc<|im_end|>"), Text("abc<|im_end|>\n"))
    for row in rows:
        assert row.input_ids.tolist().count(tokenizer.eos_token_id) == 1
        assert tokenizer.eos_token_id in row.labels


def test_another_stop_token_of_the_model_ends_a_row_too():
    tokenizer, _, [row] = encode(Text("abc<|endoftext|>"), stop_ids=[build_tokenizer().unk_token_id])
    assert row.input_ids[-1] == tokenizer.unk_token_id


def test_an_eos_that_is_added_is_trained_on_only_after_a_turn_that_is():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")  # which stops nothing
    _, _, [ends_in_answer, ends_in_question] = encode(
        Conversation(CHAT), Conversation([*CHAT, CHAT[0]]), tokenizer=tokenizer
    )
    for row, label in ((ends_in_answer, tokenizer.eos_token_id), (ends_in_question, IGNORED)):
        assert row.input_ids[-1] == tokenizer.eos_token_id
        assert row.labels[-1] == label


@pytest.mark.parametrize("content", ["abc", "<|im_start|>abc", " <|im_start|>abc"])
def test_bos_is_never_doubled(content):
    tokenizer, _, [row] = encode(Text(content), tokenizer=build_bos_tokenizer())
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    tokenizer, _, [row] = encode(Conversation(CHAT), tokenizer=build_bos_tokenizer())
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == len(CHAT)


def test_the_prompt_stays_the_prompt_behind_an_added_bos():
    tokenizer, _, [row] = encode(Text("abcd", 3), tokenizer=build_bos_tokenizer(), row_format="prompt_completion")
    assert trained(tokenizer, row) == "d<|im_end|>"


def test_mixed_rows_keep_their_order():
    tokenizer, _, rows = encode(Text("one"), Text("<|im_start|>two"), Text("three"))
    decoded = [tokenizer.decode(row.input_ids) for row in rows]
    assert decoded == ["one<|im_end|>", "<|im_start|>two<|im_end|>", "three<|im_end|>"]


def test_tokenized_rows_are_taken_as_they_are():
    _, encoder, [row] = encode(Tokens([5, 6, 7], [IGNORED, 6, 7]))
    assert row.input_ids.tolist() == [5, 6, 7]
    assert row.labels.tolist() == [IGNORED, 6, 7]
    assert encoder.loss_on == "labels"


def test_tokenized_rows_that_the_model_cannot_know_are_bad():
    bos_id = build_tokenizer().bos_token_id
    examples = [
        Tokens([5, 999], [5, 5]),
        Tokens([5, -1], [5, 5]),
        Tokens([5, 6], [5, 999]),
        Tokens([bos_id] * 2, [5, 5]),
    ]
    _, _, rows = encode(*examples)
    assert all(isinstance(row, RowError) for row in rows)
    assert "has the token id 999 among its input_ids and the model's vocabulary ends before 259" in str(rows[0])
    assert "token id -1" in str(rows[1])
    assert "token id 999 among its labels" in str(rows[2])
    assert "begins with two BOS tokens" in str(rows[3])


def test_a_bad_row_leaves_those_around_it():
    tokenizer, _, rows = encode(Conversation(CHAT), Conversation(CHAT[:1]), Conversation(CHAT))
    assert isinstance(rows[1], RowError)
    assert [trained(tokenizer, row) for row in (rows[0], rows[2])] == ["yo<|im_end|>"] * 2


def test_half_a_character_is_told():
    _, _, [row] = encode(Text("a \ud83d b"))
    assert str(row) == "has half a character ('\\ud83d'): write the whole one."


def test_a_loss_that_the_rows_have_no_place_for_is_refused():
    with pytest.raises(UserError, match="assistant_only_loss=true needs conversations and the data has text rows"):
        encode(Text("abc"), assistant_only_loss=True)
    with pytest.raises(UserError, match="completion_only_loss=true needs rows with prompt and completion"):
        encode(Conversation(CHAT), completion_only_loss=True)


def test_conversations_need_a_chat_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode(Conversation(CHAT), tokenizer=tokenizer)


def test_what_a_tokenizers_file_says_of_cutting_and_padding_is_not_followed():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    _, _, [row] = encode(Text("abcdef"), tokenizer=tokenizer)
    assert len(row.input_ids) == 7


def test_a_tokenizer_that_cannot_tell_prompt_from_completion_is_told():
    tokenizer = SimpleNamespace(is_fast=False, chat_template=None)
    vocabulary = Vocabulary(tokenizer, frozenset({0}), 1)
    encoder = Encoder(vocabulary, Settings().data, "prompt_completion")
    assert encoder.loss_on == "all tokens, since the tokenizer has no tokenizer.json"
    with pytest.raises(UserError, match="completion_only_loss=true needs a tokenizer that tells"):
        Encoder(vocabulary, Settings(completion_only_loss=True).data, "prompt_completion")


def test_a_tokenizer_that_panics_is_named():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex("(a+)+$"), "isolated")  # more tries than the library makes
    with pytest.raises(UserError, match=r"tokenizer breaks down over the rows .*: download the model again"):
        encode(Text("a" * 40 + "!"), tokenizer=tokenizer)


def test_nothing_untrained_stands_between_the_turns_end_and_an_eos_that_is_another_token():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as a base has it, whose template's turns end in <|im_end|>
    _, _, [row, open_end] = encode(Conversation(CHAT * 2), Conversation([*CHAT, CHAT[0]]), tokenizer=tokenizer)
    assert tokenizer.decode(row.input_ids) == f"{RENDERED}{RENDERED.rstrip()}<|endoftext|>"
    assert trained(tokenizer, row) == "yo<|im_end|>yo<|im_end|><|endoftext|>"
    assert tokenizer.decode(open_end.input_ids).endswith("hi<|im_end|>\n<|endoftext|>")
    _, _, [whole] = encode(Conversation(CHAT), tokenizer=tokenizer, assistant_only_loss=False)
    assert tokenizer.decode(whole.input_ids) == f"{RENDERED}<|endoftext|>"
    assert (whole.labels == whole.input_ids).all()


TEMPLATES = files("trl").joinpath("chat_templates")
TEXTS = {"prompt": "Is it? ", "chosen": "Yes, it is.", "rejected": "No."}
TOLD = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "no"}]}
WHOLE = {name: [*TOLD["prompt"], *TOLD[name]] for name in ("chosen", "rejected")}


def encode_pair(row, tokenizer=None, **settings):
    """Return the tokenizer, and the two sides of a preference row."""
    tokenizer = tokenizer or build_tokenizer()
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    encoder = Encoder(vocabulary, Settings(method="dpo", **settings).data, "preference")
    [pair] = encoder.encode_pairs([parse(row, method="dpo") if isinstance(row, dict) else row])
    return tokenizer, pair


def prepare_as_trl(row, tokenizer):
    """Return what TRL's own trainer makes of a row: prompt, chosen and rejected ids."""
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vision_dataset=False)
    rows = Dataset.from_list([row])
    [prepared] = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, "train")
    return [prepared[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("template", [None, "qwen3_instruct_2507.jinja", "qwen3.jinja"])
@pytest.mark.parametrize("row", [TEXTS, TOLD, WHOLE], ids=["texts", "messages", "implicit prompt"])
def test_a_pair_has_the_tokens_of_trl(row, template):
    tokenizer = build_tokenizer()
    if template:
        tokenizer.chat_template = TEMPLATES.joinpath(template).read_text(encoding="utf-8")
    _, pair = encode_pair(row, tokenizer)
    prompt, *answers = prepare_as_trl(row, tokenizer)
    for side, answer in zip(pair, answers, strict=True):
        assert side.input_ids.tolist() == prompt + answer
        assert (side.labels[: len(prompt)] == IGNORED).all()
        trained = side.labels[len(prompt) :].tolist()
        # What a template writes behind the end of a turn is trained on where its marks say so.
        assert trained == answer or (trained[:-1] == answer[:-1] and tokenizer.decode(answer[-1]) == "\n")


@given(st.text(), st.text(min_size=1), st.text(min_size=1), st.booleans())
def test_a_side_is_what_its_prompt_and_completion_would_be(prompt, chosen, rejected, is_chat):
    chosen, rejected = f"a{chosen}", f"b{rejected}"
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    rows = [{"prompt": prompt, "completion": answer} for answer in (chosen, rejected)]
    if is_chat:
        question = [{"role": "user", "content": f"?{prompt}"}]
        pair["prompt"] = question
        turns = [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
        rows = [{"prompt": question, "completion": turn} for turn in turns]
    _, sides = encode_pair(pair)
    _, _, imitated = encode(*map(parse, rows), row_format="prompt_completion")
    if isinstance(sides, RowError):
        assert any(isinstance(row, RowError) for row in imitated)
        return
    for side, row in zip(sides, imitated, strict=True):
        assert side.input_ids.tolist() == row.input_ids.tolist()
        assert side.labels.tolist() == row.labels.tolist()


def build_merging_tokenizer():
    """One in which a space joins the word that follows it, and a digit stands alone, as in Qwen's."""
    tokens = ["<eos>", "q", "x", "1", "Ġ", "ĠĠ", "Ġx"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "x"), ("Ġ", "Ġ")]))
    words = Split(Regex(r" ?[a-z]+|\d|\s+(?!\S)|\s+"), "isolated")
    backend.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_prompt_has_the_same_tokens_on_both_sides_whatever_follows():
    tokenizer = build_merging_tokenizer()
    [prompt] = tokenizer(["q  "])["input_ids"]
    alone = [tokenizer(f"q  {answer}")["input_ids"] for answer in ("x", "1")]
    assert all(ids[: len(prompt)] != prompt for ids in alone)  # neither side alone has the prompt of a server
    _, pair = encode_pair({"prompt": "q  ", "chosen": "x", "rejected": "1"}, tokenizer)
    for side in pair:
        assert side.input_ids[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(side.labels != IGNORED)[0] == len(prompt)
        assert side.is_in_pieces


def test_only_what_is_behind_the_prompt_is_trained_on_where_the_template_tells_no_turns():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    _, pair = encode_pair(TOLD, tokenizer)
    assert [trained(tokenizer, side) for side in pair] == ["yo\n<|im_end|>", "no\n<|im_end|>"]
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    _, problem = encode_pair(TOLD, tokenizer)
    assert "(chosen) has a prompt that the model's chat template writes otherwise" in str(problem)


def test_only_assistant_turns_of_an_answer_are_trained_on():
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "end"}]
    tokenizer, (chosen, rejected) = encode_pair({**TOLD, "chosen": [*CHAT[1:], *more]})
    assert trained(tokenizer, chosen) == "yo<|im_end|>end<|im_end|>"
    assert trained(tokenizer, rejected) == "no<|im_end|>"


def test_a_side_that_cannot_be_used_is_named():
    bad = Conversation([{"role": "usr", "content": "a"}, CHAT[1]], num_prompt_messages=1, finds_answer=True)
    _, problem = encode_pair(Pair(Conversation(CHAT, None, 1), bad))
    assert str(problem).startswith("(rejected) has a message 1 with the role 'usr'")


def test_a_pair_needs_a_tokenizer_that_tells_where_the_answer_begins():
    tokenizer = build_tokenizer()
    slow = SimpleNamespace(is_fast=False, chat_template=None)
    with pytest.raises(UserError, match=r"^method=dpo needs a tokenizer that tells which characters a token has"):
        Encoder(Vocabulary(slow, frozenset(), len(tokenizer)), Settings(method="dpo").data, "preference")
