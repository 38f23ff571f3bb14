# SPDX-License-Identifier: Apache-2.0
"""What the GPU kit measured, kept in bench/gpu-DEVICE.json, and the tables that bench/RESULTS.md has of it.

    .venv/bin/python bench/gpu_tables.py FOLDER ...  take in fast.json, correct.json and peers.json below the folders
    .venv/bin/python bench/gpu_tables.py             write the tables of bench/RESULTS.md anew

A file of figures is for one kind of GPU. It keeps medians, and of each variant, job and trainer the newest; `call`
tells which of the machine's calls gave it: a folder is one. `steps` has `planned_ms` from bench/step_times.py.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
TABLE = re.compile(r"(?<=<!-- table: )([\w.-]+) (\w+)( -->\n)(.*?)(?=<!-- end of table -->)", re.DOTALL)
VARIANTS = {  # of bench/gpu.py, in the order of the table
    "fused adapters": "the default: no recomputation, dropout or casts; adapters in one function with their base",
    "no recomputation": "adapters as PEFT computes them",
    "torch's flash": "the same, PyTorch's kernel without the shim (`flash_attention_torch`)",
    "dropout 0, no cast": "the same, recomputation",
    "first release": "as the first release: recomputation, `lora_dropout=0.1`, PEFT's casts to float32",
    "sdpa": "adapters as PEFT computes them, SDPA",
    "no Liger": "adapters as PEFT computes them, without Liger",
    "compiled layers": "adapters as PEFT computes them, layers by `torch.compile` without Liger",
    "compiled, fused": "the default, layers by `torch.compile` without Liger",
    "nf4, fused": "the default, the base in nf4",
    "nf4": "the base in nf4, adapters as PEFT computes them",
    "fp8, fused": "the default, the base's products in float8",
    "fp8": "the base's products in float8, adapters as PEFT computes them",
    "fp8 kept once, fused": "the default, products in float8 and one copy of the base",
}
JOBS = {  # of tests/gpu/whole_jobs.py: those whose estimate is told
    "lora": "LoRA",
    "torch-flash": "LoRA, `flash_attention_torch`",
    "packed": "LoRA, packed",
    "packed-4k": "LoRA, packed to 4,096 tokens",
    "fp8": "LoRA, packed to 4,096 tokens, `base_compute=fp8`",
    "packed-sdpa": "LoRA, packed, SDPA",
    "recomputed": "LoRA, recomputed",
    "offloaded": "LoRA, activations offloaded",
    "exact": "LoRA, `full_determinism`",
    "float16": "LoRA, float16",
    "8-bit": "LoRA, `load_in_8bit`",
    "fsdp": "LoRA, FSDP2",
    "qlora-merge": "QLoRA",
    "fsdp-qlora": "QLoRA, FSDP2",
    "full": "all weights",
    "fsdp-full": "all weights, FSDP2",
}
PEERS = {  # of bench/gpu_peers.py
    "llm-trainer": "`llm-trainer train`",
    "unsloth-tuned": "Unsloth, without gradient checkpointing",
    "unsloth": "Unsloth, its own checkpointing",
    "trl-tuned": "TRL, Liger, without gradient checkpointing or dropout",
    "trl": "TRL, its defaults",
}
STEPS = {  # of tests/gpu/whole_jobs.py, where each ran alone: what it is, and whether the plan was fitted to it
    "8B packed-4k": ("8B, LoRA, packed to 4,096 tokens", "the seconds between steps"),
    "8B fp8": ("8B, the same, `base_compute=fp8`", ""),
    "8B qlora-4k": ("8B, the same, `load_in_4bit`", ""),
    "8B long-rows": ("8B, the same, rows of 4,086 tokens", ""),
    "8B recomputed-4k": ("8B, the same, recomputed", ""),
    "1B lora": ("1B, LoRA, 24 rows", "the seconds of a function"),
    "1B full": ("1B, all weights, 24 rows", ""),
    "1B packed-4k": ("1B, LoRA, packed to 4,096 tokens", ""),
    "1B qlora-4k": ("1B, the same, `load_in_4bit`", ""),
    "1B long-rows": ("1B, the same without it, rows of 4,086 tokens", ""),
}
PHASES = "ms: forward + backward + optimizer"
Figures = dict[str, Any]


def take_in(folders: list[Path]) -> None:
    """Add what the folders hold, a call of the machine each, to the files of figures."""
    for folder in folders:
        devices: dict[str, Figures] = {}
        for file in sorted(folder.rglob("*.json")):
            part, found = file.stem, json.loads(file.read_text())
            if part not in READERS or not found["device"]:  # all peers failed
                continue
            name = f"gpu-{found['device'].split(',')[0].split()[-1].lower()}.json"  # "NVIDIA H200, torch 2.11.0+cu130"
            figures = devices.setdefault(name, read_figures(HERE / name))
            for key, read in READERS[part]:
                figures.setdefault(key, {}).update(read(found, figures["calls"]))
        for name, figures in devices.items():
            figures["calls"] += 1
            (HERE / name).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def read_figures(file: Path) -> Figures:
    """Return what the file holds, or what an empty one would."""
    return json.loads(file.read_text()) if file.is_file() else {"calls": 0, "variants": {}, "jobs": {}, "peers": {}}


def read_variants(found: dict[str, Any], calls: int) -> Figures:
    """Return the medians of fast.json by variant, those of 8B models, without what failed."""
    measured = {name: result["measurement"] for name, result in found["variants"].items() if "measurement" in result}
    if found["size"] != "8B":
        return {}
    return {
        name: {
            "call": calls + 1,
            "tokens_per_second": round(each["tokens_per_second"]),
            "tflops": round(each["flops_per_second"] / 1e12, 1),
            "ceiling_tflops": round(found["ceiling"] / 1e12, 1),
            "peak_gib": round(each["peak_bytes"] / 2**30, 1),
            "step_ms": round(1000 * each["step_seconds"]),
            "phases_ms": [round(1000 * seconds) for seconds in each["phase_seconds"].values()],
        }
        for name, each in measured.items()
    }


def read_jobs(found: dict[str, Any], calls: int) -> Figures:
    """Return the memory that correct.json's 1B jobs were estimated to take and took, and their speed."""
    whole = {name: job for name, job in found["jobs"].items() if job["exit"] == 0 and job.get("memory")}
    if found["size"] != "1B":
        return {}
    return {
        name: {
            "call": calls + 1,
            "estimated_gib": round(job["memory"]["estimate"]["peak_bytes"] / 2**30, 3),
            "measured_gib": round(job["memory"]["measured_peak_bytes"] / 2**30, 3),
        }
        for name, job in whole.items()
        if job["memory"].get("measured_peak_bytes")
    }


