"""The API server of the tests: a ready Pod appears where discovery looks, and what is too old is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from testbed.kubernetes import ADMIN, Cluster, RefusedError, inference_pool, pod
from testbed.processes import eventually

pytestmark = [pytest.mark.kubernetes, pytest.mark.asyncio(loop_scope="session")]

LABELS = {"app": "vllm"}


def service(namespace: str) -> dict[str, Any]:
    """Over the Pods of these tests, by the name of their port."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "engines", "namespace": namespace},
        "spec": {"selector": LABELS, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }


async def test_a_ready_pod_is_in_an_endpoint_slice(cluster: Cluster, namespace: str) -> None:
    """And leaves it when it terminates and is gone."""
    await cluster.apply(
        service(namespace), pod("a", labels=LABELS, ports={"http": 8000}, namespace=namespace)
    )
    path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"

    async def endpoints() -> list[tuple[str, bool, int]]:
        found = await cluster.request("GET", path)
        return [
            (endpoint["addresses"][0], endpoint["conditions"]["ready"], item["ports"][0]["port"])
            for item in found["items"]
            for endpoint in item.get("endpoints") or ()
        ]

    await cluster.make_ready("a", ip="10.1.0.1", ready=False, namespace=namespace)
    await eventually(endpoints, lambda found: found == [("10.1.0.1", False, 8000)])
    await cluster.make_ready("a", ip="10.1.0.1", namespace=namespace)
    await eventually(endpoints, lambda found: found == [("10.1.0.1", True, 8000)])
    await cluster.delete_pod("a", namespace=namespace)
    await eventually(endpoints, lambda found: found == [("10.1.0.1", False, 8000)])
    await cluster.delete_pod("a", namespace=namespace, gone=True)
    await eventually(endpoints, lambda found: found == [])


async def test_a_pool_is_checked(cluster: Cluster, namespace: str) -> None:
    """The definition's own rules hold: a ninth port is refused."""
    await cluster.apply(inference_pool("pool", labels=LABELS, ports=range(8000, 8008), namespace=namespace))
    with pytest.raises(RefusedError) as refused:
        await cluster.apply(
            inference_pool("pool", labels=LABELS, ports=range(8000, 8009), namespace=namespace)
        )
    assert refused.value.status == 422


async def test_users_may_do_what_roles_allow(cluster: Cluster, namespace: str) -> None:
    """A token without a Role is forbidden, a wrong one unauthorized, a deleted account's void."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    with pytest.raises(RefusedError) as refused:
        await cluster.request("GET", path, user="reader")
    assert refused.value.status == 403
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "picker", "namespace": namespace},
    }
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "reader", "namespace": namespace},
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}],
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "reader", "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "picker", "namespace": namespace}],
    }
    await cluster.apply(account, role, binding)
    cluster.tokens["picker"] = await cluster.account_token("picker", namespace)

    async def status() -> int:
        try:
            await cluster.request("GET", path, user="picker")
        except RefusedError as error:
            return error.status
        return 200

    await eventually(status, lambda found: found == 200)
    await cluster.delete(account)
    await eventually(status, lambda found: found == 401)


async def test_what_is_too_old_is_gone_in_both_ways(cluster: Cluster, namespace: str) -> None:
    """As a status of HTTP for a list that continues, as an event for a watch."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    await cluster.apply(*(pod(name, labels=LABELS, namespace=namespace) for name in "abc"))
    page = await cluster.request("GET", f"{path}?limit=2")
    await cluster.apply(pod("d", labels=LABELS, namespace=namespace))
    await cluster.forget()
    with pytest.raises(RefusedError) as refused:
        await cluster.request("GET", f"{path}?limit=2&continue={page['metadata']['continue']}")
    assert refused.value.status == 410
    headers = {"authorization": f"Bearer {cluster.tokens[ADMIN]}"}
    watch = f"{cluster.url}{path}?watch=1&resourceVersion=1&timeoutSeconds=20"
    async with asyncio.timeout(20), cluster.session().get(watch, headers=headers) as reply:
        assert reply.status == 200
        event = json.loads(await reply.content.readline())
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
