# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer, made to survive: whole checkpoints, a stop that all ranks agree on, and an exact resume."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from llm_trainer.common.ranks import local_rank
from llm_trainer.job import checkpoint_dir
from llm_trainer.journal.journal import Journal
from llm_trainer.model import lora_init
from llm_trainer.training.resume import gather_over, share
from llm_trainer.training.stopping import SLOW_STEP_SECONDS, Agreement, StopRequest

CHECKPOINTS_A_RUN = 10  # where the settings name no interval
MAX_SECONDS_BETWEEN = 900.0  # what a host that vanishes without a signal may cost
MAX_SAVING_SHARE = 0.05  # of the run's time
DEFAULT_LIMIT = 2

# Where Triton does not run TRL has the LM head score all positions, for devices that compile for fixed shapes. A CPU
# does not, and the head of a small model is a third of its step: only positions with a label are scored, as on a GPU.
trl_utils._use_triton = lambda device: True


class EvaluationStop(Exception):  # noqa: N818 - it is not an error
    """A stop was agreed on during an evaluation, which may take longer than the platform waits."""


class ResumableTrainer(SFTTrainer):
    """An SFTTrainer that ends with the same weights however often it was stopped, killed and resumed.

    `SaveAndStop` decides when to save and to stop, the methods here how. Those that begin with an underscore are
    Transformers' own, of the pinned version.
    """

    agreement: Agreement
    run: dict[str, Any]  # what a run that goes on from one of our checkpoints has to share with this one
    keeps_checkpoints: bool
    journal = Journal(None)
    loraplus_lr_ratio: float | None = None  # of the adapter's B over A's
    adapter_start: Path | None = None  # the values that the adapter began with, where a checkpoint needs them
    evaluation_due = False  # the evaluation that belongs to the current step was put off by a stop
    optimizer: Any  # None at first
    _signature_columns: Any  # a list, or None at first
    order = torch.Generator()  # of the rows, where they are grouped by length
    stopped = False
    agreed_seconds = 0.0  # from the signal to the step after which all ranks stop
    checkpoint_seconds = 0.0  # what the last checkpoint took

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoint_dir.find_partial_dir(Path(self.args.output_dir)))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write everything under another name, then mark and rename it. Only rank 0 writes what is not sharded."""
        started = time.monotonic()
        folder = Path(self.args.output_dir)
        partial = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.keeps_house(partial):
            checkpoint_dir.remove_partial_checkpoints(folder)
        self.await_shards()
        # Trainer's and not SFTTrainer's, which writes a model card beside the checkpoints every time.
        Trainer._save_checkpoint(self, model, trial)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / partial.name)  # Transformers noted the temporary name
        if self.args.should_save:
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that holds tokens, and nobody reads
            if self.adapter_start:
                lora_init.save_initial_adapter(self.adapter_start, partial)
        self.await_shards()
        files = self.describe_files(partial)
        keeps_house = self.keeps_house(partial)
        if keeps_house:
            checkpoint_dir.complete_checkpoint(partial, self.run, self.num_tokens, self.evaluation_due, files)
        self.await_shards()  # no host may delete an old one before all have the new one
        if keeps_house:
            # One more than the only one: S3 may not have the new one yet, and mirrors the deletion of the old at once.
            self.rotate(at_least=2)
            checkpoint_dir.remove_partial_checkpoints(folder)
        self.checkpoint_seconds = time.monotonic() - started
        self.journal.write("checkpoint", step=self.state.global_step, seconds=round(self.checkpoint_seconds, 2))

    def keeps_house(self, partial: Path) -> bool:
        """Whether this rank renames and deletes checkpoints: the one that writes, or for a sharded model one a host.

        What rank 0 alone writes is seen by another host only where both have one folder.
        """
        return self.args.should_save or (
            self.is_fsdp_enabled and local_rank() == 0 and not (partial / TRAINER_STATE_NAME).exists()
        )

    def await_shards(self) -> None:
        if self.is_fsdp_enabled:
            dist.barrier(group=self.agreement.group)

    def describe_files(self, partial: Path) -> checkpoint_dir.Files:
        """The files of a written checkpoint, of all hosts if several wrote it."""
        if not self.is_fsdp_enabled:
            return (
                checkpoint_dir.describe_files(partial, checkpoint_dir.list_files(partial))
                if self.args.should_save
                else {}
            )
        own = checkpoint_dir.describe_files(
            partial, checkpoint_dir.select_own_share(checkpoint_dir.list_files(partial))
        )
        return {name: file for files in gather_over(self.agreement.group)(own) for name, file in sorted(files.items())}

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled and self.agreement.group is not None:
            share(Path(str(self.state.best_model_checkpoint)), self.agreement.group)
        super()._load_best_model()

    def rotate(self, at_least: int = 1) -> None:
        """Delete the checkpoints beyond save_total_limit, but keep the best and the newest ones."""
        newest = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        limit = max(at_least, self.args.save_total_limit or DEFAULT_LIMIT)
        checkpoint_dir.rotate_checkpoints(newest, limit, Path(best) if best else None)

    def _save_rng_state(self, output_dir: str) -> None:
        """Gather every rank's random state at rank 0, so that one host writes the whole checkpoint."""
        if self.agreement.group is None:
            return super()._save_rng_state(output_dir)
        with tempfile.TemporaryDirectory() as own_dir:
            super()._save_rng_state(own_dir)
            (own,) = Path(own_dir).iterdir()
            states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object((own.name, own.read_bytes()), states, group=self.agreement.group)
        for name, state in states or ():
            (Path(output_dir) / name).write_bytes(state)
        return None

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, on all devices and in all runs."""
        return int(self._total_train_tokens)

    def resume(self, checkpoint: Path | None) -> Any:
        """Train from the checkpoint on, or from the start; Transformers' result."""
        if checkpoint is None:
            return self.train()
        marker = checkpoint_dir.read_marker(checkpoint)
        if marker is not None:  # none in a checkpoint that another tool wrote
            self._total_train_tokens = marker.num_tokens
            self.evaluation_due = marker.evaluation_due
        return self.train(resume_from_checkpoint=str(checkpoint))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Take up the count of evaluations without progress too, which Transformers restores with all its settings."""
        position = super()._init_training_state(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        return position

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the rows' lengths too, which samplers ask for after all other columns have been removed."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, self.args.length_column_name])]

    def _get_train_sampler(self, *args: Any) -> Any:
        """The sampler, whose order depends on seed and epoch alone: a resumed epoch has to be the interrupted one."""
        sampler = super()._get_train_sampler(*args)
        if isinstance(sampler, LengthGroupedSampler):  # Transformers seeds the random one itself
            sampler.generator = self.order
            sampler.batch_size *= self.args.world_size  # the rows of a step: their order is the same on any ranks
            sampler.lengths = sampler.lengths[:]  # a list of a column, which would be read from disk for every row
        return sampler

    def _run_epoch(self, **kwargs: Any) -> None:
        self.order.manual_seed(self.args.seed + kwargs["epoch"])
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self.make_up_evaluation(**{name: kwargs[name] for name in names})
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self.make_up_evaluation(self.model, trial, self.state.epoch, None, start_time)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def make_up_evaluation(
        self, model: torch.nn.Module, trial: Any, epoch: float, ignore_keys_for_eval: Any, start_time: float
    ) -> None:
        """Evaluate now if the stop before this run put it off, so that its metric is not missing."""
        if self.evaluation_due and not self.stopped:
            self.evaluation_due = False
            self.control.should_evaluate = True
            self.control.should_save = self.args.load_best_model_at_end  # the best one has to be on disk
            self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Transformers' optimizer, with LoRA+'s learning rates (arXiv:2402.12354) where they are asked for."""
        if self.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = create_loraplus_optimizer(
                model,
                kind,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
        return self.optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and the tokens of packed rows counted, of which TRL would count the slots of one sequence."""
        num_tokens, before = inputs.pop("num_tokens", None), self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if num_tokens is not None and self.model.training:
            self._total_train_tokens = before + int(self.accelerator.reduce(num_tokens.sum()))
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStop:
            self.evaluation_due = True
            if self.keeps_checkpoints:
                self._save_checkpoint(model, trial)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without moving the random numbers of training: a resumed run does not repeat the evaluation."""
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)


