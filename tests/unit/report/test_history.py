# SPDX-License-Identifier: Apache-2.0
from llm_trainer.report.charts import GPU_CHARTS, HOST_CHARTS
from llm_trainer.report.history import SYSTEM_METRICS, read_history
from support.journals import START, FakeJournal


def test_a_restart_continues_the_curve_at_its_checkpoint(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    journal.add(0, "job", name="trial", attempt=1)
    for at, step, loss in [(1, 10, 3.0), (2, 20, 2.0), (3, 30, 9.0)]:
        journal.add(at, "metrics", step=step, total_steps=40, values={"train_loss": loss})
    journal.add(4, "end", status="failed", reason="A host was lost.")
    journal.add(5, "job", name="trial", attempt=2)
    for at, step, loss in [(6, 30, 1.5), (7, 40, 1.0)]:
        journal.add(at, "metrics", step=step, total_steps=40, values={"train_loss": loss})
    history = read_history(journal.write())
    assert [(bucket.x, bucket.mean) for bucket in history.find_metric("train_loss").buckets] == [
        (10, 3.0),
        (20, 2.0),
        (30, 1.5),
        (40, 1.0),
    ]
    assert (history.step, len(history.attempts), history.end.get("status")) == (40, 2, None)


def test_an_attempt_that_answers_again_doubles_no_answer(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    for number in (1, 2):
        journal.add(number, "job")
        journal.add(number, "generation", prompt="Why?", after=str(number))
    assert [answer["after"] for answer in read_history(journal.write()).generations] == ["2"]


def test_a_phase_that_began_before_the_first_record_is_in_the_duration(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    journal.add(0, "job", name="trial")
    journal.add(5, "phase", name="imports", seconds=25.0, host="algo-1")
    history = read_history(journal.write())
    assert history.first_time == START - 20
    assert history.duration == 25


def test_instance_hours_are_those_of_all_hosts_of_the_last_job(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    journal.add(10, "job", attempt=1, started=START, hosts=["algo-1"], billed_hosts=1)
    journal.add(100, "end", status="stopped", reason=None)
    # A day later it goes on, on a cluster with two hosts that do not train, and is restarted once.
    at = 24 * 3600
    for late, attempt in [(10, 1), (1800, 2)]:
        journal.add(at + late, "job", attempt=attempt, started=START + at, hosts=["algo-1"], billed_hosts=3)
    journal.add(at + 3600, "end", status="done", reason=None)
    assert read_history(journal.write()).instance_hours == 3


def test_memory_and_throttling_of_a_gpu_are_made_of_its_own_figures(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    values = {
        "gpu/algo-1/10/memory_used_bytes": 20,
        "gpu/algo-1/10/memory_total_bytes": 80,
        "gpu/algo-1/10/throttled_power_cap": 1,
        "gpu/algo-1/10/throttled_hardware": 0,
        "gpu/algo-1/2/throttled_hardware": 0,
        "gpu/algo-1/2/throttled_thermal": 1,
        "host/algo-1/memory_used_bytes": 7,
    }
    journal.add(0, "system", host="algo-1", values=values)
    history = read_history(journal.write())
    assert [(gpu, series.mean) for gpu, series in history.list_devices("gpu/memory_percent").items()] == [
        ("algo-1/10", 25)
    ]
    throttled = history.list_devices("gpu/throttled_percent")
    assert [(gpu, series.mean) for gpu, series in throttled.items()] == [("algo-1/2", 100), ("algo-1/10", 0)]


def test_every_charted_system_metric_is_read():
    charted = {what.split("/")[1] for what in [*GPU_CHARTS, *HOST_CHARTS]}
    assert charted <= SYSTEM_METRICS


def test_only_the_samples_between_metric_lines_count_as_training(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    for at, percent in [(0, 5), (10, 90), (20, 80), (30, 1)]:
        journal.add(at, "system", host="a", values={"gpu/a/0/utilization_percent": percent})
    for at in (5, 25):
        journal.add(at, "metrics", step=at, total_steps=25, values={"train_loss": 1.0})
    history = read_history(journal.write())
    assert history.list_devices_in_training("gpu/utilization_percent")["a/0"].mean == 85
