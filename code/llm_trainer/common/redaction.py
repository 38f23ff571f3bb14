# SPDX-License-Identifier: Apache-2.0
"""Redaction of secrets, where a text leaves the process: in the log, and in every file for people.

A secret is known by its value or by its place. By value: what a variable, a setting or an option with a telling name
holds (`is_secret_name`), wherever that stands, also encoded or broken over lines. By place: the password and the
signature of an address, and what follows a telling name in a text. Imports nothing heavy, since every process needs it.
"""

import base64
import html
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

REDACTED = "***"
# By its value a shorter secret, or a short one like a word, is not known: it would make holes in every text.
MIN_CHARACTERS = 8
MIN_CHARACTERS_OF_A_WORD = 16
CHARACTER_KINDS = ("[a-z]", "[A-Z]", "[0-9]", "[^a-zA-Z0-9]")

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
SECRET_WORDS = re.compile("pwd|passphrase|authorization|credentials?|apikey|bearer|.*passw.*|.*secret.*")
KEYS = re.compile("api|access|private|secret|account|storage|encryption|signing|shared|ssh")
# The tokens of a text, and numbers of them.
TEXT_TOKENS = re.compile(
    "pad|[be]os|unk|sep|cls|mask|special|image|img|audio|video|vision|[be]o[iat]|start|end|stop|fim|think|tool|text|"
    "response|prompt|assistant|user|system|embed|per|num|max|min|new|next|first|last|extra|prefix|suffix"
)
# What only names or measures a secret, or says where it lies.
FACTS = re.compile(
    "files?|paths?|dir|folder|arn|ids?|index|names?|type|class|provider|url|uri|endpoint|count|length|limit|expiration|"
    "expires|ttl|kwargs"
)

# Each has a group `secret`; where it has a group `name`, that must be a secret's.
ADDRESS_USER = re.compile(  # a password may hold / and @, too
    r"""://(?P<secret>[^/?#\s"'<>@:]{0,100}:(?!\d{1,5}[/?#])[^\s"'<>]{0,300}|[^/?#\s"'<>]{0,300})(?=@)"""
)
ASSIGNMENT = re.compile(
    r"""(?:(?<![\w.%-])|(?<=%3F)|(?<=%26)|(?<=u0026)|(?<=\\[nrt]))
    (?P<name>[\w.-]{0,60}?(?:token|passw|pwd|secret|key|credential|authorization)[\w.-]{0,40})
    (?:\\*["']?\s{0,3}[:=]\s{0,3}(?P<quote>\\*["'])(?P<quoted>(?:(?!(?P=quote))[^\n])+)|(?:=|%3D)(?P<secret>[^\s&"'<>]+))""",
    re.IGNORECASE | re.VERBOSE,
)
SIGNATURE = re.compile(
    r"""(?:[?&;]|%3F|%26|u0026)(?:sig|signature|awsaccesskeyid|x-\w+-(?:signature|credential|security-token))
    (?:=|%3D)(?P<secret>[^\s&"'<>]+)""",
    re.IGNORECASE | re.VERBOSE,
)
AUTHORIZATION = re.compile(
    r"""authorization["']?\s{0,3}[:=]\s{0,3}["']?(?:bearer|basic|token)\s{1,3}(?P<secret>[^\s"']+)""", re.IGNORECASE
)
BEARER = re.compile(r"bearer\s{1,3}(?P<secret>[\w.~+/=-]{16,})", re.IGNORECASE)
HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?P<secret>hf_[A-Za-z0-9]{30,})")
PATTERNS = (ADDRESS_USER, ASSIGNMENT, SIGNATURE, AUTHORIZATION, BEARER, HUB_TOKEN)
NO_SECRETS = re.compile(r"none|true|false|null|\*+|withheld|arn:.*", re.IGNORECASE)
LINE_BREAKS = re.compile(r"(?:\s|\\[nr])+")
# Up to white space or the end of a text of JSON, which may write a slash as \/ and any character as \u0026.
ADDRESS = re.compile(
    r"""(?P<begin>:(?:\\?/)+)(?:(?:[^\s"/?#\\]|\\(?!["nrt/]))*@)?(?P<place>(?:[^\s"?#\\]|\\(?!["nrt]))*)
    (?:[?#](?:[^\s"\\]|\\(?!["nrt]))*)?""",
    re.VERBOSE,
)

noted: set[str] = set()  # the secrets that this process was given, besides those of its environment


def note_secrets(value: Any) -> None:
    """Remember the secrets in settings, options or the text of one: from now on they are hidden in all that leaves."""
    noted.update(collect_secrets(value))


def hide_secrets(text: str) -> str:
    """Return a text without secrets, by value and by place."""
    parts, seen = [], 0
    for begin, end in find_spans(text):
        parts += [text[seen:begin], REDACTED]
        seen = end
    return hide_known("".join([*parts, text[seen:]]))


