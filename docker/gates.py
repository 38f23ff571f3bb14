# SPDX-License-Identifier: Apache-2.0
"""Whether an image may be pushed, by its bill of materials: licences, and known vulnerabilities.

Vulnerabilities are those that OSV knows (osv.dev): for Python by pip-audit, for the packages of Debian and Ubuntu and
for what we bundle from npm by a question for each. A distribution knows of many that it has not mended: these are told,
and stop nothing, as no version could be taken instead.

    gates.py licenses SBOM [RULES]
    gates.py vulnerabilities SBOM [RULES] [--osv-url URL]

RULES is supply_chain.toml beside this file. Prints what it found, a line each; the exit code is 1 if the image may not
be pushed, 2 if that could not be found out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import requests
from requests.adapters import HTTPAdapter, Retry

RULES = Path(__file__).with_name("supply_chain.toml")
OSV_URL = "https://api.osv.dev/v1/query"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gate", choices=["licenses", "vulnerabilities"])
    parser.add_argument("sbom", type=Path)
    parser.add_argument("rules", type=Path, nargs="?", default=RULES)
    parser.add_argument("--osv-url", default=OSV_URL, help="where to ask for vulnerabilities (default: %(default)s)")
    asked = parser.parse_args()
    components = json.loads(asked.sbom.read_text(encoding="utf-8"))["components"]
    packages = [component for component in components if component["purl"].startswith("pkg:pypi/")]
    others = [component for component in components if component["purl"].startswith(("pkg:deb/", "pkg:npm/"))]
    rules = tomllib.loads(asked.rules.read_text(encoding="utf-8"))
    if asked.gate == "licenses":
        return judge_licenses(packages, rules["licenses"])
    try:
        audited = audit(packages, asked.osv_url) + audit_others(others, asked.osv_url)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        print(f"The vulnerabilities could not be asked for at {asked.osv_url}: {error}", file=sys.stderr)
        return 2
    return judge_vulnerabilities(audited, rules.get("vulnerabilities", []))


def judge_licenses(packages: list[dict[str, Any]], rules: dict[str, Any]) -> int:
    """A package that tells no licence needs one that the rules name."""
    named = {entry["package"]: entry for entry in rules.get("named", [])}
    problems = 0
    for package in packages:
        license_name, verdict = read_license(package), "ok"
        if not license_name and package["name"] in named:
            entry = named[package["name"]]
            license_name, verdict = entry["license"], "ok: named" if entry.get("reason") else "NAMED WITHOUT A REASON"
        if not license_name:
            license_name, verdict = "unknown", "UNKNOWN: name it in supply_chain.toml"
        elif word := next((word for word in rules["denied"] if word.lower() in license_name.lower()), None):
            verdict = f"DENIED ({word})"
        problems += not verdict.startswith("ok")
        print(f"{package['name']:44} {package['version']:20} {license_name[:60]:60} {verdict}")
    print(f"{len(packages)} packages, {problems} with a licence that supply_chain.toml does not let through.")
    return int(problems > 0)


def read_license(package: dict[str, Any]) -> str:
    """Empty where the package tells none."""
    return ", ".join(
        entry.get("expression") or entry["license"].get("id") or entry["license"]["name"]
        for entry in package.get("licenses", [])
    )


def audit(packages: list[dict[str, Any]], osv_url: str) -> list[dict[str, Any]]:
    """pip-audit's word on each package. Raises ValueError where it has none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        # Without the local part of a version, such as torch's +cpu, which advisories do not know.
        file.writelines(f"{package['name']}=={package['version'].partition('+')[0]}\n" for package in packages)
        file.flush()
        command = [sys.executable, "-P", "-m", "pip_audit", "--requirement", file.name, "--disable-pip", "--no-deps"]
        command += ["--vulnerability-service", "osv", "--osv-url", osv_url, "--format", "json"]
        command += ["--progress-spinner", "off"]
        run = subprocess.run(command, capture_output=True, text=True)
    if not run.stdout:
        raise ValueError(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "pip-audit said nothing")
    return json.loads(run.stdout)["dependencies"]


def audit_others(components: list[dict[str, Any]], osv_url: str) -> list[dict[str, Any]]:
    """OSV's word on each package that is not Python's, as pip-audit gives it. Raises OSError or ValueError."""
    packages = sorted({read_package(component) for component in components})
    busy = Retry(3, backoff_factor=1, status_forcelist=(429, 502, 503, 504), allowed_methods=None)
    session = requests.Session()
    session.mount("https://", HTTPAdapter(max_retries=busy))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda package: list(ask_osv(session, osv_url, package)), packages))
    return [
        {
            "ecosystem": ecosystem,
            "name": name,
            "version": version,
            "vulns": [describe_advisory(advisory, ecosystem, name) for advisory in advisories],
        }
        for (ecosystem, name, version), advisories in zip(packages, found, strict=True)
    ]


