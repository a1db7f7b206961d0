"""What the chart renders, judged by a real API server: objects, what rights allow, how pods are confined."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio
import yaml

from testbed.control_planes import definitions
from testbed.control_planes.kubectl import HELM, KUBECTL
from testbed.helm import CASES, CHART, NAMESPACE, RELEASE, of_kind, rendered, values_of
from testbed.kubernetes import Cluster, RefusedError

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not HELM.exists(), reason="no kubectl and helm: run `make kubectl`"),
]

NOT_SERVED = frozenset({"monitoring.coreos.com/v1"})
"""Kinds whose definitions no module here carries: they are rendered, and not judged."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def prepared(cluster: Cluster) -> Cluster:
    """The kinds that the chart makes, and the namespaces of its cases, where pods must be restricted."""
    await cluster.apply(*definitions.gateway_api(), *definitions.istio(), *definitions.envoy_gateway())
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    for name in (NAMESPACE, "gateways"):
        metadata = {"name": name, "labels": restricted}
        await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    return cluster


async def run(cluster: Cluster, *argv: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """A program with the administrator's kubeconfig."""
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig())}
    return await asyncio.to_thread(
        subprocess.run,
        argv,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def served(objects: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those whose kinds are known here."""
    return [each for each in objects if each["apiVersion"] not in NOT_SERVED]


@pytest.mark.parametrize("case", CASES)
async def test_the_server_takes_every_object(prepared: Cluster, case: str) -> None:
    """With defaults, pruning and the rules of each definition, and without a warning."""
    objects = served(rendered(case))
    done = await run(
        prepared,
        *(str(KUBECTL), "apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"),
        given=yaml.safe_dump_all(objects),
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == len(objects)


@pytest.mark.parametrize("case", CASES)
async def test_pods_are_restricted(prepared: Cluster, case: str) -> None:
    """A namespace that enforces the restricted Pod Security Standard admits the pods."""
    (deployment,) = of_kind(rendered(case), "Deployment")
    template = deployment["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": NAMESPACE, **template["metadata"]},
        "spec": template["spec"],
    }
    path = f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All"
    await prepared.request("POST", path, pod)
    del pod["spec"]["securityContext"]["runAsNonRoot"]
    with pytest.raises(RefusedError, match="restricted"):
        await prepared.request("POST", path, pod)


async def test_it_is_installed_upgraded_and_taken_away(prepared: Cluster) -> None:
    """By helm itself; a second revision changes what it should, and nothing is left."""
    words = ("--namespace", NAMESPACE, "--values", str(values_of("istio-inferencepool")))
    install = await run(prepared, str(HELM), "install", RELEASE, str(CHART), *words)
    assert install.returncode == 0, install.stderr
    assert "rollout status deploy/test-tokenway" in install.stdout
    pool = {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": RELEASE, "namespace": NAMESPACE},
    }
    found = await prepared.get(pool)
    assert found["spec"]["endpointPickerRef"] == {
        "group": "",
        "kind": "Service",
        "name": "test-tokenway",
        "port": {"number": 9002},
        "failureMode": "FailOpen",
    }
    more = ("--set", "inferencePool.failureMode=FailClose", "--set", "modelServers.targetPorts={8000}")
    upgrade = await run(prepared, str(HELM), "upgrade", RELEASE, str(CHART), *words, *more)
    assert upgrade.returncode == 0, upgrade.stderr
    found = await prepared.get(pool)
    assert found["spec"]["endpointPickerRef"]["failureMode"] == "FailClose"
    assert found["spec"]["targetPorts"] == [{"number": 8000}]
    away = await run(prepared, str(HELM), "uninstall", RELEASE, "--namespace", NAMESPACE)
    assert away.returncode == 0, away.stderr
    with pytest.raises(RefusedError) as refused:
        await prepared.get(pool)
    assert refused.value.status == 404


@pytest.mark.parametrize("case", ["none", "istio-inferencepool", "envoy-gateway"])
async def test_the_account_may_read_what_it_needs_and_no_more(prepared: Cluster, case: str) -> None:
    """As the server says of the very account, with its Role bound."""
    objects = [each for each in rendered(case) if each["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    await prepared.apply(*objects)
    (account,) = of_kind(objects, "ServiceAccount")
    user = f"system:serviceaccount:{NAMESPACE}:{account['metadata']['name']}"

    async def may(verb: str, resource: str, group: str, namespace: str = NAMESPACE) -> bool:
        attributes = {"verb": verb, "resource": resource, "group": group, "namespace": namespace}
        asked = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": user, "resourceAttributes": attributes},
        }
        said = await prepared.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", asked)
        return bool(said["status"]["allowed"])

    is_picker_of_a_pool = case == "istio-inferencepool"
    pools = ("inferencepools", "inference.networking.k8s.io")
    objectives = ("inferenceobjectives", "llm-d.ai")
    async with asyncio.timeout(60):  # what authorizes hears of a Role as any other does, some time later
        while (await may("get", "pods", ""), await may("get", *pools)) != (True, is_picker_of_a_pool):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    for verb in ("get", "list", "watch"):
        assert await may(verb, "pods", "")
        assert await may(verb, *pools) is is_picker_of_a_pool
        assert await may(verb, *objectives) is is_picker_of_a_pool
        assert not await may(verb, "secrets", "")
        assert not await may(verb, "pods", "", "default")
    for verb in ("create", "update", "patch", "delete"):
        assert not await may(verb, "pods", "")
        assert not await may(verb, *pools)
        assert not await may(verb, "leases", "coordination.k8s.io")
    await prepared.delete(objects[-1])
