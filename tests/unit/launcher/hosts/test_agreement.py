# SPDX-License-Identifier: Apache-2.0
"""Hosts that were given different settings, workers or images are told which; their folders may differ."""

from llm_trainer.launcher.hosts.agreement import VERSION, digest_facts, find_disagreement, list_facts

SETTINGS = {"learning_rate": 0.1, "output_dir": "/fsx/1"}


def test_hosts_that_have_the_same_agree_whatever_their_folders_are_called():
    facts = list_facts(SETTINGS, 8)
    other = digest_facts(list_facts(SETTINGS | {"output_dir": "/local"}, 8))
    assert find_disagreement("node-0", facts, {"node-1": other, "waits": {}}) is None


def test_what_differs_is_told_with_the_value_here_and_no_value_is_sent():
    facts = list_facts(SETTINGS, 8)
    other = digest_facts(list_facts({"learning_rate": 0.2, "seed": 1}, 4) | {VERSION: "0"})
    assert not {"0.2", "1", "4", "0"} & {*other.values()}
    told = find_disagreement("node-0", facts, {"node-1": other})
    assert told.startswith("Host node-1 differs from node-0 in the image's version (")
    assert (
        "the number of workers (8 on node-0), learning_rate (0.1 on node-0), seed (not given on node-0): give all"
        in told
    )
