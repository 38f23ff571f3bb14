# SPDX-License-Identifier: Apache-2.0
"""Every benchmark of this folder that needs neither a GPU nor root, appended to RESULTS.md as it was printed.

    .venv/bin/python bench/all.py .demo/opt/ml [ROUNDS]

Hours on two cores, on which nothing else should run. One that fails ends it; what the earlier ones found is kept.
"""

import datetime
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "tokenizers")


def main() -> None:
    tree, rounds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "5"
    model = f"{tree}/input/data/model"
    append(f"\n## make bench, {datetime.date.today()}\n\n{describe_machine()}\n")
    for words in (
        ["job.py", tree, rounds],
        ["start.py", tree, rounds],
        ["step.py", tree, rounds],
        ["data.py", model],
        ["merge.py", rounds],
        ["ranks.py", model, rounds],
        ["tracking.py", rounds],
    ):
        append(f"\n`bench/{' '.join(words)}`:\n\n{run(words)}")


def run(words: list[str]) -> str:
    """What the program prints, which is also shown while it runs, indented as Markdown's verbatim text."""
    command = [sys.executable, "-u", str(HERE / words[0]), *words[1:]]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(f"    {line}")
    if process.returncode:
        sys.exit(f"bench/{words[0]} failed.")
    return "".join(lines)


def describe_machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores, python = len(os.sched_getaffinity(0)), sys.version.split()[0]
    return f"{cores} cores of {model}, {memory:.0f} GiB; Python {python}, {packages}."


def append(text: str) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
