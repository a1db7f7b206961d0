"""Kinds of failure that speak against others than the endpoint; `tracker` and `poison` judge by them."""

from __future__ import annotations

from typing import Final

from extproc.values.evidence import FailureKind

MAY_BE_THE_CLIENTS: Final = frozenset({FailureKind.REFUSED, FailureKind.OVERLOADED})
"""What a client can cause at will, with a bad request or with many; it weighs half."""

MAY_BE_POISON: Final = frozenset({FailureKind.RESET, FailureKind.SERVER_ERROR, FailureKind.ERROR_IN_ANSWER})
"""How an engine answers an input that it cannot bear: it dies, or it fails."""
