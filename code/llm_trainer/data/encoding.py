# SPDX-License-Identifier: Apache-2.0
"""Examples -> token ids and labels, by the rules of one tokenizer and one job."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.chat_template import ChatTemplate, Span
from llm_trainer.data.formats import IGNORED, Conversation, Example, RowError, Text, Tokens

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class EncodedRow:
    """A whole row, not cut yet."""

    input_ids: Ids  # [length]
    labels: Ids  # [length], IGNORED where a token is not trained on


@dataclass(frozen=True)
class Vocabulary:
    """What data have to agree on with the model."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]  # ids at which generation stops; the tokenizer's EOS is one of them
    size: int  # of the model's embedding, which may have more rows than the tokenizer has tokens

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that decides which ids a text becomes."""
        tokenizer = self.tokenizer
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else f"{tokenizer} {tokenizer.get_vocab()}"
        parts = (
            backend,
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            sorted(self.stop_ids),
            self.size,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


class Encoder:
    """Turns examples of one format into token ids and labels."""

    def __init__(self, vocabulary: Vocabulary, settings: Settings, row_format: str) -> None:
        """Raises UserError where rows of that format cannot be trained on as the settings ask."""
        refuse_contradiction(row_format, settings)
        self.vocabulary = vocabulary
        self.tokenizer = vocabulary.tokenizer
        self.settings = settings
        self.white: dict[int, bool] = {}  # token -> whether its text is white space, as far as was asked
        is_completion = row_format == "prompt_completion"
        self.finds_turns = settings.data.completion_only_loss if is_completion else settings.data.assistant_only_loss
        has_template = self.tokenizer.chat_template is not None
        if row_format in ("messages", "sharegpt") or (row_format == "alpaca" and has_template):
            self.template  # noqa: B018 - where it cannot be used, every row would say so
        self.loss_on = self.describe_loss(row_format, has_template)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.finds_turns)

    def describe_loss(self, row_format: str, has_template: bool) -> str:
        """What is trained on, for the log."""
        if row_format in ("text", "pretokenized"):
            return "all tokens" if row_format == "text" else "labels"
        if row_format == "prompt_completion" or not has_template:
            return "all tokens" if self.settings.data.completion_only_loss is False else "completions"
        if self.template.tells_turns:
            return "assistant turns"
        return "all tokens" if self.finds_turns is False else "all tokens, since the chat template does not tell turns"

    def encode(self, examples: list[Example]) -> list[EncodedRow | RowError]:
        """The row of each example, ending in a stop token, or what is wrong with it."""
        rows: list[EncodedRow | RowError | None] = [None] * len(examples)
        texts: dict[bool, list[tuple[int, str, list[Span] | None]]] = {True: [], False: []}
        for place, example in enumerate(examples):
            try:
                if isinstance(example, Tokens):
                    rows[place] = self.check(example)
                else:
                    text, spans = self.write(example)
                    wants_specials = isinstance(example, Text) and not self.starts_with_bos(text)
                    texts[wants_specials].append((place, text, spans))
            except RowError as error:
                rows[place] = error
        for add_special_tokens, batch in texts.items():
            if batch:
                encoded = self.tokenize([text for _, text, _ in batch], add_special_tokens)
                for (place, _, spans), (ids, encoding) in zip(batch, encoded, strict=True):
                    try:
                        rows[place] = self.label(ids, encoding, spans)
                    except RowError as error:
                        rows[place] = error
        return rows  # type: ignore[return-value]

    def write(self, example: Conversation | Text) -> tuple[str, list[Span] | None]:
        """The example's text, and the spans of it to train on, None for all. Raises RowError."""
        text, spans = self.compose(example)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # a lone \ud83d, which JSON allows
                raise RowError(f"has half a character ({text[error.start]!a}): write the whole one.") from error
        return text, spans

    def compose(self, example: Conversation | Text) -> tuple[str, list[Span] | None]:
        if isinstance(example, Conversation):
            return self.template.apply(example)
        start = example.num_prompt_characters
        if not start or self.settings.data.completion_only_loss is False or not self.tokenizer.is_fast:
            return example.text, None
        return example.text, [(start, len(example.text))]

    def starts_with_bos(self, text: str) -> bool:
        """Whether a text was rendered with its special tokens, which then must not be added again."""
        return bool(self.tokenizer.bos_token) and text.lstrip().startswith(self.tokenizer.bos_token)

    def tokenize(self, texts: list[str], add_special_tokens: bool) -> list[tuple[list[int], Encoding | None]]:
        """The ids of each text, and which characters each covers, where the tokenizer is one of the tokenizers library.

        That library is asked itself: what Transformers makes of its answers takes a tenth as long again.
        """
        if self.tokenizer.is_fast:
            encodings = self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
            return [(encoding.ids, encoding) for encoding in encodings]
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
        return [(input_ids, None) for input_ids in encoded["input_ids"]]

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer without the cutting and padding that its file may ask for."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    def label(self, ids: list[int], encoding: Encoding | None, spans: list[Span] | None) -> EncodedRow:
        input_ids = np.array(ids, dtype=np.int32)
        if spans is None or encoding is None:  # spans are looked for only where there is an encoding
            labels = input_ids.copy()
        else:
            labels = np.full_like(input_ids, IGNORED)
            for span in spans:
                first, last = find_tokens(encoding, span)
                labels[first : last + 1] = input_ids[first : last + 1]
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and len(input_ids) > 1 and input_ids[0] == input_ids[1] == bos_id:
            input_ids, labels = input_ids[1:], labels[1:]
        if not self.ends_in_stop(input_ids):
            eos_id = self.tokenizer.eos_token_id
            label = eos_id if self.ends_trained(input_ids, labels) else IGNORED
            input_ids = np.append(input_ids, np.int32(eos_id))
            labels = np.append(labels, np.int32(label))
        self.check_ids("input_ids", input_ids)
        return EncodedRow(input_ids, labels)

    def check(self, tokens: Tokens) -> EncodedRow:
        """A row that somebody else tokenized. Raises RowError where the model would not know it, or for two BOS."""
        input_ids, labels = np.array(tokens.input_ids), np.array(tokens.labels)
        self.check_ids("input_ids", input_ids)
        self.check_ids("labels", labels[labels != IGNORED])
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and tokens.input_ids[:2] == [bos_id, bos_id]:
            raise RowError("begins with two BOS tokens: remove one of them.")
        return EncodedRow(input_ids.astype(np.int32), labels.astype(np.int32))

    def check_ids(self, name: str, ids: npt.NDArray[Any]) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocabulary.size):
            unknown = ids[(ids < 0) | (ids >= self.vocabulary.size)][0]
            raise RowError(
                f"has the token id {unknown} among its {name} and the model's vocabulary ends before "
                f"{self.vocabulary.size}: use the model's own tokenizer."
            )

    def ends_in_stop(self, input_ids: Ids) -> bool:
        """Whether a stop token ends the row; templates may put a newline after it."""
        for place in range(len(input_ids) - 1, -1, -1):
            token = int(input_ids[place])
            if token in self.vocabulary.stop_ids:
                return True
            if not self.is_white(token):
                return False
        return False

    def ends_trained(self, input_ids: Ids, labels: Ids) -> bool:
        """Whether the last token that is no white space is trained on, and with it what ends the row."""
        pairs = zip(map(int, input_ids[::-1]), labels[::-1], strict=True)
        return next((label != IGNORED for token, label in pairs if label != IGNORED or not self.is_white(token)), False)

    def is_white(self, token: int) -> bool:
        if token not in self.white:
            self.white[token] = not self.tokenizer.decode([token]).strip()
        return self.white[token]

    def find_stops(self, input_ids: Ids) -> npt.NDArray[np.bool_]:
        """[length], true where generation would stop."""
        is_stop = np.zeros(len(input_ids), dtype=bool)
        for stop in self.vocabulary.stop_ids:
            is_stop |= input_ids == stop
        return is_stop


def find_tokens(encoding: Encoding, span: Span) -> tuple[int, int]:
    """The first and the last token that cover a span's characters; white space between tokens is covered by none."""
    start, end = span
    characters = range(start, end)
    covering = (encoding.char_to_token(character) for character in characters)
    first = next((token for token in covering if token is not None), None)
    covering = (encoding.char_to_token(character) for character in reversed(characters))
    last = next((token for token in covering if token is not None), None)
    if first is None or last is None:
        raise RowError("has a turn to train on that leaves no token: fill it, or remove the row.")
    return first, last


def refuse_contradiction(row_format: str, settings: Settings) -> None:
    """Raises UserError where the loss is asked for in a place that rows of this format do not have."""
    if settings.data.assistant_only_loss and row_format in ("text", "pretokenized"):
        raise UserError(
            f"assistant_only_loss=true needs conversations and the data has {row_format} rows: remove the setting."
        )
    if settings.data.completion_only_loss and row_format != "prompt_completion":
        raise UserError(
            f"completion_only_loss=true needs rows with prompt and completion and the data has {row_format} rows: "
            "remove the setting."
        )
