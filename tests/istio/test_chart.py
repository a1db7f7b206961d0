"""What the chart makes for Istio, as `istioctl analyze` sees it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.control_planes.build import binary
from testbed.helm import NAMESPACE, rendered
from testbed.helm import binary as helm_binary

pytestmark = [
    pytest.mark.istio,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not helm_binary().exists(), reason="no helm: run `make kubectl`"),
]


def around(gateway_namespace: str) -> list[dict[str, Any]]:
    """What is there before: the namespaces and the Gateway that the route joins."""
    namespaces = sorted({NAMESPACE, gateway_namespace})
    listener = {
        "name": "http",
        "port": 80,
        "protocol": "HTTP",
        "allowedRoutes": {"namespaces": {"from": "All"}},
    }
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
            "spec": {"gatewayClassName": "istio", "listeners": [listener]},
        },
    ]


@pytest.mark.parametrize(
    ("case", "gateway_namespace", "codes"),
    [
        ("istio-inferencepool", NAMESPACE, ["IST0128"]),
        ("istio-inferencepool-plain", "gateways", []),
        ("istio-inferencepool-swap", NAMESPACE, ["IST0128"]),
        ("istio", "istio-ingress", []),
    ],
)
async def test_istioctl_says_what_is_documented(
    case: str, gateway_namespace: str, codes: list[str], folder: Path
) -> None:
    """IST0128 where the picker's certificate is made by itself, or its CA comes from a Secret; no more."""
    objects = [*around(gateway_namespace), *rendered(case)]
    (folder / "objects.yaml").write_text(yaml.safe_dump_all(objects))
    command = [str(binary("istio", "istioctl")), "analyze", "--use-kube=false", "-A", "-o", "json"]
    done = await asyncio.to_thread(
        subprocess.run,
        [*command, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = json.loads(done.stdout or "[]")
    assert [one["code"] for one in found] == codes, done.stdout
    assert done.returncode == 0, done.stderr
