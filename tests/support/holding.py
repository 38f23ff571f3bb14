# SPDX-License-Identifier: Apache-2.0
"""A phase of a real job that is held open: a function of ours, in its process, says so and does not begin."""

import textwrap
from pathlib import Path

HOLDER = """
import glob, importlib.util, operator, os, sys, time

module, _, name = os.environ["HELD_FUNCTION"].partition(":")
owner, _, last = name.rpartition(".")

def hold(run, *args, **kwargs):
    print(f"HOLDING {name}", flush=True)
    while not all(glob.glob(path, recursive=True) for path in os.environ["HELD_UNTIL"].split(":")):
        time.sleep(0.01)
    return run(*args, **kwargs)

class Finder:
    def find_spec(self, full_name, path=None, target=None):
        if full_name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(full_name)
        run = spec.loader.exec_module

        def exec_module(loaded):
            run(loaded)
            place = operator.attrgetter(owner)(loaded) if owner else loaded
            whole = getattr(place, last)
            setattr(place, last, lambda *args, **kwargs: hold(whole, *args, **kwargs))

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def hold_function(
    folder: Path, python_path: str, function: str, until: str = "", rank: int | None = None
) -> dict[str, str]:
    """Return the variables with which the processes of a job hold a function open, such as "package.module:name".

    It begins when each pattern of paths in `until`, which colons divide, has found a file, and never by default.
    With a rank, that worker alone holds it.
    """
    folder.mkdir()
    where = "True" if rank is None else f'os.environ.get("RANK") == "{rank}"'
    holder = f"import os\nif {where}:\n{textwrap.indent(HOLDER, '    ')}"
    (folder / "sitecustomize.py").write_text(holder, encoding="utf-8")
    return {"PYTHONPATH": f"{folder}:{python_path}", "HELD_FUNCTION": function, "HELD_UNTIL": until}
