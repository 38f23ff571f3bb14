# SPDX-License-Identifier: Apache-2.0
"""The moments at which a training saves a checkpoint, and the step after which it stops."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llm_trainer.training.resumable import EvaluationStop, ResumableMixin
from llm_trainer.training.stopping import StopRequest

# Where the settings name no interval:
CHECKPOINTS_A_RUN = 10
MAX_SECONDS_BETWEEN = 900.0  # so much work may be lost with a host that vanishes without a signal
MAX_SAVING_SHARE = 0.05  # of the run's time

SLOW_STEP_SECONDS = 1.0  # from here on a step costs more than the wait for all ranks' decision


class SaveAndStop(TrainerCallback):
    """A callback that has a trainer save at an interval, and save and end once all ranks know of a stop."""

    def __init__(self, trainer: ResumableMixin, request: StopRequest, has_interval: bool) -> None:
        """Serve the trainer. With `has_interval` Transformers follows an interval of the user's own."""
        self.trainer = trainer
        self.request = request
        self.has_interval = has_interval
        self.in_epoch = False
        self.deferred = False  # a save waits for the evaluation that belongs to its step
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.step_at, self.step_seconds = time.monotonic(), 0.0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count steps and seconds with the first epoch of this process."""
        if not self.in_epoch:
            self.in_epoch, self.saved_step, self.step_at = True, state.global_step, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with all ranks on a save and a stop after this step."""
        now = time.monotonic()
        self.step_seconds, self.step_at = now - self.step_at, now
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
        """Save what was deferred, and nothing after a stop, which has saved already."""
        if self.trainer.stopped:
            control.should_evaluate = control.should_save = False
        elif self.deferred:
            control.should_save, self.deferred = True, False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End an evaluation where all ranks know of a stop. Raises EvaluationStop."""
        if self.in_epoch and not self.trainer.stopped and self.poll_ranks(state)[0]:
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
            slow=self.step_seconds > SLOW_STEP_SECONDS,
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
