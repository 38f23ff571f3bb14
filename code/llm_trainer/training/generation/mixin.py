# SPDX-License-Identifier: Apache-2.0
"""Trainers of TRL that write completions: our prompts, and stops and resumes as exact as those of any other trainer."""

import math
from pathlib import Path
from typing import Any

from llm_trainer.training.generation.evaluation import WholeEvaluations
from llm_trainer.training.generation.noted import describe_completions, is_noted
from llm_trainer.training.generation.prompts import COLUMNS, TOKENS, collate_prompts
from llm_trainer.training.generation.state import load_state, save_states
from llm_trainer.training.generation.stops import EndsEarly, GenerationStop, ending_early, has_any
from llm_trainer.training.resumable import RunContext
from llm_trainer.training.sharding.fsdp import hold_whole

EPOCH_NAMES = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")


class GenerationMixin(WholeEvaluations):
    """A resumable trainer that writes completions. It goes before TRL's trainer among the bases.

    Generations that later steps go on with are in the checkpoint.
    """

    makes_batches_of_rows = False
    may_end_within_step = True
    shuffle_dataset: bool
    control: Any
    beta: float
    num_iterations: int
    _step: int
    _buffered_inputs: Any
    _metrics: Any
    _logs: Any

    def __init__(self, *args: Any, run: RunContext, data_collator: Any = None, **kwargs: Any) -> None:
        """Take the arguments of TRL's trainer, but for the rewards, which are the job's."""
        super().__init__(*args, run=run, reward_funcs=list(run.rewards), **kwargs)
        self.data_collator = collate_prompts
        self.has_reference = bool(self.beta)
        self.prompt_tokens: list[list[int]] = []  # of the batch whose completions are written
        self.kept: dict[str, Any] = {}  # the state at the beginning of the step

    # Prompts and completions

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of a prompt, which TRL knows by other names."""
        self._signature_columns = self._signature_columns or [*COLUMNS]
        super()._set_signature_columns_if_needed()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return TRL's sampler, whose order depends on seed and epoch alone."""
        order = super()._get_train_sampler(train_dataset)
        if self.shuffle_dataset:
            order.order.generator = self.row_order
        return order

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return the tokens that the rows were checked with."""
        return self.prompt_tokens, None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Write completions, have them judged, and enter some in the journal."""
        self.prompt_tokens = [row[TOKENS] for row in inputs]
        batch: dict[str, Any] = super()._generate_and_score_completions(self.take_out_marks(inputs))
        step = self.state.global_step + 1
        if self.model.training and self.is_world_process_zero() and is_noted(step, self.state.max_steps):
            self.run.journal.write("completions", step=step, completions=describe_completions(self._logs))
        return batch

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Write completions. Raises GenerationStop in a training where all ranks know of a stop."""
        is_training = self.model.training
        criterion = EndsEarly(lambda: (is_training or self.can_stop_evaluation) and self.is_stop_wanted())
        with hold_whole(self.model, self.reshards), ending_early(self.model, criterion):
            completions = super()._generate_single_turn(*args, **kwargs)
        if is_training and has_any(criterion.has_ended, self.run.consensus.group):
            raise GenerationStop
        return completions

    @property
    def reshards(self) -> bool:
        """True where FSDP gives gathered weights back after a forward pass."""
        return self.is_fsdp_enabled and bool(self.accelerator.state.fsdp_plugin.reshard_after_forward)

    def is_stop_wanted(self) -> bool:
        """Tell whether this rank knows of a stop."""
        request = self.run.stop_request
        return request is not None and request.is_made(self.checkpoint_seconds)

    # Stops within a step

    def note_step_begin(self) -> None:
        """Keep the state to which a stop in the middle of the step goes back."""
        super().note_step_begin()
        self.kept = {"step": self._step, "buffer": self._buffered_inputs, "tokens": self.num_tokens}

    def return_to_last_step(self) -> None:
        """Throw away the step that has begun, with the completions that were written for it."""
        super().return_to_last_step()
        self._step, self._buffered_inputs = self.kept["step"], self.kept["buffer"]
        self.state.num_input_tokens_seen = self.kept["tokens"]

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, which ends at once where a stop comes while the model writes."""
        try:
            super()._run_epoch(**kwargs)
        except GenerationStop:
            self.end_within_step(self.state, self.control)
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            model, trial, *others = (kwargs[name] for name in EPOCH_NAMES)
            self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, *others)

    # Checkpoints

    @property
    def num_tokens(self) -> int:
        """Tokens read and written up to now, on all devices and in all runs."""
        return int(self.state.num_input_tokens_seen)

    @property
    def batches_a_generation(self) -> int:
        """The batches that a rank makes of one generation."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the random state, the place among the generations, and what is left of them."""
        super()._save_rng_state(output_dir)
        is_used = self._step % self.batches_a_generation == 0
        state = {
            "ranks": self.args.world_size,
            "step": self._step,
            "buffer": None if is_used else self._buffered_inputs,
        }
        state |= {name: getattr(self, name) for name in self.list_controls()}
        save_states(state, Path(output_dir), self.run.consensus.group)

    def list_controls(self) -> tuple[str, ...]:
        """Return the names of numbers that a method changes by itself from step to step."""
        return ()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state and the generations of a checkpoint. Other ranks than its own begin with new ones."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint), self.args.process_index, self.args.device)
        if state is None or state["ranks"] != self.args.world_size:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            return
        self._step, self._buffered_inputs = state["step"], state["buffer"]
        for name in self.list_controls():
            setattr(self, name, state[name])

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, without means of nothing: of a reward, for example, that no completion was given."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name, values in metrics.items() if all(math.isnan(value) for value in values)]:
            del metrics[name]
        for name in [name for name in metrics if name.startswith("rewards/") and name.endswith("/std")]:
            del metrics[name]
        super().log(logs, start_time)
