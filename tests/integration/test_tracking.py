# SPDX-License-Identifier: Apache-2.0
"""The reporter's process on journals of this module's: a real MLflow server, W&B offline, TensorBoard's files."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from llm_trainer.journal.journal import FILE_NAME, Journal
from llm_trainer.launcher.reporter_process import ReporterOptions, ReporterProcess
from llm_trainer.readers.thumbnails import write_thumbnail
from support.mlflow_server import MlflowServer
from support.sagemaker_tree import HOSTS
from support.small_disk import small_disk
from support.tiny_processors import draw
from support.waiting import GUARD_SECONDS, wait_until

pytestmark = pytest.mark.long

SECRETS = {
    "HF_TOKEN": "hf_secretOfTheHub",
    "WANDB_API_KEY": "fedcba9876543210fedcba9876543210fedcba98",
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": "hunter2OfMlflow",
}
ARN = "arn:aws:sagemaker:eu-west-1:123456789012:training-job/trial"
JOB = {
    "name": "trial",
    "arn": ARN,
    "hosts": ["algo-1", "algo-2"],
    "world_size": 2,
    "settings": {
        "learning_rate": 0.01,
        "model_id": None,
        "token": "***",
        "target_modules": ["a", "b"],
        "note": "x" * 7000,
    },
    "environment": {"image": "sha256:1234", "revision": "abcdef", "packages": {"torch": "2.13.0"}},
    "attempt": 1,
}
SOURCE = {"name": "train.jsonl", "uri": "file:///data/train.jsonl", "sha256": "0123456789abcdef" * 4}
DATA = {
    "split": "train",
    "rows": 32,
    "tokens": 900,
    "supervised_tokens": 100,
    "sources": [SOURCE],
    "digest": "0123456789abcdef" * 2,
    "summary": {},
}


class Reporter:
    """A reporter's process, and the journal of a job that it follows."""

    def __init__(self, folder: Path, trackers: str, **variables: str) -> None:
        self.folder, self.trackers = folder, trackers
        self.journal = Journal(folder / "output/data" / FILE_NAME)
        (folder / "model").mkdir(exist_ok=True)
        (folder / "scratch").mkdir(exist_ok=True)
        self.variables = {**os.environ, **variables, "LLM_TRAINER_SCRATCH": str(folder / "scratch")}

    def start(self, *arguments: str) -> "Reporter":
        self.log_file = self.folder / "log"
        command = [
            sys.executable,
            "-m",
            "llm_trainer.trackers.reporter",
            str(self.journal.file),
            f"--trackers={self.trackers}",
        ]
        command += [f"--model-dir={self.folder / 'model'}", *arguments]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.variables, "LLM_TRAINER_STARTED": str(time.time())},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        time.sleep(0.01)  # what this journal gets from now on is this job's
        return self

    def write_training(self, steps: range) -> None:
        for step in steps:
            self.journal.write("metrics", step=step, total_steps=8, epoch=step / 8, values={"train_loss": 1 / step})
            self.journal.write("system", host="algo-2", values={"gpu/algo-2/0/utilization": 90 + step, "odd": None})

    def wait_for(self, text: str) -> None:
        while text not in self.log:
            assert self.process.poll() is None, self.log
            time.sleep(0.1)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def end(self, status: str = "done", **fields: str) -> str:
        """End the job as the launcher does; the log."""
        self.journal.write("end", status=status, **fields)
        self.process.stdin.close()
        assert self.process.wait(GUARD_SECONDS) == 0, self.log
        return self.log


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield server
    server.stop()


@pytest.fixture
def make_reporter(tmp_path):
    made = []

    def make(trackers: str, folder: str = "job", **variables: str) -> Reporter:
        (tmp_path / folder).mkdir(exist_ok=True)
        made.append(Reporter(tmp_path / folder, trackers, **variables))
        return made[-1]

    yield make
    for reporter in made:
        if hasattr(reporter, "process") and reporter.process.poll() is None:
            reporter.process.kill()
            reporter.process.wait()


