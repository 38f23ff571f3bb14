# SPDX-License-Identifier: Apache-2.0
"""A user's own script: through SageMaker's training toolkit (SDK v2), and as ModelTrainer's drivers run it (SDK v3)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_aws import FakeAWS
from support.sagemaker_tree import LLM_TRAINER, SageMakerTree
from support.waiting import GUARD_SECONDS

SHIM = Path(__file__).parents[2] / "examples/source_code/train.py"
# Tells what it was given, and imports the image's packages.
TELL = """
import json, os, sys
import llm_trainer
print("told " + json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}))
"""
# Ends with 0 within seconds of SIGTERM, as a script that saves its work does.
SAVE_WHEN_STOPPED = """
import pathlib, signal, subprocess, sys, time
loader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def save(signum, frame):
    assert loader.poll() is None
    loader.kill()
    pathlib.Path(sys.argv[-1], "saved").write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
time.sleep(600)
"""
TRAP = """#!/bin/bash
trap 'echo saved >"$2/saved"; kill $!; exit 0' TERM
echo training
sleep 60 & wait
"""


@pytest.fixture
def script_job(tmp_path):
    """Makes the tree of a job that runs files of a folder, named as SDK v2 does: every value in JSON."""

    def make(program: str, files: dict[str, str], **hyperparameters):
        tree = SageMakerTree(tmp_path)
        for name, content in files.items():
            file = tree.write(f"submitted/{name}", content)
            file.chmod(0o755)
        given = {"sagemaker_program": program, "sagemaker_submit_directory": str(tree.base_dir / "submitted")}
        tree.write_job({k: json.dumps(v) for k, v in {**given, **hyperparameters}.items()}, ("train",))
        return tree

    return make


def test_a_script_gets_its_arguments_and_variables(script_job):
    note = 'don\'t --stop, $HOME; "now"'
    tree = script_job("train.py", {"train.py": TELL}, layers=[1, 2], packing=True, note=note, epochs=3)
    tree.write("output/failure", "of an earlier job")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("told ")]
    told = json.loads(line.removeprefix("told "))
    assert told["argv"] == ["--epochs", "3", "--layers", "[1, 2]", "--note", note, "--packing", "True"]
    assert told["cwd"] == str(tree.base_dir / "code")
    variables = told["env"]
    assert json.loads(variables["SM_HPS"]) == {"layers": [1, 2], "packing": True, "note": note, "epochs": 3}
    assert variables["SM_CHANNEL_TRAIN"] == str(tree.base_dir / "input/data/train")
    assert variables["SM_MODEL_DIR"] == str(tree.base_dir / "model")
    assert Path(shutil.which("torchrun", path=variables["PATH"])).parent == LLM_TRAINER.parent
    assert not (tree.base_dir / "output/failure").exists()


def test_a_job_without_a_submit_directory_runs_the_script_of_the_channel_code(script_job):
    tree = script_job("train.py", {})
    tree.write("input/data/code/train.py", "print('from the channel')")
    tree.change(sagemaker_submit_directory=None, sagemaker_program="train.py")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert "from the channel" in result.stdout


SECRET = "arn:aws:secretsmanager:eu-west-1:111122223333:secret:hub-AbCdEf"
USE_SECRET = """
import os, pathlib, sys
pathlib.Path(sys.argv[-1], "used").write_text(os.environ["HF_TOKEN"] + " " + os.environ["OWN"])
raise ValueError("401 for " + os.environ["HF_TOKEN"])
"""


@pytest.fixture
def aws():
    aws = FakeAWS()
    yield aws
    aws.server.shutdown()


def test_a_script_gets_a_secret_in_the_place_of_its_reference_and_we_do_not_tell_it(script_job, aws):
    tree = script_job("train.py", {"train.py": USE_SECRET})
    tree.change(folder=json.dumps(str(tree.base_dir)))
    aws.values = {SECRET: '{"HF_TOKEN": "hf_behindTheReference"}'}
    tree.environment |= {**aws.variables, "HF_TOKEN": SECRET, "OWN": SECRET}
    result = tree.run()
    assert result.returncode == 1
    assert (tree.base_dir / "used").read_text() == f"hf_behindTheReference {SECRET}"
    assert tree.failure == "train.py ended with exit code 1: ValueError: 401 for ***"
    assert "ValueError: 401 for ***" in result.stdout.splitlines()  # the script's own word, too, is hidden
    assert "hf_behind" not in result.stdout


def test_a_reference_that_may_not_be_read_fails_the_job_before_the_script_runs(script_job, aws):
    tree = script_job("train.py", {"train.py": "print('ran')"})
    aws.refusals[SECRET] = "AccessDeniedException"
    tree.environment |= {**aws.variables, "WANDB_API_KEY": SECRET}
    result = tree.run()
    assert result.returncode == 1
    assert tree.failure.startswith(f"WANDB_API_KEY refers to {SECRET}, which may not be read: allow the job's role ")
    assert "ran" not in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("program", "content", "sentence"),
    [
        ("train.py", "raise ValueError('no rows')", "train.py ended with exit code 1: ValueError: no rows"),
        ("train.sh", "#!/bin/sh\nexit 130", "train.sh ended with exit code 130: the log above says why."),
        ("train.py", "import os; os.kill(os.getpid(), 9)", "train.py was killed by SIGKILL, most likely because"),
        (
            "train.py",
            "import os, pathlib as p; p.Path(os.environ['SM_OUTPUT_DIR'], 'failure').write_text('mine'); exit(3)",
            "mine",
        ),
    ],
    ids=["exception", "exit-code-that-reads-as-success", "out-of-memory", "own-failure-file"],
)
def test_a_failing_script_fails_the_job_with_its_reason(script_job, program, content, sentence):
    tree = script_job(program, {program: content})
    result = tree.run()
    assert result.returncode == 1, result.stdout
    assert tree.failure.startswith(sentence)


def test_a_script_that_is_not_there_is_named(script_job):
    tree = script_job("trian.py", {"train.py": TELL})
    assert tree.run().returncode == 1
    assert "can't open file" in tree.failure
    assert "trian.py" in tree.failure


def test_requirements_that_cannot_be_installed_are_told(script_job):
    tree = script_job("train.py", {"train.py": TELL, "requirements.txt": "--no-index\nno-such-package==1\n"})
    assert tree.run().returncode == 1
    assert tree.failure.startswith("Installing what train.py needs ended with exit code 1: ERROR: No matching")


def test_an_end_that_the_toolkit_could_not_report_is_no_success(script_job):
    tree = script_job("train.py", {"train.py": "import os, shutil; shutil.rmtree(os.environ['SM_OUTPUT_DIR'])"})
    tree.write("output/success", "of an earlier job")
    assert tree.run().returncode == 1
    assert tree.failure.startswith("SageMaker's training toolkit, which runs train.py, ended")


@pytest.mark.parametrize(
    ("program", "files"),
    [
        ("save.py", {"save.py": SAVE_WHEN_STOPPED}),
        ("train.sh", {"save.py": SAVE_WHEN_STOPPED, "train.sh": f'#!/bin/bash\n"{sys.executable}" save.py "$@"\n'}),
        (
            "train.sh",
            {"train.sh": TRAP},
        ),
    ],
    ids=["python", "python-below-a-shell-without-a-trap", "shell-with-a-trap"],
)
def test_a_stop_reaches_the_script_which_may_end_well(script_job, program, files):
    tree = script_job(program, files)
    tree.change(folder=json.dumps(str(tree.base_dir)))
    process = subprocess.Popen(
        [str(LLM_TRAINER), "train"],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir), **tree.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "training\n":
            break
    process.send_signal(signal.SIGTERM)
    assert "Received SIGTERM" in process.stdout.read()
    assert process.wait(GUARD_SECONDS) == 0
    assert (tree.base_dir / "saved").read_text().strip() == "saved"
    assert not (tree.base_dir / "output/failure").exists()


def run_shim(tree, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the shim as ModelTrainer's basic driver does: in the folder of the channel `code`, the settings repeated."""
    code_dir = tree.base_dir / "input/data/code"
    code_dir.mkdir()
    shutil.copy(SHIM, code_dir)
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=code_dir,
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GUARD_SECONDS,
        check=False,
    )


def test_the_shim_trains_with_the_jobs_hyperparameters(tree):
    arguments = ["--learning_rate", "0.01", "--mlflow_uri", "", "--model_revision", "--main", "--report_to", "none"]
    result = run_shim(tree, *arguments)
    assert result.returncode == 0, result.stdout
    assert tree.model_files >= {"adapter_model.safetensors", "training_manifest.json"}
    assert tree.manifest["settings"]["learning_rate"] == 0.01
