"""Two pickers of one InferencePool behind a real istiod and Envoy, active both; they share one Redis.

Each is a pod of the picker's Service at an address of its own, with the same port.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from testbed import own_network
from testbed.helm import binary
from testbed.istiod import Istiod
from testbed.kubernetes import Cluster
from testbed.processes import free_ports, get
from testbed.redis_server import running
from tests.e2e.harness import Load, Stack, eventually
from tests.e2e.pair import all_settled, gateways_seen, shared
from tests.kubernetes.pool_site import Site, installed

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.istio,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`"),
]

CLIENTS = 8
SECOND = "picker-2"
"""The pod of the second one; it comes and goes."""


@dataclass(frozen=True, slots=True)
class Pickers:
    """Both of them.

    Attributes:
        site: All else, and the first.
        second: The other one.
        address: Where the second one is.
    """

    site: Site
    second: Stack
    address: str

    @property
    def places(self) -> tuple[str, str]:
        """Where they listen."""
        return f"{self.site.address}:{self.site.picker_port}", f"{self.address}:{self.site.picker_port}"

    async def begin(self) -> None:
        """The second one starts, and its pod is ready: the gateway asks both."""
        await self.second.start_gateway()
        await self.site.add_picker_pod(SECOND, self.address)
        await self.site.has_pickers(*self.places)
        for stack in (self.site.stack, self.second):
            await eventually(partial(gateways_seen, stack), lambda seen: seen == 2, 30)

    async def decides(self) -> None:
        """Wait until the second one has decided something."""
        await eventually(lambda: self.second.last(1), bool, 30)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pickers(cluster: Cluster, istiod: Istiod) -> AsyncIterator[Pickers]:
    """In clear text, under FailClose: a picker that is not there is an answer of 500."""
    address = os.environ.get(own_network.VARIABLE)
    if address is None:
        pytest.skip("run by `make test-kubernetes`, in a network of its own")
    async with AsyncExitStack() as exits:
        folder = Path(tempfile.mkdtemp(prefix="twk", dir="/tmp"))
        exits.callback(shutil.rmtree, folder, ignore_errors=True)
        redis = exits.enter_context(running(folder / "redis"))
        config = shared(redis.url, "first")
        site = await exits.enter_async_context(
            installed(cluster, istiod, "plain", address, "replicas-", **config)
        )
        second = Stack(folder / "second", workers=1)
        exits.push_async_callback(second.stop)
        made = Pickers(site, second, str(ip_address(address) + 1))
        _write_configuration(made)
        await made.begin()
        yield made


def _write_configuration(pickers: Pickers) -> None:
    """What the first has, but for its places and its name."""
    config: dict[str, Any] = yaml.safe_load((pickers.site.stack.run_dir / "tokenway.yaml").read_text())
    health, metrics = free_ports(2)
    second = pickers.second
    second.run_dir.mkdir(exist_ok=True)
    for path in pickers.site.stack.run_dir.glob("*.json"):
        shutil.copy(path, second.run_dir)
    config["server"] |= {"run_dir": str(second.run_dir / "run"), "admin": {"port": second.admin_port}}
    config["metadata_center"]["gateway"] = "second"
    config["endpoint_picker"] |= {
        "listen": [pickers.places[1]],
        "health_listen": [f"127.0.0.1:{health}"],
        "metrics_listen": [f"127.0.0.1:{metrics}"],
    }
    (second.run_dir / "tokenway.yaml").write_text(yaml.safe_dump(config))


def loaded(pickers: Pickers, padding: int = 0) -> Load:
    """Clients of streams, for the length of a block."""
    return Load(pickers.site.stack, "sim", clients=CLIENTS, stream=True, padding=padding)


async def test_one_that_is_stopped_under_load_costs_no_request(pickers: Pickers) -> None:
    """Its pod terminates as it is asked to stop, as kubelets do; it comes back and is asked again."""
    site, second = pickers.site, pickers.second
    async with loaded(pickers) as load:
        await load.more(40)
        await pickers.decides()
        await site.cluster.delete_pod(SECOND, namespace=site.namespace)
        second.gateway.signal(signal.SIGTERM)
        await site.has_pickers(pickers.places[0])
        assert second.gateway.is_running
        await load.more(40)
        assert await second.gateway.ended() == 0
        await load.more(40)
        await site.cluster.delete_pod(SECOND, namespace=site.namespace, gone=True)
        await pickers.begin()
        await pickers.decides()
        await load.more(40)
    assert load.failures == []
    await all_settled([site.stack, second], 20)


@pytest.mark.parametrize("padding", [0, 220_000])
async def test_one_that_is_killed_costs_what_it_had(pickers: Pickers, padding: int) -> None:
    """Though its pod stays in the Service: another is asked instead, for prompts of any size."""
    site, second = pickers.site, pickers.second
    async with loaded(pickers, padding) as load:
        await load.more(40)
        await pickers.decides()
        assert load.failures == []
        await second.gateway.kill()
        killed_s = time.monotonic()
        await load.more(120)
        await site.cluster.delete_pod(SECOND, namespace=site.namespace, gone=True)
        await site.has_pickers(pickers.places[0])
        await load.more(40)
    assert [failure for failure in load.failures if failure.began_s > killed_s] == []
    assert len(load.failures) <= CLIENTS
    # Its share of the load ends with its lease.
    await all_settled([site.stack], 20)
    await pickers.begin()


async def test_one_that_hangs_costs_what_it_had(pickers: Pickers) -> None:
    """Connected and silent, as a machine that is gone: what is sent there is soon asked of the other."""
    site, second = pickers.site, pickers.second
    async with loaded(pickers) as load:
        await load.more(40)
        await pickers.decides()
        assert load.failures == []
        second.gateway.signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        await load.more(200)
        await eventually(partial(_is_left_out, pickers), bool, 60)
        await load.more(200)
    assert [failure for failure in load.failures if failure.began_s > stopped_s] == []
    assert len(load.failures) <= CLIENTS
    second.gateway.signal(signal.SIGCONT)
    await all_settled([site.stack, second], 20)


async def _is_left_out(pickers: Pickers) -> bool:
    """The gateway's health checks have found the second one silent."""
    url = f"http://127.0.0.1:{pickers.site.proxy.admin_port}/clusters"
    flags = f"{pickers.places[1]}::health_flags::/failed_active_hc"
    return flags in (await get(url)).decode()
