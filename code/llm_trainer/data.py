# SPDX-License-Identifier: Apache-2.0
"""Examples -> tokens and labels, on disk as Arrow, tokenized once a host and memory-mapped by every rank."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llm_trainer.distributed import once_per_host
from llm_trainer.errors import UserError
from llm_trainer.formats import Example, read_examples
from llm_trainer.settings import Settings

# The length is there for samplers that group rows by it, so that they need not read the tokens.
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
IGNORED = -100  # the label of a token that is not trained on, PyTorch's cross_entropy default
BATCH_ROWS = 1000


@dataclass
class DataReport:
    """What became of the rows of one split; the manifest's data fingerprint."""

    files: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256
    num_rows: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_supervised_eos: int = 0
    num_truncated_rows: int = 0
    num_dropped_rows: int = 0
    longest_row_tokens: int = 0

    def __str__(self) -> str:
        share = self.num_supervised_tokens / max(1, self.num_tokens)
        return (
            f"{self.num_rows} rows, {self.num_tokens} tokens ({share:.1%} trained on), longest row "
            f"{self.longest_row_tokens} tokens, {self.num_truncated_rows} rows cut, {self.num_dropped_rows} left out"
        )


def load_split(
    name: str,
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    settings: Settings,
    scratch_dir: Path,
) -> tuple[Dataset, DataReport]:
    """The split's rows as `input_ids`, `labels` and `length`, with a report of them.

    Raises UserError when rows are unusable, when none is left, or when the model could not learn from them.
    """
    arrow, report_file = scratch_dir / f"{name}.arrow", scratch_dir / f"{name}.json"

    def tokenize() -> None:
        encoder = Encoder(tokenizer, stop_ids, settings)
        report = DataReport()
        with ArrowWriter(path=str(arrow), features=FEATURES) as writer:
            for rows in encoder.encode(read_examples(files, settings), report):
                ids, labels = [row[0] for row in rows], [row[1] for row in rows]
                writer.write_batch({"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]})
            check(report, name)
            writer.finalize()
        report.files = [fingerprint(file) for file in files]
        report_file.write_text(json.dumps(asdict(report)), encoding="utf-8")

    once_per_host(scratch_dir / f"{name}.done", tokenize)
    dataset = Dataset.from_file(str(arrow))
    if settings.shuffle_dataset:
        dataset = dataset.shuffle(seed=settings.seed, keep_in_memory=True)
    return dataset, DataReport(**json.loads(report_file.read_text(encoding="utf-8")))


def check(report: DataReport, name: str) -> None:
    """Fail on data that would train for hours and teach nothing, or teach the model never to stop."""
    if not report.num_rows:
        raise UserError(
            f"The {name} data has no rows left ({report.num_dropped_rows} were longer than max_length): "
            "raise max_length or set apply_truncation=true."
        )
    if not report.num_supervised_tokens:
        raise UserError(
            f"No token of the {name} data is trained on: with assistant_only_loss=true every row needs "
            "an assistant message within max_length."
        )
    if not report.num_supervised_eos and report.num_truncated_rows < report.num_rows:
        raise UserError(
            f"No row of the {name} data trains the end-of-sequence token, so the model would never learn to stop: "
            "set assistant_only_loss=false, or give a chat template whose assistant turns include it."
        )


def fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}


class Encoder:
    """Turns examples into token ids and labels by the rules of one tokenizer and one job."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids  # ids at which generation stops; the tokenizer's EOS is one of them
        self.settings = settings
        self.template = find_training_template(tokenizer) if settings.assistant_only_loss else None

    def encode(self, examples: Iterable[Example], report: DataReport) -> Iterator[list[tuple[list[int], list[int]]]]:
        """Batches of (input_ids, labels) rows, each of its own length; counts them in the report."""
        examples = iter(examples)
        while batch := list(itertools.islice(examples, BATCH_ROWS)):
            rows = [self.fit(ids, mask, report) for ids, mask in self.tokenize(batch)]
            yield [row for row in rows if row]

    def tokenize(self, batch: list[Example]) -> list[tuple[list[int], list[int]]]:
        """(input_ids, mask of the tokens to train on) of each example, whole, ending in a stop token."""
        if self.settings.assistant_only_loss:
            return [self.finish(*self.encode_turns(example)) for example in batch]
        texts = [example.text or self.render(example) for example in batch]
        wants_specials = [example.text is not None and not self.starts_with_bos(example.text) for example in batch]
        encoded: list[list[int]] = [[]] * len(batch)
        for special in set(wants_specials):
            places = [place for place, wants in enumerate(wants_specials) if wants is special]
            rows = self.tokenizer([texts[place] for place in places], add_special_tokens=special, verbose=False)
            for place, ids in zip(places, rows["input_ids"], strict=True):
                encoded[place] = ids
        return [self.finish(ids, [1] * len(ids)) for ids in encoded]

    def starts_with_bos(self, text: str) -> bool:
        """Whether a text was rendered with its special tokens, which then must not be added again."""
        return bool(self.tokenizer.bos_token) and text.lstrip().startswith(self.tokenizer.bos_token)

    def render(self, example: Example) -> str:
        return self.apply_template(example, tokenize=False)

    def encode_turns(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids, and a mask that is 1 on what the assistant says."""
        if example.messages is None:
            raise UserError("assistant_only_loss=true needs conversations and the data has text rows: remove it.")
        encoded = self.apply_template(example, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], encoded["assistant_masks"]

    def apply_template(self, example: Example, **options: Any) -> Any:
        if self.tokenizer.chat_template is None:
            raise UserError(
                "The data has messages but the model's tokenizer has no chat template: use an instruct model, "
                "give a template with chat_template_path, or give rows with a text field."
            )
        try:
            return self.tokenizer.apply_chat_template(example.messages, chat_template=self.template, **options)
        except TemplateError as error:
            raise UserError(f"{example.place}: the model's chat template refuses the conversation: {error}.") from error

    def finish(self, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Remove a doubled BOS and make sure that a stop token ends the row; templates may put a newline after it."""
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and ids[:2] == [bos_id, bos_id]:
            ids, mask = ids[1:], mask[1:]
        if self.find_stop(ids) is None:
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, 1]
        return ids, mask

    def find_stop(self, ids: list[int]) -> int | None:
        """The position of the stop token that ends the row, if nothing but white space comes after it."""
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] in self.stop_ids:
                return position
            if self.tokenizer.decode([ids[position]]).strip():
                return None
        return None

    def fit(self, ids: list[int], mask: list[int], report: DataReport) -> tuple[list[int], list[int]] | None:
        """The row cut to max_length as (input_ids, labels), or None where it is left out."""
        limit = self.settings.max_length
        report.longest_row_tokens = max(report.longest_row_tokens, len(ids))
        if limit is not None and len(ids) > limit:
            if not self.settings.apply_truncation:
                report.num_dropped_rows += 1
                return None
            report.num_truncated_rows += 1
            kept = slice(-limit, None) if self.settings.truncation_mode == "keep_end" else slice(limit)
            ids, mask = ids[kept], mask[kept]
        labels = [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
        stop = self.find_stop(ids)
        report.num_rows += 1
        report.num_tokens += len(ids)
        report.num_supervised_tokens += len(labels) - labels.count(IGNORED)
        report.num_supervised_eos += stop is not None and labels[stop] != IGNORED
        return ids, labels


def find_training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template that marks the assistant's tokens; None where the tokenizer's own does.

    Raises UserError for a model family that TRL has no training template for.
    """
    if has_generation_markers(tokenizer.chat_template or ""):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "assistant_only_loss=true needs a chat template with {% generation %} marks and the model's has none: "
            "give one with chat_template_path, or set assistant_only_loss=false."
        ) from error
