# SPDX-License-Identifier: Apache-2.0
"""Turns of a conversation: messages, calls and tools in the forms that data have, brought into the one of templates."""

from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.data.formats.examples import Fields, RowError
from llm_trainer.data.formats.pictures import VALUES, take_images
from llm_trainer.data.formats.values import describe_value, parse_json_text, parse_text, unify_value
from llm_trainer.readers.json import parse_json

# Names for roles in ShareGPT's export and in data that follow it -> the names that chat templates know.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
SHAREGPT_ROLES |= {"observation": "tool", "function_response": "tool", "tool_response": "tool"}
SHAREGPT_CALL = "function_call"  # the name for an assistant that calls a tool

ARGUMENTS = ("arguments", "parameters")  # of a call, the second in Llama's form
CALL_FIELDS = ("name", "id", "type", "index", "function")  # other fields of a call, which say nothing that is trained


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
    message = parse_json_text(message)
    message = take_images(message) if isinstance(message, dict) else message
    values = message.pop(VALUES, []) if isinstance(message, dict) else []
    message = unify_value(message)  # which images are exempt from
    if isinstance(message, dict) and "from" in message and "value" in message:
        message = convert_sharegpt_message(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise RowError("without a 'role': write it as {'role': ..., 'content': ...}.")
    message = modernize_message(message)
    if "tool_calls" in message:
        calls = parse_tool_calls(message.pop("tool_calls"))
        message |= {"tool_calls": calls} if calls else {}  # a server drops an empty list, which some templates misread
    message["content"] = parse_content(message)
    return {**message, VALUES: values} if values else message


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
            name = f"of type {kind!r}" if kind else f"that is {describe_value(part)} without a 'type'"
            raise RowError(
                f"whose 'content' has a part {name}: only texts and images are read, such as {{'type': 'image', "
                "'image': 'cat.png'}."
            )
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
