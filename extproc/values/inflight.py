"""What is remembered of a request from its decision to its end."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from extproc.values.decisions import DecisionRecord
from extproc.values.evidence import FailureKind
from extproc.values.requests import Operation
from metadata_center.history.radix_tree import Run
from metadata_center.types import EndpointKey


class Inflight:
    """One decided request; changed by its ledger, and by what learns from it while it runs.

    Attributes:
        record: Its decision record.
        operation: Which API.
        endpoint: Which endpoint serves it now, as far as known: the choice, or a fallback.
        blocks: Block hashes of its prompt.
        group: Its route's endpoint group.
        groups: Groups of its candidates that perform alike: one for all, or one per row of its record.
        decided_s: Monotonic time of the decision.
        first_token_s: Monotonic time of the first token, or None.
        first_byte_is_token: False if bytes that are no token (keep-alive comments) came first.
        is_learned: Its first token was learned from when it came.
        running: By what its blocks are counted as running at `endpoint`; None if they are not.
        response: Key of the response it is answered with, see `extproc.request.responses`; None until seen.
        conversation: Likewise of the conversation it belongs to, or None.
        max_output_tokens: Most tokens that its answer may have by its own words, or None.
        prior_use: Use sequence of the last matched block before this request touched it; None until recorded.
        served_model: The model's name at the engine, and the operation if it is none that generates.
        fingerprint: Of its body.
        foreseen: Candidate row, and the time to its first token that the decision expected there, in seconds;
            None where no other than the record can say.
        prefill_s: What its endpoint was foreseen to prefill for each first token that this process sees;
            infinite if nothing was.
        tried_once: It has no fallbacks, for it is known as poison.
        choices: Sequences that are generated for it.
        builds_on: It names a stored response or a conversation: a 404 may be about that.
        failed: Endpoints at which attempts failed, and how; None while there is none.
    """

    __slots__ = (
        "blocks",
        "builds_on",
        "choices",
        "conversation",
        "decided_s",
        "endpoint",
        "failed",
        "fingerprint",
        "first_byte_is_token",
        "first_token_s",
        "foreseen",
        "group",
        "groups",
        "is_learned",
        "max_output_tokens",
        "operation",
        "prefill_s",
        "prior_use",
        "record",
        "response",
        "running",
        "served_model",
        "tried_once",
    )

    def __init__(
        self,
        record: DecisionRecord,
        operation: Operation,
        endpoint: EndpointKey,
        blocks: Sequence[int],
        group: str,
        groups: tuple[str, ...],
        decided_s: float,
        max_output_tokens: int | None = None,
        served_model: str = "",
        fingerprint: int = 0,
        foreseen: tuple[int, float] | None = None,
        *,
        prefill_s: float = inf,
        tried_once: bool = False,
        builds_on: bool = False,
        choices: int = 1,
    ) -> None:
        self.record = record
        self.operation = operation
        self.endpoint = endpoint
        self.blocks = blocks
        self.group = group
        self.groups = groups
        self.decided_s = decided_s
        self.max_output_tokens = max_output_tokens
        self.prefill_s = prefill_s
        self.first_token_s: float | None = None
        self.first_byte_is_token = True
        self.is_learned = False
        self.running: Run | None = None
        self.prior_use: int | None = None
        self.response: int | None = None
        self.conversation: int | None = None
        self.served_model = served_model
        self.fingerprint = fingerprint
        self.foreseen = foreseen
        self.tried_once = tried_once
        self.builds_on = builds_on
        self.choices = choices
        self.failed: dict[EndpointKey, FailureKind] | None = None

    def key(self, row: int) -> tuple[str, str]:
        """Key of the latency models of a candidate: (model, endpoint group)."""
        return self.record.model, self.groups[row if len(self.groups) > 1 else 0]
