"""Tokenway behind a gateway that a real istiod configures by what `tokenway render istio` prints.

Both learn endpoints from that istiod, which has them from ServiceEntries that are written here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from extproc.istio_gateway.text import Manifest
from extproc.values.mesh_names import MeshName
from testbed.istio_proxy import Proxy, running_proxy
from testbed.istiod import Istiod, running_istiod
from testbed.processes import eventually
from tests.e2e.harness import Stack, recording, simulators
from tests.e2e.istio_scenarios import CONFIG, Under, place_of
from tokenway.cli.render import rendered

NAMESPACE: Final = "istio-system"
LABELS: Final = {"istio": "ingressgateway"}

NO_COUNT: Final[Mapping[str, Any]] = {"defaultConfig": {"proxyHeaders": {"attemptCount": {"disabled": True}}}}
"""A mesh whose routes do not count attempts unless something of ours has them do it."""

ORIGIN: Final = "https://chat.example.com"
"""Of pages that may call."""


class IstioStack(Stack):
    """A stack whose Envoy is configured by an istiod, which reads what is rendered from files."""

    istiod: Istiod
    proxy: Proxy

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Put tokenway.yaml in place in one step."""
        super().write_config({"istio_gateway": {"port": self.port}, **config})

    def write_manifests(self) -> None:
        """Render, and put it where istiod reads it: the Gateway last, for it opens the port to clients."""
        files = rendered(self.run_dir / "tokenway.yaml")
        for name in sorted(files, key="gateway.yaml".__eq__):
            self.istiod.write(name, *map(on_loopback, files[name]))

    async def declare(self, *clusters: Mapping[str, Any]) -> None:
        """Write ServiceEntries of these clusters, and wait until Envoy and Tokenway have them."""
        self.istiod.write("models.yaml", *map(_service_entry, clusters))
        keys = {
            each["name"]: {f"{one['address']}:{one['port']}" for one in each["endpoints"]}
            for each in clusters
        }
        for name, endpoints in keys.items():
            await self.proxy.has_endpoints(name, *endpoints)

        async def known() -> set[str]:
            return {place_of(row["key"]) for row in (await self.endpoints())["endpoints"]}

        await eventually(known, lambda found: found == set().union(*keys.values()))


def on_loopback(manifest: Manifest) -> Manifest:
    """A Gateway's port is opened on loopback alone: nothing else is to reach a test."""
    if manifest["kind"] != "Gateway":
        return manifest
    servers = [{**server, "bind": "127.0.0.1"} for server in manifest["spec"]["servers"]]
    return {**manifest, "spec": {**manifest["spec"], "servers": servers}}


def _service_entry(cluster: Mapping[str, Any]) -> Manifest:
    name = MeshName.parse(cluster["name"])
    assert name is not None
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": name.host.replace(".", "-"), "namespace": "models"},
        "spec": {
            "hosts": [name.host],
            "location": "MESH_EXTERNAL",
            "resolution": "STATIC",
            "ports": [{"number": name.port, "name": "http", "protocol": "HTTP"}],
            "endpoints": [
                {
                    "address": each["address"],
                    "ports": {"http": each["port"]},
                    "labels": each.get("labels", {}),
                }
                for each in cluster["endpoints"]
            ],
        },
    }


@dataclass(frozen=True, slots=True)
class Behind:
    """All of it.

    Attributes:
        under: For scenarios.
        istiod: Configures Envoy.
        proxy: Envoy.
        stack: Tokenway, and Envoy's ports.
    """

    under: Under
    istiod: Istiod
    proxy: Proxy
    stack: IstioStack


@asynccontextmanager
async def behind_istio(config: Mapping[str, Any] = CONFIG) -> AsyncIterator[Behind]:
    """Simulated engines, recorders, Tokenway, istiod and Envoy; everything is ended after the block."""
    async with AsyncExitStack() as exits:
        engines = await exits.enter_async_context(simulators(2, time_scale=0.1))
        recorders = [await exits.enter_async_context(recording()) for _ in range(4)]
        stack = IstioStack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), 1)
        exits.callback(shutil.rmtree, stack.run_dir, ignore_errors=True)
        exits.push_async_callback(stack.stop)
        under = Under(stack, engines, *recorders)
        istiod = await exits.enter_async_context(running_istiod(stack.run_dir / "istiod", mesh=NO_COUNT))
        proxy = await exits.enter_async_context(
            running_proxy(stack.run_dir / "proxy", istiod.port, labels=LABELS, namespace=NAMESPACE)
        )
        stack.istiod, stack.proxy = istiod, proxy
        discovery = {"istio": {"address": istiod.address}}
        stack.write_config({**config, "discovery": discovery, "edge": {"cors": {"origins": [ORIGIN]}}})
        await stack.start_gateway()
        stack.write_manifests()
        await proxy.has_listener(stack.port)
        await stack.declare(*under.clusters())
        yield Behind(under, istiod, proxy, stack)
