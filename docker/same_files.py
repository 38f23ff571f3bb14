# SPDX-License-Identifier: Apache-2.0
"""Whether two builds of one commit gave the same image: every file's digest, mode and owner, and no times.

    same_files.py IMAGE OTHER_IMAGE [--docker CLIENT]

Prints what differs; the exit code is 1 if anything does.
"""

import argparse
import hashlib
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import IO


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs=2, metavar="IMAGE")
    parser.add_argument("--docker", default="docker", help="the client (default: %(default)s)")
    asked = parser.parse_args()
    first, second = (dict(list_files(asked.docker, image)) for image in asked.images)
    differing = sorted(path for path in first.keys() | second.keys() if first.get(path) != second.get(path))
    for path in differing:
        where = "differs" if path in first and path in second else f"only in {asked.images[path in second]}"
        print(f"{path}: {where}")
    print(f"{len(first)} files, {len(differing)} differ")
    return int(bool(differing))


def list_files(docker: str, image: str) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Path -> kind, mode, owner, and digest or target, as they lie in a container that never ran."""
    container = subprocess.run([docker, "create", image], check=True, capture_output=True, text=True).stdout.strip()
    try:
        with (
            subprocess.Popen([docker, "export", container], stdout=subprocess.PIPE) as export,
            tarfile.open(fileobj=export.stdout, mode="r|") as tar,
        ):
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                digest = digest_of(content) if content else member.linkname
                yield member.name, (member.type, member.mode, member.uid, member.gid, digest)
    finally:
        subprocess.run([docker, "rm", "--force", container], check=True, capture_output=True)


def digest_of(content: IO[bytes]) -> str:
    """Read in parts, as a stream of tar cannot be mapped or read into."""
    digest = hashlib.sha256()
    while part := content.read(2**20):
        digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
