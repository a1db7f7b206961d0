"""Series of the files this process follows, and of the host names in them."""

from __future__ import annotations

from collections.abc import Mapping

from extproc.observing.metrics.family import Family, MetricType, Values
from metadata_center.load.counters import MAX_ENDPOINTS

RELOADS = Family(
    "tokenway_reloads_total",
    MetricType.COUNTER,
    "Attempts to load a changed file; `failure` leaves the previous content in force.",
    ("file", "result"),
)
RELOAD_SUCCESSFUL = Family(
    "tokenway_config_last_reload_successful",
    MetricType.GAUGE,
    "1 if the file can be used as it is now, else 0: what was good before stays in force. Series are those "
    "of the files that are needed now.",
    ("file",),
)
RELOAD_TIME = Family(
    "tokenway_config_last_reload_success_timestamp_seconds",
    MetricType.GAUGE,
    "Unix time the content now in force was loaded.",
    ("file",),
)
HOST_NAME_RESOLVED = Family(
    "tokenway_host_name_resolved",
    MetricType.GAUGE,
    "1 if the last look-up of a host name in the clusters file gave an address, else 0: it then keeps the "
    "addresses it had, if any.",
    ("name",),
)

CLUSTER_LISTED = Family(
    "tokenway_cluster_listed",
    MetricType.GAUGE,
    "1 if a source lists a cluster that the configuration names, else 0: its requests get 503 until then.",
    ("name",),
)

ENDPOINTS_LEFT_OUT = Family(
    "tokenway_endpoints_left_out",
    MetricType.GAUGE,
    f"Endpoints that sources list beyond the bound of {MAX_ENDPOINTS}, left out until others leave.",
)

FAMILIES: tuple[Family, ...] = (
    RELOADS,
    RELOAD_SUCCESSFUL,
    RELOAD_TIME,
    HOST_NAME_RESOLVED,
    CLUSTER_LISTED,
    ENDPOINTS_LEFT_OUT,
)


def values(
    files: Mapping[str, bool] | None,
    loaded_unix_s: Mapping[tuple[str, ...], float],
    host_names: Mapping[str, bool],
    clusters: Mapping[str, bool],
    endpoints_left_out: int,
) -> Values:
    """The series of what is followed now.

    Args:
        files: Each file that is needed: is it good? None leaves the series of the last attempts.
        loaded_unix_s: When each file, as a label tuple, was last loaded.
        host_names: Each host name in use: did its last look-up give an address?
        clusters: Each cluster that the configuration names: does a source list it?
        endpoints_left_out: For want of space in the fleet.
    """
    shown: Values = {
        HOST_NAME_RESOLVED: {(name,): has for name, has in host_names.items()},
        CLUSTER_LISTED: {(name,): is_listed for name, is_listed in clusters.items()},
        ENDPOINTS_LEFT_OUT: {(): endpoints_left_out},
    }
    if files is not None:
        shown[RELOAD_SUCCESSFUL] = {(file,): is_good for file, is_good in files.items()}
        shown[RELOAD_TIME] = {(file,): loaded_unix_s[file,] for file in files if (file,) in loaded_unix_s}
    return shown