def read_package(component: dict[str, Any]) -> tuple[str, str, str]:
    """OSV's ecosystem, and the name and version it knows there: a distribution's are those of the source package."""
    address = urlsplit(component["purl"])
    if address.path.startswith("npm/"):
        return "npm", component["name"], component["version"]
    qualifiers = dict(parse_qsl(address.query))
    name, _, version = qualifiers["upstream"].partition("@")
    distribution, _, release = qualifiers["distro"].partition("-")
    if distribution == "ubuntu":
        year, _, month = release.partition(".")
        return f"Ubuntu:{release}" + (":LTS" if month == "04" and int(year) % 2 == 0 else ""), name, version
    return f"{distribution.capitalize()}:{release}", name, version


def ask_osv(session: requests.Session, osv_url: str, package: tuple[str, str, str]) -> Iterator[dict[str, Any]]:
    """Yield the advisories that a package's version is subject to, page by page."""
    ecosystem, name, version = package
    query: dict[str, Any] = {"package": {"ecosystem": ecosystem, "name": name}, "version": version}
    while True:
        answer = session.post(osv_url, json=query, timeout=60)
        answer.raise_for_status()
        page = answer.json()
        yield from (advisory for advisory in page.get("vulns", []) if "withdrawn" not in advisory)
        if not page.get("next_page_token"):
            return
        query["page_token"] = page["next_page_token"]


def describe_advisory(advisory: dict[str, Any], ecosystem: str, name: str) -> dict[str, Any]:
    """An advisory as pip-audit describes it. `fix_versions` are those of this release of the distribution."""
    fixes = {
        event["fixed"]
        for affected in advisory.get("affected", [])
        if (affected["package"]["ecosystem"], affected["package"]["name"]) == (ecosystem, name)
        for span in affected.get("ranges", [])
        for event in span.get("events", [])
        if event.get("fixed")
    }
    names = [*advisory.get("aliases", []), *advisory.get("upstream", [])]
    return {"id": advisory["id"], "aliases": names, "fix_versions": sorted(fixes)}


def judge_vulnerabilities(audited: list[dict[str, Any]], allowed: list[dict[str, Any]]) -> int:
    problems = list(find_expired(allowed))
    open_ids = {entry["id"] for entry in allowed}
    found, unmended = set(), []
    for package in audited:
        for vulnerability in package.get("vulns", []):
            names = {vulnerability["id"], *vulnerability.get("aliases", [])}
            found |= names
            fixes = ", ".join(vulnerability["fix_versions"])
            text = (
                f"{package['name']} {package['version']}: {vulnerability['id']}, mended in {fixes or 'no release yet'}"
            )
            if names & open_ids:
                print(f"allowed: {text}")
            elif not fixes and is_of_distribution(package):
                unmended.append(f"{package['name']}: {vulnerability['id']}")
            else:
                problems.append(f"{text}: {name_way_out(package)}, or allow it in supply_chain.toml.")
        if "skip_reason" in package:
            problems.append(f"{package['name']} was not audited: {package['skip_reason']}.")
    for entry in allowed:
        if entry["id"] not in found:
            print(f"not needed any more: {entry['id']} in supply_chain.toml")
    if unmended:
        print(f"not mended by the distribution yet, {len(unmended)}: {', '.join(unmended)}")
    for problem in problems:
        print(problem)
    print(f"{len(audited)} packages audited, {len(problems)} problems.")
    return int(bool(problems))


def is_of_distribution(package: dict[str, Any]) -> bool:
    return ":" in package.get("ecosystem", "")


def name_way_out(package: dict[str, Any]) -> str:
    if is_of_distribution(package):
        return "build again without cached layers (BUILD_OPTIONS=--no-cache)"
    if package.get("ecosystem") == "npm":
        return "renew it in code/llm_trainer/report/assets"
    return "raise the pin and run `make lock`"


def find_expired(allowed: list[dict[str, Any]]) -> Iterator[str]:
    today = datetime.now(UTC).date()
    for entry in allowed:
        if not entry.get("reason"):
            yield f"supply_chain.toml allows {entry['id']} without a reason: give one."
        if entry["expires"] < today:
            yield f"supply_chain.toml allowed {entry['id']} until {entry['expires']}: mend it, or allow it for longer."


if __name__ == "__main__":
    sys.exit(main())
