"""Where `explain` and `top` ask: the admin port of a gateway."""

from __future__ import annotations

import os

ADMIN_ENV = "TOKENWAY_ADMIN"

DEFAULT_ADMIN = "http://127.0.0.1:10080"

ADMIN_HELP = f"the gateway's admin port (default ${ADMIN_ENV}, or {DEFAULT_ADMIN})"
"""Of the option `--admin`."""


def default_admin() -> str:
    """The base URL that is asked unless an option names another."""
    return os.environ.get(ADMIN_ENV) or DEFAULT_ADMIN
