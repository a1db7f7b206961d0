"""What can go wrong in the metadata center. None of it ever reaches a client."""

from __future__ import annotations


class MetadataError(Exception):
    """Base of every error raised here."""


class CapacityError(MetadataError):
    """A stated bound was reached; nothing was changed."""


class LayoutError(MetadataError):
    """A counter file is missing, cut short, or was made for other numbers of workers or endpoints."""