def runs_of(uri: str, experiment: str):
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run_id, name)]


def test_a_job_is_one_run_with_all_that_was_measured(server, make_reporter):
    reporter = make_reporter(
        "mlflow", MLFLOW_TRACKING_URI=server.uri, MLFLOW_EXPERIMENT_NAME="whole", **SECRETS
    ).start()
    journal = reporter.journal
    journal.write("job", **JOB)
    journal.write("data", **DATA)
    journal.write("model", model="tiny", parameters=100, trainable_parameters=10, adapter={"r": 8})
    journal.write("phase", name="imports", seconds=9.5, host="algo-1")
    reporter.write_training(range(1, 9))
    journal.write("checkpoint", step=8, seconds=0.5)
    journal.write("manifest", metrics={"eval_loss": 0.25, "note": "none"}, num_steps=8)
    image = {"name": "cat.png", "thumbnail": write_thumbnail(draw(40, 30))}
    journal.write("generation", split="train", prompt="What is it?", after="A cat.", images=[image])
    (reporter.folder / "model/training_manifest.json").write_text("{}")
    (reporter.folder / "output/data/report.html").write_text("<html>")
    log = reporter.end()
    assert "Warning" not in log
    (run,) = runs_of(server.uri, "whole")
    assert run.info.run_name == "trial"
    assert run.info.status == "FINISHED"
    assert f"run 'trial' ({run.info.run_id})" in log
    assert history(server.uri, run.info.run_id, "train_loss") == [(step, 1 / step) for step in range(1, 9)]
    assert run.data.metrics["gpu/algo-2/0/utilization"] == 98
    assert run.data.metrics["phase/imports"] == 9.5
    assert run.data.metrics["checkpoint_seconds"] == 0.5
    assert run.data.metrics["final/eval_loss"] == 0.25
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.params["target_modules"] == '["a", "b"]'
    assert run.data.params["note"] == "x" * 6000
    assert run.data.params["trainable_parameters"] == "10"
    assert run.data.tags["training_job_arn"] == ARN
    assert run.data.tags["hosts"] == "algo-1, algo-2"
    assert json.loads(run.data.tags["environment.packages"]) == {"torch": "2.13.0"}
    assert run.data.tags["mlflow.source.git.commit"] == "abcdef"
    (data_set,) = run.inputs.dataset_inputs
    assert (data_set.dataset.name, data_set.dataset.digest) == ("train", DATA["digest"])
    assert json.loads(data_set.dataset.source) == {"num_files": 1, "files": [SOURCE]}
    assert json.loads(data_set.dataset.profile) == {"rows": 32, "tokens": 900, "supervised_tokens": 100}
    assert data_set.tags[0].value == "training"
    files = {file.path for file in MlflowClient(server.uri).list_artifacts(run.info.run_id)}
    assert files == {"training_manifest.json", "report.html", "sample_answers.json", "table_images"}


