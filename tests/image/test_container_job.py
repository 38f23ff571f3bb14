# SPDX-License-Identifier: Apache-2.0
"""The main job in a real container: a SageMaker input tree goes in, a trained adapter comes out."""

import math

import pytest

from support.sagemaker_tree import metrics_of

ARTEFACTS = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_manifest.json",
}
RANDOM_USER = "--user=12345:12345"
READ_ONLY = ("--read-only", "--tmpfs=/tmp")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        pytest.param(["train"], [], id="as-the-service-starts-it", marks=pytest.mark.smoke),
        pytest.param([], ["--network=none"], id="without-argument-as-local-mode-starts-it-and-without-network"),
        pytest.param(["train"], [RANDOM_USER], id="as-a-random-user"),
        pytest.param(["train"], READ_ONLY, id="on-a-read-only-root"),
    ],
)
def test_the_job_trains_an_adapter(image, tree, arguments, options):
    result = image.run_job(tree.base_dir, *arguments, options=options)
    assert result.returncode == 0, result.stdout
    assert tree.model_files >= ARTEFACTS
    assert not (tree.base_dir / "output/failure").exists()
    losses = metrics_of(result.stdout, "train_loss")
    assert losses, result.stdout
    assert all(math.isfinite(loss) for loss in losses)


def test_a_job_is_validated_without_being_run(image, tree):
    result = image.run_job(tree.base_dir, "validate")
    assert result.returncode == 0, result.stdout
    assert not tree.model_files


def test_a_job_is_planned_for_instances_without_a_network(image, tree):
    result = image.run_job(tree.base_dir, "plan", options=["--network=none", RANDOM_USER, *READ_ONLY])
    assert result.returncode == 0, result.stdout
    assert "\ncheapest: 1 x ml." in result.stdout
    assert "From instance facts of 20" in result.stdout
    assert not tree.model_files


def test_two_ranks_train_together_without_network_and_with_little_shared_memory(image, tree):
    tree.change(nproc_per_node="2", per_device_train_batch_size="4")
    result = image.run_job(tree.base_dir, "train", options=["--network=none", "--shm-size=64m"])
    assert result.returncode == 0, result.stdout
    assert tree.model_files >= ARTEFACTS


@pytest.mark.parametrize("options", [[], [RANDOM_USER, *READ_ONLY]], ids=["root", "random-user-on-a-read-only-root"])
def test_a_job_without_a_model_fails_with_one_sentence(image, tree, options):
    (tree.base_dir / "input/data/model").rename(tree.base_dir / "elsewhere")
    tree.write_job({}, ("train",))
    result = image.run_job(tree.base_dir, "train", options=options)
    assert result.returncode == 1
    assert tree.failure.startswith("model_id is missing")
    assert "Traceback" not in result.stdout + tree.failure
    assert not tree.model_files


def test_hyperparameters_that_are_not_json_fail_with_one_sentence(image, tree):
    tree.write("input/config/hyperparameters.json", '{"model_id": "x"')
    result = image.run_job(tree.base_dir, "train")
    assert result.returncode == 1
    assert "hyperparameters.json is not valid JSON" in tree.failure.splitlines()[0]
    assert "Traceback" not in result.stdout + tree.failure
    assert not tree.model_files


def test_a_stop_saves_exports_and_succeeds_and_the_next_start_goes_on(image, tree):
    tree.change(num_train_epochs="10000", nproc_per_node="2")
    with image.start(tree.base_dir, "train") as container:
        container.wait_for("train_loss=")
        assert container.stop(grace_seconds=120) == 0, container.log()
    stopped_at = tree.manifest["num_steps"]
    assert tree.manifest["stopped"]
    assert tree.model_files >= ARTEFACTS
    assert tree.checkpoints[-1] == stopped_at
    tree.change(num_train_epochs=None, max_steps=str(stopped_at + 2))
    result = image.run_job(tree.base_dir, "train")
    assert result.returncode == 0, result.stdout
    assert f"Resuming from /opt/ml/checkpoints/checkpoint-{stopped_at}" in result.stdout
    assert tree.manifest["num_steps"] == stopped_at + 2


@pytest.mark.parametrize(("path", "mode"), [("model.safetensors", 0o600), (".", 0o700)], ids=["weights", "folder"])
def test_a_model_that_the_user_cannot_read_fails_with_one_sentence(image, tree, path, mode):
    (tree.base_dir / "input/data/model" / path).chmod(mode)
    result = image.run_job(tree.base_dir, "train", options=[RANDOM_USER])
    assert result.returncode == 1
    assert "user 12345" in tree.failure.splitlines()[0]
    assert "Traceback" not in result.stdout + tree.failure
    assert not tree.model_files
