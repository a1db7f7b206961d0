"""Where `explain` and `top` ask: the admin port of a gateway."""

from __future__ import annotations

import os
from typing import Final

ADMIN_ENV = "TOKENWAY_ADMIN"

DEFAULT_ADMIN = "http://127.0.0.1:10080"

ADMIN_HELP = f"the gateway's admin port (default ${ADMIN_ENV}, or {DEFAULT_ADMIN})"
"""Of the option `--admin`."""

UNREADABLE: Final = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What showing an answer raises that is not what a gateway of this version says."""


def foreign(admin_url: str) -> str:
    """What to say of such an answer."""
    return (
        f"admin port {admin_url} does not answer as this version of Tokenway does; --json shows what it says"
    )


def default_admin() -> str:
    """The base URL that is asked unless an option names another."""
    return os.environ.get(ADMIN_ENV) or DEFAULT_ADMIN
