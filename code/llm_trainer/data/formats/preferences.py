# SPDX-License-Identifier: Apache-2.0
"""Preference rows: a chosen and a rejected answer to one prompt, each a text, a message or a list of messages.

Without a prompt, chosen and rejected are whole conversations or texts, and the beginning that they share is the
prompt. Many data sets have both: then the prompt in its own field is not written twice.
"""

import math
import os.path
from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.data.formats.examples import Conversation, Fields, Pair, RowError, Text
from llm_trainer.data.formats.imitation import list_question_turns, write_alpaca_prompt
from llm_trainer.data.formats.turns import parse_messages, parse_tools, prepend_system_prompt
from llm_trainer.data.formats.values import describe_value, parse_json_text, parse_text

SIDES = ("chosen", "rejected")
QUESTIONS = ("question", "instruction")  # fields with what a user asks: Intel's orca_dpo_pairs, LLaMA-Factory's alpaca
INSTRUCTION_FIELDS = (*QUESTIONS, "input", "history")
# Fields with the scores of both answers: UltraFeedback binarized, and Argilla's data sets.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
)
# Texts behind which an answer begins, in whole dialogues: HH-RLHF, Alpaca, ChatML, Llama 2, Zephyr.
ANSWER_MARKS = ("\n\nAssistant:", "### Response:\n", "<|im_start|>assistant\n", "[/INST]", "<|assistant|>\n")

Messages = list[Fields]
Answers = tuple[Messages, Messages]  # chosen and rejected


def list_preference_fields(messages_field: str) -> tuple[str, ...]:
    """Return the names of the fields that are read in preference rows."""
    scores = (name for names in SCORES for name in names)
    return (
        *SIDES,
        "prompt",
        messages_field,
        "conversations",
        *INSTRUCTION_FIELDS,
        "system",
        "tools",
        *scores,
        "margin",
    )


def parse_preference(fields: Fields, messages_field: str, has_chat_template: bool) -> Pair:
    """Parse a prompt and the two answers to it. Raises RowError where the row cannot be used."""
    chosen, rejected = (read_side(fields, name) for name in SIDES)
    prompt = read_prompt(fields, messages_field, has_chat_template)
    numbers = read_margin(fields), read_score_gap(fields)
    if isinstance(prompt, list) or isinstance(chosen, list) or isinstance(rejected, list):
        answers = as_messages(chosen, "assistant"), as_messages(rejected, "assistant")
        return Pair(*join_messages(as_messages(prompt or [], "user"), answers, fields), *numbers)
    return Pair(*join_texts(prompt, chosen, rejected), *numbers)


def as_messages(value: str | Messages, role: str) -> Messages:
    """Return a text as a message of that role, and messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def read_side(fields: Fields, name: str) -> str | Messages:
    """Return an answer as a text or as messages. Raises RowError where it is empty or anything else."""
    value = read_turns(fields[name])
    return parse_text(fields, name) if isinstance(value, str) else parse_messages(value, name)


def read_turns(value: Any) -> Any:
    """Return messages as a list where a value is one message, or JSON text of them as in CSV; else as it is."""
    try:
        parsed = parse_json_text(value)
    except RowError:  # a text that only begins like JSON
        return value
    parsed = [parsed] if isinstance(parsed, dict) else parsed
    is_turns = isinstance(parsed, list) and all(
        isinstance(one, dict) and one.keys() & {"role", "from"} for one in parsed
    )
    return parsed if is_turns and parsed else value


def read_prompt(fields: Fields, messages_field: str, has_chat_template: bool) -> str | Messages | None:
    """Return what a row has before the answers: a text as it is, or messages for the chat template; None without any.

    Raises RowError where it is neither a text nor messages.
    """
    names = ("prompt", messages_field, "conversations", *QUESTIONS)
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        return [] if fields.get("system") else None
    if name in QUESTIONS:
        instruction = {**fields, "instruction": fields[name]}
        return list_question_turns(instruction) if has_chat_template else write_alpaca_prompt(instruction)
    value = read_turns(fields[name])
    if isinstance(value, list):
        return parse_messages(value, name)
    if not isinstance(value, str):
        kind = describe_value(value)
        raise RowError(f"field {name!r} is {kind} and not a text: write a text, or a list of messages.")
    # A system prompt that is empty in some rows has the same template write all of them.
    return as_messages(parse_text(fields, name), "user") if "system" in fields or fields.get("tools") else value


def read_margin(fields: Fields) -> float | None:
    """Return a row's margin, None without one. Raises RowError for one that is no number."""
    value = fields.get("margin")
    margin = None if value in (None, "") else read_number(value)
    if margin is None and value not in (None, ""):
        raise RowError(f"has margin={cut_quote(repr(value))}, which is no number: give one, or leave it out.")
    return margin


