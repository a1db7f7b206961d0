"""Replicas of Tokenway behind one Envoy."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from testbed.foreign_gateway import PROCESSOR, bootstrap
from testbed.processes import Subprocess, free_port, get
from testbed.redis_server import running
from tests.e2e.harness import Stack, answers, cluster, envoy_binary, eventually, key_of
from tests.e2e.pair import gateways_seen, shared
from tokenway.simulator.server.app import SimulatorServer

CLIENTS = 16

LEAVE_S = 2.0
"""Several health checks of Envoy's."""

WHY = (
    "%LOCAL_REPLY_BODY% [%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% to %UPSTREAM_HOST% "
    "after %DURATION% ms, %UPSTREAM_REQUEST_ATTEMPT_COUNT% attempts, %UPSTREAM_TRANSPORT_FAILURE_REASON%]"
)
"""What the gateway says where it answers itself: failures then show their reason."""

RETRIES = {
    "retry_on": "connect-failure,refused-stream,reset,unavailable",
    "num_retries": 2,
    "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3."
                "PreviousHostsPredicate"
            },
        }
    ],
    "host_selection_retry_max_attempts": 5,
}
"""Of calls to pickers, as Envoy Gateway can be configured; Istio has none."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Two pickers behind one foreign Envoy.

    Attributes:
        stacks: Each a process of its own.
        picker_ports: Where each picks.
        url: For clients.
        envoy_admin: Of the foreign Envoy.
        cluster: What it calls the pickers.
    """

    stacks: list[Stack]
    picker_ports: list[int]
    url: str
    envoy_admin: str
    cluster: str

    async def is_left_out(self, index: int) -> bool:
        """The gateway has noticed that this one is not there."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.envoy_admin}/clusters") as reply,
        ):
            text = await reply.text()
        flags = f"{self.cluster}::127.0.0.1:{self.picker_ports[index]}::health_flags::"
        (line,) = [line for line in text.splitlines() if line.startswith(flags)]
        return "failed_active_hc" in line

    async def retried(self) -> dict[str, int]:
        """How often the gateway asked again, by what it asked: pickers and engines."""
        text = (await get(f"{self.envoy_admin}/stats?filter=upstream_rq_retry$")).decode()
        counts = (line.removeprefix("cluster.").split(".upstream_rq_retry: ") for line in text.splitlines())
        return {name: int(count) for name, count in counts if int(count)}

    async def decided(self, index: int) -> int:
        """How many of its latest hundred decisions a replica has."""
        return len(await self.stacks[index].last(100))


def gateway(
    picker_ports: list[int], engines: list[SimulatorServer], port: int, admin_port: int, *, retries: bool
) -> dict[str, Any]:
    """The foreign Envoy of `testbed.foreign_gateway` with two pickers, which it asks for their health."""
    document: dict[str, Any] = json.loads(
        bootstrap(
            {"metadata": port},
            admin_port,
            picker_ports[0],
            free_port(),
            [engine.port for engine in engines],
            is_tls=False,
        )
    )
    resources = document["static_resources"]
    (pickers,) = [each for each in resources["clusters"] if each["name"] == "picker"]
    (locality,) = pickers["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": number}}}}
        for number in picker_ports
    ]
    (pool,) = [each for each in resources["clusters"] if each["name"] == "pool"]
    # Else an engine may close an idle connection as a request comes: 503, 3 of 912 requests 4.9 s apart.
    (options,) = pool["typed_extension_protocol_options"].values()
    options["common_http_protocol_options"] = {"idle_timeout": "4s"}
    pickers["common_lb_config"] = {"healthy_panic_threshold": {"value": 0}}
    pickers["health_checks"] = [
        {
            "timeout": "2s",
            "interval": "0.2s",
            "no_traffic_interval": "0.2s",
            "unhealthy_threshold": 1,
            "healthy_threshold": 1,
            "grpc_health_check": {"service_name": "readiness"},
        }
    ]
    for listener in resources["listeners"]:
        (manager,) = [chain["filters"][0]["typed_config"] for chain in listener["filter_chains"]]
        manager["local_reply_config"] = {"body_format": {"text_format_source": {"inline_string": WHY}}}
        (host,) = manager["route_config"]["virtual_hosts"]
        (route,) = host["routes"]
        del route["route"]["retry_policy"]  # nothing is hidden: each failure is one of an answer
        if retries:
            overrides = route["typed_per_filter_config"][PROCESSOR]["overrides"]
            overrides["grpc_service"]["retry_policy"] = RETRIES
    return document


Document = Callable[[list[int], list[SimulatorServer], int, int], dict[str, Any]]
"""A gateway's bootstrap: ports of pickers, engines, its own port and its admin's."""


@asynccontextmanager
async def running_replicas(
    engines: list[SimulatorServer],
    document: Document | None = None,
    picker_cluster: str = "picker",
) -> AsyncIterator[Replicas]:
    """Redis, two pickers that know each other, and the foreign Envoy."""
    async with AsyncExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="twr", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        redis = stack.enter_context(running(folder / "redis"))
        picker_ports = [free_port(), free_port()]
        stacks = []
        for number, picker_port in enumerate(picker_ports):
            (folder / str(number)).mkdir()
            made = Stack(folder / str(number), workers=1)
            picker = {"listen": [f"127.0.0.1:{picker_port}"], "leave_s": LEAVE_S}
            made.write_config(
                {
                    **shared(redis.url, f"replica-{number}"),
                    "server": {"drain_s": 30},
                    "endpoint_picker": picker,
                }
            )
            made.write_clusters(cluster("sim", map(key_of, engines)))
            stack.push_async_callback(made.stop)
            stacks.append(made)
        await asyncio.gather(*(made.start_gateway() for made in stacks))
        port, admin_port = free_port(), free_port()
        path = folder / "envoy.json"
        write = document or partial(gateway, retries=False)
        path.write_text(json.dumps(write(picker_ports, engines, port, admin_port)))
        envoy = await Subprocess.start(
            [str(envoy_binary()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart"],
            folder / "envoy.log",
        )
        stack.push_async_callback(envoy.kill)
        admin = f"http://127.0.0.1:{admin_port}"
        await answers(envoy, f"{admin}/ready")
        replicas = Replicas(stacks, picker_ports, f"http://127.0.0.1:{port}", admin, picker_cluster)
        for index, made in enumerate(stacks):
            await eventually(partial(gateways_seen, made), lambda seen: seen == 2)
            await eventually(partial(replicas.is_left_out, index), lambda is_out: not is_out)
        yield replicas
