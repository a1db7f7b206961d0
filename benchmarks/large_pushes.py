"""What a large push of istiod's costs Tokenway, and how long it holds up everything else.

    make bench-large-pushes        (python -m benchmarks.large_pushes [--rounds N])

A Tokenway of its own process for each case, and a server that sends what istiod would: 5,000 clusters that
rules name, one service with 4,000 endpoints, 1,000 services of 4. Each is pushed as a whole three times to a
Tokenway that serves: new, again as it was, and with the weight of one endpoint in each service changed. Of
each push: the longest turn of the event loop, by the clock and in CPU of the loop's thread; CPU of the
process; and the time from the push until Tokenway has accepted it. Median of the rounds, and the worst turn
of all. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import grpc
import yaml
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2

from benchmarks.processes import cpu_name, cpu_s
from extproc.discovery.istio.messages import ASSIGNMENTS, CLUSTERS
from extproc.server.process import loop_turns
from testbed.processes import Subprocess, free_port
from tokenway.cli.serve import serve

CASES: Final = {
    "5000 clusters": (5_000, 0),
    "1 x 4000 endpoints": (1, 4_000),
    "1000 x 4 endpoints": (1_000, 4),
}
"""Services, and endpoints of each."""

PUSHES: Final = ("new", "again", "changed")
START_S: Final = 2.0
QUIET_S: Final = 0.3
TURNS: Final = "turns.jsonl"
NOTED_S: Final = 0.001
SHOWN: Final = "TOKENWAY_BENCH_SHOWN"
"""Set, callbacks that take over 3 ms are named on standard error."""


class NotingSelector(loop_turns.WatchedSelector):
    """Writes down each turn over a millisecond: when it ended, the clock, CPU of the thread."""

    log: Any = None

    def __init__(self, *_: Any) -> None:
        super().__init__(lambda *_: None)
        self._times = time.monotonic(), time.thread_time()

    def select(self, timeout: float | None = None) -> Any:
        """See `selectors.BaseSelector`."""
        now, cpu = time.monotonic(), time.thread_time()
        took = now - self._times[0]
        if took > NOTED_S:
            self.log.write(f"[{now},{took},{cpu - self._times[1]}]\n")
            self.log.flush()
        found = super().select(timeout)
        self._times = time.monotonic(), time.thread_time()
        return found


def name_of(number: int) -> str:
    """Of a service's cluster."""
    return f"outbound|8000||model-{number}.models.internal"


def cluster_of(number: int) -> cluster_pb2.Cluster:
    """As istiod describes one, about 500 bytes."""
    message = cluster_pb2.Cluster(name=name_of(number), type=cluster_pb2.Cluster.DiscoveryType.Value("EDS"))
    message.eds_cluster_config.eds_config.ads.SetInParent()
    message.eds_cluster_config.service_name = message.name
    message.connect_timeout.FromMilliseconds(10_000)
    limits = message.circuit_breakers.thresholds.add()
    for field in ("max_connections", "max_pending_requests", "max_requests", "max_retries"):
        getattr(limits, field).value = 4_294_967_295
    host = f"model-{number}.models.internal"
    service = {"host": host, "name": host, "namespace": "models"}
    message.metadata.filter_metadata["istio"].update({"default_original_port": 8000, "services": [service]})
    return message


def assignment_of(number: int, endpoints: int, weight: int) -> endpoint_pb2.ClusterLoadAssignment:
    """As istiod describes one; `weight` is that of its first endpoint."""
    message = endpoint_pb2.ClusterLoadAssignment(cluster_name=name_of(number))
    for zone in range(min(2, endpoints)):
        group = message.endpoints.add()
        group.locality.region, group.locality.zone = "eu", f"eu-{zone}"
        for member in range(zone, endpoints, 2):
            one = group.lb_endpoints.add()
            where = number * endpoints + member
            socket = one.endpoint.address.socket_address
            socket.address, socket.port_value = f"10.{where >> 16}.{where >> 8 & 255}.{where & 255}", 8000
            one.load_balancing_weight.value = weight if not member else 1
            one.health_status = 1
            text = f"model-{number}-{member};models;model-{number};v1;Kubernetes"
            one.metadata.filter_metadata["istio"].update({"workload": text})
    return message


def response_of(kind: str, nonce: str, resources: Iterable[tuple[str, Any]]) -> bytes:
    """A `DeltaDiscoveryResponse`."""
    message = discovery_pb2.DeltaDiscoveryResponse(type_url=kind, nonce=nonce, system_version_info="1")
    for name, body in resources:
        resource = message.resources.add(name=name, version="1")
        resource.resource.Pack(body)
    encoded: bytes = message.SerializeToString()
    return encoded


