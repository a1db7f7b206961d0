"""What the chart makes for Istio, as `istioctl analyze` sees it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.control_planes.build import binary
from testbed.helm import HTTP_LISTENER, NAMESPACE, configuration, rendered
from testbed.helm import binary as helm_binary
from testbed.processes import REPOSITORY

pytestmark = [
    pytest.mark.istio,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not helm_binary().exists(), reason="no helm: run `make kubectl`"),
]


def around(gateway_namespace: str) -> list[dict[str, Any]]:
    """What is there before: the namespaces and the Gateway that the route joins."""
    namespaces = sorted({NAMESPACE, gateway_namespace})
    return [
        *(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {"istio-injection": "disabled"}},
            }
            for name in namespaces
        ),
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": "inference-gateway", "namespace": gateway_namespace},
            "spec": {"gatewayClassName": "istio", "listeners": [HTTP_LISTENER]},
        },
    ]


async def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A program to its end."""
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY
    )


async def analysed(objects: list[dict[str, Any]], folder: Path) -> list[str]:
    """The codes of what `istioctl analyze` says of objects, whatever its level."""
    (folder / "objects.yaml").write_text(yaml.safe_dump_all(objects))
    done = await run(
        [str(binary("istio", "istioctl")), "analyze", "--use-kube=false", "-A", "-o", "json", str(folder)]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [one["code"] for one in json.loads(done.stdout or "[]")]


@pytest.mark.parametrize(
    ("case", "gateway_namespace", "codes"),
    [
        ("istio-inferencepool", NAMESPACE, ["IST0128", "IST0133"]),
        ("istio-inferencepool-plain", "gateways", ["IST0133"]),
        ("istio-inferencepool-swap", NAMESPACE, ["IST0128", "IST0133"]),
        ("istio", "istio-ingress", []),
    ],
)
async def test_istioctl_says_what_is_documented(
    case: str, gateway_namespace: str, codes: list[str], folder: Path
) -> None:
    """IST0128 where the picker's certificate is its own or its CA in a Secret, IST0133 for an EnvoyFilter."""
    objects = [*around(gateway_namespace), *rendered(case)]
    assert sorted(await analysed(objects, folder)) == codes


async def test_what_is_rendered_for_the_gateway_goes_with_the_chart(folder: Path) -> None:
    """`tokenway render istio` of the ConfigMap, as in the notes: IST0133 for each EnvoyFilter, no more."""
    objects = rendered("istio")
    for name in ("etc", "analysed"):
        (folder / name).mkdir()
    path = configuration(objects, folder / "etc")
    done = await run([sys.executable, "-m", "tokenway", "render", "istio", "--config", str(path)])
    assert done.returncode == 0, done.stderr
    manifests = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert {each["metadata"]["namespace"] for each in manifests} == {"istio-ingress"}
    labels = {"istio": "ingressgateway"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "gateway", "namespace": "istio-ingress", "labels": labels},
    }
    engines = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": "llama", "namespace": NAMESPACE},
        "spec": {
            "hosts": ["llama.models.internal"],
            "ports": [{"number": 8000, "name": "http", "protocol": "HTTP"}],
            "resolution": "STATIC",
            "endpoints": [{"address": "10.1.0.1"}],
        },
    }
    found = await analysed(
        [*around("istio-ingress"), pod, engines, *objects, *manifests], folder / "analysed"
    )
    filters = [each for each in manifests if each["kind"] == "EnvoyFilter"]
    assert filters
    assert found == ["IST0133"] * len(filters)
