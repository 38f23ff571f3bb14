# SPDX-License-Identifier: Apache-2.0
"""The process that tells the trackers what the journal holds, and writes the report at the end.

    python -m llm_trainer.trackers.reporter JOURNAL [--trackers mlflow,wandb] [--checkpoint-dir DIR] --model-dir DIR

The first training host's launcher starts it before the workers (launcher/reporter_process.py), and closes its standard
input when the job is over. Every tracker is fed by a thread of its own (feed.py). Addresses and secrets come in the
trackers' own variables (config/tracker_choice.py).
"""

import argparse
import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from llm_trainer.common import log
from llm_trainer.common.errors import quote_error
from llm_trainer.journal.journal import read_records
from llm_trainer.journal.manifest import MANIFEST
from llm_trainer.trackers.feed import POLL_SECONDS, Ending, Feed, Tracker

REPORT_SECONDS = 20.0
FINISH_SECONDS = 20.0  # for what is left, when the job is over
FINISH_SECONDS_OF_STOP = 10.0  # SageMaker kills a stopped job after 120 s, and the export needs most of them
UPLOAD_BYTES_A_SECOND = 20e6  # a model may take this long
# Libraries' own patience is a multiple of this; the feeds have theirs.
VARIABLES = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
    "AWS_MAX_ATTEMPTS": "2",
}


def main(arguments: Sequence[str]) -> None:
    """Follow the journal to the end of the job."""
    log.escape_unprintable()
    options = parse_arguments(arguments)
    isolate_process()
    stop_file = Path(os.environ["LLM_TRAINER_SCRATCH"]) / "stop"
    ending = Ending()
    # Rounded as the journal rounds: what was written before it are another job's records.
    since = round(float(os.environ["LLM_TRAINER_STARTED"]), 3)
    trackers = build_trackers(options)
    from llm_trainer.report.page import write_report  # now, while the workers load: at the end the job waits for it

    feeds = [Feed(tracker, options.journal, since, ending) for tracker in trackers]
    for feed in feeds:
        feed.start()
    wait_for_end(options.journal, since, ending)
    try:
        write_report(options.journal, options.journal.parent)
    except Exception as error:  # whatever it is: a job that has succeeded must not look as if it had not
        log.warning(f"the report could not be written ({quote_error(error)}).")
    found = [options.model_dir / MANIFEST, options.journal.parent / "report.html"]
    model_dir = options.model_dir if options.track_model and options.model_dir.is_dir() else None
    ending.announce([file for file in found if file.is_file()], model_dir)
    wait_for_feeds(feeds, find_patience(stop_file, model_dir), FINISH_SECONDS)


def isolate_process() -> None:
    """Keep this process out of the training's way, libraries' words out of the log, and others' settings out of it.

    Libraries read settings from the working folder, such as W&B the address of its server from `wandb/settings`. The
    image's is /tmp, where everybody may write; the job's scratch folder is this user's alone.
    """
    os.chdir(os.environ["LLM_TRAINER_SCRATCH"])
    for signum in (signal.SIGTERM, signal.SIGINT):  # the container's, which the launcher acts upon
        signal.signal(signum, signal.SIG_IGN)
    os.nice(10)
    os.environ.update(VARIABLES)
    sys.modules["torch"] = None  # type: ignore[assignment] # tensorboardX would import it, for seconds and 200 MB
    logging.disable(logging.CRITICAL)  # libraries' words and tracebacks: what matters is said in one line
    warnings.simplefilter("ignore")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options, with absolute paths."""
    parser = argparse.ArgumentParser(prog="python -m llm_trainer.trackers.reporter")
    parser.add_argument("journal", type=find_place)
    parser.add_argument("--trackers", type=lambda names: names.split(","), default=[])
    parser.add_argument("--checkpoint-dir", type=find_place)
    parser.add_argument("--model-dir", type=find_place, required=True)
    parser.add_argument("--track-model", action="store_true")
    return parser.parse_args(arguments)


def find_place(path: str) -> Path:
    """Return the absolute path of a file or folder, which outlasts a change of the working folder."""
    return Path(path).absolute()


def build_trackers(options: argparse.Namespace) -> list[Tracker]:
    """Build the trackers that are asked for, without those that cannot be loaded.

    No thread may run yet: two threads that import parts of one package can wait for each other for ever.
    """
    trackers = []
    for name in options.trackers:
        try:
            trackers.append(build_tracker(name, options))
        except Exception as error:  # whatever the library raises that a user's requirements replaced
            log.warning(
                f"{name} cannot be loaded ({quote_error(error)}): its metrics are only in {options.journal}; "
                "check what requirements.txt installs."
            )
    return trackers


def build_tracker(name: str, options: argparse.Namespace) -> Tracker:
    """Build one tracker. Only the library that it needs is imported."""
    if name == "mlflow":
        from llm_trainer.trackers.mlflow import MlflowTracker

        return MlflowTracker(options.checkpoint_dir, Path(os.environ["LLM_TRAINER_SCRATCH"]))
    if name == "wandb":
        from llm_trainer.trackers.wandb import WandbTracker

        return WandbTracker(options.checkpoint_dir, options.journal.parent)
    from llm_trainer.trackers.tensorboard import TensorboardTracker

    return TensorboardTracker(options.journal.parent / "tensorboard")


def wait_for_end(journal: Path, since: float, ending: Ending) -> None:
    """Wait until the journal has an `end`, or until the launcher has closed the standard input or is gone."""
    offset, is_over = 0, False
    while not is_over:
        is_over = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        for record, end in read_records(journal, offset):
            offset = end
            if record["kind"] == "end" and record["time"] >= since:
                ending.note_status(record["status"], record.get("reason"))
                is_over = True


def find_patience(stop_file: Path, model_dir: Path | None) -> float:
    """Return the seconds that the trackers have for what is left when the job is over."""
    if stop_file.exists():
        return FINISH_SECONDS_OF_STOP
    if model_dir is None:
        return FINISH_SECONDS
    size = sum(file.stat().st_size for file in model_dir.rglob("*") if file.is_file())
    return FINISH_SECONDS + size / UPLOAD_BYTES_A_SECOND


def wait_for_feeds(feeds: list[Feed], patience: float, patience_without_model: float) -> None:
    """Wait until all feeds have ended, and up to `patience` seconds only for those that upload the model."""
    started = time.monotonic()
    for feed in feeds:
        feed.join(max(0.0, started + min(patience, patience_without_model) - time.monotonic()))
        if feed.uploads_model:
            feed.join(max(0.0, started + patience - time.monotonic()))
        if not feed.is_done:
            log.warning(
                f"{feed.tracker.name} has not got everything before the job's end: all of it is in {feed.journal}."
            )


if __name__ == "__main__":
    log.guard_output()
    main(sys.argv[1:])
    os._exit(0)  # without waiting for threads that hang