def read_score_gap(fields: Fields) -> float | None:
    """Return by how much a row's own scores prefer the chosen answer; None without numbers."""
    for names in SCORES:
        chosen, rejected = (read_number(fields.get(name)) for name in names)
        if chosen is not None and rejected is not None:
            return chosen - rejected
    return None


def read_number(value: Any) -> float | None:
    """Return a finite number, also from a CSV's text; None for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def join_messages(before: Messages, answers: Answers, fields: Fields) -> tuple[Conversation, Conversation]:
    """Return the whole conversation of each side. Raises RowError where the two have no prompt in common."""
    shared = list_shared(*answers)
    opening = [message for message in shared if message["role"] != "system"]
    asked = [message for message in before if message["role"] != "system"]
    if not opening or opening[0]["role"] != "user":  # the answers alone
        begin_alike = all(side[0]["role"] == "assistant" for side in answers)
        if not asked and not (before and begin_alike):
            raise RowError(
                "has a 'chosen' and a 'rejected' that do not begin with the same message: give what both answer in "
                "'prompt'."
            )
        return build_sides(before, answers, len(before), fields)
    if not asked or any(is_same(asked[0], message) for message in opening):  # whole conversations
        before = [] if shared[0]["role"] == "system" else [one for one in before if one["role"] == "system"]
    elif asked[-1]["role"] == "user":
        raise RowError(
            "has a prompt, and 'chosen' and 'rejected' begin with another message of the user: remove one of them."
        )
    return build_sides(before, answers, len(before) + len(shared), fields)


def list_shared(chosen: Messages, rejected: Messages) -> Messages:
    """Return the messages with which both sides begin."""
    num_shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        num_shared += 1
    return chosen[:num_shared]


def is_same(message: Fields, other: Fields) -> bool:
    """Tell whether two messages say the same, but for white space around it."""
    return message["role"] == other["role"] and message["content"].strip() == other["content"].strip()


def build_sides(
    before: Messages, answers: Answers, num_prompt: int, fields: Fields
) -> tuple[Conversation, Conversation]:
    """Return each side as a conversation; its answer begins behind so many messages, or before them in equal sides.

    Raises RowError where a side has no answer.
    """
    sides = [[*before, *side] for side in answers]
    while num_prompt > len(before) and not all(any_answers(side[num_prompt:]) for side in sides):
        num_prompt -= 1
    for name, side in zip(SIDES, sides, strict=True):
        if not any_answers(side[num_prompt:]):
            raise RowError(f"field {name!r} has no assistant message: there is no answer to prefer.")
    system = list_system_prompt(fields, sides[0])
    tools = parse_tools(fields.get("tools"))
    number = len(system) + num_prompt
    chosen, rejected = (Conversation([*system, *side], tools, number, finds_answer=True) for side in sides)
    return chosen, rejected


def list_system_prompt(fields: Fields, messages: Messages) -> Messages:
    """Return a row's system prompt as a message, none where it has none or the messages begin with it."""
    system = prepend_system_prompt([], fields)
    return [] if system and messages and is_same(system[0], messages[0]) else system


def any_answers(messages: Messages) -> bool:
    """Tell whether any message is the assistant's."""
    return any(message["role"] == "assistant" for message in messages)


def join_texts(prompt: str | None, chosen: str, rejected: str) -> tuple[Text, Text]:
    """Return the whole text of each side. Raises RowError where a side has no answer, or the two have no beginning."""
    if prompt is None:
        end = find_prompt_end(chosen, rejected)
    elif prompt.rstrip().endswith(tuple(map(str.rstrip, ANSWER_MARKS))) and begin_with(prompt, chosen, rejected):
        end = len(prompt)  # whole dialogues: no answer begins with another prompt
    else:
        return Text(prompt + chosen, len(prompt)), Text(prompt + rejected, len(prompt))
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        if not side[end:].strip():
            raise RowError(f"field {name!r} has nothing behind its prompt: fill or remove the row.")
    return Text(chosen, end), Text(rejected, end)


def begin_with(prompt: str, *texts: str) -> bool:
    """Tell whether all texts begin with a prompt."""
    return all(text.startswith(prompt) for text in texts)


def find_prompt_end(chosen: str, rejected: str) -> int:
    """Return how many characters of two texts are their prompt. Raises RowError where they do not begin alike.

    It ends behind the last mark of an answer that both have. Without a mark it ends before the first word that
    differs. The space before a word belongs to it, as tokenizers have it, and a line break to the prompt.
    """
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - characters are meant
    marked = max((shared.rfind(mark) + len(mark) for mark in ANSWER_MARKS if mark in shared), default=0)
    if marked:
        return marked
    if chosen == rejected:  # told as such later
        shared = shared.rstrip()
    end = max((place for place, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise RowError(
            "has no prompt, and a 'chosen' and a 'rejected' that do not begin alike: give what both answer in 'prompt'."
        )
    return end if shared[end] == " " else end + 1
