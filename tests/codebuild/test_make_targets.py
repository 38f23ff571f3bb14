# SPDX-License-Identifier: Apache-2.0
"""`make login`, `make flash-attn-cached` and `make push` against moto; a client or a compiler takes notes."""

import json
import os
import re
import uuid

import pytest

from support.checkout import call, remove_images
from support.codebuild import OF_MAKE, REGION

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
LABELLED = """FROM scratch
COPY Dockerfile content /
LABEL org.opencontainers.image.revision={revision} org.opencontainers.image.version={version}
"""
VERSION = "0.1.0"
REPOSITORY = "second-push"
DIGESTS = ["WHEEL_DIGESTS=/trainer/wheels"]


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
        inherited = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
        variables = {**inherited, **aws.variables, "PATH": f"{programs_first}:{tools['PATH']}"}
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
        output = make("flash-attn-cached", f"CACHE_FOLDER=s3://{bucket}/cache", *DIGESTS, *options, make=compiler)
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


@pytest.mark.parametrize("attack", ["other content", "gone", "another wheel beside it"])
def test_a_wheel_is_taken_by_its_digest_alone(make, aws, checkout, notes, attack):
    """Who may write to the bucket puts nothing into the image."""
    bucket, wheels = aws.make_bucket("attacked"), checkout.folder / "docker/wheels"
    compiler = COMPILING_MAKE.format(make=call("which", "make").strip(), notes=notes)

    def list_wheels():
        return {wheel.name: wheel.read_text(encoding="utf-8") for wheel in wheels.glob("flash_attn-*.whl")}

    def make_wheel():
        make("flash-attn-cached", f"CACHE_FOLDER=s3://{bucket}/cache", *DIGESTS, make=compiler)

    make_wheel()
    compiled = list_wheels()
    for wheel in compiled:
        (wheels / wheel).unlink()
    ((key,), s3) = aws.list_keys(bucket), aws.client("s3")
    if attack == "gone":
        s3.delete_object(Bucket=bucket, Key=key)
    else:
        poisoned = key if attack == "other content" else f"{key.rpartition('/')[0]}/torch-2.13.0-py3-none-any.whl"
        s3.put_object(Bucket=bucket, Key=poisoned, Body=b"poison")
    before = set(wheels.iterdir())
    if attack == "another wheel beside it":
        make_wheel()
        assert list_wheels() == compiled
        assert {file.name for file in set(wheels.iterdir()) - before} == set(compiled)
        return
    with pytest.raises(
        AssertionError, match="is gone, or is not the wheel whose digest is in /trainer/wheels/flash-attn-"
    ):
        make_wheel()
    assert list_wheels() == {}
    assert notes.read_text(encoding="utf-8").count("flash-attn\n") == 1


def test_a_digest_that_cannot_be_asked_for_is_no_reason_to_compile(make, aws, notes):
    folder = f"s3://{aws.make_bucket('denied')}/cache"
    compiler = COMPILING_MAKE.format(make=call("which", "make").strip(), notes=notes)
    with pytest.raises(AssertionError, match="AccessDenied"):
        make(
            "flash-attn-cached",
            f"CACHE_FOLDER={folder}",
            *DIGESTS,
            make=compiler,
            aws="#!/bin/bash\necho AccessDeniedException >&2\nexit 254\n",
        )
    assert not notes.exists()


def test_the_compiler_gets_the_builds_options(make, aws, notes):
    folder = f"s3://{aws.make_bucket('options')}/cache"
    compiler = COMPILING_MAKE.format(make=call("which", "make").strip(), notes=notes)
    make("flash-attn-cached", f"CACHE_FOLDER={folder}", *DIGESTS, "BUILD_OPTIONS=--build-arg MAX_JOBS=4", make=compiler)
    assert "--build-arg MAX_JOBS=4 --build-arg FLASH_ATTN_CUDA_ARCHS=80;90;100;120" in notes.read_text("utf-8")


@pytest.fixture
def gates(make, tmp_path, osv):
    """Runs `make gates` on an image whose bill names one package, under this licence."""

    def run_gates(license_name):
        package = {"name": "planted", "version": "1.0", "purl": "pkg:pypi/planted@1.0"}
        licenses = [{"license": {"name": license_name}}] if license_name else []
        bill = {"components": [{**package, "licenses": licenses}]}
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


def test_the_gates_stop_a_package_that_tells_no_licence(gates):
    with pytest.raises(AssertionError, match=r"planted .* UNKNOWN"):
        gates(None)


@pytest.fixture
def push(make, checkout, docker, registry, tmp_path):
    """Builds an image of this content as one of the revision, and pushes it; what the next stage would learn of it."""
    name, repository = "llm-trainer-test-push", f"{registry.address}/{REPOSITORY}"
    folder = tmp_path / "image"
    folder.mkdir()

    def push_image(content, revision):
        (folder / "Dockerfile").write_text(LABELLED.format(revision=revision, version=VERSION), encoding="utf-8")
        (folder / "content").write_text(content, encoding="utf-8")
        image = f"{name}:{uuid.uuid4().hex}"
        call(docker, "build", "--quiet", "--tag", image, folder)
        make("push", f"IMAGE={image}", "VARIANT=cpu", f"REPOSITORY={repository}", f"DOCKER={docker}")
        return json.loads((checkout.folder / "build/image.json").read_text(encoding="utf-8"))

    yield push_image
    remove_images(docker, name)
    remove_images(docker, repository)


@pytest.fixture
def commit(checkout):
    """Makes a commit that no other test has, perhaps a release; its revision."""

    def make_commit(release=False):
        checkout.git("commit", "--quiet", "--allow-empty", "--message", uuid.uuid4().hex)
        if release:
            checkout.git("tag", "--force", f"v{VERSION}")
        return checkout.revision

    return make_commit


def test_a_commit_has_to_be_there_for_a_push(push):
    with pytest.raises(AssertionError, match="commit first"):
        push("of nobody knows what", "unknown")


def test_a_commit_that_is_built_again_stays_what_it_was(push, commit, registry):
    revision = commit()
    first = push("first", revision)
    commit_of_another = push("another", commit())
    assert registry.find_digest(REPOSITORY, "cpu") == commit_of_another["digest"]
    assert push("built again", revision) == first
    assert registry.count_pushes(REPOSITORY, f"{revision}-cpu") == 1
    for tag in (f"{revision}-cpu", "cpu"):
        assert registry.find_digest(REPOSITORY, tag) == first["digest"]


def test_a_version_names_one_commit_for_good(push, commit, checkout, registry):
    revision = commit()
    first = push("first", revision)
    checkout.git("tag", f"v{VERSION}")
    tagged = push("built again, as a release", revision)
    assert (tagged["digest"], tagged["tags"]) == (first["digest"], f"{revision}-cpu {VERSION}-cpu cpu")
    assert push("and again", revision) == tagged
    later = commit(release=True)
    with pytest.raises(AssertionError, match=rf"{VERSION}-cpu is .* of another commit, and never moves"):
        push("later", later)
    assert registry.count_pushes(REPOSITORY, f"{VERSION}-cpu") == 1
    assert registry.find_digest(REPOSITORY, "cpu") == first["digest"]
    assert f"{later}-cpu" not in registry.list_tags(REPOSITORY)
