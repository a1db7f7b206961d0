"""Endpoints from a real API server: what happens to pods and pools there, and to the server itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.sections.kubernetes import KubernetesDiscovery
from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.server.sources.kubernetes_source import KUBERNETES, kubernetes_source
from extproc.values.pool_policies import PoolPolicies
from testbed.kubernetes import Cluster, inference_pool, pod
from testbed.processes import REPOSITORY
from tests.kubernetes.pool_site import llm_d_kinds

pytestmark = [pytest.mark.kubernetes, pytest.mark.asyncio(loop_scope="session")]

DEADLINE_S = 30.0
"""Of what takes milliseconds on an idle machine."""

LABELS = {"app": "vllm"}


class Following:
    """What a source says of a real API server.

    Attributes:
        heard: What was told of cluster `llama`, one after the other: addresses that may be chosen.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.fleet = Fleet()
        self.heard: list[frozenset[str]] = []
        self.policies: list[PoolPolicies] = []
        self._changed = asyncio.Event()
        self.source = kubernetes_source(
            KubernetesDiscovery.model_validate(settings), Path("/"), self._tell, self._on_policies
        )

    def _tell(self, clusters: Mapping[str, Sequence[Listed] | None]) -> None:
        self.fleet.update(KUBERNETES, clusters)
        self.heard.append(frozenset(self.chosen()))
        self._changed.set()

    def _on_policies(self, policies: PoolPolicies) -> None:
        self.policies.append(policies)
        self._changed.set()

    def state(self) -> dict[str, str]:
        """Each endpoint's address, and what it is good for."""
        return {
            str(one.address): "draining" if one.draining else "ready" if one.ready else "not ready"
            for one in self.fleet.clusters.get("llama", ())
        }

    def chosen(self) -> list[str]:
        """Addresses that may be chosen."""
        return sorted(address for address, state in self.state().items() if state == "ready")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what was told makes it true."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{self.state()}, {self.source.status()}") from None

    async def is_away(self, away: bool) -> None:
        """Wait until the source knows that its server is away, or back."""
        async with asyncio.timeout(DEADLINE_S):
            while self.source.status().is_connected is away:  # noqa: ASYNC110 - a status is not told
                await asyncio.sleep(0.02)


@asynccontextmanager
async def following(kubeconfig: Path, namespace: str, **settings: Any) -> AsyncIterator[Following]:
    """A source that runs; of the pool llama unless something else is said."""
    settings = settings or {"pool": {"name": "llama", "namespace": namespace}}
    one = Following({"kubeconfig": str(kubeconfig), **settings})
    try:
        await one.source.start()
        async with asyncio.timeout(DEADLINE_S):
            await one.source.first_state()
        yield one
    finally:
        await one.source.stop()


async def ready_pods(cluster: Cluster, namespace: str, *numbers: int) -> None:
    """Pods that serve, each at an address of its own."""
    await cluster.apply(
        *(pod(f"p{n}", labels=LABELS, namespace=namespace, ports={"http": 8000}) for n in numbers)
    )
    for number in numbers:
        await cluster.make_ready(f"p{number}", ip=f"10.1.0.{number}", namespace=namespace)