def hide_known(text: str) -> str:
    """Return a text without the secrets that are known by their value: for rows, which may hold anything else."""
    forms = list_forms(frozenset(noted) | read_environment_secrets(tuple(os.environ.items())))
    for form in forms:
        if form in text:
            text = text.replace(form, REDACTED)
    unbroken = LINE_BREAKS.sub("", text) if LINE_BREAKS.search(text) else ""
    for form in forms if unbroken else ():
        letters = LINE_BREAKS.sub("", form)
        if letters in unbroken:
            text = re.sub(r"(?:\s|\\[nr])*".join(map(re.escape, letters)), REDACTED, text)
    return text


def hide_queries(text: str) -> str:
    """Return a text whose addresses have no user, query or fragment, as in a query anybody may sign an access to it."""
    return ADDRESS.sub(r"\g<begin>\g<place>", text)


def hide_in(value: Any) -> Any:
    """Return a value for JSON without secrets: all texts in it, and all that a key with a secret's name holds."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {
            hide_known(key) if isinstance(key, str) else key: REDACTED if holds_secret(key, each) else hide_in(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [hide_in(each) for each in value]
    return value if value is None or isinstance(value, int | float) else hide_secrets(str(value))


def holds_secret(name: Any, value: Any) -> bool:
    """Tell whether a value under this key or in this variable is a secret."""
    if value in (None, "") or isinstance(value, bool) or NO_SECRETS.fullmatch(str(value)):
        return False
    is_count = isinstance(value, int | float) and str(name).lower().endswith(("token", "key"))
    return not is_count and is_secret_name(str(name))


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Tell whether a secret is what has this name: `hub_token`, `apiKey`, and not `pad_token` or `max_tokens`."""
    words = [word.lower() for word in WORD.findall(name)]
    if not words or FACTS.fullmatch(words[-1]) or name == "PWD":  # the shell's working folder
        return False
    if any(map(SECRET_WORDS.fullmatch, words)):
        return True
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return not TEXT_TOKENS.fullmatch(before)
    return words[-1] == "key" and KEYS.fullmatch(before) is not None


def find_spans(text: str) -> list[tuple[int, int]]:
    """Return begin and end of each secret that its place in a text gives away, in order and apart from each other."""
    spans: list[tuple[int, int]] = []
    for begin, end in sorted(span for pattern in PATTERNS for span in find_pattern(pattern, text)):
        if spans and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((begin, end))
    return spans


def find_pattern(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each secret that a pattern finds."""
    for match in pattern.finditer(text):
        groups = match.groupdict()
        group = "quoted" if groups.get("quoted") else "secret"
        if groups[group] and holds_secret(groups.get("name", "secret"), groups[group]):
            yield match.span(group)


def collect_secrets(value: Any, is_secret: bool = False) -> Iterator[str]:
    """Yield the secrets in a value, those in all its parts too. `is_secret` says that its name is a secret's."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from collect_secrets(each, is_secret or is_secret_name(str(name)))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from collect_secrets(each, is_secret)
    elif isinstance(value, str):
        found = [part for begin, end in find_spans(value) for part in split_user(value[begin:end])]
        secrets = [value] * is_secret + found
        lines = [line.strip() for secret in secrets for line in (secret, *secret.splitlines())]
        yield from (line for line in lines if is_distinctive(line) and not NO_SECRETS.fullmatch(line))
    elif is_secret and value is not None and not isinstance(value, bool):
        yield from collect_secrets(str(value), is_secret)


def split_user(secret: str) -> tuple[str, ...]:
    """Return a secret found in a text, and of `name:password` the password alone, also decoded as for an address."""
    password = secret.partition(":")[2] or secret
    return secret, password, unquote(password)


def is_distinctive(secret: str) -> bool:
    """Tell whether a secret is long and mixed enough to be looked for in every text."""
    kinds = sum(re.search(kind, secret) is not None for kind in CHARACTER_KINDS)
    return len(secret) >= (MIN_CHARACTERS if kinds > 1 else MIN_CHARACTERS_OF_A_WORD) and len(set(secret)) > 3


@lru_cache(maxsize=4)
def read_environment_secrets(variables: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """Return the secrets in environment variables."""
    return frozenset(collect_secrets(dict(variables)))


@lru_cache(maxsize=4)
def list_forms(secrets: frozenset[str]) -> list[str]:
    """Return all spellings of the secrets, the longest first: one may be part of another."""
    return sorted({form for secret in secrets for form in spell(secret)}, key=lambda form: (-len(form), form))


def spell(secret: str) -> Iterable[str]:
    """Return a secret as programs write it: plain, in an address, in JSON, in Python, in HTML, in base64 and in hex."""
    content = secret.encode(errors="surrogateescape")
    quoted = [quote(content), quote(content, safe=""), quote_plus(content)]
    lower_case = [re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), form) for form in quoted]
    texts = [json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]]
    texts += [html.escape(secret), secret.replace("/", "\\/"), content.hex()]
    return {secret, *quoted, *lower_case, *texts, *encode_base64(content)}


def encode_base64(content: bytes) -> Iterator[str]:
    """Yield the characters that base64 has for the content, wherever it begins in a longer text."""
    for offset, first in ((0, 0), (1, 2), (2, 3)):
        last = (offset + len(content)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(offset) + content).decode()[first:last]
