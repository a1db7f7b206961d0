"""Records what real control planes send, for the tests of parsers: `make record-control-planes`.

Writes `tests/data/istiod/*.jsonl` (delta responses, see `testbed.delta_client.write_recording`) and
`tests/data/kubernetes/*.json` (one exchange over HTTP each: request, status, body or a watch's lines).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from testbed.control_planes import definitions
from testbed.delta_client import (
    ASSIGNMENTS,
    CLUSTERS,
    DeltaStream,
    assignments,
    clusters,
    delta_stream,
    write_recording,
)
from testbed.istiod import Istiod, running_istiod
from testbed.kubernetes import ADMIN, Cluster, RefusedError, inference_pool, pod, running_cluster
from testbed.processes import REPOSITORY

DATA: Final = REPOSITORY / "tests" / "data"
HOST: Final = "llama.models.internal"
DEFAULT: Final = f"outbound|8000||{HOST}"
SUBSET: Final = f"outbound|8000|large|{HOST}"

WATCH_S: Final = 8
"""A watch of this length ends with a bookmark 2 s before its end."""


def service_entry(*endpoints: Mapping[str, Any], host: str = HOST) -> dict[str, Any]:
    """A ServiceEntry with one HTTP port 8000."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": host.partition(".")[0], "namespace": "tokenway"},
        "spec": {
            "hosts": [host],
            "ports": [{"number": 8000, "name": "http", "protocol": "HTTP"}],
            "resolution": "STATIC",
            "endpoints": list(endpoints),
        },
    }


def endpoint(address: str, port: int, **fields: Any) -> dict[str, Any]:
    """An endpoint of `service_entry`."""
    return {"address": address, "ports": {"http": port}, **fields}


def subsets(**labels: Mapping[str, str]) -> dict[str, Any]:
    """A DestinationRule with subsets by name."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": "llama", "namespace": "tokenway"},
        "spec": {
            "host": HOST,
            "subsets": [{"name": name, "labels": dict(chosen)} for name, chosen in labels.items()],
        },
    }


FIRST: Final = endpoint("127.0.0.11", 8001, weight=3, locality="eu/eu-1/a", labels={"size": "large"})
SECOND: Final = endpoint("127.0.0.12", 8002, locality="eu/eu-2/b", labels={"size": "small", "version": "v2"})
THIRD: Final = endpoint("::1", 8003, labels={"size": "large"})


async def _record(stream: DeltaStream, name: str, is_last: Callable[[Any], bool]) -> None:
    """Write what comes until a response is the last of its recording."""
    begin = len(stream.received)
    while not is_last(await stream.receive()):
        pass
    write_recording(DATA / "istiod" / f"{name}.jsonl", stream.received[begin:])


def _has(cluster: str, count: int) -> Callable[[Any], bool]:
    """The response has an assignment of so many endpoints."""

    def look(response: Any) -> bool:
        if response.type_url != ASSIGNMENTS:
            return False
        found = assignments(response).get(cluster)
        return found is not None and len(found) == count

    return look


async def record_istiod(folder: Path) -> None:
    """Edits of files, each with what istiod sent for it."""
    (DATA / "istiod").mkdir(parents=True, exist_ok=True)
    istiod = Istiod(folder)
    istiod.write("models.yaml", service_entry(FIRST, SECOND), subsets(large={"size": "large"}))
    try:
        await istiod.start()
        async with delta_stream(istiod.address) as stream:
            await stream.subscribe(CLUSTERS)
            await _record(stream, "01_clusters", lambda response: DEFAULT in clusters(response))
            await stream.subscribe(ASSIGNMENTS, [DEFAULT, SUBSET])
            await _record(stream, "02_assignments", _has(SUBSET, 1))
            istiod.write("models.yaml", service_entry(FIRST, SECOND, THIRD), subsets(large={"size": "large"}))
            await _record(stream, "03_endpoint_added", _has(SUBSET, 2))
            light = {**FIRST, "weight": 1}
            istiod.write("models.yaml", service_entry(light, THIRD), subsets(large={"size": "large"}))
            await _record(stream, "04_weight_and_endpoint_removed", _has(DEFAULT, 2))
            istiod.write("models.yaml", service_entry(light, THIRD))
            await _record(stream, "05_subset_removed", lambda response: SUBSET in response.removed_resources)
            await stream.subscribe(ASSIGNMENTS, ["outbound|9||unknown.models.internal"])
            await _record(stream, "06_unknown_cluster", _has("outbound|9||unknown.models.internal", 0))
            istiod.write("models.yaml", service_entry(endpoint("127.0.0.1", 1), host="other.models.internal"))
            await _record(stream, "07_host_removed", lambda response: DEFAULT in response.removed_resources)
    finally:
        await istiod.kill()


async def record_health(cluster: Cluster, folder: Path) -> None:
    """What istiod makes of Pods that are not ready, which is the one way to an unhealthy endpoint."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "engines", "namespace": "default"},
        "spec": {"selector": {"app": "vllm"}, "ports": [{"name": "http", "port": 8000}]},
    }
    await cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}}, service
    )
    name = "outbound|8000||engines.default.svc.cluster.local"
    async with (
        running_istiod(folder, kubeconfig=cluster.kubeconfig()) as istiod,
        delta_stream(istiod.address) as stream,
    ):
        await stream.subscribe(CLUSTERS)
        await stream.subscribe(ASSIGNMENTS, [name])
        await _record(stream, "08_unready_pods", _has(name, 3))


