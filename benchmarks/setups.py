"""The set-ups that are compared, each an Envoy with the shipped bootstrap's data path and what is behind it.

    alone         no ext_proc, no access log
    floor         a servicer that answers with constants and drops access-log bytes (`benchmarks.floor`)
    grpcio_floor  the same by grpc.aio
    plain_floor   the same by grpc.aio without Tokenway's settings and its way to answer: gRPC as it comes
    tokenway      Tokenway
    grpcio        Tokenway with `server.transport: grpcio`

All send to the same engines. Those of all but Tokenway are in static clusters with Tokenway's balancing
policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks import processes
from benchmarks.traffic import MODEL, Client, Target, request
from extproc.server.envoys import bootstrap
from testbed.processes import free_port

SetupKind = Literal["alone", "floor", "grpcio_floor", "plain_floor", "tokenway", "grpcio"]

FLOORS: Mapping[SetupKind, str] = {"floor": "native", "grpcio_floor": "grpcio", "plain_floor": "plain"}
"""Bare servicers, and what each speaks gRPC by."""

GATEWAYS: Mapping[SetupKind, str] = {"tokenway": "native", "grpcio": "grpcio"}
"""Tokenway, and its `server.transport`."""

ENVOY = Path(os.environ.get("TOKENWAY_ENVOY", Path(__file__).parents[1] / ".tools/envoy/envoy/_bin/envoy"))
SERVE: Sequence[str] = ("tokenway.cli.main", "serve")
"""Tokenway's own command."""

CLUSTER = "bench"
FALLBACK_CLUSTER = "tokenway-none"
"""What the shipped routes name when none was chosen: everything, in `alone`."""

UNBOUNDED = 100_000
"""Circuit breakers as Tokenway sets them: never what bounds a measurement."""


@dataclass(frozen=True, slots=True)
class Setup(Target):
    """A set-up that serves.

    Attributes:
        pid: The Python process behind Envoy; None in `alone`.
        envoy_pid: Envoy.
        envoy_admin_port: Its admin surface, on 127.0.0.1.
    """

    pid: int | None
    envoy_pid: int
    envoy_admin_port: int

    def cpu_s(self) -> float:
        """Processor time of the Python process so far, in seconds."""
        assert self.pid is not None
        return processes.scheduled_s(self.pid)

    def envoy_cpu_s(self) -> float:
        """The same of Envoy."""
        return processes.scheduled_s(self.envoy_pid)

    def num_passed_by(self) -> int:
        """Requests that Envoy served without the Python process: too late, or failed."""
        url = f"http://127.0.0.1:{self.envoy_admin_port}/stats?filter=ext_proc.*failure_mode_allowed"
        with urllib.request.urlopen(url, timeout=5) as response:
            return sum(int(line.rpartition(b" ")[2]) for line in response.read().splitlines())

    def rss_mib(self) -> float:
        """Resident memory of the Python process in MiB."""
        assert self.pid is not None
        return processes.rss_mib(self.pid)


