"""The pod of the chart for provider `none`, started and stopped as a kubelet does, but for its images."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from testbed import secret_volume
from testbed.certificates import issued, trusting
from testbed.documented import exec_commands
from testbed.helm import binary, configuration, of_kind, rendered
from testbed.processes import Subprocess, free_port
from tests.e2e.harness import chat, cluster, envoy_binary, eventually, key_of, simulators
from tokenway.cli.admin_url import ADMIN_ENV

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`"),
]

PORTS = ("10000", "15000", "9003", "9004", "9090", "10080")
"""That the chart names; here each is a free one, on loopback."""

LEAVE_S = 2
CLIENTS = 8


@dataclass(slots=True)
class Pod:
    """A pod of the chart's Deployment.

    Attributes:
        folder: Its volumes, and logs.
        spec: Of the pod.
        ports: Where each port of the chart is here.
    """

    folder: Path
    spec: dict[str, Any]
    ports: dict[str, int]
    envoy: Subprocess | None = None
    tokenway: Subprocess | None = None

    @property
    def url(self) -> str:
        """For clients."""
        return f"http://127.0.0.1:{self.ports['10000']}"

    def here(self, text: str) -> str:
        """A text of the chart with ports and volumes as they are here."""
        text = re.sub(
            r"(?<=:)\d+\b|(?<= )\d{5}\b", lambda found: str(self.ports.get(found[0], found[0])), text
        )
        text = text.replace("0.0.0.0:", "127.0.0.1:")
        return re.sub(
            r"/(etc/tokenway|run/tokenway|run/envoy)\b", lambda found: f"{self.folder}{found[0]}", text
        )

    def put(self, secret: str, files: Mapping[str, bytes]) -> None:
        """A Secret has these files, or has them now, in all volumes that are made of it."""
        names = {
            volume["name"]
            for volume in self.spec["volumes"]
            if volume.get("secret", {}).get("secretName") == secret
        }
        for mount in self.container("envoy")["volumeMounts"]:
            if mount["name"] in names:
                secret_volume.put(Path(self.here(mount["mountPath"])), files)

    @property
    def environment(self) -> Mapping[str, str]:
        """What the images have on their PATH."""
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {"PATH": path, ADMIN_ENV: f"http://127.0.0.1:{self.ports['10080']}"}

    def container(self, name: str) -> dict[str, Any]:
        """One of its containers."""
        every = [*self.spec["initContainers"], *self.spec["containers"]]
        (found,) = [each for each in every if each["name"] == name]
        made: dict[str, Any] = found
        return made

    async def run(self, command: list[str], log: str) -> None:
        """Run a command to its end, which must be good."""
        process = await Subprocess.start(
            [self.here(word) for word in command], self.folder / log, self.environment
        )
        assert await process.ended() == 0, process.log.read_text()

    async def is_serving(self) -> bool:
        """The readiness probe."""
        assert self.tokenway is not None
        assert self.tokenway.is_running, self.tokenway.log.read_text()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.ports['9003']}") as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            probe = self.container("tokenway")["readinessProbe"]["grpc"]
            name = probe["service"].encode()
            try:
                answer: bytes = await check(b"\x0a" + bytes([len(name)]) + name, timeout=5)
            except grpc.aio.AioRpcError:
                return False
            return answer == b"\x08\x01"

    async def start(self) -> None:
        """First what runs first, then the rest; returns when it is ready."""
        await self.run(self.container("bootstrap")["command"], "bootstrap.log")
        envoy = self.container("envoy")
        self.envoy = await Subprocess.start(
            [self.here(word) for word in (*envoy["command"], *envoy["args"])],
            self.folder / "envoy.log",
            self.environment,
        )
        self.tokenway = await Subprocess.start(
            ["tokenway", *map(self.here, self.container("tokenway")["args"])],
            self.folder / "log",
            self.environment,
        )
        probe = self.container("tokenway")["startupProbe"]["exec"]["command"]

        async def has_started() -> bool:
            assert self.envoy is not None
            assert self.envoy.is_running, self.envoy.log.read_text()
            process = await Subprocess.start(
                list(map(self.here, probe)), self.folder / "probe.log", self.environment
            )
            return await process.ended() == 0

        await eventually(has_started, bool, 60)
        await eventually(self.is_serving, bool, 60)

    async def stop(self) -> None:
        """The hook before the stop, SIGTERM, and when that has had its effect, SIGTERM to Envoy."""
        assert self.tokenway is not None
        assert self.envoy is not None
        await self.run(self.container("tokenway")["lifecycle"]["preStop"]["exec"]["command"], "stop.log")
        self.tokenway.signal(signal.SIGTERM)
        assert await self.tokenway.ended() == 0
        self.envoy.signal(signal.SIGTERM)
        await self.envoy.ended()


@asynccontextmanager
async def running_pod(
    values: Mapping[str, Any], secrets: Mapping[str, Mapping[str, bytes]] | None = None
) -> AsyncIterator[Pod]:
    """Started and ready, with the Secrets that it mounts; whatever is left of it is killed at the end."""
    objects = rendered(None, values)
    (deployment,) = of_kind(objects, "Deployment")
    folder = Path(tempfile.mkdtemp(prefix="twp", dir="/tmp"))
    pod = Pod(folder, deployment["spec"]["template"]["spec"], {port: free_port() for port in PORTS})
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("etc/tokenway", "run/tokenway", "run/envoy", "bin"):
            (folder / name).mkdir(parents=True)
        (folder / "run" / "tokenway").chmod(0o1777)
        (folder / "bin" / "envoy").symlink_to(envoy_binary())
        command = folder / "bin" / "tokenway"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tokenway "$@"\n')
        command.chmod(0o755)
        path = configuration(objects, folder / "etc" / "tokenway")
        path.write_text(pod.here(path.read_text()))
        for secret, files in (secrets or {}).items():
            pod.put(secret, files)
        try:
            await pod.start()
            yield pod
        finally:
            for process in (pod.tokenway, pod.envoy):
                if process is not None:
                    await process.kill()


async def check_documented_commands(pod: Pod) -> None:
    """What the documents have `kubectl exec` run, by the command and with the volumes of the container."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{pod.url}/v1/chat/completions", json=chat("sim", "the first", 4)) as reply,
    ):
        assert reply.status == 200, await reply.text()
    for number, words in enumerate(exec_commands()):
        log = f"command-{number}.log"
        if words[1] == "render":  # of provider `istio`; this pod has no gateway of Istio's
            continue
        await pod.run(words, log)
        said = (pod.folder / log).read_text()
        assert {"top": "sim", "explain": "sim", "check": "models"}[words[1]] in said, said


