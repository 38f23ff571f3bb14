# SPDX-License-Identifier: Apache-2.0
"""Sequences that several rows share, to compute little on padding; none where a row could see another one."""

import heapq
from dataclasses import dataclass, field, replace
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
from llm_trainer.config.sections import DataSettings
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.model.kinds.auto_class import sees_images
from llm_trainer.training.packing_check import find_cross_row_attention

# So much padding a batch may have, as a share of its tokens: shorter sequences make attention cheaper.
SPARE_SHARE = 0.03
# Axes of positions in models that see images: a text's own, time, height and width, and in some a fourth.
IMAGE_AXES = (4, 5)
BIN_ROWS = 10_000  # rows packed together: enough to fill the bins, and some hundred MB at most


@dataclass(frozen=True)
class PackedSplit:
    """The figures of a split whose rows were packed before the training."""

    num_rows: int
    num_sequences: int
    fill_ratio: float  # share of the sequences' slots that hold a token

    def __str__(self) -> str:
        """Return a line for the log."""
        filled = f"{self.fill_ratio:.1%} of the slots filled"
        return f"packed {self.num_rows} rows into {self.num_sequences} sequences, {filled}"

    def describe(self) -> dict[str, Any]:
        """Return the figures as the manifest names them."""
        return {"num_rows": self.num_rows, "num_sequences": self.num_sequences, "filled": self.fill_ratio}


