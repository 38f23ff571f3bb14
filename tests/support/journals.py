# SPDX-License-Identifier: Apache-2.0
"""Journals of jobs as the contract of journal.py has them, for the report and its advice, and results for trackers."""

import json
import math
import random
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llm_trainer.journal.records import Record

START = 1_790_000_000.0
HOSTILE = "<script>alert('x')</script> & \"quoted\" </textarea>"


def list_fields(kind: str) -> set[str]:
    """The fields that the type of this kind of records names."""
    hints = (get_type_hints(record_type) for record_type in get_args(Record))
    return next(set(fields) for fields in hints if get_args(fields["kind"]) == (kind,))


def write_listed_result(folder: Path) -> list[str]:
    """Write a result with a file of the user's beside it. Return the files that its manifest lists."""
    (folder / "adapters/trained").mkdir(parents=True)
    listed = ["adapters/trained/adapter_config.json", "config.json", "training_manifest.json"]
    for name in [*listed, "notes.txt"]:
        (folder / name).touch()
    (folder / "training_manifest.json").write_text(json.dumps({"files": listed}))
    return listed


class FakeJournal:
    """Writes records at times that the test gives."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: list[dict[str, Any]] = []

    def add(self, at: float, kind: str, **fields: Any) -> None:
        self.records.append({"time": START + at, "kind": kind, **fields})

    def write(self) -> Path:
        self.records.sort(key=lambda record: record["time"])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(json.dumps(record, separators=(",", ":")) + "\n" for record in self.records))
        return self.file


def write_long_job(
    file: Path, num_hosts: int = 2, num_gpus: int = 8, num_steps: int = 10_000, hours: float = 24
) -> Path:
    """A day of eight GPUs: evaluations, checkpoints, a restart, a loss that was no number, and text that is hostile."""
    dice = random.Random(7)
    journal = FakeJournal(file)
    hosts = [f"algo-{number}" for number in range(1, num_hosts + 1)]
    settings = {
        "model_id": "Qwen/Qwen3-8B",
        "lora_r": 16,
        "lora_alpha": 32,
        "learning_rate": 2e-4,
        "max_length": 2048,
        "per_device_train_batch_size": 2,
        "target_modules": "all-linear",
        "packing": None,
        "mlflow_uri": None,
        "system_prompt": HOSTILE,
        "run_name": "Größe 模型 🚀",
    }
    environment = {
        "image": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/sagemaker-llm-trainer@sha256:" + "ab" * 32,
        "revision": "cb4b0a6d",
        "instance_type": "ml.p5.48xlarge",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
    }
    job = {
        "name": f"qwen3-8b-support-{num_hosts * num_gpus}gpu",
        "started": START,
        "hosts": hosts,
        "billed_hosts": num_hosts,
        "world_size": num_hosts * num_gpus,
        "arn": "arn:aws:sagemaker:eu-central-1:123456789012:training-job/qwen3-8b-support",
        "settings": settings,
        "environment": environment,
    }
    journal.add(0, "job", **job, attempt=1)
    ready, training = 900.0, hours * 3600 - 1800
    journal.add(420, "phase", name="download", seconds=410, host="algo-1")
    journal.add(470, "phase", name="imports", seconds=40, host="algo-1")
    journal.add(640, "phase", name="data", seconds=170, host="algo-1")
    journal.add(ready, "phase", name="model", seconds=230, host="algo-1")
    for split, rows in (("train", 48_210), ("validation", 1_200)):
        lengths: dict[str, int] = {}
        for _ in range(rows // 10):
            length = str(min(4096, int(dice.lognormvariate(6, 0.7))))
            lengths[length] = lengths.get(length, 0) + 10
        tokens = sum(int(length) * number for length, number in lengths.items())
        summary = {
            "num_rows": rows,
            "num_truncated_rows": rows // 60,
            "num_dropped_rows": 0,
            "num_unsupervised_rows": 3,
            "num_bad_rows": 2,
            "num_duplicate_rows": 41,
            "longest_row_tokens": max(map(int, lengths)),
        }
        sources = [
            {"name": f"{split}.jsonl", "uri": f"s3://bucket/{split}/{HOSTILE}", "sha256": "cd" * 32, "bytes": 9_000_000}
        ]
        journal.add(
            641,
            "data",
            split=split,
            rows=rows,
            tokens=tokens,
            supervised_tokens=int(tokens * 0.31),
            lengths=lengths,
            sources=sources,
            summary=summary,
        )
    journal.add(
        ready, "model", model="Qwen/Qwen3-8B", parameters=8_190_735_360, trainable_parameters=43_646_976, adapter="lora"
    )
    for step in range(10, num_steps + 1, 10):
        now = ready + training * step / num_steps
        loss = 0.8 + 1.6 * math.exp(-step / 1500) + dice.gauss(0, 0.06)
        values = {
            "train_loss": math.nan if step == 4000 else loss,
            "train_token_accuracy": 0.82 - loss / 8,
            "grad_norm": 0.4 + dice.expovariate(4),
            "learning_rate": 2e-4 * min(1, step / 300) * (1 - step / num_steps),
            "tokens": step * 30_000.0,
            "tokens_per_second": 30_000 * num_steps / training * dice.gauss(1, 0.03),
            "mfu": dice.gauss(0.38, 0.01),
            "epoch": step / 3000,
        }
        journal.add(now, "metrics", step=step, total_steps=num_steps, epoch=step / 3000, values=values)
        if step % 500 == 0:
            eval_loss = 0.95 + 1.4 * math.exp(-step / 1400) + max(0, step - 5000) / 40_000
            evaluation = {
                "eval_loss": eval_loss,
                "eval_mean_token_accuracy": 0.8 - eval_loss / 8,
                "eval_runtime": training / 200,
            }
            journal.add(now + 1, "metrics", step=step, total_steps=num_steps, epoch=step / 3000, values=evaluation)
            journal.add(now + 20, "checkpoint", step=step, seconds=18.5)
    restart = ready + training * 0.6
    journal.add(
        restart, "event", level="warning", text=f"XID 79: GPU 3 has fallen off the bus {HOSTILE}", host="algo-2"
    )
    journal.add(restart + 5, "job", **job, attempt=2)
    journal.add(restart + 60, "event", level="info", text="Resumed from the checkpoint of step 5,500.", host="algo-1")
    for seconds in range(5, int(hours * 3600), 10):
        is_training = seconds > ready
        for number, host in enumerate(hosts):
            figures: dict[str, float] = {
                "cpu_percent": dice.gauss(35, 6) if is_training else 80.0,
                "memory_percent": 41.0,
                "memory_used_bytes": 8e11,
                "shared_memory_used_bytes": 0,
                "checkpoints_free_bytes": 4e12 - seconds * 1e6,
                "disk_read_bytes_per_second": 2e6 if is_training else 9e8,
                "disk_written_bytes_per_second": 1.2e7,
                "network_received_bytes_per_second": dice.uniform(1e8, 4e8),
            }
            values = {f"host/{host}/{name}": round(value, 1) for name, value in figures.items()}
            for gpu in range(num_gpus):
                is_slow = number == num_hosts - 1 and gpu == 3
                figures = {
                    "utilization_percent": min(100, max(0, dice.gauss(93 if is_training else 2, 4))),
                    "memory_used_bytes": 4.2e10 if is_training else 5e8,
                    "memory_total_bytes": 8.1e10,
                    "power_watts": dice.gauss(520 if is_training else 90, 20),
                    "temperature_celsius": dice.gauss(79 if is_slow else 61, 2),
                    "sm_clock_mhz": dice.gauss(1480 if is_slow else 1830, 15),
                    "throttled_power_cap": 1,
                    "throttled_hardware": 0,
                    "throttled_thermal": int(is_slow and dice.random() < 0.4),
                    "throttled_power_brake": 0,
                    "xid_errors": int(is_slow and is_training),
                }
                values |= {f"gpu/{host}/{gpu}/{name}": round(value, 1) for name, value in figures.items()}
            journal.add(seconds + number / 10, "system", host=host, values=values)
    for number in range(4):
        journal.add(
            hours * 3600 - 100 + number,
            "generation",
            prompt=f"Wie groß ist 模型 {number}? {HOSTILE}",
            reference="Sehr groß. " * 12,
            before=f"{HOSTILE}\n\n" + "I am not sure what you mean. " * 8,
            after="Sehr groß: 🚀 " * 20,
        )
    manifest = {
        "packing": {"mode": "off", "reason": "sdpa attention lets rows see one another"},
        "versions": {"python": "3.11.9"},
        "lineage": [
            {"adapter": "/opt/ml/input/data/adapter", "training_job_name": f"second {HOSTILE}", "num_steps": 40},
            {"adapter": "team/first", "training_job_name": None, "num_steps": None},
        ],
    }
    journal.add(hours * 3600 - 60, "manifest", **manifest)
    journal.add(hours * 3600 - 30, "phase", name="merge", seconds=300, host="algo-1")
    journal.add(hours * 3600, "end", status="done", reason=None)
    return journal.write()
