# SPDX-License-Identifier: Apache-2.0
"""Each GPU of the instance types has an entry with its source, and what was not measured has the wider range."""

from llm_trainer.planning.efficiency import find_efficiency, read_host, read_table
from llm_trainer.planning.instances import read_instances


def test_each_gpu_that_can_be_planned_has_an_entry_with_its_source():
    gpus = {host.gpu.name for host in read_instances().types.values()}
    assert gpus <= read_table()["gpus"].keys()
    for name in gpus:
        entry = find_efficiency(name)
        assert 0 < entry.attention <= entry.products <= 1
        assert 0 < entry.bandwidth <= 1
        assert entry.low < 1 < entry.high
        assert entry.source.startswith(("measured: ", "published: ", "carried over ", "not measured: "))


def test_what_was_not_measured_is_less_sure():
    def width(name):
        return find_efficiency(name).high / find_efficiency(name).low

    assert width("H200") < width("H100") < width("L4") <= width("a GPU of next year")


def test_a_host_is_described_with_its_source():
    host = read_host(of_gpus=True)
    assert 0 < host.launch_seconds < host.function_seconds < host.between_seconds < 0.1
    assert host.low < 1 < host.high
    assert host.source.startswith("measured ")
