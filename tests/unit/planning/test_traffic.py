# SPDX-License-Identifier: Apache-2.0
"""The time of traffic between GPUs. Its bytes are held to those of real ranks in tests/unit/bench/test_scaling.py."""

from llm_trainer.planning.instances import read_instances
from llm_trainer.planning.traffic import Spread, Traffic, count_network_bytes, time_waits

P4D = read_instances().types["ml.p4d.24xlarge"]
GRADIENTS = Traffic(0, 0, 10**9, 0, 0, 40)
SHARDS = Traffic(10**9, 10**9, 10**8, 10, 9, 10)


def test_gpus_wait_for_what_computing_does_not_cover():
    alone, everything = time_waits(P4D, GRADIENTS, Spread(8, 1, 1), 0.0, 0.0)
    covered, same = time_waits(P4D, GRADIENTS, Spread(8, 1, 1), 1.0, 1.0)
    assert 0 < covered < alone
    assert everything == same


def test_ddp_reduces_once_a_step_and_fsdp_with_each_batch():
    def measure(traffic, shards, pieces):
        return time_waits(P4D, traffic, Spread(8, shards, pieces), 0.1, 0.1)[1]

    assert measure(GRADIENTS, 1, 4) == measure(GRADIENTS, 1, 1)
    assert measure(SHARDS, 8, 4) > 3.9 * measure(SHARDS, 8, 1)


def test_nothing_leaves_a_host_that_is_alone():
    assert count_network_bytes(P4D, GRADIENTS, Spread(8, 1, 1)) == 0
    assert count_network_bytes(P4D, SHARDS, Spread(16, 8, 1)) == 2 * 1 / 2 * SHARDS.reduced
    assert count_network_bytes(P4D, SHARDS, Spread(16, 16, 1)) == 15 / 16 * 2.1e9


def test_a_reference_has_weights_gathered_once_more():
    asked = Spread(16, 16, 1, forwards=2)
    assert count_network_bytes(P4D, SHARDS, asked) == 15 / 16 * 3.1e9
    waits = [time_waits(P4D, SHARDS, spread, 0.0, 0.0)[0] for spread in (Spread(8, 8, 1), Spread(8, 8, 1, forwards=2))]
    assert 1.3 < waits[1] / waits[0] < 1.6
