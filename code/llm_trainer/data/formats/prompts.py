# SPDX-License-Identifier: Apache-2.0
"""Prompts that the model completes: a text, or messages for the chat template, and columns to judge completions by."""

from llm_trainer.data.formats.examples import Conversation, Fields, Prompt, RowError, Text
from llm_trainer.data.formats.preferences import as_messages, read_turns
from llm_trainer.data.formats.turns import parse_messages, parse_tools, prepend_system_prompt
from llm_trainer.data.formats.values import describe_value, parse_text

ASKING_FIELDS = (
    "question",
    "problem",
)  # with what a user asks, where there is no prompt: GSM8K, and sets of mathematics
# Columns that no reward gets: TRL takes them for its own, or for images, which no prompt has.
UNUSABLE_COLUMNS = frozenset({"completion", "image", "images", "input_ids"})


def parse_prompt(fields: Fields, has_chat_template: bool) -> Prompt:
    """Parse a row's prompt, and keep its other fields. Raises RowError where it cannot be completed.

    A prompt that is a text is completed as it is. A question is a message of the user, where there is a chat template.
    """
    columns = {name: value for name, value in fields.items() if name not in UNUSABLE_COLUMNS and name != "prompt"}
    name = next(name for name in ("prompt", *ASKING_FIELDS) if fields.get(name) is not None)
    value = read_turns(fields[name])
    if isinstance(value, str):
        text = parse_text(fields, name)
        is_said = name != "prompt" or bool(fields.get("system") or fields.get("tools"))
        if not (is_said and has_chat_template):
            return Prompt(Text(text), columns)
        value = as_messages(text, "user")
    if not isinstance(value, list):
        kind = describe_value(value)
        raise RowError(f"field {name!r} is {kind} and not a text: write a text, or a list of messages.")
    messages = prepend_system_prompt(parse_messages(value, name), fields)
    if messages[-1]["role"] == "assistant":
        raise RowError(f"field {name!r} ends in a message of the assistant: end it where the model is to answer.")
    return Prompt(Conversation(messages, parse_tools(fields.get("tools"))), columns)
