"""What can go wrong with an engine's cache events. None of it reaches a request."""

from __future__ import annotations

from metadata_center.errors import MetadataError


class DecodeError(MetadataError):
    """Bytes from an engine that are no batch of events, or token ids that do not fit their blocks."""


class DiscoveryError(MetadataError):
    """An engine did not say where its events are, or named a place that it may not name."""
