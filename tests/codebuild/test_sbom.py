# SPDX-License-Identifier: Apache-2.0
"""docker/sbom.py lists what lies in a file system: packages with their sources, bundled scripts, wheels' digests."""

import hashlib
import json
import subprocess
import sys

import pytest

from support.checkout import SOURCE

DIGEST = "ab" * 32
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc (2.36-9)
Version: 2.36-9+b1

Package: bash
Status: install ok installed
Architecture: amd64
Version: 5.2-1

Package: libnccl-ofi
Status: install ok installed
Architecture: amd64
Source: aws-ofi-nccl
Version: 1.20.0-1

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""
EFA_PACKAGES = f"""# EFA installer version: 1.49.0
# EFA installer SHA-256: {DIGEST}
# Packages installed:
libnccl-ofi_1.20.0-1_amd64
"""


@pytest.fixture
def components(tmp_path):
    site = tmp_path / "opt/llm-trainer/venv/lib/python3.11/site-packages"
    for path, text in {
        "var/lib/dpkg/status": STATUS,
        "opt/amazon/efa_installed_packages": EFA_PACKAGES,
        "usr/share/doc/libnccl-ofi/copyright": "License: Apache-2.0 or GPL-2 \n",
        "etc/os-release": 'ID=debian\nVERSION_ID="12"\n',
        f"{site}/flash_attn-2.8.3.dist-info/METADATA": "Name: flash-attn\nVersion: 2.8.3\n",
        f"{site}/flash_attn-2.8.3.dist-info/direct_url.json": json.dumps(
            {"url": "file:///mnt/wheel.whl", "archive_info": {"hashes": {"sha256": DIGEST}}}
        ),
        f"{site}/plain-1.dist-info/METADATA": "Name: plain\nVersion: 1\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assets = site / "llm_trainer/report/assets"
    assets.mkdir(parents=True)
    for name in ("README.md", "echarts.min.js"):
        (assets / name).symlink_to(SOURCE / "code/llm_trainer/report/assets" / name)
    lock = SOURCE / "docker/requirements/flash-attn.txt"
    command = [sys.executable, SOURCE / "docker/sbom.py", tmp_path, lock, "base@sha256:0", "1.0"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {component["name"]: component for component in json.loads(printed)["components"]}


def test_every_package_is_there(components):
    assert components.keys() == {"libc6", "bash", "libnccl-ofi", "flash-attn", "plain", "echarts"}


def test_a_package_of_the_distribution_tells_its_source(components):
    distro = "arch=amd64&distro=debian-12"
    assert components["libc6"]["purl"] == f"pkg:deb/debian/libc6@2.36-9%2Bb1?{distro}&upstream=glibc%402.36-9"
    assert components["bash"]["purl"].endswith("&upstream=bash%405.2-1")


def test_a_package_of_the_efa_installer_tells_the_installer_and_its_licence(components):
    plugin = components["libnccl-ofi"]
    assert plugin["purl"].startswith("pkg:deb/amazon/libnccl-ofi@1.20.0-1?")
    assert plugin["licenses"] == [{"license": {"name": "Apache-2.0 or GPL-2"}}]
    assert plugin["externalReferences"] == [
        {
            "hashes": [{"alg": "SHA-256", "content": DIGEST}],
            "type": "distribution",
            "url": "https://efa-installer.amazonaws.com/aws-efa-installer-1.49.0.tar.gz",
        }
    ]
    assert "externalReferences" not in components["bash"]


def test_a_wheel_that_came_as_a_file_has_its_digest(components):
    assert components["flash-attn"]["hashes"] == [{"alg": "SHA-256", "content": DIGEST}]
    assert "hashes" not in components["plain"]


def test_a_bundled_script_has_version_and_digest(components):
    script = SOURCE / "code/llm_trainer/report/assets/echarts.min.js"
    echarts = components["echarts"]
    assert echarts["purl"] == "pkg:npm/echarts@6.1.0"
    assert echarts["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert echarts["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(script.read_bytes()).hexdigest()}]
