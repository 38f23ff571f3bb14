# SPDX-License-Identifier: Apache-2.0
"""Chat template of the model: render a conversation, and find the assistant's turns in its text."""

import copy
import os.path
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llm_trainer.common.errors import UserError, cut_quote, quote_error
from llm_trainer.data.formats.examples import Conversation, Fields, RowError
from llm_trainer.data.formats.pictures import IMAGE_MARK, split_parts
from llm_trainer.data.formats.turns import SHAREGPT_CALL, SHAREGPT_ROLES
from llm_trainer.data.messages import (
    HIDDEN_END,
    THOUGHTS_END,
    check_parts,
    complete_ids,
    find_last_question,
    fold_thoughts,
    has_thoughts,
    hide_thoughts_end,
    is_trained_on,
    list_unread_fields,
    unfold_thoughts,
    write_arguments,
)

Span = tuple[int, int]  # from the first character to the one after the last

MAX_SECONDS = 10  # of computing for a row, which takes a thousandth of one as a rule
MAX_LATE_ROWS = 3
TOO_SLOW = f"computes for more than {MAX_SECONDS} seconds"
FIX = "give another one with chat_template_path."
# A template is a program. It ends in any of these where it divides by zero, calls itself, or fills the memory.
TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError),
    *(MemoryError, RecursionError, TypeError, ValueError),
)
ROLES = ("system", "user", "assistant", "tool")
CALL_ROLES = (SHAREGPT_CALL, "tool_call")  # the second is ms-swift's

