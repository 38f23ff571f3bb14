# SPDX-License-Identifier: Apache-2.0
"""Hostile JSON and YAML end in one sentence, at once; ordinary ones are read as ever."""

import os
from pathlib import Path

import pytest

from llm_trainer.common.bounded_parsing import MAX_DEPTH, UnreadableTextError, read_json, read_yaml
from support.hostile_files import LAUGHS

MERGED_LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level}\n  <<: [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


def test_values_are_read_from_files_and_texts(tmp_path):
    file = tmp_path / "file"
    file.write_text('\ufeff{"a": [1, 2.5, true, null, "ü"]}', encoding="utf-8")
    assert read_json(file) == read_yaml(file) == {"a": [1, 2.5, True, None, "ü"]}
    assert read_json(b'"\xc3\xbc"') == read_yaml("ü") == "ü"


def test_yaml_gives_the_values_that_json_has():
    text = "base: &base {x: 1}\nown: {<<: *base, y: 2}\nday: 2024-01-01\ntime: 2024-01-01 10:00:00\n"
    assert read_yaml(text) == {
        "base": {"x": 1},
        "own": {"x": 1, "y": 2},
        "day": "2024-01-01",
        "time": "2024-01-01 10:00:00",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, f"nests more than {MAX_DEPTH} lists and objects"),
        ("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1), f"nests more than {MAX_DEPTH} lists and objects"),
        ("9" * 400, "holds a whole number of more than 64 bits"),
        ("9" * 5_000, "holds a whole number of more than 64 bits"),
        (r'{"a": "\u0000"}', "holds a text with a NUL character"),
        (r'{"\ud83d": 1}', r"holds half a character ('\ud83d')"),
        ("{", "is not valid JSON (Expecting property name"),
        (b"\xff", "is not UTF-8 text"),
        (b" " * 101, "is larger than"),
    ],
)
def test_json_beyond_the_limits_is_refused(text, reason):
    with pytest.raises(UnreadableTextError) as raised:
        read_json(text, "state.json", max_bytes=100 if text == b" " * 101 else 2**20)
    assert raised.value.reason.startswith(reason)
    assert str(raised.value).startswith(f"state.json {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "stands for more than 100000 values"),
        (MERGED_LAUGHS, "stands for more than 100000 values"),
        ("a: &a [*a]", "has an alias that stands for itself ('a')"),
        ("- " * 100_000, f"nests more than {MAX_DEPTH} lists and objects"),
        ("[" * 100_000, f"nests more than {MAX_DEPTH} lists and objects"),
        ("a: 0x" + "f" * 100, "holds a whole number of more than 64 bits"),
        ("a: " + "9" * 5_000, "is not valid YAML (a value is not what"),
        ("a: 0x_", "is not valid YAML (a value is not what"),
        ("a: !!bool x", "is not valid YAML (a value is not what"),
        ("a: !!binary aGk=", "is not valid YAML (could not determine a constructor for the tag"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML (could not determine a constructor for the tag"),
        ("? [a]\n: 1", "is not valid YAML (found unhashable key"),
        ("a: \0", "is not valid YAML"),
        (r'a: "\0"', "holds a text with a NUL character"),
        ("a: 1\n---\nb: 1", "is not valid YAML"),
    ],
)
def test_yaml_beyond_the_limits_is_refused(text, reason):
    with pytest.raises(UnreadableTextError) as raised:
        read_yaml(text, "job.yaml")
    assert raised.value.reason.startswith(reason)


def test_an_error_in_yaml_quotes_nothing_that_may_be_a_secret():
    with pytest.raises(UnreadableTextError) as raised:
        read_yaml("hf_token: hf_secret: 1")
    assert "hf_secret" not in str(raised.value)
    assert "line 1, column 20" in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "none", tmp_path, Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(UnreadableTextError, match="check that it is there and readable"):
            read_yaml(path)
