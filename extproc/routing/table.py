"""What a decision needs of the configuration, compiled once and replaced as a whole.

Rules:
    1. The rules of a `RoutingTable` never change; a reload makes a new one and swaps one reference. Its
       endpoints are those of the fleet at the time of asking.
    2. Endpoints appear in configuration order; the columns of a `Pool` are aligned with its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson

from extproc.errors import Reason, RouterError
from extproc.request.parse import operation_of
from extproc.request.paths import as_engines_read, is_admin, loosest, without_slash
from extproc.request.responses import Named, named_in
from extproc.request.rules import RuleTable
from extproc.values.endpoints import Endpoint
from extproc.values.exchange import (
    NEED_BODY,
    NEED_BODY_AND_HEAD,
    AnswerAtOnce,
    LineVerdict,
    PassTo,
    RefuseAtOnce,
    RequestHeaders,
)
from extproc.values.placements import Plan
from extproc.values.requests import ANY_MODEL, Operation
from metadata_center.errors import CapacityError
from metadata_center.types import EndpointKey

HARDWARE_LABEL: Final = "hardware"
"""Endpoints of a cluster with different values of this label have latency models of their own."""

_NO_SLOT: Final = "no slot"

PlanKey = tuple[tuple[int, ...], bool, bool, bool]
"""What a plan depends on: the order of rows; streamed, pinned, tried once only."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Endpoints that may serve a route, one row each.

    Attributes:
        keys: Distinct.
        addresses: Where each key is reached, as Envoy gets it.
        rows: The row of each key.
        slots: Where they are counted, one per key.
        weights: Relative capacity, one per key.
        hardware: What each key runs on, by its label `hardware`; one value if all run on the same, empty if
            no endpoint of the cluster has the label.
        filtered: Endpoints left out, each with the reason.
        on_trial: Endpoints that are doubted and may have one request.
        plans: Kept by the router as long as the pool.
        groups: Kept by `groups_of`, by the route's group: as many as there are routes to the cluster.
    """

    keys: tuple[EndpointKey, ...]
    addresses: tuple[str, ...]
    rows: Mapping[EndpointKey, int]
    slots: tuple[int, ...]
    weights: tuple[float, ...]
    hardware: tuple[str, ...] = ()
    filtered: tuple[tuple[EndpointKey, str], ...] = ()
    plans: dict[PlanKey, Plan] = field(default_factory=dict)
    on_trial: frozenset[EndpointKey] = frozenset()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_counted(self) -> bool:
        """Every endpoint that may be chosen can be counted; else the next pool may have more of them."""
        return all(reason != _NO_SLOT for _, reason in self.filtered)

    def groups_of(self, group: str) -> tuple[str, ...]:
        """Endpoints that perform alike, within a route's group: one name for all rows, or one per row."""
        if not self.hardware:
            return (group,)
        groups = self.groups.get(group)
        if groups is None:
            groups = tuple(f"{group}/{kind}" if kind else group for kind in self.hardware)
            self.groups[group] = groups
        return groups


@dataclass(frozen=True, slots=True)
class Retrieve(LineVerdict):
    """It is about a stored response, which one endpoint has: what knows which says where it goes."""

    named: Named


SlotsOf = Callable[[Sequence[EndpointKey]], tuple[int, ...]]
"""Where the load of endpoints is counted."""


