# SPDX-License-Identifier: Apache-2.0
"""Messages for a chat template: the forms that it asks for, and the parts that it loses.

A server brings messages into the same forms: its clients send ids with calls, and its parser cuts thoughts off.

A template may trim, escape or sort what it writes. Where a part is not found as it stands, the conversation is
rendered once more with marks at the gaps of every part. A part is lost where a mark of it is not written.
"""

import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.data.formats.examples import Conversation, Fields, RowError
from llm_trainer.data.formats.pictures import IMAGE_MARK

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# Marks of turns that are trained on or not: Axolotl's, ms-swift's and OpenAI's.
TRAINING_MARKS = ("train", "loss", "weight")
READ_FIELDS = frozenset(("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_FIELDS, *TRAINING_MARKS))
# Thoughts that begin an answer, in the markup of DeepSeek, Qwen and others.
INLINE_THOUGHTS = re.compile(r"\s*<think>\s*(?P<thoughts>.*?)\s*</think>\s*(?P<answer>.*)", re.DOTALL)
THOUGHTS_END = "</think>"
# Stands for the end of thoughts in what a template cuts there, and is as long. These characters are for private use.
HIDDEN_END = "\ue7c3\ue7a9" * 4

ORDINALS = ("first", "second", "third", "fourth", "fifth")
OTHER_TEMPLATE = "give a template that writes it with chat_template_path."

# Renders changed messages into their whole text, and what the assistant says in it. Raises RowError.
Render = Callable[[list[Fields]], tuple[str, str]]


def find_last_question(messages: list[Fields]) -> int:
    """Return the index of the user's last message; -1 without one."""
    return max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)


def split_thoughts(content: str) -> tuple[str, str]:
    """Return the thoughts with which a content begins, and what follows them. Thoughts are empty without markup."""
    match = INLINE_THOUGHTS.fullmatch(content.replace(HIDDEN_END, THOUGHTS_END))
    return (match["thoughts"], match["answer"]) if match else ("", content)


def has_thoughts(message: Fields) -> bool:
    """Tell whether a message has a field with reasoning, or an answer that may begin with it."""
    return any(key in message for key in REASONING_FIELDS) or THOUGHTS_END in message["content"]


def read_reasoning(message: Fields) -> str:
    """Return the reasoning that stands in a field of its own; empty without one."""
    return next((message[key] for key in REASONING_FIELDS if message.get(key)), "")


def fold_thoughts(message: Fields) -> Fields:
    """Move reasoning into the content of a message, for a template that has no place of its own for it."""
    reasoning = read_reasoning(message)
    if not reasoning:
        return message
    rest = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    return {**rest, "content": f"<think>\n{reasoning}\n</think>\n\n{message['content']}"}


def unfold_thoughts(message: Fields) -> Fields:
    """Move thoughts that begin a message's content into a field of their own."""
    thoughts, answer = split_thoughts(message["content"])
    if not thoughts or read_reasoning(message):
        return message
    return {**message, "content": answer, "reasoning_content": thoughts}


def hide_thoughts_end(message: Fields) -> Fields:
    """Hide the end of the thoughts that begin a message's content from a template that cuts them off."""
    if not split_thoughts(message["content"])[0]:
        return message
    return {**message, "content": message["content"].replace(THOUGHTS_END, HIDDEN_END, 1)}


def write_arguments(message: Fields) -> Fields:
    """Write the arguments of calls as JSON text, for a template that adds them to a text."""
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)  # as Transformers' tojson writes them
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def complete_ids(messages: list[Fields]) -> list[Fields]:
    """Give calls without an id one of nine letters and digits, as Mistral asks, and results the id of their call."""
    completed: list[Fields] = []
    waiting: list[dict[str, Any]] = []  # calls whose result has not come
    num_calls = 0
    for message in messages:
        if message.get("tool_calls"):
            first = num_calls
            num_calls += len(message["tool_calls"])
            calls = [
                {**call, "id": call.get("id") or f"call{number:05}"}
                for number, call in enumerate(message["tool_calls"], start=first)
            ]
            message, waiting = {**message, "tool_calls": calls}, list(calls)
        elif message["role"] == "tool":
            call = find_call(message, waiting)
            if call is not None:
                waiting.remove(call)
                message = {**message, "tool_call_id": message.get("tool_call_id") or call["id"]}
        completed.append(message)
    return completed


def find_call(result: Fields, calls: list[Fields]) -> Fields | None:
    """Return the call that a result answers: by its id, else by its name, else the first; None without one."""
    if "tool_call_id" in result:
        return next((call for call in calls if call["id"] == result["tool_call_id"]), None)
    named = (call for call in calls if call["function"]["name"] == result.get("name"))
    return next(named, calls[0] if calls else None)


