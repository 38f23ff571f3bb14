# SPDX-License-Identifier: Apache-2.0
"""The reference of preference losses: the model as the training begins, which no second model in memory has to be.

It is the base without the adapter. An adapter that does not begin at zero has a frozen copy of its first values. Where
all weights are trained, what the reference says of all rows is computed before the first step.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from trl.trainer import utils as trl_utils

from llm_trainer.common import log
from llm_trainer.training.batches.whole_batches import WholeBatches, fill_batches
from llm_trainer.training.methods.answers import ANSWERS
from llm_trainer.training.methods.reference_values import build_key, compute_values, keep_values, load_values
from llm_trainer.training.resumable import ResumableMixin
from llm_trainer.training.resume import OWN_SETTINGS


class ReferenceMixin(ResumableMixin, WholeBatches):
    """A resumable trainer whose loss compares with a reference. It goes before TRL's trainer among the bases."""

    has_reference = True
    ld_alpha: float | None = None  # TRL's, which decides what is summed up
    calculate_KL: bool = False  # TRL's, which decides what is asked  # noqa: N815

    def begin_reference(self, asks_first: bool) -> None:
        """Take the model before its first step for the reference, and ask it first of all where nothing else can be."""
        self.asks_first = asks_first or not isinstance(self.model, PeftModel)
        self.reference: dict[str, torch.Tensor] = {}  # what it says of the rows of a split, where it is asked first

    def ask_reference(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-probabilities [rows, 2] that the reference gives the two answers of a batch's rows."""
        raise NotImplementedError

    def find_reference(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the same, of what was asked before the first step where it was."""
        if not self.reference:
            return self.ask_reference(batch)
        return self.reference["train" if self.model.training else "eval"][batch[ANSWERS].rows]

    def prepare_reference(self) -> None:
        """Ask the reference about all rows where it has to come first. Later the model has other weights."""
        if self.reference or not self.asks_first:
            return
        was_training = self.model.training
        self.model.eval()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            splits = {"train": self.train_dataset, "eval": self.eval_dataset}
            self.reference = {name: self.load_or_ask(rows) for name, rows in splits.items() if rows is not None}
        self.model.train(was_training)

    def load_or_ask(self, rows: Dataset) -> torch.Tensor:
        """Return what the reference says of a split's rows, [rows, 2], out of the cache or asked now."""
        group, arguments = self.run.consensus.group, self.args
        key = build_key(self.describe_reference(), rows)
        is_known = self.run.base_digest is not None  # else the key would not tell the model
        values = load_values(key, len(rows), group) if is_known else None
        if values is None:
            log.info(f"Computing the reference's log-probabilities of {len(rows)} rows")
            size = arguments.precompute_ref_batch_size or arguments.eval_batch_size
            filled = fill_batches(rows, size * arguments.world_size, self.sequences_a_row)
            batches = map(self._prepare_inputs, self._get_dataloader(filled, "Reference", size, SequentialSampler))
            values = compute_values(batches, max(rows["row"]) + 1, self.accelerator, self.ask_reference)
            if is_known:
                keep_values(key, values, group)
        return values.to(arguments.device)

    def describe_reference(self) -> dict[str, Any]:
        """Return what decides what the reference says of a row, by names."""
        names = (*OWN_SETTINGS, "model", "earlier adapter", "packing")
        autocast = [self.args.bf16, self.args.fp16]
        own = {"base": self.run.base_digest, "ld_alpha": self.ld_alpha, "autocast": autocast}
        own["kl"] = self.calculate_KL
        return {name: self.run.identity.get(name) for name in names} | own

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights of a checkpoint, once nobody needs the first ones."""
        self.prepare_reference()
        super()._load_from_checkpoint(*args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, once the reference is known."""
        self.prepare_reference()
        super()._run_epoch(**kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, once the reference is known."""
        self.prepare_reference()
        return super().evaluate(*args, **kwargs)


def keep_own_reference(trl_module: ModuleType) -> None:
    """Have a module of TRL neither load a second model for the reference, nor recompute all layers after its use.

    TRL has no options for it: three names are replaced in this process. After a reference's forward pass, TRL would
    recompute the activations of those layers, too, that keep them, and PEFT may leave weights frozen.
    """
    trl_module.use_adapter = use_adapter  # type: ignore[attr-defined]
    trl_module.create_model_from_path = lambda *arguments, **options: None  # type: ignore[attr-defined]
    trl_module.disable_gradient_checkpointing = lambda *arguments: nullcontext()  # type: ignore[attr-defined]


@contextmanager
def use_adapter(model: PeftModel, adapter_name: str | None) -> Iterator[None]:
    """Have a model compute with another adapter, or with none, and then train the same weights as before.

    PEFT freezes the adapter meanwhile. Where weights are sharded, those outside of blocks are whole from the forward
    pass on. It would then open the whole ones, and leave the shards frozen, which belong to no result.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with trl_utils.use_adapter(model, adapter_name):
        yield
    for parameter in trained:
        parameter.requires_grad_(True)
