"""Requests and views for policies of the simulator."""

from __future__ import annotations

from typing import Any

from extproc.choosing.stateful import FleetView, PolicyRequest
from metadata_center.types import EndpointKey

ROWS = 3


class Draws:
    """Gives the draws it was made with and then the last one for ever."""

    def __init__(self, *draws: float) -> None:
        self._draws = list(draws) or [0.0]

    def random(self) -> float:
        """The next draw."""
        return self._draws.pop(0) if len(self._draws) > 1 else self._draws[0]


def request(
    prompt_tokens: int = 160, *, name: int = 0, session: str | None = None, **changes: Any
) -> PolicyRequest:
    """A prompt whose blocks are its own."""
    blocks = changes.pop("blocks", [1000 * (name + 1) + depth for depth in range(prompt_tokens // 16)])
    return PolicyRequest(name, 0.0, prompt_tokens, blocks, session, **changes)


def view(asked: PolicyRequest | None = None, *, rows: int = ROWS, **columns: Any) -> FleetView:
    """An idle fleet of equals, but for `columns`."""
    idle: dict[str, Any] = {
        "now_s": 0.0,
        "rng": Draws(),
        "gateways": 1,
        "block_size": 16,
        "keys": tuple(EndpointKey(f"10.0.0.{row}:8000") for row in range(rows)),
        "groups": ["gpu"] * rows,
        "weights": [1.0] * rows,
        "kv_tokens": [16_000] * rows,
        **{name: [0] * rows for name in ("requests", "prefilling", "prefill_tokens", "prompt_tokens")},
        **{name: [0] * rows for name in ("context_tokens", "waiting", "running", "matched_blocks")},
        "kv_usage": [0.0] * rows,
        "scraped_s": [0.0] * rows,
    }
    return FleetView(request=asked or request(), **{**idle, **columns})
