# SPDX-License-Identifier: Apache-2.0
"""Whatever ends the launcher, output/failure says so in a sentence."""

import errno
import os
import subprocess
import sys

import pytest

from llm_trainer.common.errors import MAX_FAILURE_CHARACTERS
from llm_trainer.launcher.last_words import run_to_an_answer
from support.sagemaker_tree import LLM_TRAINER
from support.small_disk import small_disk
from support.waiting import GUARD_SECONDS


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    return tmp_path


def fall(depth: int) -> int:
    return fall(depth + 1)


def throw(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: fall(0), "The launcher failed with RecursionError: maximum recursion depth exceeded"),
        (lambda: throw(MemoryError()), "The launcher ran out of the host's memory (MemoryError): use an instance with"),
        (lambda: throw(SystemExit(0)), "The launcher failed with SystemExit: 0 (the traceback is in the log"),
        (lambda: throw(KeyboardInterrupt()), "The launcher failed with KeyboardInterrupt: KeyboardInterrupt ("),
        (lambda: throw(OSError(28, "No space left on device", "/tmp/x")), "The launcher found no space on the disk of"),
        (lambda: "\ud800".encode() and 0, r"The launcher failed with UnicodeEncodeError: 'utf-8' codec can't encode"),
        (lambda: throw(ValueError("a\0b\udcff" + "c" * 9999)), r"The launcher failed with ValueError: a\x00b\udcffcc"),
    ],
    ids=["recursion", "memory", "exit", "interrupt", "disk", "unicode", "characters"],
)
def test_it_is_a_sentence_whatever_was_raised(base_dir, capfd, run, sentence):
    assert run_to_an_answer(run) == 1
    failure = (base_dir / "output/failure").read_text(encoding="utf-8")
    assert failure.startswith(sentence)
    assert len(failure) <= MAX_FAILURE_CHARACTERS
    assert "Traceback" not in failure
    assert sentence[:40] in capfd.readouterr().err
    (traceback,) = (base_dir / "output/data/failures").glob("*-launcher.txt")
    assert traceback.read_text().startswith("Traceback")
    assert not (base_dir / "output/.failure").exists()


def test_an_exit_code_is_handed_on_and_nothing_is_left(base_dir):
    assert run_to_an_answer(lambda: 0) == 0
    assert list((base_dir / "output").iterdir()) == []


def test_a_package_that_cannot_be_imported_is_told_of(base_dir, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "llm_trainer.job.failure_reasons", None)
    assert run_to_an_answer(lambda: throw(ImportError("no such symbol"))) == 1
    assert (base_dir / "output/failure").read_text() == (
        "The launcher failed with ImportError: the log has the traceback."
    )
    assert "no such symbol" in capfd.readouterr().err


def test_the_failure_file_is_written_on_a_disk_that_is_full(base_dir):
    def fill() -> int:
        (base_dir / "output/filler").write_bytes(bytes(10**6))
        return 0

    with small_disk(base_dir / "output", 256):
        assert run_to_an_answer(fill) == 1
        assert (base_dir / "output/failure").read_text().startswith("The launcher found no space on the disk of")


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_name_that_the_logs_encoding_lacks_ends_nothing(base_dir, command):
    (base_dir / "input/data/train").mkdir(parents=True)
    (base_dir / "input/config").mkdir()
    (base_dir / "input/config/hyperparameters.json").write_text('{"lora_rnak\\u00e9": "\\u2028"}')
    (base_dir / os.fsdecode(b"input/data/tr\xe9\xff")).mkdir()
    result = subprocess.run(
        [LLM_TRAINER, command],
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
        capture_output=True,
        timeout=GUARD_SECONDS,
        check=False,
    )
    assert result.returncode == 1
    assert b"lora_rnak\\xe9" in result.stdout + result.stderr
    assert b"Traceback" not in result.stdout + result.stderr
    if command == "train":
        assert "lora_rnaké" in (base_dir / "output/failure").read_text(encoding="utf-8")


def test_a_folder_on_a_read_only_file_system_is_no_crash(base_dir, capsys):
    def refuse():
        raise OSError(errno.EROFS, "Read-only file system", "/opt/ml/output/failure")

    assert run_to_an_answer(refuse) == 1
    reason = "may not write /opt/ml/output/failure, which is on a read-only file system: mount it writable."
    assert reason in (base_dir / "output/failure").read_text()
    assert "Traceback" not in capsys.readouterr().out
