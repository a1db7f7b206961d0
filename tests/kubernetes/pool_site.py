"""An InferencePool end to end: the chart, installed by helm, on a real API server, with istiod and Envoy.

An EndpointSlice may not name a loopback address. Engines and picker are therefore at other addresses of the
network that `make test-kubernetes` gives its tests, each engine at its own, all at one port: of two pods at
one address and port istiod shows the one or the other.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from testbed.helm import CHART, RELEASE, helm
from testbed.istio_proxy import Proxy
from testbed.istiod import Istiod
from testbed.kubernetes import Cluster, pod
from testbed.processes import REPOSITORY, free_ports
from tests.e2e.harness import Stack, chat, eventually, post
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.settings import ServerSettings

POOL: Final = "llama"
GATEWAY: Final = "edge"
SERVICE: Final = f"{RELEASE}-tokenway"
LABELS: Final = {"app": "vllm"}
GATEWAY_LABELS: Final = {"gateway.networking.k8s.io/gateway-name": GATEWAY}
NUM_ENGINES: Final = 3

CONTROLLER_S: Final = 120.0
"""After an API server was away, as in a test of this stage, its controller of EndpointSlices is back in up to
a minute."""

MODES: Final = {"plain": "FailClose", "self-signed": "FailOpen"}
"""What the picker listens with, and what a request is without a picker."""


@dataclass(frozen=True, slots=True)
class Site:
    """One installation.

    Attributes:
        cluster: Has all of it.
        namespace: Of gateway, pool, engines and picker.
        address: Where the picker listens.
        engines: Simulators, each behind a pod.
        stack: Tokenway, and the port of the gateway.
        proxy: The gateway.
        picker_port: Tokenway's.
        failure_mode: Of the pool.
    """

    cluster: Cluster
    namespace: str
    address: str
    engines: list[SimulatorServer]
    stack: Stack
    proxy: Proxy
    picker_port: int
    failure_mode: str

    async def add_engine_pods(self) -> None:
        """A pod for each engine."""
        for number, engine in enumerate(self.engines):
            ports = {"llm-d.ai/active-ports": str(engine.port)}
            name = f"engine-{number}"
            await self.cluster.apply(pod(name, labels=LABELS, namespace=self.namespace, annotations=ports))
            await self.cluster.make_ready(name, ip=engine.settings.host, namespace=self.namespace)

    async def add_picker_pod(self, name: str = "picker", ip: str | None = None) -> None:
        """The pod that the chart's Deployment would make, with the port where Tokenway listens here."""
        deployment = await self.cluster.get(self._object("apps/v1", "Deployment", SERVICE))
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        ports = {"grpc-ext-proc": self.picker_port}
        await self.cluster.apply(pod(name, labels=labels, namespace=self.namespace, ports=ports))
        await self.cluster.make_ready(name, ip=ip or self.address, namespace=self.namespace)

    async def write_configuration(self) -> None:
        """The files of the ConfigMap that helm has made."""
        found = await self.cluster.get(self._object("v1", "ConfigMap", SERVICE))
        for name, text in found["data"].items():
            (self.stack.run_dir / name).write_text(text)

    async def has_pickers(self, *addresses: str) -> None:
        """Wait until the gateway has exactly these."""
        host = f"{SERVICE}.{self.namespace}.svc.cluster.local"
        await self.proxy.has_endpoints(f"outbound|9002||{host}", *addresses)

    async def has_engines(self) -> None:
        """Wait until the gateway has every engine, by the Service that istiod makes of the pool."""
        selector = f"istio.io%2Finferencepool-name%3D{POOL}"
        path = f"/api/v1/namespaces/{self.namespace}/services?labelSelector={selector}"

        async def read() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = (await self.cluster.request("GET", path))["items"]
            return found

        (shadow,) = await eventually(read, bool, 60)
        assert shadow["spec"]["selector"] == LABELS
        host = f"{shadow['metadata']['name']}.{self.namespace}.svc.cluster.local"
        places = map(self.place_of, self.engines)
        await self.proxy.has_endpoints(f"outbound|54321||{host}", *places, timeout_s=CONTROLLER_S)

    async def status(self) -> int:
        """Of one request's answer."""
        return (await post(self.stack, chat("sim", "hello"))).status

    def place_of(self, engine: SimulatorServer) -> str:
        """`ip:port` of an engine."""
        return f"{engine.settings.host}:{engine.port}"

    def received(self) -> list[int]:
        """How many requests each engine has had."""
        return [len(engine.served) for engine in self.engines]

    async def explained(self) -> dict[str, Any]:
        """What `tokenway explain --last` says."""
        words = ["explain", "--last", "--json", "--admin", self.stack.admin_url]
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "tokenway", *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=REPOSITORY,
        )
        assert done.returncode == 0, done.stderr
        record: dict[str, Any]
        (record,) = json.loads(done.stdout)["records"]
        return record

    def _object(self, version: str, kind: str, name: str) -> dict[str, Any]:
        return {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace},
        }

    def gateway_objects(self) -> list[dict[str, Any]]:
        """A Gateway that is deployed by hand: its address names the Service that selects its pods."""
        service = {"ports": [{"name": "http", "port": 80, "targetPort": self.stack.port}]}
        patch = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": self.stack.port}}}
        on_loopback = {
            "applyTo": "LISTENER",
            "match": {"context": "GATEWAY", "listener": {"portNumber": self.stack.port}},
            "patch": {"operation": "MERGE", "value": patch},
        }
        host = f"{GATEWAY}.{self.namespace}.svc.cluster.local"
        return [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}},
            self._object("v1", "Service", GATEWAY) | {"spec": {**service, "selector": GATEWAY_LABELS}},
            self._object("networking.istio.io/v1alpha3", "EnvoyFilter", "loopback")
            | {"spec": {"configPatches": [on_loopback]}},
            self._object("gateway.networking.k8s.io/v1", "Gateway", GATEWAY)
            | {
                "spec": {
                    "gatewayClassName": "istio",
                    "addresses": [{"type": "Hostname", "value": host}],
                    "listeners": [{"name": "http", "port": 80, "protocol": "HTTP"}],
                }
            },
        ]