class SaveAndStop(TrainerCallback):
    """Has the trainer save at an interval, and save and end after the step at which all ranks know of a stop."""

    def __init__(self, trainer: ResumableTrainer, request: StopRequest, has_interval: bool) -> None:
        self.trainer = trainer
        self.request = request
        self.has_interval = has_interval  # the user's own, which Transformers follows
        self.in_epoch = False
        self.deferred = False
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.step_at, self.step_seconds = time.monotonic(), 0.0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.in_epoch:
            self.in_epoch, self.saved_step, self.step_at = True, state.global_step, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self.step_seconds, self.step_at = now - self.step_at, now
        stop, save = self.reach_agreement(state)
        ends_run = state.global_step >= state.max_steps or control.should_training_stop
        ends_epoch = state.epoch == int(state.epoch)
        if self.trainer.keeps_checkpoints and not self.has_interval and (save or ends_run):
            control.should_save = True
        if stop:
            self.stop(control, evaluation_due=ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH)
            control.should_save = self.trainer.keeps_checkpoints
        elif control.should_save and (ends_epoch or ends_run):
            # After the evaluation that belongs to this step: its outcome belongs into the checkpoint.
            control.should_save, self.deferred = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.stopped:
            control.should_evaluate = control.should_save = False
        elif self.deferred:
            control.should_save, self.deferred = True, False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.in_epoch and not self.trainer.stopped and self.reach_agreement(state)[0]:
            self.stop(control, evaluation_due=True)
            raise EvaluationStop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step, self.saved_at = state.global_step, time.monotonic()

    def reach_agreement(self, state: TrainerState) -> tuple[bool, bool]:
        return self.trainer.agreement.reach(
            stop=self.request.is_made(self.trainer.checkpoint_seconds),
            save=state.is_world_process_zero and self.is_save_due(state),
            slow=self.step_seconds > SLOW_STEP_SECONDS,
        )

    def stop(self, control: TrainerControl, evaluation_due: bool) -> None:
        self.trainer.stopped = True
        self.trainer.agreed_seconds = self.request.age_seconds()
        self.trainer.evaluation_due = evaluation_due or control.should_evaluate
        control.should_evaluate = False
        control.should_log = True
        control.should_training_stop = True

    def is_save_due(self, state: TrainerState) -> bool:
        """Ten times a run and at least every quarter of an hour, unless that would cost more than 5 % of the time."""
        seconds = time.monotonic() - self.saved_at
        interval = max(1, state.max_steps // CHECKPOINTS_A_RUN)
        is_time = state.global_step - self.saved_step >= interval or seconds >= MAX_SECONDS_BETWEEN
        return is_time and seconds >= self.trainer.checkpoint_seconds / MAX_SAVING_SHARE
