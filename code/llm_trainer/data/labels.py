# SPDX-License-Identifier: Apache-2.0
"""Labels of a text's tokens: a token is trained on where it holds any character of what is trained on.

A server tokenizes a prompt by itself, and the answer follows token by token. In the whole text, a token may run over
the edge between the two, as `" positive"` after `"Mood: "` does. No model that is served ever meets it there. Such a
text is therefore tokenized in pieces, apart at each of these edges.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from llm_trainer.data.chat_template import Span
from llm_trainer.data.formats.examples import IGNORED, RowError

Ids = npt.NDArray[np.int32]

# A piece is tokenized behind one of these, as the middle of a text: SentencePiece puts a space before a beginning.
GLUES = ("\n", "0", ".")


class Labeller:
    """Labels texts by the spans that are trained on, with one fast tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.backend = backend
        self.num_leading_spaces: dict[int, int] = {}  # token -> characters of white space that begin it

    def label(
        self, text: str, encoding: Encoding, spans: list[Span], has_specials: bool, apart: bool = False
    ) -> tuple[Ids, Ids, bool]:
        """Return the ids [length] and labels [length] of a text, and whether it had to be tokenized in pieces.

        `encoding` is the whole text's, with the tokenizer's special tokens where `has_specials`. `apart` has what comes
        before the first span tokenized by itself in any case. Raises RowError where a span leaves no token.
        """
        ids = read_ids(encoding)
        ranges = [find_tokens(encoding, span) for span in spans]
        edges = [
            start
            for (start, _), (first, _) in zip(spans, ranges, strict=True)
            if (apart and start == spans[0][0])
            or self.begins_before(text, encoding.token_to_chars(first), ids[first], start)
        ]
        if edges:
            return *self.label_in_pieces(text, spans, edges, has_specials), True
        return ids, label_tokens(ids, ranges), False

    def label_in_pieces(self, text: str, spans: list[Span], edges: list[int], has_specials: bool) -> tuple[Ids, Ids]:
        """Return the ids and labels of a text that is tokenized apart at the edges. Raises RowError as `label` does."""
        end = edges[0]
        encoding = self.backend.encode(text[:end], add_special_tokens=has_specials)
        _, num_tokens = find_tokens(encoding, (0, end))  # without an EOS that the tokenizer adds to each text
        ids = read_ids(encoding)
        labels = label_tokens(ids, [find_tokens(encoding, span) for span in spans if span[0] < end])
        pieces = [(ids[:num_tokens], labels[:num_tokens])]
        for begin, end in pairwise([*edges, len(text)]):
            own = [(start - begin, stop - begin) for start, stop in spans if begin <= start < end]
            pieces.append(self.label_piece(text[begin:end], own))
        return np.concatenate([ids for ids, _ in pieces]), np.concatenate([labels for _, labels in pieces])

    def label_piece(self, piece: str, spans: list[Span]) -> tuple[Ids, Ids]:
        """Return the ids and labels of a text that follows another. Raises RowError where a span leaves no token."""
        for glue in GLUES:
            text, shift = glue + piece, len(glue)
            encoding = self.backend.encode(text, add_special_tokens=False)
            ids = read_ids(encoding)
            first, _ = find_tokens(encoding, (shift, len(text)))
            if not self.begins_before(text, encoding.token_to_chars(first), ids[first], shift):
                break
        labels = label_tokens(ids, [find_tokens(encoding, (start + shift, stop + shift)) for start, stop in spans])
        return ids[first:], labels[first:]

    def begins_before(self, text: str, characters: Span | None, token: np.int32, start: int) -> bool:
        """Tell whether the text of a token, which has these characters, begins before a character of the whole text."""
        begin, end = characters or (0, 0)
        if begin < end and text[begin].isspace():
            return begin < start
        # Many tokenizers do not count the white space that begins a token among its characters.
        return begin - self.count_leading_spaces(int(token)) < start

    def count_leading_spaces(self, token: int) -> int:
        """Return how many characters of white space begin a token's text."""
        if token not in self.num_leading_spaces:
            text = self.tokenizer.decode([token])
            self.num_leading_spaces[token] = len(text) - len(text.lstrip())
        return self.num_leading_spaces[token]


def read_ids(encoding: Encoding) -> Ids:
    """Return a text's ids [length]. The library makes a list of them at each question."""
    return np.array(encoding.ids, dtype=np.int32)


def label_tokens(ids: Ids, ranges: list[tuple[int, int]]) -> Ids:
    """Return a text's labels [length]: the tokens of the ranges are trained on."""
    labels = np.full_like(ids, IGNORED)
    for first, end in ranges:
        labels[first:end] = ids[first:end]
    return labels


def find_tokens(encoding: Encoding, span: Span) -> tuple[int, int]:
    """Return the first token that holds any of a span's characters, and the one after the last such token.

    Several tokens may hold a character together, and white space may be no token's. Raises RowError where no token
    holds any of them.
    """
    start, end = span
    held = (encoding.char_to_token(character) for character in range(start, end))
    first = next((token for token in held if token is not None), None)
    held = (encoding.char_to_token(character) for character in range(end - 1, start - 1, -1))
    last = next((token for token in held if token is not None), None)
    if first is None or last is None:
        raise RowError("has a turn to train on that leaves no token: fill it, or remove the row.")

    def holds(token: int) -> bool:
        begin, stop = encoding.token_to_chars(token) or (0, 0)
        # A token of white space alone may stand at the place after it, without a character.
        return start < stop and (begin < end or begin == stop == end)

    while first > 0 and holds(first - 1):
        first -= 1
    while last + 1 < len(encoding) and holds(last + 1):
        last += 1
    return first, last + 1
