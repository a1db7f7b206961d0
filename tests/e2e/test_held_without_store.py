"""Gateways lose their store, in many ways, while requests run and others are held: none is lost or left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from testbed.redis_server import RedisServer, running
from tests.e2e.harness import FAST_HEALTH, Stack, cluster, eventually
from tests.e2e.holding import answered, ask, fill, gated, held, served_by, total
from tests.e2e.pair import all_settled, running_pair
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PATIENT: Final = {"x-slo-ttft-ms": "60000"}
CONFIG: Final = {
    "models": {"held": served_by("held")},
    "holding": {"enabled": True, "max_requests": 100, "max_s": 50.0, "refuse": True},
    "health": FAST_HEALTH,
}
HELD: Final = 3
"""At each of two gateways."""


@dataclass(frozen=True, slots=True)
class Store:
    """Where two gateways meet.

    Attributes:
        url: As they have it.
        lose: Begins the fault, which lasts.
        mend: Ends it; the gateways may have met again already.
        is_lost: Whether the gateways can notice while it lasts.
    """

    url: str
    lose: Callable[[], object]
    mend: Callable[[], object]
    is_lost: bool = True


def _unchanged() -> None:
    """Nothing has to be mended."""


@asynccontextmanager
async def _alone(folder: Path, fault: str) -> AsyncIterator[Store]:
    """One server."""
    with running(folder) as server:
        say = server.command
        faults: dict[str, tuple[Callable[[], object], Callable[[], object], bool]] = {
            "killed": (server.kill, server.start, True),
            "hangs": (server.pause, server.resume, True),
            "emptied": (lambda: say("FLUSHALL"), _unchanged, False),
            "full": (
                lambda: say("CONFIG", "SET", "maxmemory", "1000"),
                lambda: say("CONFIG", "SET", "maxmemory", "0"),
                True,
            ),
            "read only": (
                lambda: say("REPLICAOF", "127.0.0.1", "1"),
                lambda: say("REPLICAOF", "NO", "ONE"),
                True,
            ),
        }
        lose, mend, is_lost = faults[fault]
        yield Store(server.url, lose, mend, is_lost)


@asynccontextmanager
async def _failing_over(folder: Path, _: str) -> AsyncIterator[Store]:
    """The master hangs, as when its host is gone; its replica takes over."""
    with (
        running(folder / "master") as master,
        running(folder / "replica", ["--replicaof", "127.0.0.1", str(master.port)]) as replica,
    ):
        await until(lambda: b"master_link_status:up" in replica.command("INFO", "replication"))
        sentinels = [RedisServer(folder / str(number), sentinel=True) for number in range(3)]
        for number in range(len(sentinels)):
            (folder / str(number) / "sentinel.conf").write_text(
                f"sentinel monitor main 127.0.0.1 {master.port} 2\n"
                "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 3000\n"
            )
        try:
            for sentinel in sentinels:
                sentinel.start()
            await until(lambda: all(b"num-slaves\r\n$1\r\n1" in _known(one) for one in sentinels))
            await until(lambda: all(b"num-other-sentinels\r\n$1\r\n2" in _known(one) for one in sentinels))

            def lose() -> None:
                sentinels[0].pause()
                master.pause()

            nodes = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
            yield Store(f"redis+sentinel://{nodes}/main", lose, _unchanged)
        finally:
            for sentinel in sentinels:
                sentinel.kill()


def _known(sentinel: RedisServer) -> bytes:
    """What it knows of the master."""
    return sentinel.command("SENTINEL", "MASTER", "main")


async def _joined(stacks: list[Stack]) -> None:
    for stack in stacks:
        await _sample(stack, "tokenway_sharing_connected", 1, 30)
        await _sample(stack, "tokenway_sharing_gateways", 2, 30)


async def _sample(stack: Stack, name: str, value: float, timeout_s: float = 20) -> None:
    async def read() -> float:
        return total(await stack.metrics(), name)

    await eventually(read, lambda found: found == value, timeout_s)


async def _counts(stacks: list[Stack]) -> list[int]:
    """Every count of every endpoint of every gateway."""
    found = []
    for stack in stacks:
        for row in (await stack.rows()).values():
            found += [value for value in row.values() if type(value) is int]
    return found


async def _together(*waits: Awaitable[Any]) -> None:
    await asyncio.gather(*waits)


@pytest.mark.parametrize(
    ("fault", "reserve"),
    [
        *(("killed", True), ("hangs", False), ("emptied", True), ("full", False), ("read only", False)),
        *(("failed over", False), ("failed over", True)),
    ],
)
async def test_each_held_request_is_sent_once_whatever_becomes_of_the_store(
    tmp_path: Path, fault: str, reserve: bool
) -> None:
    """Half of them while it is away, the rest when it is back: each count ends at zero, and is never less."""
    make = _failing_over if fault == "failed over" else _alone
    async with make(tmp_path, fault) as store, gated() as engine:
        pair = running_pair(store.url, [cluster("held", [engine.key])], CONFIG, reserve=reserve)
        async with pair as stacks:
            asked = await fill(stacks[0], "held", engine)
            for number, stack in enumerate(stacks):
                asked += [ask(stack, "held", f"{number}-{one}", headers=PATIENT) for one in range(HELD)]
            await _together(*(held(stack, HELD) for stack in stacks))

            store.lose()
            if store.is_lost:
                await _together(*(_sample(stack, "tokenway_sharing_connected", 0) for stack in stacks))
            for count in (2, 3, 4):
                engine.let_go()
                await engine.has(count)
            assert min(await _counts(stacks)) >= 0
            store.mend()
            await _joined(stacks)
            assert min(await _counts(stacks)) >= 0
            engine.open()
            await answered(asked)
            assert len(engine.arrived) == len(set(engine.arrived)) == 1 + 2 * HELD
            await all_settled(stacks, 12)
            assert min(await _counts(stacks)) >= 0
            await _together(*(held(stack, 0) for stack in stacks))
