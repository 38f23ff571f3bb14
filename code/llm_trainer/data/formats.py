# SPDX-License-Identifier: Apache-2.0
"""A row's fields -> an example: what it trains on, whatever the field's habits. No tokenizer, no torch.

Formats, by what a row has (sources: TRL's "Dataset formats", ShareGPT's export, Stanford Alpaca's data release):
    pretokenized        input_ids, labels if the loss is not on all of them
    messages            [{"role": ..., "content": ...}, ...], tools
    sharegpt            conversations: [{"from": "human", "value": ...}, ...], system, tools
    prompt_completion   prompt, completion: two texts, or two lists of messages
    alpaca              instruction, input, output, system
    text                text
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.config.schema import Settings
from llm_trainer.readers.json import parse_json

IGNORED = -100  # the label of a token that is not trained on, PyTorch's cross_entropy default

# ShareGPT's names, and those of its descendants, for the roles that chat templates know.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
SHAREGPT_ROLES |= {"function_call": "assistant", "observation": "tool", "function_response": "tool"}

# The two texts with which Alpaca's authors trained, for a model that has no chat template.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA_PLAIN = f"{ALPACA_TASK}. {ALPACA_REQUEST}### Response:\n"
ALPACA_WITH_INPUT = (
    f"{ALPACA_TASK}, paired with an input that provides further context. {ALPACA_REQUEST}"
    "### Input:\n{input}\n\n### Response:\n"
)


class RowError(ValueError):
    """What is wrong with a row, as the rest of a sentence that begins with the row's place, and how to mend it."""


@dataclass(frozen=True)
class Conversation:
    """Messages for the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    num_prompt_messages: int | None = None  # of a prompt with a completion; None: any assistant's turn is trained on

    @cached_property
    def assistant_turns(self) -> list[int]:
        """The places of the assistant's messages."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Text:
    """A text that is tokenized as it is."""

    text: str
    num_prompt_characters: int | None = None  # of a prompt with a completion; None: all of it is trained on


@dataclass(frozen=True)
class Tokens:
    """A row that somebody tokenized."""

    input_ids: list[int]
    labels: list[int]  # IGNORED where a token is not trained on


Example = Conversation | Text | Tokens
Fields = dict[str, Any]


def detect_format(fields: Fields, settings: Settings) -> str:
    """The format whose fields the row has, or the one that `dataset_format` forces. Raises RowError without any."""
    given = {name for name, value in fields.items() if value is not None}
    needs = {
        "pretokenized": ("input_ids",),
        "messages": (settings.data.messages_field,),
        "sharegpt": ("conversations",),
        "prompt_completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": (settings.data.text_field,),
    }
    if settings.data.dataset_format != "auto":
        needs = {settings.data.dataset_format: needs[settings.data.dataset_format]}
    for name, fields_needed in needs.items():
        if given.issuperset(fields_needed):
            return name
    wanted = " or ".join(" with ".join(map(repr, names)) for names in needs.values())
    found = ", ".join(f"{name} (null)" if value is None else name for name, value in fields.items())
    raise RowError(
        f"has no field {wanted} (found: {cut_quote(found) or 'none'}): rename the field, or name it with "
        "messages_field or text_field."
    )


def parse_example(fields: Fields, row_format: str, settings: Settings, has_chat_template: bool) -> Example:
    """The example of a row of that format. Raises RowError when the row cannot be used."""
    parsers: dict[str, Callable[[], Example]] = {
        "pretokenized": lambda: parse_tokens(fields),
        "messages": lambda: parse_conversation(fields, settings.data.messages_field),
        "sharegpt": lambda: parse_conversation(fields, "conversations"),
        "prompt_completion": lambda: parse_prompt_completion(fields),
        "alpaca": lambda: parse_alpaca(fields, has_chat_template),
        "text": lambda: Text(parse_text(fields, settings.data.text_field)),
    }
    return parsers[row_format]()


def parse_tokens(fields: Fields) -> Tokens:
    input_ids = parse_ids(fields, "input_ids")
    labels = parse_ids(fields, "labels") if fields.get("labels") is not None else input_ids
    mask = parse_ids(fields, "attention_mask") if fields.get("attention_mask") is not None else [1] * len(input_ids)
    if not len(input_ids) == len(labels) == len(mask):
        raise RowError(
            f"has {len(input_ids)} input_ids, {len(labels)} labels and an attention_mask of {len(mask)}: "
            "they must be of one length."
        )
    kept = [place for place, is_token in enumerate(mask) if is_token]  # the others are padding
    if not kept:
        raise RowError("has no input_ids: fill or remove the row.")
    return Tokens([input_ids[place] for place in kept], [labels[place] for place in kept])


def parse_ids(fields: Fields, name: str) -> list[int]:
    values = from_json_text(fields[name])
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise RowError(f"field {name!r} is not a list of whole numbers: write token ids as [1, 2, 3].")
    return values


