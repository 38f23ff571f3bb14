# SPDX-License-Identifier: Apache-2.0
"""The log holds whole lines without secrets, of rank 0 where the others have nothing else to say."""

import io

import pytest

from llm_trainer.common import log


@pytest.mark.parametrize(
    ("rank", "every_rank", "is_told"), [("0", False, True), ("1", False, False), ("1", True, True)]
)
def test_other_ranks_speak_only_where_they_are_asked_to(monkeypatch, capsys, rank, every_rank, is_told):
    monkeypatch.setenv("RANK", rank)
    log.info("first", "second", every_rank=every_rank)
    log.warning("beware", every_rank=every_rank)
    assert capsys.readouterr().out == ("first\nsecond\nWarning: beware\n" if is_told else "")


def test_an_error_is_told_by_every_rank_on_standard_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    log.error("broken")
    assert capsys.readouterr() == ("", "broken\n")


def test_secrets_are_hidden_and_carriage_returns_gone(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    log.info("https://me:pass@host took hf_secret", "10%\r20%", "windows\r\nline")
    assert capsys.readouterr().out == "https://***@host took ***\n10% 20%\nwindows\nline\n"


def test_what_the_streams_encoding_lacks_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    log.write_line(stream, "caf\u00e9 \udcff \u2028")
    assert stream.buffer.getvalue() == b"caf\\xe9 \\udcff \\u2028\n"
    monkeypatch.setattr("sys.stdout", stream)
    log.escape_unprintable()
    print("caf\u00e9", flush=True)
    assert stream.buffer.getvalue().endswith(b"caf\\xe9\n")
