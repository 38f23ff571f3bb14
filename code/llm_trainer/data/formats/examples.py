# SPDX-License-Identifier: Apache-2.0
"""Examples: what a row says in its own form, before it is tokenized."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

IGNORED = -100  # the label of a token that is not trained on, PyTorch's cross_entropy default

Fields = dict[str, Any]


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
    finds_answer: bool = False  # whether all behind the prompt is trained on where the template does not tell turns
    images: tuple[Any, ...] = ()  # of the marks in the messages: their values, then where they were found

    @cached_property
    def assistant_turns(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Text:
    """A text that is tokenized as it is."""

    text: str
    num_prompt_characters: int | None = None  # characters that are not trained on; None: the whole text is
    images: tuple[Any, ...] = ()  # as those of a conversation


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenized before it came here."""

    input_ids: list[int]
    labels: list[int]  # IGNORED where a token is not trained on


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected answer, each with the prompt before it."""

    chosen: Conversation | Text
    rejected: Conversation | Text
    margin: float | None = None  # by which the rewards should differ at least, where the row tells it
    score_gap: float | None = None  # by how much the row's own scores prefer the chosen answer

    @property
    def is_swapped(self) -> bool:
        """True where the row's own scores prefer the rejected answer."""
        gap = self.margin if self.score_gap is None else self.score_gap
        return gap is not None and gap < 0


@dataclass(frozen=True)
class Judged:
    """An answer with its prompt, which is desirable or not."""

    answer: Conversation | Text
    is_desirable: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model completes, and what its row says besides, by which completions are judged."""

    prompt: Conversation | Text
    columns: Fields

    @property
    def content(self) -> Fields:
        """The row as trainers and rewards get it."""
        is_text = isinstance(self.prompt, Text)
        return {"prompt": self.prompt.text if is_text else self.prompt.messages, **self.columns}  # type: ignore[union-attr]


Example = Conversation | Text | Tokens | Pair | Judged | Prompt
