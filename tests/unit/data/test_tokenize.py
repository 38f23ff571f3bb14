# SPDX-License-Identifier: Apache-2.0
"""Chunks of raw rows become tokens and labels, on one process or several, and bad rows are told."""

import itertools
import json
import os
import signal
import tarfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Image, List

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import EncodedRow, Encoder, Vocabulary
from llm_trainer.data.formats.examples import IGNORED, RowError
from llm_trainer.data.formats.pictures import IMAGE_MARK
from llm_trainer.data.images.processing import Placeholders
from llm_trainer.data.report import DataReport
from llm_trainer.data.streaming import SourceHead
from llm_trainer.data.tokenize import (
    FEATURES,
    MAX_QUOTED_ROW_CHARACTERS,
    Preparer,
    build_table,
    choose_features,
    find_format,
    parse_fields,
    prepare_chunks,
    prepare_in_pool,
    write_chunks,
)
from llm_trainer.readers.files import read_chunks
from llm_trainer.readers.rows import BadRow, Chunk
from support.file_kinds import load_as_hub, write_kinds
from support.image_rows import build_vocabulary, prepare_rows
from support.tiny_model import build_tokenizer
from support.tiny_processors import KINDS, draw

TOKENIZER = build_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER, frozenset({TOKENIZER.eos_token_id}), len(TOKENIZER))


def build_preparer(row_format="text", **settings):
    chosen = Settings(**settings).data
    return Preparer(Encoder(VOCABULARY, chosen, row_format), chosen, row_format, "a.jsonl row 1")


def build_chunks(num_chunks):
    return [Chunk("a.jsonl", [number], [{"text": "x" * number}]) for number in range(1, num_chunks + 1)]


def test_rows_keep_their_order_and_bad_ones_are_listed_with_place_and_content():
    rows = [{"text": "one"}, b'{"text": "two"}\n', b"{oops", {"text": 3}, BadRow("has the key 'text' twice"), [1]]
    prepared = build_preparer().prepare_chunk(Chunk("a.jsonl", [4, 5, 6, 7, 8, 9], rows))
    texts = [TOKENIZER.decode(ids.as_py()) for ids in prepared.table.column("input_ids")]
    assert texts == ["one<|im_end|>", "two<|im_end|>"]
    assert prepared.report.bad_rows == [
        "a.jsonl line 6 is not valid JSON (Expecting property name enclosed in double quotes at column 2): write one "
        "JSON object a line, or the whole file as one array.",
        "a.jsonl row 7 field 'text' is a number and not a text with something in it: fill or remove the row.",
        "a.jsonl row 8 has the key 'text' twice: mend or remove the row.",
        "a.jsonl row 9 is a JSON list: write each row as an object with named fields.",
    ]
    assert {row["row"]: row["content"] for row in prepared.rejected} == {
        6: "{oops",
        7: '{"text": 3}',
        8: json.dumps(BadRow("has the key 'text' twice"), default=str),
        9: "[1]",
    }


def test_equal_rows_have_equal_digests():
    rows = [(EncodedRow(np.array(ids, np.int32), np.array(ids, np.int32)),) for ids in ([1, 2], [2, 1], [1, 2])]
    first, second, third = build_table(rows, FEATURES).column("digest").to_pylist()
    assert first == third != second
    for method in ("sft", "dpo", "kto", "reward", "grpo"):
        features = choose_features(Settings(method=method).data)
        empty = build_table([], features)
        assert (empty.num_rows, empty.column_names) == (0, [*features])


def test_the_format_is_that_of_the_first_row_that_tells_it():
    chunks = [Chunk("a.jsonl", [1, 2], [{"question": 1}, b"oops"]), Chunk("a.jsonl", [3], [{"text": "a"}])]
    seen, row_format, place = find_format(iter([*chunks, chunks[0]]), Settings().data)
    assert (seen, row_format, place) == (chunks, "text", "a.jsonl row 3")
    assert find_format(iter(chunks[:1]), Settings().data) == (chunks[:1], None, "")


def test_fields_that_are_not_utf_8_are_told():
    with pytest.raises(RowError, match=r"^line 3 is not UTF-8 text"):
        parse_fields(b'{"a": "\xff"}', 3)


