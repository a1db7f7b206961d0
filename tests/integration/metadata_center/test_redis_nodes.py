"""Sentinels and nodes of a Cluster whose host is gone: it accepts, or not even that, and answers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from metadata_center.sharing.messages import Row, Update, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.transport import TransportError
from metadata_center.types import EndpointKey
from testbed.redis_server import RedisServer, running
from tests.waiting import until

ONE = member_id("gw1", 0, "x")
BOUND_S, ATTEMPTS = 0.5, 12
"""Of each call, as its callers bound theirs, and how many of them may fail."""


def update(sequence: int) -> Update:
    """One request on one endpoint."""
    return Update(ONE, sequence, (Row(EndpointKey("10.0.0.1:8000"), 1),), True, 60.0, (), False)


async def repeated(call: Callable[[], Awaitable[object]]) -> None:
    """As a member does it: bounded calls, until one succeeds.

    Raises:
        AssertionError: None of them did.
    """
    for _ in range(ATTEMPTS):
        try:
            async with asyncio.timeout(BOUND_S):
                await call()
            return
        except (TransportError, TimeoutError):
            await asyncio.sleep(0.05)
    pytest.fail("no call reached a server")


async def subscribed(transport: RedisTransport) -> None:
    """A subscription that stands, and ends."""
    async with transport.subscribe():
        pass


async def both(transport: RedisTransport) -> None:
    """Messages can be sent, and heard."""
    try:
        await repeated(lambda: subscribed(transport))
        await repeated(lambda: transport.publish(update(1)))
    finally:
        await transport.close()


def sentinel(folder: Path, master: RedisServer) -> RedisServer:
    """One that knows `master` as `main`."""
    folder.mkdir()
    (folder / "sentinel.conf").write_text(f"sentinel monitor main 127.0.0.1 {master.port} 1\n")
    return RedisServer(folder, sentinel=True)


async def test_a_sentinel_that_hangs_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    """Two of three, the first ones, answer nothing: the third is asked."""
    with ExitStack() as stack:
        master = stack.enter_context(running(tmp_path / "master"))
        sentinels = [sentinel(tmp_path / str(number), master) for number in range(3)]
        for one in sentinels:
            stack.callback(one.kill)
            one.start()
        for one in sentinels[:2]:
            one.pause()
        nodes = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        await both(RedisTransport(parse_url(f"redis+sentinel://{nodes}/main")))
        assert master.command("DBSIZE") == b":2\r\n"


async def test_a_sentinel_that_names_a_master_of_before_is_not_asked_for_ever(tmp_path: Path) -> None:
    """It is cut off from the others and does not know of the fail-over: the next one does."""
    with running(tmp_path / "old") as old, running(tmp_path / "new") as new, ExitStack() as stack:
        sentinels = [sentinel(tmp_path / "stale", old), sentinel(tmp_path / "current", new)]
        for one in sentinels:
            stack.callback(one.kill)
            one.start()
        old.kill()
        nodes = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        await both(RedisTransport(parse_url(f"redis+sentinel://{nodes}/main")))
        assert new.command("DBSIZE") == b":2\r\n"


def cluster(stack: ExitStack, folder: Path) -> tuple[list[RedisServer], str]:
    """Three nodes, of which the second has our slot, and that slot; anybody may do all as `gw`, by `pw`."""
    arguments = ["--cluster-enabled", "yes", "--cluster-node-timeout", "30000"]
    nodes = [stack.enter_context(running(folder / str(number), arguments)) for number in range(3)]
    slot = int(nodes[0].command("CLUSTER", "KEYSLOT", "{tokenway}:members")[1:])
    rest = [str(number) for number in range(16_384) if number != slot]
    for node, slots in zip(nodes, (rest[:8000], [str(slot)], rest[8000:]), strict=True):
        node.command("ACL", "SETUSER", "gw", "on", ">pw", "allkeys", "allchannels", "+@all")
        node.command("CLUSTER", "ADDSLOTS", *slots)
    for node in nodes[1:]:
        nodes[0].command("CLUSTER", "MEET", "127.0.0.1", str(node.port))
    return nodes, str(slot)


def is_complete(node: RedisServer) -> bool:
    """Whether it knows who has each slot."""
    answer = node.command("CLUSTER", "INFO")
    return b"cluster_state:ok" in answer and b"cluster_slots_assigned:16384" in answer


@pytest.mark.parametrize("login", ["", "gw:pw@"], ids=["open", "by password"])
async def test_a_node_of_a_cluster_that_hangs_keeps_nobody_from_the_others(
    tmp_path: Path, login: str
) -> None:
    """First the first one named, then the one with the slot, which another takes over meanwhile."""
    with ExitStack() as stack:
        nodes, slot = cluster(stack, tmp_path)
        await until(lambda: all(map(is_complete, nodes)))
        hangs, owner, heir = nodes
        url = parse_url(f"redis+cluster://{login}{','.join(f'127.0.0.1:{node.port}' for node in nodes)}")
        hangs.pause()
        await both(RedisTransport(url))
        hangs.resume()

        transport = RedisTransport(url)
        await transport.publish(update(1))
        owner.pause()
        for _ in range(3):  # each call finds it hung, wherever it begins
            with pytest.raises((TimeoutError, TransportError)):
                async with asyncio.timeout(BOUND_S):
                    await transport.publish(update(2))
        identity = heir.command("CLUSTER", "MYID").split(b"\r\n")[1].decode()
        heir.command("CLUSTER", "SETSLOT", slot, "NODE", identity)
        heir.command("CLUSTER", "BUMPEPOCH")
        await both(transport)
        assert heir.command("DBSIZE") == b":2\r\n"


async def test_a_node_that_is_cut_off_from_its_cluster_is_left(tmp_path: Path) -> None:
    """It says that the cluster is down; the others, which have it, are asked."""
    alone = ["--cluster-enabled", "yes"]
    with ExitStack() as stack:
        cut_off = stack.enter_context(running(tmp_path / "alone", alone))
        nodes, _ = cluster(stack, tmp_path)
        await until(lambda: all(map(is_complete, nodes)))
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in (cut_off, *nodes))
        await both(RedisTransport(parse_url(f"redis+cluster://{hosts}")))
        assert nodes[1].command("DBSIZE") == b":2\r\n"
