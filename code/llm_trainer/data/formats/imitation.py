# SPDX-License-Identifier: Apache-2.0
"""Rows to imitate, the formats of method=sft: their fields become an example."""

import itertools
from typing import Any

from llm_trainer.data.formats.examples import IGNORED, Conversation, Fields, RowError, Text, Tokens
from llm_trainer.data.formats.turns import parse_messages, parse_tools, prepend_system_prompt
from llm_trainer.data.formats.values import describe_value, parse_json_text, parse_text

TURN_ROLES = ("user", "assistant")
TRAINED_MASKS = ("completion_mask", "assistant_masks")  # as TRL writes them
TOKEN_FIELDS = ("input_ids", "labels", "attention_mask", *TRAINED_MASKS)

# Prompts with which Alpaca's authors trained, for a model that has no chat template.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA_PLAIN = f"{ALPACA_TASK}. {ALPACA_REQUEST}### Response:\n"
ALPACA_WITH_INPUT = (
    f"{ALPACA_TASK}, paired with an input that provides further context. {ALPACA_REQUEST}"
    "### Input:\n{input}\n\n### Response:\n"
)


def parse_tokens(fields: Fields) -> Tokens:
    """Parse a pretokenized row, without its padding. Raises RowError where lengths differ or no token is left.

    Without labels, TRL's masks tell what is trained on, and without these all is.
    """
    columns = {name: parse_ids(fields, name) for name in TOKEN_FIELDS if fields.get(name) is not None}
    input_ids = columns["input_ids"]
    if any(len(values) != len(input_ids) for values in columns.values()):
        lengths = ", ".join(f"{name} of {len(values)}" for name, values in columns.items())
        raise RowError(f"has {lengths}: they must be of one length.")
    masks = [columns[name] for name in TRAINED_MASKS if name in columns]
    labels = columns.get("labels") or [
        token if all(trained) else IGNORED for token, *trained in zip(input_ids, *masks, strict=True)
    ]
    mask = columns.get("attention_mask") or [1] * len(input_ids)
    kept = [place for place, is_token in enumerate(mask) if is_token]  # the others are padding
    if not kept:
        raise RowError("has no input_ids: fill or remove the row.")
    return Tokens([input_ids[place] for place in kept], [labels[place] for place in kept])


def parse_ids(fields: Fields, name: str) -> list[int]:
    """Return a field's list of whole numbers. Raises RowError where it is none."""
    values = parse_json_text(fields[name])
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise RowError(f"field {name!r} is not a list of whole numbers: write token ids as [1, 2, 3].")
    return values


def parse_prompt_completion(fields: Fields) -> Conversation | Text:
    """Parse a prompt and its completion: two texts, or two lists of messages. Raises RowError."""
    prompt, completion = read_message_lists(fields["prompt"], fields["completion"])
    if isinstance(prompt, list) or isinstance(completion, list):
        before = parse_messages(prompt, "prompt")
        after = parse_messages(completion, "completion")
        if not any(message["role"] == "assistant" for message in after):
            raise RowError("field 'completion' has no assistant message: there is nothing to train on.")
        return Conversation([*before, *after], parse_tools(fields.get("tools")), len(before))
    if not isinstance(prompt, str):
        raise RowError(
            f"field 'prompt' is {describe_value(prompt)} and not a text: write a text, or a list of messages."
        )
    return Text(prompt + parse_text(fields, "completion"), len(prompt))


def read_message_lists(prompt: Any, completion: Any) -> tuple[Any, Any]:
    """Return prompt and completion parsed where both are JSON texts of messages, as in CSV; else as they are."""
    try:
        parsed = (parse_json_text(prompt), parse_json_text(completion))
    except RowError:  # one of them is a text that only begins like JSON
        return prompt, completion
    are_messages = all(
        isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value)
        for value in parsed
    )
    return parsed if are_messages else (prompt, completion)


def parse_alpaca(fields: Fields, has_chat_template: bool) -> Conversation | Text:
    """Parse a row of Alpaca's format: into Alpaca's own prompt where the model has no chat template."""
    output = parse_text(fields, "output")
    if not has_chat_template:
        prompt = write_alpaca_prompt(fields)
        return Text(prompt + output, len(prompt))
    messages = [*list_question_turns(fields), {"role": "assistant", "content": output}]
    return Conversation(prepend_system_prompt(messages, fields))


def read_instruction(fields: Fields) -> tuple[str, str]:
    """Return a row's instruction, and the input that comes with it or an empty text. Raises RowError."""
    return parse_text(fields, "instruction"), parse_text(fields, "input") if fields.get("input") else ""


def write_alpaca_prompt(fields: Fields) -> str:
    """Return the prompt of Alpaca's authors with a row's instruction and input. Raises RowError."""
    instruction, extra = read_instruction(fields)
    return (ALPACA_WITH_INPUT if extra else ALPACA_PLAIN).format(instruction=instruction, input=extra)


def list_question_turns(fields: Fields) -> list[Fields]:
    """Return a row's history and its question as messages. Raises RowError."""
    instruction, extra = read_instruction(fields)
    history = [text for turn in parse_history(fields.get("history")) for text in turn]
    texts = [*history, f"{instruction}\n\n{extra}" if extra else instruction]
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(TURN_ROLES), texts, strict=False)]


def parse_history(value: Any) -> list[list[str]]:
    """Return the pairs of question and answer that come before an instruction, as LLaMA-Factory has them.

    Raises RowError where it is anything else.
    """
    pairs = parse_json_text(value) or []
    if not isinstance(pairs, list) or not all(is_pair(pair) for pair in pairs):
        raise RowError("field 'history' is not a list of [question, answer], both texts with something in them.")
    return pairs


def is_pair(value: Any) -> bool:
    """Tell whether a value is a list of two texts with something in them."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) and one.strip() for one in value)


def parse_conversation(fields: Fields, name: str) -> Conversation:
    """Parse the messages in a field, with the row's system prompt and tools. Raises RowError."""
    messages = parse_messages(fields[name], name)
    return Conversation(prepend_system_prompt(messages, fields), parse_tools(fields.get("tools")))
