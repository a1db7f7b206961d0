"""What is kept of decisions, and what is logged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from extproc.config.sections.fields import EnvironmentVariable, Section


class Explain(Section):
    """Decision records kept for `tokenway explain`."""

    ring_size: int = Field(default=2_000, ge=1, le=1_000_000)
    """Latest decisions kept per worker."""
    debug_token_env: EnvironmentVariable | None = None
    """Environment variable that holds the operator token for the debug header; unset turns it off."""


class Logging(Section):
    """Logs on standard error, one JSON object per line."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""
    requests: bool = True
    """One line per request."""
    prompt_blocks: bool = False
    """Add keyed hashes of the prompt's blocks to it, for `tokenway replay`; needs the key."""
    prompt_blocks_key_env: EnvironmentVariable = "TOKENWAY_LOG_KEY"
    """Environment variable with their key: a secret of 16 characters or more, the same for all gateways."""
