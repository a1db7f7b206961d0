"""The one recorder of a worker: counts events as they happen, and shows it when scraped.

The table `FAMILIES` is the truth: storage, exposition and `docs/metrics.md` all derive from it.
`Metrics` keeps its own counts (`series.py`) and hands them to prometheus_client when scraped.

Label values come from closed enums or from the configuration. A value that is neither (a model a
client made up, an endpoint removed while it still answers) is counted under `other`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from extproc.build_kind import build_kind
from extproc.errors import Reason
from extproc.observing.metrics.configuration import RELOAD_SUCCESSFUL, RELOAD_TIME, RELOADS
from extproc.observing.metrics.decisions import (
    CACHE_VIEWS,
    DECISION_SECONDS,
    DECISIONS,
    FALLBACKS,
    HOLD_SECONDS,
    HOLDS,
    MATCH_RATIO,
    SCORE,
)
from extproc.observing.metrics.ends import Ends
from extproc.observing.metrics.family import Family, MetricType
from extproc.observing.metrics.health import EJECTIONS, ENDPOINT_FAILURES, POISON_REQUESTS
from extproc.observing.metrics.live import LiveGauges
from extproc.observing.metrics.predictions import USAGE_UNKNOWN
from extproc.observing.metrics.process import BUILD_INFO, LONGEST_STALL, LOOP_STALLS, STALL_CPU, StallCause
from extproc.observing.metrics.requests import IGNORED_HEADERS, REJECTIONS, REQUESTS, STATUS_CLASSES
from extproc.observing.metrics.series import OTHER, Series
from extproc.observing.metrics.streams import (
    ACCESS_LOG_ENTRIES,
    ACCESS_LOG_LAG,
    ACCESS_LOG_UNMATCHED,
    ADS_NACKS,
    ADS_UPDATES,
    HANDOVERS,
    LEASE_EXPIRATIONS,
    STREAM_ENDINGS,
    TRANSPORT_FAULTS,
)
from extproc.observing.metrics.table import FAMILIES
from extproc.values.balancing import Algorithm
from extproc.values.control import ControlHeader, Flaw
from extproc.values.decisions import HoldEnding, HoldReason
from extproc.values.outcomes import Ended, Outcome
from extproc.values.requests import Operation
from metadata_center.types import EndpointKey


class Metrics(Collector):
    """Counts events as they happen and shows them, with the live gauges, when `registry` is scraped.

    Written to from one event loop; a scrape may come from it or from another thread.

    Args:
        registry: Where to appear; nothing touches prometheus_client's global registry.
        version: The package version, for `tokenway_build_info`.
    """

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        self._series = Series(FAMILIES)
        self._values, self._histograms = self._series.values, self._series.histograms
        self._values[BUILD_INFO][version, platform.python_version(), build_kind()] = 1.0
        self._models: frozenset[str] = frozenset()
        self._clusters: frozenset[str] = frozenset()
        self._endpoints: frozenset[str] = frozenset()
        self._ends: dict[tuple[str, str], Ends] = {}
        self._live: Callable[[], LiveGauges] = LiveGauges
        self._decisions = self._values[DECISIONS]
        self._requests = self._values[REQUESTS]
        self._decision_seconds = self._histograms[DECISION_SECONDS][()]
        self._scores = self._histograms[SCORE]
        self._match_ratios = self._histograms[MATCH_RATIO]
        self._views = self._values[CACHE_VIEWS]
        registry.register(self)

    def watch(self, live: Callable[[], LiveGauges]) -> None:
        """Read the gauges from `live` at each scrape; it may be called from the scraping thread."""
        self._live = live

    def configure(
        self, *, models: Iterable[str], clusters: Iterable[str], endpoints: Iterable[EndpointKey]
    ) -> None:
        """Name the label values in use; series of any other model, cluster or endpoint are dropped."""
        self._models = frozenset(models)
        self._clusters = frozenset(clusters)
        self._endpoints = frozenset(str(endpoint) for endpoint in endpoints)
        self._series.keep(
            {
                "model": self._models,
                "gen_ai_request_model": self._models,
                "cluster": self._clusters,
                "endpoint": self._endpoints,
            }
        )
        self._ends.clear()

    def observe_decision(
        self,
        model: str,
        algorithm: Algorithm,
        endpoint: EndpointKey,
        decision_s: float,
        score: float | None,
        match_ratio: float,
        view: str,
    ) -> None:
        """Count one choice; arguments as `Recorder` says."""
        if model not in self._models:
            model = OTHER
        self._decisions[model, algorithm, endpoint if endpoint in self._endpoints else OTHER] += 1
        self._decision_seconds.observe(decision_s)
        if score is not None:
            self._scores[algorithm,].observe(score)
        self._match_ratios[model,].observe(match_ratio)
        self._views[view,] += 1

    def held(self, model: str, reason: HoldReason) -> None:
        """Count one request that has to wait."""
        self._values[HOLDS][model if model in self._models else OTHER, reason] += 1

    def hold_ended(self, model: str, ending: HoldEnding, held_s: float) -> None:
        """Count the end of one wait."""
        labels = (model if model in self._models else OTHER, ending)
        self._histograms[HOLD_SECONDS][labels].observe(held_s)
        if ending is HoldEnding.GONE:  # it was sent nowhere, so no end of it is observed
            self._requests[labels[0], STATUS_CLASSES[None], Ended.CLIENT_ABORT] += 1

    def observe_end(
        self,
        operation: Operation,
        model: str,
        outcome: Outcome,
        waited_s: float = 0.0,
        tpot_s: float | None = None,
    ) -> None:
        """Count one ended request, with all it shows about our predictions; arguments as `Recorder` says."""
        if model not in self._models:
            model = OTHER
        ends = self._ends.get((model, operation))
        if ends is None:
            ends = self._ends[model, operation] = Ends(self._histograms, model, operation)
        status: int | None = outcome.status
        status_class = STATUS_CLASSES.get(status if status is None else status // 100, OTHER)
        self._requests[model, status_class, outcome.ended] += 1
        ends.observe(outcome, waited_s, tpot_s)

    def rejected(self, reason: Reason, model: str, status: int) -> None:
        """Count one request the gateway refused itself."""
        self._values[REJECTIONS][reason,] += 1
        labels = (model if model in self._models else OTHER, STATUS_CLASSES[status // 100], Ended.REJECTED)
        self._requests[labels] += 1

    def header_ignored(self, control: ControlHeader, flaw: Flaw) -> None:
        """Count one control header that says nothing."""
        self._values[IGNORED_HEADERS][control, flaw] += 1

    def fell_back(self, cluster: str) -> None:
        """Count one request answered by another endpoint than the one named first."""
        self._values[FALLBACKS][cluster if cluster in self._clusters else OTHER,] += 1

    def usage_unknown(self, model: str, reason: str) -> None:
        """Count one completed answer without usage; `reason` is `absent` or `encoded`."""
        self._values[USAGE_UNKNOWN][model if model in self._models else OTHER, reason] += 1

    def ejected(self, endpoint: EndpointKey, reason: StrEnum) -> None:
        """Count one ejection."""
        self._values[EJECTIONS][endpoint if endpoint in self._endpoints else OTHER, reason] += 1

    def endpoint_failed(self, endpoint: EndpointKey, kind: StrEnum) -> None:
        """Count one request that failed at an endpoint."""
        self._values[ENDPOINT_FAILURES][endpoint if endpoint in self._endpoints else OTHER, kind] += 1

    def poison(self) -> None:
        """Count one request that several endpoints failed at."""
        self._values[POISON_REQUESTS][()] += 1

    def stream_ended(self, phase: StrEnum, how: StrEnum) -> None:
        """Count one closed ext_proc stream."""
        self._values[STREAM_ENDINGS][phase, how] += 1

    def access_log_entry(self, kind: StrEnum) -> None:
        """Count one access log entry."""
        self._values[ACCESS_LOG_ENTRIES][kind,] += 1

    def access_log_lag(self, lag_s: float) -> None:
        """Note that the oldest entry of a batch arrived `lag_s` after its request ended."""
        self._histograms[ACCESS_LOG_LAG][()].observe(max(0.0, lag_s))

    def access_log_unmatched(self) -> None:
        """Count one access log entry that belongs to no request known here."""
        self._values[ACCESS_LOG_UNMATCHED][()] += 1

    def leases_expired(self, count: int) -> None:
        """Count charges released because no end was reported."""
        self._values[LEASE_EXPIRATIONS][()] += count

    def handed_over(self) -> None:
        """Count one access log entry given to the worker that decided."""
        self._values[HANDOVERS][()] += 1

    def ads_updated(self, resource_type: str) -> None:
        """Count one discovery response sent; `resource_type` is short ("CDS", "EDS")."""
        self._values[ADS_UPDATES][resource_type,] += 1

    def ads_refused(self, resource_type: str) -> None:
        """Count one discovery response Envoy refused."""
        self._values[ADS_NACKS][resource_type,] += 1

    def transport_fault(self, reason: StrEnum, is_connection: bool) -> None:
        """Count one stream or connection that was ended for what its peer did."""
        self._values[TRANSPORT_FAULTS][reason, "connection" if is_connection else "stream"] += 1

    def stalled(self, took_s: float, own_s: float, cause: StallCause) -> None:
        """Count one turn of the event loop that took long, `own_s` of it processor time."""
        self._histograms[LOOP_STALLS][cause,].observe(took_s)
        if cause is not StallCause.WAITING:
            self._histograms[STALL_CPU][cause,].observe(own_s)
        longest = self._values[LONGEST_STALL]
        longest[cause,] = max(longest[cause,], took_s)

    def reloaded(self, file: str, now_unix_s: float) -> None:
        """Count one successful load of a configuration file, named without its directory."""
        self._values[RELOADS][file, "success"] += 1
        self._values[RELOAD_SUCCESSFUL][file,] = 1.0
        self._values[RELOAD_TIME][file,] = now_unix_s

    def reload_failed(self, file: str) -> None:
        """Count one load that failed; the previous content stays in force."""
        self._values[RELOADS][file, "failure"] += 1
        self._values[RELOAD_SUCCESSFUL][file,] = 0.0

    def describe(self) -> Iterator[Metric]:
        """Names only: lets the registry refuse duplicates without reading live state."""
        for family in FAMILIES:
            yield _exposed(family)

    def collect(self) -> Iterator[Metric]:
        """Every family in the table's order, the live gauges read now."""
        live = self._live().values(self._models, self._values[RELOAD_TIME])
        for family in FAMILIES:
            metric = _exposed(family)
            if isinstance(metric, HistogramMetricFamily):
                for labels, histogram in list(self._histograms[family].items()):
                    buckets, total = histogram.cumulative()
                    metric.add_metric(labels, buckets, total)
            else:
                values = live[family] if family in live else self._values[family]
                for labels, value in list(values.items()):
                    metric.add_metric(labels, value)
            yield metric


def _exposed(family: Family) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    if family.kind is MetricType.COUNTER:
        return CounterMetricFamily(family.name, family.doc, labels=family.labels)
    if family.kind is MetricType.GAUGE:
        return GaugeMetricFamily(family.name, family.doc, labels=family.labels)
    return HistogramMetricFamily(family.name, family.doc, labels=family.labels)