class Wire:
    """Between a source and the API server: can be cut. TLS passes as it is."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def mend(self) -> None:
        """Connections are taken, at the port of the first time."""
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Those there are break, and no new ones are taken."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, onward = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, onward}
        await asyncio.gather(self._copy(reader, onward), self._copy(there, writer))
        self._writers -= {writer, onward}

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()


async def test_the_life_of_a_pod(cluster: Cluster, namespace: str) -> None:
    """Not ready, ready, not ready for a while, terminating, gone: each is told as it happens."""
    await cluster.apply(inference_pool("llama", labels=LABELS, ports=[8000, 8001], namespace=namespace))
    await ready_pods(cluster, namespace, 1)
    async with following(cluster.kubeconfig(), namespace) as one:
        await one.until(lambda: one.chosen() == ["10.1.0.1:8000", "10.1.0.1:8001"])
        await cluster.apply(pod("p2", labels=LABELS, namespace=namespace))
        await cluster.make_ready("p2", ip="10.1.0.2", ready=False, namespace=namespace)
        await cluster.make_ready("p2", ip="10.1.0.2", namespace=namespace)
        await one.until(lambda: len(one.chosen()) == 4)
        key = one.fleet.clusters["llama"][0].key
        await cluster.make_ready("p1", ip="10.1.0.1", ready=False, namespace=namespace)
        await one.until(lambda: one.state().get("10.1.0.1:8000") == "not ready")
        assert one.chosen() == ["10.1.0.2:8000", "10.1.0.2:8001"]
        await cluster.make_ready("p1", ip="10.1.0.1", namespace=namespace)
        await one.until(lambda: len(one.chosen()) == 4)
        assert key in {each.key for each in one.fleet.clusters["llama"]}, "it is the same replica"
        await cluster.delete_pod("p1", namespace=namespace)
        await one.until(lambda: one.state().get("10.1.0.1:8000") == "draining")
        await cluster.delete_pod("p1", namespace=namespace, gone=True)
        await one.until(lambda: sorted(one.state()) == ["10.1.0.2:8000", "10.1.0.2:8001"])
        await ready_pods(cluster, namespace, 1)
        await one.until(lambda: len(one.chosen()) == 4)
        assert key not in {each.key for each in one.fleet.clusters["llama"]}, "this is another"


async def test_ports_selector_and_end_of_a_pool(cluster: Cluster, namespace: str) -> None:
    """Edits of the pool and annotations of a pod take effect by themselves."""
    edit = inference_pool("llama", labels=LABELS, ports=[8000, 8001], namespace=namespace)
    await cluster.apply(edit)
    await ready_pods(cluster, namespace, 1, 2)
    async with following(cluster.kubeconfig(), namespace) as one:
        await one.until(lambda: len(one.chosen()) == 4)
        await cluster.merge(
            pod("p1", labels=LABELS, namespace=namespace),
            {"metadata": {"annotations": {"llm-d.ai/active-ports": "8001"}}},
        )
        await one.until(lambda: one.chosen() == ["10.1.0.1:8001", "10.1.0.2:8000", "10.1.0.2:8001"])
        await cluster.merge(edit, {"spec": {"targetPorts": [{"number": 8001}]}})
        await one.until(lambda: one.chosen() == ["10.1.0.1:8001", "10.1.0.2:8001"])
        await cluster.merge(
            pod("p2", labels=LABELS, namespace=namespace), {"metadata": {"labels": {"tier": "a"}}}
        )
        await cluster.merge(edit, {"spec": {"selector": {"matchLabels": {"tier": "a"}}}})
        await one.until(lambda: one.chosen() == ["10.1.0.2:8001"])
        assert frozenset() not in one.heard[1:], "the one of both selectors was never missing"
        await cluster.delete(edit)
        await one.until(lambda: one.state() == {})
        await cluster.apply(edit)
        await one.until(lambda: len(one.chosen()) == 3)


async def test_endpoint_slices_of_a_service(cluster: Cluster, namespace: str) -> None:
    """As the real controller writes them; a terminating pod drains."""
    await cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "llama", "namespace": namespace},
            "spec": {"selector": LABELS, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        }
    )
    await ready_pods(cluster, namespace, 1, 2)
    services = [{"name": "llama", "namespace": namespace, "port": "http"}]
    async with following(cluster.kubeconfig(), namespace, services=services) as one:
        await one.until(lambda: one.chosen() == ["10.1.0.1:8000", "10.1.0.2:8000"])
        (endpoint, _) = one.fleet.clusters["llama"]
        assert endpoint.metadata == {"namespace": namespace, "pod": "p1"}
        await cluster.make_ready("p1", ip="10.1.0.1", ready=False, namespace=namespace)
        await one.until(lambda: one.state().get("10.1.0.1:8000") == "not ready")
        await cluster.delete_pod("p2", namespace=namespace)
        await one.until(lambda: one.state().get("10.1.0.2:8000") == "draining")
        await cluster.delete_pod("p2", namespace=namespace, gone=True)
        await one.until(lambda: list(one.state()) == ["10.1.0.1:8000"])


async def test_the_api_server_goes_and_comes_back(cluster: Cluster, namespace: str) -> None:
    """Nothing is told while it is away and nothing flaps when it is back; what changes then is told."""
    await cluster.apply(inference_pool("llama", labels=LABELS, namespace=namespace))
    await ready_pods(cluster, namespace, 1, 2, 3)
    async with following(cluster.kubeconfig(), namespace) as one:
        await one.until(lambda: len(one.chosen()) == 3)
        await one.is_away(False)
        told = len(one.heard)
        await cluster.stop_apiserver()
        try:
            await one.is_away(True)
            assert len(one.chosen()) == 3
        finally:
            await cluster.start_apiserver()
        await one.is_away(False)
        assert one.source.status().age_s == 0.0
        assert len(one.heard) == told
        await cluster.make_ready("p2", ip="10.1.0.2", ready=False, namespace=namespace)
        await one.until(lambda: one.chosen() == ["10.1.0.1:8000", "10.1.0.3:8000"])
        assert all(len(each) >= 2 for each in one.heard[told:])


async def test_a_history_that_etcd_has_forgotten(
    cluster: Cluster, namespace: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """410 after a compaction: the state is that of a fresh list, and what stayed was never away."""
    await cluster.apply(inference_pool("llama", labels=LABELS, namespace=namespace))
    await ready_pods(cluster, namespace, 1, 2, 3)
    wire = Wire(cluster.port)
    await wire.mend()
    config = cluster.kubeconfig().read_text().replace(f":{cluster.port}", f":{wire.port}")
    (folder / "kubeconfig").write_text(config)
    async with following(folder / "kubeconfig", namespace) as one:
        await one.until(lambda: len(one.chosen()) == 3)
        await one.is_away(False)
        told = len(one.heard)
        await wire.cut()
        await one.is_away(True)
        await cluster.delete_pod("p2", namespace=namespace, gone=True)
        await ready_pods(cluster, namespace, 4)
        await cluster.forget()
        assert len(one.chosen()) == 3, "what is known stays meanwhile"
        await wire.mend()
        await one.until(lambda: one.chosen() == ["10.1.0.1:8000", "10.1.0.3:8000", "10.1.0.4:8000"])
        assert all({"10.1.0.1:8000", "10.1.0.3:8000"} <= each for each in one.heard[told:])
        causes = {getattr(record, "cause", "") for record in caplog.records}
        assert "the watch ended: Expired" in causes, causes
        async with following(cluster.kubeconfig(), namespace) as fresh:
            assert fresh.fleet.clusters["llama"] == one.fleet.clusters["llama"]
        await wire.cut()


def documented_role(namespace: str) -> dict[str, Any]:
    """The Role of docs/kubernetes.md."""
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    (block,) = (each for each in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "kind: Role\n" in each)
    role: dict[str, Any] = yaml.safe_load(block)
    role["metadata"]["namespace"] = namespace
    return role


async def give(cluster: Cluster, role: dict[str, Any], subject: dict[str, Any]) -> None:
    """A role to somebody, in its namespace."""
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]}
    await cluster.apply(
        role,
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": role["metadata"],
            "roleRef": reference,
            "subjects": [subject],
        },
    )


READER = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "reader"}


async def test_the_documented_role_is_enough(cluster: Cluster, namespace: str) -> None:
    """A pool, a selector and a Service, by a user that has nothing but it; the optional kinds as well."""
    await cluster.apply(*llm_d_kinds(), inference_pool("llama", labels=LABELS, namespace=namespace))
    await ready_pods(cluster, namespace, 1)
    await give(cluster, documented_role(namespace), READER)
    settings = {
        "pool": {"name": "llama", "namespace": namespace},
        "selectors": [{"name": "s", "namespace": namespace, "match_labels": LABELS, "target_ports": [8000]}],
        "services": [{"name": "none", "namespace": namespace}],
    }
    async with following(cluster.kubeconfig("reader"), namespace, **settings) as one:
        assert one.chosen() == ["10.1.0.1:8000"]
        assert [each.address.port for each in one.fleet.clusters["s"]] == [8000]
        assert one.fleet.clusters["none"] == ()
        await one.is_away(False)
        await cluster.apply(objective("urgent", 5, namespace))
        await one.until(lambda: bool(one.policies) and one.policies[-1].priorities == {"urgent": 5})


async def test_each_right_of_the_documented_role_is_needed(cluster: Cluster, namespace: str) -> None:
    """Without its rule for pods, say, nothing is known of them; optional kinds alone may be left out."""
    await cluster.apply(inference_pool("llama", labels=LABELS, namespace=namespace))
    await ready_pods(cluster, namespace, 1)
    role = documented_role(namespace)
    whole = role["rules"]
    role["rules"] = [rule for rule in whole if "pods" not in rule["resources"]]
    await give(cluster, role, READER)
    settings = {
        "kubeconfig": str(cluster.kubeconfig("reader")),
        "pool": {"name": "llama", "namespace": namespace},
    }
    one = Following(settings)
    try:
        await one.source.start()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await one.source.first_state()
        assert one.heard == []
        role["rules"] = [rule for rule in whole if "inferenceobjectives" not in rule["resources"]]
        await cluster.apply(role)
        await one.until(lambda: one.chosen() == ["10.1.0.1:8000"])
    finally:
        await one.source.stop()


async def test_a_token_that_is_renewed(cluster: Cluster, namespace: str, folder: Path) -> None:
    """The old one is void: 401, then the file is read again."""
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "tokenway", "namespace": namespace},
    }
    await cluster.apply(account, inference_pool("llama", labels=LABELS, namespace=namespace))
    await ready_pods(cluster, namespace, 1)
    subject = {"kind": "ServiceAccount", "name": "tokenway", "namespace": namespace}
    await give(cluster, documented_role(namespace), subject)
    token = folder / "token"
    token.write_text(await cluster.account_token("tokenway", namespace))
    config = yaml.safe_load(cluster.kubeconfig().read_text())
    config["users"][0]["user"] = {"tokenFile": "token"}
    wire = Wire(cluster.port)
    await wire.mend()
    text = yaml.safe_dump(config).replace(f":{cluster.port}", f":{wire.port}")
    (folder / "kubeconfig").write_text(text)
    async with following(folder / "kubeconfig", namespace) as one:
        await one.until(lambda: one.chosen() == ["10.1.0.1:8000"])
        await one.is_away(False)
        await cluster.delete(account)
        await wire.cut()
        await one.is_away(True)
        await wire.mend()
        await cluster.apply(account)
        token.write_text(await cluster.account_token("tokenway", namespace))
        await one.is_away(False)
        await ready_pods(cluster, namespace, 2)
        await one.until(lambda: one.chosen() == ["10.1.0.1:8000", "10.1.0.2:8000"])
        await wire.cut()


def objective(name: str, priority: int, namespace: str) -> dict[str, Any]:
    """An InferenceObjective of the pool llama."""
    return {
        "apiVersion": "llm-d.ai/v1alpha2",
        "kind": "InferenceObjective",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"priority": priority, "poolRef": {"name": "llama"}},
    }
