"""When a changed setting takes effect: one table over the schema, by which a reload says what it cannot do.

Rules:
    1. A row is for the setting of that name and all within it that have no row of their own.
    2. Live is what the owners of `server.building` apply; whatever else there is is read once, at the start,
       or goes into Envoy's bootstrap. What of a change is live is in force at once, also where the rest of it
       needs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Flag, auto
from typing import Any, Final

from pydantic import BaseModel

from extproc.config.schema import Config


class Effect(Flag):
    """What it takes."""

    LIVE = auto()
    """Within 2 s, on running traffic."""

    RESTART = auto()
    """Tokenway reads it when it starts."""

    BOOTSTRAP = auto()
    """Envoy's bootstrap has it: `tokenway bootstrap` prints it anew, and Envoy is restarted with it."""


EFFECTS: Final[Mapping[str, Effect]] = {
    "version": Effect.LIVE,
    "server": Effect.RESTART,
    "server.workers": Effect.RESTART | Effect.BOOTSTRAP,
    "server.run_dir": Effect.RESTART | Effect.BOOTSTRAP,
    "endpoint_picker": Effect.RESTART,
    "clusters_file": Effect.LIVE,
    "discovery": Effect.RESTART,
    "default_cluster": Effect.LIVE | Effect.BOOTSTRAP,
    "default_cluster_admin_paths": Effect.LIVE,
    "request": Effect.LIVE,
    "request.allow_headers": Effect.BOOTSTRAP,
    "request.allow_fields": Effect.LIVE | Effect.BOOTSTRAP,
    "request.max_body_bytes": Effect.RESTART | Effect.BOOTSTRAP,
    "request.forward_credentials": Effect.BOOTSTRAP,
    "signals": Effect.LIVE,
    "load": Effect.RESTART,
    "health": Effect.LIVE,
    "explain.ring_size": Effect.RESTART,
    "explain.debug_token_env": Effect.LIVE,
    "metadata_center": Effect.RESTART,
    "cache": Effect.RESTART,
    "cache.kv_events.enabled": Effect.LIVE,
    "cache.kv_events.listen": Effect.LIVE,
    "cache.kv_events.discovery_interval_s": Effect.LIVE,
    "responses": Effect.LIVE,
    "holding": Effect.LIVE,
    "away": Effect.BOOTSTRAP,
    "away.max_requests_per_endpoint": Effect.LIVE,
    "edge": Effect.BOOTSTRAP,
    "istio_gateway": Effect.RESTART | Effect.BOOTSTRAP,
    "engine_tls": Effect.LIVE,
    "logging": Effect.LIVE,
    "reasoning_split": Effect.LIVE,
    "models": Effect.LIVE,
}
"""Setting -> what a change of it takes. Headers that rules match are in the bootstrap as well; most are
forwarded anyway, and of those that are not `server.forwarded_headers` warns."""


def effect_of(setting: str) -> Effect:
    """What a change of a setting takes.

    Raises:
        KeyError: No row is for it.
    """
    name = setting
    while name not in EFFECTS:
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise KeyError(setting)
    return EFFECTS[name]


def settings_of(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """All settings of a section by their dotted names, instead of sections within it what is in those."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found.update(settings_of(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def changed(before: Config, after: Config) -> list[str]:
    """Settings that differ, sorted; a section that is there in one alone counts as one setting."""
    former, latter = settings_of(before), settings_of(after)
    return sorted(name for name in former.keys() | latter.keys() if former.get(name) != latter.get(name))


def out_of_reach(before: Config, after: Config) -> dict[Effect, list[str]]:
    """Changed settings that need more than a reload, under what they need."""
    needs: dict[Effect, list[str]] = {}
    for name in changed(before, after):
        if name == "default_cluster" and None not in (before.default_cluster, after.default_cluster):
            continue  # the bootstrap has whether there is one
        for effect in (Effect.RESTART, Effect.BOOTSTRAP):
            if effect in effect_of(name):
                needs.setdefault(effect, []).append(name)
    return needs
