# SPDX-License-Identifier: Apache-2.0
"""docker/gates.py stops what may not be pushed, and says what it found. The advisories come from a local OSV server."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

from support.checkout import SOURCE

ALLOWED = """
[[vulnerabilities]]
id = "{id}"
reason = "{reason}"
expires = {expires}
"""
NAMED = """
[[licenses.named]]
package = "planted"
license = "{license}"
reason = "{reason}"
"""
MIT = {"license": {"id": "MIT"}}
TODAY = datetime.now(UTC).date()


def component(name, version, kind="pypi", **more):
    return {"name": name, "version": version, "purl": f"pkg:{kind}/{name}@{version}", **more}


@pytest.fixture
def judge(tmp_path, osv):
    """Runs a gate on a bill of these components, with rules added to the project's own."""

    def run_gate(gate, *components, rules="", url=osv.url):
        (tmp_path / "sbom.json").write_text(json.dumps({"components": components}), encoding="utf-8")
        own = (SOURCE / "docker/supply_chain.toml").read_text(encoding="utf-8")
        (tmp_path / "rules.toml").write_text(own + rules, encoding="utf-8")
        command = [sys.executable, SOURCE / "docker/gates.py", gate, tmp_path / "sbom.json", tmp_path / "rules.toml"]
        return subprocess.run([*command, "--osv-url", url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run_gate


def debian(name, version, upstream, distro="debian-12"):
    purl = f"pkg:deb/{distro.partition('-')[0]}/{name}@{version}?arch=amd64&distro={distro}&upstream={quote(upstream)}"
    return {"name": name, "version": version, "purl": purl}


TORCH, HARMLESS = component("torch", "2.13.0+cpu"), component("harmless", "1.0")
LIBSSL = debian("libssl3", "3.0.15-1~deb12u1", "openssl@3.0.15-1~deb12u1")


def test_packages_without_advisories_pass(judge, osv):
    libc = debian("libc6", "2.39-0ubuntu8", "glibc@2.39-0ubuntu8", distro="ubuntu-24.04")
    echarts = component("echarts", "6.1.0", kind="npm")
    osv.asked.clear()
    result = judge(
        "vulnerabilities", TORCH, HARMLESS, LIBSSL, debian("openssl", *["openssl@3.0.15-1"] * 2), libc, echarts
    )
    assert result.returncode == 0, result.stdout
    assert "6 packages audited, 0 problems" in result.stdout
    asked = {(query["package"]["ecosystem"], query["package"]["name"], query["version"]) for query in osv.asked}
    assert asked == {
        ("PyPI", "torch", "2.13.0"),
        ("PyPI", "harmless", "1.0"),
        ("Debian:12", "openssl", "3.0.15-1~deb12u1"),
        ("Debian:12", "openssl", "3.0.15-1"),
        ("Ubuntu:24.04:LTS", "glibc", "2.39-0ubuntu8"),
        ("npm", "echarts", "6.1.0"),
    }


@pytest.mark.parametrize(
    ("planted", "ecosystem", "fixed", "way_out"),
    [
        (LIBSSL, "Debian:12", "3.0.16-1~deb12u1", "BUILD_OPTIONS=--no-cache"),
        (component("echarts", "6.1.0", kind="npm"), "npm", "6.2.0", "report/assets"),
        (component("echarts", "6.1.0", kind="npm"), "npm", None, "report/assets"),
    ],
    ids=["debian", "npm", "npm-not-mended"],
)
def test_what_is_not_pythons_stops_the_push_too(judge, osv, planted, ecosystem, fixed, way_out):
    name = "openssl" if ecosystem.startswith("Debian") else "echarts"
    osv.plant(name, "DEBIAN-CVE-2026-1", "CVE-2026-1", fixed, ecosystem)
    result = judge("vulnerabilities", HARMLESS, planted)
    assert result.returncode == 1, result.stdout
    assert f"{name} {planted['version']}: DEBIAN-CVE-2026-1, mended in {fixed or 'no release yet'}" in result.stdout
    assert way_out in result.stdout
    rules = ALLOWED.format(id="CVE-2026-1", reason="Not reached", expires=TODAY + timedelta(days=1))
    assert judge("vulnerabilities", HARMLESS, planted, rules=rules).returncode == 0


def test_what_the_distribution_has_not_mended_is_told_and_stops_nothing(judge, osv):
    osv.plant("openssl", "DEBIAN-CVE-2026-1", "CVE-2026-1", None, "Debian:12")
    result = judge("vulnerabilities", HARMLESS, LIBSSL)
    assert result.returncode == 0, result.stdout
    assert "not mended by the distribution yet, 1: openssl: DEBIAN-CVE-2026-1" in result.stdout


def test_a_vulnerable_package_stops_the_push(judge, osv):
    osv.plant("torch", "GHSA-aaaa-bbbb-cccc", "CVE-2026-1", "2.13.1")
    result = judge("vulnerabilities", TORCH, HARMLESS)
    assert result.returncode == 1
    assert "torch 2.13.0: " in result.stdout
    assert "mended in 2.13.1" in result.stdout


@pytest.mark.parametrize("name", ["GHSA-aaaa-bbbb-cccc", "CVE-2026-1"])
def test_a_vulnerability_may_be_allowed_for_a_while_and_with_a_reason(judge, osv, name):
    osv.plant("torch", "GHSA-aaaa-bbbb-cccc", "CVE-2026-1", "2.13.1")
    rules = ALLOWED.format(id=name, reason="Not reached", expires=TODAY + timedelta(days=1))
    result = judge("vulnerabilities", TORCH, rules=rules)
    assert result.returncode == 0, result.stdout
    assert "allowed: torch 2.13.0" in result.stdout


@pytest.mark.parametrize(
    ("reason", "days", "complaint"),
    [("Not reached", -1, "until"), ("", 1, "without a reason")],
    ids=["expired", "without-a-reason"],
)
def test_an_allowance_ends_and_needs_a_reason(judge, osv, reason, days, complaint):
    osv.plant("torch", "GHSA-aaaa-bbbb-cccc", "CVE-2026-1", "2.13.1")
    rules = ALLOWED.format(id="CVE-2026-1", reason=reason, expires=TODAY + timedelta(days=days))
    result = judge("vulnerabilities", TORCH, rules=rules)
    assert result.returncode == 1
    assert complaint in result.stdout


def test_an_allowance_that_nothing_needs_is_told(judge):
    rules = ALLOWED.format(id="CVE-2026-1", reason="Not reached", expires=TODAY + timedelta(days=1))
    result = judge("vulnerabilities", HARMLESS, rules=rules)
    assert result.returncode == 0
    assert "not needed any more: CVE-2026-1" in result.stdout


def test_nobody_to_ask_is_no_pass(judge):
    result = judge("vulnerabilities", HARMLESS, url="http://127.0.0.1:9/v1/query")
    assert result.returncode == 2
    assert "could not be asked for at http://127.0.0.1:9" in result.stdout


@pytest.mark.parametrize(
    "license_of_planted", [{"expression": "AGPL-3.0-only"}, {"license": {"name": "Server Side Public License"}}]
)
def test_a_denied_licence_stops_the_push(judge, license_of_planted):
    result = judge("licenses", component("planted", "1.0", licenses=[license_of_planted]))
    assert result.returncode == 1
    assert [line.split()[0] for line in result.stdout.splitlines() if "DENIED" in line] == ["planted"]


def test_other_licences_pass(judge):
    result = judge("licenses", component("fine", "1.0", licenses=[{"license": {"id": "Apache-2.0"}}]))
    assert result.returncode == 0, result.stdout


def test_an_unknown_licence_stops_the_push(judge):
    result = judge("licenses", component("planted", "1.0"), component("other", "1.0", licenses=[MIT]))
    assert result.returncode == 1
    assert "UNKNOWN: name it in supply_chain.toml" in result.stdout
    assert "2 packages, 1 with a licence that supply_chain.toml does not let through." in result.stdout


@pytest.mark.parametrize(
    ("name", "reason", "code", "verdict"),
    [
        ("MIT", "Its file LICENSE says so", 0, "ok: named"),
        ("MIT", "", 1, "NAMED WITHOUT A REASON"),
        ("AGPL-3.0", "Its file LICENSE says so", 1, "DENIED (AGPL)"),
    ],
)
def test_an_unknown_licence_may_be_named_with_a_reason(judge, name, reason, code, verdict):
    result = judge("licenses", component("planted", "1.0"), rules=NAMED.format(license=name, reason=reason))
    assert result.returncode == code, result.stdout
    assert result.stdout.splitlines()[0].endswith(verdict)


def test_a_name_does_not_overrule_what_a_package_tells(judge):
    planted = component("planted", "1.0", licenses=[{"expression": "AGPL-3.0-only"}])
    result = judge("licenses", planted, rules=NAMED.format(license="MIT", reason="A mistake"))
    assert result.returncode == 1
    assert "DENIED (AGPL)" in result.stdout
