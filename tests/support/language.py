# SPDX-License-Identifier: Apache-2.0
"""What breaks the house language in the code: `python tests/support/language.py [FOLDER]`.

A docstring begins with a verb in the imperative or a noun that names the thing. A sentence has at most 25 words.
What no script can hold, such as sense, is read by people.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.measures import CODE, Function, Name, find_names

MAX_WORDS = 25
BANNED = re.compile(r"\b(of which|that of|what of|so that it)\b", re.IGNORECASE)
ARTICLES = {"A", "An", "The"}
# Words that neither name a thing nor tell to do something.
POOR_STARTS = re.compile(
    r"About|After|Also|Although|And|Are|As|At|Because|Before|Being|But|By|Can|Could|Does|During|Each|Either|Except|For"
    r"|From|Given|Has|He|Here|How|However|I|If|In|Instead|Into|Is|It|Its|Just|Like|May|Might|More|Most|Must|Neither"
    r"|No|None|Nor|Not|Nothing|Of|On|Once|Only|Or|Otherwise|Over|Per|Same|She|Should|Since|So|Some|Such|Than|That|Their"
    r"|Them|Then|There|These|They|This|Those|Though|Through|Thus|To|Under|Unless|Until|Was|We|Were|What|Whatever|When"
    r"|Where|Whether|Which|While|Who|Whose|Why|Will|With|Within|Without|Would|Yet|You"
)
THIRD_PERSON = re.compile(
    r"(Add|Applie|Ask|Build|Choose|Collect|Compute|Convert|Create|Decide|Describe|Do|Estimate|Find|Get|Give|Hold|Judge"
    r"|Keep|Load|Make|Merge|Open|Parse|Pick|Put|Raise|Read|Remove|Render|Return|Save|Say|Send|Take|Tell|Trie|Wait|Warn"
    r"|Write|Yield)e?s"
)


def find_poor_starts(name: Name) -> Iterator[str]:
    """Yield what is wrong with the first word of a docstring. A function's begins with a verb, so no article does."""
    if not name.docstring:
        return
    word = name.docstring.split()[0].strip(".,:;\"'")
    is_action = isinstance(name.node, Function) and not is_property(name.node)
    if POOR_STARTS.fullmatch(word) or (is_action and (word in ARTICLES or THIRD_PERSON.fullmatch(word))):
        yield f"{name.place}: begins with {word!r}"


def is_property(node: Function) -> bool:
    """Tell whether a method is read like an attribute, which a noun names."""
    return any(ast.unparse(each).endswith("property") for each in node.decorator_list)


def find_long_sentences(name: Name) -> Iterator[str]:
    """Yield the sentences of a docstring that have more words than MAX_WORDS."""
    for sentence in split_sentences(name.docstring):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if len(words) > MAX_WORDS:
            yield f"{name.place}: {len(words)} words: {' '.join(words[:8])} ..."


def split_sentences(text: str) -> Iterator[str]:
    """Yield sentences. A paragraph and an item of a list end one, too; a quoted piece of code is one word."""
    for block in re.split(r"\n\s*\n|\n(?=\s*[-*] )|\n(?=\s{4,}\S)", text):
        plain = re.sub(r"`[^`]*`", "CODE", block)
        yield from re.split(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"'(])", plain)


def find_banned_phrases(folder: Path) -> Iterator[str]:
    """Yield the lines, also of comments and messages, that hold a banned phrase."""
    for file in sorted(folder.rglob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if match := BANNED.search(line):
                yield f"{file.relative_to(folder)}:{number}: {match[0]!r}"


def find_faults(folder: Path = CODE) -> dict[str, list[str]]:
    """Return every fault below a folder by its kind."""
    names = list(find_names(folder))
    return {
        "starts": [fault for name in names for fault in find_poor_starts(name)],
        "sentences": [fault for name in names for fault in find_long_sentences(name)],
        "phrases": list(find_banned_phrases(folder)),
    }


def main(folder: Path) -> None:
    """Print the number of faults of each kind, and each of them."""
    for kind, faults in find_faults(folder).items():
        print(f"{len(faults)} {kind}", *(f"    {fault}" for fault in faults), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else CODE)