@pytest.mark.parametrize("write", [lambda row: json.dumps(row).encode(), lambda row: row], ids=["line", "cells"])
def test_a_bad_row_is_quoted_without_what_signs_an_address(write):
    row = {
        "messages": [],
        "images": ["https://host/a.png?X-Amz-Signature=5ec2e7&x=5ec2e7", "https://me:5ec2e7@host/b.png"],
    }
    (rejected,) = build_preparer().prepare_chunk(Chunk("a.jsonl", [7], [write(row)])).rejected
    assert (rejected["file"], rejected["row"]) == ("a.jsonl", 7)
    assert json.loads(rejected["content"]) == {"messages": [], "images": ["https://host/a.png", "https://host/b.png"]}


def test_a_long_bad_row_is_quoted_in_part():
    (rejected,) = build_preparer().prepare_chunk(Chunk("a.jsonl", [1], [b"x" * 99_999])).rejected
    assert rejected["content"] == "x" * MAX_QUOTED_ROW_CHARACTERS


@pytest.mark.parametrize("num_processes", [1, 3])
def test_any_number_of_processes_writes_the_same_file_in_order(tmp_path, num_processes):
    report = DataReport()
    prepared = prepare_chunks(build_preparer(), iter(build_chunks(20)), num_processes)
    write_chunks(prepared, FEATURES, tmp_path / "rows.arrow", tmp_path / "rejected.jsonl", report)
    assert Dataset.from_file(str(tmp_path / "rows.arrow"))["length"][:] == list(range(2, 22))
    assert report.num_rows == 20
    assert (tmp_path / "rejected.jsonl").read_text() == ""


def test_without_a_preparer_an_empty_file_is_written(tmp_path):
    nothing = prepare_chunks(None, iter([]), 2)
    write_chunks(nothing, FEATURES, tmp_path / "rows.arrow", tmp_path / "bad.jsonl", DataReport())
    assert len(Dataset.from_file(str(tmp_path / "rows.arrow"))) == 0


def test_a_killed_process_is_told(monkeypatch):
    parent = os.getpid()

    def die(self, chunk):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Preparer, "prepare_chunk", die)
    with pytest.raises(UserError, match=r"^A process that tokenizes was killed, most likely because the host ran out"):
        list(prepare_chunks(build_preparer(), iter(build_chunks(3)), 2))


def test_half_a_character_in_a_name_spoils_only_its_row(tmp_path):
    rows = [{"text": "a"}, json.loads(r'{"\ud800": 1}'), rb'{"\ud800": 1}', {"text": "b"}]
    report = DataReport()
    prepared = build_preparer().prepare_chunk(Chunk("caf\udce9.jsonl", [1, 2, 3, 4], rows))
    write_chunks((each for each in [prepared]), FEATURES, tmp_path / "rows.arrow", tmp_path / "rejected.jsonl", report)
    assert (report.num_rows, report.num_bad_rows) == (2, 2)
    assert all(r"(found: \ud800)" in problem for problem in report.bad_rows)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["file"]) for row in rejected] == [(2, r"caf\udce9.jsonl"), (3, r"caf\udce9.jsonl")]


# A template that shows everything that a row may hold, as JSON.
EVERYTHING = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for message in messages %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


