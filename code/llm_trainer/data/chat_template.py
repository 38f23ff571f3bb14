# SPDX-License-Identifier: Apache-2.0
"""The model's chat template: a conversation -> its text, and where in the text the assistant speaks."""

from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers, supports_tool_calling

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.data.formats import Conversation, Fields, RowError

Span = tuple[int, int]  # from the first character to the one after the last

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
PROBE = "probe-7c3a9e"  # a text that no template writes by itself
ASKED = {"role": "user", "content": "ping"}
PROBE_TOOL = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {"type": "object"}}}


class ChatTemplate:
    """Renders conversations, and refuses those of which the template would leave something out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, finds_turns: bool | None) -> None:
        """`finds_turns`: whether the assistant's turns have to be found; None: if they can be.

        Raises UserError when there is no template, or turns have to be found and cannot be.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                "The data has messages but the model's tokenizer has no chat template: use an instruct model, "
                "give a template with chat_template_path, or give rows with a text field."
            )
        self.tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        self.is_marked = False  # by {% generation %}
        # What the template writes before and after an assistant's text, where it has no marks.
        self.turn_start, self.turn_end = "", ""
        self.special_tokens = dict(tokenizer.special_tokens_map)
        if finds_turns is not False:
            self.find_turn_marks()
        if finds_turns and not self.tells_turns:
            raise UserError(
                "assistant_only_loss=true but the model's chat template does not tell where the assistant's turns end: "
                "give one with {% generation %} marks by chat_template_path, or set assistant_only_loss=false."
            )

    @property
    def tells_turns(self) -> bool:
        return self.is_marked or bool(self.turn_end)

    def find_turn_marks(self) -> None:
        """Marks of the template's own, those of TRL's version of it, or else the text after an assistant's turn."""
        if not self.tokenizer.is_fast:
            return  # only the tokenizers library says which characters a token covers
        self.is_marked = has_generation_markers(self.source)
        if not self.is_marked:
            try:
                self.source = get_training_chat_template(self.tokenizer) or self.source
                self.is_marked = True
            except ValueError:  # a family that TRL does not know
                self.probe_turns()

    def probe_turns(self) -> None:
        """Find what stands around an assistant's text. The start may be empty, the end may not."""
        whole = self.try_rendering([ASKED, {"role": "assistant", "content": PROBE}])
        self.turn_end = whole.rpartition(PROBE)[2].rstrip() if PROBE in whole else ""
        question, prompt = self.try_rendering([ASKED]), self.try_rendering([ASKED], add_generation_prompt=True)
        if prompt.startswith(question):
            self.turn_start = prompt.removeprefix(question)

    def try_rendering(
        self, messages: list[Fields], tools: list[Fields] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of made-up messages; empty if the template refuses them."""
        try:
            return self.render(messages, tools, add_generation_prompt)[0]
        except RowError:
            return ""

    @cached_property
    def renders_reasoning(self) -> bool:
        answer = {"role": "assistant", "content": "pong", "reasoning_content": PROBE}
        return PROBE in self.try_rendering([ASKED, answer])

    @cached_property
    def renders_tools(self) -> bool:
        return PROBE in self.try_rendering([ASKED], [PROBE_TOOL])

    @cached_property
    def renders_tool_calls(self) -> bool:
        return supports_tool_calling(self.tokenizer)

    def apply(self, conversation: Conversation) -> tuple[str, list[Span] | None]:
        """The conversation's text and the spans of it to train on, None where turns cannot or need not be told apart.

        Raises RowError when the template refuses the conversation or leaves out a part of it.
        """
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
        """The text, and the spans between the template's {% generation %} marks."""
        try:
            [text], spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=self.is_marked,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"is refused by the model's chat template: {quote_error(error)}.") from error
        return text, join_spans(spans[0]) if spans else []

    def find_turns(self, conversation: Conversation, text: str) -> list[Span]:
        """The span of each assistant turn with its end."""
        turns = conversation.assistant_turns
        # Only where nothing else looks like the start of a turn: a user may quote one.
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
                raise RowError(f"has a message {number + 1} of which the model's chat template hides the end.")
            spans.append((start, end + len(self.turn_end)))
        return spans

    def find_start(self, conversation: Conversation, number: int, text: str) -> int:
        """Where the turn of that message begins: after the prompt that the model is given to generate it, rendered."""
        if not number:  # there is nothing to ask with
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
        """The spans to train on: not those of the prompt, nor those of messages with `weight` 0, as OpenAI has it."""
        turns = conversation.assistant_turns
        first = conversation.num_prompt_messages or 0
        trained = [number >= first and conversation.messages[number].get("weight") != 0 for number in turns]
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

    def check_tools(self, conversation: Conversation) -> None:
        fix = "give a template that does with chat_template_path, or remove the row."
        if conversation.tools and not self.renders_tools:
            raise RowError(f"has tools, and the model's chat template does not render them: {fix}")
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in conversation.messages)
        if calls and not self.renders_tool_calls:
            raise RowError(f"has tool calls or results, and the model's chat template does not render them: {fix}")


def join_spans(spans: list[Span]) -> list[Span]:
    """Spans that touch as one: some templates mark a turn and its end apart."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def check_messages(messages: list[Fields], text: str) -> None:
    """Templates pass over roles that they do not know without a word."""
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ("assistant", "tool") and message["content"].strip() not in text:
            raise RowError(
                f"has a message {number} with the role {message['role']!r}, which the model's chat template leaves "
                "out: use a role that it knows, or another template with chat_template_path."
            )


def has_reasoning(conversation: Conversation) -> bool:
    return any(key in message for message in conversation.messages for key in REASONING_FIELDS)


def fold_reasoning(conversation: Conversation) -> Conversation:
    """Reasoning as a part of the content, for a template that has no place of its own for it."""
    messages = []
    for message in conversation.messages:
        reasoning = next((message[key] for key in REASONING_FIELDS if message.get(key)), None)
        if reasoning is not None and message["role"] == "assistant":
            rest = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
            message = {**rest, "content": f"<think>\n{reasoning}\n</think>\n\n{message['content']}"}
        messages.append(message)
    return Conversation(messages, conversation.tools, conversation.num_prompt_messages)
