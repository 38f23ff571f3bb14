# SPDX-License-Identifier: Apache-2.0
"""What the image promises before anything runs in it."""

import pytest

from llm_trainer import __version__

LABELS = "org.opencontainers.image."


@pytest.fixture(scope="session")
def config(image):
    return image.inspect()["Config"]


@pytest.fixture(scope="session")
def variables(config):
    return dict(variable.split("=", 1) for variable in config["Env"])


@pytest.fixture(scope="session")
def commands(image):
    """Command -> where PATH finds it."""
    names = ("bash", "python", "python3", "pip", "pip3", "torchrun", "llm-trainer", "cc", "gcc")
    script = "; ".join(f"echo {name}=$(command -v {name})" for name in names)
    return dict(line.split("=") for line in image.run_bash(script).splitlines())


def test_the_entrypoint_is_the_launcher_without_a_shell(config):
    assert config["Entrypoint"] == ["llm-trainer"]
    assert config["Cmd"] == ["train"]


def test_no_user_is_set_because_the_mounts_belong_to_root(config):
    assert config["User"] == ""


def test_nothing_is_imported_from_the_working_folder_or_a_users_own(image):
    script = "cd $(mktemp -d) && echo 'print(\"shadow\")' >argparse.py && cp argparse.py peft.py"
    script += " && mkdir -p ~/.local/lib/python3.{11,12,13}/site-packages"
    script += " && for folder in ~/.local/lib/*/site-packages; do cp peft.py $folder/usercustomize.py; done"
    printed = image.run_bash(f"{script} && llm-trainer --help && python -m llm_trainer --help")
    assert printed.count("usage: llm-trainer") == 2
    assert "shadow" not in printed


def test_nothing_is_baked_under_opt_ml(image, config):
    assert not config["Volumes"]
    assert image.run_bash("test ! -e /opt/ml && echo absent") == "absent\n"


@pytest.mark.parametrize("name", ["python", "python3", "pip", "pip3", "torchrun", "llm-trainer"])
def test_path_finds_the_environments_own(commands, name):
    assert commands[name] == f"/opt/llm-trainer/venv/bin/{name}"


def test_path_finds_bash(commands):
    assert commands["bash"].endswith("/bash")


def test_the_cpu_image_has_no_compiler(image, commands):
    if image.variant == "cuda":
        pytest.skip("Triton compiles with gcc")
    assert not commands["cc"]
    assert not commands["gcc"]


def test_every_gpu_is_visible_for_computing(variables):
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_log_lines_are_not_held_back(variables):
    assert variables["PYTHONUNBUFFERED"] == "1"


def test_no_cache_variable_hides_the_launchers_choice(variables):
    assert not {"HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} & set(variables)


def test_a_user_without_a_name_has_one_and_caches_where_it_may_write(image):
    script = "python -c 'import getpass; print(getpass.getuser())'; touch ~/file && echo $HOME"
    assert image.run_bash(script, ["--user=12345:12345", "--read-only", "--tmpfs=/tmp"]) == "trainer\n/tmp\n"


def test_another_command_than_ours_runs_as_sdk_3_cleans_up_after_its_local_mode(image, tmp_path):
    (tmp_path / "of-root").mkdir(mode=0o700)
    result = image.run("chmod", "-R", "777", "/delete", options=[f"--volume={tmp_path}:/delete"])
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "of-root").stat().st_mode & 0o777 == 0o777


@pytest.mark.parametrize("argument", ["trian", ""])
def test_a_command_that_is_not_there_is_told_how_to_use_ours(image, argument):
    result = image.run(argument)
    assert result.returncode == 2
    assert result.stdout.startswith(f"llm-trainer: {argument!r} is not a command: ")
    assert "usage: llm-trainer" in result.stdout


@pytest.mark.parametrize("label", ["title", "description", "licenses", "revision", "created", "base.name"])
def test_the_image_is_labelled(config, label):
    assert config["Labels"][LABELS + label]


def test_the_version_label_is_the_packages(config):
    assert config["Labels"][LABELS + "version"] == __version__


def test_a_job_can_tell_the_revision_of_its_image(config, variables):
    assert variables["LLM_TRAINER_REVISION"] == config["Labels"][LABELS + "revision"]


def test_modules_are_compiled_so_that_no_start_compiles_them(image):
    """And without times, which would differ from build to build: 1 in the header is "a hash that nobody checks"."""
    script = """python - <<'END'
import importlib.util, pathlib, struct
for name in ("llm_trainer", "torch", "transformers", "trl", "peft", "datasets"):
    assert pathlib.Path(importlib.util.cache_from_source(importlib.util.find_spec(name).origin)).exists(), name
for file in pathlib.Path("/opt/llm-trainer/venv/lib").rglob("*.pyc"):
    with open(file, "rb") as compiled:
        assert struct.unpack("<4xI", compiled.read(8)) == (1,), file
END"""
    image.run_bash(script)


def test_the_environment_has_no_broken_requirement(image):
    image.run_bash("pip check")


def test_building_left_no_cache_and_no_credential_behind(image):
    script = """ls -A /tmp /mnt /var/lib/apt/lists /var/cache/apt
test ! -e /root/.cache || find /root/.cache
find / -xdev \\( -name pip.conf -o -name .netrc -o -name .pypirc -o -path '*/.aws/*' -o -name '*_rsa' \\) -print"""
    lines = image.run_bash(script).split()
    assert [line for line in lines if not line.endswith(":")] == []