def call(name, arguments):
    return {
        "messages": [
            {"role": "user", "content": "Zürich 東京 \U0001f600?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "content": '{"ok": null}'},
            {"role": "assistant", "content": "yes"},
        ],
        "tools": [
            {"type": "function", "function": {"name": name, "parameters": {key: {"type": "any"} for key in arguments}}}
        ],
    }


TURNS = call("f", {"day": "2024-05-01T10:30:00", "number": None})["messages"]
ARGUMENTS = [
    ({"city": "東京", "days": 3, "number": None}, '{"city": "東京", "days": 3}'),
    ({"days": 2.5, "big": 2**53 + 1}, '{"days": 2.5, "big": 9007199254740993}'),
    ({}, "{}"),
    (
        {"any": [{"a": 1}, {"b": "x", "c": None}, {"b": "y", "d": {"e": [1, None]}}]},
        '{"any": [{"a": 1}, {"b": "x"}, {"b": "y", "d": {"e": [1, null]}}]}',
    ),
    ({"text": '{"kept": null, "as": 1.0}'}, '{"text": "{\\"kept\\": null, \\"as\\": 1.0}"}'),
]
MIXED = [
    ({"n": 1, "when": "2024-05-01"}, '{"n": 1, "when": "2024-05-01"}'),
    ({"n": "two", "m": {"k": None}}, '{"n": "two", "m": {}}'),
    ({"n": [3, {"x": True}]}, '{"n": [3, {"x": true}]}'),
]
TEXT_ARGUMENTS = ['{"n": null, "x": 1.0}', '{"y": "東京"}']
FORMATS = {
    "messages": [call("f", given) for given, _ in ARGUMENTS],
    "mixed": [call("f", given) for given, _ in MIXED],
    "arguments as text": [
        {**call("f", {"n": 1}), "messages": call("f", given)["messages"]} for given in TEXT_ARGUMENTS
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "ü"},
            ],
            "system": system,
        }
        for system in ("be", None)
    ],
    "prompt_completion": [{"prompt": "a ü", "completion": " 5"}, {"prompt": "[1", "completion": '{"a": null}'}],
    "prompt_completion of messages": [{"prompt": TURNS[:1], "completion": TURNS[1:]}],
    "alpaca": [
        {"instruction": "a", "input": "b", "output": "2024-05-02"},
        {"instruction": "007", "input": None, "output": "2024-05-01"},
    ],
    "text": [{"text": "a\n東京", "unused": None}, {"text": "5", "unused": {"a": 1}}],
    "pretokenized": [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
    ],
}


@pytest.fixture
def tokenize(monkeypatch):
    """Texts that a source's rows become, and those that are trained on."""
    monkeypatch.setattr(TOKENIZER, "chat_template", EVERYTHING)

    def tokenize(source, row_format):
        _, found, _ = find_format(itertools.chain.from_iterable(source.read_parts(2)), Settings().data)
        assert found == row_format
        chunks = itertools.chain.from_iterable(source.read_parts(2))
        prepared = [build_preparer(row_format).prepare_chunk(chunk) for chunk in chunks]
        assert [chunk.report.bad_rows for chunk in prepared] == [[]] * len(prepared)
        rows = pa.concat_tables([chunk.table for chunk in prepared]).to_pylist()
        return [
            (TOKENIZER.decode(row["input_ids"]), TOKENIZER.decode([one for one in row["labels"] if one != IGNORED]))
            for row in rows
        ]

    return tokenize


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_give_the_same_tokens_in_every_kind_of_file_and_on_the_hub(tmp_path, name, tokenize, monkeypatch):
    rows, row_format = FORMATS[name], {"mixed": "messages", "arguments as text": "messages"}.get(name, name.split()[0])
    sources = write_kinds(tmp_path, rows, are_mixed=name == "mixed")
    hub = {}
    for file in ("array.json", "lines.jsonl", "saved.parquet"):
        sources[f"Hub {file}"], hub[f"tiny/{file}"] = load_as_hub(tmp_path / file, tmp_path / "cache")
    monkeypatch.setattr("llm_trainer.readers.sources.load_hub_data", lambda name, *_: hub[name])
    for kind in ("lines.jsonl", "saved.parquet", "Hub lines.jsonl"):
        sources[f"{kind} in a stream"] = SourceHead(sources[kind])
    wanted = tokenize(sources["lines.jsonl"], row_format)
    assert len(wanted) == len(rows)
    texts = {kind: tokenize(source, row_format) for kind, source in sources.items()}
    assert {kind: text for kind, text in texts.items() if text != wanted} == {}
    if name in ("messages", "mixed"):
        calls = [f'{{"name": "f", "arguments": {shown}}}' for _, shown in (MIXED if name == "mixed" else ARGUMENTS)]
        assert [trained for _, trained in wanted] == [f"{each}<|im_end|>yes<|im_end|>" for each in calls]


