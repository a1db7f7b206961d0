"""Several replicas as the pickers of one gateway, which spreads its calls over them; they share one Redis.

What a Service does with a replica that is not ready (none of its calls go there any more) Envoy does here by
itself: it asks each for its health.
"""

from __future__ import annotations

import signal
import time
from functools import partial

import pytest

from tests.e2e.harness import Load, eventually, simulators
from tests.e2e.pair import all_settled
from tests.e2e.replicas import CLIENTS, Replicas, gateway, running_replicas

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


def loaded(replicas: Replicas) -> Load:
    """Clients of streams, for the length of a block."""
    return Load(replicas, "sim", clients=CLIENTS, stream=True, max_tokens=30)


async def test_one_that_is_stopped_under_load_costs_no_request() -> None:
    """It says NOT_SERVING, serves who has not heard of it, and ends when nothing runs; then it comes back."""
    async with simulators(4, time_scale=0.1) as engines, running_replicas(engines) as replicas:
        first, second = replicas.stacks
        async with loaded(replicas) as clients:
            await clients.more(60)
            assert await replicas.decided(0) > 0
            assert await replicas.decided(1) > 0
            first.gateway.signal(signal.SIGTERM)
            await eventually(partial(replicas.is_left_out, 0), bool)
            assert first.gateway.is_running
            await clients.more(60)
            assert await first.gateway.ended() == 0
            await clients.more(60)
            await first.start_gateway()
            await eventually(partial(replicas.is_left_out, 0), lambda is_out: not is_out)
            await eventually(partial(replicas.decided, 0), bool)
            await clients.more(60)
        assert clients.failures == []
        assert await replicas.retried() == {}
        await all_settled([first, second], 20)


@pytest.mark.parametrize("retries", [False, True])
async def test_one_that_is_killed_costs_what_it_had(retries: bool) -> None:
    """What was in flight there is lost, and without retries what comes until the gateway has noticed."""
    async with (
        simulators(4, time_scale=0.1) as engines,
        running_replicas(engines, partial(gateway, retries=retries)) as replicas,
    ):
        first, second = replicas.stacks
        async with loaded(replicas) as clients:
            await clients.more(60)
            assert (clients.failures, await replicas.retried()) == ([], {})
            await first.gateway.kill()
            killed_s = time.monotonic()
            await eventually(partial(replicas.is_left_out, 0), bool)
            noticed_s = time.monotonic()
            await clients.more(120)
        until_s = killed_s if retries else noticed_s
        assert [failure for failure in clients.failures if failure.began_s > until_s] == []
        assert set(await replicas.retried()) <= ({"picker"} if retries else set())
        if retries:
            assert len(clients.failures) <= CLIENTS
        # Its share of the load ends with its lease.
        await all_settled([second], 20)