@pytest.mark.parametrize("kind", ["run", "experiment"])
def test_what_was_deleted_on_a_server_is_told_as_that(server, make_reporter, kind):
    client = MlflowClient(server.uri)
    experiment = client.create_experiment(f"deleted {kind}")
    if kind == "run":
        run = client.create_run(experiment).info.run_id
        client.delete_run(run)
        variables, told = {"MLFLOW_RUN_ID": run}, f"the run MLFLOW_RUN_ID='{run}' has been deleted: restore it"
    else:
        client.delete_experiment(experiment)
        variables, told = {}, "the experiment 'deleted experiment' has been deleted: restore it"
    variables |= {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_EXPERIMENT_NAME": f"deleted {kind}"}
    reporter = make_reporter("mlflow", **variables).start()
    reporter.journal.write("job", **JOB)
    reporter.wait_for(f"Warning: MLflow is left out: {told}")
    assert "check its address" not in reporter.end()


def test_what_a_server_missed_comes_when_it_is_back(tmp_path, make_reporter):
    server = MlflowServer(tmp_path).start()
    try:
        reporter = make_reporter("mlflow", MLFLOW_TRACKING_URI=server.uri, MLFLOW_EXPERIMENT_NAME="away").start()
        reporter.journal.write("job", **JOB)
        reporter.write_training(range(1, 3))
        reporter.wait_for("MLflow: run")
        server.stop()
        reporter.write_training(range(3, 6))
        reporter.wait_for("Warning: MLflow does not take the metrics")
        records = [json.loads(line) for line in reporter.journal.file.read_text().splitlines()]
        server.start()
        reporter.wait_for("MLflow is back, and has got what it missed.")
        reporter.write_training(range(6, 9))
        log = reporter.end()
        assert log.count("Warning") == 1
        assert f"they are kept in {reporter.journal.file}" in log
        (run,) = runs_of(server.uri, "away")
        assert run.info.status == "FINISHED"
        metrics = MlflowClient(server.uri).get_metric_history(run.info.run_id, "train_loss")
        assert [(metric.step, metric.value) for metric in metrics] == [(step, 1 / step) for step in range(1, 9)]
        times = [round(record["time"] * 1000) for record in records if record["kind"] == "metrics"]
        assert [metric.timestamp for metric in metrics[: len(times)]] == times
    finally:
        server.stop()


def test_a_resumed_job_continues_its_run(server, make_reporter, tmp_path):
    variables = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_EXPERIMENT_NAME": "resumed"}
    checkpoints = f"--checkpoint-dir={tmp_path / 'checkpoints'}"
    first = make_reporter("mlflow", "first", **variables).start(checkpoints)
    first.journal.write("job", **{**JOB, "arn": None})
    first.write_training(range(1, 5))
    first.end("failed", reason="Rank 0 ran out of memory.")
    (run,) = runs_of(server.uri, "resumed")
    assert run.info.status == "FAILED"
    assert run.data.tags["failure_reason"] == "Rank 0 ran out of memory."
    second = make_reporter("mlflow", "second", **variables).start(checkpoints)
    second.journal.write("job", **{**JOB, "arn": None, "settings": {"learning_rate": 0.02}})
    second.write_training(range(4, 9))
    second.end("stopped")
    (run,) = runs_of(server.uri, "resumed")
    assert run.info.status == "KILLED"
    assert "failure_reason" not in run.data.tags
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.tags["resumed.learning_rate"] == "0.02"
    assert sorted({step for step, _ in history(server.uri, run.info.run_id, "train_loss")}) == list(range(1, 9))


def test_without_checkpoints_a_training_job_finds_its_run_by_its_arn(server, make_reporter):
    variables = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_EXPERIMENT_NAME": "by-arn"}
    for folder, arn in (("first", ARN), ("again", ARN), ("other", f"{ARN}-2")):
        reporter = make_reporter("mlflow", folder, **variables).start()
        reporter.journal.write("job", **{**JOB, "arn": arn})
        reporter.end()
    assert len(runs_of(server.uri, "by-arn")) == 2


def test_a_run_that_the_environment_names_is_continued(server, make_reporter):
    client = MlflowClient(server.uri)
    run_id = client.create_run(client.create_experiment("named")).info.run_id
    reporter = make_reporter("mlflow", MLFLOW_TRACKING_URI=server.uri, MLFLOW_RUN_ID=run_id).start()
    reporter.journal.write("job", **JOB)
    reporter.write_training(range(1, 3))
    reporter.end()
    assert len(history(server.uri, run_id, "train_loss")) == 2


def test_an_earlier_jobs_records_are_not_this_ones(server, make_reporter):
    reporter = make_reporter("mlflow", MLFLOW_TRACKING_URI=server.uri, MLFLOW_EXPERIMENT_NAME="earlier")
    reporter.journal.write("job", **{**JOB, "name": "earlier"})
    reporter.write_training(range(1, 150))
    reporter.journal.write("end", status="failed", reason="of the earlier")
    time.sleep(0.01)
    reporter.start()
    reporter.journal.write("job", **{**JOB, "arn": None})
    reporter.write_training(range(1, 3))
    reporter.end()
    (run,) = runs_of(server.uri, "earlier")
    assert run.info.run_name == "trial"
    assert run.info.status == "FINISHED"
    assert len(history(server.uri, run.info.run_id, "train_loss")) == 2


class Forbidding(http.server.BaseHTTPRequestHandler):
    """A server that lets nobody in."""

    def do_GET(self):
        self.send_error(403)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture(params=["silent", "forbidding", "nobody", "not-http", "no-such-folder"])
def broken_uri(request):
    """Addresses of trackers that will never take a metric, and a word of the advice."""
    if request.param == "silent":
        with socket.create_server(("127.0.0.1", 0)) as listening:  # connections are made by the kernel, never answered
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", "check its address"
    elif request.param == "forbidding":
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as forbidding:
            threading.Thread(target=forbidding.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{forbidding.server_port}", "give credentials that may write there"
            forbidding.shutdown()
    else:
        yield {
            "nobody": ("http://127.0.0.1:9", "check its address"),
            "not-http": ("postgresql://127.0.0.1:9/x", "check its address"),
            "no-such-folder": ("sqlite:////proc/none/mlflow.db", "check its address"),
        }[request.param]


def test_a_broken_tracker_is_one_warning_and_a_bounded_end(broken_uri, make_reporter):
    uri, advice = broken_uri
    reporter = make_reporter("mlflow,tensorboard", MLFLOW_TRACKING_URI=uri, **SECRETS).start()
    reporter.journal.write("job", **JOB)
    reporter.write_training(range(1, 9))
    reporter.wait_for("Warning: MLflow does not take the metrics")
    log = reporter.end()
    warnings = [line for line in log.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 2, log
    assert advice in warnings[0]
    assert "MLflow has not got everything before the job's end" in warnings[1]
    assert not [secret for secret in SECRETS.values() if secret in log]
    assert list((reporter.folder / "output/data/tensorboard").iterdir())


def test_a_full_store_is_told_and_gets_all_when_there_is_room(make_reporter, tmp_path):
    with small_disk(tmp_path / "disk", size_kib=8192) as disk:
        uri = f"sqlite:///{disk}/mlflow.db"
        reporter = make_reporter("mlflow", MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="full").start()
        reporter.journal.write("job", **JOB)
        reporter.wait_for("MLflow: run")
        with pytest.raises(OSError, match="No space left"):
            (disk / "filler").write_bytes(bytes(8192 << 10))
        reporter.write_training(range(1, 1001))
        reporter.wait_for("Warning: MLflow does not take the metrics")
        (disk / "filler").unlink()
        reporter.wait_for("MLflow is back")
        log = reporter.end()
        assert "make room where it stores them" in log
        (run,) = runs_of(uri, "full")
        assert [step for step, _ in history(uri, run.info.run_id, "train_loss")] == list(range(1, 1001))


def test_wandb_offline_and_tensorboard_have_the_same_metrics(make_reporter, tmp_path):
    reporter = make_reporter("wandb,tensorboard", WANDB_MODE="offline", WANDB_PROJECT="project", **SECRETS)
    (reporter.folder / "wandb").mkdir()  # whoever wrote it: W&B reads the settings of its working folder
    (reporter.folder / "wandb/settings").write_text("[default]\nentity = somebody_else\n")
    reporter.start(f"--checkpoint-dir={tmp_path / 'checkpoints'}")
    reporter.journal.write("job", **JOB)
    reporter.journal.write("data", **DATA)
    reporter.write_training(range(1, 9))
    (reporter.folder / "model/training_manifest.json").write_text('{"of": "the model"}')
    log = reporter.end("failed", reason="Rank 0 failed.")
    assert "Warning" not in log
    (folder,) = (reporter.folder / "output/data/wandb").glob("offline-run-*")
    rows, config, exit_code = read_wandb(run := next(folder.glob("*.wandb")))
    assert b"somebody_else" not in run.read_bytes()
    losses = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    assert losses == [(step, 1 / step) for step in range(1, 9)]
    assert len([row for row in rows if "gpu/algo-2/0/utilization" in row and "seconds" in row]) == 8
    assert config["learning_rate"] == "0.01"
    assert config["data/train"]["digest"] == DATA["digest"]
    assert exit_code == 1
    assert (folder / "files/training_manifest.json").read_text() == '{"of": "the model"}'
    identity = json.loads((tmp_path / "checkpoints/tracked-run-wandb.json").read_text())
    assert folder.name.endswith(identity["run_id"])
    written = [json.loads(line) for line in reporter.journal.file.read_text().splitlines()]
    times = {record["time"] for record in written if record["kind"] in ("metrics", "system")}
    assert {row["_timestamp"] for row in rows} == times
    assert read_tensorboard(reporter.folder / "output/data/tensorboard", "train_loss") == losses
    assert_no_secret(reporter.folder, tmp_path / "checkpoints")


def test_secrets_are_in_no_database_and_no_file(server, make_reporter, tmp_path, monkeypatch):
    for name, secret in SECRETS.items():  # as launcher and workers have them, who write the journal
        monkeypatch.setenv(name, secret)
    reporter = make_reporter("mlflow", MLFLOW_TRACKING_URI=server.uri, MLFLOW_EXPERIMENT_NAME="secrets", **SECRETS)
    reporter.start(f"--checkpoint-dir={tmp_path / 'checkpoints'}")
    reporter.journal.write("job", **JOB)
    reporter.write_training(range(1, 3))
    reporter.end("failed", reason=f"Bearer {SECRETS['HF_TOKEN']} at https://a:{SECRETS['MLFLOW_TRACKING_PASSWORD']}@x")
    (run,) = runs_of(server.uri, "secrets")
    assert run.data.tags["failure_reason"] == "Bearer *** at https://***@x"
    assert_no_secret(server.folder, reporter.folder, tmp_path / "checkpoints")


def test_a_folder_and_a_database_are_written_without_a_server(make_reporter, tmp_path):
    for folder, uri in (("a", str(tmp_path / "mlruns")), ("b", f"sqlite:///{tmp_path}/new/mlflow.db")):
        reporter = make_reporter("mlflow", folder, MLFLOW_TRACKING_URI=uri, MLFLOW_ALLOW_FILE_STORE="true").start()
        reporter.journal.write("job", **JOB)
        reporter.write_training(range(1, 3))
        (reporter.folder / "model/training_manifest.json").write_text("{}")
        assert "Warning" not in reporter.end()
    assert len(list((tmp_path / "mlruns").rglob("training_manifest.json"))) == 1
    assert len(list((tmp_path / "new").rglob("training_manifest.json"))) == 1


def test_the_model_is_uploaded_when_asked(server, make_reporter):
    reporter = make_reporter("mlflow", MLFLOW_TRACKING_URI=server.uri, MLFLOW_EXPERIMENT_NAME="model")
    reporter.start("--track-model")
    reporter.journal.write("job", **JOB)
    (reporter.folder / "model/adapter_model.safetensors").write_bytes(bytes(100))
    (reporter.folder / "model/of_the_user").touch()
    (reporter.folder / "model/training_manifest.json").write_text('{"files": ["adapter_model.safetensors"]}')
    reporter.end()
    (run,) = runs_of(server.uri, "model")
    files = {file.path for file in MlflowClient(server.uri).list_artifacts(run.info.run_id, "model")}
    assert files == {"model/adapter_model.safetensors"}


def test_with_all_trackers_it_never_loads_torch(server, make_reporter):
    reporter = make_reporter("mlflow,wandb,tensorboard", MLFLOW_TRACKING_URI=server.uri, WANDB_MODE="offline").start()
    reporter.journal.write("job", **JOB)
    for name in ("MLflow", "W&B", "TensorBoard"):
        reporter.wait_for(f"{name}: ")
    reporter.write_training(range(1, 3))
    (reporter.folder / "model/training_manifest.json").write_text("{}")
    libraries = {Path(mapped.path).name for mapped in psutil.Process(reporter.process.pid).memory_maps()}
    assert psutil.Process(reporter.process.pid).nice() >= 10
    assert "Warning" not in reporter.end()
    assert not [name for name in libraries if name.startswith("libtorch")]


def test_a_tracker_whose_library_is_broken_is_one_warning_and_the_others_go_on(make_reporter, tmp_path):
    (tmp_path / "wandb.py").write_text("raise AttributeError('module numpy has no attribute float_')")
    reporter = make_reporter("wandb,tensorboard", PYTHONPATH=str(tmp_path)).start()
    reporter.journal.write("job", **JOB)
    reporter.wait_for("TensorBoard: ")
    log = reporter.end()
    assert log.count("Warning") == 1
    assert "Warning: wandb cannot be loaded (module numpy has no attribute float_)" in log
    assert (reporter.folder / "output/data/report.html").is_file()


def test_signals_do_not_end_it_and_its_launchers_death_does(make_reporter, tmp_path):
    reporter = make_reporter("tensorboard")
    reporter.start()
    reporter.journal.write("job", **JOB)
    reporter.wait_for("TensorBoard: ")
    for signum in (signal.SIGTERM, signal.SIGINT):
        reporter.process.send_signal(signum)
    reporter.end("stopped")
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(600)",
            *reporter.process.args,
        ],
        env={**reporter.variables, "LLM_TRAINER_STARTED": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    orphan = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    assert orphan.wait(GUARD_SECONDS) is None


def test_two_hosts_are_one_run_in_every_tracker_and_no_secret_leaves(server, make_hosts, start):
    user, password = SECRETS["MLFLOW_TRACKING_USERNAME"], SECRETS["MLFLOW_TRACKING_PASSWORD"]
    trees = make_hosts(
        mlflow_uri=server.uri.replace("://", f"://{user}:{password}@"),
        mlflow_experiment_name="two-hosts",
        report_to="mlflow,wandb,tensorboard",
        hub_token=SECRETS["HF_TOKEN"],
        sample_prompts="1",
    )
    for tree in trees:
        tree.environment |= {name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY")}
        tree.environment |= {"WANDB_MODE": "offline", "TRAINING_JOB_NAME": "two-hosts", "TRAINING_JOB_ARN": ARN}
        # Each host tokenizes, and has a /tmp of its own.
        tree.environment |= {"SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tree.base_dir / "cache")}
    jobs = [start(tree) for tree in trees]
    for job, other in zip(jobs, reversed(jobs), strict=True):
        assert job.end() == 0, job.log + "OTHER HOST\n" + other.log
    (run,) = runs_of(server.uri, "two-hosts")
    assert (run.info.run_name, run.info.status) == ("two-hosts", "FINISHED")
    steps = [step for step, _ in history(server.uri, run.info.run_id, "train_loss")]
    assert steps == list(range(1, trees[0].manifest["num_steps"] + 1))
    assert {f"host/{host}/" for host in HOSTS} <= {re.sub(r"[^/]*$", "", name) for name in run.data.metrics}
    assert {item.tags[0].value: item.dataset.name for item in run.inputs.dataset_inputs}["training"] == "train"
    files = {file.path for file in MlflowClient(server.uri).list_artifacts(run.info.run_id)}
    assert files == {"training_manifest.json", "report.html", "sample_answers.json"}
    first, second = (tree.base_dir / "output/data" for tree in trees)
    (folder,) = (first / "wandb").glob("offline-run-*")
    assert [row["step"] for row in read_wandb(next(folder.glob("*.wandb")))[0] if "train_loss" in row] == steps
    assert [step for step, _ in read_tensorboard(first / "tensorboard", "train_loss")] == steps
    assert not second.exists() or not any(second.iterdir())
    for tree, job in zip(trees, jobs, strict=True):
        tree.write("output/log", job.log)
        assert_no_secret(tree.base_dir / "output", tree.base_dir / "model", tree.base_dir / "checkpoints")
    assert_no_secret(server.folder)


def test_a_training_loses_nothing_while_the_server_is_away(tmp_path, tree, start):
    server = MlflowServer(tmp_path).start()
    try:
        tree.change(mlflow_uri=server.uri, num_train_epochs="10000", mlflow_experiment_name="away", save_steps="100000")
        job = start(tree)
        job.wait_for("MLflow: run")
        server.stop()
        job.wait_for("Warning: MLflow does not take the metrics")
        server.start()
        job.wait_for("MLflow is back")
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 0, job.log
        (run,) = runs_of(server.uri, "away")
        assert run.info.status == "KILLED"
        steps = [step for step, _ in history(server.uri, run.info.run_id, "train_loss")]
        assert steps == list(range(1, tree.manifest["num_steps"] + 1))
    finally:
        server.stop()


def test_a_server_that_never_answers_does_not_keep_a_job(tree):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        tree.change(mlflow_uri=f"http://127.0.0.1:{listening.getsockname()[1]}", mlflow_register_model=None)
        result = tree.run()
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("Warning: MLflow") == 2, result.stdout  # that it is away, and at the end still
    assert (tree.base_dir / "output/data/report.html").exists()


def assert_no_secret(*folders: Path) -> None:
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes()
        assert not [
            name
            for name, secret in SECRETS.items()
            if name != "MLFLOW_TRACKING_USERNAME" and secret.encode() in content
        ], file


def read_wandb(file: Path):
    """The rows of the history, the configuration and the exit code in a W&B file: records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content, offset, parts = file.read_bytes(), 7, b""
    rows, config, exit_code = [], {}, None
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        size, kind = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        parts += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind not in (1, 4):  # whole, or the last part
            continue
        record, parts = wandb_internal_pb2.Record.FromString(parts), b""
        if record.HasField("history"):
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        changes = record.run.config.update if record.HasField("run") else record.config.update
        config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in changes}
        if record.HasField("exit"):
            exit_code = record.exit.exit_code
    return rows, config, exit_code


def read_tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    """The values of a scalar in an event file: records of length, checksum, event and checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    content, offset, found = file.read_bytes(), 0, []
    while offset < len(content):
        size = int.from_bytes(content[offset : offset + 8], "little")
        event = Event.FromString(content[offset + 12 : offset + 12 + size])
        found += [(event.step, pytest.approx(value.simple_value)) for value in event.summary.value if value.tag == name]
        offset += 16 + size
    return found


def test_a_reporter_that_is_killed_is_told_of_and_another_writes_the_report(tmp_path, capfd):
    journal = Journal(tmp_path / "output/data/metrics.jsonl")
    started = time.time()
    variables = {**os.environ, "LLM_TRAINER_SCRATCH": str(tmp_path), "LLM_TRAINER_STARTED": str(started)}
    options = ReporterOptions(journal.file, tmp_path / "model", None, ["tensorboard"], tracks_model=False)
    with ReporterProcess(options, variables, tmp_path / "stop") as reporter:
        journal.write("job", **JOB)
        reporter.child.kill()
        wait_until(lambda: "has died" in capfd.readouterr().out)
        journal.write("end", status="done", reason=None)
    assert "<html" in (tmp_path / "output/data/report.html").read_text()
    assert reporter.child.returncode == 0
    assert not (tmp_path / "output/data/tensorboard").exists()
