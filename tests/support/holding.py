# SPDX-License-Identifier: Apache-2.0
"""A phase of a real job that is held open: a function of ours, in its process, says so and never ends."""

from pathlib import Path

HOLDER = """
import functools, importlib.util, operator, os, sys, time

module, _, name = os.environ["HELD_FUNCTION"].partition(":")
owner, _, last = name.rpartition(".")

def hold(*args, **kwargs):
    print(f"HOLDING {name}", flush=True)
    while True:
        time.sleep(0.01)

class Finder:
    def find_spec(self, full_name, path=None, target=None):
        if full_name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(full_name)
        run = spec.loader.exec_module

        def exec_module(loaded):
            run(loaded)
            setattr(operator.attrgetter(owner)(loaded) if owner else loaded, last, hold)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def hold_function(folder: Path, python_path: str, function: str) -> dict[str, str]:
    """Return the variables with which the processes of a job hold a function open, such as "package.module:name"."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOLDER, encoding="utf-8")
    return {"PYTHONPATH": f"{folder}:{python_path}", "HELD_FUNCTION": function}
