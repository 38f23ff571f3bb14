# SPDX-License-Identifier: Apache-2.0
"""A script's output reaches the log as it comes, without secrets and otherwise as it is."""

import io
import os

import pytest

from llm_trainer.common.redaction import note_secrets
from llm_trainer.launcher.script_output import KEPT_BYTES, OutputCopier
from support.waiting import wait_until


@pytest.fixture
def copier():
    note_secrets({"token": "hf_0123456789"})
    reader, writer = os.pipe()
    copier = OutputCopier(os.fdopen(reader, "rb"), io.BytesIO())
    copier.start()
    yield copier, os.fdopen(writer, "wb", buffering=0)
    copier.source.close()


def test_secrets_are_hidden_and_all_else_stays(copier):
    copier, pipe = copier
    for part in (b"eval_loss=0.5; hf_01", b"23456789\n\x1b[1m\xff\r", b"10 %\r", b"no end hf_0123456789"):
        pipe.write(part)
    pipe.close()
    copier.join()
    assert copier.target.getvalue() == b"eval_loss=0.5; ***\n\x1b[1m\xff\r10 %\rno end ***" == copier.kept


def test_a_line_without_an_end_is_shown_after_a_while(copier):
    copier, pipe = copier
    pipe.write(b"Continue? ")
    wait_until(lambda: copier.target.getvalue() == b"Continue? ")
    pipe.close()
    copier.join()


def test_the_end_is_kept(copier):
    copier, pipe = copier
    pipe.write(b"a\n" * KEPT_BYTES + b"the end\n")
    pipe.close()
    copier.join()
    assert len(copier.kept) == KEPT_BYTES
    assert copier.kept.endswith(b"a\nthe end\n")
