"""One istiod tells both, the gateway and Tokenway: somebody edits a ServiceEntry, and nothing else is edited.

Tokenway has no clusters file here; what the gateway needs is rendered once, without any endpoint.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testbed.control_planes.record import DEFAULT, HOST, endpoint, service_entry, subsets
from testbed.istio_proxy import running_proxy
from testbed.istiod import Istiod, running_istiod
from tests.e2e.harness import (
    DEBUG_TOKEN_ENV,
    EngineProcess,
    Load,
    chat,
    eventually,
    key_of,
    post,
    sample,
    simulators,
)
from tests.istio.gateway import LABELS, NAMESPACE, IstioStack
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

MODEL = "sim"
LARGE = "large"
"""A model of the endpoints in a subset alone."""

NOTICED_S = 60.0
"""A hung istiod is noticed after 30 s at most; the rest is room for a busy machine."""


def config(istiod: Istiod) -> dict[str, Any]:
    """Both models, from one host of the mesh."""
    return {
        "discovery": {"istio": {"address": istiod.address, "namespace": NAMESPACE}},
        "models": {
            MODEL: {"rules": [{"cluster": f"{HOST}:8000"}]},
            LARGE: {"rules": [{"cluster": f"{HOST}:8000", "model": MODEL, "subset": {"subset": "large"}}]},
        },
        "explain": {"debug_token_env": DEBUG_TOKEN_ENV},
        "health": {"interval_s": 1},
    }


def at(engine: SimulatorServer, **fields: Any) -> dict[str, Any]:
    """An endpoint of a ServiceEntry."""
    return endpoint("127.0.0.1", engine.port, **fields)


@dataclass(frozen=True, slots=True)
class Mesh:
    """What an operator has.

    Attributes:
        istiod: Reads files, and is the one source of endpoints.
        stack: Tokenway, and the gateway that istiod configures.
    """

    istiod: Istiod
    stack: IstioStack

    def declare(self, *endpoints: dict[str, Any]) -> None:
        """Edit the ServiceEntry."""
        self.istiod.write("models.yaml", service_entry(*endpoints), subsets(large={"size": "large"}))

    async def known(self, *keys: str) -> None:
        """Wait until the gateway and Tokenway both have exactly these endpoints."""
        await self.stack.proxy.has_endpoints(DEFAULT, *keys)

        async def read() -> set[str]:
            return {key.rpartition("@")[2] for key in await self.stack.rows()}

        await eventually(read, lambda found: found == set(keys))

    async def served(self) -> dict[str, int]:
        """Requests that each endpoint ended, by `ip:port`."""
        rows = await self.stack.rows()
        return {key.rpartition("@")[2]: row["served_total"] for key, row in rows.items()}

    async def serves(self) -> None:
        """Wait until a new connection is served.

        An istiod that has its configuration from files answers before it has read all of them: a Gateway
        without its routes is 404.
        """

        async def asked() -> int:
            return (await post(self.stack, chat(MODEL, "hello"))).status

        await eventually(asked, lambda status: status == 200)

    async def left_at(self, key: str) -> int:
        """Wait until requests are in flight at this endpoint alone; how many."""

        async def read() -> dict[str, int]:
            return {
                name.rpartition("@")[2]: row["requests"] for name, row in (await self.stack.rows()).items()
            }

        counts = await eventually(read, lambda found: sum(found.values()) == found[key])
        return counts[key]

    async def age_s(self) -> float:
        """How old istiod's word is, as Tokenway says."""
        return sample(await self.stack.metrics(), 'tokenway_discovery_age_seconds{source="istio"}') or 0.0


@asynccontextmanager
async def meshed(folder: Path, *endpoints: dict[str, Any]) -> AsyncIterator[Mesh]:
    """Everything but the engines, with these declared; ended after the block."""
    async with AsyncExitStack() as exits:
        stack = IstioStack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), 1)
        exits.callback(shutil.rmtree, stack.run_dir, ignore_errors=True)
        exits.push_async_callback(stack.stop)
        stack.istiod = await exits.enter_async_context(running_istiod(folder))
        mesh = Mesh(stack.istiod, stack)
        mesh.declare(*endpoints)
        stack.write_config(config(stack.istiod))
        stack.write_clusters()
        await stack.start_gateway()
        stack.proxy = await exits.enter_async_context(
            running_proxy(stack.run_dir / "proxy", stack.istiod.port, labels=LABELS, namespace=NAMESPACE)
        )
        stack.write_manifests()
        await stack.proxy.has_listener(stack.port)
        await mesh.known(*(f"127.0.0.1:{one['ports']['http']}" for one in endpoints))
        await mesh.serves()
        yield mesh


def keys_of(engines: Sequence[SimulatorServer]) -> list[str]:
    """`ip:port` of each."""
    return list(map(key_of, engines))


async def test_edits_of_the_service_entry_under_load(folder: Path) -> None:
    """Engines come, go and weigh otherwise: no request fails, and what came serves."""
    async with simulators(3, time_scale=0.05) as engines, meshed(folder, *map(at, engines[:2])) as mesh:
        async with (
            Load(mesh.stack, MODEL, clients=4, stream=False) as whole,
            Load(mesh.stack, MODEL, clients=4, stream=True) as streamed,
        ):
            for declared in (engines, engines[1:], engines[2:], engines[:1], engines):
                mesh.declare(*map(at, declared))
                await mesh.known(*keys_of(declared))
                before = await mesh.served()
                await asyncio.gather(whole.more(20), streamed.more(20))

                async def more(before: dict[str, int] = before) -> bool:
                    return all(count > before[key] for key, count in (await mesh.served()).items())

                await eventually(more, bool)
            mesh.declare(at(engines[0], weight=7), *map(at, engines[1:]))

            async def weights() -> list[int]:
                return sorted(row["weight"] for row in (await mesh.stack.rows()).values())

            await eventually(weights, lambda found: found == [1, 1, 7])
            await asyncio.gather(whole.more(20), streamed.more(20))
        assert whole.failures == []
        assert streamed.failures == []
        await mesh.stack.settled()


