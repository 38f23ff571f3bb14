# SPDX-License-Identifier: Apache-2.0
"""Chat template of the model: render a conversation, and find the assistant's turns in its text."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from types import FrameType

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers, supports_tool_calling

from llm_trainer.common.errors import UserError, cut_quote, quote_error
from llm_trainer.data.formats import SHAREGPT_ROLES, Conversation, Fields, RowError

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

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
PROBE = "probe-7c3a9e"  # no template writes this text by itself
ASKED = {"role": "user", "content": "ping"}
PROBE_TOOL = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {"type": "object"}}}


class ChatTemplate:
    """A tokenizer's chat template, which refuses conversations that it would not render in full."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, finds_turns: bool | None) -> None:
        """Find out how the template marks turns; `finds_turns` says whether it has to, and None whether it may.

        Raises UserError where there is no template, or turns have to be found and cannot be.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                "The data has messages but the model's tokenizer has no chat template: use an instruct model, "
                "give a template with chat_template_path, or give rows with a text field."
            )
        self.tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
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
    def tells_turns(self) -> bool:
        """True where the assistant's turns can be found."""
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
        """True where the template renders a message's `reasoning_content`."""
        answer = {"role": "assistant", "content": "pong", "reasoning_content": PROBE}
        return PROBE in self.try_rendering([ASKED, answer])

    @cached_property
    def renders_tools(self) -> bool:
        """True where the template renders the tools of a conversation."""
        return PROBE in self.try_rendering([ASKED], [PROBE_TOOL])

    @cached_property
    def renders_tool_calls(self) -> bool:
        """True where the template renders tool calls and their results."""
        try:
            return supports_tool_calling(self.tokenizer)
        except TEMPLATE_ERRORS:  # TRL catches few of them
            return False

    def render_conversation(self, conversation: Conversation) -> tuple[str, list[Span] | None]:
        """Return a conversation's text and the spans to train on; None where turns cannot or need not be told apart.

        Raises RowError where the template refuses the conversation or leaves out a part of it. Within `limit_rows` it
        is raised for a row that takes too long, too, and UserError after several of them.
        """
        try:
            return self.render_whole(conversation)
        except TimeUp as error:
            self.num_late_rows += 1
            if self.num_late_rows == MAX_LATE_ROWS:
                raise UserError(
                    f"The model's chat template {TOO_SLOW} with each of {MAX_LATE_ROWS} rows: {FIX}"
                ) from error
            raise RowError(f"is one with which the model's chat template {TOO_SLOW}: shorten or remove it.") from error

    def render_whole(self, conversation: Conversation) -> tuple[str, list[Span] | None]:
        """Return the text and spans of `render_conversation`, however long it takes. Raises RowError."""
        self.check_roles(conversation)
        self.check_tools(conversation)
        if has_reasoning(conversation) and not self.renders_reasoning:
            conversation = fold_reasoning(conversation)
        text, marked = self.render(conversation.messages, conversation.tools)
        check_messages(conversation.messages, text)
        if not self.tells_turns:
            return text, None
        return text, self.pick_turns(conversation, marked if self.is_marked else self.find_turns(conversation, text))

    def render(
        self, messages: list[Fields], tools: list[Fields] | None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text, and the spans between the template's {% generation %} marks.

        Raises RowError where the template refuses the messages.
        """
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
        return text, join_spans(spans[0]) if spans else []

    def find_turns(self, conversation: Conversation, text: str) -> list[Span]:
        """Return the span of each assistant turn, with the text that ends it. Raises RowError where none ends it."""
        turns = conversation.assistant_turns
        # A user may quote the start of a turn. It tells turns only where it occurs as often as there are turns.
        is_plain = bool(self.turn_start) and text.count(self.turn_start) == len(turns)
        spans: list[Span] = []
        for number in turns:
            if is_plain:
                start = text.index(self.turn_start, spans[-1][1] if spans else 0) + len(self.turn_start)
            else:
                start = self.find_start(conversation, number, text)
            content = conversation.messages[number]["content"].strip()
            place = text.find(content, start)
            end = text.find(self.turn_end, place + len(content) if place >= 0 else start)
            if end < 0:
                raise RowError(f"has a message {number + 1} whose end the model's chat template hides.")
            spans.append((start, end + len(self.turn_end)))
        return spans

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

    def check_roles(self, conversation: Conversation) -> None:
        """Raise RowError for a role that neither data usually have nor the template names, such as `usr`."""
        for number, role in enumerate((message["role"] for message in conversation.messages), start=1):
            if role not in ROLES and not any(f"{quote}{role}{quote}" in self.named_source for quote in "'\""):
                known = SHAREGPT_ROLES.get(role) or next(iter(get_close_matches(role.lower(), ROLES, 1)), None)
                meant = f"{known!r}" if known else f"one of {', '.join(ROLES)}"
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
    except TimeUp:
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


def check_messages(messages: list[Fields], text: str) -> None:
    """Raise RowError where a message is missing in the text: templates skip unknown roles silently."""
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ("assistant", "tool") and message["content"].strip() not in text:
            raise RowError(
                f"has a message {number} with the role {message['role']!r}, which the model's chat template leaves "
                "out: use a role that it knows, or another template with chat_template_path."
            )


def has_reasoning(conversation: Conversation) -> bool:
    """Tell whether a message has a field with reasoning."""
    return any(key in message for message in conversation.messages for key in REASONING_FIELDS)


def fold_reasoning(conversation: Conversation) -> Conversation:
    """Move reasoning into the content, for a template that has no place of its own for it."""
    messages = []
    for message in conversation.messages:
        reasoning = next((message[key] for key in REASONING_FIELDS if message.get(key)), None)
        if reasoning is not None and message["role"] == "assistant":
            rest = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
            message = {**rest, "content": f"<think>\n{reasoning}\n</think>\n\n{message['content']}"}
        messages.append(message)
    return Conversation(messages, conversation.tools, conversation.num_prompt_messages)


def is_trained_on(message: Fields) -> bool:
    """Tell whether a message may be trained on, by OpenAI's `weight` and Axolotl's `train`."""
    return message.get("weight") != 0 and message.get("train", True) is not False
