# SPDX-License-Identifier: Apache-2.0
"""Kills an export before each of its changes to the model folder, and tells what it left that looks whole and is not.

Run as `python -m support.killed_exports BASE FOLDER`. Python's audit events name the changes. Before each one the
process forks: the one that exports dies by SIGKILL, and its copy looks at what it left, and goes on in its place. What
happens in the hidden folder alone does not count, since nobody sees it. The comparison of logits writes nothing, and is
left out.
"""

import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
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


def run_export(trained: TrainingResult) -> None:
    """Export a result without the comparison of logits."""
    export.prove_trained = lambda *_: [CHECK]
    export.prove_merged = lambda *_: [CHECK]
    export.release_memory = lambda _: None
    export.finish_result(trained, export.place_result(trained), build_manifest())


def run_killed_export(trained: TrainingResult, wholes: list[dict[str, str]], pipe: int) -> None:
    """Export a result while the process is killed again and again. Write faults and the number of kills to a pipe."""
    model_dir, num_kills = trained.places.model_dir, 0

    def die_and_go_on(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_kills
        if not changes_folder(event, arguments, model_dir):
            return
        exporter = os.getpid()
        if os.fork():
            os.kill(exporter, signal.SIGKILL)
        while os.getppid() == exporter:
            time.sleep(0.001)
        num_kills += 1
        for fault in find_halves(read(model_dir), wholes):
            os.write(pipe, f"{fault}, killed before {event} {arguments}\n".encode())

    sys.addaudithook(die_and_go_on)
    run_export(trained)
    os.write(pipe, f"kills: {num_kills}\n".encode())


def changes_folder(event: str, arguments: tuple[Any, ...], model_dir: Path) -> bool:
    """Tell whether an audit event is a change of the model folder that others see."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event not in OPERATIONS and not writes:
        return False
    paths = [os.fsdecode(path) for path in arguments if isinstance(path, str | bytes | os.PathLike)]
    return any(path.startswith(str(model_dir)) and STAGING not in path for path in paths)


def fork(run: Callable[..., None], *arguments: Any) -> str:
    """Run a function in a process of its own, which is given a pipe last. Return what it and its copies write there."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.close(reader)
            run(*arguments, writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        return stream.read()


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


def kill_export(base: Path, folder: Path, settings: dict[str, Any], earlier: dict[str, Any]) -> str:
    """Return the faults of an export that comes after an earlier one, and the number of kills."""
    before, tree = folder / "before", folder / "tree"
    fork(lambda _: run_export(build_result(base, before, **earlier)))
    trained = build_result(base, tree, **settings)
    fork(lambda _: run_export(trained))
    wholes = [read(before / "model"), read(tree / "model")]
    shutil.rmtree(tree)
    shutil.copytree(before, tree)
    return fork(run_killed_export, trained, wholes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind, (own, others) in KINDS.items():
        print(f"{kind}: {kill_export(Path(sys.argv[1]), Path(sys.argv[2]) / kind, own, others)}", flush=True)
