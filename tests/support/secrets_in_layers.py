# SPDX-License-Identifier: Apache-2.0
"""Searches an image's history and all files of all its layers, also those that a later layer removes, for secrets."""

import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from io import BufferedReader
from typing import IO

# Each begins with letters that are searched for first, which is a hundred times as fast.
TOKENS = {
    "a token of the Hugging Face Hub": (b"hf_", re.compile(rb"hf_[A-Za-z]{34}(?![A-Za-z0-9])")),
    "a key of AWS": (b"AKIA", re.compile(rb"AKIA[0-9A-Z]{16}(?![A-Z0-9])")),
    "a key of an AWS session": (b"ASIA", re.compile(rb"ASIA[0-9A-Z]{16}(?![A-Z0-9])")),
    "a token of GitHub": (b"ghp_", re.compile(rb"ghp_[A-Za-z0-9]{36}")),
}
# Libraries' own files are full of examples of these.
NOT_IN_LIBRARIES = {
    "a private key": (b"PRIVATE KEY-----", re.compile(rb"-----BEGIN ([A-Z]+ )?PRIVATE KEY-----")),
    "an address with a password": (b"://", re.compile(rb"https?://[^/\s\"'@:]+:[^/\s\"'@]+@")),
}
LIBRARIES = re.compile(r"/site-packages/|^(\./)?usr/(lib|share)/")
EXAMPLE = b"EXAMPLE"  # AWS's own, in botocore's documentation
FILES = re.compile(r"(^|/)(\.netrc|\.pypirc|\.git-credentials|\.aws/credentials|\.docker/config\.json|pip\.conf)$")


def find_secrets(docker: str, image: str, markers: Sequence[bytes] = ()) -> list[str]:
    """One line for each: where, and what it looks like. `markers` must be nowhere either."""
    with subprocess.Popen([docker, "save", image], stdout=subprocess.PIPE) as save:
        assert save.stdout
        found = [
            f"{path}: {kind}" for path, content in list_files(save.stdout) for kind in judge(path, content, markers)
        ]
    assert save.returncode == 0, f"{image} could not be read"
    return found


def list_files(image: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """The files of what `docker save` writes: the layers are archives in it, and beside them is the image's history."""
    for name, content in list_members(image):
        if content.peek(512)[257:262] == b"ustar":
            for path, file in list_members(content):
                yield path, file.read()
        else:
            yield name, content.read()


def list_members(archive: IO[bytes]) -> Iterator[tuple[str, BufferedReader]]:
    with tarfile.open(fileobj=archive, mode="r|") as members:
        for member in members:
            if member.isfile():
                content = members.extractfile(member)
                assert isinstance(content, BufferedReader)
                yield member.name, content


def judge(path: str, content: bytes, markers: Sequence[bytes]) -> Iterator[str]:
    if FILES.search(path) and content.strip():
        yield "a file for secrets"
    for marker in markers:
        if marker in content:
            yield f"the build's secret {marker.decode()}"
    for kind, (start, pattern) in (TOKENS if LIBRARIES.search(path) else TOKENS | NOT_IN_LIBRARIES).items():
        if start in content and any(EXAMPLE not in match[0] for match in pattern.finditer(content)):
            yield kind