@dataclass
class Pushing:
    """The server's side of one stream.

    Attributes:
        accepted: Nonces.
        refused: Reasons.
    """

    services: int
    endpoints: int

    def __post_init__(self) -> None:
        self.accepted: set[str] = set()
        self.refused: list[str] = []
        self.outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self.is_asked = asyncio.Event()
        self.messages = {
            push: [
                response_of(CLUSTERS, f"cds-{push}", ((name_of(n), cluster_of(n)) for n in self._numbers)),
                response_of(
                    ASSIGNMENTS,
                    f"eds-{push}",
                    (
                        (name_of(n), assignment_of(n, self.endpoints, 1 + (push == "changed")))
                        for n in self._numbers
                    ),
                ),
            ]
            for push in PUSHES
        }

    @property
    def _numbers(self) -> range:
        return range(self.services)

    def push(self, name: str) -> None:
        """Send both types; of what is new the endpoints are asked for."""
        for message in self.messages[name][: 1 if name == "new" else 2]:
            self.outgoing.put_nowait(message)

    async def has_accepted(self, name: str) -> None:
        """Both were accepted."""
        async with asyncio.timeout(120):
            while not {f"cds-{name}", f"eds-{name}"} <= self.accepted:
                assert not self.refused, self.refused
                await asyncio.sleep(0.005)

    async def serve(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        """`DeltaAggregatedResources`."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                yield await self.outgoing.get()
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for encoded in requests:
            request = discovery_pb2.DeltaDiscoveryRequest.FromString(encoded)
            if request.HasField("error_detail"):
                self.refused.append(request.error_detail.message)
            elif request.response_nonce:
                self.accepted.add(request.response_nonce)
            elif request.type_url == CLUSTERS:
                self.outgoing.put_nowait(response_of(CLUSTERS, "nothing", ()))
                self.is_asked.set()
            elif request.resource_names_subscribe:
                self.outgoing.put_nowait(self.messages["new"][1])


def turns(path: Path, since_s: float) -> tuple[float, float]:
    """The longest turn since then: by the clock, and the most CPU of one."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    later = [(took, cpu) for ended, took, cpu in found if ended >= since_s]
    return max((took for took, _ in later), default=0.0), max((cpu for _, cpu in later), default=0.0)


def config(folder: str, port: int, services: int) -> dict[str, Any]:
    """Tokenway's, with a model of each service."""
    return {
        "version": 1,
        "server": {"run_dir": folder, "admin": {"port": free_port()}},
        "discovery": {"istio": {"address": f"127.0.0.1:{port}"}, "wait_s": 60},
        "health": {"interval_s": 600},
        "models": {
            f"model-{n}": {"rules": [{"cluster": f"model-{n}.models.internal:8000"}]} for n in range(services)
        },
    }


async def run(services: int, endpoints: int) -> dict[str, dict[str, float]]:
    """One Tokenway, all pushes: figures in milliseconds."""
    pushing = Pushing(services, endpoints)
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler = grpc.stream_stream_rpc_method_handler(pushing.serve)
    service = "envoy.service.discovery.v3.AggregatedDiscoveryService"
    methods = {"DeltaAggregatedResources": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="tws", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "tokenway.yaml"
        path.write_text(yaml.safe_dump(config(folder, port, services)))
        words = [sys.executable, "-m", "benchmarks.large_pushes", "serve", str(path)]
        process = await Subprocess.start(words, Path(folder) / "log")
        try:
            async with asyncio.timeout(60):
                await pushing.is_asked.wait()
            await asyncio.sleep(START_S)
            for push in PUSHES:
                began, cpu = time.monotonic(), cpu_s(process.pid)
                pushing.push(push)
                await pushing.has_accepted(push)
                took = time.monotonic() - began
                await asyncio.sleep(QUIET_S)
                stall, busy = turns(Path(folder) / TURNS, began)
                own = cpu_s(process.pid) - cpu
                values = {"turn": stall, "turn_cpu": busy, "cpu": own, "accepted": took}
                figures[push] = {name: round(value * 1e3, 1) for name, value in values.items()}
        finally:
            if os.environ.get(SHOWN):
                sys.stderr.write((Path(folder) / "log").read_text())
            await process.kill()
            await server.stop(None)
    return figures


async def compare(rounds: int) -> dict[str, Any]:
    """All cases by turns."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, (services, endpoints) in CASES.items():
            found[name].append(await run(services, endpoints))
    result: dict[str, Any] = {"cpu": cpu_name(), "load": round(os.getloadavg()[0], 1), "rounds": rounds}
    for name, of_rounds in found.items():
        for push in PUSHES:
            figures = [each[push] for each in of_rounds]
            middle = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
            worst = max(each["turn"] for each in figures)
            result[f"{name}, {push}"] = {**middle, "worst_turn": worst}
            print(
                f"{name:20} {push:8} longest turn {middle['turn']:6.1f} ms ({middle['turn_cpu']:.1f} of CPU; "
                f"worst {worst:.1f}), CPU {middle['cpu']:7.1f} ms, taken after {middle['accepted']:7.1f} ms"
            )
    return result


def _named() -> Any:
    run_handle = asyncio.Handle._run  # noqa: SLF001 - what the loop calls

    def timed(handle: asyncio.Handle) -> None:
        began_s = time.thread_time()
        run_handle(handle)
        took_s = time.thread_time() - began_s
        if took_s > 3 * NOTED_S:
            sys.stderr.write(f"{took_s * 1e3:.1f} ms {handle!r}\n")

    return timed


def main() -> None:
    """Print the figures, or serve with turns noted."""
    if sys.argv[1:2] == ["serve"]:
        path = Path(sys.argv[2])
        with (path.parent / TURNS).open("w") as log:
            NotingSelector.log = log
            if os.environ.get(SHOWN):
                asyncio.Handle._run = _named()  # type: ignore[method-assign]  # noqa: SLF001
            with patch.object(loop_turns, "WatchedSelector", NotingSelector):
                sys.exit(serve(path))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(asyncio.run(compare(parser.parse_args().rounds))))


if __name__ == "__main__":
    main()
