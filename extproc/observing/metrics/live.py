"""State read when scraped rather than counted as it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from extproc.observing.metrics import configuration, endpoints, predictions
from extproc.observing.metrics.decisions import HELD, UNLOCKED_DECISIONS
from extproc.observing.metrics.endpoints import EndpointGauges
from extproc.observing.metrics.family import Values
from extproc.observing.metrics.health import EJECTIONS_WITHHELD
from extproc.observing.metrics.process import EXPLAIN_RECORDS
from extproc.observing.metrics.streams import ADS_KEPT_CLUSTERS, BUS_DROPPED, STREAMS_ACTIVE
from extproc.predicting.predictor import KeyCalibration, ModelKey
from extproc.values.decisions import HoldReason


@dataclass(frozen=True, slots=True)
class LiveGauges:
    """What a worker knows at the moment of a scrape.

    Attributes:
        endpoints: Every endpoint configured now.
        streams_active: Open ext_proc streams.
        explain_records: Decision records held.
        held: Requests that wait, by reason.
        tokens_per_byte: Learned ratio by model; configured models only are shown.
        calibrations: How good predictions have been, by model and endpoint group.
        bus_dropped: Messages to other workers dropped so far.
        clusters_kept: That Envoys have as they were, for they refused what came since.
        unlocked_decisions: Made so far beside a worker that kept the lock.
        shared: Of the process (`process_values`), other gateways (`sharing_values`) and engines' KV events
            (`event_values`).
        files: Each configuration file that is needed: is it good? None shows the last attempts.
        host_names: Each host name in use: did its last look-up give an address?
        clusters: Each cluster that the configuration names: does a source list it?
        endpoints_left_out: For want of space in the fleet.
        ejections_withheld: By the floor so far.
    """

    endpoints: Iterable[EndpointGauges] = ()
    streams_active: int = 0
    explain_records: int = 0
    held: Mapping[HoldReason, int] = field(default_factory=dict)
    tokens_per_byte: Mapping[str, float] = field(default_factory=dict)
    calibrations: Iterable[tuple[ModelKey, KeyCalibration]] = ()
    bus_dropped: int = 0
    clusters_kept: int = 0
    unlocked_decisions: int = 0
    shared: Values = field(default_factory=dict)
    files: Mapping[str, bool] | None = None
    host_names: Mapping[str, bool] = field(default_factory=dict)
    clusters: Mapping[str, bool] = field(default_factory=dict)
    endpoints_left_out: int = 0
    ejections_withheld: int = 0

    def values(self, models: frozenset[str], loaded_unix_s: Mapping[tuple[str, ...], float]) -> Values:
        """The series of all this.

        Args:
            models: Those whose series are shown.
            loaded_unix_s: When each file, as a label tuple, was last loaded.
        """
        return {
            STREAMS_ACTIVE: {(): self.streams_active},
            EXPLAIN_RECORDS: {(): self.explain_records},
            HELD: {(reason,): count for reason, count in self.held.items()},
            BUS_DROPPED: {(): self.bus_dropped},
            ADS_KEPT_CLUSTERS: {(): self.clusters_kept},
            UNLOCKED_DECISIONS: {(): self.unlocked_decisions},
            EJECTIONS_WITHHELD: {(): self.ejections_withheld},
            **self.shared,
            **configuration.values(
                self.files, loaded_unix_s, self.host_names, self.clusters, self.endpoints_left_out
            ),
            **endpoints.values(self.endpoints),
            **predictions.values(models, self.tokens_per_byte, self.calibrations),
        }