def test_fields_that_nothing_reads_are_counted(monkeypatch):
    rows = [{"text": "a", "sounds": ["b"], "id": 1, "empty": "", "none": None}, {"text": "b", "id": 2}]
    report = build_preparer().prepare_chunk(Chunk("a.jsonl", [1, 2], rows)).report
    assert report.unread_fields == {"sounds": 1, "id": 2}
    rows = [{"instruction": "a", "output": "b", "history": [["c", "d"]], "system": "e"}]
    assert build_preparer("alpaca").prepare_chunk(Chunk("a.jsonl", [1], rows)).report.unread_fields == {}
    monkeypatch.setattr(TOKENIZER, "chat_template", None)  # the text of Alpaca has no place for them
    report = build_preparer("alpaca").prepare_chunk(Chunk("a.jsonl", [1], rows)).report
    assert report.unread_fields == {"history": 1, "system": 1}
    many = [{"text": "a", **{f"k{number}": 1 for number in range(1000)}}]
    assert len(build_preparer().prepare_chunk(Chunk("a.jsonl", [1], many)).report.unread_fields) == 100


def prepare_messages(messages, **fields):
    return build_preparer("messages").prepare_chunk(Chunk("a.jsonl", [1], [{"messages": messages, **fields}]))


ASK = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("asked", "answered", "unread"),
    [
        ({"train": False, "name": "n"}, {"train": True, "weight": 1, "loss": True, "thinking": "t"}, {}),
        ({"train": True}, {}, {"train=true of user messages": 1}),
        ({"loss": True}, {"weight": 0.5}, {"loss=true of user messages": 1, "weight=0.5 of assistant messages": 1}),
        ({}, {"train": True, "weight": 0}, {"train=true of assistant messages": 1}),
        ({"files": ["b"], "none": None}, {}, {"files of user messages": 1}),
        ({}, {"train_detail": [{"end_offset": 1}]}, {"train_detail of assistant messages": 1}),
    ],
)
def test_fields_of_messages_that_nothing_reads_are_counted(monkeypatch, asked, answered, unread):
    monkeypatch.setattr(TOKENIZER, "chat_template", EVERYTHING)
    last = [ASK, {"role": "assistant", "content": "c"}]
    messages = [{**ASK, **asked}, {"role": "assistant", "content": "b", **answered}, *last]
    assert prepare_messages(messages).report.unread_fields == unread