def envoy_config(
    kind: SetupKind,
    port: int,
    admin_port: int,
    socket: str,
    engines: list[int],
    other_sockets: Sequence[str] = (),
    template: dict[str, Any] | None = None,
) -> str:
    """Envoy's configuration as YAML: the shipped bootstrap, less what the set-up goes without.

    Args:
        kind: Tokenway keeps everything; the others get static clusters; `alone` loses ext_proc and logs.
        port: For clients, on 127.0.0.1.
        admin_port: For Envoy's own admin surface.
        socket: Path of the Unix socket of the Python process.
        engines: Ports of the engines on 127.0.0.1, for static clusters.
        other_sockets: Of further workers.
        template: Another bootstrap than the shipped one.
    """
    filled = bootstrap.template() if template is None else template
    bootstrap.fill(
        filled, listen=("127.0.0.1", port), admin_port=admin_port, sockets=[socket, *other_sockets]
    )
    document: dict[str, Any] = yaml.safe_load(bootstrap.as_yaml(filled))  # without YAML's aliases
    if kind in GATEWAYS:
        return yaml.safe_dump(document)
    del document["dynamic_resources"]
    static = document["static_resources"]
    unused = bootstrap.WORKER_CLUSTERS if kind == "alone" else ("tokenway-xds",)
    static["clusters"] = [cluster for cluster in static["clusters"] if cluster["name"] not in unused] + [
        _static_cluster(name, engines) for name in (CLUSTER, FALLBACK_CLUSTER)
    ]
    if kind == "alone":
        manager = static["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        router = manager["http_filters"][-1]
        manager["http_filters"] = [router]
        del router["typed_config"]["upstream_log"]
        del manager["access_log"]
    return yaml.safe_dump(document)


def _static_cluster(name: str, engines: list[int]) -> dict[str, Any]:
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": engine}}}}
        for engine in engines
    ]
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), UNBOUNDED)
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "0.5s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_balancing_policy": _policy(
            "override_host",
            "OverrideHost",
            override_host_sources=[
                {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
            ],
            fallback_policy=_policy("round_robin", "RoundRobin"),
        ),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _policy(name: str, message: str, **settings: Any) -> dict[str, Any]:
    extension = f"envoy.load_balancing_policies.{name}"
    kind = f"type.googleapis.com/envoy.extensions.load_balancing_policies.{name}.v3.{message}"
    config = {"name": extension, "typed_config": {"@type": kind, **settings}}
    return {"policies": [{"typed_extension_config": config}]}


@contextlib.asynccontextmanager
async def setup(
    kind: SetupKind,
    root: Path,
    engines: list[int],
    *,
    first_chunk: bool,
    endpoints: int | None = None,
    workers: int = 1,
    checkout: Path | None = None,
    serve: Sequence[str] = SERVE,
) -> AsyncIterator[Setup]:
    """Start an Envoy with what stands behind it; killed at the end.

    Envoy answers 200 without what stands behind it as well; if it had to, that is printed at the end.

    Args:
        kind: What stands behind it.
        root: A folder of its own is made under it.
        engines: Ports of running engines.
        first_chunk: Whether the Python process sees the first chunk of streamed answers.
        endpoints: Make Tokenway see so many, on as many loopback addresses, at the engines' ports in turn;
            None for each engine once, on 127.0.0.1.
        workers: Of Tokenway; with several the process that is measured is their supervisor.
        checkout: Run Tokenway as it is there, under the same Python; None runs this one.
        serve: In place of Tokenway's own command: a module and arguments, the last of which names the set-up.

    Yields:
        The set-up, after it has answered one request.

    Raises:
        TimeoutError: It does not start.
    """
    run_dir = (
        root / f"{kind}{first_chunk:d}{endpoints or 0}x{workers}{'' if checkout is None else 'b'}{serve[-1]}"
    )
    run_dir.mkdir()
    socket, *others = (run_dir / f"gw{worker}.sock" for worker in range(workers))
    port, envoy_admin_port = free_port(), free_port()
    envoy_yaml = run_dir / "envoy.yaml"
    config_text = envoy_config(kind, port, envoy_admin_port, str(socket), engines, list(map(str, others)))
    envoy_yaml.write_text(config_text)
    with contextlib.ExitStack() as stack:
        pid = None
        if kind in FLOORS:
            options = ["--first-chunk"] if first_chunk else []
            keys = [f"127.0.0.1:{engine}" for engine in engines]
            arguments = [*options, FLOORS[kind], str(socket), CLUSTER, *keys]
            plain_grpc = ("env", "GRPC_EXPERIMENTS=", sys.executable, "-m")
            child = (
                processes.running(*plain_grpc, "benchmarks.floor", *arguments)
                if kind == "plain_floor"
                else python_module("benchmarks.floor", *arguments)
            )
            pid = stack.enter_context(child)
            await processes.until(lambda: asyncio.to_thread(socket.exists), "floor")
        elif kind in GATEWAYS:
            admin_port = free_port()
            config = _tokenway_config(
                run_dir, admin_port, _addresses(engines, endpoints), first_chunk, GATEWAYS[kind], workers
            )
            pid = stack.enter_context(python_module(*serve, str(config), folder=checkout))
            ready = f"http://127.0.0.1:{admin_port}/readyz"
            await processes.until(lambda: asyncio.to_thread(_answers, ready), "tokenway")
        log_off = ("-l", "off")
        one_thread = ("--concurrency", "1")
        beside_others = "--use-dynamic-base-id"
        envoy_pid = stack.enter_context(
            processes.running(str(ENVOY), "-c", str(envoy_yaml), *one_thread, beside_others, *log_off)
        )
        await processes.until(lambda: serves(port), f"envoy {kind}")
        name = f"{kind} before" if checkout is not None else kind if serve == SERVE else serve[-1]
        made = Setup(name, port, pid, envoy_pid, envoy_admin_port)
        yield made
        if (num_passed_by := made.num_passed_by()) > 0:
            print(f"{name}: {num_passed_by} requests were served without it", file=sys.stderr, flush=True)


def python_module(
    module: str, *arguments: str, folder: Path | None = None
) -> contextlib.AbstractContextManager[int]:
    """A child that runs a module with this Python, of `folder` or of here, until the end; yields its pid."""
    return processes.running(sys.executable, "-m", module, *arguments, folder=folder)


def _addresses(engines: list[int], endpoints: int | None) -> list[tuple[str, int]]:
    if endpoints is None:
        return [("127.0.0.1", engine) for engine in engines]
    return [(f"127.0.{i // 250}.{i % 250 + 1}", engines[i % len(engines)]) for i in range(endpoints)]


def _tokenway_config(
    run_dir: Path,
    admin_port: int,
    addresses: list[tuple[str, int]],
    first_chunk: bool,
    transport: str,
    workers: int,
) -> Path:
    endpoints = [{"address": address, "port": port} for address, port in addresses]
    clusters = {"clusters": [{"name": CLUSTER, "endpoints": endpoints}]}
    (run_dir / "clusters.json").write_text(json.dumps(clusters))
    settings = {
        "server": {
            "run_dir": str(run_dir),
            "admin": {"port": admin_port},
            "transport": transport,
            "workers": workers,
        },
        "signals": {"first_chunk": first_chunk},
        "logging": {"requests": False, "level": "warning"},
        "models": {MODEL: {"rules": [{"cluster": CLUSTER}]}},
    }
    path = run_dir / "tokenway.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=1) as response:  # noqa: S310 - our own http address
        return bool(response.status == 200)


async def serves(port: int) -> bool:
    """Whether a request is answered with 200 at a port.

    Raises:
        OSError, EOFError: Nothing listens there, or it broke off.
    """
    client = await Client.connect(port)
    try:
        return await client.ask(request(1, "x")) == 200
    finally:
        client.close()
