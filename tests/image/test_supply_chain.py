# SPDX-License-Identifier: Apache-2.0
"""What is in the image, and what an attacker would not find there."""

import json
import re
from urllib.parse import unquote

import pytest

from llm_trainer import __version__


@pytest.fixture(scope="session")
def bill(image):
    return json.loads(image.run_bash("cat /opt/llm-trainer/sbom.cdx.json"))


def list_components(bill, kind):
    purls = [component["purl"] for component in bill["components"]]
    return sorted(
        re.split(r"[@?]", unquote(purl).rpartition("/")[2])[0] for purl in purls if purl.startswith(f"pkg:{kind}/")
    )


def test_the_bill_lists_every_python_package(image, bill):
    installed = json.loads(image.run_bash("pip list --format json --disable-pip-version-check"))
    names = sorted(re.sub(r"[-_.]+", "-", package["name"]).lower() for package in installed)
    assert list_components(bill, "pypi") == names


def test_the_bill_lists_every_debian_package(image, bill):
    lines = image.run_bash("dpkg-query --show --showformat '${Package} ${db:Status-Abbrev}\\n'").splitlines()
    assert list_components(bill, "deb") == sorted(line.split()[0] for line in lines if line.split()[1] == "ii")


def test_the_bill_tells_the_image_its_version_and_its_base(bill):
    described = bill["metadata"]["component"]
    assert (described["name"], described["version"]) == ("sagemaker-llm-trainer", __version__)
    (base,) = [entry["value"] for entry in described["properties"] if entry["name"] == "base"]
    assert re.fullmatch(r".+@sha256:[0-9a-f]{64}", base)


def test_no_file_lets_a_user_become_another(image):
    assert image.run_bash("find / -xdev -type f -perm /6000") == ""


def test_only_tmp_is_writable_for_everybody(image):
    found = image.run_bash("find / -xdev \\( -type d -o -type f \\) -perm -o=w ! -path '/proc/*' ! -path '/sys/*'")
    assert [path for path in found.splitlines() if not re.match(r"/tmp(/|$)", path)] == []


def test_no_two_packages_bring_one_library(image):
    """But for Fortran's, of which the wheels of numpy and scipy each have their own."""
    script = """python - <<'END'
import hashlib, os
root, seen = "/opt/llm-trainer/venv/lib", {}
for folder, _, names in os.walk(root):
    for path in (os.path.join(folder, name) for name in names if ".so" in name):
        if not os.path.islink(path) and os.path.getsize(path) > 100_000:
            digest = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
            package = os.path.relpath(path, root).split(os.sep)[2]
            seen.setdefault(digest, {})[package] = os.path.basename(path)
for packages in seen.values():
    if len(packages) > 1:
        print(*packages.values())
END"""
    found = {name.split("-")[0] for name in image.run_bash(script).split()}
    assert found <= {"libgfortran", "libquadmath", "libopenblas64_", "libscipy_openblas"}


def test_no_secret_is_in_the_history(image):
    history = json.dumps(image.inspect())
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s\"]+:[^/\s\"]+@", history)


@pytest.mark.smoke
def test_doctor_finds_nothing_wrong(image):
    result = image.run("doctor", options=["--shm-size=8g", "--network=none"])
    assert result.returncode == 0, result.stdout
    assert "all-reduce" in result.stdout
