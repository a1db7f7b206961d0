"""Custom resource definitions, from the Go modules that the control planes were built from.

    python -m testbed.control_planes.definitions

fetches those modules: tests at Kubernetes run in a network of their own, where nothing can be fetched.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from testbed.control_planes.build import MODULES, go, go_environment

GATEWAY_API: Final = "sigs.k8s.io/gateway-api"
INFERENCE_EXTENSION: Final = "sigs.k8s.io/gateway-api-inference-extension"
ISTIO: Final = "istio.io/istio"
ENVOY_GATEWAY: Final = "github.com/envoyproxy/gateway@v1.9.0"
ENVOY_GATEWAY_SUM: Final = "h1:PaOpud15v3kDCl3L5yc1TdYzggCMpRm1yRjNKmLkzHA="
"""As go.sum would have it: no go.mod of ours requires this module."""


@functools.cache
def module_folder(module: str, plane: str = "istio") -> Path:
    """Where Go keeps a module that a control plane's go.mod resolves.

    Raises:
        SystemExit: There is no Go.
        AssertionError: Go cannot find or fetch it; shows what Go said.
    """
    done = subprocess.run(
        [go(), "mod", "download", "-json", module],
        cwd=MODULES / plane,
        env=go_environment(),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    assert module != ENVOY_GATEWAY or found["Sum"] == ENVOY_GATEWAY_SUM, found
    return Path(found["Dir"])


def gateway_api() -> list[dict[str, Any]]:
    """Of the Gateway API, standard channel."""
    return list(_read(module_folder(GATEWAY_API) / "config" / "crd" / "standard"))


def inference_extension() -> list[dict[str, Any]]:
    """Of InferencePool and what lies beside it."""
    return list(_read(module_folder(INFERENCE_EXTENSION) / "config" / "crd" / "bases"))


def istio() -> list[dict[str, Any]]:
    """Of Istio's own kinds."""
    return list(_read(module_folder(ISTIO) / "manifests" / "charts" / "base" / "files"))


def envoy_gateway() -> list[dict[str, Any]]:
    """Of Envoy Gateway's own kinds."""
    charts = module_folder(ENVOY_GATEWAY) / "charts" / "gateway-helm" / "charts"
    return list(_read(charts / "crds" / "crds" / "generated"))


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition":
                yield document


if __name__ == "__main__":
    for each in (GATEWAY_API, INFERENCE_EXTENSION, ISTIO, ENVOY_GATEWAY):
        module_folder(each)
