# SPDX-License-Identifier: Apache-2.0
"""`make venv` on machines that have this and lack that: make and the shell are real, Python and pip are stand-ins."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# What make and the script call, beside what a test's machine may lack.
COMMANDS = ("bash", "sh", "dirname", "touch", "mkdir", "cp", "chmod", "uname")
TOOLS = ("make", "git", "gcc", "apt-get")
# Answers what the script asks of a Python, and makes an environment whose pip tells what it is asked to do.
PYTHON = """#!/bin/bash
case "$*" in
  *python_version*) echo {version} ;;
  *get_config_var*) echo "gcc -pthread" ;;
  *Python.h*) {headers} ;;
  *ensurepip*) {venv} ;;
  "-m venv "*)
    echo "python {version}: $*"
    folder=${{@: -1}}
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    cp {pip} "$folder/bin/pip"
    ;;
esac
"""
PIP = """#!/bin/bash
echo "pip: $*"
case "$*" in
  *torch-cpu.txt*) {cpu_torch} ;;
esac
"""
NO_CPU_TORCH = "echo 'ERROR: No matching distribution found for torch==2.13.0+cpu' >&2; exit 1"
OTHER_ERROR = "echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES' >&2; exit 1"


def write_program(path: Path, text: str) -> Path:
    """Write an executable file; return its path."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


class Machine:
    """A checkout of what `make venv` reads, and a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.programs = folder / "checkout", folder / "bin"
        (self.checkout / "docker").mkdir(parents=True)
        self.programs.mkdir()
        for name in ("Makefile", "pyproject.toml", "docker/venv.sh"):
            shutil.copy(ROOT / name, self.checkout / name)
        shutil.copytree(ROOT / "docker/requirements", self.checkout / "docker/requirements")
        for name in COMMANDS:
            (self.programs / name).symlink_to(shutil.which(name))
        for name in TOOLS:
            write_program(self.programs / name, "#!/bin/bash\nexit 0\n")
        self.set_pip()

    def set_pip(self, cpu_torch: str = ":") -> None:
        """Set what pip does when it is asked for the CPU build of torch."""
        write_program(self.programs / "pip-to-copy", PIP.format(cpu_torch=cpu_torch))

    def add_python(self, name: str, version: str, headers: str = ":", venv: str = ":") -> Path:
        """Put a Python on the PATH; return its path."""
        text = PYTHON.format(version=version, headers=headers, venv=venv, pip=self.programs / "pip-to-copy")
        return write_program(self.programs / name, text)

    def remove(self, name: str) -> None:
        """Take a program off the PATH."""
        (self.programs / name).unlink()

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run make; return its exit code and all that it printed."""
        run = subprocess.run(
            [shutil.which("make"), "--no-print-directory", *arguments],
            cwd=self.checkout,
            env={"PATH": str(self.programs), "HOME": str(self.programs)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return run.returncode, run.stdout

    def succeed(self, *arguments: str) -> list[str]:
        """Run make, which has to succeed; return the lines that it printed."""
        code, output = self.run(*arguments)
        assert code == 0, output
        return output.splitlines()

    def fail(self, *arguments: str) -> list[str]:
        """Run make, which has to fail before anything is installed; return the lines that are not make's own."""
        code, output = self.run(*arguments)
        assert code == 2, output
        lines = [line for line in output.splitlines() if not line.startswith("make: ")]
        assert not any(line.startswith(("pip: ", "python ")) for line in lines)
        assert not (self.checkout / ".venv/.made").exists()
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ({"python3.13": "3.13.0", "python3.12": "3.12.1", "python3.11": "3.11.7"}, "3.11.7"),
        ({"python3.13": "3.13.0", "python3.12": "3.12.1", "python3.10": "3.10.2"}, "3.12.1"),
        ({"python3.13": "3.13.0", "python3.14": "3.14.0"}, "3.13.0"),
        ({"python3.14": "3.14.0", "python3": "3.12.9"}, "3.12.9"),
        ({"python3": "3.10.2", "python": "3.13.1"}, "3.13.1"),
    ],
)
def test_the_first_tested_python_is_taken(machine, installed, chosen):
    for name, version in installed.items():
        machine.add_python(name, version)
    assert f"python {chosen}: -m venv --clear .venv" in machine.succeed("venv")


def test_a_python_that_does_not_run_is_passed_over(machine):
    write_program(machine.programs / "python3.11", "#!/bin/bash\necho 'pyenv: not found' >&2\nexit 127\n")
    machine.add_python("python3.12", "3.12.1")
    lines = machine.succeed("venv")
    assert lines[0] == "python 3.12.1: -m venv --clear .venv"


def test_a_named_python_is_taken(machine):
    machine.add_python("python3.11", "3.11.7")
    named = machine.add_python("named", "3.13.0")
    assert "python 3.13.0: -m venv --clear .venv" in machine.succeed("venv", f"PYTHON={named}")


def test_without_a_tested_python_one_sentence_says_what_to_do(machine):
    machine.add_python("python3", "3.10.2")
    (line,) = machine.fail("venv")
    assert line.startswith("Python 3.11, 3.12 or 3.13 is needed and none is on the PATH: ")
    assert "PYTHON=" in line


@pytest.mark.parametrize(
    ("name", "reason"), [("python3.10", "is Python 3.10.2"), ("absent", "is no Python that runs here")]
)
def test_a_named_python_that_is_not_tested_is_refused(machine, name, reason):
    machine.add_python("python3.10", "3.10.2")
    machine.add_python("python3.12", "3.12.1")
    (line,) = machine.fail("venv", f"PYTHON={name}")
    assert line.startswith(f"PYTHON={name} {reason}")


