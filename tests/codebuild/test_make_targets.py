# SPDX-License-Identifier: Apache-2.0
"""`make login`, `make flash-attn-cached` and `make push` against moto; a client or a compiler takes notes."""

import json
import os
import re
import subprocess

import pytest

from conftest import REGION, call

ACCOUNT = "123456789012"  # moto's
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
NOTING_DOCKER = """#!/bin/bash
printf '%s\\n' "$@" >>{notes}
cat >>{notes}
"""
# Stands for hours of compiling: any goal but this is make's own.
COMPILING_MAKE = """#!/bin/bash
[ "$1" = flash-attn ] || exec {make} "$@"
printf '%s\\n' "$@" >>{notes}
echo wheel >docker/wheels/flash_attn-2.8.3-cp311-cp311-linux_x86_64.whl
"""
UNCOMMITTED = """FROM scratch
COPY Dockerfile /
LABEL org.opencontainers.image.revision=unknown org.opencontainers.image.version=0.1.0
"""


@pytest.fixture
def checkout(make_checkout):
    return make_checkout()


@pytest.fixture
def notes(tmp_path):
    return tmp_path / "notes"


@pytest.fixture
def make(checkout, aws, tools, tmp_path, notes):
    """Runs a make target of the checkout; `programs` come first on its PATH."""
    programs_first = tmp_path / "bin"
    programs_first.mkdir()

    def run_make(*arguments, **programs):
        for name, text in programs.items():
            (programs_first / name).write_text(text, encoding="utf-8")
            (programs_first / name).chmod(0o755)
        variables = {**os.environ, **aws.variables, "PATH": f"{programs_first}:{tools['PATH']}"}
        variables.pop("MAKEFLAGS", None)
        return call("make", *arguments, cwd=checkout.folder, env=variables)

    return run_make


def test_login_hands_ecrs_password_to_docker(make, tmp_path, notes):
    client = tmp_path / "bin/docker"
    make("login", f"REPOSITORY={REGISTRY}/trainer", f"DOCKER={client}", docker=NOTING_DOCKER.format(notes=notes))
    *arguments, password = notes.read_text(encoding="utf-8").splitlines()
    assert arguments == ["login", "--username", "AWS", "--password-stdin", REGISTRY]
    assert password == f"{ACCOUNT}-auth-token"


def test_login_fails_where_ecr_gives_no_password(make, tmp_path, notes):
    client = tmp_path / "bin/docker"
    with pytest.raises(AssertionError, match="make: "):
        make(
            "login",
            f"REPOSITORY={REGISTRY}/trainer",
            f"DOCKER={client}",
            docker=NOTING_DOCKER.format(notes=notes),
            aws="#!/bin/bash\nexit 255\n",
        )


def test_login_says_where_there_is_none(make):
    assert "127.0.0.1:5000/trainer is not in ECR: no login" in make("login", "REPOSITORY=127.0.0.1:5000/trainer")


def test_flash_attn_is_compiled_once_for_what_decides_it(make, aws, checkout, notes):
    bucket, wheels = aws.make_bucket("wheels"), checkout.folder / "docker/wheels"
    compiler = COMPILING_MAKE.format(make=call("which", "make").strip(), notes=notes)
    started = []

    def make_wheel(*options):
        for wheel in wheels.glob("flash_attn-*.whl"):
            wheel.unlink()
        output = make("flash-attn-cached", f"CACHE_FOLDER=s3://{bucket}/cache", *options, make=compiler)
        assert [wheel.read_text(encoding="utf-8") for wheel in wheels.glob("flash_attn-*.whl")] == ["wheel\n"]
        started.append(notes.read_text(encoding="utf-8").count("flash-attn\n"))
        return output

    assert "compiling for 80;90;100;120" in make_wheel()
    (key,) = aws.list_keys(bucket)
    assert re.fullmatch(
        r"cache/flash-attn-[\d.a-z]+/torch-[\d.]+-cuda-[\d.]+-sm-80-90-100-120-\w{12}/flash_attn-.*whl", key
    )
    assert f"from s3://{bucket}/{key.rpartition('/')[0]}" in make_wheel()
    for file, old, new in [
        ("docker/requirements/cuda.txt", "torch==2.13.0", "torch==2.13.1"),
        ("docker/requirements/flash-attn.txt", "flash-attn==", "flash-attn==9."),
        ("docker/Dockerfile", 'FLASH_ATTN_CUDA_ARCHS="80;', 'FLASH_ATTN_CUDA_ARCHS="86;'),
        ("docker/Dockerfile", "ARG BUILDER_IMAGE=nvidia/cuda:13.0.2", "ARG BUILDER_IMAGE=nvidia/cuda:13.0.3"),
    ]:
        checkout.commit(file, old, new)
        make_wheel()
    assert started[0] == 1
    assert started[-4:] == [2, 3, 4, 5]
    assert len(aws.list_keys(bucket)) == 5
    make_wheel()
    assert started[-1] == 5


def test_the_compiler_gets_the_builds_options(make, aws, notes):
    folder = f"s3://{aws.make_bucket('options')}/cache"
    compiler = COMPILING_MAKE.format(make=call("which", "make").strip(), notes=notes)
    make("flash-attn-cached", f"CACHE_FOLDER={folder}", "BUILD_OPTIONS=--build-arg MAX_JOBS=4", make=compiler)
    assert "--build-arg MAX_JOBS=4 --build-arg FLASH_ATTN_CUDA_ARCHS=80;90;100;120" in notes.read_text("utf-8")


@pytest.fixture
def gates(make, tmp_path, osv):
    """Runs `make gates` on an image whose bill names one package, under this licence."""

    def run_gates(license_name):
        package = {"name": "planted", "version": "1.0", "purl": "pkg:pypi/planted@1.0"}
        bill = {"components": [{**package, "licenses": [{"license": {"name": license_name}}]}]}
        (tmp_path / "bill.json").write_text(json.dumps(bill), encoding="utf-8")
        client = f"#!/bin/bash\ncat {tmp_path / 'bill.json'}\n"
        return make("gates", f"OSV_URL={osv.url}", f"DOCKER={tmp_path / 'bin/docker'}", docker=client)

    return run_gates


def test_the_gates_let_a_harmless_package_through(gates):
    assert "1 packages audited, 0 problems." in gates("MIT")


def test_the_gates_stop_a_vulnerable_package(gates, osv):
    osv.plant("planted", "GHSA-aaaa-bbbb-cccc", "CVE-2026-1", "1.1")
    with pytest.raises(AssertionError, match=r"planted 1\.0: .* mended in 1\.1"):
        gates("MIT")


def test_the_gates_stop_a_denied_licence(gates):
    with pytest.raises(AssertionError, match=r"planted .* DENIED"):
        gates("GNU Affero General Public License v3")


def test_a_commit_has_to_be_there_for_a_push(make, docker, tmp_path):
    (tmp_path / "Dockerfile").write_text(UNCOMMITTED, encoding="utf-8")
    call(docker, "build", "--quiet", "--tag", "llm-trainer-test-uncommitted:cpu", tmp_path)
    try:
        with pytest.raises(AssertionError, match="commit first"):
            make(
                "push",
                "IMAGE=llm-trainer-test-uncommitted",
                "VARIANT=cpu",
                "REPOSITORY=127.0.0.1:9/trainer",
                f"DOCKER={docker}",
            )
    finally:
        subprocess.run([docker, "rmi", "llm-trainer-test-uncommitted:cpu"], capture_output=True)
