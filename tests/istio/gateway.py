"""Tokenway behind a gateway that a real istiod configures by what `tokenway render istio` prints."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from extproc.istio_gateway.manifests import Manifest
from testbed.istio_proxy import Proxy, running_proxy
from testbed.istiod import Istiod, running_istiod
from tests.e2e.harness import Stack, recording, simulators
from tests.e2e.istio_scenarios import CONFIG, Under
from tokenway.cli.render import rendered

NAMESPACE: Final = "istio-system"
LABELS: Final = {"istio": "ingressgateway"}


class IstioStack(Stack):
    """A stack whose Envoy is configured by an istiod, which reads what is rendered from files."""

    istiod: Istiod
    proxy: Proxy

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Put tokenway.yaml in place in one step."""
        super().write_config({"istio_gateway": {"port": self.port}, **config})

    def write_manifests(self) -> None:
        """Render, and put it where istiod reads it."""
        files = rendered(self.run_dir / "tokenway.yaml")
        for name, manifests in files.items():
            self.istiod.write(name, *map(_on_loopback, manifests))

    async def start_envoy(self) -> None:
        """Wait until Envoy has the listener and all endpoints."""
        self.write_manifests()
        await self.proxy.has_listener(self.port)
        for name, endpoints in self.listed().items():
            await self.proxy.has_endpoints(name, *endpoints)

    def listed(self) -> dict[str, list[str]]:
        """Endpoints by cluster, as clusters.json has them."""
        clusters = json.loads((self.run_dir / "clusters.json").read_text())["clusters"]
        return {
            each["name"]: [f"{one['address']}:{one['port']}" for one in each["endpoints"]]
            for each in clusters
        }


def _on_loopback(manifest: Manifest) -> Manifest:
    """A Gateway's port is opened on loopback alone: nothing else is to reach a test."""
    if manifest["kind"] != "Gateway":
        return manifest
    servers = [{**server, "bind": "127.0.0.1"} for server in manifest["spec"]["servers"]]
    return {**manifest, "spec": {**manifest["spec"], "servers": servers}}


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
        recorders = [await exits.enter_async_context(recording()) for _ in range(3)]
        stack = IstioStack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), 1)
        exits.callback(shutil.rmtree, stack.run_dir, ignore_errors=True)
        exits.push_async_callback(stack.stop)
        under = Under(stack, engines, *recorders)
        stack.write_config(config)
        stack.write_clusters(*under.clusters())
        await stack.start_gateway()
        istiod = await exits.enter_async_context(
            running_istiod(stack.run_dir / "istiod", environment={"PILOT_ENVOY_FILTER_STATS": "true"})
        )
        proxy = await exits.enter_async_context(
            running_proxy(stack.run_dir / "proxy", istiod.port, labels=LABELS, namespace=NAMESPACE)
        )
        stack.istiod, stack.proxy = istiod, proxy
        await stack.start_envoy()
        yield Behind(under, istiod, proxy, stack)
