"""The real Envoy as an Istio gateway: all it has comes from istiod, by what istio-proxy writes as bootstrap.

A test runs it with `running_proxy` and waits for listeners and endpoints, which istiod sends when it likes.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from testbed.processes import (
    SETTLE_TIMEOUT_S,
    Subprocess,
    answers,
    envoy_binary,
    eventually,
    free_port,
    get,
    get_json,
)

STARTS: Final = 3
"""A port is lost to another process once in many runs; twice in a row there is another cause."""

H2: Final = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
}


ADDRESS: Final = "127.0.0.254"
"""Where the gateway says that it is. No endpoint is there: istiod would take that workload's labels for the
gateway's."""


@dataclass(slots=True)
class Proxy:
    """One Envoy; `running_proxy` starts and ends it.

    Attributes:
        folder: For its bootstrap and log.
        istiod_port: Plaintext xDS.
        labels: What Gateways and EnvoyFilters select it by.
        namespace: Of its workload; EnvoyFilters of other namespaces than this and the root do not reach it.
        version: Of the istio-proxy it stands for; by default what `TOKENWAY_ISTIO_PROXY` says.
        admin_port: Envoy's own.
    """

    folder: Path
    istiod_port: int
    labels: Mapping[str, str]
    namespace: str = "tokenway"
    version: str = field(default_factory=lambda: os.environ.get("TOKENWAY_ISTIO_PROXY", "1.31.0"))
    admin_port: int = field(default_factory=free_port)
    _process: Subprocess | None = None

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "envoy.log"

    @property
    def process(self) -> Subprocess:
        """The running one."""
        assert self._process is not None
        return self._process

    def bootstrap(self) -> dict[str, Any]:
        """A node as istiod wants it described, and where istiod is."""
        domain = f"{self.namespace}.svc.cluster.local"
        return {
            "node": {
                "id": f"router~{ADDRESS}~edge-1.{self.namespace}~{domain}",
                "cluster": "edge",
                "metadata": {
                    "NAMESPACE": self.namespace,
                    "CLUSTER_ID": "Kubernetes",
                    "ISTIO_VERSION": self.version,
                    "LABELS": dict(self.labels),
                },
            },
            "admin": {"address": _address(self.admin_port)},
            "dynamic_resources": {
                "ads_config": {
                    "api_type": "DELTA_GRPC",
                    "transport_api_version": "V3",
                    "set_node_on_first_message_only": True,
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
                },
                "cds_config": {"ads": {}, "resource_api_version": "V3"},
                "lds_config": {"ads": {}, "resource_api_version": "V3"},
            },
            "static_resources": {
                "clusters": [
                    {
                        "name": "xds-grpc",
                        "type": "STATIC",
                        "connect_timeout": "1s",
                        "typed_extension_protocol_options": H2,
                        "load_assignment": {
                            "cluster_name": "xds-grpc",
                            "endpoints": [
                                {"lb_endpoints": [{"endpoint": {"address": _address(self.istiod_port)}}]}
                            ],
                        },
                    }
                ]
            },
        }

    async def start(self) -> None:
        """Start, and wait until its admin port answers: what istiod sends may still be on its way.

        Raises:
            AssertionError: It ended, or took too long; shows the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(STARTS - 1):
            try:
                return await self._start()
            except AssertionError as error:
                if "Address already in use" not in str(error):
                    raise
            self.admin_port = free_port()
        return await self._start()

    async def _start(self) -> None:
        path = self.folder / "envoy.yaml"
        path.write_text(yaml.safe_dump(self.bootstrap(), sort_keys=False))
        self._process = await Subprocess.start(
            [str(envoy_binary()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart"], self.log
        )
        await answers(self._process, f"{self._url}/server_info")

    async def kill(self) -> None:
        """SIGKILL; harmless if it is gone."""
        if self._process is not None:
            await self._process.kill()

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    async def has_listener(self, port: int) -> None:
        """Wait until it listens at a port.

        Raises:
            AssertionError: It does not in time; shows what Envoy refused of istiod's.
        """

        async def read() -> tuple[bool, str]:
            listeners = await get_json(f"{self._url}/listeners?format=json")
            sockets = [
                one["local_address"].get("socket_address", {})
                for one in listeners.get("listener_statuses", ())
            ]
            return any(socket.get("port_value") == port for socket in sockets), self.refused()

        await eventually(read, lambda found: found[0])

    async def has_endpoints(self, cluster: str, *endpoints: str, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Wait until a cluster has exactly these endpoints, `ip:port`."""

        async def read() -> set[str]:
            rows = (await get(f"{self._url}/clusters")).decode().splitlines()
            begin = f"{cluster}::"
            parts = [row.removeprefix(begin).split("::") for row in rows if row.startswith(begin)]
            return {part[0] for part in parts if part[1] == "cx_total"}

        await eventually(read, lambda found: found == set(endpoints), timeout_s)

    async def follows(self) -> None:
        """Wait until it is connected to istiod, which it tries again after 30 s at most."""

        async def read() -> str:
            return (await get(f"{self._url}/stats?filter=^control_plane.connected_state$")).decode().strip()

        await eventually(read, lambda found: found == "control_plane.connected_state: 1", 60)

    def refused(self) -> str:
        """Lines of the log that say what Envoy did not take."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line[:2000] for line in lines if "rejected" in line or "Error adding" in line)

    async def config_dump(self) -> dict[str, Any]:
        """What it has, with endpoints."""
        return await get_json(f"{self._url}/config_dump?include_eds")


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@asynccontextmanager
async def running_proxy(
    folder: Path, istiod_port: int, *, labels: Mapping[str, str], **settings: Any
) -> AsyncIterator[Proxy]:
    """An Envoy in a folder, with the settings of `Proxy`; killed at the end."""
    proxy = Proxy(folder, istiod_port, labels, **settings)
    try:
        await proxy.start()
        yield proxy
    finally:
        await proxy.kill()
