# SPDX-License-Identifier: Apache-2.0
"""Control tokens of a tokenizer, such as <|im_end|>, in a row's own texts: found there, and kept as plain characters.

A chat template writes control tokens around messages, and a message may hold the text of one. To tell them apart, the
row's own ones get a mark before the template renders them: their first character becomes one that no text has. In the
rendered text the marks change sides, and are tokenized by a tokenizer that knows only marked texts as control tokens.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from llm_trainer.data.formats.examples import IGNORED, Conversation, RowError
from llm_trainer.data.labels import Ids, Labeller

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters, which Unicode keeps out of texts


@dataclass(frozen=True, eq=False)
class EscapingTokenizer:
    """A tokenizer to which the control tokens in a row's own texts are plain characters."""

    backend: Tokenizer
    labeller: Labeller
    real_ids: Ids  # [ids of the backend], the model's id of each
    unwanted: Ids  # ids of control tokens that the backend must not make of plain characters
    inner: slice  # the ids that it makes of characters: a post-processor may add one at each end

    def restore(self, ids: Ids, labels: Ids) -> tuple[Ids, Ids]:
        """Return ids [length] and labels [length] by the model's numbers.

        Raises RowError where the vocabulary has a control token among the pieces of plain texts, as Unigram may.
        """
        if np.isin(ids[self.inner], self.unwanted).any():
            raise RowError("has a control token in a text, which this tokenizer cannot write in characters: change it.")
        return self.real_ids[ids], np.where(labels == IGNORED, IGNORED, self.real_ids[labels]).astype(np.int32)


class ControlTokens:
    """The control tokens of a tokenizer, by their texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.texts = sorted(filter(str.strip, special), key=len, reverse=True)  # the longest matches first
        self.starts = sorted({text[0] for text in self.texts})  # looked for first, since that takes no time
        self.pattern = build_pattern(self.texts)

    @cached_property
    def marked(self) -> dict[str, str]:
        """The marked text of each control token, which has as many characters."""
        marked: dict[str, str] = {}
        for text in self.texts:
            candidates = (mark + text[1:] for mark in MARKS)
            marked[text] = next(candidate for candidate in candidates if candidate not in marked.values())
        return marked

    @cached_property
    def other_side(self) -> dict[str, str]:
        """The marked text of each plain one, and the plain text of each marked one."""
        return self.marked | {marked: text for text, marked in self.marked.items()}

    def find(self, value: Any) -> set[str]:
        """Return the control tokens in the texts of a value: a text, a list or an object."""
        if isinstance(value, str):
            for start in self.starts:
                if start in value:
                    return set(self.pattern.findall(value))
            return set()
        found: set[str] = set()
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            found |= self.find(part)
        return found

    def find_in_conversation(self, conversation: Conversation) -> set[str]:
        """Return the control tokens in a conversation's messages and tools."""
        return self.find(conversation.messages) | self.find(conversation.tools)

    def mark_conversation(self, conversation: Conversation) -> Conversation:
        """Return a conversation whose control tokens are marked."""
        messages, tools = self.mark(conversation.messages), self.mark(conversation.tools)
        return replace(conversation, messages=messages, tools=tools)

    def mark(self, value: Any) -> Any:
        """Return a value with marked control tokens in its texts."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.marked[match[0]], value)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(part) for key, part in value.items()}
        return [self.mark(part) for part in value] if isinstance(value, list) else value

    def swap_marks(self, text: str) -> str:
        """Return a rendered text in which the template's control tokens are marked, and the row's own are not."""
        return build_pattern(self.other_side).sub(lambda match: self.other_side[match[0]], text)

    @cached_property
    def for_templates(self) -> EscapingTokenizer:
        """The tokenizer of rendered texts with swapped marks."""
        own = self.tokenizer.backend_tokenizer
        backend = Tokenizer(own.model)
        for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
            if getattr(own, part) is not None:
                setattr(backend, part, getattr(own, part))
        numbers: dict[int, int] = {}  # the backend's -> the model's
        for number, token in sorted(own.get_added_tokens_decoder().items()):
            text = self.marked.get(token.content, token.content)
            options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
            normalized = token.normalized and not token.special  # a normalizer may drop the mark
            backend.add_tokens([AddedToken(text, normalized=normalized, **options)])
            numbers[find_number(backend, text)] = number
        real_ids = np.arange(max(*numbers, *numbers.values(), backend.get_vocab_size()) + 1, dtype=np.int32)
        real_ids[list(numbers)] = list(numbers.values())
        in_vocabulary = backend.get_vocab().keys() & {*self.texts}
        unwanted = np.array([find_number(backend, text) for text in in_vocabulary], dtype=np.int32)
        return EscapingTokenizer(backend, Labeller(backend, backend), real_ids, unwanted, slice(None))

    @cached_property
    def for_texts(self) -> EscapingTokenizer:
        """The tokenizer of texts that no template has rendered: no text in them is a control token."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())  # the training's own stays as it is
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        real_ids = np.arange(max(backend.get_vocab().values()) + 1, dtype=np.int32)
        unwanted = np.array([find_number(backend, text) for text in self.texts], dtype=np.int32)
        return EscapingTokenizer(backend, Labeller(self.tokenizer, backend), real_ids, unwanted, slice(1, -1))


def find_number(backend: Tokenizer, token: str) -> int:
    """Return the id of a token that the vocabulary has."""
    number = backend.token_to_id(token)
    assert number is not None, token
    return number


def build_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of any of these texts, the first that fits; it matches nothing where there are none."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
