# SPDX-License-Identifier: Apache-2.0
"""Whole trainers on the same GPU: this project, TRL as it is and as well as it can be set, and Unsloth likewise.

    python3 bench/gpu_peers.py --out FOLDER                 all, a row of a table each
    python3 bench/gpu_peers.py --out FOLDER llm-trainer trl some of them
    python3 bench/gpu_peers.py --out FOLDER --size tiny     to try the program itself

All train a LoRA of rank 16 on all linear layers of bench/gpu.py's 8B Llama of random weights, in bfloat16 with AdamW,
from the same files: rows of 1,024 tokens, packed to 8,192 a step. Each is a process of its own with a limit of 120 s
from its turn on, and imports what it needs while the one before trains. What fails is reported and stops no other.

A step is what a user waits for, the loading of its batch included: the median of those after the first six, each
taken once the GPU has done it. The tokens are counted where the embeddings are looked up. GPU_PEERS_SITE names a folder
with Unsloth and the packages in the versions that it asks for; without it, it is left out.
"""

import argparse
import copy
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "opponents/on_gpu.py"
PREPARATION = [sys.executable, __file__, "--prepare"]
NAMES = {  # in the order in which they run: what must be known first
    "llm-trainer": "llm-trainer",
    "unsloth-tuned": "Unsloth, without checkpointing",
    "trl-tuned": "TRL, Liger, without checkpointing",
    "unsloth": "Unsloth",
    "trl": "TRL",
}
COLUMNS = ("trainer", "tokens/s", "ms a step", "tokens a step", "peak GiB", "losses", "seconds", "with")
LIMIT_SECONDS = 120.0  # of a peer: Unsloth compiles meanwhile
ALL_SECONDS = 290.0  # with the making of the base
ROW_TOKENS = {"8B": 1024, "tiny": 16}
ROWS_A_STEP, NUM_ROWS = 8, 160
WORDS = range(3, 11)  # tokens of the rows: that there are no others is learned in a few steps