async def test_a_subset_is_what_the_file_says_now(folder: Path) -> None:
    """A model of a subset is served by its members, which a label in the file decides."""
    async with simulators(2, time_scale=0.01) as engines:
        first, second = engines
        async with meshed(folder, at(first, labels={"size": "large"}), at(second)) as mesh:

            async def only(engine: SimulatorServer) -> None:
                async def labelled() -> set[str]:
                    rows = await mesh.stack.rows()
                    return {key.rpartition("@")[2] for key, row in rows.items() if "subset" in row["labels"]}

                await eventually(labelled, lambda found: found == {key_of(engine)})
                await mesh.stack.settled()  # the request that waited for the routes may end just now
                before = await mesh.served()
                async with mesh.stack.client() as client:
                    for number in range(6):
                        answer = await client.chat.completions.create(
                            model=LARGE, messages=[{"role": "user", "content": f"{number}"}], max_tokens=3
                        )
                        assert answer.choices[0].message.content
                await mesh.stack.settled()
                after = await mesh.served()
                assert {key for key in after if after[key] > before[key]} == {key_of(engine)}

            await only(first)
            mesh.declare(at(first), at(second, labels={"size": "large"}))
            await only(second)


async def test_istiod_killed_started_and_paused_under_load(folder: Path) -> None:
    """Gateway and Tokenway go on with what they know; nothing flaps, what is cached is known, edits come."""
    async with simulators(3, time_scale=0.05) as engines, meshed(folder, *map(at, engines[:2])) as mesh:
        stack, istiod = mesh.stack, mesh.istiod
        async with Load(stack, MODEL, clients=6, stream=True) as load:
            for number in range(4):
                assert (await post(stack, chat(MODEL, f"{number} " + "cached " * 2000))).status == 200
            before = await stack.rows()
            assert any(row["cached_blocks"] for row in before.values())
            await istiod.kill()
            await eventually(mesh.age_s, lambda age: age > 1, NOTICED_S)
            await load.more(40)
            await istiod.start()
            await eventually(mesh.age_s, lambda age: age == 0, NOTICED_S)
            await stack.proxy.follows()
            await load.more(40)
            await mesh.serves()  # the load's connections are old ones, which would outlive the listener
            after = await stack.rows()
            assert after.keys() == before.keys()
            assert all(after[key]["cached_blocks"] >= before[key]["cached_blocks"] for key in before)
            istiod.pause()
            mesh.declare(*map(at, engines))
            await load.more(40)
            istiod.resume()
            await mesh.known(*keys_of(engines))
            await load.more(40)
        assert load.failures == []
        await stack.settled()


async def test_tokenway_killed_and_edits_go_on(folder: Path) -> None:
    """Without Tokenway the gateway itself balances over istiod's endpoints, also those that come then."""
    async with simulators(2, time_scale=0.01) as engines, meshed(folder, at(engines[0])) as mesh:
        stack = mesh.stack
        async with Load(stack, MODEL, clients=4, stream=True) as load:
            await load.more(20)
            assert load.failures == []
            await stack.gateway.kill()
            mesh.declare(at(engines[1]))
            await stack.proxy.has_endpoints(DEFAULT, key_of(engines[1]))
            await load.more(20)
            await stack.start_gateway()
            await mesh.known(key_of(engines[1]))
            before = (await mesh.served())[key_of(engines[1])]
            await load.more(20)

            async def served() -> int:
                return (await mesh.served())[key_of(engines[1])]

            await eventually(served, lambda count: count > before)
        # Envoy goes on without Tokenway with what was there, and with what it had begun to send.
        assert load.failures == []


async def test_an_engine_is_killed_and_then_taken_out(folder: Path, tmp_path: Path) -> None:
    """What it had begun to answer breaks off, and nothing else: the gateway tries the next of the list.

    It is stopped first, and clients ask no more, so that what is in flight there at the kill can be counted.
    """
    engines = [EngineProcess(tmp_path / f"{number}.log", "--model", MODEL) for number in range(2)]
    try:
        await asyncio.gather(*(engine.start() for engine in engines))
        declared = [endpoint("127.0.0.1", engine.port) for engine in engines]
        async with meshed(folder, *declared) as mesh:
            streamed = Load(mesh.stack, MODEL, clients=4, stream=True, max_tokens=200)
            whole = Load(mesh.stack, MODEL, clients=2, stream=False, max_tokens=50)
            async with streamed, whole:
                await asyncio.gather(streamed.more(8), whole.more(4))
                assert streamed.failures == whole.failures == []
                engines[0].pause()
                streamed.ask_no_more()
                whole.ask_no_more()
                in_flight = await mesh.left_at(engines[0].key)
                await engines[0].kill()
            assert len(streamed.failures) <= in_flight, streamed.failures
            assert whole.failures == [], "an answer that has not begun comes from elsewhere"
            async with Load(mesh.stack, MODEL, clients=4, stream=True) as load:
                await load.more(20)
                mesh.declare(declared[1])
                await mesh.known(engines[1].key)
                await load.more(20)
            assert load.failures == []
            await mesh.stack.settled()
            dump = json.dumps(await mesh.stack.proxy.config_dump())
            assert f'"port_value": {engines[0].port}' not in dump
    finally:
        await asyncio.gather(*(engine.kill() for engine in engines))
