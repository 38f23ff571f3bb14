# SPDX-License-Identifier: Apache-2.0
"""Files become examples whatever their layout, and every bad row is named with its file and number."""

import json

import pytest

from llm_trainer.errors import MAX_FAILURE_CHARACTERS, UserError
from llm_trainer.formats import find_files, read_examples
from llm_trainer.settings import Settings

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TEXT = {"text": "c"}


def examples_of(folder, **settings):
    return list(read_examples(find_files(folder), Settings(**settings)))


def problems_of(folder, **settings):
    with pytest.raises(UserError) as caught:
        examples_of(folder, **settings)
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "c"}\n{"text": "c"}\n'),
        ("a.jsonl", '\n{"text": "c"}\r\n\n{"text": "c"}'),
        ("a.json", '{"text": "c"}\n{"text": "c"}\n'),
        ("a.json", '[{"text": "c"}, {"text": "c"}]'),
        ("a.jsonl", ' \n[\n {"text": "c"},\n {"text": "c"}]'),
        ("a.json", '\ufeff[{"text": "c"}, {"text": "c"}]'),
        ("a.jsonl", '\ufeff{"text": "c"}\n{"text": "c"}\n'),
    ],
)
def test_arrays_and_lines_are_told_apart_by_content(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [example.text for example in examples_of(tmp_path)] == ["c", "c"]


def test_a_folder_is_read_in_order_of_names_with_its_folders_and_without_hidden_files(tmp_path):
    for number, name in enumerate(["b.jsonl", "a/x.json", ".hidden.json", "c.txt", ".h/y.json"]):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": str(number)}))
    assert [example.text for example in examples_of(tmp_path)] == ["1", "0"]
    assert [example.text for example in examples_of(tmp_path / "c.txt")] == ["3"]


def test_messages_come_before_text(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{**CHAT, **TEXT}, {**CHAT, "messages": None, **TEXT}]))
    first, second = examples_of(tmp_path)
    assert first.messages == CHAT["messages"]
    assert second.text == "c"
    assert examples_of(tmp_path, dataset_format="text")[0].text == "c"


def test_fields_may_have_other_names(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"chat": CHAT["messages"]}, {"body": "c"}]))
    first, second = examples_of(tmp_path, messages_field="chat", text_field="body")
    assert first.messages == CHAT["messages"]
    assert second.text == "c"


def test_tool_calls_need_no_content(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"type": "function"}]}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages}]))
    assert examples_of(tmp_path)[0].messages == messages


def test_unreadable_json_is_named_with_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "c"}\n{"text": \n')
    (tmp_path / "b.json").write_text('[{"text": "c"},\n oops]')
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (tmp_path / "d.json").write_bytes(b'["\xff"]')
    first, second, third, fourth = problems_of(tmp_path)
    assert first.startswith("a.jsonl line 2 is not valid JSON")
    assert second.startswith("b.json line 2 is not valid JSON")
    assert third.startswith("c.jsonl line 1 is not UTF-8")
    assert fourth.startswith("d.json is not UTF-8")


def test_unusable_rows_are_named_with_file_number_and_fields(tmp_path):
    rows = [TEXT, {"prompt": "a", "answer": "b"}, {}, {"text": " "}, {"text": 3}, "text", {"messages": []}]
    rows += [{"messages": [{"content": "a"}]}, {"messages": [{"role": "user", "content": None}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = problems_of(tmp_path)
    assert len(problems) == len(rows) - 1
    assert problems[0] == (
        "a.jsonl row 2 has no field 'messages' or 'text' (found: prompt, answer): "
        "rename the field, or name it with messages_field or text_field."
    )
    assert "a.jsonl row 3 has no field" in problems[1]
    assert all(f"row {number}" in problem for number, problem in enumerate(problems, start=2))


def test_many_bad_rows_are_counted_and_the_failure_stays_short(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 5000)
    problems = problems_of(tmp_path)
    text = str(UserError(*problems))
    assert text.startswith("a.jsonl row 1 has no field")
    assert len(text.splitlines()) == 21
    assert len(text[:MAX_FAILURE_CHARACTERS].splitlines()[0]) < MAX_FAILURE_CHARACTERS
