# SPDX-License-Identifier: Apache-2.0
"""The measures of the house, and what exceeds them: `python tests/support/measures.py [FOLDER]`."""

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ROOT / "code/llm_trainer"
MAX_MODULES = 15
MAX_LINES = 30
MAX_COMPLEXITY = 10
MAX_ARGUMENTS = 5
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True)
class Name:
    """A module, class, function or method, and where it stands."""

    place: str
    node: Documented
    is_public: bool

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


def find_names(folder: Path = CODE) -> Iterator[Name]:
    """Yield every module, class, function and method below a folder. Functions within functions are no names."""
    for file in sorted(folder.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        place = str(file.relative_to(folder))
        yield Name(place, tree, True)
        yield from find_members(place, tree, True)


def find_members(place: str, parent: ast.Module | ast.ClassDef, is_public: bool) -> Iterator[Name]:
    """Yield the classes, functions and methods of a module or class; a name is public if its owner is, too."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef | Function):
            name = Name(f"{place}:{node.lineno} {node.name}", node, is_public and not node.name.startswith("_"))
            yield name
            if isinstance(node, ast.ClassDef):
                yield from find_members(place, node, name.is_public)


def find_functions(folder: Path = CODE) -> Iterator[tuple[str, Function]]:
    """Yield every function, also those within functions, with its place."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{file.relative_to(folder)}:{node.lineno} {node.name}", node


def find_full_folders(folder: Path = CODE) -> list[str]:
    """Return the folders with more modules than MAX_MODULES. `__init__.py` is none."""
    numbers = Counter(file.parent for file in folder.rglob("*.py") if file.name != "__init__.py")
    return [f"{place.relative_to(folder)} {number}" for place, number in numbers.items() if number > MAX_MODULES]


def find_long_functions(folder: Path = CODE) -> list[str]:
    """Return the functions of more than MAX_LINES lines, from `def` to the last."""
    lengths = ((place, (node.end_lineno or 0) - node.lineno + 1) for place, node in find_functions(folder))
    return [f"{place} {length}" for place, length in lengths if length > MAX_LINES]


def find_many_arguments(folder: Path = CODE) -> list[str]:
    """Return the functions that take more than MAX_ARGUMENTS arguments; `self` and `cls` are none."""
    return [place for place, node in find_functions(folder) if count_arguments(node) > MAX_ARGUMENTS]


def count_arguments(node: Function) -> int:
    """Return the number of named arguments of a function, without `self` and `cls`."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(each.arg not in ("self", "cls") for each in named)


def find_complex_functions(folder: Path = CODE) -> list[str]:
    """Return the functions whose cyclomatic complexity is over MAX_COMPLEXITY, as ruff counts it."""
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--isolated", "--ignore-noqa", "--select", "C901"]
    options = ["--config", f"lint.mccabe.max-complexity={MAX_COMPLEXITY}", "--output-format", "json", "--no-cache"]
    result = subprocess.run([*ruff, *options, str(folder)], capture_output=True, text=True, check=False)
    found = json.loads(result.stdout)
    return [
        f"{Path(each['filename']).relative_to(folder)}:{each['location']['row']} {each['message']}" for each in found
    ]


def find_undocumented(folder: Path = CODE) -> list[str]:
    """Return the public modules, classes, functions and methods without a docstring."""
    return [name.place for name in find_names(folder) if name.is_public and not name.docstring]


MEASURES = {
    f"folders of more than {MAX_MODULES} modules": find_full_folders,
    f"functions over {MAX_LINES} lines": find_long_functions,
    f"functions over complexity {MAX_COMPLEXITY}": find_complex_functions,
    f"functions of more than {MAX_ARGUMENTS} arguments": find_many_arguments,
    "public names without a docstring": find_undocumented,
}


def main(folder: Path) -> None:
    """Print each measure's number, and what exceeds it."""
    for title, find in MEASURES.items():
        found = find(folder)
        print(f"{len(found)} {title}", *(f"    {each}" for each in found), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else CODE)
