"""An InferencePool end to end (`tests.kubernetes.pool_site`): the choice, and what becomes of pods."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

from testbed import own_network
from testbed.helm import binary
from testbed.istiod import Istiod
from testbed.kubernetes import Cluster
from tests.e2e.harness import Load, eventually
from tests.e2e.istio_scenarios import chosen, ended
<<<<<<< HEAD
from tests.kubernetes.leaving import WAYS, Pods, check_charges_of_what_terminates, check_leaving
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.settings import ServerSettings
=======
from tests.kubernetes.pool_site import MODES, Site, installed
>>>>>>> kube

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.istio,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`"),
]

<<<<<<< HEAD
POOL: Final = "llama"
GATEWAY: Final = "edge"
SERVICE: Final = f"{RELEASE}-tokenway"
LABELS: Final = {"app": "vllm"}
GATEWAY_LABELS: Final = {"gateway.networking.k8s.io/gateway-name": GATEWAY}
NUM_ENGINES: Final = 3
MODES: Final = {"plain": "FailClose", "self-signed": "FailOpen"}
"""What the picker listens with, and what a request is without a picker."""


@dataclass(frozen=True, slots=True)
class Site:
    """One installation.

    Attributes:
        cluster: Has all of it.
        namespace: Of gateway, pool, engines and picker.
        address: Where engines and picker listen.
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

    @property
    def pods(self) -> Pods:
        """One for each engine."""
        return Pods(self.cluster, self.namespace, LABELS, self.address, [one.port for one in self.engines])

    async def add_engine_pods(self) -> None:
        """A pod for each engine; the port of its own is the one that serves."""
        for number in range(len(self.engines)):
            await self.pods.add(number)

    async def add_picker_pod(self) -> None:
        """The pod that the chart's Deployment would make, with the port where Tokenway listens here."""
        deployment = await self.cluster.get(self._object("apps/v1", "Deployment", SERVICE))
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        ports = {"grpc-ext-proc": self.picker_port}
        await self.cluster.apply(pod("picker", labels=labels, namespace=self.namespace, ports=ports))
        await self.cluster.make_ready("picker", ip=self.address, namespace=self.namespace)

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
        await self.proxy.has_endpoints(f"outbound|54321||{host}", *map(self.place_of, self.engines))

    async def status(self) -> int:
        """Of one request's answer."""
        return (await post(self.stack, chat("sim", "hello"))).status

    def place_of(self, engine: SimulatorServer) -> str:
        """`ip:port` of an engine."""
        return f"{self.address}:{engine.port}"

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


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def istiod(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Istiod]:
    """One that reads the API server and knows InferencePools."""
    if not harness.is_available():
        pytest.skip("no istiod: run `make istiod`")
    await cluster.apply(*definitions.gateway_api(), *definitions.istio())
    await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}})
    async with running_istiod(
        tmp_path_factory.mktemp("istiod"),
        kubeconfig=cluster.kubeconfig(),
        environment={"ENABLE_GATEWAY_API_INFERENCE_EXTENSION": "true"},
    ) as made:
        yield made


