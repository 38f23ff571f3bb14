# SPDX-License-Identifier: Apache-2.0
"""A count of the rooms that the job and the whole settings enter: `python tests/support/rooms.py [FOLDER]`.

The counter reads the code and runs none of it. It follows the parameter `job` of `train()` in program order, from call
to call. A call carries the job when the function called takes a `Job`, the whole `Settings`, or an object that holds
one of them. The types are those of the annotations, which mypy checks. Functions and classes are resolved through the
imports. A method is resolved by `self`, or by a name that one class alone has. With the constructor of an object that
holds the job, all methods of the object are followed.

- naming_files: files that name `Settings` or `Job`.
- files: files that the job enters, `train.py` with them.
- returns: calls that carry the job into a file that it had entered before and left since.
- climbs: calls that carry the job on from a file further up than the last one it entered.
- names: the parameters, variables and attributes that hold the job on its way, each counted in its own function.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CODE = Path(__file__).parents[2] / "code/llm_trainer"
WHOLE = {"Job", "Settings"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Routine:
    """A function or a method, with the file and the class that it stands in."""

    file: str
    owner: str
    node: Function

    @property
    def label(self) -> str:
        return f"{self.file}:{self.owner}{'.' if self.owner else ''}{self.node.name}"


@dataclass
class Code:
    """All modules of a package, with what their names stand for."""

    imports: dict[str, dict[str, str]] = field(default_factory=dict)
    functions: dict[str, Routine] = field(default_factory=dict)
    classes: dict[str, tuple[str, ast.ClassDef]] = field(default_factory=dict)
    methods: dict[str, list[Routine]] = field(default_factory=dict)
    carriers: set[str] = field(default_factory=set)

    def carries(self, annotation: ast.expr | None) -> bool:
        """Tell whether an annotation names the job, the settings or an object that holds one of them."""
        return annotation is not None and bool(words_of(annotation) & (WHOLE | self.carriers))


@dataclass
class Journey:
    """What was counted on the job's way."""

    entered: list[str]
    names: set[str] = field(default_factory=set)
    visited: set[str] = field(default_factory=set)
    depths: list[int] = field(default_factory=lambda: [0])

    def enter(self, file: str, depth: int) -> None:
        self.entered.append(file)
        self.depths.append(depth)

    @property
    def num_returns(self) -> int:
        pairs = zip(self.entered, self.entered[1:], strict=False)
        return sum(after != before and after in self.entered[: i + 1] for i, (before, after) in enumerate(pairs))

    @property
    def num_climbs(self) -> int:
        return sum(after <= before for before, after in zip(self.depths, self.depths[1:], strict=False) if before > 1)


def words_of(annotation: ast.expr) -> set[str]:
    """Return every identifier in an annotation, quoted or not."""
    return set(re.findall(r"[A-Za-z_]\w*", ast.unparse(annotation)))


def read_code(folder: Path) -> Code:
    """Read every module below a folder, and find the classes that hold the job or the settings."""
    code = Code()
    for path in sorted(folder.rglob("*.py")):
        name = f"{folder.name}/{path.relative_to(folder)}"
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        code.imports[name] = dict(find_imports(tree))
        for node in tree.body:
            if isinstance(node, Function):
                code.functions[f"{module}.{node.name}"] = Routine(name, "", node)
                code.imports[name][node.name] = f"{module}.{node.name}"
            elif isinstance(node, ast.ClassDef):
                read_class(code, name, f"{module}.{node.name}", node)
    while new := {name for name, (_, node) in code.classes.items() if holds(code, node)} - code.carriers:
        code.carriers |= {name.rpartition(".")[2] for name in new} | new
    return code


def read_class(code: Code, file: str, dotted: str, node: ast.ClassDef) -> None:
    code.classes[dotted] = file, node
    code.imports[file][node.name] = dotted
    methods = [each for each in node.body if isinstance(each, Function)]
    if not any(method.name == "__init__" for method in methods):
        methods.append(constructor_of(node))
    for method in methods:
        code.methods.setdefault(method.name, []).append(Routine(file, node.name, method))


def constructor_of(node: ast.ClassDef) -> Function:
    """Return the constructor that a dataclass gets for its fields."""
    fields = "".join(f", {name}: {ast.unparse(annotation)}" for name, annotation in attributes_of(node))
    (function,) = ast.parse(f"def __init__(self{fields}): ...").body
    assert isinstance(function, Function)
    return function


def find_imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each imported name with the dotted name that it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, alias.name) for alias in node.names)


def holds(code: Code, node: ast.ClassDef) -> bool:
    """Tell whether objects of a class keep the job, the settings or an object that holds one of them."""
    return node.name not in WHOLE and any(code.carries(annotation) for _, annotation in attributes_of(node))


