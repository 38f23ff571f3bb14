#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what NCCL needs for EFA out of AWS's EFA installer: libfabric, the plugin aws-ofi-nccl, and the verbs libraries
# that libfabric stands on. No MPI, no kernel module, no limits. The Dockerfile runs it.
#   efa.sh FOLDER VERSION SHA256     FOLDER holds the installer's tarball, or none: then nothing is installed
set -euo pipefail
shopt -s nullglob
version=$2 digest=$3
tarballs=("$1"/*.tar.gz)

fail() { echo "efa.sh: $*" >&2; exit 1; }

[ ${#tarballs[@]} -gt 0 ] || exit 0
[ ${#tarballs[@]} -eq 1 ] || fail "docker/efa holds ${#tarballs[@]} tarballs: leave one there."
read -r found _ < <(sha256sum "${tarballs[0]}")
[ "$found" = "$digest" ] || fail "$(basename "${tarballs[0]}") has the SHA-256 $found, and EFA_SHA256 is $digest: take the" \
  "installer of that digest, or give the version and the digest of yours as EFA_VERSION and EFA_SHA256."

# shellcheck source=/dev/null
platform=$(. /etc/os-release && echo "${ID^^}${VERSION_ID//./}")
packages=aws-efa-installer/DEBS/$platform/$(uname -m)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar --extract --file "${tarballs[0]}" --directory "$work" --no-same-owner "$packages" 2>/dev/null \
  || fail "the EFA installer $version has no packages for this base: there is no $packages in it."
cd "$work/$packages"
chosen=(rdma-core/{libibverbs1,ibverbs-providers}_*.deb {libfabric1-aws,libfabric-aws-bin,libnccl-ofi}_*.deb)
[ ${#chosen[@]} -eq 5 ] || fail "the EFA installer $version has other packages than those that are known: ${chosen[*]}."

# aws-ofi-nccl's package does not say that it needs hwloc. Bases leave documents out, and licences have to stay.
apt-get update
apt-get install --yes --no-install-recommends --option 'Dpkg::Options::=--path-include=/usr/share/doc/*/copyright' \
  libhwloc15 "${chosen[@]/#/./}"
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

# NCCL asks the loader for libnccl-net.so: its folder differs between releases of the plugin.
plugin=$(find /opt/amazon/ofi-nccl -name libnccl-net.so)
[ -n "$plugin" ] || fail "the plugin of the EFA installer $version has no libnccl-net.so."
printf '%s\n' /opt/amazon/efa/lib "$(dirname "$plugin")" >/etc/ld.so.conf.d/efa.conf
ldconfig
rm -rf /var/cache/ldconfig/*
# The driver brings libcuda. Whatever else is missing would leave NCCL without its plugin, and it would not say so.
missing=$(ldd "$plugin" | awk '/not found/ && $1 !~ /^libcuda\./ { print $1 }')
[ -z "$missing" ] || fail "$plugin needs what is not in the image: $missing."

# In the form of AWS's own installer, which tools look for. The bill of materials reads it, too.
{
  echo "# EFA installer version: $version"
  echo "# EFA installer SHA-256: $digest"
  echo "# Packages installed:"
  basename --suffix .deb "${chosen[@]}"
} >/opt/amazon/efa_installed_packages