def read_peers(found: dict[str, Any], calls: int) -> Figures:
    """Return the speed of peers.json's trainers that did as they were asked."""
    return {
        name: {
            "call": calls + 1,
            "tokens_per_second": round(statistics.median(peer["tokens"]) / peer["step_seconds"]),
            "tokens_per_step": round(statistics.median(peer["tokens"])),
            "step_ms": round(1000 * peer["step_seconds"]),
            "peak_gib": round(peer["peak_bytes"] / 2**30, 1),
            "versions": peer["versions"],
        }
        for name, peer in found["peers"].items()
        if not peer["wrong"]
    }


def read_steps(found: dict[str, Any], calls: int) -> Figures:
    """Return the median step of correct.json's jobs, where each ran alone: others take from its speed."""
    return {
        f"{found['size']} {name}": {
            "call": calls + 1,
            "step_ms": round(1000 * job["plan"]["actual"]["step_seconds"], 1),
            "tokens_per_second": round(job["tokens_per_second"]),
        }
        for name, job in found["jobs"].items()
        if found.get("at_a_time") == 1 and job.get("plan")
    }


READERS = {  # by the name of a file that the kit leaves: where its figures go, and what reads it
    "fast": (("variants", read_variants),),
    "correct": (("jobs", read_jobs), ("steps", read_steps)),
    "peers": (("peers", read_peers),),
}