async def test_a_pod_serves_and_leaves_without_losing_a_request() -> None:
    """Clients hear `connection: close` before it is gone, and a stream longer than that is still whole."""
    async with simulators(3, time_scale=0.3) as engines:
        values = {
            "clusters": [cluster("sim", map(key_of, engines))],
            "config": {"server": {"admin": {"port": 10080}}},
            "leaveSeconds": LEAVE_S,
            "drainSeconds": 60,
            "envoy": {"concurrency": 1},
        }
        async with running_pod(values) as pod:
            for port, path, status in (
                ("9090", "/metrics", 200),
                ("9090", "/explain", 404),
                ("10080", "/readyz", 200),
            ):
                url = f"http://127.0.0.1:{pod.ports[port]}{path}"
                async with aiohttp.ClientSession() as session, session.get(url) as reply:
                    assert reply.status == status, url
            await check_documented_commands(pod)
            failures: list[str] = []
            answered = 0

            async def ask(number: int) -> None:
                """On one connection, until it is said to be the last time."""
                nonlocal answered
                connector = aiohttp.TCPConnector(limit=1)
                async with aiohttp.ClientSession(connector=connector) as session:
                    for turn in range(10_000):
                        body = chat("sim", f"client {number} turn {turn}", 4)
                        async with session.post(f"{pod.url}/v1/chat/completions", json=body) as reply:
                            answer = await reply.read()
                            if reply.status != 200 or "choices" not in json.loads(answer):
                                failures.append(f"{reply.status} {answer!r}")
                            answered += 1
                            if reply.headers.get("connection") == "close":
                                return

            async def stream() -> bytes:
                body = chat("sim", "long", 1_000, stream=True)
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(f"{pod.url}/v1/chat/completions", json=body) as reply,
                ):
                    assert reply.status == 200, await reply.text()
                    return await reply.read()

            clients = [asyncio.create_task(ask(number)) for number in range(CLIENTS)]
            long = asyncio.create_task(stream())

            async def answers_so_far() -> int:
                return answered

            await eventually(answers_so_far, lambda count: count >= 4 * CLIENTS)
            assert not long.done()
            stopping = asyncio.create_task(pod.stop())
            async with asyncio.timeout(30):
                await asyncio.gather(*clients)
            assert not long.done()
            assert (await long).endswith(b"data: [DONE]\n\n")
            await stopping
            assert failures == []


async def test_certificates_of_the_edge_rotate(tmp_path: Path) -> None:
    """The kubelet renews a volume: new connections have the new pair, and the new CA for clients."""
    for number in "12":
        issued(tmp_path, f"ca{number}")
        for name in ("edge", "client"):
            issued(tmp_path, name + number, f"ca{number}", who=f"DNS:{name}.test")

    def secret(number: str) -> dict[str, bytes]:
        names = {"tls.crt": f"edge{number}.pem", "tls.key": f"edge{number}.key", "ca.crt": f"ca{number}.pem"}
        return {key: (tmp_path / name).read_bytes() for key, name in names.items()}

    def client(number: str) -> ssl.SSLContext:
        context = trusting(tmp_path / f"ca{number}.pem")
        context.load_cert_chain(tmp_path / f"client{number}.pem", tmp_path / f"client{number}.key")
        return context

    async with simulators(1, time_scale=0.3) as engines:
        values = {
            "clusters": [cluster("sim", map(key_of, engines))],
            "envoy": {"concurrency": 1, "tls": {"secret": "edge", "clientCa": "edge"}},
        }
        async with running_pod(values, {"edge": secret("1")}) as pod:

            async def is_answered(number: str) -> bool:
                url = pod.url.replace("http:", "https:")
                try:
                    async with (
                        aiohttp.ClientSession() as session,
                        session.post(
                            f"{url}/v1/chat/completions",
                            json=chat("sim", "hi", 4),
                            ssl=client(number),
                            server_hostname="edge.test",
                        ) as reply,
                    ):
                        return reply.status == 200
                except (aiohttp.ClientError, ConnectionError):
                    return False

            assert await is_answered("1")
            assert not await is_answered("2")
            pod.put("edge", secret("2"))
            await eventually(lambda: is_answered("2"), bool)
            assert not await is_answered("1")
