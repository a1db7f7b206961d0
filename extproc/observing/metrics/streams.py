"""Series of the streams between Envoy and this process, and of what went from worker to worker for it."""

from __future__ import annotations

from extproc.observing.metrics.family import Family, MetricType

# Envoy's access log service flushes every second by default (`buffer_flush_interval`).
_LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

STREAMS_ACTIVE = Family(
    "tokenway_streams_active", MetricType.GAUGE, "ext_proc streams open now; one per request in Envoy."
)
STREAM_ENDINGS = Family(
    "tokenway_stream_endings_total",
    MetricType.COUNTER,
    "ext_proc streams that ended, by the phase reached and how.",
    ("phase", "how"),
)
ACCESS_LOG_LAG = Family(
    "tokenway_access_log_lag_seconds",
    MetricType.HISTOGRAM,
    "From the end of a request to the arrival of its access log entry, the oldest of each batch; load is "
    "held that much too long.",
    buckets=_LAG_BUCKETS,
)
ACCESS_LOG_ENTRIES = Family(
    "tokenway_access_log_entries_total",
    MetricType.COUNTER,
    "Access log entries received, by kind.",
    ("kind",),
)
ACCESS_LOG_UNMATCHED = Family(
    "tokenway_access_log_unmatched_total",
    MetricType.COUNTER,
    "Access log entries of requests this process neither holds nor can hand over.",
)
LEASE_EXPIRATIONS = Family(
    "tokenway_lease_expirations_total",
    MetricType.COUNTER,
    "Charges released because no end was reported in time; a steady rate means lost access logs.",
)
HANDOVERS = Family(
    "tokenway_handovers_total",
    MetricType.COUNTER,
    "Access log entries handed to the worker that made the decision.",
)
BUS_DROPPED = Family(
    "tokenway_bus_dropped_total",
    MetricType.COUNTER,
    "Messages to another worker that were dropped because it was away or did not keep up, or, of another "
    "replica, could not be read.",
)
ADS_UPDATES = Family(
    "tokenway_ads_updates_total",
    MetricType.COUNTER,
    "Discovery responses sent to Envoy, by resource type.",
    ("type",),
)
ADS_NACKS = Family(
    "tokenway_ads_nacks_total",
    MetricType.COUNTER,
    "Discovery responses Envoy refused, by resource type.",
    ("type",),
)
ADS_KEPT_CLUSTERS = Family(
    "tokenway_ads_kept_clusters",
    MetricType.GAUGE,
    "Clusters that some connected Envoy has as they were, with or without TLS, for it refused what came "
    "since; `envoy refused resources` in the log says why.",
)
TRANSPORT_FAULTS = Family(
    "tokenway_transport_faults_total",
    MetricType.COUNTER,
    "gRPC streams and connections that Tokenway ended for what the peer did, by reason and by what ended; "
    "with `server.transport: native` alone.",
    ("reason", "ended"),
)

FAMILIES: tuple[Family, ...] = (
    STREAMS_ACTIVE,
    STREAM_ENDINGS,
    ACCESS_LOG_LAG,
    ACCESS_LOG_ENTRIES,
    ACCESS_LOG_UNMATCHED,
    LEASE_EXPIRATIONS,
    HANDOVERS,
    BUS_DROPPED,
    ADS_UPDATES,
    ADS_NACKS,
    ADS_KEPT_CLUSTERS,
    TRANSPORT_FAULTS,
)
