"""A real istiod on loopback, fed from files or by an API server, that tests may kill, restart and pause.

    async with running_istiod(folder) as istiod:
        istiod.write("models.yaml", service_entry)
        await istiod.knows("llama.models.internal")

Rules:
    1. Its configuration is written by renaming a whole file into place, as istiod's file store wants it.
    2. Ports stay the same over restarts, so that clients can come back.
    3. What it sends is for upstream Envoy: Istio's own extensions are switched off.
"""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from testbed.control_planes.build import binary, is_built
from testbed.empty_kubernetes import EmptyKubernetes
from testbed.processes import Subprocess, answers, eventually, free_port, get

STARTS: Final = 3
"""A port is lost to another process once in many runs; twice in a row there is another cause."""

MESH: Final[Mapping[str, Any]] = {
    "enableAutoMtls": False,
    "ingressControllerMode": "OFF",
    "rootNamespace": "istio-system",
}
"""Plain connections to endpoints, and nothing made for an ingress."""

ENVIRONMENT: Final[Mapping[str, str]] = {
    "ENABLE_CA_SERVER": "false",
    "INJECT_ENABLED": "false",
    "VALIDATION_WEBHOOK_CONFIG_NAME": "",
    "INJECTION_WEBHOOK_CONFIG_NAME": "",
    "PILOT_ENABLE_ALPN_FILTER": "false",
    "PILOT_ENABLE_METADATA_EXCHANGE": "false",
    "PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER": "false",
    "PILOT_DEBOUNCE_AFTER": "10ms",
    "POD_NAME": "istiod",
    "POD_NAMESPACE": "istio-system",
}
"""No certificates, no webhooks, no deployments; and a change is sent soon."""


def is_available() -> bool:
    """True if istiod is built."""
    return is_built("istio")


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files for xDS over TLS.

    Attributes:
        certificate: Of istiod, and those between it and the root.
        key: Of that certificate.
        root: Who signs clients' certificates.
    """

    certificate: Path
    key: Path
    root: Path


@dataclass(slots=True)
class Istiod:
    """One istiod; `running_istiod` starts and ends it.

    Attributes:
        folder: For its configuration and its log.
        kubeconfig: Of the API server it reads; without one it reads the files of `config_dir`.
        certificates: Serve TLS with these at `tls_port` as well.
        environment: Variables on top of `ENVIRONMENT`.
        mesh: Settings on top of `MESH`.
        port: xDS, plaintext.
        tls_port: xDS over TLS, if there are certificates, or `ENABLE_CA_SERVER` has it make its own.
        http_port: `/ready` and the debug pages.
        metrics_port: Its own metrics.
    """

    folder: Path
    kubeconfig: Path | None = None
    certificates: Certificates | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    mesh: Mapping[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    tls_port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    _process: Subprocess | None = None
    _empty: EmptyKubernetes | None = None

    @property
    def config_dir(self) -> Path:
        """Where its file store looks."""
        return self.folder / "config"

    @property
    def log(self) -> Path:
        """What it printed, in all its lives."""
        return self.folder / "istiod.log"

    @property
    def address(self) -> str:
        """`ip:port` of plaintext xDS."""
        return f"127.0.0.1:{self.port}"

    @property
    def process(self) -> Subprocess:
        """The running one."""
        assert self._process is not None
        return self._process

    def write(self, name: str, *documents: Mapping[str, Any] | str) -> None:
        """Put a file of YAML documents in place in one step; a text is taken as it is, broken or not."""
        texts = [
            document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
            for document in documents
        ]
        self.config_dir.mkdir(parents=True, exist_ok=True)
        # The file store reads what ends in .yaml, so it does not see the file before it is whole.
        new = self.config_dir / f"{name}.new"
        new.write_text("---\n".join(texts))
        new.replace(self.config_dir / name)

    def remove(self, name: str) -> None:
        """Take a file away."""
        (self.config_dir / name).unlink()

    async def start(self) -> None:
        """Start, and wait until it is ready; with other ports if it lost one before it ever ran.

        Raises:
            AssertionError: It ended, or took too long; shows the end of its log.
        """
        first = not self.log.exists()
        for _ in range(STARTS - 1):
            try:
                return await self._start()
            except AssertionError as error:
                if not first or "address already in use" not in str(error):
                    raise
            self.port, self.tls_port = free_port(), free_port()
            self.http_port, self.metrics_port = free_port(), free_port()
        return await self._start()

    async def _start(self) -> None:
        self.config_dir.mkdir(parents=True, exist_ok=True)
        mesh = self.folder / "mesh.yaml"
        mesh.write_text(yaml.safe_dump({**MESH, **self.mesh}))
        arguments = [
            *("--meshConfig", str(mesh), "--httpsAddr", "", "--ctrlz_port", "0"),
            *("--grpcAddr", self.address, "--httpAddr", f"127.0.0.1:{self.http_port}"),
            *("--monitoringAddr", f"127.0.0.1:{self.metrics_port}"),
        ]
        arguments += ["--registries", "Kubernetes", "--kubeconfig", str(await self._kubeconfig())]
        if self.kubeconfig is None:
            arguments += ["--configDir", str(self.config_dir)]
        signs = self.environment.get("ENABLE_CA_SERVER") == "true"
        is_secure = signs or self.certificates is not None
        arguments += ["--secureGRPCAddr", f"127.0.0.1:{self.tls_port}" if is_secure else ""]
        if self.certificates is not None:
            arguments += [
                *("--tlsCertFile", str(self.certificates.certificate)),
                *("--tlsKeyFile", str(self.certificates.key)),
                *("--caCertFile", str(self.certificates.root)),
            ]
        self._process = await Subprocess.start(
            [str(binary("istio", "pilot-discovery")), "discovery", *arguments],
            self.log,
            {**ENVIRONMENT, **self.environment},
        )
        await answers(self._process, f"{self._url}/ready")

    async def _kubeconfig(self) -> Path:
        """Of the API server it reads, or of one that has nothing to be read."""
        if self.kubeconfig is not None:
            return self.kubeconfig
        path = self.folder / "empty.kubeconfig"
        if self._empty is None:
            self._empty = EmptyKubernetes()
            await self._empty.start()
            self._empty.write_kubeconfig(path)
        return path

    async def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        self.process.signal(signal.SIGTERM)
        await self.process.ended()

    async def kill(self) -> None:
        """SIGKILL; harmless if it is gone."""
        if self._process is not None:
            await self._process.kill()
        if self._empty is not None:
            await self._empty.stop()
            self._empty = None

    def pause(self) -> None:
        """It hangs: connections stay, nothing is sent."""
        self.process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self.process.signal(signal.SIGCONT)

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    async def debug(self, page: str) -> Any:
        """A debug page's JSON: `endpointz`, `configz`, `syncz`, `config_dump?proxyID=...`."""
        return json.loads(await get(f"{self._url}/debug/{page}"))

    async def knows(self, host: str) -> None:
        """Wait until istiod knows a service of that host."""

        async def read() -> bool:
            return host in (await get(f"{self._url}/debug/registryz")).decode()

        await eventually(read, bool)

    async def metrics(self) -> str:
        """One scrape of its own metrics."""
        return (await get(f"http://127.0.0.1:{self.metrics_port}/metrics")).decode()


@asynccontextmanager
async def running_istiod(folder: Path, **settings: Any) -> AsyncIterator[Istiod]:
    """An istiod in a folder, with the settings of `Istiod`; killed at the end."""
    istiod = Istiod(folder, **settings)
    try:
        await istiod.start()
        yield istiod
    finally:
        await istiod.kill()