def parse_text(fields: Fields, name: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str) or not text.strip():
        kind = describe(text)
        raise RowError(f"field {name!r} is {kind} and not a text with something in it: fill or remove the row.")
    return text


def describe(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    if isinstance(value, str):
        return "a text" if value.strip() else "white space" if value else "an empty text"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def from_json_text(value: Any) -> Any:
    """A list or object that was stored as JSON text, as CSV files and some Parquet files do; else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError as error:
            raise RowError(f"holds JSON text that is not valid ({error}): mend the text.") from error
    return value


def parse_prompt_completion(fields: Fields) -> Conversation | Text:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = parse_messages(prompt, "prompt")
        after = parse_messages(completion, "completion")
        if not any(message["role"] == "assistant" for message in after):
            raise RowError("field 'completion' has no assistant message: there is nothing to train on.")
        return Conversation([*before, *after], parse_tools(fields.get("tools")), len(before))
    if not isinstance(prompt, str):
        raise RowError(f"field 'prompt' is {describe(prompt)} and not a text: write a text, or a list of messages.")
    return Text(prompt + parse_text(fields, "completion"), len(prompt))


def parse_alpaca(fields: Fields, has_chat_template: bool) -> Conversation | Text:
    instruction, output = parse_text(fields, "instruction"), parse_text(fields, "output")
    extra = parse_text(fields, "input") if fields.get("input") else ""
    if not has_chat_template:
        prompt = (ALPACA_WITH_INPUT if extra else ALPACA_PLAIN).format(instruction=instruction, input=extra)
        return Text(prompt + output, len(prompt))
    question = f"{instruction}\n\n{extra}" if extra else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Conversation(with_system(messages, fields))


def parse_conversation(fields: Fields, name: str) -> Conversation:
    messages = parse_messages(fields[name], name)
    return Conversation(with_system(messages, fields), parse_tools(fields.get("tools")))


def with_system(messages: list[Fields], fields: Fields) -> list[Fields]:
    """The messages after the system prompt that stands in a field of its own, if there is one."""
    if not fields.get("system"):
        return messages
    return [{"role": "system", "content": parse_text(fields, "system")}, *messages]


def parse_messages(value: Any, name: str) -> list[Fields]:
    """Messages with role and content, from OpenAI's or ShareGPT's habits, or from JSON text."""
    messages = from_json_text(value)
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else describe(messages)
        raise RowError(f"field {name!r} is {kind} and not a list of at least one message.")
    parsed = []
    for number, message in enumerate(messages, start=1):
        try:
            parsed.append(parse_message(message))
        except RowError as error:
            raise RowError(f"field {name!r} has a message {number} {error}") from error
    return parsed


def parse_message(message: Any) -> Fields:
    if isinstance(message, dict) and "from" in message and "value" in message:
        message = from_sharegpt(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise RowError("without a 'role': write it as {'role': ..., 'content': ...}.")
    message = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in message:
        message["tool_calls"] = parse_tool_calls(message["tool_calls"])
    message["content"] = parse_content(message)
    return message


def from_sharegpt(message: Fields) -> Fields:
    role = message["from"]
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": message["value"]}
    if isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    return {**{key: message[key] for key in message if key not in ("from", "value")}} | {
        "role": role,
        "content": message["value"],
    }


def parse_content(message: Fields) -> str:
    """The message's text. One that is trained on or answered may be empty only if it says something else."""
    content = message.get("content")
    if isinstance(content, list):
        content = join_parts(content)
    says_more = any(message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
    if content is None and says_more:
        return ""
    if not isinstance(content, str):
        raise RowError(f"whose 'content' is {describe(content)} and not a text: give it a text.")
    if not content.strip() and not says_more and message["role"] in ("user", "assistant"):
        raise RowError(f"whose 'content' is {describe(content)}: fill it, or remove the row.")
    return content


def join_parts(parts: list[Any]) -> str:
    """The text of content that is a list of parts, as OpenAI's API has it."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            name = f"of type {kind!r}" if kind else f"that is {describe(part)}"
            raise RowError(f"whose 'content' has a part {name}: only texts are trained on.")
        texts.append(part["text"])
    return "".join(texts)


def parse_tool_calls(value: Any) -> list[Fields]:
    """Tool calls in the shape that chat templates expect, arguments as objects: OpenAI has them as JSON text."""
    calls = from_json_text(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise RowError(f"whose 'tool_calls' is {describe(calls)} and not a list of calls: write a list.")
    parsed = []
    for call in calls:
        call = from_json_text(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("with a tool call that has no function name: write {'function': {'name': ..., ...}}.")
        arguments = from_json_text(function.get("arguments", {}))
        rest = {key: value for key, value in call.items() if key in ("id",)}
        parsed.append({**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return parsed


def parse_tools(value: Any) -> list[Fields] | None:
    """The tools that a conversation may call, as JSON schemas."""
    tools = from_json_text(value)
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [from_json_text(tool) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"field 'tools' is {cut_quote(repr(tools))} and not a list of JSON schemas: write a list.")
    return tools
