"""A Cluster whose master dies under requests: a replica takes over, gateways find it, and nothing is left."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from testbed.redis_server import RedisServer, running
from tests.integration.metadata_center.ending_traffic import Traffic, traffic
from tests.waiting import until

NODE_TIMEOUT_S: Final = 1.5
"""After which a node counts as gone; the default of Redis is ten times that."""

BETWEEN: Final = 40
"""Requests that begin between two events, at the least."""


def ok(server: RedisServer, *words: str) -> bytes:
    """The answer to a command that the server takes."""
    answer = server.command(*words)
    assert not answer.startswith(b"-"), (words, answer)
    return answer


def says(server: RedisServer, section: str, text: bytes) -> Callable[[], bool]:
    """Whether a server says that of itself; one that is away, or whose connection breaks, does not."""

    def holds() -> bool:
        with suppress(OSError):
            answer = server.command(*section.split(" "))
            return text in answer
        return False

    return holds


@dataclass(frozen=True, slots=True)
class Cluster:
    """Three masters, of whom one has our slot, and a replica of that one.

    Attributes:
        owner: Has the slot.
        heir: Its replica.
        others: The other masters, who elect.
    """

    owner: RedisServer
    heir: RedisServer
    others: tuple[RedisServer, RedisServer]

    @property
    def nodes(self) -> tuple[RedisServer, ...]:
        """All of them."""
        return (self.owner, *self.others, self.heir)

    @property
    def url(self) -> str:
        """As gateways have it."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    async def form(self) -> None:
        """The nodes meet, and all agree that it is whole."""
        slot = int(ok(self.owner, "CLUSTER", "KEYSLOT", "{tokenway}:members")[1:])
        rest = [str(number) for number in range(16_384) if number != slot]
        for node, slots in zip(self.nodes, ([str(slot)], rest[:8_000], rest[8_000:]), strict=False):
            ok(node, "CLUSTER", "ADDSLOTS", *slots)
        for node in self.nodes[1:]:
            ok(self.owner, "CLUSTER", "MEET", "127.0.0.1", str(node.port))
        identity = ok(self.owner, "CLUSTER", "MYID").split(b"\r\n")[1]
        await until(says(self.heir, "CLUSTER NODES", identity))
        await self.agrees(b"cluster_known_nodes:4")
        await until(lambda: ok_of(self.heir, "CLUSTER", "REPLICATE", identity.decode()))
        await self.agrees(b"cluster_state:ok")
        await self.is_copied()

    async def agrees(self, text: bytes) -> None:
        """Wait until all nodes say that of the cluster."""
        for node in self.nodes:
            await until(says(node, "CLUSTER INFO", text))

    async def is_copied(self) -> None:
        """Wait until one of the two is the other's replica and follows it."""
        both = [says(node, "INFO replication", b"master_link_status:up") for node in (self.owner, self.heir)]
        await until(lambda: any(follows() for follows in both))


def ok_of(server: RedisServer, *words: str) -> bool:
    """Whether it takes a command by now."""
    return server.command(*words) == b"+OK\r\n"


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """One whose nodes run."""
    arguments = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(int(NODE_TIMEOUT_S * 1e3))]
    with (
        running(folder / "owner", arguments) as owner,
        running(folder / "heir", arguments) as heir,
        running(folder / "one", arguments) as one,
        running(folder / "two", arguments) as two,
    ):
        yield Cluster(owner, heir, (one, two))


async def met(made: Traffic) -> None:
    """Wait until both gateways have joined, some requests have begun since, and both count what both have."""
    before = made.begun
    await until(lambda: all(site.sync.stats.connected for site in made.sites))
    await until(lambda: made.begun >= before + BETWEEN)
    await made.agreed()


def reserved(made: Traffic) -> int:
    """Requests that were placed by compare and set at the server."""
    return sum(site.sync.stats.reserved for site in made.sites)


@pytest.mark.timeout(240)
async def test_a_master_that_is_killed_or_hangs_leaves_nothing_behind(tmp_path: Path) -> None:
    """Each charge is released once whatever happens; both gateways go to the new master by themselves.

    `Traffic` has counts compared at each step of each request: none is below zero, or other than what runs.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    with cluster(tmp_path) as nodes:
        await nodes.form()
        first, second = nodes.owner, nodes.heir
        async with traffic([nodes.url] * 2, seed) as made:
            await met(made)

            begun = made.begun
            first.kill()
            await until(says(second, "INFO replication", b"role:master"))
            assert made.begun > begun, "requests go on without the store"
            placed = reserved(made)
            await met(made)
            await until(lambda: reserved(made) > placed)  # by the new master
            assert all(site.sync.stats.reconnects for site in made.sites)

            first.start()
            await until(says(first, "INFO replication", b"role:slave"))
            await nodes.is_copied()
            second.pause()
            await until(says(first, "INFO replication", b"role:master"))
            placed_before = reserved(made)
            await met(made)
            await until(lambda: reserved(made) > placed_before)
            second.resume()
            await until(says(second, "INFO replication", b"role:slave"))
            await nodes.is_copied()
            await met(made)
        assert ok(first, "DBSIZE") == b":0\r\n"
        await until(lambda: ok(second, "DBSIZE") == b":0\r\n")
        print(f"{made.begun} requests, {dict(made.ways)}")
