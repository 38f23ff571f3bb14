# SPDX-License-Identifier: Apache-2.0
"""The moments of checkpoints, and what a stop leaves out and asks for."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from llm_trainer.training import save_and_stop
from llm_trainer.training.resumable import EvaluationStop, ResumableMixin
from llm_trainer.training.save_and_stop import SaveAndStop
from support.trainers import build_run_context


class Trainer(ResumableMixin):
    """A trainer that has its state of stops and checkpoints, and trains nothing."""

    def __init__(self, run):
        self.run, self.stopped, self.evaluation_due, self.can_stop_evaluation = run, False, False, True
        self.agreed_seconds, self.checkpoint_seconds = 0.0, 0.0
        self.args = SimpleNamespace(gradient_accumulation_steps=1)

    def estimate_checkpoint_bytes(self):
        return 1_250_000_000


@pytest.fixture
def make(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(save_and_stop.time, "monotonic", lambda: clock.now)

    def build(has_interval=False, **context):
        trainer = Trainer(build_run_context(**context))
        request = SimpleNamespace(made=False, is_made=lambda seconds: request.made, age_seconds=lambda: 1.5)
        callback = SaveAndStop(trainer, request, has_interval)
        arguments = SimpleNamespace(eval_strategy="epoch", gradient_accumulation_steps=1)
        state = TrainerState(max_steps=100, global_step=0, epoch=0.0, is_world_process_zero=True)
        callback.on_epoch_begin(arguments, state, TrainerControl())

        def step(global_step, seconds=1.0, epoch=0.5):
            callback.on_step_begin(arguments, state, TrainerControl())
            clock.now += seconds
            state.global_step, state.epoch, control = global_step, epoch, TrainerControl()
            callback.on_step_end(arguments, state, control)
            if control.should_save:
                callback.on_save(arguments, state, control)
            return control

        return SimpleNamespace(trainer=trainer, request=request, callback=callback, step=step, state=state)

    return build


def test_ten_checkpoints_a_run_without_an_interval_of_the_users(make):
    run = make()
    assert [step for step in range(1, 100) if run.step(step).should_save] == list(range(10, 100, 10))
    assert not any(make(has_interval=True).step(step).should_save for step in range(1, 100))
    assert not any(make(saves_checkpoints=False).step(step).should_save for step in range(1, 101))


def test_a_checkpoint_after_a_quarter_of_an_hour_unless_it_costs_too_much(make):
    run = make()
    assert not run.step(1, 899.0).should_save
    assert run.step(2, 1.0).should_save
    run.trainer.checkpoint_seconds = 100.0
    assert not run.step(3, 1999.0).should_save
    assert run.step(4, 1.0).should_save


def test_a_save_at_the_end_of_an_epoch_waits_for_its_evaluation(make):
    run, control = make(), TrainerControl()
    assert not run.step(10, epoch=1.0).should_save
    run.callback.on_epoch_end(None, run.state, control)
    assert control.should_save


def test_a_stop_saves_at_once_and_leaves_the_evaluation_to_the_next_run(make):
    run, control = make(), TrainerControl()
    run.request.made = True
    stopped = run.step(3, epoch=1.0)
    assert stopped.should_training_stop
    assert stopped.should_save
    assert not stopped.should_evaluate
    assert (run.trainer.stopped, run.trainer.evaluation_due, run.trainer.agreed_seconds) == (True, True, 1.5)
    control.should_evaluate = control.should_save = True
    run.callback.on_epoch_end(None, run.state, control)
    assert not control.should_evaluate
    assert not control.should_save


@pytest.mark.parametrize(("evaluates_first", "step"), [(False, 0), (False, 3), (True, 3)])
def test_a_stop_is_looked_for_after_every_batch_of_a_first_step(make, capfd, evaluates_first, step):
    """Nobody knows yet how long it takes: a first poll that told 0 seconds put off the second one to its end."""
    run, control = make(), TrainerControl()
    arguments = run.trainer.args = SimpleNamespace(gradient_accumulation_steps=64)
    run.state.global_step = step
    run.trainer.note_step_begin = run.trainer.return_to_last_step = lambda: None
    if evaluates_first:
        run.callback.on_prediction_step(None, run.state, control)
    run.callback.on_step_begin(arguments, run.state, control)
    for batch in range(1, 4):
        run.request.made = batch == 3
        run.callback.on_substep_end(arguments, run.state, control)
        assert control.should_training_stop == (batch == 3)
    has_none = "nothing is trained yet, so there is no checkpoint, and the next start begins anew"
    told = has_none if step == 0 else "the next start begins it anew"
    assert f"The stop came within step {step + 1}, after 3 of its batches: {told}" in capfd.readouterr().out


def test_a_stop_ends_an_evaluation(make):
    run = make()
    run.callback.on_prediction_step(None, run.state, TrainerControl())
    run.request.made = True
    with pytest.raises(EvaluationStop):
        run.callback.on_prediction_step(None, run.state, TrainerControl())
    assert run.trainer.evaluation_due


def test_an_evaluation_before_the_training_goes_on(make):
    run = make()
    run.request.made, run.trainer.can_stop_evaluation = True, False
    run.callback.on_prediction_step(None, run.state, TrainerControl())
    assert not run.trainer.stopped


def test_batches_that_leave_no_time_after_a_stop_are_warned_of_once(make, capfd):
    run = make()
    run.step(1, 70.0)  # the first one compiles
    run.step(2, 49.0)
    assert capfd.readouterr().out == ""
    run.step(3, 50.0)
    run.step(4, 50.0)
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("Warning: a stop may wait 50 s for the end of a batch, and a checkpoint takes about 10 s: ")
    measured = make()
    measured.trainer.checkpoint_seconds = 58.0
    measured.step(1)
    measured.step(2, 2.0)
    assert "a checkpoint takes about 58 s" in capfd.readouterr().out