def is_trained_on(message: Fields) -> bool:
    """Tell whether a message may be trained on, by the marks that it has: false or 0 say no."""
    return not any(message.get(name, True) == 0 for name in TRAINING_MARKS)


def list_unread_fields(messages: list[Fields], words: frozenset[str], tells_turns: bool) -> set[str]:
    """Name the fields of messages that nothing reads, and the marks of turns that nothing obeys.

    `words` are those of the chat template, which may read any field. Without `tells_turns` all messages are trained on.
    """
    unread = set()
    for message in messages:
        if len(message) == 2:  # role and content
            continue
        role = message["role"]
        unread |= {f"{name} of {role} messages" for name in message.keys() - READ_FIELDS - words if message[name]}
        is_trained = not tells_turns or (role == "assistant" and is_trained_on(message))
        for name in TRAINING_MARKS:
            if message.get(name, is_trained) != is_trained:
                unread.add(f"{name}={cut_quote(json.dumps(message[name]))} of {role} messages")
    return unread


def check_parts(conversation: Conversation, text: str, spoken: str, render: Render) -> None:
    """Raise RowError, which names what is lost, where the template leaves out a part of a conversation.

    `spoken` is what the assistant says in the text. Thoughts before the last question may go, as at inference.
    """
    number = find_incomplete(conversation.messages, text, spoken)
    if number is None:
        return
    marker = Marker()
    messages = mark_messages(conversation.messages, marker)
    try:
        text, spoken = (written.lower() for written in render(messages))  # marks may be written in capitals
    except RowError as error:
        raise RowError(
            f"has a message {number + 1} that the model's chat template does not write in full: {OTHER_TEMPLATE}"
        ) from error
    for part in marker.parts:
        if (spoken if part.is_spoken else text).count(part.mark) < part.count:
            raise RowError(describe_loss(part, messages[part.message]["role"], text.count(part.mark) >= part.count))


def find_incomplete(messages: list[Fields], text: str, spoken: str) -> int | None:
    """Return the index of the first message whose parts do not follow, as they stand, those of the one before."""
    last_question = find_last_question(messages)
    heard = read = 0  # where the assistant's next message begins in what is spoken, and anyone else's in the text
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            heard = follow_turn(message, number > last_question, spoken, heard)
            if heard < 0:
                return number
            continue
        is_moved = role in ("system", "developer")  # some templates write all of them first
        end = find_end(text, message["content"], 0 if is_moved else read, is_escaped=role == "tool")
        if end < 0:
            return number
        read = read if is_moved else end
    return None


def follow_turn(message: Fields, is_last: bool, spoken: str, start: int) -> int:
    """Return where an assistant's message ends in what is spoken; -1 where a part of it is missing.

    Templates write words beside calls before them, or after.
    """
    calls = message.get("tool_calls") or []
    thoughts, content = split_message(message)
    if thoughts and is_last:
        start = find_end(spoken, thoughts, start)
    if start < 0:
        return start
    if not calls:
        return find_end(spoken, content, start)
    end = find_end(spoken, content, start)
    end = follow_calls(calls, spoken, end) if end >= 0 else end
    if end >= 0:
        return end
    end = follow_calls(calls, spoken, start)
    return find_end(spoken, content, end) if end >= 0 else end


def follow_calls(calls: list[Fields], spoken: str, place: int) -> int:
    """Return where the last of some calls ends in what is spoken; -1 where a part of one is missing."""
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        place = find_end(spoken, name, place)
        ends = [find_end(spoken, value, place, is_escaped=True) for value in iterate_values(arguments)]
        if place < 0 or -1 in ends:
            return -1
        place = max([place, *ends])
    return place


def iterate_values(value: Any) -> Iterator[Any]:
    """Yield the keys, texts and numbers of an object. A null need not be written."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from iterate_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from iterate_values(inner)
    elif value is not None:
        yield value


def find_end(text: str, value: Any, start: int, is_escaped: bool = False) -> int:
    """Return where a value ends that is written first behind a start; -1 where it is not."""
    if not isinstance(value, str):
        forms = {json.dumps(value), str(value)}
    else:
        value = value.strip()
        if not is_escaped or value.isalnum():
            for piece in value.split(IMAGE_MARK):  # between them a template writes its own mark of an image
                place = text.find(piece.strip(), start)
                if place < 0:
                    return -1
                start = place + len(piece.strip())
            return start
        forms = list_escapes(value)
    return min((place + len(form) for form in forms if (place := text.find(form, start)) >= 0), default=-1)


def list_escapes(text: str) -> set[str]:
    """List a text as it is, as JSON, as Python, and as HTML."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], quoted, html.escape(text)}


