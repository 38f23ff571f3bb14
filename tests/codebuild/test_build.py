# SPDX-License-Identifier: Apache-2.0
"""buildspec.yml, executed: the cpu variant is built, tested and pushed, and what was pushed is pulled and runs."""

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass

import pytest

from support.checkout import SOURCE, Checkout, call, read_version, remove_images
from support.codebuild import FAILED, SUCCEEDED, Build, run_buildspec
from support.secrets_in_layers import find_secrets

pytestmark = pytest.mark.timeout(1800)  # of which building, pushing and pulling two gigabytes take most

VERSION = read_version()
# A build secret's password. An index at such an address answers nothing, and pip goes on to the next one.
MARKER = "marker-of-a-build-secret-5f2d"
# `make lint lock-check` and all unit tests take long, and CI runs them beside this: left out unless WHOLE is set.
UNIT_TESTS = "tests/unit/config/test_environment.py"
SHORTER_MAKE = """#!/bin/bash
for goal; do shift; case $goal in lint | lock-check) ;; *) set -- "$@" "$goal" ;; esac; done
[ $# = 0 ] || exec %s "$@"
"""


@dataclass
class Run:
    build: Build
    checkout: Checkout
    repository: str  # without its registry

    def read_json(self, name):
        return json.loads((self.build.artifacts / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shortened(tools, tmp_path_factory):
    """Variables with which a build does not repeat all that CI does."""
    if os.environ.get("WHOLE"):
        return tools
    folder = tmp_path_factory.mktemp("bin")
    (folder / "make").write_text(SHORTER_MAKE % shutil.which("make"), encoding="utf-8")
    (folder / "make").chmod(0o755)
    return {"PATH": f"{folder}:{tools['PATH']}", "UNIT_TESTS": UNIT_TESTS}


@pytest.fixture(scope="module")
def base():
    return call(SOURCE / "tests/image/engine.sh", "base", "cpu").splitlines()[-1]


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """pip's settings for a private index."""
    file = tmp_path_factory.mktemp("secret") / "pip.conf"
    file.write_text(
        f"[global]\nretries = 1\nextra-index-url = http://me:{MARKER}@127.0.0.1:9/simple\n", encoding="utf-8"
    )
    return file


@pytest.fixture(scope="module")
def start_build(registry, docker, base, secret, shortened, tmp_path_factory):
    """Builds a checkout into a repository; what that tags on this machine goes away at the end."""
    repositories = []

    def start(checkout, repository, osv_url):
        repositories.append(repository)
        variables = {
            **shortened,
            "BASE_IMAGE": base,
            "BUILD_OPTIONS": f"--secret id=pip.conf,src={secret}",
            "DOCKER": docker,
            "IMAGE": f"{repository}:built",
            "OSV_URL": osv_url,
            "PYTHONPATH": str(checkout.folder / "code"),
            "REPOSITORY": f"{registry.address}/{repository}",
            "VARIANT": "cpu",
        }
        output = tmp_path_factory.mktemp("codebuild") / "output"
        return Run(run_buildspec(checkout.folder, output, variables, checkout.revision), checkout, repository)

    yield start
    for repository in repositories:
        remove_images(docker, repository)
        remove_images(docker, f"{registry.address}/{repository}")


@pytest.fixture(scope="module")
def pushed(make_checkout, start_build, osv_server):
    """A build of HEAD, which a tag names as the version."""
    checkout = make_checkout()
    checkout.git("tag", "--annotate", f"v{VERSION}", "--message", "The version")
    run = start_build(checkout, "trainer", osv_server.url)
    print(run.build.log.read_text(encoding="utf-8"))
    return run


def test_all_phases_succeed(pushed):
    assert pushed.build.failed_commands == []
    assert pushed.build.phases == dict.fromkeys(("install", "pre_build", "build"), SUCCEEDED)


def test_the_next_stage_learns_what_was_pushed(pushed, registry):
    digest = registry.find_digest("trainer", "cpu")
    assert pushed.build.exported == {
        "IMAGE_URI": f"{registry.address}/trainer@{digest}",
        "IMAGE_DIGEST": digest,
        "IMAGE_REVISION": pushed.checkout.revision,
    }
    assert pushed.read_json("image.json") == {
        "uri": f"{registry.address}/trainer@{digest}",
        "digest": digest,
        "revision": pushed.checkout.revision,
        "version": VERSION,
        "tags": f"{pushed.checkout.revision}-cpu {VERSION}-cpu cpu",
    }


def test_revision_and_version_name_the_image_for_good(pushed, registry):
    tags = {f"{pushed.checkout.revision}-cpu", f"{VERSION}-cpu", "cpu"}
    assert registry.list_tags("trainer") == {*tags, "cache-cpu", "cache-cpu-builder"}
    assert len({registry.find_digest("trainer", tag) for tag in tags}) == 1


@pytest.mark.parametrize("name", ["unit.xml", "smoke.xml"])
def test_the_tests_are_reported(pushed, name):
    (suite,) = ET.parse(pushed.build.reports / name).getroot().iter("testsuite")
    assert int(suite.get("tests")) > int(suite.get("skipped"))
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")


def test_the_bill_and_the_licences_are_kept(pushed, osv_server):
    bill = pushed.read_json("sbom.cdx.json")
    python = [entry["name"] for entry in bill["components"] if entry["purl"].startswith("pkg:pypi/")]
    licenses = (pushed.build.artifacts / "licenses.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line.split()[0] for line in licenses[:-1]) == sorted(python)
    asked: dict[str, set[str]] = defaultdict(set)
    for query in osv_server.asked:
        asked[query["package"]["ecosystem"]].add(query["package"]["name"])
    assert asked.keys() == {"PyPI", "npm", "Debian:12"}
    assert asked["PyPI"] == set(python)
    assert {"glibc", "openssl", "zlib"} <= asked["Debian:12"]  # by their sources' names


def test_the_build_says_that_it_needs_no_login_and_no_wheel(pushed, registry):
    log = pushed.build.log.read_text(encoding="utf-8")
    assert f"{registry.address}/trainer is not in ECR: no login" in log
    assert "The cpu variant has no flash-attn." in log


def test_a_smoke_test_that_fails_stops_the_push(make_checkout, start_build, osv_server, registry):
    checkout = make_checkout()
    checkout.commit("code/llm_trainer/train.py", "\ndef ", '\nraise ImportError("planted")\n\n\ndef ')
    run = start_build(checkout, "broken", osv_server.url)
    assert [command.split()[:2] for command in run.build.failed_commands] == [["make", "smoke"]]
    assert run.build.phases == {"install": SUCCEEDED, "pre_build": SUCCEEDED, "build": FAILED}
    assert registry.list_tags("broken") == set()
    assert not (run.build.artifacts / "image.json").exists()
    assert "planted" in (run.build.reports / "smoke.xml").read_text(encoding="utf-8")


PLANTED = """FROM {image}
USER root
RUN echo machine pypi.example login me password mine > /root/.netrc
RUN rm /root/.netrc
ARG TOKEN
RUN test $TOKEN
"""
FOUND = re.compile(r"root/\.netrc: .*|[0-9a-f]{64}[./]json: a token of the Hugging Face Hub")


@pytest.fixture(scope="module")
def secrets(pushed, docker, tmp_path_factory):
    """What is found in all layers and the history of an image with two planted secrets on top of ours."""
    (folder := tmp_path_factory.mktemp("planted")).joinpath("Dockerfile").write_text(
        PLANTED.format(image="trainer:built"), encoding="utf-8"
    )
    call(docker, "build", "--quiet", "--tag", "trainer:planted", "--build-arg", f"TOKEN=hf_{'a' * 34}", folder)
    try:
        return find_secrets(docker, "trainer:planted", [MARKER.encode()])
    finally:
        call(docker, "rmi", "trainer:planted")


def test_a_secret_is_found_in_a_layer_and_in_the_history(secrets):
    assert any(line.startswith("root/.netrc: ") for line in secrets)
    assert any(line.endswith(".json: a token of the Hugging Face Hub") for line in secrets)


def test_no_secret_is_in_our_layers_and_history(secrets):
    assert [line for line in secrets if not FOUND.fullmatch(line)] == []


# Without a cache, as only the steps that run are given the secret; and up to `builder`, which push-cache pushes too.
def test_a_build_secret_reaches_pip_and_no_layer(make_checkout, docker, base, secret):
    options = f"--no-cache --target builder --secret id=pip.conf,src={secret}"
    settings = ["VARIANT=cpu", "IMAGE=trainer-cold", f"BASE_IMAGE={base}", f"DOCKER={docker}"]
    output = call("make", "image", *settings, f"BUILD_OPTIONS={options}", cwd=make_checkout().folder)
    try:
        in_every_venv = b"include-system-site-packages"
        found = find_secrets(docker, "trainer-cold:cpu", [MARKER.encode(), in_every_venv])
    finally:
        remove_images(docker, "trainer-cold")
    assert "http://me:****@127.0.0.1:9/simple" in output
    assert MARKER not in output
    told = {line.partition(": ")[2] for line in found if "the build's secret" in line}
    assert told == {f"the build's secret {in_every_venv.decode()}"}


# The last, as it removes the image that the build has left on this machine.
def test_what_was_pushed_is_pulled_by_its_digest_and_runs(pushed, docker, registry):
    uri = pushed.build.exported["IMAGE_URI"]
    for repository in ("trainer", f"{registry.address}/trainer"):
        remove_images(docker, repository)
    assert subprocess.run([docker, "image", "inspect", uri], capture_output=True).returncode != 0
    call(docker, "pull", "--quiet", uri)
    smoke = ["make", "smoke", "VARIANT=cpu", f"IMAGE={uri}", f"DOCKER={docker}"]
    output = call(*smoke, cwd=pushed.checkout.folder)
    assert "2 passed" in output
