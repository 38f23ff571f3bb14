# SPDX-License-Identifier: Apache-2.0
"""The built-in rewards. Each builder takes the options and returns a function from a completion to its reward.

They run in a helper process, which bounds their time and memory: a pattern may backtrack without an end, and a model
may write `9^{9^{9^{9}}}`.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.rewards.options import MAXIMA, SOLUTION_COLUMNS

BUFFER_FRACTION = 0.2  # of the maximum, as in DAPO: 4,096 of 20,480 tokens (arXiv 2503.14476, section 4.1)
LATEX_MARKS = ("$", r"\(", r"\[", r"\boxed")  # by which math-verify finds an expression


@dataclass(frozen=True)
class Completion:
    """A completion, and the row that its prompt comes from."""

    text: str
    num_tokens: int
    row: Mapping[str, Any]


Judge = Callable[[Completion], float | None]


def read_text(completion: Any) -> str:
    """Return a completion's text: the content of its last message, where it is a conversation."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    if isinstance(content, list):  # parts, as multimodal templates have them
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def read_solution(row: Mapping[str, Any], column: str | None) -> str | None:
    """Return the right answer of a row as text, None where it has none. Raises UserError for a list or an object."""
    names = (column,) if column else SOLUTION_COLUMNS
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise UserError(f"the column {name!r} holds {kind}, where a text or a number is needed")
    return str(value).strip()


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """Return the compiled pattern of an option. Raises UserError where it is no regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = quote_error(error)
        raise UserError(
            f"reward_options: {option}={pattern!r} is no regular expression ({reason}): correct it, in Python's syntax."
        ) from error


def build_extraction(extract: str | None, name: str) -> Callable[[str], str | None]:
    """Return a function that takes a part out of a text: the last match's group; None where nothing matches.

    Without a pattern the part is the whole text. Raises UserError for a pattern without exactly one group.
    """
    if extract is None:
        return str.strip
    pattern = compile_pattern(extract, f"{name}: extract")
    if pattern.groups != 1:
        raise UserError(
            f"reward_options: {name}: extract={extract!r} has {pattern.groups} groups and needs one, which is the "
            "answer: write it in parentheses, and others as (?:...)."
        )

    def find_part(text: str) -> str | None:
        matches = [match[1] for match in pattern.finditer(text)]
        return matches[-1].strip() if matches and matches[-1] is not None else None

    return find_part


def build_exact_match(column: str | None = None, extract: str | None = None, ignore_case: bool = False) -> Judge:
    """Return a function that gives 1.0 where the answer is the row's, and 0.0 elsewhere."""
    find_part = build_extraction(extract, "exact_match")

    def judge(completion: Completion) -> float | None:
        solution = read_solution(completion.row, column)
        answer = find_part(completion.text)
        if solution is None or answer is None:
            return None if solution is None else 0.0
        right = find_part(solution) or solution
        return float(answer.casefold() == right.casefold() if ignore_case else answer == right)

    return judge


def build_regex(pattern: str) -> Judge:
    """Return a function that gives 1.0 where the pattern is found in the text, and 0.0 elsewhere."""
    compiled = compile_pattern(pattern, "regex: pattern")
    return lambda completion: float(compiled.search(completion.text) is not None)


def build_json_schema(schema: dict[str, Any]) -> Judge:
    """Return a function that gives 1.0 where the text is JSON that satisfies the schema, and 0.0 elsewhere.

    Raises UserError where the schema is none, or refers to what is not in it.
    """
    import jsonschema  # here, and so are the others: each process imports what its reward needs
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY  # with no way to fetch a schema from the network
    from referencing.exceptions import Unresolvable

    validator_class = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator_class.check_schema(schema)
        look_up_references(schema)
        validator = validator_class(schema, registry=REGISTRY)
    except (jsonschema.SchemaError, Unresolvable, RecursionError) as error:
        raise UserError(
            f"reward_options: json_schema: schema is no JSON Schema ({quote_error(error)}): correct it, and keep what "
            "it refers to in the schema itself."
        ) from error

    def judge(completion: Completion) -> float:
        try:
            value = json.loads(completion.text, parse_constant=refuse_constant)
            return float(validator.is_valid(value))
        except (ValueError, RecursionError):
            return 0.0

    return judge


def look_up_references(schema: dict[str, Any]) -> None:
    """Look up each `$ref` of a schema. Raises referencing's Unresolvable where one leads out of it."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    resolver = REGISTRY.resolver_with_root(Resource.from_contents(schema, default_specification=DRAFT202012))
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                resolver.lookup(part["$ref"])
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def refuse_constant(name: str) -> None:
    """Raise ValueError: NaN and Infinity are no JSON."""
    raise ValueError(name)


def build_math(column: str | None = None, extract: str | None = None) -> Judge:
    """Return a function that gives 1.0 where the last expression of the text equals the row's, and 0.0 elsewhere.

    A row whose answer is no expression has no reward.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.WARNING)  # it warns that its own time limits are off, and ours is not
    # As in TRL's accuracy_reward what stands in \boxed{} comes first. Plain numbers count, too.
    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    find_part = build_extraction(extract, "math")
    verify(parse("$1$", forms), parse("$1$", forms))  # what is made at the first use counts for no completion

    def judge(completion: Completion) -> float | None:
        solution = read_solution(completion.row, column)
        right = parse(mark_latex(find_part(solution) or solution), forms, parsing_timeout=None) if solution else []
        if not right:
            return None
        answer = find_part(completion.text)
        given = parse(mark_latex(answer) if extract else answer, forms, parsing_timeout=None) if answer else []
        return float(verify(right, given, timeout_seconds=None))

    return judge


def mark_latex(expression: str) -> str:
    r"""Return an expression such that all of it is read: without a mark, `2\sqrt{3}` would be the number 2."""
    return expression if any(mark in expression for mark in LATEX_MARKS) else rf"\boxed{{{expression}}}"


def build_length(buffer: int | None = None, **bounds: int) -> Judge:
    """Return a function of the length alone.

    With a maximum it is DAPO's soft overlong punishment (arXiv 2503.14476, equation 13). It is 0 up to the maximum less
    the buffer, and falls to -1 at the maximum. With a target it is 1 there, and 0 at nothing and at twice the target.
    """
    ((option, bound),) = bounds.items()
    room = round(bound * BUFFER_FRACTION) if buffer is None else buffer

    def judge(completion: Completion) -> float:
        length = completion.num_tokens if option.endswith("tokens") else len(completion.text)
        if option not in MAXIMA:
            return max(0.0, 1 - abs(length - bound) / bound)
        if length > bound:
            return -1.0
        return min(0.0, (bound - room - length) / room) if room else 0.0

    return judge


BUILDERS: dict[str, Callable[..., Judge]] = {
    "exact_match": build_exact_match,
    "math": build_math,
    "regex": build_regex,
    "json_schema": build_json_schema,
    "length": build_length,
}