def split_message(message: Fields) -> tuple[str, str]:
    """Return the thoughts and the content of an assistant's message, wherever the thoughts stand."""
    reasoning = read_reasoning(message)
    if THOUGHTS_END not in message["content"]:
        return reasoning, message["content"]
    thoughts, content = split_thoughts(message["content"])
    return reasoning or thoughts, content


@dataclass(frozen=True)
class Part:
    """A part of a message with marks in it."""

    message: int  # index
    kind: str  # what a user calls it
    is_spoken: bool  # whether the assistant says it
    mark: str
    count: int  # of the marks


@dataclass
class Marker:
    """Puts marks of its own into each part of a conversation."""

    parts: list[Part] = field(default_factory=list)
    message: int = 0
    is_spoken: bool = False

    def mark(self, value: Any, kind: str) -> Any:
        """Return a value with marks at its ends and gaps; a number becomes a mark."""
        if isinstance(value, str) and not value.strip():
            return value
        mark = f"zq7c3a9e{len(self.parts)}z"  # of letters that no template escapes
        marked = mark + re.sub(r"\s+", rf"\g<0>{mark}", value.strip()) + mark if isinstance(value, str) else mark
        self.parts.append(Part(self.message, kind, self.is_spoken, mark, marked.count(mark)))
        return marked

    def mark_arguments(self, value: Any, call: str, name: str = "") -> Any:
        """Return arguments with marks in each key and value."""
        kind = f"argument {cut_quote(name)!r} of its {call}" if name else f"arguments of its {call}"
        if isinstance(value, dict):
            return {
                self.mark(key, f"argument {cut_quote(name or key)!r} of its {call}"): self.mark_arguments(
                    inner, call, name or key
                )
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self.mark_arguments(inner, call, name) for inner in value]
        return None if value is None else self.mark(value, kind)


def mark_messages(messages: list[Fields], marker: Marker) -> list[Fields]:
    """Return messages with marks in all that has to be written."""
    last_question = find_last_question(messages)
    marked = []
    for marker.message, message in enumerate(messages):
        marker.is_spoken = message["role"] == "assistant"
        if marker.is_spoken:
            marked.append(mark_turn(message, marker, marker.message > last_question))
        else:
            marked.append({**message, "content": marker.mark(message["content"], "content")})
    return marked


def mark_turn(message: Fields, marker: Marker, is_last: bool) -> Fields:
    """Return an assistant's message with marks: in its thoughts where they have to be written, content and calls."""
    calls = message.get("tool_calls") or []
    marked = dict(message)
    if is_last:
        for key in filter(message.get, REASONING_FIELDS):
            marked[key] = marker.mark(message[key], "thoughts")
    content, kind = message["content"], "words beside its call" if calls else "answer"
    thoughts, answer = split_message({"content": content})
    before, after = content[: len(content) - len(answer)], marker.mark(answer, kind)
    if thoughts and is_last:
        before = before.replace(thoughts, marker.mark(thoughts, "thoughts"))
    marked["content"] = before + after
    if calls:
        marked["tool_calls"] = [mark_call(call, marker, place, len(calls)) for place, call in enumerate(calls)]
    return marked


def mark_call(call: Fields, marker: Marker, place: int, num_calls: int) -> Fields:
    """Return a call with marks in its name and arguments."""
    function = call["function"]
    ordinal = f"{ORDINALS[place] if place < len(ORDINALS) else place + 1} " if num_calls > 1 else ""
    kind = f"{ordinal}call {cut_quote(function['name'])!r}"
    name = marker.mark(function["name"], kind)
    return {**call, "function": {"name": name, "arguments": marker.mark_arguments(function["arguments"], kind)}}


def describe_loss(part: Part, role: str, is_elsewhere: bool) -> str:
    """Say which part the template leaves out, or writes outside of the assistant's turn, and what to do."""
    if role == "tool":
        return (
            f"has a message {part.message + 1}, the result of a tool, which the model's chat template leaves out: "
            f"{OTHER_TEMPLATE}"
        )
    if not part.is_spoken:
        return (
            f"has a message {part.message + 1} with the role {role!r}, which the model's chat template leaves out: "
            "use a role that it knows, or another template with chat_template_path."
        )
    verb = "writes outside of the assistant's turn" if is_elsewhere else "leaves out"
    fix = "give each call a message of its own" if " call " in part.kind else "remove it"
    if part.kind == "answer":
        fix = "write it otherwise"
    return (
        f"has a message {part.message + 1} whose {part.kind} the model's chat template {verb}: {fix}, or "
        f"{OTHER_TEMPLATE}"
    )