def test_a_field_that_the_template_reads_is_no_unread_one(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", EVERYTHING)
    messages = [{**ASK, "mood": "m"}, {"role": "assistant", "content": "b"}]
    assert prepare_messages(messages).report.unread_fields == {"mood of user messages": 1}
    monkeypatch.setattr(TOKENIZER, "chat_template", EVERYTHING + "{# mood #}")
    assert prepare_messages(messages).report.unread_fields == {}


def test_marks_are_told_where_all_messages_are_trained_on(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", EVERYTHING)
    rows = [{"messages": [{**ASK, "train": True}, {"role": "assistant", "content": "b", "weight": 0}]}]
    preparer = build_preparer("messages", assistant_only_loss=False)
    report = preparer.prepare_chunk(Chunk("a.jsonl", [1], rows)).report
    assert report.unread_fields == {"weight=0 of assistant messages": 1}


def test_history_is_trained_on_before_the_instruction_and_turns_with_train_false_are_not(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", EVERYTHING)
    for history in ([["q", "a"], ["r", "b"]], '[["q", "a"], ["r", "b"]]'):
        row = {"instruction": "s", "input": "", "output": "c", "history": history, "system": "be"}
        prepared = build_preparer("alpaca").prepare_chunk(Chunk("a.csv", [1], [row]))
        text = TOKENIZER.decode(prepared.table.column("input_ids")[0].as_py())
        turns = zip(["system"] + ["user", "assistant"] * 3, ["be", *"qarbsc"], strict=True)
        assert text.replace("\n", "") == "".join(f"<|im_start|>{role}{content}<|im_end|>" for role, content in turns)
        assert decode_trained(prepared) == "a<|im_end|>b<|im_end|>c<|im_end|>"
    (reason,) = (
        build_preparer("alpaca").prepare_chunk(Chunk("a.csv", [1], [{**row, "history": [["q"]]}])).report.bad_rows
    )
    assert reason.startswith("a.csv row 1 field 'history' is not a list of [question, answer]")
    for mark in ({"train": False}, {"weight": 0}, {"loss": False}):
        turns = [("user", "q", {}), ("assistant", "a", mark), ("user", "r", {}), ("assistant", "b", {"train": True})]
        messages = [{"role": role, "content": content, **marks} for role, content, marks in turns]
        prepared = build_preparer("messages").prepare_chunk(Chunk("a.jsonl", [1], [{"messages": messages}]))
        assert decode_trained(prepared) == "b<|im_end|>"


@pytest.mark.parametrize("value", [b"\xff", timedelta(5)])
def test_values_that_json_does_not_have_make_bad_rows(value):
    (reason,) = build_preparer("messages").prepare_chunk(Chunk("a", [1], [call("f", {"x": value})])).report.bad_rows
    assert f"has a message 2 with a value that is a {type(value).__name__}, which JSON does not have" in reason


def decode_trained(prepared):
    (labels,) = prepared.table.column("labels").to_pylist()
    return TOKENIZER.decode([one for one in labels if one != IGNORED])


PREFERENCES = [{"prompt": "Q ", "chosen": "a", "rejected": "bc"}, {"prompt": "Q ", "chosen": "a", "rejected": "a"}]


def prepare_pairs(rows, method="dpo", row_format="preference"):
    settings = Settings(method=method).data
    encoder = Encoder(VOCABULARY, settings, row_format)
    preparer = Preparer(encoder, settings, row_format, "a.jsonl row 1")
    return preparer.prepare_chunk(Chunk("a.jsonl", list(range(1, len(rows) + 1)), rows))


def test_a_pair_is_a_row_with_its_sequences_end_to_end():
    bad = [{"prompt": "Q ", "chosen": "a", "rejected": ""}, {"text": "a"}]
    swapped = {"prompt": "Q ", "chosen": "d", "rejected": "e", "score_chosen": 1, "score_rejected": 2, "note": "x"}
    prepared = prepare_pairs([*PREFERENCES, *bad, swapped])
    first, second = prepared.table.to_pylist()
    assert first["seq_lengths"] == [4, 5]
    assert TOKENIZER.decode(first["input_ids"]) == "Q a<|im_end|>Q bc<|im_end|>"
    assert [label != IGNORED for label in first["labels"]] == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 3
    assert (first["length"], second["length"]) == (9, 8)
    report = prepared.report
    assert (report.num_rows, report.num_equal_pairs, report.num_swapped_pairs, report.num_bad_rows) == (2, 1, 1, 2)
    assert report.unread_fields == {"note": 1}
    assert report.bad_rows[0] == (
        "a.jsonl row 3 field 'rejected' is an empty text and not a text with something in it: fill or remove the row."
    )
    assert report.bad_rows[1].startswith("a.jsonl row 4 is a text row, which method=dpo does not take: set method=sft")


def test_a_judged_answer_is_a_row_with_its_judgement():
    rows = [{"prompt": "Q ", "completion": text, "label": text == "a", "note": "x"} for text in ("a", "bc")]
    prepared = prepare_pairs([*rows, {**rows[0], "label": "so so"}], "kto", "unpaired_preference")
    good, bad = prepared.table.to_pylist()
    assert (good["desirable"], good["seq_lengths"], bad["desirable"], bad["seq_lengths"]) == (True, [4], False, [5])
    assert TOKENIZER.decode(bad["input_ids"]) == "Q bc<|im_end|>"
    report = prepared.report
    assert (report.num_rows, report.num_desirable_rows, report.num_bad_rows) == (2, 1, 1)
    assert (report.chosen_lengths, report.rejected_lengths) == ({2: 1}, {3: 1})
    assert "field 'label' is 'so so', which is not true or false" in report.bad_rows[0]
    assert report.unread_fields == {"note": 2}


def test_kto_makes_two_judged_answers_of_a_pair():
    prepared = prepare_pairs([*PREFERENCES[:1], {"prompt": "Q ", "chosen": "a", "rejected": ""}], "kto")
    texts = {TOKENIZER.decode(row["input_ids"]): row["desirable"] for row in prepared.table.to_pylist()}
    assert texts == {"Q a<|im_end|>": True, "Q bc<|im_end|>": False}
    assert (prepared.report.num_rows, prepared.report.num_bad_rows, len(prepared.rejected)) == (2, 1, 1)


def test_rows_of_another_method_are_told_once():
    chunk = Chunk("a.jsonl", [1, 2, 3], [b"oops", *PREFERENCES])
    with pytest.raises(
        UserError, match=r"^a\.jsonl row 2 is a preference row, which method=sft does not take"
    ) as caught:
        find_format(iter([chunk, chunk]), Settings().data)
    assert len(caught.value.problems) == 1
    mixed = Chunk("a.jsonl", [1, 2], [PREFERENCES[0], {"text": "a"}])
    assert find_format(iter([mixed]), Settings().data)[1] == "text"


def ask_about(*images, answer="A cat."):
    messages = [{"role": "user", "content": "<image>" * len(images)}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [*images]}


@pytest.fixture(params=KINDS)
def seeing(request, tmp_path):
    """What the encoding of rows needs to know of a model that takes images, with pictures in its folder."""
    draw(100, 60).save(tmp_path / "a.png")
    draw(100, 60, seed=1).save(tmp_path / "b.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    (tmp_path / "text.png").write_text("no picture")
    return build_vocabulary(request.param, tmp_path)


def test_bad_images_are_bad_rows_with_file_row_and_reason(seeing, tmp_path):
    names = ["a.png", "cut.png", "text.png", "none.png", "../a.png"]
    rows, report = prepare_rows(seeing, [ask_about(name) for name in names], tmp_path)
    assert (len(rows), report.num_bad_rows) == (1, 4)
    reasons = ["damaged or cut off", "no JPEG, PNG, WebP", "which is not there", "within its channel"]
    for number, (told, reason) in enumerate(zip(report.bad_rows, reasons, strict=True), start=2):
        assert told.startswith(f"a.jsonl row {number} ") and reason in told
    large, report = prepare_rows(seeing, [ask_about("a.png")], tmp_path, max_image_pixels=5999)
    assert not len(large) and "max_image_pixels=5999" in report.bad_rows[0]
    two = {"messages": [{"role": "user", "content": "Equal?"}, {"role": "assistant", "content": "Yes."}]}
    two["images"] = ["a.png", "a.png"]
    many, report = prepare_rows(seeing, [two], tmp_path, max_images_per_row=1)
    assert not len(many)
    assert report.bad_rows == [
        "a.jsonl row 1 has 2 images and max_images_per_row=1: remove some, or raise max_images_per_row."
    ]


def test_the_tokens_of_images_are_told_where_rows_are_left_out(seeing, tmp_path):
    settings = {"max_length": 8, "apply_truncation": False}
    rows, report = prepare_rows(seeing, [ask_about("a.png")], tmp_path, **settings)
    assert (len(rows), report.num_dropped_rows) == (0, 1)
    (picture,) = prepare_rows(seeing, [ask_about("a.png")], tmp_path)[0][0]["pictures"]
    assert report.most_image_tokens == picture["tokens"]


def test_rows_of_one_text_and_other_images_are_no_duplicates(seeing, tmp_path):
    rows, _ = prepare_rows(seeing, [ask_about("a.png"), ask_about("b.png"), ask_about("a.png")], tmp_path)
    first, second, third = rows["digest"]
    assert first == third != second
    assert rows[0]["input_ids"] == rows[1]["input_ids"]


def test_rows_hold_the_place_of_an_image_or_its_bytes_and_never_its_pixels(seeing, tmp_path):
    data = (tmp_path / "a.png").read_bytes()
    rows, _ = prepare_rows(seeing, [ask_about("a.png"), ask_about({"bytes": data, "path": None})], tmp_path)
    (named,), (embedded,) = rows["pictures"]
    assert (named["path"], named["data"]) == (str((tmp_path / "a.png").resolve()), b"")
    assert (embedded["path"], embedded["data"]) == ("", data)
    assert (named["start"], named["tokens"]) == (embedded["start"], embedded["tokens"])


def test_images_for_a_model_of_texts_end_the_job_in_one_sentence(tmp_path):
    draw(9, 9).save(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        prepare_rows(VOCABULARY, [ask_about("a.png")], tmp_path)
    assert error.value.problems == (
        "a.jsonl row 1 has images, and the model takes texts alone: give an image-text model, or remove the images.",
    )


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("reward", {"prompt": "Red?", "chosen": "Yes.", "rejected": "No.", "images": ["a.png"]}),
        ("distill", ask_about("a.png")),
        ("grpo", {"prompt": "Red?", "images": ["a.png"]}),
    ],
)
def test_images_for_a_method_that_takes_none_end_the_job_in_one_sentence(seeing, tmp_path, method, row):
    with pytest.raises(UserError) as error:
        prepare_rows(seeing, [row], tmp_path, method=method, max_bad_rows_fraction=0.9)
    fix = "set method=sft, or remove them."
    assert error.value.problems == (f"a.jsonl row 1 has images, which method={method} does not take: {fix}",)


def test_the_token_of_an_image_in_a_prompt_is_told(seeing, tmp_path):
    token = seeing.images.processor.image_token
    rows, report = prepare_rows(seeing, [{"prompt": "Red"}, {"prompt": f"{token} red"}], tmp_path, method="grpo")
    assert len(rows) == 1
    assert report.bad_rows == [f"a.jsonl row 2 has the text {token} and no image: remove the text."]


def test_the_token_of_an_image_in_a_pretokenized_row_is_told(seeing, tmp_path):
    image, token = seeing.images.image_token_id, seeing.images.processor.image_token
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, image, 6], "labels": [5, IGNORED, 6]}]
    kept, report = prepare_rows(seeing, rows, tmp_path)
    assert len(kept) == 1
    assert report.bad_rows == [f"a.jsonl row 2 has the text {token} and no image: give the image, or remove the text."]


