"""Tokenway as a pod of provider `none`: a real API server, the chart's rights and files, its own Envoy.

What a kubelet mounts for a service account is where a pod has it, in a mount namespace of the process's own.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from extproc.discovery.kubernetes.access import ACCOUNT_FOLDER
from testbed.helm import CHART, RELEASE, binary, helm, of_kind
from testbed.kubernetes import Cluster
from testbed.processes import Subprocess, free_ports
from tests.e2e.harness import Load, Stack, answers, chat, eventually, post
from tests.kubernetes.leaving import WAYS, Pods, check_charges_of_what_terminates, check_leaving
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.settings import ServerSettings

IN_A_POD: Final = (
    *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
    f"mount -t tmpfs none /run && mkdir -p {ACCOUNT_FOLDER}"
    f' && mount --bind "$0" {ACCOUNT_FOLDER} && exec "$@"',
)
"""Followed by the folder with the account's files and the command."""


def _has_mounts() -> bool:
    done = subprocess.run([*IN_A_POD, "/tmp", "true"], capture_output=True, timeout=20, check=False)
    return done.returncode == 0


pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`"),
    pytest.mark.skipif(not _has_mounts(), reason="the kernel gives no mount namespace"),
]

LABELS: Final = {"app": "sim"}
ACCOUNT: Final = f"{RELEASE}-tokenway"
OUTAGE_S: Final = 60.0


class PodStack(Stack):
    """A stack whose gateway runs as in a pod.

    Attributes:
        cluster: Whose API server it asks.
        namespace: Its own.
    """

    cluster: Cluster
    namespace: str

    @property
    def account(self) -> Path:
        """What is mounted."""
        return self.run_dir / "account"

    async def write_token(self) -> None:
        """As a kubelet does: a new file takes the place of the old one."""
        token = await self.cluster.account_token(ACCOUNT, self.namespace)
        fresh = self.account / "..token"
        fresh.write_text(token)
        fresh.replace(self.account / "token")

    async def start_gateway(self) -> None:
        """Start the gateway and wait until it is ready."""
        self.account.mkdir(exist_ok=True)
        shutil.copy(self.cluster.authority, self.account / "ca.crt")
        (self.account / "namespace").write_text(self.namespace)
        await self.write_token()
        serve = (sys.executable, "-m", "tokenway.cli.main", "serve", str(self.run_dir / "tokenway.yaml"))
        environment = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.cluster.port),
        }
        self._gateway = await Subprocess.start(
            [*IN_A_POD, str(self.account), *serve], self.run_dir / "gateway.log", environment
        )
        await answers(self._gateway, f"{self.admin_url}/readyz")


@dataclass(frozen=True, slots=True)
class Site:
    """One installation.

    Attributes:
        stack: Tokenway and its Envoy.
        pods: Of the engines.
        engines: Simulators.
        account: The chart's service account.
    """

    stack: PodStack
    pods: Pods
    engines: list[SimulatorServer]
    account: dict[str, Any]

    def received(self) -> list[int]:
        """How many requests each engine has had."""
        return [len(engine.served) for engine in self.engines]


def _chart(namespace: str, engines: list[SimulatorServer], stack: Stack) -> list[dict[str, Any]]:
    """The chart's objects, with what is different without a pod around it."""
    health, picker, metrics = free_ports(3)
    values = {
        "modelServers": {
            "matchLabels": LABELS,
            "targetPorts": [engine.port for engine in engines],
            "model": "sim",
        },
        "config": {
            "server": {"run_dir": str(stack.run_dir), "admin": {"port": stack.admin_port}, "drain_s": 0},
            "health": {"interval_s": 600},
            "endpoint_picker": {
                "listen": [f"127.0.0.1:{picker}"],
                "health_listen": [f"127.0.0.1:{health}"],
                "metrics_listen": [f"127.0.0.1:{metrics}"],
            },
        },
    }
    done = helm("template", RELEASE, str(CHART), "--namespace", namespace, values=values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each is not None]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def site(cluster: Cluster) -> AsyncIterator[Site]:
    """Three engines as pods, of which Tokenway learns by what the chart's account may read."""
    namespace = "in-cluster"
    async with AsyncExitStack() as exits:
        settings = ServerSettings(profile=PROFILES["llama8b-h100"], time_scale=0.1)
        engines = [await exits.enter_async_context(running(settings)) for _ in range(3)]
        stack = PodStack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), workers=1)
        stack.cluster, stack.namespace = cluster, namespace
        exits.callback(shutil.rmtree, stack.run_dir, ignore_errors=True)
        exits.push_async_callback(stack.stop)
        objects = _chart(namespace, engines, stack)
        metadata = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        rights = [of_kind(objects, kind)[0] for kind in ("ServiceAccount", "Role", "RoleBinding")]
        await cluster.apply(metadata, *rights)
        (files,) = of_kind(objects, "ConfigMap")
        for name, text in files["data"].items():
            (stack.run_dir / name).write_text(text)
        assert "kubeconfig" not in files["data"]["tokenway.yaml"]
        pods = Pods(cluster, namespace, LABELS, [("127.0.0.1", engine.port) for engine in engines])
        for number in range(len(engines)):
            await pods.add(number)
        await stack.start_gateway()
        await stack.start_envoy()
        made = Site(stack, pods, engines, dict(rights[0]))

        async def status() -> int:
            return (await post(stack, chat("sim", "hello"))).status

        await eventually(status, lambda found: found == 200)
        yield made


@pytest.mark.parametrize("way", WAYS)
async def test_a_pod_that_leaves_gets_nothing_within_a_second(site: Site, way: str) -> None:
    """Under load, and no request fails; when it is back it is chosen again."""
    await check_leaving(site.stack, site.pods, way, site.received)


async def test_charges_of_a_pod_that_terminates_stay(site: Site) -> None:
    """Until what runs there has ended by itself."""
    await check_charges_of_what_terminates(site.stack, site.pods, site.received, 6000)


async def test_the_api_server_is_away_for_a_minute_and_the_token_is_void_then(
    cluster: Cluster, site: Site
) -> None:
    """No request fails; then 401, the new token is read, and what changes counts again."""
    async with Load(site.stack, "sim", clients=2, stream=True) as load:
        await load.more(5)
        since = len(site.stack.gateway_log())
        await cluster.delete(site.account)
        await cluster.apply(site.account)
        await cluster.stop_apiserver()
        try:
            await asyncio.sleep(OUTAGE_S)
        finally:
            await cluster.start_apiserver()
        await load.more(5)

        async def causes() -> list[str]:
            return [line.get("cause", "") for line in site.stack.gateway_log()[since:]]

        await eventually(causes, lambda found: any(cause.startswith("401") for cause in found), 60)
        await site.stack.write_token()
        await site.stack.logged("the Kubernetes API answers again", since=since)
        await site.pods.leave(0, "not ready")
        await asyncio.sleep(1.0)
        left = site.received()[0]
        await load.more(20)
        assert site.received()[0] == left
        await site.pods.come_back(0, "not ready")
    assert load.failures == []
    await site.stack.settled()
