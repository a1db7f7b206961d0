"""`tokenway render istio`: the resources that make an Istio gateway's Envoy do what our own does."""

from __future__ import annotations

import sys
from pathlib import Path

from extproc.config.loading import read_all, read_once
from extproc.istio_gateway.manifests import files
from extproc.istio_gateway.resources import RenderingError
from extproc.istio_gateway.text import Manifest, as_yaml
from extproc.observing.printable import printable
from extproc.server.envoys.bootstrap import shipped_document
from metadata_center.files import write_whole
from tokenway.cli.bootstrap import document_of, sockets_of

_UNUSED = "127.0.0.1:10000", 15000
"""Where our own Envoy would listen; no part of what is taken from its bootstrap."""


def render_istio(path: Path, out: Path | None) -> int:
    """Print the resources, or write them into a folder.

    Args:
        path: tokenway.yaml.
        out: The folder, made if it is not there; None prints one text.

    Returns:
        Exit status: 0 if done; 1 if a setting has no form in Istio, with the problems on standard error.

    Raises:
        ConfigError: The configuration cannot be used.
        OSError: The folder cannot be written to.
    """
    try:
        found = rendered(path)
    except RenderingError as error:
        for problem in error.problems:
            print(printable(f"{path}: {problem}"), file=sys.stderr)
        return 1
    if out is None:
        print(as_yaml(manifest for manifests in found.values() for manifest in manifests), end="")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for name, manifests in found.items():
        if manifests:
            write_whole(out / name, as_yaml(manifests))
        elif (out / name).exists():
            left = f"{out / name}: warning: nothing goes there now; what it has is of before: delete it"
            print(printable(f"{left} (`kubectl delete -f`), then the file"), file=sys.stderr)
    return 0


def rendered(path: Path) -> dict[str, list[Manifest]]:
    """The resources for a tokenway.yaml, by file.

    Raises:
        ConfigError: The configuration cannot be used.
        RenderingError: A setting has no form in Istio.
    """
    config, clusters = read_all(path, read_once)
    replaced = shipped_document("envoy/istio-proxy.yaml")
    return files(
        config, clusters, document_of(config, *_UNUSED), replaced["http_filters"], sockets_of(config)
    )