def test_a_processor_may_take_long_for_the_images_of_a_row(seeing, tmp_path, monkeypatch):
    limits = []
    expand = Placeholders.expand

    def look(self, *args):
        limits.append(signal.getitimer(signal.ITIMER_VIRTUAL))
        return expand(self, *args)

    monkeypatch.setattr(Placeholders, "expand", look)
    prepare_rows(seeing, [ask_about("a.png")], tmp_path)
    assert limits == [(0, 0)]


def test_streams_take_no_images(seeing, tmp_path):
    with pytest.raises(UserError, match="which streaming=true does not take"):
        prepare_rows(seeing, [ask_about("a.png")], tmp_path, streaming=True, max_steps=1)


def test_a_model_of_images_without_its_processor_is_told_at_the_first_image(seeing, tmp_path):
    (tmp_path / "processor_config.json").unlink()
    blind = replace(seeing, images=replace(seeing.images))
    text = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]}
    assert prepare_rows(blind, [text], tmp_path)[1].num_rows == 1
    with pytest.raises(UserError, match="has no processor for them"):
        prepare_rows(blind, [ask_about("a.png")], tmp_path)


def test_the_token_of_an_image_without_an_image_is_told(seeing, tmp_path):
    token = seeing.images.processor.image_token
    row = {"messages": [{"role": "user", "content": f"Say {token}"}, {"role": "assistant", "content": "No."}]}
    _, report = prepare_rows(seeing, [row], tmp_path)
    assert f"has the text {token} and no image" in report.bad_rows[0]
    rows, report = prepare_rows(seeing, [row], tmp_path, escape_control_tokens=True)
    assert report.num_rows == 1 and token in seeing.tokenizer.decode(rows[0]["input_ids"])
    row["images"] = ["a.png"]
    row["messages"][0]["content"] = f"<image> {'' if token == '<image>' else token}"
    _, report = prepare_rows(seeing, [row], tmp_path)
    assert report.num_bad_rows == (token != "<image>")


