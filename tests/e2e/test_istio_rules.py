"""Tokenway's own Envoy before services of istiod's: rules that lead elsewhere, or before it is there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.e2e.harness import Load, eventually, running_stack, simulators
from tests.e2e.istio_scenarios import led_by_a_rule
from tests.fake_istiod import FakeIstiod
from tests.mesh import lb_endpoint
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

SERVICES: Final = ("outbound|8000||one.models.internal", "outbound|8000||other.models.internal")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engines() -> AsyncIterator[list[SimulatorServer]]:
    """Quick ones."""
    async with simulators(2, time_scale=0.1) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def istiod() -> AsyncIterator[FakeIstiod]:
    """A fake one without services."""
    fake = FakeIstiod()
    await fake.start()
    yield fake
    await fake.stop()


def _config(istiod: FakeIstiod, service: str) -> dict[str, Any]:
    istio = {"address": f"127.0.0.1:{istiod.port}"}
    return {"models": {"sim": {"rules": [{"cluster": service}]}}, "discovery": {"istio": istio}}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_rule_leads_to_another_service_under_load(
    istiod: FakeIstiod, engines: list[SimulatorServer], workers: int
) -> None:
    """It is asked for a service before the rule that names it is in force: no request fails."""
    for service in SERVICES:
        istiod.set(service, *(lb_endpoint("127.0.0.1", engine.port) for engine in engines))
    async with running_stack([], _config(istiod, SERVICES[0]), workers=workers) as stack:
        load = await led_by_a_rule(
            stack, lambda service: stack.write_config(_config(istiod, service)), SERVICES, str, workers
        )
    assert load.failures == [], f"{len(load.failures)} beside {load.answers} answers: {load.failures[:3]}"


LATE: Final = tuple(f"outbound|8000||late-{number}.models.internal" for number in range(6))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("is_listed", [False, True], ids=["not-listed", "without-endpoints"])
async def test_what_serves_a_rule_comes_under_load(
    istiod: FakeIstiod, engines: list[SimulatorServer], workers: int, is_listed: bool
) -> None:
    """Until Envoy has the service and its endpoints, requests get what they got before: none fails there."""
    models = {
        f"sim-{number}": {"rules": [{"cluster": name, "model": "sim"}]} for number, name in enumerate(LATE)
    }
    if is_listed:
        for service in LATE:
            istiod.set(service)
    config = {**_config(istiod, SERVICES[0]), "models": models}
    answers, failures = 0, []
    async with running_stack([], config, workers=workers) as stack:
        for number, service in enumerate(LATE):
            async with Load(stack, f"sim-{number}", clients=8, stream=False, max_tokens=4) as load:

                async def asked(load: Load = load) -> int:
                    return len(load.failures)

                await eventually(asked, lambda count: count > 16)
                istiod.set(service, *(lb_endpoint("127.0.0.1", engine.port) for engine in engines))
                await load.more(32)
            answers += load.answers
            said = "No endpoint of model" if is_listed else "engines that serve it are not known yet"
            failures += [failure for failure in load.failures if said not in failure.what]
    assert failures == [], f"{len(failures)} beside {answers} answers: {failures[:3]}"
