# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md quotes what a job really says, and knows every kind of failure while a job trains."""

import ast
import errno
import re

import pytest

from llm_trainer.job.failure_reasons import explain
from support.documents import DOCS
from support.measures import CODE

PAGE = DOCS / "troubleshooting.md"
DOTS = "..."
SENTENCE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def read_texts() -> list[str]:
    """Return every text of the code, with three dots in place of what a program puts in."""
    texts = []
    for file in CODE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (value.value if isinstance(value, ast.Constant) else DOTS for value in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{[^{}]*\}", DOTS, node.value))
    return texts


def test_every_sentence_that_it_quotes_is_in_the_code():
    texts = read_texts()
    sentences = SENTENCE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(sentences) > 25
    missing = []
    for sentence in sentences:
        for fragment in filter(None, (part.strip(" ():;,.") for part in sentence.split(DOTS))):
            if not any(fragment in text for text in texts):
                missing.append(fragment)
    assert missing == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        MemoryError("no memory"),
        RuntimeError("unable to open shared memory segment </torch_1>"),
        RuntimeError("DataLoader worker (pid 7) exited unexpectedly"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("The NVIDIA driver on your system is too old"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("can't start new thread"),
        RuntimeError("[gloo/transport/tcp/pair.cc] Gloo connect failed"),
        ValueError("something else"),
    ],
    ids=str,
)
def test_it_knows_what_a_worker_says(error):
    reason = explain(error, "Rank 0", None).reason.removeprefix("Rank 0 ")
    beginnings = [sentence.removeprefix(f"{DOTS} ") for sentence in SENTENCE.findall(PAGE.read_text(encoding="utf-8"))]
    known = [beginning.split(DOTS)[0].rstrip(" (") for beginning in beginnings]
    assert [words for words in known if words and reason.startswith(words)], reason