@asynccontextmanager
async def installed(
    cluster: Cluster,
    istiod: Istiod,
    tls: str,
    address: str,
    name: str = "",
    istio: Mapping[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[Site]:
    """The chart in a namespace of its own, and all that it needs; everything is ended after the block.

    Args:
        cluster: Has it.
        istiod: Configures the gateway.
        tls: One of `MODES`.
        address: Where the picker listens; the engines are at the tenth after it and the next.
        name: Of the namespace, beside `tls`.
        istio: The chart's section.
        **config: Sections of the configuration that are not the chart's.
    """
    async with AsyncExitStack() as exits:
        (port,) = free_ports(1)
        settings = ServerSettings(profile=PROFILES["llama8b-h100"], time_scale=0.05, port=port)
        engines = [
            await exits.enter_async_context(
                running(replace(settings, host=str(ip_address(address) + 10 + number)))
            )
            for number in range(NUM_ENGINES)
        ]
        stack = Stack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), workers=1)
        exits.callback(shutil.rmtree, stack.run_dir, ignore_errors=True)
        exits.push_async_callback(stack.stop)
        namespace = f"pool-{name}{tls}"
        proxy = Proxy(stack.run_dir / "proxy", istiod.port, GATEWAY_LABELS, namespace=namespace)
        picker, health, metrics = free_ports(3)
        site = Site(cluster, namespace, address, engines, stack, proxy, picker, MODES[tls])
        await cluster.apply(*site.gateway_objects())
        await site.add_engine_pods()
        values = {
            "provider": {"name": "istio-inferencepool"},
            "istio": istio or {},
            "gateway": {"name": GATEWAY},
            "inferencePool": {"name": POOL, "failureMode": site.failure_mode},
            "modelServers": {
                "matchLabels": LABELS,
                "targetPorts": [port],
                "model": "sim",
            },
            "picker": {"tls": {"mode": tls}},
            "leaveSeconds": 5,
            "drainSeconds": 10,
            "config": {  # what is different without a pod around it
                **config,
                "server": {"run_dir": str(stack.run_dir / "run"), "admin": {"port": stack.admin_port}},
                "health": {"interval_s": 600},  # an engine that dies is found by a request
                "endpoint_picker": {
                    "listen": [f"{address}:{picker}"],
                    "health_listen": [f"127.0.0.1:{health}"],
                    "metrics_listen": [f"127.0.0.1:{metrics}"],
                },
                "discovery": {
                    "kubernetes": {
                        "kubeconfig": str(cluster.kubeconfig()),
                        "pool": {"namespace": namespace},
                    }
                },
            },
        }
        words = ("install", RELEASE, str(CHART), "--namespace", namespace)
        kubeconfig = ("--kubeconfig", str(cluster.kubeconfig()))
        done = await asyncio.to_thread(helm, *words, *kubeconfig, values=values)
        assert done.returncode == 0, done.stderr
        await site.write_configuration()
        await stack.start_gateway()
        await site.add_picker_pod()
        exits.push_async_callback(proxy.kill)
        await proxy.start()
        await proxy.has_listener(stack.port)
        await site.has_engines()
        await site.has_pickers(f"{address}:{picker}")
        await eventually(site.status, lambda status: status == 200)
        yield site


def llm_d_kinds() -> list[dict[str, Any]]:
    """Definitions of llm-d's kinds of our own making: any fields."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return [
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.llm-d.ai"},
            "spec": {
                "group": "llm-d.ai",
                "scope": "Namespaced",
                "names": {
                    "plural": plural,
                    "singular": kind.lower(),
                    "kind": kind,
                    "listKind": f"{kind}List",
                },
                "versions": [
                    {
                        "name": "v1alpha2",
                        "served": True,
                        "storage": True,
                        "schema": {"openAPIV3Schema": anything},
                    }
                ],
            },
        }
        for kind, plural in (
            ("InferenceObjective", "inferenceobjectives"),
            ("InferenceModelRewrite", "inferencemodelrewrites"),
        )
    ]
