# SPDX-License-Identifier: Apache-2.0
"""Another host in the place of the first one, where that is lost and `min_hosts` lets the others go on.

They wait for it to come back, as they would for any other host. Then the next host of the last attempt is the first
one. Nothing is voted on: all have heard from the lost one who took part, and in which order.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_trainer.common import log
from llm_trainer.config.environment import Environment
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState
from llm_trainer.launcher.hosts.meeting import POLL_SECONDS, Quorum, describe_loss


def wait_for_hub(link: ClusterLink, attempt: int, timeout: float, stop_file: Path) -> bool:
    """Wait for another first host under the name of the lost one. Return False where none came or a stop did.

    `attempt` is the last one that this host has made.
    """
    link.publish(HostState("ready", attempt))
    log.info(f"{describe_loss(link.hub).reason} Waiting {timeout:.0f} s at most for another one in its place.")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not stop_file.exists():
        if can_lead(link, attempt):
            return True
        time.sleep(POLL_SECONDS)
    return False


def can_lead(link: ClusterLink, attempt: int) -> bool:
    """Tell whether the first host is there after this attempt, found no mistake, and has this job's settings."""
    state = link.state(link.hub)
    has_mistake = state.phase == "failed" and state.attempt < attempt
    return link.answers(link.hub) and not has_mistake and not link.compare_facts([link.hub])


@dataclass(frozen=True)
class Successor:
    """The first host after the lost one, as every other host finds it."""

    names: Sequence[str]  # of all hosts that are left, the new first one's first
    address: str  # at which the others reach that one
    quorum: Quorum

    def open_link(self, old: ClusterLink) -> ClusterLink:
        """Return the link under the new first host, not yet open."""
        link = ClusterLink(self.names, old.own, old.key, self.address)
        link.facts = old.facts
        return link

    def place(self, environment: Environment) -> Environment:
        """Return the environment of this host without the lost one."""
        trainers = tuple(self.quorum.trainers)
        others = tuple(name for name in self.names if name not in trainers)
        placement = replace(environment.placement, first_address=self.address)
        return replace(environment, hosts=trainers, other_hosts=others, placement=placement)


def find_successor(link: ClusterLink, quorum: Quorum) -> Successor | None:
    """Return the first host after the lost one; None where too few are left."""
    members = link.contacts[link.hub].state.members or quorum.trainers
    order = [*members, *(name for name in link.names if name not in members)]
    names = [name for name in order if name != link.hub]
    trainers = [name for name in names if name in quorum.trainers]
    if not quorum.choose(trainers):
        return None
    address = link.overview.addresses.get(names[0], names[0])
    return Successor(names, address, replace(quorum, trainers=trainers))
