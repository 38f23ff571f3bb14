# SPDX-License-Identifier: Apache-2.0
"""Whether llm-trainer is right on the GPU of this machine: `python tests/gpu/correct.py --out FOLDER`.

The doctor, the tests of this folder and whole jobs of a Llama of 1B random weights, several at a time, within four
minutes and a half. Every check is tried, whatever came of those before. FOLDER gets correct.json, which is written anew
after each check, and logs.tar.gz. `--size tiny` rehearses it all on a CPU, `--only NAME ...` takes some checks.
`--size 8B --at-a-time 1 --only packed-4k` shows the speed that a user gets, beside the planned one.

The exit code is 0 where all demands are met, else 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # the imports below take a while where no file was read before
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PLACES = [str(REPOSITORY / name) for name in ("code", "tests", "bench")]
sys.path[1:1] = PLACES
os.environ["PYTHONPATH"] = os.pathsep.join([*PLACES, *filter(None, [os.environ.get("PYTHONPATH")])])

from judge import describe_machine, find_deviation, judge_job, judge_likeness  # noqa: E402
from whole_jobs import JOBS, WholeJob, build_base, run_job, write_rows  # noqa: E402

LIMITS = {"doctor": 90.0, "tests": 230.0, "job": 100.0, "job with a stop": 150.0}  # seconds, on a GPU
INTERRUPTED_SECONDS = 8.0
TIMES_ON_A_CPU = 10
COLUMNS = "{:14} {:>5} {:>6} {:>8} {:>8} {:>7} {:>7} {:>6} {:>9} {:>5} {:>7} {:>7}  {}"


class Report:
    """What was found so far, in a file that is whole at any moment."""

    def __init__(self, file: Path, size: str, at_a_time: int) -> None:
        """Begin with the machine, and with how many checks run beside each other, which tells whether speed counts."""
        self.file, self.lock = file, threading.Lock()
        about = {"size": size, "at_a_time": at_a_time}
        self.found: dict[str, Any] = {**describe_machine(), **about, "checks": {}, "jobs": {}}

    def add(self, part: str, name: str, result: dict[str, Any]) -> None:
        """Enter a result, and write the file."""
        with self.lock:
            self.found[part][name] = result
            self.write()
        print(f"{time.strftime('%H:%M:%S')} {name}: {result.get('exit')}, {result.get('seconds')} s", flush=True)

    def write(self) -> None:
        """Write the file anew."""
        partial = self.file.with_suffix(".part")
        partial.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        partial.replace(self.file)


class Kit:
    """The checks, the time that is left for them, and their folder."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        """Take the command's options and a folder for what need not be kept."""
        self.size, self.only, self.work, self.at_a_time = options.size, options.only, work, options.at_a_time
        self.deadline = STARTED + options.seconds
        self.report = Report(options.out / "correct.json", options.size, options.at_a_time)
        self.on_gpu = self.report.found["device"] != "CPU"
        self.is_ready = threading.Event()

    def bound(self, kind: str) -> float:
        """Return the seconds that a check may take from now on."""
        limit = LIMITS[kind] * (1 if self.on_gpu else TIMES_ON_A_CPU)
        return min(limit, self.deadline - time.monotonic())

    def run_command(self, name: str, words: list[str], kind: str, **variables: str) -> dict[str, Any]:
        """Run a command. Return its exit code, its seconds and the end of its output, which `logs.tar.gz` has whole."""
        started, log = time.monotonic(), self.work / f"{name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=REPOSITORY,
                env={**os.environ, **variables},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            code = self.end_command(process, self.bound(kind))
        text = log.read_text(encoding="utf-8", errors="replace")
        return {"exit": code, "seconds": round(time.monotonic() - started, 1), "text": text[-20_000:]}

    def end_command(self, process: "subprocess.Popen[bytes]", seconds: float) -> int | str:
        """Return the exit code. When its time is up, a command gets Ctrl-C, at which pytest still writes its report."""
        for signum in (signal.SIGINT, signal.SIGKILL):
            with suppress(subprocess.TimeoutExpired):
                return process.wait(max(1.0, seconds))
            process.send_signal(signum)
            seconds = INTERRUPTED_SECONDS
        process.wait()
        return "killed: its time was up"

    def examine(self) -> dict[str, Any]:
        """Run the doctor."""
        return self.run_command("doctor", ["-m", "llm_trainer", "doctor"], "doctor")

    def test(self) -> dict[str, Any]:
        """Run the tests beside this file."""
        junit = self.work / "junit.xml"
        words = ["-m", "pytest", "-s", "-rs", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={REPOSITORY}"]
        words += [f"--confcutdir={HERE}", "--import-mode=importlib", "--durations=10", f"--junitxml={junit}"]
        words += sorted(map(str, HERE.glob("test_*.py")), key=lambda file: "liger" in file)  # its experts take minutes
        result = self.run_command("tests", words, "tests", LLM_TRAINER_GPU_TEST_SIZE=self.size)
        if junit.is_file():
            suite = ElementTree.parse(junit).getroot()[0]
            result["counts"] = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
        return result

    def prepare(self) -> dict[str, Any]:
        """Write the base and the rows, which all jobs read."""
        started = time.monotonic()
        try:
            write_rows(self.work / "rows")
            build_base(self.work / "base", self.size)
        finally:
            self.is_ready.set()  # else all jobs would wait
        return {"exit": 0, "seconds": round(time.monotonic() - started, 1)}

    def train(self, job: WholeJob) -> None:
        """Run a job once its files are there, and enter what came of it."""
        self.is_ready.wait(self.bound("job"))
        left = self.bound("job with a stop" if job.stop_at else "job")
        if left < 15:
            self.report.add("jobs", job.name, {"exit": "left out: no time was left", "seconds": 0})
            return
        self.attempt("jobs", job.name, lambda: run_job(job, self.work, left))

    def attempt(self, part: str, name: str, work: Any) -> None:
        """Enter what the work returns, or its traceback: no check takes the others along."""
        try:
            result = work()
        except Exception:
            result = {"exit": "the kit failed", "seconds": None, "text": traceback.format_exc()}
        self.report.add(part, name, result)

    def run(self) -> bool:
        """Run all checks. Return whether all demands are met."""
        first = {"doctor": self.examine, "prepare": self.prepare, "tests": self.test}
        with ThreadPoolExecutor(self.at_a_time) as pool:
            for name, work in first.items():
                if self.wants(name):
                    pool.submit(self.attempt, "checks", name, work)
            for job in JOBS:
                if self.wants(job.name) and (self.on_gpu or not job.needs_gpu):
                    pool.submit(self.train, job)
        return self.judge()

    def wants(self, name: str) -> bool:
        """Tell whether the command asks for a check. Jobs need what `prepare` writes."""
        return not self.only or name in self.only or name == "prepare"

    def judge(self) -> bool:
        """Add the verdicts to the report, print the table, and return whether all demands are met."""
        checks, jobs = self.report.found["checks"], self.report.found["jobs"]
        for result in checks.values():
            result["verdicts"] = [["exit", result["exit"] == 0, str(result["exit"])]]
        for job in filter(lambda job: job.name in jobs, JOBS):
            result = jobs[job.name]
            try:
                result["verdicts"] = list(self.judge_one(job, jobs))
            except Exception:  # a result of a kind that nobody thought of
                result["verdicts"] = [["judgement", False, traceback.format_exc()[-300:]]]
        self.report.write()
        rows = {**checks, **jobs}
        print_table(rows)
        return all(met for result in rows.values() for _, met, _ in result["verdicts"])

    def judge_one(self, job: WholeJob, jobs: dict[str, Any]) -> Iterator[tuple[str, bool, str]]:
        """Yield the verdicts on a job, and on its likeness to another one."""
        result, other = jobs[job.name], jobs.get(job.like, {})
        if "losses" not in result:
            yield "exit", False, str(result["exit"])
            return
        yield from judge_job(job, result, self.on_gpu)
        if "losses" in other:
            yield from judge_likeness(job, result, other)


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print a line for each check, and below it each demand that is not met."""
    print(
        COLUMNS.format(
            "check", "exit", "s", "loss", "to", "est.", "peak", "off", "tokens/s", "MFU", "planned", "step", "not met"
        )
    )
    for name, result in rows.items():
        losses, memory = list((result.get("losses") or {}).values()), result.get("memory") or {}
        plan = result.get("plan") or {}
        estimate = (memory.get("estimate") or {}).get("peak_bytes", 0) / 2**30
        missed = [f"{demand} ({found[:150]})" for demand, met, found in result["verdicts"] if not met]
        cells = [
            str(result["exit"])[:5],
            str(result["seconds"]),
            *(f"{loss:.4f}" for loss in (losses[:1] + losses[-1:] or [0.0, 0.0])),
            f"{estimate:.2f}",
            f"{memory.get('measured_peak_bytes', 0) / 2**30:.2f}",
            f"{100 * (find_deviation(result) or 0):+.1f}%" if memory else "",
            f"{result.get('tokens_per_second') or 0:,.0f}",
            f"{100 * (result.get('mfu') or 0):.0f}%",
            *(f"{(plan.get(side) or {}).get('step_seconds') or 0:.3f}" for side in ("planned", "actual")),
        ]
        print(COLUMNS.format(name, *cells, "; ".join(missed)))


def pack_logs(work: Path, file: Path) -> None:
    """Gather logs, journals, manifests and junit's file."""
    patterns = ("*.log", "junit.xml", "*/output/data/metrics.jsonl", "*/output/failure", "*/model/*manifest.json")
    with tarfile.open(file, "w:gz") as archive:
        for found in sorted({found for pattern in patterns for found in work.glob(pattern)}):
            archive.add(found, found.relative_to(work))


def main() -> int:
    """Run the checks and leave the report and the logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for correct.json and logs.tar.gz")
    parser.add_argument("--size", default="1B", choices=("1B", "8B", "tiny"), help="of the model")
    parser.add_argument("--seconds", type=float, default=265, help="for all checks together")
    parser.add_argument("--at-a-time", type=int, default=5, help="checks that run beside each other; 1 to time jobs")
    parser.add_argument("--only", nargs="*", default=[], help="names of checks: doctor, tests, or jobs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as folder:
        try:
            all_met = Kit(options, Path(folder)).run()
        finally:
            pack_logs(Path(folder), options.out / "logs.tar.gz")
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
