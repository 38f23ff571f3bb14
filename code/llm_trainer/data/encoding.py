# SPDX-License-Identifier: Apache-2.0
"""Encoding of examples: token ids and labels, by the rules of one tokenizer and one job."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from llm_trainer.common.errors import UserError, cut_quote, quote_error
from llm_trainer.config.sections import IMAGE_METHODS, DataSettings
from llm_trainer.data.chat_template import MAX_SECONDS, ChatTemplate, Span, limit_rows, without_limit
from llm_trainer.data.control_tokens import ControlTokens, EscapingTokenizer
from llm_trainer.data.formats.examples import IGNORED, Conversation, Judged, Pair, Prompt, RowError, Text, Tokens
from llm_trainer.data.formats.pictures import drop_added_marks
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.data.labels import Ids, Labeller, read_ids
from llm_trainer.readers.images import ImageRules, Picture


@dataclass(frozen=True)
class PlacedPicture:
    """An image of a row: where its encoded bytes are, or they themselves, and its tokens among the row's."""

    path: str
    offset: int
    size: int
    data: bytes
    name: str
    start: int
    tokens: int


@dataclass(frozen=True)
class EncodedRow:
    """A row in full length, before truncation."""

    input_ids: Ids  # [length]
    labels: Ids  # [length], IGNORED where a token is not trained on
    is_in_pieces: bool = False  # whether prompt and answer had to be tokenized apart
    control_tokens: frozenset[str] = frozenset()  # texts in its messages that became control tokens
    is_desirable: bool = True  # where rows are judged
    margin: float = 0.0  # of the pair that it is the chosen side of, where the row tells one
    pictures: tuple[PlacedPicture, ...] = ()  # in their order
    content: str | None = None  # of a prompt: its row as JSON


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that data and model have to agree on."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]  # ids at which generation stops, the tokenizer's EOS among them
    size: int  # rows of the model's embedding, which may exceed the tokenizer's tokens
    images: ImageProcessing | None = None  # None for a model that takes texts alone

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 digest of everything that decides which ids a text becomes."""
        tokenizer = self.tokenizer
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else f"{tokenizer} {tokenizer.get_vocab()}"
        parts = (
            backend,
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            sorted(self.stop_ids),
            self.size,
            self.images and self.images.fingerprint,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Rendered:
    """An example as one text."""

    place: int  # of the example among those of its chunk
    text: str
    spans: list[Span] | None  # that are trained on; None: all of the text
    has_specials: bool = False  # whether the tokenizer adds its own special tokens
    escaping: EscapingTokenizer | None = None  # the one that tokenizes it; None: the model's
    control_tokens: frozenset[str] = frozenset()  # in its messages, to be told
    pictures: tuple[Picture, ...] = ()  # which the text has placeholders for

    @property
    def ends_trained(self) -> bool:
        """True where the end of the text is trained on, and with it the token that ends the row."""
        return self.spans is None or self.spans[-1][1] >= len(self.text.rstrip())


class Encoder:
    """Turns examples of one format into token ids and labels."""

    def __init__(self, vocabulary: Vocabulary, settings: DataSettings, row_format: str) -> None:
        """Check that rows of this format can be trained on as the settings ask. Raises UserError where they cannot."""
        refuse_contradiction(row_format, settings, vocabulary.tokenizer.is_fast)
        self.vocabulary = vocabulary
        self.tokenizer = vocabulary.tokenizer
        self.settings = settings
        self.is_white_space: dict[int, bool] = {}  # token -> whether its text is white space, for tokens met before
        is_completion = row_format == "prompt_completion"
        self.finds_turns = settings.completion_only_loss if is_completion else settings.assistant_only_loss
        has_template = self.tokenizer.chat_template is not None
        if row_format in ("messages", "sharegpt") or (row_format == "alpaca" and has_template):
            self.template  # noqa: B018 - built now, so that a template that cannot be used is told once and not by each row
        self.loss_on = self.describe_loss(row_format, has_template)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises UserError where the model has none that serves the settings."""
        return ChatTemplate(self.tokenizer, self.finds_turns)

    def describe_loss(self, row_format: str, has_template: bool) -> str:
        """Say for the log which tokens are trained on."""
        fixed = {"text": "all tokens", "pretokenized": "labels", "preference": "chosen and rejected answers"}
        fixed["unpaired_preference"] = "desirable and undesirable answers"
        fixed["prompt"] = "what the model writes"
        if row_format in fixed:
            return fixed[row_format]
        if row_format == "prompt_completion" or not has_template:
            if self.settings.completion_only_loss is False:
                return "all tokens"
            return "completions" if self.tokenizer.is_fast else "all tokens, since the tokenizer has no tokenizer.json"
        if self.template.tells_every_turn:
            return "assistant turns"
        return "all tokens" if self.finds_turns is False else "all tokens, since the chat template does not tell turns"

    def encode_pairs(self, pairs: list[Pair]) -> list[tuple[EncodedRow, EncodedRow] | RowError]:
        """Return each pair's two sides, which have the same prompt, or the error that says why there are none.

        A prompt's tokens may depend on how the answer begins. Then both sides have the prompt tokenized by itself. It
        still differs where a chat template writes earlier turns otherwise, by what follows: as a server would.
        """
        sides = self.encode([side for pair in pairs for side in (pair.chosen, pair.rejected)])
        encoded = [join_sides(*both) for both in zip(sides[::2], sides[1::2], strict=True)]
        for place, row in enumerate(encoded):
            if not isinstance(row, RowError) and not have_same_prompt(*row):
                encoded[place] = join_sides(*self.encode([pairs[place].chosen, pairs[place].rejected], apart=True))
        return [
            row if isinstance(row, RowError) else (replace(row[0], margin=pair.margin or 0.0), row[1])
            for row, pair in zip(encoded, pairs, strict=True)
        ]

    def encode_judged(self, examples: list[Judged]) -> list[EncodedRow | RowError]:
        """Return each judged answer's row, or the error that says why there is none."""
        rows = self.encode([example.answer for example in examples])
        return [
            row if isinstance(row, RowError) else replace(row, is_desirable=example.is_desirable)
            for row, example in zip(rows, examples, strict=True)
        ]

    def encode_prompts(self, prompts: list[Prompt]) -> list[EncodedRow | RowError]:
        """Return each prompt up to where the model goes on, with its row, or the error that says why there is none."""
        rows: list[EncodedRow | RowError] = []
        with limit_rows(MAX_SECONDS) as clock:
            for clock.row, prompt in enumerate(prompts):
                try:
                    rows.append(self.encode_prompt(prompt))
                except RowError as error:
                    rows.append(error)
        return rows

    def encode_prompt(self, prompt: Prompt) -> EncodedRow:
        """Return a prompt's tokens, none of them trained on. Raises RowError where there are none."""
        rendered = self.render_prompt(prompt.prompt)
        (tokens,) = self.tokenize([rendered.text], rendered.has_specials, rendered.escaping)
        input_ids = np.array(tokens, dtype=np.int32) if isinstance(tokens, list) else read_ids(tokens)
        labels = np.full_like(input_ids, IGNORED)
        if rendered.escaping:
            input_ids, labels = rendered.escaping.restore(input_ids, labels)
        if rendered.has_specials and len(input_ids) > 1 and input_ids[-1] == self.tokenizer.eos_token_id:
            input_ids, labels = input_ids[:-1], labels[:-1]  # which the tokenizer adds, and nothing follows
        if not len(input_ids):
            raise RowError("has a prompt without a token: fill or remove the row.")
        self.check_ids("input_ids", input_ids)
        self.check_without_images(input_ids)
        try:
            content = json.dumps(prompt.content, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise RowError(f"has a column that is no JSON ({quote_error(error)}): write it as a text.") from error
        return EncodedRow(input_ids, labels, control_tokens=rendered.control_tokens, content=content)

    def render_prompt(self, prompt: Conversation | Text) -> Rendered:
        """Return a prompt as one text, with the way to tokenize it. Raises RowError as `render` does."""
        escapes = self.settings.escape_control_tokens
        if isinstance(prompt, Text):
            escaping = self.control_tokens.for_texts if escapes else None
            return Rendered(0, prompt.text, None, escapes or not self.starts_with_bos(prompt.text), escaping)
        found = frozenset(self.control_tokens.find_in_conversation(prompt))
        if not found or not escapes:
            return Rendered(0, self.template.render_prompt(prompt), None, control_tokens=found)
        text = self.template.render_prompt(self.control_tokens.mark_conversation(prompt))
        return Rendered(0, self.control_tokens.swap_marks(text), None, escaping=self.control_tokens.for_templates)

    def encode(
        self, examples: Sequence[Conversation | Text | Tokens], apart: bool = False
    ) -> list[EncodedRow | RowError]:
        """Return each example's row, which ends in a stop token, or the error that says why there is none.

        `apart` tokenizes each prompt by itself.
        """
        rows: list[EncodedRow | RowError | None] = [None] * len(examples)
        batches: dict[tuple[bool, EscapingTokenizer | None], list[Rendered]] = {}
        with limit_rows(MAX_SECONDS) as clock:
            for place, example in enumerate(examples):
                clock.row = place
                try:
                    if isinstance(example, Tokens):
                        rows[place] = self.convert_tokens(example)
                    else:
                        rendered = self.render_example(place, example)
                        batches.setdefault((rendered.has_specials, rendered.escaping), []).append(rendered)
                except RowError as error:
                    rows[place] = error
        for (has_specials, escaping), batch in batches.items():
            encoded = self.tokenize([rendered.text for rendered in batch], has_specials, escaping)
            for rendered, tokens in zip(batch, encoded, strict=True):
                try:
                    row = self.label(rendered, tokens, apart)
                    row = self.end_row(row, rendered.ends_trained)
                    rows[rendered.place] = self.place_pictures(row, rendered.pictures)
                except RowError as error:
                    rows[rendered.place] = error
        return rows  # type: ignore[return-value]

    def render_example(self, place: int, example: Conversation | Text) -> Rendered:
        """Return an example as one text, with the way to tokenize it. Raises RowError as `render` does."""
        if isinstance(example, Text):
            if example.images and self.vocabulary.images is not None:
                example = drop_added_marks(example, self.vocabulary.images.processor.image_token)
            text, spans = self.render(example)
            if self.settings.escape_control_tokens:
                if example.images:
                    raise RowError(
                        "is a text with images, which escape_control_tokens=true does not take: use messages."
                    )
                return Rendered(place, text, spans, True, self.control_tokens.for_texts)
            return Rendered(place, text, spans, not self.starts_with_bos(text), pictures=example.images)
        found = frozenset(self.control_tokens.find_in_conversation(example))
        if not found or not self.settings.escape_control_tokens:
            return Rendered(place, *self.render(example), control_tokens=found, pictures=example.images)
        text, spans = self.render(self.control_tokens.mark_conversation(example))
        text = self.control_tokens.swap_marks(text)  # each has as many characters as before
        return Rendered(place, text, spans, escaping=self.control_tokens.for_templates, pictures=example.images)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer)

    def render(self, example: Conversation | Text) -> tuple[str, list[Span] | None]:
        """Return an example's text and the spans in it that are trained on; None means all of it.

        Raises RowError where the chat template refuses the example, or the text holds half a character.
        """
        text, spans = self.compose(example)
        if example.images:
            assert self.vocabulary.images is not None
            with without_limit():  # a row may have many images, and a processor runs for each
                text, spans = self.vocabulary.images.placeholders.expand(text, spans, example.images, self.image_rules)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # a lone \ud83d, which JSON allows
                raise RowError(f"has half a character ({text[error.start]!a}): write the whole one.") from error
        return text, spans

    def compose(self, example: Conversation | Text) -> tuple[str, list[Span] | None]:
        """Return the text and spans of `render`, before the text is checked."""
        if isinstance(example, Conversation):
            return self.template.render_conversation(example)
        start = example.num_prompt_characters
        if not start or self.settings.completion_only_loss is False or not self.tokenizer.is_fast:
            return example.text, None
        return example.text, [(start, len(example.text))]

    def find_image_problem(self) -> str | None:
        """Return why the job takes no rows with images, as the rest of a sentence; None where it does."""
        if self.vocabulary.images is None:
            return "and the model takes texts alone: give an image-text model, or remove the images."
        if self.settings.streaming:
            return "which streaming=true does not take: leave streaming out."
        return None

    @cached_property
    def image_rules(self) -> ImageRules:
        """The bounds of images by the settings."""
        return ImageRules.from_settings(self.settings)

    def check_without_images(self, input_ids: Ids) -> None:
        """Raise RowError where a row without images has the token of one."""
        images = self.vocabulary.images
        if images is not None and images.image_token_id is not None and (input_ids == images.image_token_id).any():
            token = self.tokenizer.decode([images.image_token_id])
            fix = "give the image, or remove the text" if self.settings.method in IMAGE_METHODS else "remove the text"
            raise RowError(f"has the text {token} and no image: {fix}.")

    def place_pictures(self, row: EncodedRow, pictures: tuple[Picture, ...]) -> EncodedRow:
        """Return a row with the places of its images, whose tokens are not trained on.

        Raises RowError where the row has the token of an image that it does not have.
        """
        images = self.vocabulary.images
        if images is None:
            return row
        if not pictures:
            self.check_without_images(row.input_ids)
            return row
        labels, placed = row.labels.copy(), []
        for picture, (start, end) in zip(pictures, images.placeholders.locate(row.input_ids, pictures), strict=True):
            labels[start:end] = IGNORED
            placed.append(PlacedPicture(**vars(picture.ref), start=start, tokens=end - start))
        return replace(row, labels=labels, pictures=tuple(placed))

    def starts_with_bos(self, text: str) -> bool:
        """Tell whether a text begins with the BOS token, so that no special tokens may be added."""
        return bool(self.tokenizer.bos_token) and text.lstrip().startswith(self.tokenizer.bos_token)

    def tokenize(
        self, texts: list[str], add_special_tokens: bool, escaping: EscapingTokenizer | None = None
    ) -> Sequence[Encoding | list[int]]:
        """Return each text's encoding, which maps characters to tokens, or from a slow tokenizer its ids alone.

        The tokenizers library is called directly: going through Transformers takes a tenth longer.
        """
        if self.tokenizer.is_fast:
            backend = escaping.backend if escaping else self.backend
            with explain_panic():
                return backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    @cached_property
    def backend(self) -> Tokenizer:
        """The fast tokenizer's backend, without the truncation and padding that its file may ask for."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    def label(self, rendered: Rendered, tokens: Encoding | list[int], apart: bool = False) -> EncodedRow:
        """Return the tokens of a text, labelled where it is trained on. Raises RowError where a span has no token.

        `apart` tokenizes what comes before the first span by itself.
        """
        escaping, is_in_pieces = rendered.escaping, False
        if isinstance(tokens, list):  # spans are looked for only where there is an encoding
            input_ids = labels = np.array(tokens, dtype=np.int32)
        elif rendered.spans is None:
            input_ids = labels = read_ids(tokens)
        else:
            labeller = escaping.labeller if escaping else self.labeller
            found = labeller.label(rendered.text, tokens, rendered.spans, rendered.has_specials, apart)
            input_ids, labels, is_in_pieces = found
        if escaping:
            input_ids, labels = escaping.restore(input_ids, labels)
        return EncodedRow(input_ids, labels, is_in_pieces, rendered.control_tokens)

    @cached_property
    def labeller(self) -> Labeller:
        """The labeller of texts, for a fast tokenizer."""
        return Labeller(self.tokenizer, self.backend)

    def end_row(self, row: EncodedRow, ends_trained: bool) -> EncodedRow:
        """Drop a doubled BOS, and end the row in a stop token; `ends_trained` tells whether an added one is trained on.

        Raises RowError for ids outside the vocabulary.
        """
        input_ids, labels = row.input_ids, row.labels
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and len(input_ids) > 1 and input_ids[0] == input_ids[1] == bos_id:
            input_ids, labels = input_ids[1:], labels[1:]
        if not self.ends_in_stop(input_ids):
            if ends_trained:
                input_ids, labels = self.drop_untrained_end(input_ids, labels)
            eos_id = self.tokenizer.eos_token_id
            input_ids = np.append(input_ids, np.int32(eos_id))
            labels = np.append(labels, np.int32(eos_id if ends_trained else IGNORED))
        self.check_ids("input_ids", input_ids)
        return replace(row, input_ids=input_ids, labels=labels)

    def drop_untrained_end(self, input_ids: Ids, labels: Ids) -> tuple[Ids, Ids]:
        """Return a row without the white space that its template writes after the last turn.

        The model would learn to stop after white space that it has not learned to write.
        """
        end = len(labels)
        while labels[end - 1] == IGNORED and self.is_white(int(input_ids[end - 1])):
            end -= 1
        return input_ids[:end], labels[:end]

    def convert_tokens(self, tokens: Tokens) -> EncodedRow:
        """Convert a pretokenized row. Raises RowError for unknown ids, two BOS tokens, or the token of an image."""
        input_ids, labels = np.array(tokens.input_ids), np.array(tokens.labels)
        self.check_ids("input_ids", input_ids)
        self.check_ids("labels", labels[labels != IGNORED])
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and tokens.input_ids[:2] == [bos_id, bos_id]:
            raise RowError("begins with two BOS tokens: remove one of them.")
        self.check_without_images(input_ids)
        return EncodedRow(input_ids.astype(np.int32), labels.astype(np.int32))

    def check_ids(self, name: str, ids: npt.NDArray[Any]) -> None:
        """Raise RowError where an id lies outside the model's vocabulary.

        The token of an image may: Mllama writes none, and has no logit for it.
        """
        if self.vocabulary.images is not None and name == "input_ids":
            ids = ids[ids != self.vocabulary.images.image_token_id]
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocabulary.size):
            unknown = ids[(ids < 0) | (ids >= self.vocabulary.size)][0]
            raise RowError(
                f"has the token id {cut_quote(str(unknown))} among its {name} and the model's vocabulary ends before "
                f"{self.vocabulary.size}: use the model's own tokenizer."
            )

    def ends_in_stop(self, input_ids: Ids) -> bool:
        """Tell whether a stop token ends the row; only white space may follow it, as templates write it."""
        for place in range(len(input_ids) - 1, -1, -1):
            token = int(input_ids[place])
            if token in self.vocabulary.stop_ids:
                return True
            if not self.is_white(token):
                return False
        return False

    def is_white(self, token: int) -> bool:
        """Tell whether a token's text is white space."""
        if token not in self.is_white_space:
            self.is_white_space[token] = not self.tokenizer.decode([token]).strip()
        return self.is_white_space[token]

    def find_stops(self, input_ids: Ids) -> npt.NDArray[np.bool_]:
        """Return a mask [length] that is true at stop tokens."""
        is_stop = np.zeros(len(input_ids), dtype=bool)
        for stop in self.vocabulary.stop_ids:
            is_stop |= input_ids == stop
        return is_stop