def test_control_tokens_beside_an_image_are_plain_text_if_asked_for(seeing, tmp_path):
    row = ask_about("a.png", answer="No <|im_start|>.")
    rows, _ = prepare_rows(seeing, [ask_about("a.png", answer="No."), row], tmp_path, escape_control_tokens=True)
    plain, escaped = rows
    assert plain["pictures"][0]["tokens"] == escaped["pictures"][0]["tokens"]
    assert seeing.tokenizer.decode(escaped["input_ids"]) == seeing.tokenizer.decode(plain["input_ids"]).replace(
        "No.", "No <|im_start|>."
    )


def test_a_text_with_images_is_tokenized_as_it_is(seeing, tmp_path):
    rows, report = prepare_rows(seeing, [{"text": "See <image> here.", "images": ["a.png"]}], tmp_path)
    assert not report.bad_rows
    (placed,) = rows[0]["pictures"]
    end = placed["start"] + placed["tokens"]
    assert seeing.tokenizer.decode(rows[0]["input_ids"][: placed["start"]]).endswith("See ")
    assert seeing.tokenizer.decode(rows[0]["input_ids"][end:]).startswith(" here.")
    assert set(rows[0]["labels"][placed["start"] : end]) == {-100}
    row = {"text": "See <image> here.", "images": ["a.png"]}
    _, report = prepare_rows(seeing, [row], tmp_path, escape_control_tokens=True)
    assert "which escape_control_tokens=true does not take" in report.bad_rows[0]


