# SPDX-License-Identifier: Apache-2.0
"""Code of a benchmark that runs in the processes of a job: each runs a sitecustomize.py on its path when it begins."""

import os
from pathlib import Path

# One worker alone has no rank. The launchers of workers have none either; one of them names the worker, too.
IN_WORKER = """
import os, sys

class Finder:
    def find_spec(self, fullname, path=None, target=None):
        if fullname == {module!r}:
            sys.meta_path.remove(self)
            exec({code!r}, {{}})

named = [word for word in sys.orig_argv if word.startswith("llm_trainer.")]
if named == ["llm_trainer.worker"] and os.environ.get("RANK", "0") == "0":
    sys.meta_path.insert(0, Finder())
"""


def hook_worker(module: str, code: str) -> str:
    """Return code for all processes of a job, which runs `code` in the first worker, before it imports a module."""
    return IN_WORKER.format(module=module, code=code)


def lay_hooks(folder: Path, code: str) -> dict[str, str]:
    """Write code for all processes of a job to a folder. Return the variable with which they find it."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