def join_sides(
    chosen: EncodedRow | RowError, rejected: EncodedRow | RowError
) -> tuple[EncodedRow, EncodedRow] | RowError:
    """Return both sides of a pair, or the error of the first that has one, with the side's name."""
    if isinstance(chosen, RowError):
        return RowError(f"(chosen) {chosen}")
    return RowError(f"(rejected) {rejected}") if isinstance(rejected, RowError) else (chosen, rejected)


def have_same_prompt(chosen: EncodedRow, rejected: EncodedRow) -> bool:
    """Tell whether two sides have the same tokens before the first that is trained on."""
    one, other = (row.input_ids[: int(np.argmax(row.labels != IGNORED))] for row in (chosen, rejected))
    return np.array_equal(one, other)


@contextmanager
def explain_panic() -> Iterator[None]:
    """Turn a panic of the tokenizers library into a UserError. Its class is no Exception, and has no name to import."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"The model's tokenizer breaks down over the rows ({quote_error(error)}): download the model again, or "
            "give one with another tokenizer."
        ) from error


def refuse_contradiction(row_format: str, settings: DataSettings, finds_tokens: bool) -> None:
    """Raise UserError where the settings ask for a loss on a part that rows do not have, or that cannot be found."""
    if settings.assistant_only_loss and row_format in ("text", "pretokenized"):
        raise UserError(
            f"assistant_only_loss=true needs conversations and the data has {row_format} rows: remove the setting."
        )
    if settings.completion_only_loss and row_format != "prompt_completion":
        raise UserError(
            f"completion_only_loss=true needs rows with prompt and completion and the data has {row_format} rows: "
            "remove the setting."
        )
    if row_format in ("preference", "unpaired_preference") and not finds_tokens:
        raise UserError(
            f"method={settings.method} needs a tokenizer that tells which characters a token has, and the model has no "
            "tokenizer.json: add the file."
        )
    if settings.escape_control_tokens and row_format == "pretokenized":
        raise UserError(
            "escape_control_tokens=true needs rows with texts and the data has pretokenized rows: remove the setting."
        )
    if settings.escape_control_tokens and not finds_tokens:
        raise UserError(
            "escape_control_tokens=true needs a tokenizer that can leave control tokens alone, and the model has no "
            "tokenizer.json: add the file, or remove the setting."
        )
    if settings.completion_only_loss and not finds_tokens:
        raise UserError(
            "completion_only_loss=true needs a tokenizer that tells which characters a token has, and the model has no "
            "tokenizer.json: add the file, or remove the setting."
        )
