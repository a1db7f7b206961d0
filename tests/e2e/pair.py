"""Two gateways, each behind an Envoy of its own, that share one store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from tests.e2e.harness import Stack, eventually, running_stack, sample

SHARE_LEASE_S = 3.0
"""A gateway that is gone is out of the sums after this."""


def shared(url: str, name: str, **section: Any) -> dict[str, Any]:
    """The `metadata_center` section of one gateway."""
    return {"metadata_center": {"url": url, "gateway": name, "lease_s": SHARE_LEASE_S, **section}}


async def gateways_seen(stack: Stack) -> float:
    """How many gateways this one counts, itself included."""
    return (
        sample(await stack.metrics(), 'tokenway_sharing_gateways{worker="0"}')
        or sample(await stack.metrics(), "tokenway_sharing_gateways")
        or 0.0
    )


@asynccontextmanager
async def running_pair(
    url: str,
    clusters: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None = None,
    *,
    workers: int = 1,
    count: int = 2,
    **section: Any,
) -> AsyncIterator[list[Stack]]:
    """`count` gateways over the same clusters, each knowing of all others."""
    async with AsyncExitStack() as stack:
        started = [
            stack.enter_async_context(
                running_stack(
                    clusters, {**(config or {}), **shared(url, f"gw{number}", **section)}, workers=workers
                )
            )
            for number in range(count)
        ]
        stacks = [await entering for entering in started]
        for each in stacks:
            await eventually(partial(gateways_seen, each), lambda seen: seen == count, 20)
        yield stacks


async def all_settled(stacks: Sequence[Stack], timeout_s: float) -> None:
    """Every counter of every gateway is exactly zero within the time, the other gateways' shares included."""

    async def charged() -> list[dict[str, int]]:
        return list(await asyncio.gather(*(stack.charged() for stack in stacks)))

    await eventually(charged, lambda found: not any(found), timeout_s)
