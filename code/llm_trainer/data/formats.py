# SPDX-License-Identifier: Apache-2.0
"""Formats of rows: parse a row's fields into an example, which says what is trained on.

A row's fields tell its format (sources: TRL's "Dataset formats", ShareGPT's export, Stanford Alpaca's data release):
    pretokenized        input_ids, labels or TRL's masks if the loss is not on all of them
    messages            [{"role": ..., "content": ...}, ...], tools
    sharegpt            conversations: [{"from": "human", "value": ...}, ...], system, tools
    prompt_completion   prompt, completion: two texts, or two lists of messages
    alpaca              instruction, input, output, system, history
    text                text
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.config.sections import DataSettings
from llm_trainer.readers.json import parse_json

TURN_ROLES = ("user", "assistant")
IGNORED = -100  # the label of a token that is not trained on, PyTorch's cross_entropy default

LARGEST_EXACT = 2**53  # beyond it a float is no longer one whole number

# Names for roles in ShareGPT's export and in data that follow it -> the names that chat templates know.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
SHAREGPT_ROLES |= {"observation": "tool", "function_response": "tool", "tool_response": "tool"}
SHAREGPT_CALL = "function_call"  # the name for an assistant that calls a tool

ARGUMENTS = ("arguments", "parameters")  # of a call, the second in Llama's form
CALL_FIELDS = ("name", "id", "type", "index", "function")  # other fields of a call, which say nothing that is trained

# Prompts with which Alpaca's authors trained, for a model that has no chat template.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA_PLAIN = f"{ALPACA_TASK}. {ALPACA_REQUEST}### Response:\n"
ALPACA_WITH_INPUT = (
    f"{ALPACA_TASK}, paired with an input that provides further context. {ALPACA_REQUEST}"
    "### Input:\n{input}\n\n### Response:\n"
)


class RowError(ValueError):
    """A reason why a row cannot be used, and how to mend it.

    Its text is the rest of a sentence that begins with the row's place.
    """


@dataclass(frozen=True)
class Conversation:
    """A list of messages for the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    num_prompt_messages: int | None = None  # messages that are not trained on; None: all assistant turns are

    @cached_property
    def assistant_turns(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Text:
    """A text that is tokenized as it is."""

    text: str
    num_prompt_characters: int | None = None  # characters that are not trained on; None: the whole text is


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenized before it came here."""

    input_ids: list[int]
    labels: list[int]  # IGNORED where a token is not trained on


TRAINED_MASKS = ("completion_mask", "assistant_masks")  # as TRL writes them
TOKEN_FIELDS = ("input_ids", "labels", "attention_mask", *TRAINED_MASKS)
Example = Conversation | Text | Tokens
Fields = dict[str, Any]


def detect_format(fields: Fields, settings: DataSettings) -> str:
    """Return the format whose fields the row has, or the one that `dataset_format` forces.

    Raises RowError where the row has the fields of no format.
    """
    given = {name for name, value in fields.items() if value is not None}
    needs = {
        "pretokenized": ("input_ids",),
        "messages": (settings.messages_field,),
        "sharegpt": ("conversations",),
        "prompt_completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": (settings.text_field,),
    }
    if settings.dataset_format != "auto":
        needs = {settings.dataset_format: needs[settings.dataset_format]}
    for name, fields_needed in needs.items():
        if given.issuperset(fields_needed):
            return name
    wanted = " or ".join(" with ".join(map(repr, names)) for names in needs.values())
    found = ", ".join(f"{name} (null)" if value is None else name for name, value in fields.items())
    raise RowError(
        f"has no field {wanted} (found: {cut_quote(found) or 'none'}): rename the field, or name it with "
        "messages_field or text_field."
    )


def parse_example(fields: Fields, row_format: str, settings: DataSettings, has_chat_template: bool) -> Example:
    """Parse a row of that format into an example. Raises RowError where the row cannot be used."""
    parsers: dict[str, Callable[[], Example]] = {
        "pretokenized": lambda: parse_tokens(fields),
        "messages": lambda: parse_conversation(fields, settings.messages_field),
        "sharegpt": lambda: parse_conversation(fields, "conversations"),
        "prompt_completion": lambda: parse_prompt_completion(fields),
        "alpaca": lambda: parse_alpaca(fields, has_chat_template),
        "text": lambda: Text(parse_text(fields, settings.text_field)),
    }
    return parsers[row_format]()


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


def parse_text(fields: Fields, name: str) -> str:
    """Return a field's text. Raises RowError where it is missing, no text, or white space."""
    text = fields.get(name)
    if not isinstance(text, str) or not text.strip():
        kind = describe_value(text)
        raise RowError(f"field {name!r} is {kind} and not a text with something in it: fill or remove the row.")
    return text


def describe_value(value: Any) -> str:
    """Say in the words of JSON what kind of value it is."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    if isinstance(value, str):
        return "a text" if value.strip() else "white space" if value else "an empty text"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def parse_json_text(value: Any) -> Any:
    """Parse a list or object that was stored as JSON text, as in CSV files; return any other value as it is.

    Raises RowError where the text is not valid JSON.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError as error:
            raise RowError(f"holds JSON text that is not valid ({error}): mend the text.") from error
    return value


def unify_value(value: Any) -> Any:
    """Return a value as each kind of file can hold it, without null fields and with whole numbers as integers.

    Parquet, Arrow and data sets of the Hub give each object of a column all fields, and each number of it one type.
    Raises RowError for a value that JSON does not have.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: unify_value(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [unify_value(element) for element in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT:
        return int(value)
    if not isinstance(value, int | float | None):  # bytes or a duration, which a template would write as <bytes>
        raise RowError(f"with a value that is {describe_value(value)}, which JSON does not have: write it as text.")
    return value


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
    instruction, output = parse_text(fields, "instruction"), parse_text(fields, "output")
    extra = parse_text(fields, "input") if fields.get("input") else ""
    if not has_chat_template:
        prompt = (ALPACA_WITH_INPUT if extra else ALPACA_PLAIN).format(instruction=instruction, input=extra)
        return Text(prompt + output, len(prompt))
    question = f"{instruction}\n\n{extra}" if extra else instruction
    turns = [*parse_history(fields.get("history")), (question, output)]
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(TURN_ROLES, turn, strict=True)]
    return Conversation(prepend_system_prompt(messages, fields))


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


def list_read_fields(row_format: str, settings: DataSettings, has_chat_template: bool) -> frozenset[str]:
    """Return the names of the fields that are read in rows of a format."""
    alpaca = ("instruction", "input", "output")
    read = {
        "pretokenized": TOKEN_FIELDS,
        "messages": (settings.messages_field, "tools", "system"),
        "sharegpt": ("conversations", "tools", "system"),
        "prompt_completion": ("prompt", "completion", "tools"),
        "alpaca": (*alpaca, "system", "history") if has_chat_template else alpaca,
        "text": (settings.text_field,),
    }
    return frozenset(read[row_format])


def parse_conversation(fields: Fields, name: str) -> Conversation:
    """Parse the messages in a field, with the row's system prompt and tools. Raises RowError."""
    messages = parse_messages(fields[name], name)
    return Conversation(prepend_system_prompt(messages, fields), parse_tools(fields.get("tools")))


def prepend_system_prompt(messages: list[Fields], fields: Fields) -> list[Fields]:
    """Put the system prompt that stands in a field of its own, if there is one, before the messages.

    It is a text, or a list of text parts as Amazon Bedrock has it. Raises RowError.
    """
    system = fields.get("system")
    if not system:
        return messages
    if isinstance(system, list) and all(map(is_text_part, system)):
        fields = {"system": join_parts(system)}
    return [{"role": "system", "content": parse_text(fields, "system")}, *messages]


def parse_messages(value: Any, name: str) -> list[Fields]:
    """Parse messages in OpenAI's or ShareGPT's form, or as JSON text, into messages with role and content.

    Raises RowError with the number of the message that cannot be used.
    """
    messages = parse_json_text(value)
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else describe_value(messages)
        raise RowError(f"field {name!r} is {kind} and not a list of at least one message.")
    parsed = []
    for number, message in enumerate(messages, start=1):
        try:
            parsed.append(parse_message(message))
        except RowError as error:
            raise RowError(f"field {name!r} has a message {number} {error}") from error
    return parsed


def parse_message(message: Any) -> Fields:
    """Parse one message, as an object or as JSON text. Raises RowError."""
    message = unify_value(parse_json_text(message))
    if isinstance(message, dict) and "from" in message and "value" in message:
        message = convert_sharegpt_message(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise RowError("without a 'role': write it as {'role': ..., 'content': ...}.")
    message = modernize_message(message)
    if "tool_calls" in message:
        calls = parse_tool_calls(message.pop("tool_calls"))
        message |= {"tool_calls": calls} if calls else {}  # a server drops an empty list, which some templates misread
    message["content"] = parse_content(message)
    return message


def convert_sharegpt_message(message: Fields) -> Fields:
    """Convert a message in ShareGPT's form; a function call becomes an assistant's message with tool calls."""
    role = message["from"]
    rest = {key: message[key] for key in message if key not in ("from", "value")}
    if role == SHAREGPT_CALL:
        return {**rest, "role": "assistant", "content": "", "tool_calls": message["value"]}
    if isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    return {**rest, "role": role, "content": message["value"]}


def modernize_message(message: Fields) -> Fields:
    """Convert a message of OpenAI's older form: `function_call` becomes a tool call, the role `function` a tool's."""
    if message["role"] == "function":
        message = {**message, "role": "tool"}
    if "function_call" not in message:
        return message
    call = message["function_call"]
    rest = {key: value for key, value in message.items() if key != "function_call"}
    return {"tool_calls": [call], **rest} if call else rest


def parse_content(message: Fields) -> str:
    """Return a message's text. Raises RowError where it has none.

    A message with tool calls or reasoning may have an empty text.
    """
    content = message.get("content")
    if isinstance(content, list):
        content = join_parts(content)
    says_more = any(message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
    if content is None and says_more:
        return ""
    if not isinstance(content, str):
        raise RowError(f"whose 'content' is {describe_value(content)} and not a text: give it a text.")
    if not content.strip() and not says_more and message["role"] in ("user", "assistant"):
        raise RowError(f"whose 'content' is {describe_value(content)}: fill it, or remove the row.")
    return content


def join_parts(parts: list[Any]) -> str:
    """Join the texts of content that is a list of parts, the form of OpenAI's API. Raises RowError for other parts."""
    texts = []
    for part in parts:
        if not is_text_part(part):
            kind = part.get("type") if isinstance(part, dict) else None
            name = f"of type {kind!r}" if kind else f"that is {describe_value(part)}"
            raise RowError(f"whose 'content' has a part {name}: only texts are trained on.")
        texts.append(part["text"])
    return "".join(texts)


def is_text_part(part: Any) -> bool:
    """Tell whether a part of a content is a text."""
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def parse_tool_calls(value: Any) -> list[Fields]:
    """Parse tool calls into the form that chat templates expect, with arguments as objects. Raises RowError.

    OpenAI's form has the arguments as JSON text.
    """
    calls = parse_json_text(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if calls is None or (isinstance(calls, str) and not calls.strip()):
        return []
    if not isinstance(calls, list):
        raise RowError(f"whose 'tool_calls' is {describe_value(calls)} and not a list of calls: write a list.")
    return [parse_tool_call(parse_json_text(call)) for call in calls]


def parse_tool_call(call: Any) -> Fields:
    """Parse one call, whose function may stand in an object of its own. Raises RowError."""
    function = parse_json_text(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("with a tool call that has no function name: write {'function': {'name': ..., ...}}.")
    given = [key for key in ARGUMENTS if key in function]
    unknown = [key for key in function if key not in (*ARGUMENTS, *CALL_FIELDS)]
    if not given and unknown:
        raise RowError(
            f"with a call of {cut_quote(function['name'])!r} that has {cut_quote(unknown[0])!r} and no 'arguments': "
            "name them 'arguments'."
        )
    arguments = parse_arguments(function[given[0]] if given else None, function["name"])
    rest = {"id": call["id"]} if call.get("id") else {}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def parse_arguments(value: Any, name: str) -> Fields:
    """Return a call's arguments, an object or its JSON text; {} for null and an empty text. Raises RowError."""
    arguments = value
    if isinstance(value, str):
        try:
            arguments = parse_json(value) if value.strip() else None
        except ValueError as error:
            raise RowError(
                f"with a call of {cut_quote(name)!r} whose 'arguments' are not valid JSON ({error}): mend the text."
            ) from error
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise RowError(
            f"with a call of {cut_quote(name)!r} whose 'arguments' are {describe_value(arguments)} and not an object: "
            "write {'name': value, ...}."
        )
    return arguments


def parse_tools(value: Any) -> list[Fields] | None:
    """Return the JSON schemas of the tools that a conversation may call; None without any. Raises RowError."""
    tools = parse_json_text(value)
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [unify_value(parse_json_text(tool)) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"field 'tools' is {cut_quote(repr(tools))} and not a list of JSON schemas: write a list.")
    return [parse_tool(tool) for tool in tools]


def parse_tool(tool: Fields) -> Fields:
    """Return a tool in the form that a server sends to the template, where it may be a bare function. Raises RowError.

    Parameters may be JSON text.
    """
    if not isinstance(tool.get("name"), str) and "function" not in tool:
        return tool  # of a kind that is no function, for templates that know it
    function = parse_json_text(tool.get("function", {key: value for key, value in tool.items() if key != "type"}))
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            "field 'tools' has a function without a name: write {'type': 'function', 'function': {'name': ..., ...}}."
        )
    if isinstance(function.get("parameters"), str):
        function = {**function, "parameters": parse_json_text(function["parameters"])}
    rest = {key: value for key, value in tool.items() if key not in ("type", "function")} if "function" in tool else {}
    return {"type": "function", **rest, "function": function}
