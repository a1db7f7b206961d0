"""Two real vLLM replicas, a Redis and two gateways, each with its own Envoy, shared by all tests here."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from testbed import redis_server
from testbed.vllm.engine import SERVED_MODEL, Vllm, running_replicas
from testbed.vllm.environment import install
from testbed.vllm.environment.make_model import ADAPTERS
from tests.e2e.harness import DEBUG_TOKEN_ENV, Stack, cluster, envoy_binary, eventually
from tests.e2e.pair import running_pair
from tests.real_vllm.asking import Answer

CLUSTER: Final = "vllm"
ROUND_ROBIN: Final = "tiny-round-robin"
"""The same model and replicas by turns: what Tokenway is compared with."""

INFERENCE_LB: Final = "tiny-inference-lb"
"""The same again by AIGW's score."""

HEALTH: Final = {"interval_s": 1.0, "recovery_interval_s": 0.5, "ejection_s": 0.5, "timeout_s": 5.0}
"""Quick to see an engine go and come back; patient with one whose core is busy."""

ANNOUNCE_TIMEOUT_S: Final = 60.0
"""For eight small requests to each engine and a replay, on a busy machine."""

_FIGURES = pytest.StashKey[dict[str, Any]]()


@dataclass(frozen=True, slots=True)
class Deployment:
    """What tests ask and break.

    Attributes:
        replicas: Of model `tiny`, with both adapters.
        gateways: Serve `tiny` by the default policy, by turns and by AIGW's score, and the adapters by name;
            all over both replicas.
        clients: The official client of each gateway.
        redis: A Redis that both gateways could share.
    """

    replicas: list[Vllm]
    gateways: list[Stack]
    clients: list[AsyncOpenAI]
    redis: redis_server.RedisServer

    async def records(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The decision records of answers, from whichever gateway holds them, in order."""
        held: dict[str, dict[str, Any]] = {}
        for gateway in self.gateways:
            await gateway.settled()
            held |= {record["request_id"]: record for record in await gateway.last(500)}
        return [held[answer.decision_id] for answer in answers]


@pytest.fixture(scope="session")
def _environment() -> None:
    if not install.is_ready():
        pytest.skip("no vLLM: run `make vllm`")
    if "TOKENWAY_ENVOY" not in os.environ and not envoy_binary().exists():
        pytest.fail("no Envoy: run `make envoy`, or set TOKENWAY_ENVOY to the binary")


def gateway_config() -> dict[str, Any]:
    """tokenway.yaml of both gateways, but for `server` and `metadata_center`."""
    tokenizer = {"tokenizer": str(install.MODEL)}
    return {
        "models": {
            SERVED_MODEL: {"rules": [{"cluster": CLUSTER}], **tokenizer},
            ROUND_ROBIN: {
                "rules": [{"cluster": CLUSTER, "model": SERVED_MODEL}],
                "load_balancing": {"algorithm": "round_robin"},
                **tokenizer,
            },
            INFERENCE_LB: {
                "rules": [{"cluster": CLUSTER, "model": SERVED_MODEL}],
                "load_balancing": {"algorithm": "inference_lb"},
                **tokenizer,
            },
            **{name: {"rules": [{"cluster": CLUSTER, "lora": name}], **tokenizer} for name in ADAPTERS},
        },
        "health": HEALTH,
        "explain": {"debug_token_env": DEBUG_TOKEN_ENV},
    }


async def announcing(gateway: Stack) -> None:
    """Wait until every replica's own events say what it has cached."""

    async def all_announce() -> list[bool]:
        return [row["announcing"] for row in (await gateway.rows()).values()]

    await eventually(all_announce, all, ANNOUNCE_TIMEOUT_S)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(_environment: None) -> AsyncIterator[Deployment]:
    """Everything, started once."""
    folder = Path(tempfile.mkdtemp(prefix="twv", dir="/tmp"))
    try:
        async with AsyncExitStack() as stack:
            redis = stack.enter_context(redis_server.running(folder))
            replicas = await stack.enter_async_context(running_replicas(folder))
            pool = cluster(CLUSTER, [replica.key for replica in replicas])
            gateways = await stack.enter_async_context(running_pair(redis.url, [pool], gateway_config()))
            for gateway in gateways:
                await announcing(gateway)
            clients = [await stack.enter_async_context(gateway.client()) for gateway in gateways]
            yield Deployment(replicas, gateways, clients, redis)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest_asyncio.fixture(loop_scope="session")
async def deployment(shared: Deployment) -> AsyncIterator[Deployment]:
    """The deployment; after the test every load counter of both gateways must be back at exactly zero."""
    yield shared
    for gateway in shared.gateways:
        await gateway.settled()


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[str, Any], None]:
    """Gives figures a name under which they are printed at the end of the run."""

    def add(name: str, figures: Any) -> None:
        pytestconfig.stash.setdefault(_FIGURES, {})[name] = figures

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures: a line each, then all of them as one JSON object."""
    figures = terminalreporter.config.stash.get(_FIGURES, {})
    if figures:
        terminalreporter.section("real vLLM")
        for name, figure in figures.items():
            terminalreporter.write_line(f"{name}: {json.dumps(figure)}")
        terminalreporter.write_line(json.dumps(figures))
