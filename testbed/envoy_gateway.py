"""What Envoy Gateway makes of objects, by its real translator (`egctl x translate`), as an Envoy's file.

Rules:
    1. The translator runs without a cluster: Services get addresses here, as an API server gives them.
    2. It knows no pods, so a Service's address stands for its endpoints; tests say where they are.
    3. What its Envoys would fetch (routes, endpoints, secrets) is written into one file, so that
       `envoy --mode validate` looks at all of it.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from testbed.control_planes.build import binary, is_built

CONTROLLER: Final = "gateway.envoyproxy.io/gatewayclass-controller"
PLANE: Final = "envoy-gateway"
HOW_TO_BUILD: Final = "no egctl: run `make egctl`, which takes 7 minutes of CPU"

_READY: Final = "envoy-gateway-proxy-ready"
_TIMEOUT_S: Final = 120.0


def is_available() -> bool:
    """True if the translator is built."""
    return is_built(PLANE)


@dataclass(frozen=True, slots=True)
class Translation:
    """What it made.

    Attributes:
        objects: As they were, with the status that Envoy Gateway would write.
        dumps: xDS of one gateway, by the last part of their types.
    """

    objects: list[dict[str, Any]]
    dumps: dict[str, dict[str, Any]]

    def refused(self) -> list[str]:
        """Conditions of the objects that are not true, each with its object."""
        return [
            f"{each.get('kind')} {each['metadata']['name']}: {condition['type']}: {condition['message']}"
            for each in self.objects
            for condition in _conditions(each.get("status", {}))
            if condition["status"] != "True"
        ]

    def bootstrap(
        self,
        admin_port: int,
        port: int,
        places: Mapping[str, Sequence[tuple[str, int]]],
        authorities: str = "",
    ) -> dict[str, Any]:
        """One file for an Envoy.

        Args:
            admin_port: Envoy's own.
            port: In place of the listener's.
            places: Endpoints of clusters whose name contains a text; others keep a Service's address.
            authorities: PEM of who signs what is verified; its secrets are no part of a translation.
        """
        routes = {each["name"]: each for each in self._listed("RoutesConfigDump", "dynamicRouteConfigs")}
        listeners = [
            each["listener"]
            for each in self._listed("ListenersConfigDump", "dynamicListeners")
            if not each["listener"]["name"].startswith(_READY)
        ]
        for listener in listeners:
            del listener["@type"]
            listener["address"] = _address("127.0.0.1", port)
            for manager in _managers(listener):
                manager["routeConfig"] = routes[manager.pop("rds")["routeConfigName"]]
        clusters = self._clusters(places)
        names = sorted(_own_secrets([listeners, clusters]))
        context = {"trustedCa": {"inlineString": authorities}}
        return {
            "admin": {"address": _address("127.0.0.1", admin_port)},
            "static_resources": {
                "listeners": listeners,
                "clusters": clusters,
                "secrets": [{"name": name, "validationContext": context} for name in names],
            },
        }

    def _listed(self, dump: str, field: str) -> list[dict[str, Any]]:
        """Copies of what a dump has, of each the one field that is no date or name."""
        listed = copy.deepcopy(self.dumps[dump].get(field, []))
        found: list[dict[str, Any]] = [
            next(value for value in each.values() if isinstance(value, dict)) for each in listed
        ]
        for each in found:
            each.pop("@type", None)
        return found

    def _clusters(self, places: Mapping[str, Sequence[tuple[str, int]]]) -> list[dict[str, Any]]:
        listed = self._listed("EndpointsConfigDump", "dynamicEndpointConfigs")
        assignments = {each["clusterName"]: each for each in listed}
        clusters = self._listed("ClustersConfigDump", "dynamicActiveClusters")
        for cluster in clusters:
            del cluster["edsClusterConfig"]
            assignment = assignments[cluster["name"]]
            for text, endpoints in places.items():
                if text in cluster["name"]:
                    one = assignment["endpoints"][0]
                    one["lbEndpoints"] = [{"endpoint": {"address": _address(*each)}} for each in endpoints]
                    assignment["endpoints"] = [one]
            cluster |= {"type": "STATIC", "loadAssignment": assignment}
        return clusters


def translated(objects: Sequence[Mapping[str, Any]], folder: Path) -> Translation:
    """Translate objects that have one Gateway, each Service with an address.

    Raises:
        AssertionError: The translator refuses; shows what it said.
    """
    given = [dict(each) for each in objects]
    for number, each in enumerate(given):
        if each["kind"] == "Service":
            each["spec"] = {**each["spec"], "clusterIP": f"10.96.0.{number + 1}"}
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(given))
    words = ["x", "translate", "--from", "gateway-api", "--to", "gateway-api,xds", "-t", "all", "-o", "json"]
    done = subprocess.run(
        [str(binary(PLANE, "egctl")), *words, "-f", str(path)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    (xds,) = made.pop("xds").values()
    listed = [each for value in made.values() for each in (value if isinstance(value, list) else [value])]
    return Translation(listed, {_kind(each): each for each in xds["configs"]})


def _kind(dump: Mapping[str, Any]) -> str:
    return str(dump["@type"]).rpartition(".")[2]


def _conditions(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that are in a status, however deep."""
    found = list(status.get("conditions", ()))
    for value in status.values():
        for each in value if isinstance(value, list) else ():
            if isinstance(each, dict) and "conditions" in each:
                found += each["conditions"]
    return found


def _managers(listener: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The HTTP connection managers of a listener that fetch their routes."""
    chains = [*listener.get("filterChains", ()), *filter(None, [listener.get("defaultFilterChain")])]
    found = [each["typedConfig"] for chain in chains for each in chain["filters"]]
    return [each for each in found if "rds" in each]


def _own_secrets(node: Any) -> set[str]:
    """Have secrets be looked for in the file itself; their names."""
    if isinstance(node, list):
        return set[str]().union(*map(_own_secrets, node))
    if not isinstance(node, dict):
        return set()
    found = {node["name"]} if node.pop("sdsConfig", None) is not None else set()
    return found.union(*map(_own_secrets, node.values()))


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socketAddress": {"address": host, "portValue": port}}
