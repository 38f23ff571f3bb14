# SPDX-License-Identifier: Apache-2.0
"""Kills an export before each of its changes to the model folder, and tells what it left that looks whole and is not.

Run as `python -m support.killed_exports BASE FOLDER KIND`. Each process is forked from this one, which has imported
what takes seconds, and dies by SIGKILL. Python's audit events name the operations. The comparison of logits writes
nothing, and is left out.
"""

import gc
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_trainer.export import export
from llm_trainer.export.placement import STAGING
from llm_trainer.export.result import TrainingResult
from support.exports import build_manifest, build_result

OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
CONFIGS = {"config.json", "adapter_config.json", "adapter/adapter_config.json"}
SERVED = {"adapters/trained/adapter_config.json", "adapters/trained/adapter_model.safetensors"}
BESIDE = (".md", "training_manifest.json", "serving.env", "serving.properties")
CHECK = {"what": "nothing", "loaded": "nowhere", "rows": 3}
# For each kind of export: its settings, and those of the job that left a result in the same tree before.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adapter": ({}, {"use_peft": False}),
    "merged": ({"merge_weights": True}, {}),
    "weights": ({"use_peft": False}, {"merge_weights": True}),
}


def run_export(trained: TrainingResult, kills_at: int | None = None) -> None:
    """Export a result. The process kills itself before the operation of that number."""
    export.prove_trained = lambda *_: CHECK
    export.prove_merged = lambda *_: [CHECK]
    export.release_memory = lambda _: None  # a collection in each process would take most of the time
    if kills_at is not None:
        sys.addaudithook(count_down(kills_at, trained.places.model_dir))
    export.finish_result(trained, export.place_result(trained), build_manifest())


def count_down(left: int, model_dir: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that kills this process before a change of the model folder, after `left` others.

    What happens in the hidden folder alone does not count, since nobody sees it.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in OPERATIONS and not writes:
            return
        paths = [os.fsdecode(path) for path in arguments if isinstance(path, str | bytes | os.PathLike)]
        if any(path.startswith(str(model_dir)) and STAGING not in path for path in paths):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    return hook


def fork(run: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a process of its own. Return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(*arguments)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read(folder: Path) -> dict[str, str]:
    """Return a digest of each file below a folder by its path there, without the hidden ones."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if not name.startswith(".")
    }


def find_halves(left: dict[str, str], wholes: list[dict[str, str]]) -> list[str]:
    """Return what a library or a server would take for whole, and is none of the results that are."""
    faults = []
    for folder in ("", "adapter"):
        found = select_essentials(left, folder)
        if CONFIGS & found.keys() and found not in [select_essentials(whole, folder) for whole in wholes]:
            faults.append(f"half a result in {folder or 'the model folder'}: {sorted(found)}")
    serves_adapter = any(
        "serving.properties" in whole
        and left.get("serving.properties") == whole["serving.properties"]
        and whole.keys() >= SERVED
        for whole in wholes
    )
    if serves_adapter and not left.keys() >= SERVED | {"adapter_config.json"}:
        faults.append("a server's settings without the adapter")
    return faults


def select_essentials(files: dict[str, str], folder: str) -> dict[str, str]:
    """Return the weights, configs and tokenizer files of a folder. The others may be of any moment, or missing."""
    return {
        name: digest
        for name, digest in files.items()
        if name.rpartition("/")[0] == folder and not name.endswith(BESIDE)
    }


def main(base: Path, folder: Path, kind: str) -> None:
    """Print the number of operations, and every fault."""
    torch.set_num_threads(1)
    settings, earlier = KINDS[kind]
    before, tree = folder / "before", folder / "tree"
    assert fork(run_export, build_result(base, before, **earlier)) == 0
    trained = build_result(base, tree, **settings)
    assert fork(run_export, trained) == 0
    wholes = [read(before / "model"), read(tree / "model")]
    gc.freeze()
    code, number = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        shutil.rmtree(tree)
        shutil.copytree(before, tree)
        code = fork(run_export, trained, number)
        for fault in find_halves(read(tree / "model"), wholes):
            print(f"killed before operation {number}: {fault}")
        number += 1
    assert code == 0, code
    print(f"operations: {number}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
