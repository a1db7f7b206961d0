"""Endpoints of a cluster are replaced under load: by what Envoy reports, requests go where it was decided."""

from __future__ import annotations

import pytest

from tests.e2e.harness import Load, cluster, eventually, key_of, running_stack, simulators

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

SETS = 6
"""As many as there are swaps and one: an endpoint that comes back within seconds Envoy would have already."""


@pytest.mark.parametrize("workers", [1, 2])
async def test_requests_go_where_they_were_decided(workers: int) -> None:
    """All endpoints replaced by others, again and again, and one that joins and is chosen at once."""
    async with simulators(2 * SETS + 1, time_scale=0.05) as engines:
        keys = [key_of(engine) for engine in engines]
        pools = [keys[2 * number : 2 * number + 2] for number in range(SETS)]
        config = {"models": {"sim": {"rules": [{"cluster": "sim"}]}}}
        async with (
            running_stack([cluster("sim", pools[0])], config, workers=workers) as stack,
            Load(stack, "sim", clients=8, stream=False, max_tokens=4) as load,
            Load(stack, "sim", clients=8, stream=True, max_tokens=4) as streams,
        ):

            async def in_force() -> set[str]:
                return set(await stack.rows())

            for pool in [*pools[1:], [*pools[-1], keys[-1]]]:
                await load.more(40)
                await streams.more(40)
                stack.write_clusters(cluster("sim", pool))
                await eventually(in_force, set(pool).__eq__)
            await load.more(40)
            await streams.more(40)
            load.ask_no_more()
            streams.ask_no_more()
            await stack.settled()
            ended = [line for line in stack.gateway_log() if line.get("chosen")]
        assert load.failures == streams.failures == []
        assert {line["chosen"] for line in ended} == set(keys)
        elsewhere = [line for line in ended if line["endpoint"] != line["chosen"]]
        assert not elsewhere, f"{len(elsewhere)} of {len(ended)}: {elsewhere[:3]}"
