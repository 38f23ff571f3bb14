# SPDX-License-Identifier: Apache-2.0
"""Writes the bill of materials of an image, CycloneDX in JSON: every Python and Debian package, and what we bundle.

    sbom.py ROOT FLASH_ATTN_REQUIREMENTS BASE VERSION > sbom.cdx.json

ROOT is the image's file system, BASE the name and digest of the image below it. Nothing of it runs, and two images of
the same packages give the same bill.
"""

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

VENV = "opt/llm-trainer/venv"
LICENSES = LicenseFactory()
CLASSIFIER = "License :: OSI Approved :: "
HEADINGS = re.compile(r"^License: *(\S.*?) *$", re.MULTILINE)  # of a copyright file that machines can read (DEP-5)
EFA_INSTALLER = "https://efa-installer.amazonaws.com/aws-efa-installer-{version}.tar.gz"


def main() -> None:
    root, flash_attn, base, version = sys.argv[1:]
    bom = Bom(
        components=[
            *list_python(Path(root), Path(flash_attn)),
            *list_bundled(Path(root)),
            *list_debian(Path(root)),
        ],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, "sagemaker-llm-trainer"),
    )
    bom.metadata.timestamp = datetime.fromtimestamp(0, UTC)  # the image's label tells when
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER,
        name="sagemaker-llm-trainer",
        version=version,
        bom_ref="image",
        properties=[Property(name="base", value=base)],
    )
    print(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1))


def list_python(root: Path, flash_attn: Path) -> Iterator[Component]:
    folders = [str(folder) for folder in (root / VENV / "lib").glob("python3*/site-packages")]
    for distribution in distributions(path=folders):
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        yield Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=distribution.version,
            purl=PackageURL("pypi", None, name, distribution.version),
            bom_ref=f"pypi/{name}",
            licenses=[LICENSES.make_from_string(text) for text in find_license(distribution)],
            hashes=read_digests(distribution),
            external_references=[describe_source(flash_attn)] if name == "flash-attn" else None,
        )


def read_digests(distribution: Distribution) -> list[HashType]:
    """Digests of a wheel that came as a file, as pip noted them (PEP 610): flash-attn's and our own.

    Those of all others stand in docker/requirements/.
    """
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    digests = origin.get("archive_info", {}).get("hashes", {})
    return [HashType.from_composite_str(f"{algorithm}:{digest}") for algorithm, digest in sorted(digests.items())]


def list_bundled(root: Path) -> Iterator[Component]:
    """The scripts of others in our package, each named by the README beside it."""
    for readme in (root / VENV / "lib").glob("python3*/site-packages/llm_trainer/report/assets/README.md"):
        text = readme.read_text(encoding="utf-8")
        for script in sorted(readme.parent.glob("*.min.js")):
            name = script.name.removesuffix(".min.js")
            told = re.search(rf"^`{re.escape(script.name)}` is .*? (\d[\d.]*\d), (\S+) \(", text, re.MULTILINE)
            if told is None:
                raise ValueError(f"{readme.name} does not tell the version and the licence of {script.name}")
            digest = hashlib.sha256(script.read_bytes()).hexdigest()
            yield Component(
                type=ComponentType.LIBRARY,
                name=name,
                version=told[1],
                purl=PackageURL("npm", None, name, told[1]),
                bom_ref=f"npm/{name}",
                licenses=[LICENSES.make_from_string(told[2])],
                hashes=[HashType.from_composite_str(f"sha256:{digest}")],
            )


def find_license(distribution: Distribution) -> list[str]:
    """Its SPDX expression, or the first line of what it calls its licence, or what its classifiers say."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return [expression]
    classified = [text.removeprefix(CLASSIFIER) for text in metadata.get_all("Classifier", []) if CLASSIFIER in text]
    text = (metadata.get("License") or "").strip().partition("\n")[0]
    return classified or ([text] if text and text != "UNKNOWN" else [])


def describe_source(requirements: Path) -> ExternalReference:
    """What flash-attn's wheel was compiled from."""
    text = requirements.read_text(encoding="utf-8")
    (pin,), digests = re.findall(r"^flash-attn==(\S+)", text, re.MULTILINE), re.findall(r"sha256:(\w{64})", text)
    return ExternalReference(
        type=ExternalReferenceType.SOURCE_DISTRIBUTION,
        url=XsUri(f"https://pypi.org/project/flash-attn/{pin}/"),
        hashes=[HashType.from_composite_str(f"sha256:{digest}") for digest in digests],
    )


def find_source(fields: dict[str, str]) -> str:
    """The source package and its version, by which the distributions' advisories name what is vulnerable."""
    name, _, version = fields.get("Source", fields["Package"]).partition(" ")
    return f"{name}@{version.strip('()') or fields['Version']}"


def read_efa_installer(root: Path) -> tuple[list[str], ExternalReference | None]:
    """The names of the packages that came from AWS's EFA installer, and the installer, by what docker/efa.sh left."""
    file = root / "opt/amazon/efa_installed_packages"
    if not file.is_file():
        return [], None
    text = file.read_text(encoding="utf-8")
    version, digest = (
        re.findall(rf"^# EFA installer {word}: (\S+)$", text, re.MULTILINE)[0] for word in ("version", "SHA-256")
    )
    names = [line.partition("_")[0] for line in text.splitlines() if not line.startswith("#")]
    reference = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(EFA_INSTALLER.format(version=version)),
        hashes=[HashType.from_composite_str(f"sha256:{digest}")],
    )
    return names, reference


def list_debian(root: Path) -> Iterator[Component]:
    os_release = (root / "etc/os-release").read_text(encoding="utf-8")
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', os_release, re.MULTILINE))
    of_efa, efa_installer = read_efa_installer(root)
    for entry in (root / "var/lib/dpkg/status").read_text(encoding="utf-8").strip().split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)", entry, re.MULTILINE))
        if fields["Status"] != "install ok installed":
            continue
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
        qualifiers = {
            "arch": architecture,
            "distro": f"{release['ID']}-{release['VERSION_ID']}",
            "upstream": find_source(fields),
        }
        copyright_file = root / "usr/share/doc" / name / "copyright"
        terms = copyright_file.read_text(encoding="utf-8", errors="replace") if copyright_file.is_file() else ""
        yield Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=version,
            purl=PackageURL("deb", "amazon" if name in of_efa else release["ID"], name, version, qualifiers),
            bom_ref=f"deb/{name}:{architecture}",
            licenses=[LICENSES.make_with_name(text) for text in sorted(set(HEADINGS.findall(terms)))],
            external_references=[efa_installer] if efa_installer and name in of_efa else None,
        )


if __name__ == "__main__":
    main()
