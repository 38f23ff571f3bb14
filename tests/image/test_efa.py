# SPDX-License-Identifier: Apache-2.0
"""EFA's libraries come into the image out of AWS's installer, of one digest, and nothing else of it does.

The installer stands in by one of its layout, whose packages hold a library of Python's under their names.
"""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
BASE = "llm-trainer-test-efa"
MAKE_INSTALLER = r"""
set -euo pipefail
. /etc/os-release
library=$(ls /usr/lib/python3*/lib-dynload/_json*.so | head -1)
packages=/tmp/aws-efa-installer/DEBS/${ID^^}${VERSION_ID//./}/$(uname -m)
mkdir -p $packages/rdma-core $packages/efa-driver
machine=$(dpkg --print-architecture)
pack() { # pack FOLDER NAME VERSION DEPENDS [FILE...]
  local folder=$1 name=$2 version=$3 depends=$4 root=/tmp/root
  shift 4
  rm -rf $root
  mkdir -p $root/DEBIAN $root/usr/share/doc/$name
  echo "License: BSD-2-clause or GPL-2" >$root/usr/share/doc/$name/copyright
  for file in "$@"; do
    mkdir -p "$root$(dirname $file)"
    if [[ $file = *.so* ]]; then cp $library $root$file; else echo "#!/bin/sh" >$root$file; chmod +x $root$file; fi
  done
  printf '%s\n' "Package: $name" "Version: $version" "Architecture: $machine" "Maintainer: A test <a@example.com>" \
    "Depends: $depends" "Description: stands in" >$root/DEBIAN/control
  dpkg-deb --root-owner-group --build $root $packages/$folder/${name}_${version}_$machine.deb >/dev/null
}
pack rdma-core libibverbs1 63.0-1 "libc6, libnl-3-200" /usr/lib/libibverbs.so.1
pack rdma-core ibverbs-providers 63.0-1 "libibverbs1 (>= 34)" /usr/lib/libibverbs/libefa-rdmav59.so
pack rdma-core ibverbs-utils 63.0-1 libibverbs1 /usr/bin/ibv_devinfo
pack . libfabric1-aws 2.4.0amzn5.0 "ibverbs-providers (>= 59), libibverbs1 (>= 36)" /opt/amazon/efa/lib/libfabric.so.1
pack . libfabric-aws-bin 2.4.0amzn5.0 libfabric1-aws /opt/amazon/efa/bin/fi_info
pack . libfabric-aws-dev 2.4.0amzn5.0 libfabric1-aws /opt/amazon/efa/lib/libfabric.so
pack . libnccl-ofi 1.20.0-1 libc6 ${PLUGIN_DIR}/libnccl-net.so ${PLUGIN_DIR}/libnccl-tuner-ofi.so
pack . libnccl-ofi-ngc-v3 1.20.0-1 libc6 /opt/amazon/ofi-nccl/lib/libnccl-net-ofi.so
pack . openmpi40-aws 4.1.7-2 libc6 /opt/amazon/openmpi/lib/libmpi.so.40
pack . efa-config 1.19 libc6 /opt/amazon/bin/efa-hugepages-reserve.sh
pack efa-driver efa 3.0.0-1.amzn1 dkms /usr/src/efa/dkms.conf
tar --directory /tmp --create --gzip --file /out/aws-efa-installer-1.49.0.tar.gz aws-efa-installer
"""
CHOSEN = ["libibverbs1", "ibverbs-providers", "libfabric1-aws", "libfabric-aws-bin", "libnccl-ofi"]

LEFT_ASIDE = {"ibverbs-utils", "libfabric-aws-dev", "libnccl-ofi-ngc-v3", "openmpi40-aws", "efa-config", "efa"}


@pytest.fixture(scope="module")
def build(image, tmp_path_factory):
    """Builds the stage with EFA's libraries out of an installer whose plugin lies in a folder; its image's name."""
    base = subprocess.run(
        ["tests/image/engine.sh", "base", image.variant], cwd=SOURCE, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()[-1]
    built = []

    def build_stage(plugin_dir="/opt/amazon/ofi-nccl/lib", digest=None, tarballs=1):
        context = tmp_path_factory.mktemp("context")
        folder = context / "docker/efa"
        folder.mkdir(parents=True)
        for name in ("Dockerfile", "efa.sh"):
            (context / "docker" / name).hardlink_to(SOURCE / "docker" / name)
        image.run_bash(MAKE_INSTALLER, options=[f"--volume={folder}:/out", f"--env=PLUGIN_DIR={plugin_dir}"])
        (tarball,) = folder.iterdir()
        for number in range(1, tarballs):
            (folder / f"{number}.tar.gz").hardlink_to(tarball)
        name = f"{BASE}:{len(built)}"
        built.append(name)
        words = [f"VARIANT={image.variant}", f"BASE_IMAGE={base}", "EFA=folder"]
        words.append(f"EFA_SHA256={digest or hashlib.sha256(tarball.read_bytes()).hexdigest()}")
        command = [image.docker, "build", "--file", context / "docker/Dockerfile", "--target", "fabric", "--tag", name]
        command += [option for word in words for option in ("--build-arg", word)]
        result = subprocess.run(
            [*command, "--progress=plain", context],
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return name if result.returncode == 0 else result.stdout

    yield build_stage
    subprocess.run([image.docker, "image", "rm", "--force", *built], check=False, capture_output=True)


@pytest.fixture(scope="module")
def run(build, image):
    """Runs a shell script where EFA's libraries are; what it prints."""
    name = build()

    def run_script(script):
        command = [image.docker, "run", "--rm", "--entrypoint=/bin/bash", name, "-c", script]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
        return result.stdout

    return run_script


def test_another_digest_is_refused_with_a_sentence(build):
    told = build(digest="0" * 64)
    assert f"and EFA_SHA256 is {'0' * 64}: take the installer of that digest" in told


def test_two_installers_are_refused(build):
    assert "docker/efa holds 2 tarballs: leave one there." in build(tarballs=2)


def test_the_loader_finds_plugin_and_libfabric_as_nccl_would(run):
    run('python3 -c \'import ctypes; ctypes.CDLL("libnccl-net.so"); ctypes.CDLL("libfabric.so.1")\'')
    assert "/opt/amazon/ofi-nccl/lib/libnccl-net.so" in run("ldconfig -p")


def test_a_plugin_of_the_older_layout_is_found_too(build, image):
    name = build(plugin_dir="/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu")
    command = [image.docker, "run", "--rm", "--entrypoint=python3", name, "-c"]
    subprocess.run([*command, "import ctypes; ctypes.CDLL('libnccl-net.so')"], check=True)


def test_of_the_installer_only_that_is_there_and_the_list_says_so(run):
    listed = [line.split("_")[0] for line in run("grep -v '#' /opt/amazon/efa_installed_packages").splitlines()]
    assert listed == CHOSEN
    installed = set(run("dpkg-query --show --showformat '${Package}\\n'").split())
    assert installed >= {*CHOSEN, "libnl-3-200", "libhwloc15"}
    assert not installed & LEFT_ASIDE
    assert run("ls /var/lib/apt/lists /var/log") == "/var/lib/apt/lists:\n\n/var/log:\n"


def test_its_licences_are_there_though_the_base_keeps_no_documents(run):
    assert run("cd /usr/share/doc && ls " + " ".join(f"{name}/copyright" for name in CHOSEN)).split() == sorted(
        f"{name}/copyright" for name in CHOSEN
    )