@pytest.mark.parametrize("field", ["text", "prompt"])
def test_the_models_own_token_is_the_place_of_an_image_as_trl_writes_it(seeing, tmp_path, field):
    token = seeing.images.processor.image_token
    others = {"completion": " here."} if field == "prompt" else {}
    texts = [f"See {place}{'' if others else ' here.'}" for place in (token, "<image>")]
    rows, report = prepare_rows(seeing, [{field: text, "images": ["a.png"], **others} for text in texts], tmp_path)
    assert not report.bad_rows
    assert rows[0] == rows[1]


def test_a_row_that_hides_or_doubles_its_images_is_a_bad_row(seeing, tmp_path):
    rows = [{**ask_about("a.png"), "image": "b.png"}, ask_about("a.png", answer=IMAGE_MARK), ask_about("a.png")]
    kept, report = prepare_rows(seeing, rows, tmp_path)
    assert (len(kept), report.num_bad_rows) == (1, 2)
    assert "in both columns" in report.bad_rows[0] and "private characters" in report.bad_rows[1]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_images_of_datasets_are_read_from_bytes_and_by_their_path(seeing, tmp_path, kind):
    data = (tmp_path / "a.png").read_bytes()
    given = [{"bytes": data, "path": None}, {"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": "b.png"}]
    rows = Dataset.from_list([ask_about(value) for value in given]).cast_column("images", List(Image()))
    file, table = tmp_path / f"rows.{kind}", rows.data.table  # datasets itself would put the bytes in place of the path
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    chunks = list(read_chunks(file, file.name, 100))
    rows, report = prepare_rows(seeing, [row for chunk in chunks for row in chunk.rows], tmp_path)
    assert not report.bad_rows
    found = [(Path(placed["path"]).name, placed["data"]) for (placed,) in rows["pictures"]]
    assert found == [("", data), ("", data), ("b.png", b"")]


def test_a_member_of_a_shard_is_told_by_its_name(seeing, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        (tmp_path / "1.json").write_text(json.dumps({"messages": ask_about("a.png")["messages"]}))
        shard.add(tmp_path / "1.json", "deep/1.json")
        shard.add(tmp_path / "cut.png", "deep/1.png")
    (chunk,) = read_chunks(tmp_path / "a.tar", "a.tar", 100)
    _, report = prepare_rows(seeing, chunk.rows, tmp_path)
    assert "has the image a.tar:deep/1.png, which is damaged or cut off" in report.bad_rows[0]


def test_a_column_of_images_takes_more_bytes_than_32_bits_count():
    features = choose_features(Settings().data, SimpleNamespace(images=object()))
    assert features.arrow_schema.field("pictures").type.value_type.field("data").type == pa.large_binary()


@dataclass(frozen=True)
class TellThreads:
    """A preparer that tells how many threads torch has in its process."""

    def prepare_chunk(self, chunk):
        return torch.get_num_threads()


def test_torch_has_no_threads_in_forked_processes():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(prepare_in_pool(TellThreads(), iter([1, 2]), 2)) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
