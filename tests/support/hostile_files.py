# SPDX-License-Identifier: Apache-2.0
"""Contents that no program should find in a file, for all files that the package reads."""

LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
HOSTILE = {
    "null": b"null",
    "list": b"[1]",
    "object": b'{"a": null}',
    "number": b"7",
    "text": b'"abc"',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "not a number": b'{"a": NaN, "b": -Infinity}',
    "400 digits": b'{"a": ' + b"9" * 400 + b"}",
    "5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "half a character": rb'{"a": "\ud800"}',
    "NUL in a text": rb'{"a": "\u0000"}',
    "NUL": b"\0\0",
    "empty": b"",
    "cut": b'{"a": "b',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "binary": bytes(range(256)),
    "billion laughs": LAUGHS.encode(),
}
OBJECTS = ("object", "not a number", "400 digits", "half a character", "NUL in a text")


def is_object(content: bytes) -> bool:
    """Whether a content is a JSON object that Python takes."""
    return content in [HOSTILE[name] for name in OBJECTS]
