# SPDX-License-Identifier: Apache-2.0
"""The moments at which a training saves a checkpoint, and the step after which it stops."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llm_trainer.common import log
from llm_trainer.training.resumable import EvaluationStop, ResumableMixin
from llm_trainer.training.stopping import SLOW_STEP_SECONDS, StopRequest

# Where the settings name no interval:
CHECKPOINTS_A_RUN = 10
MAX_SECONDS_BETWEEN = 900.0  # so much work may be lost with a host that vanishes without a signal
MAX_SAVING_SHARE = 0.05  # of the run's time

UNKNOWN_STEP_SECONDS = 3600.0  # before the first step has ended it may be a long one
GRACE_SECONDS = 120.0  # SageMaker kills a job so long after its signal
MAX_WAITING_SHARE = 0.5  # of them; the rest is for the export
BYTES_A_SECOND = 125e6  # of a checkpoint: what a gp3 volume takes by default


class SaveAndStop(TrainerCallback):
    """A callback that has a trainer save at an interval, and save and end once all ranks know of a stop."""

    def __init__(self, trainer: ResumableMixin, request: StopRequest, has_interval: bool) -> None:
        """Serve the trainer. With `has_interval` Transformers follows an interval of the user's own."""
        self.trainer = trainer
        trainer.end_within_step = self.end_within_step
        self.request = request
        self.has_interval = has_interval
        self.in_epoch = False
        self.deferred = False  # a save waits for the evaluation that belongs to its step
        self.ends_within_step = False  # the last whole step has no checkpoint, which is written at the end
        self.num_batches, self.began_at = 0, time.monotonic()  # of the current step
        self.num_steps, self.has_warned = 0, False  # of this process
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.step_at, self.step_seconds = time.monotonic(), UNKNOWN_STEP_SECONDS

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count steps and seconds with the first epoch of this process."""
        if not self.in_epoch:
            self.in_epoch, self.saved_step, self.step_at = True, state.global_step, time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what a stop in the middle of the step goes back to."""
        self.num_batches, self.began_at = 0, time.monotonic()
        if self.trainer.may_end_within_step:
            self.trainer.note_step_begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End in the middle of a step where all ranks know of a stop. The next run begins the step anew."""
        self.num_batches += 1
        between_polls = self.trainer.run.consensus.count_batches_between_polls(args.gradient_accumulation_steps)
        if self.num_batches % between_polls == 0 and self.poll_ranks(state)[0]:
            self.end_within_step(state, control)

    def end_within_step(self, state: TrainerState, control: TrainerControl) -> None:
        """End in the middle of a step, as after the last whole one."""
        self.trainer.return_to_last_step()
        self.stop(control, evaluation_due=False)
        self.ends_within_step = self.trainer.run.saves_checkpoints and state.global_step > self.saved_step
        log.info(self.describe_return(state))

    def describe_return(self, state: TrainerState) -> str:
        """Return the sentence on a stop in the middle of a step: where it was, and what the next start has."""
        sentence = f"The stop came within step {state.global_step + 1}, after {self.num_batches} of its batches: "
        if state.global_step == 0:
            return f"{sentence}nothing is trained yet, so there is no checkpoint, and the next start begins anew"
        return f"{sentence}the next start begins it anew"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with all ranks on a save and a stop after this step."""
        now = time.monotonic()
        self.step_seconds, self.step_at = now - self.step_at, now
        if self.trainer.may_end_within_step:
            self.trainer.note_step_end()
        self.warn_of_long_batches((now - self.began_at) / args.gradient_accumulation_steps)
        stop, save = self.poll_ranks(state)
        ends_run = state.global_step >= state.max_steps or control.should_training_stop
        ends_epoch = state.epoch == int(state.epoch)
        saves = self.trainer.run.saves_checkpoints
        if saves and not self.has_interval and (save or ends_run):
            control.should_save = True
        if stop:
            self.stop(control, evaluation_due=ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH)
            control.should_save = saves
        elif control.should_save and (ends_epoch or ends_run):
            # After the evaluation that belongs to this step: its outcome belongs into the checkpoint.
            control.should_save, self.deferred = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what was deferred. A stop has saved already, but for one in the middle of a step."""
        if self.trainer.stopped:
            control.should_evaluate, control.should_save = False, self.ends_within_step
        elif self.deferred:
            control.should_save, self.deferred = True, False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End an evaluation where all ranks know of a stop. Raises EvaluationStop."""
        if self.trainer.can_stop_evaluation and not self.trainer.stopped and self.poll_ranks(state)[0]:
            self.stop(control, evaluation_due=True)
            raise EvaluationStop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count steps and seconds from this checkpoint on."""
        self.saved_step, self.saved_at = state.global_step, time.monotonic()

    def poll_ranks(self, state: TrainerState) -> tuple[bool, bool]:
        """Return whether all ranks stop, and whether they save, at this moment."""
        return self.trainer.run.consensus.poll(
            stop=self.request.is_made(self.trainer.checkpoint_seconds),
            save=state.is_world_process_zero and self.is_save_due(state),
            step_seconds=self.step_seconds,
        )

    def warn_of_long_batches(self, batch_seconds: float) -> None:
        """Warn once where a stop that comes in the middle of a batch leaves too little time for the rest."""
        self.num_steps += 1
        if self.has_warned or self.num_steps < 2 or batch_seconds < SLOW_STEP_SECONDS:  # the first step compiles
            return
        expected = self.trainer.estimate_checkpoint_bytes() / BYTES_A_SECOND
        checkpoint_seconds = self.trainer.checkpoint_seconds or expected
        if batch_seconds + checkpoint_seconds < MAX_WAITING_SHARE * GRACE_SECONDS:
            return
        self.has_warned = True
        log.warning(
            f"a stop may wait {batch_seconds:.0f} s for the end of a batch, and a checkpoint takes about "
            f"{checkpoint_seconds:.0f} s: SageMaker kills a job {GRACE_SECONDS:.0f} s after its signal. Lower "
            "per_device_train_batch_size and, without global_batch_size, raise gradient_accumulation_steps as much, "
            "or lower max_length."
        )

    def stop(self, control: TrainerControl, evaluation_due: bool) -> None:
        """Have the trainer end after this step, and note the evaluation that it leaves out."""
        self.trainer.stop(self.request.age_seconds(), evaluation_due or control.should_evaluate)
        control.should_evaluate = False
        control.should_log = True
        control.should_training_stop = True

    def is_save_due(self, state: TrainerState) -> bool:
        """Tell whether to save: ten times a run and every quarter of an hour, but for at most 5 % of the time."""
        seconds = time.monotonic() - self.saved_at
        interval = max(1, state.max_steps // CHECKPOINTS_A_RUN)
        is_time = state.global_step - self.saved_step >= interval or seconds >= MAX_SECONDS_BETWEEN
        return is_time and seconds >= self.trainer.checkpoint_seconds / MAX_SAVING_SHARE
