"""What the request path goes by, made from a configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from extproc.config.schema import Config
from extproc.observing.request_log import MIN_KEY_CHARS, RequestLog, block_key
from extproc.request.rules import RuleTable
from extproc.routing.router import Router
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.routing.table import RoutingTable, SlotsOf
from extproc.server.process.environment import secret
from extproc.server.reloading.preparing import CompiledRules
from extproc.values.endpoints import Endpoint
from extproc.values.pool_policies import PoolPolicies

_log = logging.getLogger("tokenway.worker")

NO_POLICIES: Final = PoolPolicies()

Clusters = Mapping[str, Sequence[Endpoint]]
"""Endpoints by cluster name."""


def routing_table(
    config: Config, rules: RuleTable, clusters: Clusters, slots_of: SlotsOf, now_unix_s: float
) -> RoutingTable:
    """Rules and endpoints, compiled.

    Args:
        config: Names the models.
        rules: Its rules.
        clusters: The fleet's view of its endpoints.
        slots_of: Where the load of endpoints is counted.
        now_unix_s: When.
    """
    return RoutingTable(
        rules=rules,
        clusters=clusters,
        models=[name for model, section in config.models.items() for name in (model, *section.aliases)],
        default_cluster=config.default_cluster,
        allowed_fields=frozenset(config.request.allow_fields),
        slots_of=slots_of,
        loaded_unix_s=now_unix_s,
        admin_paths=frozenset(config.default_cluster_admin_paths),
    )


def router_settings(config: Config, policies: PoolPolicies = NO_POLICIES) -> RouterSettings:
    """What one request is understood and answered by."""
    holding = config.holding
    return RouterSettings(
        first_chunk=config.signals.first_chunk,
        timeout_s=config.signals.timeout_s,
        first_byte_timeout_s=config.signals.first_byte_timeout_s,
        block_bytes=config.request.block_bytes,
        usage_injection=config.request.usage_injection,
        max_body_bytes=config.request.max_body_bytes,
        debug_token=secret(config.explain.debug_token_env) or None,
        hold=HoldSettings(holding.max_requests, holding.max_s, holding.fairness, holding.refuse)
        if holding.enabled
        else None,
        policies=policies,
    )


def block_key_of(config: Config) -> bytes | None:
    """Under which prompts' blocks are logged; None if they are not to be, or not without a good key."""
    if not config.logging.prompt_blocks:
        return None
    variable = config.logging.prompt_blocks_key_env
    key = os.environ.get(variable, "")
    if len(key) < MIN_KEY_CHARS:
        _log.warning("prompt blocks are not logged: no key", extra={"variable": variable})
        return None
    return block_key(key)


class RequestPath:
    """Keeps router and request log at the configuration in force.

    Args:
        router: Decides.
        log: Logs requests.
        rules: Of each configuration.
        clusters: The fleet's view of its endpoints.
        slots_of: Where the load of endpoints is counted.
        wall_clock: Unix seconds.
    """

    def __init__(
        self,
        router: Router,
        log: RequestLog,
        rules: CompiledRules,
        clusters: Clusters,
        slots_of: SlotsOf,
        wall_clock: Callable[[], float],
    ) -> None:
        self._router = router
        self._log = log
        self._rules = rules
        self._clusters = clusters
        self._slots_of = slots_of
        self._wall_clock = wall_clock
        self._policies = NO_POLICIES

    def follow_policies(self, policies: PoolPolicies) -> None:
        """A source of endpoints says this of requests now."""
        self._policies = policies
        self._router.configure(self._router.table, replace(self._router.settings, policies=policies))

    def follow(self, config: Config) -> None:
        """See `applying.Apply`; the only one that may raise."""
        rules = self._rules.of(config)
        table = routing_table(config, rules, self._clusters, self._slots_of, self._wall_clock())
        self._router.configure(table, router_settings(config, self._policies))
        self._log.configure(is_on=config.logging.requests, key=block_key_of(config))
