"""Which cluster serves a request: model name and headers against rules compiled once.

Rules:
    1. The most specific matching rule wins: the one that names the most headers, all of them equal.
       A rule without headers matches every request and is therefore the model's default.
    2. Equally specific matching rules share traffic in proportion to their weights. Weight 0 switches
       a rule off: it never matches, whatever else does.
    3. One random draw at most, and only where two or more rules share the traffic.
    4. A `RuleTable` never changes; a reload builds another one.
    5. The model `*` serves every name that no other does, each as a model of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import accumulate, groupby

from extproc.errors import Reason, RouterError
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Rng
from extproc.values.requests import ANY_MODEL

_QUOTED_CHARS = 200
"""Longest part of a client's model name that an error message repeats; no published name is longer."""

_MAX_NAMES = 1024
"""Names whose rules of `ANY_MODEL` are kept compiled."""


class Backend(StrEnum):
    """The engine behind a cluster. AIGW's names; `openai` is any other engine with the OpenAI API."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt-llm"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to serve a model.

    Attributes:
        cluster: Envoy cluster that serves it.
        backend: Engine behind the cluster.
        headers: Required request headers, lower-case name -> exact value; empty matches every request.
        subset: Labels an endpoint must carry to be a candidate.
        weight: Share of the traffic among equally specific matching rules, >= 0; 0 is off.
        lora: LoRA adapter that answers; engines serve an adapter under its own model name.
        model: Name of the model at the engine, or None for the client's (or the adapter's) name.
        route_name: For decision records, or None.
        endpoint_group: Endpoints that perform alike and so share one predictor; None means the cluster.
    """

    cluster: str
    backend: Backend = Backend.VLLM
    headers: Mapping[str, str] = field(default_factory=dict)
    subset: Mapping[str, str] = field(default_factory=dict)
    weight: int = 1
    lora: str | None = None
    model: str | None = None
    route_name: str | None = None
    endpoint_group: str | None = None


@dataclass(frozen=True, slots=True)
class ModelRules:
    """A model as clients know it: its name, its other names, its rules in the order of the file."""

    name: str
    rules: tuple[Rule, ...]
    aliases: tuple[str, ...] = ()
    load_balancing: LoadBalancing = field(default_factory=LoadBalancing)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes and how its endpoint is chosen.

    Attributes:
        model: Canonical model name; aliases are gone.
        cluster: Envoy cluster whose endpoints are the candidates.
        backend: Engine behind the cluster.
        subset: Labels a candidate must carry.
        lora: LoRA adapter, or None; part of the cache namespace.
        upstream_model: Name to write into the body, or None if the client's name is already right.
        route_name: For decision records, or None.
        load_balancing: Settings of the choice.
        group: Endpoints sharing one predictor: the rule's endpoint group or else its cluster.
    """

    model: str
    cluster: str
    backend: Backend
    subset: Mapping[str, str]
    lora: str | None
    upstream_model: str | None
    route_name: str | None
    load_balancing: LoadBalancing
    group: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    headers: tuple[tuple[str, str], ...]
    weight: int
    route: Route

    def matches(self, headers: Mapping[str, str]) -> bool:
        return all(headers.get(name) == value for name, value in self.headers)


_Tiers = tuple[tuple[_Candidate, ...], ...]
"""Candidates of one model name grouped by number of headers, most first."""


class RuleTable:
    """Every served name, compiled for `match`.

    Args:
        models: Names and aliases must be distinct over all of them; one may be `ANY_MODEL`.

    Raises:
        ValueError: A name is served twice.
    """

    __slots__ = ("_any", "_by_name", "_of_any", "closed", "rewritten")

    def __init__(self, models: Iterable[ModelRules]) -> None:
        models = tuple(models)
        self._by_name: dict[str, Route | _Tiers] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                if name in self._by_name:
                    raise ValueError(f"model name {name!r} is served twice")
                self._by_name[name] = _compile(model, name)
        self.rewritten = frozenset(
            name for name, compiled in self._by_name.items() if any(map(_rewrites, _routes(compiled)))
        )
        """Names in whose place some rule has the engine's; `ANY_MODEL` if that may be so of any other."""

        self.closed = frozenset(
            name for name, compiled in self._by_name.items() if not any(_default_of(compiled))
        )
        """Names that only requests with certain headers may ask for."""
        self._any = next((model for model in models if model.name == ANY_MODEL), None)
        self._of_any: dict[str, Route | _Tiers] = {}

    def match(self, model: str, headers: Mapping[str, str], rng: Rng) -> Route:
        """The route of one request.

        One dictionary look-up where the model has a single rule without headers.

        Args:
            model: The client's name for the model.
            headers: Request headers, lower-case names.
            rng: Drawn from once if several equally specific rules match, else not at all.

        Raises:
            RouterError: MODEL_NOT_FOUND for a name that is not served, ROUTE_NOT_FOUND if no rule matches.
        """
        compiled = self._by_name.get(model)
        if compiled is None and self._any is not None and 0 < len(model) <= _QUOTED_CHARS:
            compiled = self._compiled_for(self._any, model)
        if isinstance(compiled, Route):
            return compiled
        quoted = model if len(model) <= _QUOTED_CHARS else f"{model[:_QUOTED_CHARS]}…"
        if compiled is None:
            raise RouterError(
                Reason.MODEL_NOT_FOUND,
                f"The model `{quoted}` does not exist or is not served here.",
                param="model",
            )
        for tier in compiled:
            matching = [candidate for candidate in tier if candidate.matches(headers)]
            if matching:
                return matching[0].route if len(matching) == 1 else _pick(matching, rng)
        raise RouterError(
            Reason.ROUTE_NOT_FOUND,
            f"No route of the model `{quoted}` matches the headers of this request.",
            param="model",
        )

    def may_ask_for(self, name: str, headers: Mapping[str, str]) -> bool:
        """Whether a request with these headers may ask for one of the names in `closed`, or of the others."""
        compiled = self._by_name.get(name, ())
        return isinstance(compiled, Route) or any(
            candidate.matches(headers) for tier in compiled for candidate in tier
        )

    @property
    def serves_any(self) -> bool:
        """A name that no model has is served all the same."""
        return self._any is not None

    def _compiled_for(self, any_model: ModelRules, name: str) -> Route | _Tiers:
        """The rules of `ANY_MODEL` for a name of its own: an adapter's cache is not its base model's."""
        compiled = self._of_any.get(name)
        if compiled is None:
            if len(self._of_any) >= _MAX_NAMES:
                self._of_any.clear()
            compiled = self._of_any[name] = _compile(replace(any_model, name=name, aliases=()), name)
        return compiled

    def open_to(self, headers: Mapping[str, str]) -> Iterator[Route]:
        """Every route that a request with these headers could be given, whatever model it names."""
        for compiled in self._by_name.values():
            if isinstance(compiled, Route):
                yield compiled
                continue
            for tier in compiled:
                yield from (candidate.route for candidate in tier if candidate.matches(headers))