async def _exchange(cluster: Cluster, name: str, path: str, *, user: str = ADMIN) -> Any:
    """Write one exchange that has one body."""
    try:
        status, body = 200, await cluster.request("GET", path, user=user)
    except RefusedError as error:
        status, body = error.status, error.body
    _write(name, {"request": f"GET {path}", "status": status, "body": body})
    return body


async def _watch(cluster: Cluster, name: str, path: str, changes: Any = None) -> None:
    """Write all lines of a watch, during which changes are made."""
    headers = {"authorization": f"Bearer {cluster.tokens[ADMIN]}"}
    async with cluster.session().get(cluster.url + path, headers=headers) as reply:
        if changes is not None:
            await changes()
        lines = [json.loads(line) async for line in reply.content]
    _write(name, {"request": f"GET {path}", "status": reply.status, "lines": lines})


def _write(name: str, exchange: Mapping[str, Any]) -> None:
    (DATA / "kubernetes" / f"{name}.json").write_text(json.dumps(exchange, indent=1) + "\n")


async def record_kubernetes(cluster: Cluster) -> None:
    """Lists, watches and refusals of the kinds that discovery reads."""
    (DATA / "kubernetes").mkdir(parents=True, exist_ok=True)
    pods, slices = (
        "/api/v1/namespaces/default/pods",
        "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
    )
    pools = "/apis/inference.networking.k8s.io/v1/namespaces/default/inferencepools"
    await _exchange(cluster, "kind_unknown_404", pools)
    await cluster.apply(*definitions.inference_extension())
    labels = {"app": "vllm"}
    for number, ready in ((1, True), (2, False), (3, True)):
        await cluster.apply(pod(f"engine-{number}", labels=labels, ports={"http": 8000}))
        await cluster.make_ready(
            f"engine-{number}", ip=f"10.1.0.{number}", further_ips=[f"fd00::{number}"], ready=ready
        )
    await cluster.apply(pod("engine-4", labels=labels))
    page = await _exchange(cluster, "pods_page_1", f"{pods}?limit=3&labelSelector=app%3Dvllm")
    rest = f"{pods}?limit=3&labelSelector=app%3Dvllm&continue={page['metadata']['continue']}"
    listed = await _exchange(cluster, "pods_page_2", rest)
    version = listed["metadata"]["resourceVersion"]
    watch = f"watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_S}"

    async def change_pods() -> None:
        await cluster.apply(pod("engine-5", labels=labels))
        await cluster.make_ready("engine-5", ip="10.1.0.5")
        await cluster.make_ready("engine-5", ip="10.1.0.5", ready=False)
        await cluster.delete_pod("engine-3")
        await cluster.delete_pod("engine-3", gone=True)

    await _watch(cluster, "pods_watch", f"{pods}?{watch}&resourceVersion={version}", change_pods)
    initial = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan"
    await _watch(cluster, "pods_streaming_list", f"{pods}?{watch}&{initial}")
    await _exchange(cluster, "endpointslices", f"{slices}?limit=500")
    await cluster.apply(inference_pool("pool", labels=labels, ports=(8000, 8001)))
    listed = await _exchange(cluster, "inferencepools", f"{pools}?limit=500")

    async def change_pools() -> None:
        await cluster.apply(inference_pool("pool", labels=labels))
        await cluster.delete(inference_pool("pool", labels=labels))

    version = listed["metadata"]["resourceVersion"]
    await _watch(cluster, "inferencepools_watch", f"{pools}?{watch}&resourceVersion={version}", change_pools)
    await _exchange(cluster, "forbidden_403", f"{pods}?limit=500", user="reader")
    cluster.tokens["stranger"] = "none"
    await _exchange(cluster, "unauthorized_401", f"{pods}?limit=500", user="stranger")
    await cluster.forget()
    await _exchange(cluster, "pods_expired_410", rest)
    await _watch(cluster, "pods_watch_expired_410", f"{pods}?{watch}&resourceVersion=1")


async def record() -> None:
    """Record everything."""
    folder = Path(tempfile.mkdtemp(prefix="twr", dir="/tmp"))
    try:
        await record_istiod(folder / "istiod")
        async with running_cluster(folder / "kubernetes", users=("reader",)) as cluster:
            service = {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "pods", "namespace": "default"},
                "spec": {
                    "selector": {"app": "vllm"},
                    "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
                },
            }
            await cluster.apply(service)
            await record_kubernetes(cluster)
            await record_health(cluster, folder / "istiod-kubernetes")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(record())
