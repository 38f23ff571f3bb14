# SPDX-License-Identifier: Apache-2.0
"""Tokens and labels: what is trained on, where a row ends, what happens to rows that are too long."""

import json

import pytest

from llm_trainer import data
from llm_trainer.data import IGNORED, DataReport, Encoder, load_split
from llm_trainer.errors import UserError
from llm_trainer.formats import Example
from llm_trainer.model import choose_pad_token
from llm_trainer.settings import Settings
from tiny_model import build_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
MASKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


def encode(*examples, tokenizer=None, stop_ids=None, **settings):
    tokenizer = tokenizer or build_tokenizer()
    report = DataReport()
    encoder = Encoder(tokenizer, stop_ids or frozenset({tokenizer.eos_token_id}), Settings(**settings))
    rows = [row for batch in encoder.encode(examples, report) for row in batch]
    return tokenizer, rows, report


def chat(messages=CHAT):
    return Example("rows.json row 1", messages, None)


def text(content):
    return Example("rows.json row 1", None, content)


def test_a_conversation_is_rendered_by_the_chat_template_and_trained_on_whole():
    tokenizer, [(ids, labels)], report = encode(chat())
    assert tokenizer.decode(ids) == RENDERED
    assert labels == ids
    assert (report.num_rows, report.num_tokens, report.num_supervised_eos) == (1, len(ids), 1)


def test_a_rendered_text_and_its_conversation_give_the_same_tokens():
    _, [(chat_ids, _), (text_ids, _)], _ = encode(chat(), text(RENDERED))
    assert chat_ids == text_ids


def test_a_plain_text_ends_in_the_supervised_eos():
    tokenizer, [(ids, labels)], _ = encode(text("abc"))
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_an_eos_that_is_there_is_not_doubled():
    tokenizer, rows, _ = encode(text("abc<|im_end|>"), text("abc<|im_end|>\n"))
    assert [ids.count(tokenizer.eos_token_id) for ids, _ in rows] == [1, 1]


def test_another_stop_token_of_the_model_ends_a_row_too():
    tokenizer = build_tokenizer()
    stops = frozenset({tokenizer.eos_token_id, tokenizer.unk_token_id})
    _, [(ids, _)], report = encode(text("abc<|endoftext|>"), tokenizer=tokenizer, stop_ids=stops)
    assert ids[-1] == tokenizer.unk_token_id
    assert report.num_supervised_eos == 1


@pytest.mark.parametrize("content", ["abc", "<|im_start|>abc", " <|im_start|>abc"])
def test_bos_is_never_doubled(content):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert tokenizer("abc")["input_ids"][0] == tokenizer.bos_token_id
    _, [(ids, _)], _ = encode(text(content), tokenizer=tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    _, [(ids, _)], _ = encode(chat(CHAT[:1]), tokenizer=tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_mixed_rows_keep_their_order():
    tokenizer, rows, _ = encode(text("one"), chat(), text("<|im_start|>two"), text("three"))
    decoded = [tokenizer.decode(ids) for ids, _ in rows]
    assert decoded == ["one<|im_end|>", RENDERED, "<|im_start|>two<|im_end|>", "three<|im_end|>"]


def test_long_rows_are_cut_or_left_out_and_counted():
    _, rows, report = encode(text("a" * 50), text("b"), max_length=10)
    assert [len(ids) for ids, _ in rows] == [10, 2]
    assert (report.num_truncated_rows, report.num_dropped_rows, report.longest_row_tokens) == (1, 0, 51)
    _, rows, report = encode(text("a" * 50), text("b"), max_length=10, apply_truncation=False)
    assert [len(ids) for ids, _ in rows] == [2]
    assert (report.num_truncated_rows, report.num_dropped_rows) == (0, 1)
    _, rows, _ = encode(text("a" * 50), max_length=None)
    assert len(rows[0][0]) == 51
    tokenizer, rows, _ = encode(text("a" * 50), max_length=10, truncation_mode="keep_end")
    assert rows[0][0][-1] == tokenizer.eos_token_id


def test_assistant_only_loss_trains_what_the_assistant_says_and_its_end():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MASKING_TEMPLATE
    _, [(ids, labels)], _ = encode(chat(), tokenizer=tokenizer, assistant_only_loss=True)
    assert tokenizer.decode(ids) == RENDERED
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "yo<|im_end|>"


def test_assistant_only_loss_needs_marks_and_conversations():
    with pytest.raises(UserError, match="needs a chat template with"):
        encode(chat(), assistant_only_loss=True)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MASKING_TEMPLATE
    with pytest.raises(UserError, match="needs conversations"):
        encode(text("abc"), tokenizer=tokenizer, assistant_only_loss=True)


def test_messages_without_a_chat_template_are_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode(chat(), tokenizer=tokenizer)


def test_a_template_that_refuses_a_conversation_says_why():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"^rows.json row 1: .* refuses the conversation: roles must alternate"):
        encode(chat(), tokenizer=tokenizer)


def load(tmp_path, rows, tokenizer=None, **settings):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    tokenizer = tokenizer or build_tokenizer()
    stop_ids = frozenset({tokenizer.eos_token_id})
    return load_split("train", [file], tokenizer, stop_ids, Settings(**settings), tmp_path)


def test_a_split_is_on_disk_with_a_fingerprint_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_ROWS", 2)
    dataset, report = load(tmp_path, [{"text": str(number)} for number in range(5)])
    assert [len(row["input_ids"]) for row in dataset] == [2] * 5
    assert report.num_rows == 5
    assert report.files[0]["name"] == "rows.json"
    assert len(report.files[0]["sha256"]) == 64


def test_data_that_leaves_no_rows_fails(tmp_path):
    with pytest.raises(UserError, match="no rows left"):
        load(tmp_path, [{"text": "a" * 50}], max_length=10, apply_truncation=False)
    with pytest.raises(UserError, match="no rows left"):
        load(tmp_path, [])


def test_data_without_a_supervised_token_fails(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MASKING_TEMPLATE
    with pytest.raises(UserError, match="No token of the train data is trained on"):
        load(tmp_path, [{"messages": CHAT[:1]}], tokenizer, assistant_only_loss=True)


def test_data_that_never_trains_the_end_of_sequence_fails(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MASKING_TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.raises(UserError, match="never learn to stop"):
        load(tmp_path, [{"messages": CHAT}], tokenizer, assistant_only_loss=True)


def test_the_pad_token_is_not_the_eos():
    tokenizer = build_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token
    assert choose_pad_token(tokenizer) == "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    assert choose_pad_token(tokenizer) == "<|finetune_right_pad_id|>"


def test_a_tokenizer_with_nothing_but_eos_pads_with_it():
    tokenizer = build_tokenizer()
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.pad_token = tokenizer.eos_token
    assert choose_pad_token(tokenizer) == tokenizer.eos_token
