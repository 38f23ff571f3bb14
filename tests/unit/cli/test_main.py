# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: help, mistakes, a container's own commands, and readers who leave."""

import os
import re
import subprocess
import sys

import pytest

from llm_trainer import __version__
from llm_trainer.cli import main as cli
from llm_trainer.cli.commands import list_commands
from support.waiting import GUARD_SECONDS

COMMAND = [sys.executable, "-m", "llm_trainer"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=GUARD_SECONDS)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command(option, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([option])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match("    [a-z]", line)]
    assert listed == list(list_commands())


@pytest.mark.parametrize("name", list_commands())
def test_each_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    output = capsys.readouterr()
    assert output.out.startswith(f"usage: llm-trainer {name} ")
    assert not output.err


def test_without_a_command_the_help_goes_to_standard_error(capsys):
    assert cli.main([]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("usage: llm-trainer [-h] [--version] COMMAND")
    assert not output.out


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "the nearest is 'train'."),
        ("metric", "the nearest is 'metrics'."),
        ("", f"the commands are {', '.join(list_commands())}."),
    ],
)
def test_an_unknown_command_is_told_with_the_nearest(name, hint, capsys):
    assert cli.main([name, "--lora_r", "8"]) == 2
    output = capsys.readouterr()
    assert output.err.splitlines()[0] == f"llm-trainer: {name!r} is not a command: {hint}"
    assert not output.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["metrics", "--jsn"], "unrecognized arguments: --jsn"),
        (["merge", "--adapter", "a"], "the following arguments are required: --output"),
        (["merge", "--adapter", "a", "--output", "b", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["--lora_r", "8"], "usage: llm-trainer"),
    ],
)
def test_a_wrong_argument_ends_with_usage(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    output = capsys.readouterr()
    assert told in output.err
    assert not output.out


def test_as_pid_1_it_runs_a_containers_own_command(monkeypatch):
    ran = []
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "execvp", lambda name, words: ran.append((name, words)))
    cli.main(["chmod", "-R", "777", "/nowhere"])
    cli.main(["no-such-program"])
    assert ran == [("chmod", ["chmod", "-R", "777", "/nowhere"])]


def test_help_imports_nothing_that_takes_long():
    heavy = "{'torch', 'boto3', 'transformers', 'pydantic', 'yaml', 'numpy', 'pyarrow'}"
    code = (
        "import sys; from llm_trainer.cli.main import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize("words", [["metrics"], ["train", "--help"], ["--help"]])
def test_a_reader_who_leaves_ends_it_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run(
            [*COMMAND, *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=GUARD_SECONDS
        )
    finally:
        os.close(writing)
    assert result.stderr == ""
    # argparse takes no notice of a help that it cannot write, where Python does not buffer it
    assert result.returncode in ((141,) if words == ["metrics"] else (0, 141))


def test_the_first_line_can_be_cut_off_in_a_shell():
    script = '"$0" -m llm_trainer "$@" | head -1'
    for words, line in ((["metrics"], "train_loss "), (["train", "--help"], "usage: llm-trainer train [--SETTING")):
        result = subprocess.run(
            ["bash", "-c", script, sys.executable, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=GUARD_SECONDS,
        )
        assert result.stdout.startswith(line)
        assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)


def test_python_m_is_the_same_command():
    assert run("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("part", ["", ".", "lib"])
def test_nothing_is_imported_from_the_working_folder_by_a_part_of_pythonpath(tmp_path, part):
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / part / "psutil.py").write_text("raise SystemExit('taken from the working folder')")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([part, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-P", "-c", "import sys; from llm_trainer.cli.main import main; main(); import psutil"]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=GUARD_SECONDS)
    assert result.returncode == 0, result.stderr