PROBE = "probe-7c3a9e"  # no template writes this text by itself
ASKED = {"role": "user", "content": "ping"}
PROBE_TOOL = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {"type": "object"}}}
PROBE_CALL = {"id": "probe7c3a", "type": "function", "function": {"name": "ping", "arguments": {"key": PROBE}}}
PING = {"name": "ping", "arguments": {}}
PROBE_RESULT = {"role": "tool", "name": "ping", "tool_call_id": "probe7c3a", "content": "pong-7c3a9e"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
THINKING = {"role": "assistant", "content": "pong", "reasoning_content": PROBE}


class ChatTemplate:
    """A tokenizer's chat template, which refuses conversations that it would not render in full."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, finds_turns: bool | None) -> None:
        """Find out how the template marks turns; `finds_turns` says whether it has to, and None whether it may.

        Raises UserError where there is no template, or turns have to be found and cannot be.
        """
        named = list_templates(tokenizer)
        self.tokenizer = with_template(tokenizer, named["default"])
        self.for_tools: ChatTemplate | None = None  # the template for rows with tools, where it is another
        if "tool_use" in named:
            self.for_tools = ChatTemplate(with_template(tokenizer, named["tool_use"]), finds_turns)
        self.source: str = self.tokenizer.chat_template
        self.named_source = self.source  # the model's own, which may name roles that TRL's version of it does not
        self.is_marked = False  # whether {% generation %} marks the turns
        # The texts that a template without marks writes before and after an assistant's text.
        self.turn_start, self.turn_end = "", ""
        self.special_tokens = dict(tokenizer.special_tokens_map)
        self.num_late_rows = 0
        if finds_turns is not False:
            try:
                with limit_rows(MAX_SECONDS):
                    self.find_turn_marks()
            except TimeUp as error:
                raise UserError(f"The model's chat template {TOO_SLOW} with two short messages: {FIX}") from error
        if finds_turns and not self.tells_turns:
            raise UserError(
                "assistant_only_loss=true but the model's chat template does not tell where the assistant's turns end: "
                "give one with {% generation %} marks by chat_template_path, or set assistant_only_loss=false."
            )

    @property
    def tells_every_turn(self) -> bool:
        """True where the assistant's turns can be found in rows with tools, too."""
        return self.tells_turns and (self.for_tools is None or self.for_tools.tells_turns)

    @property
    def tells_turns(self) -> bool:
        """True where the assistant's turns can be found in what this template renders."""
        return self.is_marked or bool(self.turn_end)

    def find_turn_marks(self) -> None:
        """Find how turns are marked: by the template, by TRL's version of it, or by the text after a turn."""
        if not self.tokenizer.is_fast:
            return  # only the tokenizers library says which characters a token covers
        self.is_marked = has_generation_markers(self.source)
        if not self.is_marked:
            try:
                self.source = get_training_chat_template(self.tokenizer) or self.source
                self.is_marked = True
            except TEMPLATE_ERRORS:  # a family that TRL does not know, or that fails with the messages it tries
                self.probe_turns()

    def probe_turns(self) -> None:
        """Find the texts around an assistant's text. The start may be empty; without an end no turn is told."""
        whole = self.try_rendering([ASKED, {"role": "assistant", "content": PROBE}])
        self.turn_end = whole.rpartition(PROBE)[2].rstrip() if PROBE in whole else ""
        question, prompt = self.try_rendering([ASKED]), self.try_rendering([ASKED], add_generation_prompt=True)
        if prompt.startswith(question):
            self.turn_start = prompt.removeprefix(question)

    def try_rendering(
        self, messages: list[Fields], tools: list[Fields] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of made-up messages; empty where the template refuses them."""
        try:
            return self.render(messages, tools, add_generation_prompt)[0]
        except RowError:
            return ""

    @cached_property
    def renders_reasoning(self) -> bool:
        """True where the template renders the `reasoning_content` of an answer."""
        return PROBE in self.try_rendering([ASKED, THINKING])

    @cached_property
    def renders_call_reasoning(self) -> bool:
        """True where the template renders the `reasoning_content` of a message with calls."""
        calling = self.shape_arguments({**CALLING, "tool_calls": [{**PROBE_CALL, "function": PING}]})
        return PROBE in self.try_rendering([ASKED, {**calling, "reasoning_content": PROBE}])

    @cached_property
    def inline_thoughts(self) -> str:
        """The text of an answer that begins with thoughts in <think> marks."""
        return self.try_rendering([ASKED, fold_thoughts(THINKING)])

    @cached_property
    def cuts_thoughts(self) -> bool:
        """True where the template cuts off the thoughts with which even a last answer begins."""
        return "pong" in self.inline_thoughts and PROBE not in self.inline_thoughts

    @cached_property
    def unfolds_thoughts(self) -> bool:
        """True where the template has another place for thoughts than the beginning of the answer."""
        return self.renders_reasoning and self.inline_thoughts.split() != self.try_rendering([ASKED, THINKING]).split()

    @cached_property
    def renders_tools(self) -> bool:
        """True where the template renders the tools of a conversation."""
        return PROBE in self.try_rendering([ASKED], [PROBE_TOOL])

    @cached_property
    def takes_objects(self) -> bool:
        """True where the template takes a call's arguments as an object, and not only as JSON text."""
        return PROBE in self.try_rendering([ASKED, CALLING])

    @cached_property
    def renders_tool_calls(self) -> bool:
        """True where the template renders tool calls and their results."""
        text = self.try_rendering([ASKED, self.shape_arguments(CALLING), PROBE_RESULT])
        return PROBE in text and PROBE_RESULT["content"] in text

    def shape_arguments(self, message: Fields) -> Fields:
        """Return a message with the arguments of its calls in the form that the template takes."""
        return message if self.takes_objects else write_arguments(message)

    def render_conversation(self, conversation: Conversation) -> tuple[str, list[Span] | None]:
        """Return a conversation's text and the spans to train on; None where turns cannot or need not be told apart.

        Raises RowError where the template refuses the conversation or leaves out a part of it. Within `limit_rows` it
        is raised for a row that takes too long, too, and UserError after several of them.
        """
        try:
            return self.choose_template(conversation).render_whole(conversation)
        except TimeUp as error:
            self.num_late_rows += 1
            if self.num_late_rows == MAX_LATE_ROWS:
                raise UserError(
                    f"The model's chat template {TOO_SLOW} with each of {MAX_LATE_ROWS} rows: {FIX}"
                ) from error
            raise RowError(f"is one with which the model's chat template {TOO_SLOW}: shorten or remove it.") from error

    def render_prompt(self, conversation: Conversation) -> str:
        """Return the text up to where the model answers, by the model's own template, as a server would.

        Raises RowError where the template refuses the conversation or leaves out a part of it.
        """
        template = self.choose_template(conversation)
        try:
            template.check_roles(conversation)
            template.check_tools(conversation)
            messages = template.shape_messages(conversation.messages)
            text = template.write_prompt(messages, conversation.tools)
            check_parts(
                replace(conversation, messages=messages),
                text,
                text,
                lambda changed: (template.write_prompt(changed, conversation.tools),) * 2,
            )
        except TimeUp as error:
            raise RowError(f"is one with which the model's chat template {TOO_SLOW}: shorten or remove it.") from error
        return text

    def write_prompt(self, messages: list[Fields], tools: list[Fields] | None) -> str:
        """Return the text of messages and what the model's own template writes before an answer. Raises RowError."""
        source, self.source = self.source, self.named_source
        try:
            return self.render(messages, tools, add_generation_prompt=True)[0]
        finally:
            self.source = source

    def choose_template(self, conversation: Conversation) -> "ChatTemplate":
        """Return the template that renders a conversation: with tools, the one that is named for them."""
        return self.for_tools if self.for_tools and conversation.tools else self

    def render_whole(self, conversation: Conversation) -> tuple[str, list[Span] | None]:
        """Return the text and spans of `render_conversation`, however long it takes. Raises RowError."""
        self.check_roles(conversation)
        self.check_tools(conversation)
        messages = self.shape_messages(conversation.messages)
        if messages is not conversation.messages:
            conversation = replace(conversation, messages=messages)
        text, spans = self.render_turns(conversation)
        check_parts(conversation, text, join_texts(text, spans), partial(self.render_changed, conversation))
        if spans is None:
            return text, [(self.find_answer(conversation, text), len(text))] if conversation.finds_answer else None
        return text, self.pick_turns(conversation, spans)

    def render_turns(self, conversation: Conversation) -> tuple[str, list[Span] | None]:
        """Return the text and the spans of all the assistant's turns; None where they are not told. Raises RowError."""
        text, marked = self.render(conversation.messages, conversation.tools)
        if not self.tells_turns:
            return text, None
        return text, marked if self.is_marked else self.find_turns(conversation, text)

    def render_changed(self, conversation: Conversation, messages: list[Fields]) -> tuple[str, str]:
        """Return the text of a conversation with other messages, and what the assistant says in it. Raises RowError."""
        text, spans = self.render_turns(replace(conversation, messages=messages))
        return text, join_texts(text, spans)

    def shape_messages(self, messages: list[Fields]) -> list[Fields]:
        """Return messages in the forms that the template takes, which say the same."""
        if any(message.get("tool_calls") for message in messages):
            if "tool_call_id" in self.source:
                messages = complete_ids(messages)
            messages = [self.shape_arguments(message) if message.get("tool_calls") else message for message in messages]
        if any(has_thoughts(message) for message in messages):
            last = find_last_question(messages)
            messages = [
                self.shape_thoughts(message, number > last) if message["role"] == "assistant" else message
                for number, message in enumerate(messages)
            ]
        return messages

    def shape_thoughts(self, message: Fields, is_last: bool) -> Fields:
        """Return an assistant's message with its thoughts where the template writes them, if it can.

        A template may cut thoughts off the history, as a server would. In the last turn they have to stay.
        """
        if not (self.renders_call_reasoning if message.get("tool_calls") else self.renders_reasoning):
            message = fold_thoughts(message)
            return hide_thoughts_end(message) if is_last and self.cuts_thoughts else message
        return unfold_thoughts(message) if self.unfolds_thoughts else message

    def render(
        self, messages: list[Fields], tools: list[Fields] | None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text, and the spans between the template's {% generation %} marks.

        Raises RowError where the template refuses the messages.
        """
        return self.render_shaped([self.shape_content(message) for message in messages], tools, add_generation_prompt)

    def shape_content(self, message: Fields) -> Fields:
        """Return a message whose content is a list of parts, where it has images or the template takes no text."""
        content = message["content"]
        if (IMAGE_MARK in content and self.takes_parts) or not self.takes_texts:
            return {**message, "content": split_parts(content)}
        return message

    @cached_property
    def takes_texts(self) -> bool:
        """True where a content may be a text. Some templates of image models leave out all but parts."""
        return PROBE in self.try_content(PROBE) or not self.takes_parts

    @cached_property
    def takes_parts(self) -> bool:
        """True where a content may be a list of parts, which a template for texts writes as Python does."""
        text = self.try_content([{"type": "text", "text": PROBE}])
        return PROBE in text and "'type'" not in text

    def try_content(self, content: Any) -> str:
        """Return the text of a question with a content of any form; empty where the template refuses it."""
        try:
            return self.render_shaped([{"role": "user", "content": content}], None, False)[0]
        except RowError:
            return ""

    def render_shaped(
        self, messages: list[Fields], tools: list[Fields] | None, add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """Return text and spans of `render` for messages whose contents have the form that the template takes."""
        try:
            [text], spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=self.is_marked,
                **self.special_tokens,
            )
        except TEMPLATE_ERRORS as error:
            raise RowError(f"is refused by the model's chat template: {quote_error(error)}.") from error
        return text.replace(HIDDEN_END, THOUGHTS_END), join_spans(spans[0]) if spans else []

    def find_turns(self, conversation: Conversation, text: str) -> list[Span]:
        """Return the span of each assistant turn, with the text that ends it. Raises RowError where none ends it."""
        turns = conversation.assistant_turns
        # A user may quote the start of a turn. It tells turns only where it occurs as often as there are turns.
        is_plain = bool(self.turn_start) and text.count(self.turn_start) == len(turns)
        spans: list[Span] = []
        for number in turns:
            before = spans[-1][1] if spans else 0
            if is_plain:
                start = text.index(self.turn_start, before) + len(self.turn_start)
            else:
                start = self.find_start(conversation, number, text)
            end = self.find_call_end(conversation, number, text) or self.find_end(conversation, number, text, start)
            if not before <= start < end:
                raise RowError(f"has a message {number + 1} that the model's chat template joins with another: {FIX}")
            spans.append((start, end))
        return spans

    def find_end(self, conversation: Conversation, number: int, text: str, start: int) -> int:
        """Return where the text that ends a message's turn ends. Raises RowError where there is none."""
        content = conversation.messages[number]["content"].strip()
        place = text.find(content, start)
        end = text.find(self.turn_end, place + len(content) if place >= 0 else start)
        if end < 0:
            raise RowError(f"has a message {number + 1} whose end the model's chat template hides.")
        return end + len(self.turn_end)

    def find_call_end(self, conversation: Conversation, number: int, text: str) -> int:
        """Return where a message with calls ends; 0 for one without, or where it ends as an answer does.

        Some templates write the results into the same turn: what the model says ends where they begin.
        """
        if not conversation.messages[number].get("tool_calls"):
            return 0
        alone, _ = self.render(conversation.messages[: number + 1], conversation.tools)
        shared = len(os.path.commonprefix([alone, text]))  # noqa: RUF071 - characters are meant
        return 0 if self.turn_end in alone[shared:] or alone[:shared].rstrip().endswith(self.turn_end) else shared

    def find_start(self, conversation: Conversation, number: int, text: str) -> int:
        """Return where the turn of a message begins: after the rendered prompt that asks the model for it.

        Raises RowError where the conversation's text does not begin with that prompt.
        """
        if not number:  # a first message has no prompt
            return max(0, text.find(conversation.messages[0]["content"].strip()))
        for asks in (True, False):  # a template may write into the prompt what it leaves out of the history
            prompt, _ = self.render(conversation.messages[:number], conversation.tools, asks)
            if text.startswith(prompt):
                return len(prompt)
        raise RowError(
            f"has a message {number + 1} that the model's chat template writes otherwise where more follows, so that "
            "its turn cannot be found: give a template with {% generation %} marks by chat_template_path, or set "
            "assistant_only_loss=false."
        )

    def find_answer(self, conversation: Conversation, text: str) -> int:
        """Return where a conversation's prompt ends. Raises RowError where the text does not begin with it."""
        try:
            return self.find_start(conversation, conversation.num_prompt_messages or 0, text)
        except RowError as error:
            raise RowError(
                "has a prompt that the model's chat template writes otherwise where an answer follows, so that the "
                "answer cannot be found: give a template with {% generation %} marks by chat_template_path."
            ) from error

    def pick_turns(self, conversation: Conversation, spans: list[Span]) -> list[Span]:
        """Return the spans to train on, without those of the prompt and of turns that are not to be trained on.

        Raises RowError where no span is left, or the template joins turns that must be told apart.
        """
        turns = conversation.assistant_turns
        first = conversation.num_prompt_messages or 0
        trained = [number >= first and is_trained_on(conversation.messages[number]) for number in turns]
        if all(trained):
            if spans:
                return spans
        elif len(spans) == len(turns):
            spans = [span for span, is_trained in zip(spans, trained, strict=True) if is_trained]
            if spans:
                return spans
        else:
            raise RowError("has turns that are not to be trained on, and the model's chat template joins them.")
        raise RowError("has no assistant message to train on: add one, or set assistant_only_loss=false.")

    def list_unread_fields(self, conversation: Conversation) -> set[str]:
        """Name the fields of messages that nothing reads, and the marks of turns that nothing obeys."""
        template = self.choose_template(conversation)
        return list_unread_fields(conversation.messages, template.words, template.tells_turns)

    @cached_property
    def words(self) -> frozenset[str]:
        """The words of the template's source, the names of fields that it reads among them."""
        return frozenset(re.findall(r"\w+", self.source))

    def check_roles(self, conversation: Conversation) -> None:
        """Raise RowError for a role that neither data usually have nor the template names, such as `usr`."""
        for number, role in enumerate((message["role"] for message in conversation.messages), start=1):
            if role not in ROLES and not any(f"{quote}{role}{quote}" in self.named_source for quote in "'\""):
                meant = suggest_role(role)
                raise RowError(
                    f"has a message {number} with the role {cut_quote(role)!r}, which the model's chat template does "
                    f"not name: write {meant}, or give a template that names it with chat_template_path."
                )

    def check_tools(self, conversation: Conversation) -> None:
        """Raise RowError where the template would leave out tools, their calls or their results."""
        fix = "give a template that does with chat_template_path, or remove the row."
        if conversation.tools and not self.renders_tools:
            raise RowError(f"has tools, and the model's chat template does not render them: {fix}")
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in conversation.messages)
        if calls and not self.renders_tool_calls:
            raise RowError(f"has tool calls or results, and the model's chat template does not render them: {fix}")


def suggest_role(role: str) -> str:
    """Return the words for the role that is meant by one that nothing knows."""
    if role in CALL_ROLES:
        return "'assistant', with the call in 'tool_calls'"
    known = SHAREGPT_ROLES.get(role) or next(iter(get_close_matches(role.lower(), ROLES, 1)), None)
    return f"{known!r}" if known else f"one of {', '.join(ROLES)}"


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Return the same tokenizer with another chat template."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def list_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a tokenizer's chat templates by name; the only one is the default. Raises UserError without a default."""
    template = tokenizer.chat_template
    if template is None:
        raise UserError(
            "The data has messages but the model's tokenizer has no chat template: use an instruct model, "
            "give a template with chat_template_path, or give rows with a text field."
        )
    named = template if isinstance(template, dict) else {"default": template}
    if "default" not in named:
        raise UserError(
            f"The model's tokenizer has chat templates named {', '.join(sorted(named))} and none named default: "
            "give one with chat_template_path."
        )
    return named


class TimeUp(BaseException):
    """The end of the time that a row may compute. No `except Exception` of a library catches it."""


@dataclass
class RowClock:
    """The row that is worked on, and the one that was at the last tick."""

    row: int = 0
    row_at_tick: int = -1

    def tick(self, _number: int, _frame: FrameType | None) -> None:
        """Raise TimeUp where the row is the same as a tick before: the handler of the signal."""
        if self.row == self.row_at_tick:
            raise TimeUp
        self.row_at_tick = self.row


@contextmanager
def limit_rows(seconds: float) -> Iterator[RowClock]:
    """Give a clock to tell the row to, and raise TimeUp in the block where one row computes for longer than that.

    Waiting does not count, so that a busy machine changes nothing. A row costs no system call: the limit is met after
    once to twice the seconds. Only a process's main thread can be limited.
    """
    clock = RowClock()
    if threading.current_thread() is not threading.main_thread():
        yield clock
        return
    handler = signal.signal(signal.SIGVTALRM, clock.tick)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield clock
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler)


@contextmanager
def without_limit() -> Iterator[None]:
    """Let the block compute for as long as it takes, within a block of `limit_rows`."""
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)


def find_turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which the chat template ends an assistant's turn.

    None where there is no template, or it writes no such token.
    """
    if tokenizer.chat_template is None:
        return None
    answered = [ASKED, {"role": "assistant", "content": PROBE}]
    try:
        with limit_rows(MAX_SECONDS):
            text = ChatTemplate(tokenizer, finds_turns=False).try_rendering(answered)
    except (TimeUp, UserError):  # the second where templates have names, and none is the default
        return None
    _, found, end = text.rpartition(PROBE)
    ids = tokenizer.encode(end.rstrip(), add_special_tokens=False) if found else []
    return ids[-1] if ids and ids[-1] in tokenizer.added_tokens_decoder else None


def join_spans(spans: list[Span]) -> list[Span]:
    """Join spans that touch, since some templates mark a turn and its end apart."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def join_texts(text: str, spans: list[Span] | None) -> str:
    """Return the texts of spans, one behind the other; the whole text without any."""
    return text if spans is None else "\0".join(text[start:end] for start, end in spans)