@asynccontextmanager
async def installed(cluster: Cluster, istiod: Istiod, tls: str, address: str) -> AsyncIterator[Site]:
    """The chart in a namespace of its own, and all that it needs; everything is ended after the block."""
    async with AsyncExitStack() as exits:
        settings = ServerSettings(profile=PROFILES["llama8b-h100"], time_scale=0.05, host=address)
        engines = [await exits.enter_async_context(running(settings)) for _ in range(NUM_ENGINES)]
        stack = Stack(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), workers=1)
        exits.callback(shutil.rmtree, stack.run_dir, ignore_errors=True)
        exits.push_async_callback(stack.stop)
        namespace = f"pool-{tls}"
        proxy = Proxy(stack.run_dir / "proxy", istiod.port, GATEWAY_LABELS, namespace=namespace)
        picker, health, metrics = free_ports(3)
        site = Site(cluster, namespace, address, engines, stack, proxy, picker, MODES[tls])
        await cluster.apply(*site.gateway_objects())
        await site.add_engine_pods()
        values = {
            "provider": {"name": "istio-inferencepool"},
            "gateway": {"name": GATEWAY},
            "inferencePool": {"name": POOL, "failureMode": site.failure_mode},
            "modelServers": {
                "matchLabels": LABELS,
                "targetPorts": [engine.port for engine in engines],
                "model": "sim",
            },
            "picker": {"tls": {"mode": tls}},
            "leaveSeconds": 5,
            "drainSeconds": 10,
            "config": {  # what is different without a pod around it
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
=======
PROMISE_S: Final = 1.0
"""From a change of a pod to the last request that is sent there."""
>>>>>>> kube


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=list(MODES))
async def site(request: pytest.FixtureRequest, cluster: Cluster, istiod: Istiod) -> AsyncIterator[Site]:
    """One in clear text, without a DestinationRule; one by TLS, as the chart's DestinationRule says."""
    address = os.environ.get(own_network.VARIABLE)
    if address is None:
        pytest.skip("run by `make test-kubernetes`, in a network of its own")
    async with installed(cluster, istiod, request.param, address) as made:
        yield made


def place_of(key: str) -> str:
    """`ip:port` of an endpoint, by its key."""
    return key.partition("/")[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_comes_from_the_choice_that_is_explained(site: Site, *, stream: bool) -> None:
    """By the official client: engine, `served` and choice are one, and the usage is that of the answer."""
    for turn in range(4):
        before = site.received()
        question: dict[str, Any] = {
            "model": "sim",
            "messages": [{"role": "user", "content": f"{turn}: hello"}],
            "max_tokens": 5,
            "extra_body": {"ignore_eos": True},
        }
        async with site.stack.client() as client:
            if stream:
                options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
                parts = [part async for part in await client.chat.completions.create(**question, **options)]
                usage = parts[-1].usage
            else:
                usage = (await client.chat.completions.create(**question)).usage
        assert usage is not None
        await ended(site.stack)
        record = await site.explained()
        (engine,) = [
            engine
            for engine, count in zip(site.engines, before, strict=True)
            if len(engine.served) == count + 1
        ]
        outcome = record["outcome"]
        assert sum(site.received()) == sum(before) + 1
        assert outcome["endpoint"] == chosen(record)
        assert place_of(outcome["endpoint"]) == site.place_of(engine)
        assert (outcome["ended"], outcome["completion_tokens"]) == ("completed", usage.completion_tokens)
    await site.stack.settled()


@pytest.mark.parametrize("way", WAYS)
async def test_a_pod_that_leaves_gets_nothing_within_a_second(site: Site, way: str) -> None:
    """Under load, and no request fails; when it is back it is chosen again."""
    await check_leaving(site.stack, site.pods, way, site.received)


async def test_charges_of_a_pod_that_terminates_stay(site: Site) -> None:
    """Until what runs there has ended by itself."""
    await check_charges_of_what_terminates(site.stack, site.pods, site.received, 12_000)


async def test_a_pool_without_its_picker_does_as_its_failure_mode_says(site: Site) -> None:
    """FailOpen loses no request when the picker leaves and comes back; FailClose answers 500 meanwhile."""
    is_open = site.failure_mode == "FailOpen"
    async with Load(site.stack, "sim", clients=4 if is_open else 0, stream=True) as load:
        assert await site.status() == 200
        await site.cluster.delete_pod("picker", namespace=site.namespace)
        site.stack.gateway.signal(signal.SIGTERM)  # as a kubelet does, which is no sooner than others
        await site.has_pickers()
        assert await site.stack.gateway.ended() == 0
        assert await site.status() == (200 if is_open else 500)
        await site.cluster.delete_pod("picker", namespace=site.namespace, gone=True)
        await site.stack.start_gateway()
        await site.add_picker_pod()
        await site.has_pickers(f"{site.address}:{site.picker_port}")
        assert await site.status() == 200
    assert load.failures == []
    assert (await ended(site.stack))["outcome"]["ended"] == "completed"
    await site.stack.settled()


async def test_an_engine_that_is_gone_is_followed_by_the_next(site: Site) -> None:
    """The next that was named answers, and `served` says so. The last test: the engine stays away."""
    gone = site.place_of(site.engines[0])
    await site.engines[0].kill()

    async def read() -> tuple[str, str]:
        assert await site.status() == 200
        record = await ended(site.stack)
        return place_of(chosen(record)), place_of(record["outcome"]["endpoint"])

    named, served = await eventually(read, lambda places: places[0] == gone)
    assert served != named
    await site.stack.settled()
