# SPDX-License-Identifier: Apache-2.0
"""Trainers that survive, whatever the training method: whole checkpoints, an agreed stop, and an exact resume.

`ResumableMixin` goes before any trainer of Transformers or TRL among the bases of a class. Methods whose names begin
with an underscore are Transformers' own, of the pinned version.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import RandomSampler
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerControl, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm_trainer.common import log
from llm_trainer.common.activity_notes import EVALUATION, note_activity
from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_rank
from llm_trainer.job import checkpoint_dir
from llm_trainer.journal.journal import Journal
from llm_trainer.model import lora_init
from llm_trainer.rewards.rewards import Reward
from llm_trainer.training.filled_order import FilledOrder
from llm_trainer.training.resume import make_gather, share_files
from llm_trainer.training.sharding import checkpoint_kinds, fsdp
from llm_trainer.training.step_start import RandomState, StepCounts, seed_rank
from llm_trainer.training.stopping import StopConsensus, StopRequest

CONVERSIONS = "_weight_conversions"  # a model's, between the names of its weights and those in its base's files
DEFAULT_LIMIT = 2  # checkpoints that are kept where the settings do not tell


class EvaluationStop(Exception):  # noqa: N818 - it is not an error
    """A stop was agreed on during an evaluation, which may take longer than the platform waits."""


@dataclass(frozen=True)
class RunContext:
    """The things that a resumable trainer needs to know of its job."""

    consensus: StopConsensus
    identity: dict[str, Any]  # a run that goes on from one of our checkpoints has the same
    journal: Journal
    saves_checkpoints: bool = True
    has_logging_interval: bool = True  # the user's own, which a short run does not change
    loraplus_lr_ratio: float | None = None  # the learning rate of the adapter's B divided by A's
    adapter_start: Path | None = None  # folder of the adapter's first values, where a checkpoint has to hold them
    goes_on: bool = False  # whether the adapter begins with the values of an earlier one
    base_digest: str | None = None  # of the weights in the files that the training begins with
    saved: Path | None = None  # is created when there is a checkpoint
    teacher: PreTrainedModel | None = None  # of distillation
    rewards: Sequence[Reward] = ()  # of methods that generate
    stop_request: StopRequest | None = None  # for steps that are too long to be waited for


class ResumableMixin(Trainer):
    """A trainer that ends with the same weights however often it was stopped, killed and resumed.

    `SaveAndStop` decides when to save and to stop, and the methods here how.
    """

    optimizer: Any  # None at first
    has_reference = False  # whether the loss compares with the model as the training begins
    makes_batches_of_rows = True  # whether what the model computes is in the rows
    end_within_step: Callable[[TrainerState, TrainerControl], None]  # `SaveAndStop` sets it
    _signature_columns: Any  # a list, or None at first

    def __init__(self, *args: Any, run: RunContext, **kwargs: Any) -> None:
        """Take the arguments of the trainer that follows among the bases, and what this class needs."""
        self.run = run
        self.row_order = torch.Generator()
        self.stopped = False
        self.can_stop_evaluation = False  # an EvaluationStop would be caught now
        self.resumed_from: Path | None = None  # a checkpoint
        self.evaluation_due = False  # a stop put off the evaluation that belongs to the current step
        self.agreed_seconds = 0.0  # from the signal to the step after which all ranks stop
        self.checkpoint_seconds = 0.0  # the last checkpoint took so long
        self.random_state: RandomState | None = None  # after the last whole step
        self.step_counts: StepCounts | None = None  # at the beginning of the current step
        super().__init__(*args, **kwargs)

    @property
    def num_tokens(self) -> int:
        """Tokens trained on up to the last line, on all devices and in all runs, as TRL's trainers count them."""
        return int(self._total_train_tokens)

    def count_tokens(self) -> int:
        """Return the tokens trained on so far. Every rank must call this."""
        return self.num_tokens

    # Stops

    def stop(self, agreed_seconds: float, evaluation_due: bool) -> None:
        """Note that all ranks stop after this step. `agreed_seconds` have passed since the signal."""
        self.stopped, self.agreed_seconds, self.evaluation_due = True, agreed_seconds, evaluation_due

    @property
    def may_end_within_step(self) -> bool:
        """True where a stop may come in the middle of a step."""
        return self.args.gradient_accumulation_steps > 1

    def note_step_begin(self) -> None:
        """Keep the sums to which a stop in the middle of the step that begins goes back."""
        self.step_counts = StepCounts.read(self)

    def note_step_end(self) -> None:
        """Keep the random state that a checkpoint of this step has, for a stop in the middle of the next one."""
        self.random_state = RandomState.read(self.args.device)

    def return_to_last_step(self) -> None:
        """Throw away the step that has begun: all is as after the last whole one."""
        self.model.zero_grad()
        if self.step_counts is not None:
            self.step_counts.restore(self)
        if self.random_state is not None:
            self.random_state.restore(self.args.device)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state of a checkpoint, and keep it: it is the state after the last whole step.

        A checkpoint of another number of ranks may have none for this rank, which then draws what no other one does.
        """
        if checkpoint is not None:
            seed_rank(self.args.seed, self.state.global_step, self.args.process_index)
        super()._load_rng_state(checkpoint)
        self.note_step_end()

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Save where a stop ends an evaluation, which the next run makes up for."""
        self.can_stop_evaluation = True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStop:
            self.evaluation_due = True
            if self.run.saves_checkpoints:
                self._save_checkpoint(model, trial)
        finally:
            self.can_stop_evaluation = False

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of checkpoints that are not complete yet."""
        return str(checkpoint_dir.find_partial_dir(Path(self.args.output_dir)))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write everything under another name, then mark and rename it. Only rank 0 writes what is not sharded."""
        started = time.monotonic()
        folder = Path(self.args.output_dir)
        with note_activity("writing a checkpoint", folder):
            partial = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.manages_checkpoint_dir(partial):
                checkpoint_dir.remove_partial_checkpoints(folder)
            self.barrier_if_sharded()
            self.write_partial_checkpoint(partial, model, trial)
            self.barrier_if_sharded()
            self.complete_checkpoint(partial, self.describe_files(partial))
        if self.run.saved:
            self.run.saved.touch()
        self.checkpoint_seconds = time.monotonic() - started
        seconds = round(self.checkpoint_seconds, 2)
        self.run.journal.write("checkpoint", step=self.state.global_step, seconds=seconds)

    def estimate_checkpoint_bytes(self) -> int:
        """Return about how large a checkpoint is: the weights that are trained, and two numbers in float32 for each."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return sum(weight.numel() * (weight.element_size() + 8) for weight in trained)

    def write_partial_checkpoint(self, partial: Path, model: torch.nn.Module, trial: Any) -> None:
        """Write the files of a checkpoint without its marker."""
        # Trainer's and not SFTTrainer's, which writes a model card beside the checkpoints every time.
        Trainer._save_checkpoint(self, model, trial)
        if self.state.best_global_step == self.state.global_step:  # Transformers noted the temporary name
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / partial.name)
        if self.args.should_save:
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that holds tokens, and nobody reads
            if self.run.adapter_start:
                lora_init.save_initial_adapter(self.run.adapter_start, partial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write weights by the names that the model has, by which Transformers looks for them when a run goes on.

        It would write the names that the base has in its files, such as those of each expert. A copy of the adapter for
        the reference is not written.
        """
        conversions = getattr(self.model, CONVERSIONS, None)
        setattr(self.model, CONVERSIONS, [])
        try:
            with lora_init.hide_copy(self.model):
                super()._save(output_dir, state_dict)
        finally:
            setattr(self.model, CONVERSIONS, conversions)

    def complete_checkpoint(self, partial: Path, files: checkpoint_dir.Files) -> None:
        """Mark and rename a written checkpoint, then delete those that are too many."""
        manages, num_tokens = self.manages_checkpoint_dir(partial), self.count_tokens()  # before the rename
        if manages:
            checkpoint_dir.complete_checkpoint(partial, self.run.identity, num_tokens, self.evaluation_due, files)
        self.barrier_if_sharded()  # no host may delete an old one before all have the new one
        if manages:
            # One more than the only one: S3 may not have the new one yet, and mirrors the deletion of the old at once.
            self.rotate_checkpoints(at_least=2)
            checkpoint_dir.remove_partial_checkpoints(Path(self.args.output_dir))

    def manages_checkpoint_dir(self, partial: Path) -> bool:
        """Tell whether this rank renames and deletes checkpoints: the one that writes, or one a host if sharded.

        Other hosts see the files that rank 0 alone writes only where all hosts have one folder.
        """
        return self.args.should_save or (
            self.is_fsdp_enabled and local_rank() == 0 and not (partial / TRAINER_STATE_NAME).exists()
        )

    def barrier_if_sharded(self) -> None:
        """Wait for all ranks where each writes a share of a checkpoint."""
        if self.is_fsdp_enabled:
            dist.barrier(group=self.run.consensus.group)

    def describe_files(self, partial: Path) -> checkpoint_dir.Files:
        """Return size and digest of a written checkpoint's files, of all hosts where several wrote it."""
        if not self.is_fsdp_enabled:
            names = checkpoint_dir.list_files(partial) if self.args.should_save else []
            return checkpoint_dir.describe_files(partial, names)
        names = checkpoint_dir.select_own_share(checkpoint_dir.list_files(partial))
        shares = make_gather(self.run.consensus.group)(checkpoint_dir.describe_files(partial, names))
        return {name: file for files in shares for name, file in sorted(files.items())}

    def rotate_checkpoints(self, at_least: int = 1) -> None:
        """Delete the checkpoints beyond save_total_limit, but keep the best and the newest ones."""
        newest = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        limit = max(at_least, self.args.save_total_limit or DEFAULT_LIMIT)
        checkpoint_dir.rotate_checkpoints(newest, limit, Path(best) if best else None)

    def _save_rng_state(self, output_dir: str) -> None:
        """Gather every rank's random state at rank 0, so that one host writes the whole checkpoint."""
        group = self.run.consensus.group
        if group is None:
            return super()._save_rng_state(output_dir)
        with tempfile.TemporaryDirectory() as own_dir:
            super()._save_rng_state(own_dir)
            (own,) = Path(own_dir).iterdir()
            states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object((own.name, own.read_bytes()), states, group=group)
        for name, state in states or ():
            (Path(output_dir) / name).write_bytes(state)
        return None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise UserError for weights that a checkpoint lacks, where Transformers would go on with other values."""
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(weight) for name, weight in weights.items() if name not in load_result.missing_keys}
        lost = [name for name in load_result.missing_keys if name in weights and id(weights[name]) not in loaded]
        if lost:
            raise UserError(
                f"The checkpoint lacks {len(lost)} weights of this model, such as {lost[0]}: set "
                "resume_from_checkpoint=false to start anew."
            )

    def _load_best_model(self) -> None:
        """Send each host the files of the best checkpoint that it lacks, and load it. Raises UserError if it is gone.

        Transformers would keep the last weights. Other hosts may: they export nothing.
        """
        best = Path(str(self.state.best_model_checkpoint))
        if self.args.should_save and not best.is_dir():
            raise UserError(
                f"The best checkpoint, {best}, is gone: start the job again without load_best_model_at_end."
            )
        group = self.run.consensus.group
        is_sharded = any(make_gather(group)(checkpoint_kinds.is_sharded(best)))  # a host may have none of its files
        if group is not None and (self.is_fsdp_enabled or is_sharded):
            share_files(best, group)
        if self.is_of_other_kind(best):
            checkpoint_kinds.load_weights(self.model, best)
        else:
            super()._load_best_model()

    def is_of_other_kind(self, checkpoint: Path) -> bool:
        """Tell whether a checkpoint is sharded and this run is not, or the other way round."""
        return checkpoint_kinds.is_sharded(checkpoint) != self.is_fsdp_enabled

    # Resume

    def train_from(self, checkpoint: Path | None) -> Any:
        """Train from the checkpoint on, or from the start. Return Transformers' `TrainOutput`."""
        if self.has_reference and (self.run.adapter_start or self.run.goes_on):  # the base alone is not the beginning
            lora_init.copy_adapter(self.model)
        if self.is_fsdp_enabled:
            fsdp.expose_packed_weights(self.model, self.args.device)
        if checkpoint is None:
            return self.train()
        self.resumed_from = checkpoint
        marker = checkpoint_dir.read_marker(checkpoint)
        if marker is not None:  # a checkpoint of another tool has none
            self._total_train_tokens = marker.num_tokens
            self.evaluation_due = marker.evaluation_due
        return self.train(resume_from_checkpoint=str(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint, which a run with FSDP or one without may have written."""
        if self.is_of_other_kind(Path(resume_from_checkpoint)):
            checkpoint_kinds.load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and schedule of a checkpoint, which a run with FSDP or one without may have written."""
        if checkpoint is None or not self.is_of_other_kind(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        checkpoint_kinds.load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Restore the count of evaluations without progress, but not its settings, as Transformers would."""
        position = super()._init_training_state(*args, **kwargs)
        self.forget_foreign_best()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        return position

    def forget_foreign_best(self) -> None:
        """Forget a best checkpoint that lies beside neither this run's checkpoints nor the resumed one.

        Its path comes out of a file, and its weights would become the result.
        """
        best = self.state.best_model_checkpoint
        if best is None or self.resumed_from is None:
            return
        is_checkpoint = checkpoint_dir.parse_step(Path(best)) >= 0
        if not is_checkpoint or Path(best).parent not in (Path(self.args.output_dir), self.resumed_from.parent):
            log.warning(
                f"{self.resumed_from} names {best} as the best checkpoint, which is none of its run: forgotten."
            )
            self.state.best_model_checkpoint = None

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch whose order of rows depends on seed and epoch alone."""
        self.seed_order(kwargs["epoch"])
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self.make_up_evaluation(*(kwargs[name] for name in names))
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def seed_order(self, epoch: int) -> None:
        """Have the next sampler give the order of an epoch, counted from 0."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.row_order.manual_seed(seed + epoch)

    def order_rows(self, epoch: int) -> Iterator[int]:
        """Return the places of an epoch's rows in their order. Do not call this while it is trained on."""
        self.seed_order(epoch)
        return iter(self._get_train_sampler())

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Make up for an evaluation that was due after the last step."""
        self.make_up_evaluation(self.model, trial, self.state.epoch, None, start_time)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def make_up_evaluation(
        self, model: torch.nn.Module, trial: Any, epoch: float, ignore_keys_for_eval: Any, start_time: float
    ) -> None:
        """Evaluate now if the stop of an earlier run put the evaluation off, so that its metric is not missing."""
        if self.evaluation_due and not self.stopped:
            self.evaluation_due = False
            self.control.should_evaluate = True
            self.control.should_save = self.args.load_best_model_at_end  # the best one has to be on disk
            self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without moving the random numbers of training: a resumed run does not repeat the evaluation.

        The model goes back to its mode of training, by which TRL's trainers tell lines of training from others.
        """
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        was_training = self.model.training
        with note_activity(EVALUATION), torch.random.fork_rng(devices=devices):
            metrics = super().evaluate(*args, **kwargs)
        self.model.train(was_training)
        return metrics

    # Rows and optimizer

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the rows' lengths too, which samplers ask for after all other columns have been removed."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, self.args.length_column_name])]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return a sampler whose order depends on seed and epoch alone: a resumed epoch is the interrupted one.

        Rows of `train_dataset` beyond those of the training fill its last batch, and come last.
        """
        order = super()._get_train_sampler(self.train_dataset)
        if order is None or isinstance(order, BatchRebalanceSampler):
            return order
        if isinstance(order, RandomSampler | LengthGroupedSampler):
            order.generator = self.row_order
        if isinstance(order, LengthGroupedSampler):
            order.batch_size *= self.args.world_size  # the rows of a step: their order is the same on any ranks
            order.lengths = order.lengths[:]  # a list of a column, which would be read from disk for every row
        num_rows = len(self.train_dataset)
        return FilledOrder(order, num_rows, num_rows if train_dataset is None else len(train_dataset))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Return Transformers' optimizer, with LoRA+'s learning rates (arXiv:2402.12354) where they are asked for."""
        if self.run.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = create_loraplus_optimizer(
                model,
                kind,
                loraplus_lr_ratio=self.run.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
        return self.optimizer
