# SPDX-License-Identifier: Apache-2.0
"""The demo of rewards: each prompt has one number to find, and no held-out number is trained on."""

import re
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[3] / "examples/demo"


@pytest.fixture
def reward(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DEMO), *sys.path])
    import reward

    return reward


def test_the_number_to_find_stands_in_the_message(reward):
    chats = [*reward.read_chats("train"), *reward.read_chats("heldout")]
    for chat in chats:
        _, question, answer = (message["content"] for message in chat["messages"])
        assert re.findall(reward.NUMBER, answer) == re.findall(reward.NUMBER, question)[:1]


def test_no_held_out_number_is_trained_on(reward):
    trained, held_out = (
        {chat["messages"][-1]["content"] for chat in reward.read_chats(name)} for name in ("train", "heldout")
    )
    assert not trained & held_out
