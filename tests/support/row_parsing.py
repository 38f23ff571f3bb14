# SPDX-License-Identifier: Apache-2.0
"""Rows as tests give them, parsed as a job parses them."""

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.data.formats.detection import detect_format, parse_example
from llm_trainer.data.formats.examples import RowError

ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
CHAT = [ASK, ANSWER]


def parse(fields, has_chat_template=True, **settings):
    """Return the example that a row becomes."""
    chosen = Settings(**settings).data
    return parse_example(fields, detect_format(fields, chosen), chosen, has_chat_template)


def problem_of(fields, **settings):
    """Return what is said about a row that cannot be used."""
    with pytest.raises(RowError) as caught:
        parse(fields, **settings)
    return str(caught.value)
