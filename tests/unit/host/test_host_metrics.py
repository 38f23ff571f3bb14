# SPDX-License-Identifier: Apache-2.0
"""A host's own figures, and whose memory they are of."""

import psutil
import pytest

from llm_trainer.host.host_metrics import HOST_METRICS, HostReader, read_memory

GIB = 1 << 30


def test_a_host_tells_all_its_figures(tmp_path):
    reader = HostReader({"checkpoints": tmp_path / "not-made-yet", "temp": tmp_path})
    values = reader.read()
    missing = (
        {"disk_read_bytes_per_second", "disk_written_bytes_per_second"} if not psutil.disk_io_counters() else set()
    )
    assert values.keys() == set(HOST_METRICS) - missing
    assert values["checkpoints_free_bytes"] > 0
    assert 0 < values["memory_percent"] < 100


def test_rates_are_over_the_time_since_the_last_reading(tmp_path):
    reader = HostReader({})
    reader.totals["network_sent"] -= 10**9
    reader.read_at -= 10.0
    assert reader.read()["network_sent_bytes_per_second"] == pytest.approx(1e8, rel=0.5)


@pytest.fixture
def cgroups(tmp_path):
    """Makes folders of cgroup v2 and v1, one of them with files."""

    def make(version, limit):
        folders = (tmp_path / "v2", tmp_path / "v1")
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = folders[2 - version]
        folder.mkdir()
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{3 * GIB // 4}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {GIB // 4}\n")
        return folders

    return make


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_memory_is_of_its_limit_and_without_the_cache(cgroups, version):
    assert read_memory(cgroups(version, GIB)) == (GIB // 2, GIB)


@pytest.mark.parametrize(("version", "limit"), [(2, "max"), (1, 9223372036854771712)])
def test_without_a_limit_it_is_the_machines(cgroups, version, limit):
    used_bytes, limit_bytes = read_memory(cgroups(version, limit))
    assert limit_bytes == psutil.virtual_memory().total
    assert 0 < used_bytes < limit_bytes