def attributes_of(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield the fields of a class, and the attributes that take a parameter of its constructor, with their types."""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement.annotation
        elif isinstance(statement, Function) and statement.name == "__init__":
            types = {each.arg: each.annotation for each in parameters_of(statement) if each.annotation}
            for assign in (each for each in ast.walk(statement) if isinstance(each, ast.Assign)):
                yield from ((name, types[value]) for name, value in kept_by(assign) if value in types)


def kept_by(assign: ast.Assign) -> Iterator[tuple[str, str]]:
    """Yield the attributes of `self` that an assignment sets to the value of a plain name."""
    for target, value in unpack(assign):
        if isinstance(target, ast.Attribute) and isinstance(value, ast.Name) and is_self(target.value):
            yield target.attr, value.id


def unpack(assign: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield targets and values in pairs, also those of tuples."""
    for target in assign.targets:
        if isinstance(target, ast.Tuple) and isinstance(assign.value, ast.Tuple):
            yield from zip(target.elts, assign.value.elts, strict=False)
        else:
            yield target, assign.value


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def parameters_of(node: Function) -> list[ast.arg]:
    arguments = node.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def follow_job(code: Code, start: str = "llm_trainer.train.train") -> Journey:
    """Follow the job from a function through all calls that carry it."""
    first = code.functions[start]
    journey = Journey([first.file])
    visit(code, first, journey, 0)
    return journey


def visit(code: Code, routine: Routine, journey: Journey, depth: int) -> None:
    """Count what a function does with the job, then go on with the calls in it, in the order they are written."""
    if routine.label in journey.visited:
        return
    journey.visited.add(routine.label)
    journey.names |= {f"{routine.label}:{name}" for name in names_in(code, routine)}
    for method in methods_beside(code, routine):
        visit(code, method, journey, depth)
    calls = [node for node in ast.walk(routine.node) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0)):
        for callee in resolve(code, routine, call.func):
            step = depth + (callee.file != routine.file)
            if callee.file != routine.file:
                journey.enter(callee.file, step)
            visit(code, callee, journey, step)


def methods_beside(code: Code, routine: Routine) -> list[Routine]:
    """Return the other methods of the class that a constructor makes an object of, which holds the job from now on."""
    if routine.node.name != "__init__" or routine.owner not in code.carriers:
        return []
    routines = (each for methods in code.methods.values() for each in methods)
    return [each for each in routines if (each.file, each.owner) == (routine.file, routine.owner)]


def resolve(code: Code, caller: Routine, callee: ast.expr) -> list[Routine]:
    """Return the function, constructor or method of the package that a call reaches with the job; none if unknown."""
    dotted = dotted_name(code.imports[caller.file], callee)
    if dotted in code.functions:
        found = [code.functions[dotted]]
    elif dotted in code.classes:
        file, node = code.classes[dotted]
        found = [each for each in code.methods.get("__init__", []) if (each.file, each.owner) == (file, node.name)]
    elif isinstance(callee, ast.Attribute):
        found = code.methods.get(callee.attr, [])
        if is_self(callee.value):
            found = [each for each in found if (each.file, each.owner) == (caller.file, caller.owner)]
        found = found if len(found) == 1 else []
    else:
        found = []
    return [routine for routine in found if takes_job(code, routine)]


def takes_job(code: Code, routine: Routine) -> bool:
    """Tell whether a function takes the job, or a method belongs to an object that holds it."""
    return routine.owner not in WHOLE and (
        routine.owner in code.carriers or any(code.carries(each.annotation) for each in parameters_of(routine.node))
    )


def dotted_name(imports: dict[str, str], node: ast.expr) -> str:
    """Return the full name of the imported module, function or class that an expression refers to."""
    if isinstance(node, ast.Name):
        return imports.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = dotted_name(imports, node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def names_in(code: Code, routine: Routine) -> set[str]:
    """Return the parameters, variables and attributes of `self` that hold the job in a function."""
    names = {each.arg for each in parameters_of(routine.node) if code.carries(each.annotation)}
    for assign in (node for node in ast.walk(routine.node) if isinstance(node, ast.Assign)):
        for target, value in unpack(assign):
            if passes_on(value, names):
                names.add(ast.unparse(target))
    return names | {name for name in map(ast.unparse, ast.walk(routine.node)) if name in held_by_self(code, routine)}


def passes_on(value: ast.expr, names: set[str]) -> bool:
    """Tell whether an expression is one of these names, or the settings taken out of one."""
    if isinstance(value, ast.Attribute) and value.attr in ("job", "settings"):
        return passes_on(value.value, names)
    return ast.unparse(value) in names


def held_by_self(code: Code, routine: Routine) -> set[str]:
    """Return the attributes by which a method reaches the job that its object holds."""
    nodes = [node for file, node in code.classes.values() if (file, node.name) == (routine.file, routine.owner)]
    return {f"self.{name}" for node in nodes for name, each in attributes_of(node) if code.carries(each)}


def names_whole(tree: ast.Module) -> bool:
    """Tell whether a module imports, defines or otherwise names `Job` or `Settings`."""
    named = {getattr(node, key, None) for node in ast.walk(tree) for key in ("id", "attr", "name")}
    return bool(named & WHOLE)


@cache
def count(folder: Path = CODE) -> dict[str, int]:
    """Return the figures that the module's docstring explains."""
    files = [path for path in folder.rglob("*.py") if names_whole(ast.parse(path.read_text(encoding="utf-8")))]
    journey = follow_job(read_code(folder))
    return {
        "naming_files": len(files),
        "files": len(set(journey.entered)),
        "returns": journey.num_returns,
        "climbs": journey.num_climbs,
        "names": len(journey.names),
    }


def main(folder: Path) -> None:
    """Print the figures, then each call that carries the job into another file, set in by its depth."""
    for figure, value in count(folder).items():
        print(f"{figure} {value}")
    journey = follow_job(read_code(folder))
    for file, depth in zip(journey.entered, journey.depths, strict=True):
        print(f"{'  ' * depth}{file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CODE)
