# SPDX-License-Identifier: Apache-2.0
"""What an image's size is made of: its layers, its largest packages, and files that are in it twice; and its start.

image_report.py IMAGE [--docker CLIENT]
"""

import argparse
import json
import subprocess
import time

LARGEST, STARTS = 25, 3
# Runs in the image. A file's owner is the package whose list of files names it.
LIST_PACKAGES = """
import hashlib, json, os, subprocess
from importlib.metadata import distributions
sizes, owners, seen, inodes = {}, {}, {}, set()
for distribution in distributions():
    for file in distribution.files or ():
        owners[os.path.realpath(distribution.locate_file(file))] = distribution.name
for folder, _, names in os.walk("/opt/llm-trainer"):
    for name in names:
        path = os.path.join(folder, name)
        size, inode = os.lstat(path).st_size, os.lstat(path).st_ino
        if os.path.islink(path) or inode in inodes:
            continue
        inodes.add(inode)
        source = path.replace("/__pycache__", "").partition(".cpython")[0] + ".py" if "__pycache__" in path else path
        owner = owners.get(path) or owners.get(source) or "(nobody's)"
        sizes[owner] = sizes.get(owner, 0) + size
        if size > 1_000_000:
            digest = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
            seen.setdefault(digest, []).append([size, path])
command = ["dpkg-query", "--show", "--showformat", "${Package} ${Installed-Size}\\n"]
debian = dict(line.split() for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines())
print(json.dumps({
    "python": sizes,
    "debian": {name: 1024 * int(kib) for name, kib in debian.items()},
    "twice": [files for files in seen.values() if len(files) > 1],
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--docker", default="docker", help="the client (default: %(default)s)")
    asked = parser.parse_args()
    report_layers(asked.docker, asked.image)
    answer = call(asked.docker, "run", "--rm", "--entrypoint", "python", asked.image, "-c", LIST_PACKAGES)
    report_packages(json.loads(answer))
    report_start(asked.docker, asked.image)


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report_layers(docker: str, image: str) -> None:
    total = int(call(docker, "image", "inspect", "--format", "{{.Size}}", image))
    print(f"{image}: {total / 1e9:.2f} GB unpacked\n\nlayers, the newest first")
    for line in call(docker, "history", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines():
        size, _, made_by = line.partition("\t")
        if size != "0B":
            print(f"{size:>10}  {' '.join(made_by.split())[:110]}")


def report_packages(found: dict) -> None:
    for kind in ("python", "debian"):
        sizes = sorted(found[kind].items(), key=lambda item: -item[1])
        print(f"\n{kind} packages: {len(sizes)}, {sum(found[kind].values()) / 1e9:.2f} GB; the largest")
        for name, size in sizes[:LARGEST]:
            print(f"{size / 1e6:8.1f} MB  {name}")
    wasted = sum(files[0][0] * (len(files) - 1) for files in found["twice"])
    print(f"\nfiles over 1 MB that are there more than once, which could go: {wasted / 1e6:.1f} MB")
    for files in found["twice"]:
        print(f"{files[0][0] / 1e6:8.1f} MB  {', '.join(path for _, path in files)}")


def report_start(docker: str, image: str) -> None:
    """Seconds of `--help`, and of a container that does nothing: the best of some, in turns."""
    ways = {"--help": [image, "--help"], "nothing": ["--entrypoint=/bin/true", image]}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(STARTS):
        for way, arguments in ways.items():
            started = time.monotonic()
            call(docker, "run", "--rm", *arguments)
            seconds[way].append(time.monotonic() - started)
    print(
        f"\ndocker run: --help {min(seconds['--help']):.2f} s, of which the container {min(seconds['nothing']):.2f} s"
    )


if __name__ == "__main__":
    main()