def _pick(candidates: list[_Candidate], rng: Rng) -> Route:
    """Weighted random pick; all weights are > 0, so the draw always lands before the last bound."""
    bounds = list(accumulate(candidate.weight for candidate in candidates))
    point = rng.random() * bounds[-1]
    for candidate, bound in zip(candidates, bounds, strict=True):
        if point < bound:
            return candidate.route
    return candidates[-1].route


def _compile(model: ModelRules, name: str) -> Route | _Tiers:
    candidates = [
        _Candidate(tuple(rule.headers.items()), rule.weight, _route(model, rule, name))
        for rule in sorted(model.rules, key=lambda rule: -len(rule.headers))
        if rule.weight > 0
    ]
    if len(candidates) == 1 and not candidates[0].headers:
        return candidates[0].route
    return tuple(tuple(tier) for _, tier in groupby(candidates, key=lambda candidate: len(candidate.headers)))


def _default_of(compiled: Route | _Tiers) -> Iterator[bool]:
    """For each rule, whether it takes requests of any headers."""
    if isinstance(compiled, Route):
        yield True
        return
    yield from (not candidate.headers for tier in compiled for candidate in tier)


def _routes(compiled: Route | _Tiers) -> list[Route]:
    if isinstance(compiled, Route):
        return [compiled]
    return [candidate.route for tier in compiled for candidate in tier]


def _rewrites(route: Route) -> bool:
    return route.upstream_model is not None


def _route(model: ModelRules, rule: Rule, name: str) -> Route:
    """The route of one rule for clients that say `name`: the rule's model, its adapter, or canonical."""
    upstream = rule.model or rule.lora or model.name
    return Route(
        model=model.name,
        cluster=rule.cluster,
        backend=rule.backend,
        subset=dict(rule.subset),
        lora=rule.lora,
        upstream_model=upstream if upstream != name else None,
        route_name=rule.route_name,
        load_balancing=model.load_balancing,
        group=rule.endpoint_group or rule.cluster,
    )
