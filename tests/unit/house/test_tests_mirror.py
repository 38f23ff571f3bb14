# SPDX-License-Identifier: Apache-2.0
"""The unit tests mirror the packages: a module's test carries its name."""

from support.measures import CODE, ROOT

UNIT = ROOT / "tests/unit"
# Modules whose work is to start processes or whole jobs. What tests them lies elsewhere.
TESTED_ELSEWHERE = {
    "__main__.py": "tests/unit/cli/test_main.py",  # one line, which calls what is tested there
    "train.py": "tests/integration/test_jobs.py",  # the story of a job is a job
    "worker.py": "tests/integration/test_failures.py",  # a worker is a process that torchrun starts
    "cli/all_reduce.py": "tests/integration/test_doctor.py",  # the program of processes that the doctor starts
    "cli/doctor.py": "tests/integration/test_doctor.py",  # judges a machine by real processes and addresses
    "cli/gpu_memory.py": "tests/integration/test_validate.py",  # a part of the commands below
    "cli/plan_instances.py": "tests/unit/cli/test_plan_table.py",  # its text, and whole commands
    "cli/tree_checks.py": "tests/unit/cli/sagemaker/test_rehearsal.py",  # the program of a process that submit starts
    "cli/validate.py": "tests/integration/test_validate.py",  # a command over a whole tree
    "export/base_source.py": "tests/unit/export/test_model_card.py",  # two fields, which the card tells
    "export/manifest.py": "tests/integration/test_jobs.py",  # tells what a whole job has made
    "export/result.py": "tests/integration/test_export.py",  # a record of what a whole job has trained
    "launcher/launch.py": "tests/integration/test_jobs.py",  # PID 1 of a job
    "launcher/reporter_process.py": "tests/integration/test_tracking.py",  # a process beside a job's
    "launcher/single_worker.py": "tests/integration/test_survival.py",  # a process that outlives no launcher
    "readers/rows.py": "tests/unit/readers/test_files.py",  # the records that all readers give
    "training/methods/training_method.py": "tests/unit/training/methods/test_sft.py",  # a record without behaviour
    "training/sharding/fsdp.py": "tests/integration/test_sharding.py",  # needs several ranks
    "training/sharding/checkpoint_kinds.py": "tests/integration/test_global_batch.py",  # needs several ranks
}
# Tests of several modules together.
ACROSS_MODULES = {"config/test_every_setting.py"}  # from the text that a client writes to the section's value
# Tests of what lies beside the package.
OF_OTHER_FOLDERS = {"bench", "docker", "docs", "examples", "house"}


def test_each_module_has_its_test():
    modules = {str(file.relative_to(CODE)) for file in CODE.rglob("*.py") if file.name != "__init__.py"}
    without = [
        module
        for module in sorted(modules - TESTED_ELSEWHERE.keys())
        if not (UNIT / module).with_name(f"test_{(UNIT / module).name}").exists()
    ]
    assert without == []


def test_each_test_has_its_module():
    tests = [file.relative_to(UNIT) for file in sorted(UNIT.rglob("test_*.py"))]
    mirrored = [file for file in tests if file.parts[0] not in OF_OTHER_FOLDERS and str(file) not in ACROSS_MODULES]
    orphans = [str(file) for file in mirrored if not (CODE / file.parent / file.name.removeprefix("test_")).exists()]
    assert orphans == []


def test_what_is_tested_elsewhere_is_so_and_has_no_test_here():
    for module, test in TESTED_ELSEWHERE.items():
        assert (CODE / module).exists(), module
        assert (ROOT / test).exists(), test
        assert not (UNIT / module).with_name(f"test_{(UNIT / module).name}").exists(), module