def prepare(size: str, folder: Path) -> None:
    """Write base/, of random weights in bfloat16 with a tokenizer of bytes, and rows/rows.jsonl."""
    import torch
    from transformers import AutoModelForCausalLM

    sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "code")]
    import gpu
    from support.tiny_model import build_tokenizer

    tokenizer, config = build_tokenizer(), copy.deepcopy(gpu.SIZES[size])
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    with gpu.choose_device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)
    end = [tokenizer.eos_token_id]  # without which llm-trainer takes no rows
    rows = [{"input_ids": draw.choices(WORDS, k=ROW_TOKENS[size] - 1) + end} for _ in range(NUM_ROWS)]
    (folder / "rows").mkdir()
    (folder / "rows/rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


class Peer:
    """A process that trains once it is told to."""

    def __init__(self, name: str, folder: Path, packed_tokens: int) -> None:
        """Start it; its output goes to NAME.log in the folder."""
        self.name, self.result, self.log = name, folder / f"{name}.json", folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), name, str(folder), str(packed_tokens)],
                cwd=folder,
                env=make_environment(name, folder),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def measure(self, seconds: float) -> dict[str, Any]:
        """Have it train, for so many seconds at most. Return what it found, or `error`, and how long it took."""
        started = time.monotonic()
        with suppress(OSError):  # it has ended: its log tells why
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
        while time.monotonic() < started + seconds and not self.result.exists() and self.process.poll() is None:
            time.sleep(0.05)
        is_over = self.process.poll() is None
        self.end()
        took = round(time.monotonic() - started, 1)
        if self.result.exists():
            return {**json.loads(self.result.read_text()), "whole_seconds": took}
        log = self.log.read_text(encoding="utf-8", errors="replace")
        reason = f"its {seconds:.0f} s were up" if is_over else f"it ended with code {self.process.returncode}"
        return {"error": reason, "log": log[-6000:], "whole_seconds": took}

    def end(self) -> None:
        """End the process and all that it started: what they still do is not measured."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for started in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    started.kill()
        self.process.wait()


def make_environment(name: str, folder: Path) -> dict[str, str]:
    """The variables of a peer: no network is asked, and Unsloth finds the packages of its own."""
    place = os.environ.get("GPU_PEERS_SITE", "") if name.startswith("unsloth") else str(HERE.parent / "code")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
    }


def judge(found: dict[str, Any], tokens: int) -> str:
    """What is wrong with a measurement of steps of so many tokens, or an empty string."""
    if "error" in found:
        return found["error"]
    if set(found["tokens"]) != {tokens}:
        return f"steps of {sorted(set(found['tokens']))} tokens in the place of {tokens}"
    losses = found["losses"]
    if len(losses) < 2 or not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        return f"it does not learn: {losses}"
    return ""


def describe(name: str, found: dict[str, Any], tokens: int) -> str:
    """A row of the table, and after it what is wrong."""
    wrong = judge(found, tokens)
    if "step_seconds" not in found:
        return f"| {NAMES[name]} | failed: {wrong} |"
    trained = statistics.median(found["tokens"])
    cells = [
        NAMES[name],
        f"{trained / found['step_seconds']:,.0f}",
        f"{1000 * found['step_seconds']:.0f}",
        f"{trained:,.0f}",
        f"{found['peak_bytes'] / 2**30:.1f}",
        f"{found['losses'][0]:.2f} to {found['losses'][-1]:.2f}" if found["losses"] else "",
        f"{found['whole_seconds']:.0f}",
        ", ".join(f"{package} {version}" for package, version in found["versions"].items()),
    ]
    return f"| {' | '.join(cells)} |" + (f" {wrong}" if wrong else "")


def measure_all(names: list[str], size: str, folder: Path, out: Path) -> bool:
    """Print a row for each peer as it comes; peers.json in `out` then holds what was measured so far."""
    deadline, tokens = time.monotonic() + ALL_SECONDS, ROW_TOKENS[size] * ROWS_A_STEP
    figures: dict[str, Any] = {"size": size, "device": "", "tokens_per_step": tokens, "peers": {}}
    print(f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), sep="\n", flush=True)
    peers = (Peer(name, folder, tokens // 2) for name in names)
    following = next(peers)
    subprocess.run([*PREPARATION, str(folder), "--out", str(out), "--size", size], check=True)
    all_well = True
    for name in names:
        peer, following = following, next(peers, None)  # which imports while this one trains
        found = peer.measure(max(1.0, min(LIMIT_SECONDS, deadline - time.monotonic())))
        figures["device"] = found.get("device", figures["device"])
        figures["peers"][name] = {**found, "wrong": judge(found, tokens)}
        all_well = all_well and not judge(found, tokens)
        print(describe(name, found, tokens), flush=True)
        (out / "peers.json").write_text(json.dumps(figures, indent=1))
    return all_well


def choose_place(size: str) -> str | None:
    """A folder in memory if it holds the 16 GB of the 8B model, else the usual one for temporary files."""
    memory = Path("/dev/shm")
    needed = 40 * 2**30 if size == "8B" else 2**20
    if not memory.is_dir():
        return None
    found = os.statvfs(memory)
    return str(memory) if found.f_bavail * found.f_frsize > needed else None


def main() -> int:
    """Measure, and return 1 if any peer failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"all by default: {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the figures as JSON, and the logs")
    parser.add_argument("--size", choices=ROW_TOKENS, default="8B")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        prepare(given.size, given.prepare)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.names or [name for name in NAMES if os.environ.get("GPU_PEERS_SITE") or "unsloth" not in name]
    with tempfile.TemporaryDirectory(prefix="gpu-peers-", dir=choose_place(given.size)) as folder:
        try:
            return 0 if measure_all(names, given.size, Path(folder), given.out) else 1
        finally:
            with tarfile.open(given.out / "peers-logs.tar.gz", "w:gz") as archive:
                for log in Path(folder).glob("*.log"):
                    archive.add(log, log.name)


if __name__ == "__main__":
    sys.exit(main())
