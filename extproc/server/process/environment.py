"""Secrets, which come from the environment and from nowhere else; the configuration names the variables."""

from __future__ import annotations

import logging
import os

_log = logging.getLogger("tokenway.configuration")


def secret(variable: str | None) -> str | None:
    """The value of a variable; None where none is named, or it is not set, which the log says."""
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        _log.warning("an environment variable that is named is not set", extra={"variable": variable})
    return value
