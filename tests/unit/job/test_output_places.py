# SPDX-License-Identifier: Apache-2.0
"""A result is written where it outlives the container, or the job does not start."""

from pathlib import Path

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.job.output_places import (
    find_foreign_paths,
    find_overlaps,
    find_place_problems,
    find_place_warnings,
    find_taken_names,
    outlives_container,
)
from support.environments import build_environment

SAGEMAKER = {"instance_type": "ml.g6.xlarge"}


def find_problems(environment, **values):
    return list(find_place_problems(Settings(**values).output, environment))


@pytest.mark.parametrize("name", ["output_dir", "checkpoint_dir"])
@pytest.mark.parametrize("environment", [build_environment(), build_environment(**SAGEMAKER)])
@pytest.mark.parametrize(
    "address", ["s3://bucket/model", "s3:/bucket", "S3://bucket", "file:///opt/ml/model", "hf://x"]
)
def test_an_address_is_no_folder(name, environment, address):
    (problem,) = find_problems(environment, **{name: address})
    assert problem.startswith(f"{name}='{address}' is an address, and a job writes to a folder")


@pytest.mark.parametrize("name", ["output_dir", "checkpoint_dir"])
def test_a_relative_folder_is_refused_with_the_whole_path(name):
    (problem,) = find_problems(build_environment(), **{name: "out/model"})
    assert problem == f"{name}='out/model' is relative: give the whole path, such as '{Path.cwd()}/out/model'."


@pytest.mark.parametrize(
    "path", ["/opt/ml/model", "/opt/ml/model/deep", "/opt/ml/output/data/m", "/opt/ml/checkpoints/m"]
)
def test_what_sagemaker_uploads_is_taken(path):
    assert find_problems(build_environment(**SAGEMAKER), output_dir=path) == []


@pytest.mark.parametrize("path", ["/tmp/model", "/opt/ml/output", "/opt/ml", "/opt/ml/models", "/opt/ml/model/../x"])
def test_what_sagemaker_does_not_upload_is_refused_there_and_taken_elsewhere(path):
    (problem,) = find_problems(build_environment(**SAGEMAKER), output_dir=path)
    assert problem == (
        f"output_dir='{path}' would be lost with the container: SageMaker uploads /opt/ml/model; leave it out."
    )
    assert find_problems(build_environment(), output_dir=path) == []


def test_a_link_out_of_the_uploaded_folder_does_not_outlive_the_container(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "output").mkdir()
    environment = build_environment(base_dir=tmp_path, **SAGEMAKER)
    assert outlives_container(tmp_path / "model" / "x", environment)  # the link is what SageMaker mounts
    (tmp_path / "output/data").mkdir()
    (tmp_path / "output/data/link").symlink_to(tmp_path / "nowhere")
    assert not outlives_container(tmp_path / "output/data/link", environment)


def test_a_mounted_channel_outlives_the_container():
    environment = build_environment(channels={"shared": Path("/proc"), "train": Path("/usr")}, **SAGEMAKER)
    assert outlives_container(Path("/proc/x"), environment)
    assert not outlives_container(Path("/usr/x"), environment)


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"checkpoint_dir": "/tmp/c"}, "checkpoint_dir='/tmp/c' is not copied to S3"),
        ({"mlflow_uri": "/tmp/mlruns"}, "mlflow_uri='/tmp/mlruns' is lost with the container"),
        ({"mlflow_uri": "sqlite:////tmp/m.db"}, "mlflow_uri='sqlite:////tmp/m.db' is lost"),
        ({"mlflow_uri": "file:///tmp/mlruns"}, "mlflow_uri='file:///tmp/mlruns' is lost"),
    ],
)
def test_what_is_lost_beside_the_result_is_told(values, start):
    settings = Settings(**values)
    (warning,) = find_place_warnings(settings.output, settings.tracking, build_environment(**SAGEMAKER))
    assert warning.startswith(start)
    assert not list(find_place_warnings(settings.output, settings.tracking, build_environment()))


@pytest.mark.parametrize(
    "values",
    [
        {"checkpoint_dir": "/opt/ml/checkpoints/a"},
        {"mlflow_uri": "https://host"},
        {"mlflow_uri": "/tmp/mlruns", "report_to": "none"},
        {"mlflow_uri": "/opt/ml/output/data/mlruns"},
    ],
)
def test_what_stays_is_no_news(values):
    settings = Settings(**values)
    assert not list(find_place_warnings(settings.output, settings.tracking, build_environment(**SAGEMAKER)))


def test_a_folder_that_leads_to_another_by_a_link_overlaps_with_it(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (problem,) = find_overlaps(tmp_path / "link/out", {"the base": tmp_path / "base"})
    assert f"lies in the base ({tmp_path}/base)" in problem
    assert list(find_overlaps(tmp_path / "base2", {"the base": tmp_path / "base"})) == []


@pytest.mark.parametrize(
    ("is_adapter", "merges", "taken"),
    [
        (True, False, "README.md, adapter_config.json, adapters, tokenizer.json"),
        (False, False, "README.md, adapters, config.json, tokenizer.json"),
        (True, True, "README.md, adapter/adapter_config.json, adapters, config.json, tokenizer.json"),
    ],
)
def test_names_of_the_result_that_are_taken_are_told_at_once(tmp_path, is_adapter, merges, taken):
    for folder in ("tokenizer.json", "adapter/adapter_config.json", "adapter_config.json"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "adapters").symlink_to(tmp_path / "adapter")
    for name in ("config.json", "README.md", "notes.txt"):
        (tmp_path / name).touch()
    (problem,) = find_taken_names(tmp_path, is_adapter, merges)
    assert problem == (
        f"output_dir='{tmp_path}' holds {taken}, which the result would replace and no job's training_manifest.json "
        "lists as its own: move or remove it, or give another output_dir."
    )


def test_a_broken_manifest_is_a_jobs_leftover_and_a_folder_of_its_name_is_not(tmp_path):
    (tmp_path / "training_manifest.json").write_text("")
    assert find_foreign_paths(tmp_path, ["training_manifest.json"]) == set()
    (tmp_path / "training_manifest.json").unlink()
    (tmp_path / "training_manifest.json").mkdir()
    assert find_foreign_paths(tmp_path, ["training_manifest.json"]) == {"training_manifest.json"}


def test_other_adapters_are_in_nobodys_way(tmp_path):
    (tmp_path / "adapters/other").mkdir(parents=True)
    assert list(find_taken_names(tmp_path, True, True)) == []
