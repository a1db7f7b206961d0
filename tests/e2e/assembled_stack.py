"""Stacks whose Envoy has what is rendered for an Istio gateway, put there by hand.

With `TOKENWAY_PROFILE=istio` every stack is one of these, so that an Envoy which cannot load our own
bootstrap runs the tests that say nothing about one profile alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from extproc.values.mesh_names import MeshName
from testbed.assembled import assembled
from tests.e2e.harness import Stack
from tokenway.cli.render import rendered

PORT = 8000
"""Of every host of models, as Istio knows it."""


def host(name: str) -> str:
    """The host of a model's engines."""
    return f"{name}.models.internal"


def cluster_of(name: str, subset: str = "") -> str:
    """The cluster of a host of models at Envoy."""
    return f"outbound|{PORT}|{subset}|{host(name)}"


class AssembledStack(Stack):
    """A stack whose Envoy is configured by what is rendered for Istio.

    Clusters that have no name of Istio's get one; endpoints with a label `subset` are in that subset too.
    """

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Put tokenway.yaml in place in one step."""
        models = {name: _with_names_of_istio(model) for name, model in config.get("models", {}).items()}
        named = {"models": models} if models else {}
        super().write_config({"istio_gateway": {"port": self.port}, **config, **named})

    def write_clusters(self, *clusters: Mapping[str, Any]) -> None:
        """Put clusters.json in place in one step; Envoy has those that were there when it started."""
        super().write_clusters(*map(_renamed, clusters))

    def envoy_config(self) -> str:
        """What Envoy is started with, as YAML."""
        clusters = json.loads((self.run_dir / "clusters.json").read_text())["clusters"]
        endpoints: dict[str, list[tuple[str, int]]] = {}
        for each in clusters:
            for one in each["endpoints"]:
                place = one["address"], one["port"]
                endpoints.setdefault(each["name"], []).append(place)
                subset = one.get("labels", {}).get("subset")
                if subset is not None:
                    endpoints.setdefault(each["name"].replace("||", f"|{subset}|"), []).append(place)
        files = rendered(self.run_dir / "tokenway.yaml")
        document = assembled(
            [manifest for manifests in files.values() for manifest in manifests],
            port=self.port,
            admin_port=self.envoy_admin_port,
            endpoints=endpoints,
            sockets=[str(self.run_dir / f"gw{index}.sock") for index in range(self.workers)],
        )
        return json.dumps(document)


def _name_of_istio(name: str) -> str:
    return name if MeshName.of(name) is not None else cluster_of(name)


def _renamed(cluster: Mapping[str, Any]) -> dict[str, Any]:
    """With a name of Istio's; a configuration without models has one by the old name."""
    name = cluster["name"]
    return {"model": name, **cluster, "name": _name_of_istio(name)}


def _with_names_of_istio(model: Mapping[str, Any]) -> dict[str, Any]:
    rules = [{**rule, "cluster": _name_of_istio(rule["cluster"])} for rule in model["rules"]]
    return {**model, "rules": rules}
