# SPDX-License-Identifier: Apache-2.0
"""Rows share sequences, so that little is computed on padding; never where a row could see another one."""

import heapq
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import run_on_local_rank_zero
from llm_trainer.config.schema import Settings
from llm_trainer.data.formats import IGNORED
from llm_trainer.training.packing_check import find_leak

SPARE_SHARE = 0.03  # of a batch's tokens that may be padding, for sequences that are shorter and attention cheaper
BIN_ROWS = 10_000  # packed together: enough to fill the bins, and at most some hundred MB


@dataclass(frozen=True)
class PackedSplit:
    """What became of one split's rows when they were packed before the training."""

    num_rows: int
    num_sequences: int
    filled: float  # share of the sequences' slots that hold a token

    def __str__(self) -> str:
        return f"packed {self.num_rows} rows into {self.num_sequences} sequences, {self.filled:.1%} of the slots filled"


@dataclass(frozen=True)
class PackingCollator:
    """Rows, or sequences that `trl.pack_dataset` made of rows, to a batch in which rows share sequences.

    No attention mask: position ids that begin again at 0 are what the kernels tell the rows apart by.
    """

    pad_token_id: int
    max_length: int | None  # tokens of a sequence; None: as many as the longest row of the batch has
    flattens: bool  # to one sequence, for flash attention; dense attention would pay for its length squared
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels` and `position_ids` [sequences, slots], and what flash attention takes.

        `num_tokens` [examples] comes first: Transformers and Accelerate take the first tensor's length for the number
        of examples, by which they weigh an evaluation's losses.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        if self.flattens:
            flatten = DataCollatorForLanguageModeling(
                self.pad_token_id, padding_free=True, pad_to_multiple_of=self.pad_to_multiple_of
            )
            batch = flatten(examples)
        else:
            batch = self.stack(examples, distribute(lengths, max(self.max_length or 0, *lengths)))
        return {"num_tokens": torch.tensor(lengths), **batch}

    def stack(self, examples: list[dict[str, Any]], sequences: list[list[int]]) -> dict[str, torch.Tensor]:
        """The examples that `sequences` names by their places, end to end, padded at the right."""
        slots = max(sum(len(examples[place]["input_ids"]) for place in places) for places in sequences)
        slots += -slots % (self.pad_to_multiple_of or 1)
        input_ids = torch.full((len(sequences), slots), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORED)
        position_ids = torch.empty_like(input_ids)
        for number, places in enumerate(sequences):
            chosen = [examples[place] for place in places]
            used = sum(len(example["input_ids"]) for example in chosen)
            input_ids[number, :used] = torch.cat([torch.tensor(example["input_ids"]) for example in chosen])
            labels[number, :used] = torch.cat([torch.tensor(example["labels"]) for example in chosen])
            rows = [length for example in chosen for length in example.get("seq_lengths", [len(example["input_ids"])])]
            padding = slots - used  # a row of its own, which no other sees
            position_ids[number] = torch.cat([torch.arange(length) for length in [*rows, padding]])
        labels[position_ids == 0] = IGNORED  # it would be predicted from another row's last token
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def distribute(lengths: list[int], limit: int) -> list[list[int]]:
    """The places of the rows in each sequence: as many, hence as short sequences as waste little, none above `limit`.

    The most sequences of which at most SPARE_SHARE is padding; where there are none such, those with the fewest slots.
    No row may be longer than `limit` tokens.
    """
    budget = sum(lengths) * (1 + SPARE_SHARE)
    best, fewest_slots = [[place] for place in range(len(lengths))], len(lengths) * max(lengths)
    for number in range(len(lengths), 0, -1):
        if fewest_slots <= budget:
            break
        sequences = deal_out(lengths, number)
        fullest = max(sum(lengths[place] for place in places) for places in sequences)
        if fullest <= limit and number * fullest < fewest_slots:
            best, fewest_slots = sequences, number * fullest
    return best


def deal_out(lengths: list[int], number: int) -> list[list[int]]:
    """Longest row first, each to the sequence that holds the fewest tokens so far."""
    sequences: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, index) for index in range(number)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        held, index = heapq.heappop(heap)
        sequences[index].append(place)
        heapq.heappush(heap, (held + lengths[place], index))
    return sequences


@dataclass
class Packing:
    """How this job's rows become sequences, and why."""

    mode: Literal["batch", "data set", "off"]
    reason: str
    collator: PackingCollator | None = None  # None: TRL's, which pads
    splits: dict[str, PackedSplit] = field(default_factory=dict)  # those packed before the training

    def __str__(self) -> str:
        if self.mode == "off":
            return f"Packing off: {self.reason}"
        return f"Packing: the rows of a {self.mode} share sequences ({self.reason})"

    @property
    def unit(self) -> str:
        """What a batch counts."""
        return "sequences" if self.mode == "data set" else "rows"

    def describe(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "mode": self.mode,
            "reason": self.reason,
            **{name: asdict(split) for name, split in self.splits.items()},
        }

    def pack(self, splits: dict[str, Dataset], settings: Settings, scratch_dir: Path) -> dict[str, Dataset]:
        """The splits as they are trained on and evaluated: in sequences where that is wanted, else as they are."""
        max_length = cast(int, settings.data.max_length)  # whoever wants sequences has given it
        train = self.mode == "data set"
        wanted = {
            "train": train,
            "validation": train if settings.data.eval_packing is None else settings.data.eval_packing,
        }
        sequences = dict(splits)
        for name in filter(wanted.get, splits):
            sequences[name] = pack_split(name, splits[name], settings, scratch_dir)
            num_tokens = int(splits[name].with_format("numpy")["length"][:].sum())
            self.splits[name] = PackedSplit(
                num_rows=len(splits[name]),
                num_sequences=len(sequences[name]),
                filled=num_tokens / (len(sequences[name]) * max_length),
            )
        return sequences


def choose_packing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
    settings: Settings,
    group: dist.ProcessGroup | None,
) -> Packing:
    """What the settings ask for, if the model keeps the rows of a sequence apart. Every rank must call this.

    Raises UserError where it does not and the settings name packing; where they leave it open, it is off.
    """
    if settings.data.packing is False:
        return Packing("off", "packing=false")
    flattens = is_flash_attention_requested(model.config)
    collator = PackingCollator(tokenizer.pad_token_id, settings.data.max_length, flattens, arguments.pad_to_multiple_of)
    if arguments.parallelism_config is not None:
        reason: str | None = "parallelism_config may split a sequence over devices"
    else:
        with computing_as(arguments):
            reason = find_first(find_leak(model, replace(collator, pad_token_id=0, max_length=None)), group)
    if reason is None:
        mode: Literal["data set", "batch"] = "data set" if settings.data.packing else "batch"
        return Packing(mode, f"{model.config._attn_implementation} attention keeps them apart", collator)
    for name in ("packing", "eval_packing"):
        if settings.value(name):
            raise UserError(f"{name}=true: {reason}: leave it out, and rows are padded.")
    return Packing("off", reason)


def computing_as(arguments: SFTConfig) -> torch.autocast:
    """Mixed precision as in training: flash attention takes no float32, in which full fine-tuning keeps the weights."""
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    return torch.autocast(arguments.device.type, dtype, enabled=arguments.fp16 or arguments.bf16)


def find_first(reason: str | None, group: dist.ProcessGroup | None) -> str | None:
    """The first rank's reason that has one: what a GPU rounds must not have the ranks train in different ways."""
    reasons: list[str | None] = [reason]
    if group is not None:
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason, group=group)
    return next(filter(None, reasons), None)


def pack_split(name: str, rows: Dataset, settings: Settings, scratch_dir: Path) -> Dataset:
    """The rows in sequences of at most max_length, packed once a host, on disk; `seq_lengths` tells them apart.

    They have been cut to max_length before, so that nothing is lost here.
    """
    arrow = scratch_dir / f"{name}-packed.arrow"

    def pack() -> None:
        options = {"cache_file_name": str(arrow), "load_from_cache_file": False, "batch_size": BIN_ROWS}
        tokens = rows.select_columns(["input_ids", "labels"])
        pack_dataset(tokens, settings.data.max_length, settings.data.packing_strategy, options)

    run_on_local_rank_zero(scratch_dir / f"{name}-packed.done", pack)
    sequences = Dataset.from_file(str(arrow))
    return (
        sequences.shuffle(seed=settings.training.seed, keep_in_memory=True)
        if settings.data.shuffle_dataset
        else sequences
    )
