"""What the folders hold, which of it is the core, and who may import whom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

CORE = (
    "extproc/values/*.py",
    "extproc/errors.py",
    "extproc/listeners.py",
    "extproc/protobuf_fields.py",
    "extproc/request/*.py",
    "extproc/choosing/*.py",
    "extproc/choosing/policies/*.py",
    "extproc/choosing/rivals/*.py",
    "extproc/predicting/*.py",
    "extproc/protocol/machine.py",
    "extproc/protocol/dialect.py",
    "extproc/picker/machine.py",
    "extproc/picker/answer.py",
    "extproc/picker/control_headers.py",
    "extproc/picker/reading.py",
    "extproc/picker/renaming.py",
    "extproc/transport/seam.py",
    "extproc/transport/http2/*.py",
    "extproc/rendering/vocabulary.py",
    "extproc/rendering/canonical.py",
    "extproc/rendering/window.py",
    "extproc/rendering/metering.py",
    "extproc/rendering/template.py",
    "extproc/rendering/messages.py",
    "extproc/rendering/prompt_text.py",
    "extproc/routing/*.py",
    "extproc/admin/*.py",
    "extproc/admin/pages/*.py",
    "extproc/accesslog/entries.py",
    "extproc/accesslog/lines.py",
    "extproc/accesslog/meanings.py",
    "extproc/accesslog/usage.py",
    "extproc/accesslog/answer_errors.py",
    *(f"extproc/health/{name}.py" for name in ("tracker", "records", "levels", "doubts", "floors", "states")),
    "extproc/health/evidence.py",
    "extproc/health/failures.py",
    "extproc/health/judging.py",
    "extproc/health/poison.py",
    "extproc/health/settings.py",
    "extproc/observing/records.py",
    "extproc/observing/ending_counts.py",
    "extproc/observing/printable.py",
    "extproc/observing/explain.py",
    "extproc/observing/recorder.py",
    *(
        f"extproc/observing/metrics/{name}.py"
        for name in (
            *("family", "series", "requests", "decisions", "predictions", "ends", "endpoints", "health"),
            *("streams", "configuration", "process", "live", "merge", "discovery"),
        )
    ),
    "extproc/config/clusters.py",
    "extproc/discovery/following.py",
    "extproc/discovery/fleet.py",
    "extproc/discovery/listed.py",
    "extproc/discovery/live.py",
    "extproc/discovery/istio/*.py",
    "extproc/discovery/kubernetes/*.py",
    "extproc/discovery/resolution.py",
    "extproc/discovery/routable.py",
    "extproc/xds/resources.py",
    "extproc/xds/cluster_encoding.py",
    "extproc/xds/cluster_kinds.py",
    "extproc/xds/open_models.py",
    "extproc/xds/delta.py",
    "extproc/istio_gateway/*.py",
    "extproc/config/collisions.py",
    "extproc/config/schema.py",
    "extproc/config/sections/*.py",
    "extproc/config/taking_effect.py",
    "extproc/config/rule_headers.py",
    "extproc/config/document.py",
    "metadata_center/types.py",
    "metadata_center/roots.py",
    "metadata_center/errors.py",
    "metadata_center/addresses.py",
    "metadata_center/backoff.py",
    "metadata_center/load/kinds.py",
    "metadata_center/load/ledger.py",
    "metadata_center/load/table.py",
    "metadata_center/load/counters.py",
    "metadata_center/history/prefix_index.py",
    "metadata_center/history/radix_tree.py",
    "metadata_center/history/running_blocks.py",
    "metadata_center/service/cluster_loads.py",
    "metadata_center/service/rendezvous.py",
    "metadata_center/service/http_callers.py",
    "metadata_center/service/reservations.py",
    "metadata_center/cache_map/*.py",
    "metadata_center/kv_events/errors.py",
    "metadata_center/kv_events/events.py",
    "metadata_center/kv_events/decoding.py",
    "metadata_center/kv_events/pieces.py",
    "metadata_center/kv_events/sequencing.py",
    "metadata_center/kv_events/statistics.py",
    "metadata_center/sharing/http_messages.py",
    "metadata_center/sharing/load.py",
    "metadata_center/sharing/messages.py",
    "metadata_center/sharing/others.py",
    "metadata_center/sharing/peers.py",
    "metadata_center/sharing/published.py",
    "metadata_center/sharing/redis_url.py",
    "metadata_center/sharing/store.py",
    "metadata_center/sharing/tickets.py",
    "metadata_center/sharing/transport.py",
    "metadata_center/store.py",
    *(
        f"metadata_center/service/{name}.py"
        for name in ("api", "aigw_calls", "calls", "fields", "member_calls", "openapi", "operator_calls")
    ),
    "metadata_center/service/cluster_caches.py",
    "metadata_center/service/state.py",
    "tokenway/simulator/engine/*.py",
    *(f"tokenway/simulator/server/{name}.py" for name in ("faults", "metrics", "text")),
    "tokenway/simulator/policies/*.py",
    *(
        f"tokenway/simulator/replay/{name}.py"
        for name in (
            *("trace", "draws", "ledger", "caches", "fleet", "replica", "settings", "gateway", "run"),
            *(
                "agenda",
                "outcome",
                "summary",
                "oracle",
                "lineup",
                "report",
                "generators",
                "export",
                "log_lines",
            ),
        )
    ),
    *(
        f"tokenway/simulator/validation/{name}.py"
        for name in ("measured", "playing", "fitting", "comparing", "datasheet")
    ),
)

MAY_IMPORT: Mapping[str, frozenset[str]] = {
    name: frozenset(allowed.split())
    for name, allowed in {
        "metadata_center": "",
        "metadata_center.load": "metadata_center.types metadata_center.errors",
        "metadata_center.history": "metadata_center.types metadata_center.errors metadata_center.load",
        "metadata_center.kv_events": "metadata_center.types metadata_center.errors metadata_center.addresses",
        "metadata_center.cache_map": "metadata_center.types metadata_center.errors metadata_center.roots "
        "metadata_center.kv_events metadata_center.load",
        "metadata_center.sharing": "metadata_center.types metadata_center.errors metadata_center.load "
        "metadata_center.store metadata_center.addresses metadata_center.backoff metadata_center.files",
        "metadata_center.service": "metadata_center.types metadata_center.errors metadata_center.load "
        "metadata_center.history metadata_center.sharing metadata_center.addresses metadata_center.signals "
        "metadata_center.tokens",
        "tokenway.simulator.engine": "",
        "tokenway.simulator.server": "tokenway.simulator.engine",
        "tokenway.simulator.validation": "tokenway.simulator.engine",
        "tokenway.simulator.policies": "extproc.choosing extproc.predicting extproc.values metadata_center",
        "tokenway.simulator.replay": "tokenway.simulator.engine tokenway.simulator.policies extproc.choosing "
        "extproc.predicting metadata_center",
        "extproc.values": "extproc.errors metadata_center",
        "extproc.errors": "",
        "extproc.listeners": "",
        "extproc.protobuf_fields": "",
        "extproc.build_kind": "",
        "extproc.choosing": "extproc.values extproc.predicting metadata_center",
        "extproc.predicting": "extproc.values metadata_center",
        "extproc.request": "extproc.values extproc.errors",
        "extproc.rendering": "extproc.values extproc.errors extproc.request metadata_center",
        "extproc.transport": "extproc.build_kind metadata_center",
        "extproc.protocol": "extproc.build_kind extproc.protobuf_fields extproc.values extproc.errors "
        "extproc.request.answer_head extproc.request.first_token extproc.transport metadata_center",
        "extproc.picker": "extproc.values extproc.errors extproc.protocol extproc.request.answer_head "
        "extproc.request.first_token extproc.request.sanitize extproc.accesslog.answer_errors "
        "extproc.accesslog.usage extproc.transport metadata_center",
        "extproc.health": "extproc.values metadata_center",
        "extproc.observing": "extproc.build_kind extproc.values extproc.errors extproc.choosing "
        "extproc.predicting metadata_center",
        "extproc.admin": "extproc.observing metadata_center",
        "extproc.accesslog": "extproc.protobuf_fields extproc.values extproc.errors "
        "extproc.observing.recorder extproc.transport metadata_center",
        "extproc.config": "extproc.values extproc.errors extproc.health extproc.request "
        "extproc.choosing.rivals metadata_center",
        "extproc.discovery": "extproc.protobuf_fields extproc.values extproc.config extproc.errors "
        "metadata_center",
        "extproc.xds": "extproc.values extproc.config extproc.health extproc.transport metadata_center",
        "extproc.istio_gateway": "extproc.values extproc.config extproc.xds.open_models metadata_center",
        "extproc.routing": "extproc.values extproc.errors extproc.request extproc.rendering "
        "extproc.choosing extproc.predicting "
        "extproc.protocol.machine extproc.health extproc.observing.ending_counts extproc.observing.recorder "
        "extproc.observing.records extproc.discovery.fleet metadata_center",
    }.items()
}
"""Package -> packages of ours that it may import. Server and command, which build all, may all."""


def sources(*patterns: str) -> list[Path]:
    """Files of the repository that match, sorted; each pattern must match something."""
    found = [sorted(ROOT.glob(pattern)) for pattern in patterns]
    assert all(found), [pattern for pattern, files in zip(patterns, found, strict=True) if not files]
    return [path for files in found for path in files]


def name_of(path: Path) -> str:
    """The path in the repository."""
    return path.relative_to(ROOT).as_posix()


PACKAGES = sources("extproc/**/*.py", "metadata_center/**/*.py", "tokenway/**/*.py")

CORE_FILES = sources(*CORE)


def module_of(path: Path) -> str:
    """The dotted name that a file is imported by."""
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path): path for path in PACKAGES}
