"""Stacks that tests share because none of them destroys them. All end-to-end tests run on one event loop."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from testbed.processes import free_port
from tests.e2e.harness import (
    DEBUG_TOKEN_ENV,
    IS_ISTIO_PROFILE,
    LEASE_S,
    Recorder,
    Stack,
    cluster,
    envoy_binary,
    key_of,
    recording,
    running_stack,
    simulators,
)
from tests.e2e.variants import ISTIO_PROFILE
from tokenway.simulator.server.app import SimulatorServer

REPLICAS = 8
"""As many as the burst test spreads 64 requests over."""

TIMEOUT_S = 2.0
"""For whole answers: longer than any simulated one here, short enough to wait for."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A gateway whose models are all that tests need.

    Attributes:
        stack: Serves `sim` (8 simulators), `recorded` and `tuned` (the recorder; `tuned` by the adapter
            `polite`), `pair` (both recorders), `steered` (the same cluster, but by a label the recorder
            alone) and `dead` (a port where no server listens).
        engines: Behind `sim`.
        recorder: Behind `recorded` and others.
        decoy: The other recorder, which no request for `steered` may reach.
    """

    stack: Stack
    engines: list[SimulatorServer]
    recorder: Recorder
    decoy: Recorder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By the profile for Istio those files alone that a stage runs by it."""
    if not IS_ISTIO_PROFILE:
        return
    here = Path(__file__).parent
    left_out = pytest.mark.skip(reason="says nothing of an Istio gateway's Envoy: see tests/e2e/variants.py")
    for item in items:
        if item.path.parent == here and item.path.stem.removeprefix("test_") not in ISTIO_PROFILE:
            item.add_marker(left_out)


@pytest.fixture(scope="session", autouse=True)
def _envoy() -> None:
    if "TOKENWAY_ENVOY" not in os.environ and not envoy_binary().exists():
        pytest.fail("no Envoy: run `make envoy`, or set TOKENWAY_ENVOY to the binary")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines(_envoy: None) -> AsyncIterator[list[SimulatorServer]]:
    """Eight fast replicas."""
    async with simulators(REPLICAS, time_scale=0.1) as started:
        yield started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(engines: list[SimulatorServer]) -> AsyncIterator[Shared]:
    """One worker with every kind of model."""
    async with recording() as recorder, recording() as decoy:
        dead = f"127.0.0.1:{free_port()}"
        clusters = [
            cluster("sim", map(key_of, engines)),
            cluster("recorder", [recorder.key]),
            cluster("dead", [dead]),
        ]
        steered = cluster("steered", [recorder.key, decoy.key])
        steered["endpoints"][0]["labels"] = {"pool": "right"}
        models = {
            "sim": {"rules": [{"cluster": "sim"}], "aliases": ["simulated"]},
            "recorded": {"rules": [{"cluster": "recorder"}]},
            "tuned": {"rules": [{"cluster": "recorder", "lora": "polite"}]},
            "steered": {"rules": [{"cluster": "steered", "subset": {"pool": "right"}}]},
            "pair": {"rules": [{"cluster": "steered"}]},
            "dead": {"rules": [{"cluster": "dead"}]},
        }
        config = {
            "models": models,
            "explain": {"debug_token_env": DEBUG_TOKEN_ENV},
            "signals": {"timeout_s": TIMEOUT_S, "first_byte_timeout_s": TIMEOUT_S / 2},
        }
        async with running_stack([*clusters, steered], config) as stack:
            yield Shared(stack, engines, recorder, decoy)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two_workers(engines: list[SimulatorServer]) -> AsyncIterator[Stack]:
    """Two workers in front of the same replicas; leases short enough to be seen running out."""
    config = {"load": {"lease_s": LEASE_S}}
    async with running_stack([cluster("sim", map(key_of, engines))], config, workers=2) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="session")
async def plain(shared: Shared) -> AsyncIterator[Shared]:
    """The shared gateway with clean recorders; afterwards every counter must be back at exactly zero."""
    shared.recorder.reset()
    shared.decoy.reset()
    yield shared
    await shared.stack.settled()


@pytest_asyncio.fixture(loop_scope="session")
async def client(plain: Shared) -> AsyncIterator[AsyncOpenAI]:
    """The official client of the shared gateway."""
    async with plain.stack.client() as opened:
        yield opened