@pytest.mark.parametrize(
    ("tool", "sentence"),
    [
        ("make", "make is missing, .*: install it with `apt-get install make`"),
        ("git", "git is missing, .*: install it with `apt-get install git`"),
        ("gcc", "A C compiler is missing, .*: install it with `apt-get install gcc libc6-dev`"),
    ],
)
def test_a_tool_that_is_missing_is_named(machine, tool, sentence):
    machine.add_python("python3.12", "3.12.1")
    machine.remove(tool)
    (line,) = machine.fail("venv")
    assert re.fullmatch(sentence + r"\.", line)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("headers", "Python.h is missing, .*: install it with `apt-get install python3.12-dev`"),
        ("venv", "Python's venv is missing, .*: install it with `apt-get install python3.12-venv`"),
    ],
)
def test_a_part_of_python_that_is_missing_is_named(machine, part, sentence):
    machine.add_python("python3.12", "3.12.1", **{part: "exit 1"})
    (line,) = machine.fail("venv")
    assert re.fullmatch(sentence + r"\.", line)


def test_all_that_is_missing_is_named_at_once(machine):
    machine.add_python("python3.12", "3.12.1")
    machine.remove("git")
    machine.remove("gcc")
    assert [line.split(" is missing")[0] for line in machine.fail("venv")] == ["git", "A C compiler"]


@pytest.mark.parametrize(
    ("added", "suggestion"),
    [
        ({"dnf": "exit 0"}, "install it with `dnf install git`."),
        ({"uname": "echo Darwin"}, "install it with `xcode-select --install`."),
        ({}, "install it with this system's package manager."),
    ],
)
def test_the_sentence_fits_the_system(machine, added, suggestion):
    machine.add_python("python3.12", "3.12.1")
    machine.remove("git")
    machine.remove("apt-get")
    for name, text in added.items():
        (machine.programs / name).unlink(missing_ok=True)
        write_program(machine.programs / name, f"#!/bin/bash\n{text}\n")
    (line,) = machine.fail("venv")
    assert line.endswith(suggestion)


def list_locks(lines: list[str]) -> list[str]:
    """Return the names of the locks that pip was given, in order."""
    return re.findall(r"-r docker/requirements/(\S+)\.txt", "\n".join(lines))


def test_the_cpu_build_of_torch_is_taken_where_pip_finds_it(machine):
    machine.add_python("python3.11", "3.11.7")
    # What pip says of an install that works is kept back, so the lock does not show in the output.
    lines = machine.succeed("venv")
    assert list_locks(lines) == ["build", "dev"]
    assert lines[-1].startswith("pip: install") and lines[-1].endswith("-e .")
    assert not any(" GB" in line for line in lines)


def test_the_size_is_said_before_the_index_own_torch_is_downloaded(machine):
    machine.set_pip(NO_CPU_TORCH)
    machine.add_python("python3.12", "3.12.1")
    lines = machine.succeed("venv")
    assert list_locks(lines) == ["build", "torch", "dev"]
    (size,) = [number for number, line in enumerate(lines) if " GB to download" in line]
    (download,) = [number for number, line in enumerate(lines) if "requirements/torch.txt" in line]
    assert size < download
    assert "PIP_EXTRA_INDEX_URL" in lines[size] and "PIP_FIND_LINKS" in lines[size]


def test_macos_has_one_build_of_torch(machine):
    machine.set_pip(NO_CPU_TORCH)
    machine.add_python("python3.12", "3.12.1")
    machine.remove("uname")
    write_program(machine.programs / "uname", "#!/bin/bash\necho Darwin\n")
    lines = machine.succeed("venv")
    assert list_locks(lines) == ["build", "torch", "dev"]
    assert not any("NVIDIA" in line for line in lines)


def test_another_failure_of_pip_downloads_no_other_torch(machine):
    machine.set_pip(OTHER_ERROR)
    machine.add_python("python3.12", "3.12.1")
    code, output = machine.run("venv")
    assert code == 2
    assert "DO NOT MATCH THE HASHES" in output
    assert "requirements/torch.txt" not in output
    assert not (machine.checkout / ".venv/.made").exists()


def test_an_environment_of_another_python_is_made_anew(machine):
    first = machine.add_python("python3.11", "3.11.7")
    machine.succeed("venv")
    for version, options in (("3.11.9", ""), ("3.12.1", "--clear ")):
        machine.add_python(first.name, version)
        (machine.checkout / ".venv/.made").unlink()
        assert machine.succeed("venv")[0] == f"python {version}: -m venv {options}.venv"


def test_the_other_environments_come_the_same_way(machine):
    machine.add_python("python3.13", "3.13.0")
    lines = machine.succeed(".venv-sdk3/.made")
    assert lines[0] == "python 3.13.0: -m venv --clear .venv-sdk3"
    assert list_locks(lines) == ["build", "sdk3"]


def test_the_sizes_are_of_the_locked_torch():
    script = (ROOT / "docker/venv.sh").read_text(encoding="utf-8")
    pinned = re.search(r'"torch==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pinned and f"# Of torch {pinned[1]} with all that it needs" in script, "measure the sizes anew"


def test_the_builds_of_torch_are_locked_for_every_python_and_machine():
    """Two machines and three Pythons have a CPU build each; uv finds the index's own build for all."""
    lock = (ROOT / "docker/requirements/torch-cpu.txt").read_text(encoding="utf-8")
    assert lock.count("--hash=sha256:") == 6
    for name in ("dev", "cpu"):
        text = (ROOT / f"docker/requirements/{name}.txt").read_text(encoding="utf-8")
        assert not re.search(r"^(nvidia-(?!ml-py)|cuda-|triton)", text, re.MULTILINE)
