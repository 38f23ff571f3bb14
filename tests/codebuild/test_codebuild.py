# SPDX-License-Identifier: Apache-2.0
"""The stand-in for CodeBuild does what AWS's documentation says of it."""

import pytest
import yaml

from support.codebuild import FAILED, SUCCEEDED, run_buildspec


@pytest.fixture
def run(tmp_path):
    def run_phases(variables=(), **spec):
        source = tmp_path / "source"
        source.mkdir()
        (source / "buildspec.yml").write_text(yaml.safe_dump({"version": 0.2, **spec}), encoding="utf-8")
        return run_buildspec(source, tmp_path / "output", dict(variables), "0" * 40)

    return run_phases


def commands(*lines, **more):
    return {"commands": list(lines), **more}


def test_one_shell_runs_the_commands_of_all_phases(run):
    build = run(
        env={"shell": "bash", "variables": {"A": "spec", "B": "spec"}, "exported-variables": ["A", "B", "C", "D", "E"]},
        variables={"B": "project"},
        phases={
            "install": commands("mkdir folder && cd folder", "export C=$(basename $PWD)"),
            "build": commands('export D="two\twords" && E=own', "[[ $PWD = */folder ]]"),
        },
    )
    assert build.status == SUCCEEDED
    assert build.exported == {"A": "spec", "B": "project", "C": "folder", "D": "two\twords", "E": ""}


@pytest.mark.parametrize("phase", ["install", "pre_build"])
def test_nothing_follows_a_failure_before_the_build(run, phase):
    build = run(
        phases={phase: commands("false", "echo never"), "build": commands("true"), "post_build": commands("true")}
    )
    assert build.phases == {phase: FAILED}
    assert build.failed_commands == ["false"]
    assert "never" not in build.log.read_text(encoding="utf-8").replace("echo never", "")


def test_post_build_follows_a_failed_build_and_can_tell(run):
    build = run(
        env={"exported-variables": ["TOLD"]},
        phases={"build": commands("false"), "post_build": commands("export TOLD=$CODEBUILD_BUILD_SUCCEEDING")},
    )
    assert build.phases == {"build": FAILED, "post_build": SUCCEEDED}
    assert (build.status, build.exported) == (FAILED, {"TOLD": "0"})


def test_post_build_does_not_follow_a_build_that_aborts(run):
    build = run(phases={"build": commands("false", **{"on-failure": "ABORT"}), "post_build": commands("true")})
    assert build.phases == {"build": FAILED}


def test_the_next_phase_follows_one_that_may_fail(run):
    build = run(phases={"install": commands("false", **{"on-failure": "CONTINUE"}), "build": commands("true")})
    assert build.phases == {"install": FAILED, "build": SUCCEEDED}
    assert build.status == FAILED


@pytest.mark.parametrize(
    "install",
    [
        commands("false", **{"finally": ["export DONE=1"]}),
        commands("true", **{"finally": ["export DONE=1", "false", "export DONE=2"]}),
    ],
    ids=["after-a-failure", "and-fails-itself"],
)
def test_finally_runs(run, install):
    build = run(env={"exported-variables": ["DONE"]}, phases={"install": install, "build": commands("true")})
    assert build.phases == {"install": FAILED}
    assert build.exported == {"DONE": "1"}


@pytest.mark.parametrize("command", ["exit 3", "exit 0"])
def test_a_command_that_ends_the_shell_has_failed(run, command):
    assert run(phases={"build": commands(command)}).failed_commands == [command]


def test_a_command_that_reads_does_not_read_the_next_one(run):
    assert run(phases={"build": commands("cat", "true")}).status == SUCCEEDED


def test_reports_and_artifacts_of_a_failed_build_are_kept(run):
    build = run(
        phases={"build": commands("mkdir -p build/reports && touch build/reports/a.xml build/b.json", "false")},
        reports={"tests": {"base-directory": "build/reports", "files": ["*.xml"]}},
        artifacts={"base-directory": "build", "files": ["b.json", "missing.json"]},
    )
    assert [path.name for path in build.reports.iterdir()] == ["a.xml"]
    assert [path.name for path in build.artifacts.iterdir()] == ["b.json"]
