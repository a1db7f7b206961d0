"""Prompt tokens from prompt bytes, learned from the usage that engines report.

Rules:
    1. The ratio is of decayed sums, not a mean of ratios: long prompts, whose estimate matters, weigh more.
    2. It stays within [1/64, 1] whatever is reported.
    3. No prompt weighs more than `MOST_WEIGHT` times the mean one: a single prompt of megabytes of blanks
       would else be the estimate of everybody's prompts for hundreds of requests.
"""

from __future__ import annotations

from math import ceil

_PRIOR_RATIO = 0.25
"""Four bytes per token: English text under current byte-pair vocabularies."""

_PRIOR_BYTES = 1024.0
"""The prior weighs as much as one short prompt: the first real one outweighs it."""

LEAST_RATIO = 1.0 / 64.0
"""64 bytes per token, beyond any text: the prompt was mostly whitespace or was cut by the engine."""

MOST_RATIO = 1.0
"""One token per byte: byte fallback. More is reported for media, which hashes stand for in the bytes; those
must not teach that text is dear."""

_DECAY = 0.99
"""Memory of 100 requests: a changed chat template or clientele is learned within seconds to minutes."""

MOST_WEIGHT = 16.0
"""Public traces have a longest prompt of about ten times the mean; so the heaviest is a seventh of all."""

_KNOWN = 8.0
"""Requests after which there is a mean: the first ones are believed whatever they weigh."""


class TokensPerByte:
    """The ratio of one model's prompt tokens to prompt bytes."""

    __slots__ = ("_bytes", "_count", "_tokens")

    def __init__(self) -> None:
        self._count = 1.0
        self._bytes = _PRIOR_BYTES
        self._tokens = _PRIOR_BYTES * _PRIOR_RATIO

    @property
    def ratio(self) -> float:
        """Tokens per byte, in [1/64, 1]."""
        ratio = self._tokens / self._bytes
        return LEAST_RATIO if ratio < LEAST_RATIO else MOST_RATIO if ratio > MOST_RATIO else ratio

    def estimate(self, prompt_bytes: int) -> int:
        """Return the expected tokens of a prompt, rounded up: 0 only for an empty one."""
        return ceil(prompt_bytes * self.ratio)

    def learn(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """Learn from one request's reported usage.

        Args:
            prompt_bytes: Length of the canonical prompt, > 0.
            prompt_tokens: The engine's count for it, > 0; counted as within the ratio's bounds.

        Raises:
            ValueError: A count is not > 0. The ratio is unchanged.
        """
        if prompt_bytes <= 0 or prompt_tokens <= 0:
            raise ValueError("prompt_bytes and prompt_tokens must be > 0")
        tokens, weight = float(prompt_tokens), 1.0
        if self._count >= _KNOWN:
            weight = min(1.0, MOST_WEIGHT * self._bytes / (self._count * prompt_bytes))
        if not prompt_bytes * LEAST_RATIO <= tokens <= prompt_bytes * MOST_RATIO:
            tokens = prompt_bytes * (MOST_RATIO if tokens > prompt_bytes else LEAST_RATIO)
        self._count = self._count * _DECAY + 1.0
        self._bytes = self._bytes * _DECAY + prompt_bytes * weight
        self._tokens = self._tokens * _DECAY + tokens * weight