@dataclass(frozen=True)
class PackingCollator:
    """Makes a batch in which rows share sequences, of rows or of sequences that `trl.pack_dataset` made of rows.

    There is no attention mask. Attention kernels tell the rows apart by position ids that begin again at 0.
    """

    pad_token_id: int
    max_length: int | None  # tokens of a sequence at most; None: as many as the longest row of the batch has
    flattens: bool  # one sequence for flash attention, while dense attention would pay for its length squared
    pad_to_multiple_of: int | None = None
    num_axes: int | None = None  # axes of the positions; None: a single one, without a dimension for it

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_ids`, `labels` and `position_ids` [sequences, slots], and what flash attention takes.

        Positions of several axes are [axes, sequences, slots], the same on all of them.

        `num_tokens` [examples] comes first, with 0 for those that only fill the batch. Transformers and Accelerate take
        the first tensor's length for the number of examples, by which they weigh an evaluation's losses.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        if self.flattens:
            flatten = DataCollatorForLanguageModeling(
                self.pad_token_id, padding_free=True, pad_to_multiple_of=self.pad_to_multiple_of
            )
            batch = flatten(examples)
        else:
            batch = self.stack(examples, plan_batch_bins(lengths, max(self.max_length or 0, *lengths)))
        if self.num_axes is not None:
            batch["position_ids"] = batch["position_ids"].expand(self.num_axes, -1, -1)
        has_label = [any(label != IGNORED for label in example["labels"]) for example in examples]
        return {"num_tokens": torch.tensor(lengths) * torch.tensor(has_label), **batch}

    def stack(self, examples: list[dict[str, Any]], sequences: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return the batch of examples end to end, padded at the right. `sequences` holds the examples' places."""
        slots = max(sum(len(examples[place]["input_ids"]) for place in places) for places in sequences)
        slots += -slots % (self.pad_to_multiple_of or 1)
        input_ids = torch.full((len(sequences), slots), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORED)
        position_ids = torch.empty_like(input_ids)
        for index, places in enumerate(sequences):
            chosen = [examples[place] for place in places]
            used = sum(len(example["input_ids"]) for example in chosen)
            input_ids[index, :used] = torch.cat([torch.tensor(example["input_ids"]) for example in chosen])
            labels[index, :used] = torch.cat([torch.tensor(example["labels"]) for example in chosen])
            rows = [length for example in chosen for length in example.get("seq_lengths", [len(example["input_ids"])])]
            padding = slots - used  # it counts as a row of its own, which no other sees
            position_ids[index] = torch.cat([torch.arange(length) for length in [*rows, padding]])
        labels[position_ids == 0] = IGNORED  # it would be predicted from another row's last token
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def plan_batch_bins(lengths: list[int], limit: int) -> list[list[int]]:
    """Return the places of the rows in each sequence of a batch. No row may be longer than `limit` tokens.

    The sequences are as many, and so as short, as leave at most SPARE_SHARE of padding, and none exceeds `limit`. Where
    no number of sequences does, those with the fewest slots come back.
    """
    budget = sum(lengths) * (1 + SPARE_SHARE)
    best, fewest_slots = [[place] for place in range(len(lengths))], len(lengths) * max(lengths)
    for num_sequences in range(len(lengths), 0, -1):
        if fewest_slots <= budget:
            break
        sequences = assign_longest_first(lengths, num_sequences)
        fullest = max(sum(lengths[place] for place in places) for places in sequences)
        if fullest <= limit and num_sequences * fullest < fewest_slots:
            best, fewest_slots = sequences, num_sequences * fullest
    return best


def assign_longest_first(lengths: list[int], num_sequences: int) -> list[list[int]]:
    """Assign each row, the longest first, to the sequence that holds the fewest tokens so far. Return their places."""
    sequences: list[list[int]] = [[] for _ in range(num_sequences)]
    heap = [(0, index) for index in range(num_sequences)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        held, index = heapq.heappop(heap)
        sequences[index].append(place)
        heapq.heappush(heap, (held + lengths[place], index))
    return sequences


@dataclass
class Packing:
    """The way in which this job's rows become sequences, and the reason."""

    mode: Literal["batch", "data set", "off"]
    reason: str
    collator: PackingCollator | None = None  # None: TRL's, which pads
    splits: dict[str, PackedSplit] = field(default_factory=dict)  # those packed before the training

    def __str__(self) -> str:
        """Return a line for the log."""
        if self.mode == "off":
            return f"Packing off: {self.reason}"
        return f"Packing: the rows of a {self.mode} share sequences ({self.reason})"

    @property
    def unit(self) -> str:
        """The word for the things that a batch counts."""
        return "sequences" if self.mode == "data set" else "rows"

    def describe(self) -> dict[str, Any]:
        """Return the packing for the manifest, ready for JSON."""
        return {
            "mode": self.mode,
            "reason": self.reason,
            **{name: split.describe() for name, split in self.splits.items()},
        }

    def pack(
        self, splits: dict[str, Dataset], settings: DataSettings, seed: int, scratch_dir: Path
    ) -> dict[str, Dataset]:
        """Return the splits as they are trained on and evaluated: in sequences where that is wanted, else as they are.

        The figures of packed splits are in `splits` afterwards. `seed` orders the sequences.
        """
        max_length = cast(int, settings.max_length)  # whoever wants sequences has given it
        train = self.mode == "data set"
        wanted = {"train": train, "validation": train if settings.eval_packing is None else settings.eval_packing}
        sequences = dict(splits)
        for name in filter(wanted.get, splits):
            packed = pack_split(splits[name], settings, scratch_dir / f"{name}-packed.arrow")
            sequences[name] = packed.shuffle(seed=seed, keep_in_memory=True) if settings.shuffle_dataset else packed
            num_tokens = int(splits[name].with_format("numpy")["length"][:].sum())
            self.splits[name] = PackedSplit(
                num_rows=len(splits[name]),
                num_sequences=len(sequences[name]),
                fill_ratio=num_tokens / (len(sequences[name]) * max_length),
            )
        return sequences


def choose_packing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
    settings: DataSettings,
    group: dist.ProcessGroup | None,
) -> Packing:
    """Return the packing that the settings ask for, if the model keeps the rows of a sequence apart.

    Every rank must call this. Raises UserError where the model does not and the settings name packing. Where they leave
    it open, packing is off.
    """
    if settings.generates or settings.packing is False:
        return Packing("off", "completions are trained on padded" if settings.generates else "packing=false")
    flattens = is_flash_attention_requested(model.config)
    collator = PackingCollator(tokenizer.pad_token_id, settings.max_length, flattens, arguments.pad_to_multiple_of)
    mode: Literal["data set", "batch"] = "data set" if settings.packing else "batch"
    found = f"{model.config._attn_implementation} attention keeps them apart"
    tried = [Packing(mode, found, replace(collator, num_axes=num_axes)) for num_axes in list_axes(model)]
    reasons: list[str] = []
    for packing in tried:
        reason = find_reason_against(packing, model, arguments, group)
        if reason is None:
            return packing
        reasons.append(reason)
    return switch_off(settings, reasons[0])


def examine_model(
    packing: Packing,
    model: PreTrainedModel,
    arguments: SFTConfig,
    settings: DataSettings,
    group: dist.ProcessGroup | None,
) -> Packing:
    """Return the packing if another model that reads its sequences keeps their rows apart, too, else none.

    Every rank must call this. Raises UserError as `choose_packing`.
    """
    if packing.collator is None:
        return packing
    reason = find_reason_against(packing, model, arguments, group)
    return packing if reason is None else switch_off(settings, reason)


def find_reason_against(
    packing: Packing, model: PreTrainedModel, arguments: SFTConfig, group: dist.ProcessGroup | None
) -> str | None:
    """Return why a model would not read rows of a packing as if they were alone, None where it does.

    Every rank must call this.
    """
    if arguments.parallelism_config is not None:
        return "parallelism_config may split a sequence over devices"
    assert packing.collator is not None
    with autocast_like_training(arguments):
        found = find_cross_row_attention(model, replace(packing.collator, pad_token_id=0, max_length=None))
    return agree_on_reason(found, group)


def switch_off(settings: DataSettings, reason: str) -> Packing:
    """Return the packing of rows that are padded for a reason. Raises UserError where the settings name packing."""
    for name in ("packing", "eval_packing"):
        if settings.value(name):
            raise UserError(f"{name}=true: {reason}: leave it out, and rows are padded.")
    return Packing("off", reason)


def list_axes(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Return the numbers of axes that positions may have for a model; None for a single one without a dimension.

    Models that see images count positions in time, height and width, or in one more. Of several axes they read where a
    row begins from another one before them, and from a single one they do not.
    """
    return (None, *IMAGE_AXES) if sees_images(model.config) else (None,)


def autocast_like_training(arguments: SFTConfig) -> torch.autocast:
    """Return the training's mixed precision, as a context.

    Flash attention takes no float32, the type in which full fine-tuning keeps the weights.
    """
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    return torch.autocast(arguments.device.type, dtype, enabled=arguments.fp16 or arguments.bf16)


def agree_on_reason(reason: str | None, group: dist.ProcessGroup | None) -> str | None:
    """Return the reason of the first rank that has one. Every rank must call this.

    GPUs may round differently, and the ranks must not train in different ways for that.
    """
    reasons: list[str | None] = [reason]
    if group is not None:
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason, group=group)
    return next(filter(None, reasons), None)


def pack_split(rows: Dataset, settings: DataSettings, arrow: Path) -> Dataset:
    """Return the rows in sequences of at most max_length tokens. One process a host packs them, into a file.

    The column `seq_lengths` tells the rows of a sequence apart. Rows have been cut to max_length before, and none is
    lost here.
    """

    def pack() -> None:
        options = {"cache_file_name": str(arrow), "load_from_cache_file": False, "batch_size": BIN_ROWS}
        tokens = rows.select_columns(["input_ids", "labels"])
        pack_dataset(tokens, settings.max_length, settings.packing_strategy, options)

    run_on_local_rank_zero(arrow.with_suffix(".done"), pack)
    return Dataset.from_file(str(arrow))