def list_variants(figures: Figures) -> Iterator[list[str]]:
    """Yield the heading and the rows of the table of variants."""
    yield ["variant", "tokens/s", "model TFLOP/s", "of the ceiling", "peak GiB", PHASES, "call"]
    for title, each in sort_by(VARIANTS, figures["variants"]):
        yield [
            title,
            f"{each['tokens_per_second']:,}",
            f"{each['tflops']:.1f}",
            f"{100 * each['tflops'] / each['ceiling_tflops']:.1f} %",
            f"{each['peak_gib']:.1f}",
            f"{each['step_ms']} = {' + '.join(map(str, each['phases_ms']))}",
            str(each["call"]),
        ]


def list_jobs(figures: Figures) -> Iterator[list[str]]:
    """Yield the heading and the rows of the table of estimates."""
    yield ["estimate of a 1B job", "estimated, GiB", "measured, GiB", "off", "call"]
    for title, each in sort_by(JOBS, figures["jobs"]):
        estimated, measured = each["estimated_gib"], each["measured_gib"]
        off = f"{100 * (estimated / measured - 1):+.1f} %"
        yield [title, f"{estimated:.2f}", f"{measured:.2f}", off, str(each["call"])]


def list_peers(figures: Figures) -> Iterator[list[str]]:
    """Yield the heading and the rows of the table of whole trainers."""
    yield ["trainer", "tokens/s", "ms a step", "tokens a step", "peak GiB", "with", "call"]
    for title, each in sort_by(PEERS, figures["peers"]):
        versions = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
        speed, tokens = f"{each['tokens_per_second']:,}", f"{each['tokens_per_step']:,}"
        yield [title, speed, str(each["step_ms"]), tokens, f"{each['peak_gib']:.1f}", versions, str(each["call"])]


def list_steps(figures: Figures) -> Iterator[list[str]]:
    """Yield the heading and the rows of the table of planned and actual steps."""
    yield ["a step of a job that ran alone", "planned, s", "took, s", "off", "fitted to it", "tokens/s", "call"]
    for (title, fitted), each in sort_by(STEPS, figures.get("steps", {})):
        planned, took = each["planned_ms"], each["step_ms"]
        off = f"{100 * (planned / took - 1):+.1f} %"
        speed, call = f"{each['tokens_per_second']:,}", str(each["call"])
        yield [title, f"{planned / 1000:.3f}", f"{took / 1000:.3f}", off, fitted or "nothing", speed, call]


LISTERS = {"variants": list_variants, "jobs": list_jobs, "peers": list_peers, "steps": list_steps}


def sort_by(titles: dict[str, Any], found: Figures) -> Iterator[tuple[Any, Figures]]:
    """Yield what has a title, in the titles' order."""
    yield from ((title, found[name]) for name, title in titles.items() if name in found)


def render(figures: Figures, part: str) -> str:
    """Return a table in Markdown: of `variants`, `jobs`, `steps` or `peers`."""
    heading, *rows = LISTERS[part](figures)
    if not rows:
        return "Not measured yet.\n"
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|\n" for line in lines)


def write_tables(text: str) -> str:
    """Return the text with each table made anew from the figures that its mark names."""

    def replace(found: re.Match[str]) -> str:
        file, part, end, _ = found.groups()
        return f"{file} {part}{end}{render(read_figures(HERE / file), part)}"

    return TABLE.sub(replace, text)


def main() -> None:
    """Take in what the command names, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="of the kit's results, one a call, oldest first")
    folders = parser.parse_args().folders
    take_in(folders)
    if not folders:
        RESULTS.write_text(write_tables(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