class RoutingTable:
    """Rules, clusters and the judgement of request lines.

    Args:
        rules: Compiled model rules.
        clusters: Endpoints by cluster name: the fleet's view, not a copy.
        models: Names listed by `/v1/models` for requests that may ask for them, with the time they were
            configured.
        default_cluster: Where requests go that are no inference; None refuses them with 404.
        admin_paths: Engines' admin paths that may go there too.
        allowed_fields: Body fields that clients may steer by.
        slots_of: Where endpoints are counted.
        loaded_unix_s: When this configuration was loaded; `created` of every listed model.
    """

    def __init__(
        self,
        rules: RuleTable,
        clusters: Mapping[str, Sequence[Endpoint]],
        models: Sequence[str],
        default_cluster: str | None,
        allowed_fields: frozenset[str],
        slots_of: SlotsOf,
        loaded_unix_s: float,
        admin_paths: frozenset[str] = frozenset(),
    ) -> None:
        self.rules = rules
        self.clusters = clusters
        self.allowed_fields = allowed_fields
        self._default_cluster = default_cluster
        self._admin_paths = admin_paths
        self._slots_of = slots_of
        self._model_list = {
            name: {"id": name, "object": "model", "created": int(loaded_unix_s), "owned_by": "tokenway"}
            for name in models
            if name != ANY_MODEL
        }
        self._models_body = _listing(self._model_list.values())

    def pool(
        self,
        cluster: str,
        subset: Mapping[str, str],
        why_not: Callable[[EndpointKey], str | None],
        on_trial: frozenset[EndpointKey] = frozenset(),
    ) -> Pool:
        """The endpoints of `cluster` that carry all labels of `subset`, are available and can be counted.

        Args:
            cluster: An unknown name gives an empty pool.
            subset: Required labels.
            why_not: None if the endpoint may be chosen, else the reason it may not.
            on_trial: Kept with the pool.
        """
        keys: list[EndpointKey] = []
        addresses: list[str] = []
        weights: list[float] = []
        hardware: list[str] = []
        filtered: list[tuple[EndpointKey, str]] = []
        for endpoint in self.clusters.get(cluster, ()):
            if not endpoint.carries(subset):
                filtered.append((endpoint.key, "subset"))
                continue
            reason = why_not(endpoint.key)
            if reason is not None:
                filtered.append((endpoint.key, reason))
                continue
            keys.append(endpoint.key)
            addresses.append(str(endpoint.address))
            weights.append(float(endpoint.weight))
            hardware.append(endpoint.labels.get(HARDWARE_LABEL, ""))
        rows = {key: row for row, key in enumerate(keys)}
        is_labelled = any(HARDWARE_LABEL in each.labels for each in self.clusters.get(cluster, ()))
        kinds = tuple(hardware if len(set(hardware)) > 1 else hardware[:1]) if is_labelled else ()
        try:
            slots = self._slots_of(keys)
        except CapacityError:
            return self.pool(
                cluster, subset, lambda key: why_not(key) or self._why_not_counted(key), on_trial
            )
        return Pool(
            tuple(keys),
            tuple(addresses),
            rows,
            slots,
            tuple(weights),
            kinds,
            tuple(filtered),
            on_trial=on_trial,
        )

    def _why_not_counted(self, key: EndpointKey) -> str | None:
        try:
            self._slots_of((key,))
        except CapacityError:
            return _NO_SLOT
        return None

    def member(self, cluster: str, subset: Mapping[str, str], key: EndpointKey) -> Endpoint | None:
        """That endpoint of `cluster`, if it has all labels of `subset`; whatever its health."""
        for endpoint in self.clusters.get(cluster, ()):
            if endpoint.key == key and endpoint.carries(subset):
                return endpoint
        return None

    def expect(self, cluster: str, what: str, retry_after_s: int | None) -> None:
        """Raise unless some source lists the cluster.

        Args:
            cluster: Named by the configuration.
            what: Is served by it; begins the sentence that the client gets.
            retry_after_s: When to come again.

        Raises:
            RouterError: None does, as yet.
        """
        if cluster not in self.clusters:
            error = f"{what} is configured, but the engines that serve it are not known yet."
            raise RouterError(Reason.CLUSTER_NOT_LISTED, error, retry_after_s=retry_after_s)

    def judge(self, request: RequestHeaders) -> LineVerdict:
        """What the request line alone decides."""
        operation = operation_of(request.path)
        if operation is not None and request.method == "POST":
            return NEED_BODY_AND_HEAD if operation is Operation.RESPONSES else NEED_BODY
        path = as_engines_read(request.path)
        if operation is not None:
            return _takes(("POST",), path, request.method)
        named = named_in(request.path)
        if named is not None and self._may_pass(request.path):
            if request.method in named.methods:
                return Retrieve(named)
            return _takes(named.methods, "This path", request.method)
        engines = self._default_cluster if self.rules.serves_any else None  # they know what they serve
        reads = request.method in ("GET", "HEAD")
        if reads and _is_of_models(path) and engines is not None and self._may_pass(request.path):
            if engines in self.clusters:
                return PassTo(Plan(engines), without_slash(request.path))
            error = "The engines that serve models are not known yet."
            return RefuseAtOnce(RouterError(Reason.CLUSTER_NOT_LISTED, error, retry_after_s=1))
        if reads and path == "/v1/models":
            return AnswerAtOnce(200, self._models_for(request.headers))
        if reads and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            model = self._model_list.get(name)
            if model is not None and self.rules.may_ask_for(name, request.headers):
                return AnswerAtOnce(200, orjson.dumps(model))
            return RefuseAtOnce(
                RouterError(Reason.MODEL_NOT_FOUND, "This model is not served here.", param="model")
            )
        if self._default_cluster is not None and self._may_pass(request.path):
            if self._default_cluster not in self.clusters:
                error = "What serves this path is configured, but not known yet."
                return RefuseAtOnce(RouterError(Reason.CLUSTER_NOT_LISTED, error, retry_after_s=1))
            return PassTo(Plan(self._default_cluster))
        if _is_of_models(path):
            return _takes(("GET", "HEAD"), path, request.method)
        return RefuseAtOnce(RouterError(Reason.UNKNOWN_PATH, "Nothing is served at this path."))

    def _models_for(self, headers: Mapping[str, str]) -> bytes:
        """The list of models for a request with these headers: of those that it may ask for."""
        may_ask_for, closed = self.rules.may_ask_for, self.rules.closed
        if not closed:
            return self._models_body
        models = self._model_list.items()
        return _listing(each for name, each in models if name not in closed or may_ask_for(name, headers))

    def _may_pass(self, path: str) -> bool:
        """True if no engine behind us could take `path` for inference or an engine's administration.

        Inference in a spelling of its own would pass unread: neither sanitised nor counted.
        """
        readings = loosest(path), loosest(path, keeps_marks=True)
        return not any(
            could_be is None or operation_of(could_be) is not None or is_admin(could_be, self._admin_paths)
            for could_be in readings
        )


def _takes(methods: tuple[str, ...], path: str, method: str) -> RefuseAtOnce:
    error = f"{path} takes {' and '.join(methods)}, not {method}."
    return RefuseAtOnce(RouterError(Reason.METHOD_NOT_ALLOWED, error, param="method", allow=methods))


def _listing(models: Iterable[Mapping[str, object]]) -> bytes:
    return orjson.dumps({"object": "list", "data": list(models)})


def _is_of_models(path: str) -> bool:
    return path == "/v1/models" or path.startswith("/v1/models/")
