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


def test_the_bill_tells_which_packages_are_of_the_efa_installer(image, bill):
    listed = image.run_bash("grep -v '#' /opt/amazon/efa_installed_packages 2>/dev/null || true").split()
    told = [component["name"] for component in bill["components"] if component["purl"].startswith("pkg:deb/amazon/")]
    assert sorted(told) == sorted(name.split("_")[0] for name in listed)


def test_the_bill_lists_the_reports_scripts(image, bill):
    names = image.run_bash("cd /opt/llm-trainer/venv/lib/python3*/site-packages/llm_trainer && find . -name '*.min.js'")
    assert [f"{name}.min.js" for name in list_components(bill, "npm")] == [
        name.rpartition("/")[2] for name in sorted(names.split())
    ]


def test_every_file_of_the_environment_is_as_its_package_brought_it(image):
    """By the digests that each wheel lists: nothing was added or changed that the bill does not tell."""
    script = """python - <<'END'
import base64, hashlib, importlib.metadata, os
root = os.environ["VIRTUAL_ENV"]
known = {"pyvenv.cfg", "bin/Activate.ps1", "bin/activate", "bin/activate.csh", "bin/activate.fish"}
for distribution in importlib.metadata.distributions():
    for file in distribution.files:
        path = os.path.normpath(distribution.locate_file(file))
        known.add(os.path.relpath(path, root))
        if file.hash and os.path.exists(path):
            digest = hashlib.file_digest(open(path, "rb"), file.hash.mode).digest()
            if base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
                print("changed", path)
for folder, _, names in os.walk(root):
    for path in (os.path.join(folder, name) for name in names if not name.endswith(".pyc")):
        if os.path.relpath(path, root) not in known and not os.path.islink(path):
            print("added", path)
END"""
    assert image.run_bash(script) == ""


def test_every_program_and_library_beside_it_is_of_a_package(image):
    script = r"""python3 - <<'END'
import glob, os
owned = {
    os.path.realpath(line.rstrip("\n"))
    for name in glob.glob("/var/lib/dpkg/info/*.list")
    for line in open(name)
}
skipped = ("/proc", "/sys", "/dev", "/tmp", "/opt/llm-trainer", "/var/lib/dpkg/info", "/run")
for folder, folders, names in os.walk("/"):
    folders[:] = [name for name in folders if not os.path.join(folder, name).startswith(skipped)]
    for path in (os.path.join(folder, name) for name in names):
        is_program = os.access(path, os.X_OK) or ".so" in os.path.basename(path)
        if not os.path.islink(path) and os.path.isfile(path) and is_program and os.path.realpath(path) not in owned:
            print(path)
END"""
    # Of the ld.so cache and what Docker or a stand-in base puts there: no package's, and no program.
    found = {path for path in image.run_bash(script).split() if path not in ("/etc/ld.so.cache", "/etc/ld.so.conf")}
    assert found <= {"/.dockerenv"}


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
