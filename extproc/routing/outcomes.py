"""What became of a decided request: release, learn, record, log.

Rules:
    1. `ended` releases exactly once; whatever comes after finds nothing to release.
    2. Nothing is learned from a request that did not complete, nor from a reading that makes no sense.
    3. Evidence of health counts per request: what an endpoint fails at and another one answers speaks against
       the endpoint, what several fail at against the request, and once, however many attempts there were.
       Only a refused connection speaks at once: the request never arrived there.
    4. An engine that reports fewer cached tokens than believed has evicted: by LRU order all that is older
       than the missing blocks is gone as well.
    5. No answer has more tokens than its request and its engine allow, whatever it says (docs/adr/0018).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from extproc.accesslog.verdict import evidence_of
from extproc.choosing.foreseen import foreseen_tpot_s, foreseen_ttft_s
from extproc.choosing.learning import Answer
from extproc.health.failures import MAY_BE_POISON
from extproc.health.tracker import Transition
from extproc.routing.inflight import Inflight
from extproc.routing.state import State
from extproc.values.decisions import CacheView, DecisionRecord
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.evidence import Evidence, FailureKind, NoFailure
from extproc.values.outcomes import Ended, Outcome
from metadata_center.types import EndpointKey, RequestId, value

CACHED_TOLERANCE_TOKENS = 128
"""Believed and reported cached tokens may differ by one block of each side: 512 bytes of ours are about 128
tokens, vLLM's largest usual block is 128 (its CPU default)."""


MAX_UNSETTLED = 1024
"""Ended requests whose failed attempts are still to be told; the two come within `buffer_flush_interval`
(10 ms) of each other, so this is enough for 100,000 fallbacks a second."""


_ABOUT_WHAT_IS_NAMED = frozenset((FailureKind.REFUSED, FailureKind.MISSING_MODEL))
"""Failures that a stored response may be the cause of: it is not there, or does not go with the rest."""

MAX_ANSWER_TOKENS = 1 << 20
"""Of one request, whose bounds are not known: ten times what the models of today write at most."""

PROMPT_SLACK_TOKENS = 1 << 16
"""What a prompt has beyond one token for each of its bytes: a template's own text, and pictures."""


def possible(entry: RequestEnd, inflight: Inflight, kv_tokens: int) -> RequestEnd:
    """The entry with no count above what the request and the engine allow.

    Args:
        entry: The end of `inflight`.
        inflight: What is remembered of it.
        kv_tokens: Size of the endpoint's KV cache, 0 if it is not known; it holds prompt and answer at once.
    """
    prompt, completion, cached = entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens
    room = kv_tokens or MAX_ANSWER_TOKENS
    if prompt is not None:
        record = inflight.record
        prompt = min(
            prompt, max(record.prompt_bytes, record.prompt_tokens) + max(PROMPT_SLACK_TOKENS, kv_tokens)
        )
    if completion is not None:
        completion = min(completion, room, inflight.max_output_tokens or room)
    if cached is not None and prompt is not None:
        cached = min(cached, prompt)
    if (prompt, completion, cached) == (entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens):
        return entry
    return replace(entry, prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A request that ended before all its failed attempts were told.

    Attributes:
        inflight: What was remembered of it.
        verdict: Of its end.
        known: Failures that are told.
        missing: Endpoints whose failures are not.
    """

    inflight: Inflight
    verdict: Evidence
    known: dict[EndpointKey, FailureKind]
    missing: set[EndpointKey]


@value
class Ending:
    """One finished request, for whoever reports it.

    Attributes:
        record: Its decision.
        outcome: Its end.
        blocks: Hashes of its prompt's blocks; empty if it was refused.
    """

    record: DecisionRecord
    outcome: Outcome
    blocks: Sequence[int] = ()


class Outcomes:
    """Takes access-log entries of requests this worker decided.

    Args:
        state: Books of this worker.
        on_transition: Told when an endpoint's health changed.
        on_end: Told of each finished request.
    """

    def __init__(
        self,
        state: State,
        on_transition: Callable[[Transition], None],
        on_end: Callable[[Ending], None],
    ) -> None:
        self._state = state
        self._on_transition = on_transition
        self._on_end = on_end
        self._unsettled: OrderedDict[RequestId, _Unsettled] = OrderedDict()

    def take(self, entry: RequestEvent, now_s: float) -> None:
        """Apply one entry."""
        match entry:
            case RequestEnd():
                self._ended(entry, now_s)
            case AttemptStarted():
                self._moved(entry, now_s)
            case AttemptFailed():
                self._attempt_failed(entry, now_s)
            case RequestAlive():
                self._state.load.refresh(entry.request_id, now_s)

    def _moved(self, entry: AttemptStarted, now_s: float) -> None:
        inflight = self._state.inflight.get(entry.request_id)
        if inflight is not None and inflight.endpoint != entry.endpoint:
            self._state.load.move(entry.request_id, entry.endpoint, now_s)
            self._state.move(inflight, entry.endpoint)
            self._state.freed()

    def _ended(self, entry: RequestEnd, now_s: float) -> None:
        state = self._state
        state.load.release(entry.request_id, now_s)
        inflight = state.inflight.get(entry.request_id)
        if inflight is None:
            if entry.owner is not None:
                state.metrics.access_log_unmatched()
            return
        record = inflight.record
        verdict = evidence_of(
            status=entry.status,
            ended=entry.ended,
            flags=entry.flags,
            error=entry.error,
            content_type=entry.content_type,
            is_stream=record.stream,
            response_bytes=entry.response_bytes,
            attempts=entry.attempts,
        )
        if entry.ended is Ended.COMPLETED and entry.status < 300 and isinstance(verdict, FailureKind):
            entry = replace(entry, ended=Ended.UPSTREAM_ERROR)
        completed = verdict is NoFailure.ANSWERED and entry.status == 200
        state.finish(entry.request_id, now_s, completed=completed)
        if entry.endpoint is not None:
            if entry.endpoint != record.chosen:
                state.metrics.fell_back(record.cluster or "")
            inflight.endpoint = entry.endpoint
        endpoint = inflight.endpoint
        if inflight.response is not None:
            state.settle(inflight.response, endpoint, now_s)
        entry = possible(entry, inflight, state.engines.kv_tokens.get(endpoint, 0))
        if completed:
            if inflight.conversation is not None:
                state.settle(inflight.conversation, endpoint, now_s)
            state.record_cached(inflight)
        self._judge(entry, inflight, verdict, now_s)
        ttft_s = self._ttft_s(inflight, entry) if record.stream and completed else None
        outcome = self._outcome(inflight, entry, endpoint, ttft_s)
        if completed:
            if entry.prompt_tokens is None and entry.completion_tokens is None:
                state.metrics.usage_unknown(record.model, entry.usage_unseen or "absent")
            state.endpoints[endpoint].answered(ttft_s)
            self._learn(inflight, entry, outcome, now_s)
        state.records.attach(entry.request_id, outcome)
        state.metrics.observe_end(inflight.operation, record.model, outcome, record.held_s)
        self._on_end(Ending(record, outcome, inflight.blocks))

    def _outcome(
        self, inflight: Inflight, entry: RequestEnd, endpoint: EndpointKey, ttft_s: float | None
    ) -> Outcome:
        record = inflight.record
        row = record.row(endpoint)
        predicted_ttft_s = predicted_cached = None
        if row is not None:
            predicted_ttft_s = foreseen_ttft_s(record, row)
            predicted_cached = record.cached_tokens[row]
        return Outcome(
            ended=entry.ended,
            duration_s=entry.duration_s,
            endpoint=endpoint if entry.attempts else None,
            attempts=entry.attempts,
            status=entry.status or None,
            ttft_s=ttft_s,
            prompt_tokens=entry.prompt_tokens,
            completion_tokens=entry.completion_tokens,
            cached_tokens=entry.cached_tokens,
            request_bytes=entry.request_bytes,
            response_bytes=entry.response_bytes,
            predicted_ttft_s=predicted_ttft_s,
            predicted_cached_tokens=predicted_cached,
            response_flags=entry.flags,
            details=entry.details,
        )

    @staticmethod
    def _ttft_s(inflight: Inflight, entry: RequestEnd) -> float | None:
        """From sending to the engine to its first token: as Envoy saw it, unless other bytes came first."""
        if inflight.first_byte_is_token or inflight.first_token_s is None:
            return entry.ttft_s
        return inflight.first_token_s - inflight.decided_s

    def _learn(self, inflight: Inflight, entry: RequestEnd, outcome: Outcome, now_s: float) -> None:
        state, record = self._state, inflight.record
        predictor = state.predictor
        if entry.prompt_tokens and record.prompt_bytes:
            predictor.observe_usage(record.model, record.prompt_bytes, entry.prompt_tokens, inflight.endpoint)
        self._correct_cache(inflight, entry, outcome)
        row, snapshot = record.row(inflight.endpoint), record.snapshot
        if entry.completion_tokens:
            predictor.traffic((record.model, inflight.group)).answered(
                inflight.endpoint, entry.completion_tokens
            )
        if row is None or snapshot is None or entry.attempts != 1 or not record.stream:
            return
        state.learner.learn(
            Answer(
                inflight.key(row),
                snapshot,
                row,
                entry.prompt_tokens,
                entry.cached_tokens,
                entry.completion_tokens,
                outcome.ttft_s,
                entry.stream_s,
                outcome.predicted_ttft_s,
                foreseen_tpot_s(record, row),
            ),
            now_s,
            is_first_learned=inflight.is_learned,
        )

    def _correct_cache(self, inflight: Inflight, entry: RequestEnd, outcome: Outcome) -> None:
        record, row = inflight.record, inflight.record.row(inflight.endpoint)
        believed, reported = outcome.predicted_cached_tokens, entry.cached_tokens
        if row is None or believed is None or reported is None or not inflight.prior_use:
            return
        if record.views[row] != CacheView.HISTORY:
            return
        if entry.prompt_tokens:  # what was believed in estimated tokens, in those the engine counts
            believed = believed * entry.prompt_tokens // record.prompt_tokens
        if believed - reported > CACHED_TOLERANCE_TOKENS:
            self._state.caches.history.forget_older(inflight.endpoint, inflight.prior_use)

    # Evidence of health.

    def _attempt_failed(self, entry: AttemptFailed, now_s: float) -> None:
        state, endpoint, kind = self._state, entry.endpoint, entry.kind
        inflight = state.inflight.get(entry.request_id)
        if kind is FailureKind.CONNECT_FAILURE:
            self._count(endpoint, kind)
            model = "" if inflight is None else inflight.served_model
            self._transitions(state.health.attempt_failed(endpoint, kind, now_s, model))
        if inflight is not None:
            if inflight.failed is None:
                inflight.failed = {}
            inflight.failed[endpoint] = kind
            return
        unsettled = self._unsettled.get(entry.request_id)
        if unsettled is not None and endpoint in unsettled.missing:
            unsettled.missing.remove(endpoint)
            unsettled.known[endpoint] = kind
            if not unsettled.missing:
                del self._unsettled[entry.request_id]
                self._settle(unsettled.inflight, unsettled.verdict, unsettled.known, now_s)

    def _judge(self, entry: RequestEnd, inflight: Inflight, verdict: Evidence, now_s: float) -> None:
        """Say who failed, now or when all is known."""
        if entry.attempts <= 1:
            known = {inflight.endpoint: verdict} if isinstance(verdict, FailureKind) else {}
            self._settle(inflight, verdict, known, now_s)
            return
        known = dict(inflight.failed or {})
        known.pop(inflight.endpoint, None)
        record = inflight.record
        missing: set[EndpointKey] = set()
        if record.choice is not None and record.snapshot is not None and record.placed is None:
            tried = record.choice.order[: entry.attempts - 1]
            missing = {record.snapshot.keys[row] for row in tried} - known.keys() - {inflight.endpoint}
        if isinstance(verdict, FailureKind):
            known[inflight.endpoint] = verdict
        if not missing:
            self._settle(inflight, verdict, known, now_s)
            return
        if len(self._unsettled) >= MAX_UNSETTLED:
            self._unsettled.popitem(last=False)
        self._unsettled[entry.request_id] = _Unsettled(inflight, verdict, known, missing)

    def _settle(
        self, inflight: Inflight, verdict: Evidence, failed: Mapping[EndpointKey, FailureKind], now_s: float
    ) -> None:
        """One request's evidence.

        Args:
            inflight: What was remembered of the request.
            verdict: Of its last attempt, at `inflight.endpoint`.
            failed: All endpoints that failed at it, and how.
            now_s: The time.
        """
        state, model, fingerprint = self._state, inflight.served_model, inflight.fingerprint
        health, endpoint = state.health, inflight.endpoint
        if verdict is NoFailure.ANSWERED:
            if failed or len(state.poison):
                # Who failed at what another one answers is to blame, now or for an earlier time.
                blamed = {**state.poison.answered(fingerprint, now_s), **failed}
                for key in blamed.keys() - failed.keys() - {endpoint}:
                    self._transitions(health.attempt_failed(key, blamed[key], now_s, model))
            self._transitions(health.attempt_succeeded(endpoint, now_s, model))
        elif verdict is NoFailure.UNKNOWN and inflight.first_token_s is None:
            health.undecided(endpoint, model, now_s)
            return  # nobody knows whether another one would have answered what these failed at
        counting = {key: kind for key, kind in failed.items() if kind is not FailureKind.CONNECT_FAILURE}
        for key, kind in counting.items():
            self._count(key, kind)
        if isinstance(verdict, FailureKind):
            self._failed_for_good(inflight, counting, now_s)
            return
        for key, kind in counting.items():
            self._transitions(health.attempt_failed(key, kind, now_s, model))

    def _failed_for_good(
        self, inflight: Inflight, failed: Mapping[EndpointKey, FailureKind], now_s: float
    ) -> None:
        """A request whose client got a failure; `failed` are the endpoints that it reached."""
        state, model = self._state, inflight.served_model
        health = state.health
        is_pinned = inflight.record.holder is not None
        if inflight.builds_on and (is_pinned or _ABOUT_WHAT_IS_NAMED.issuperset(failed.values())):
            # Clients can name any response, and by one that is theirs they choose the endpoint: no peer is
            # asked the same, so this tells nothing that other requests do not tell better.
            for key in failed:
                health.undecided(key, model, now_s)
            return
        suspicious = {key: kind for key, kind in failed.items() if kind in MAY_BE_POISON}
        if suspicious:
            excused = state.poison.failed(inflight.fingerprint, suspicious, now_s)
            if excused is not None:
                state.metrics.poison()
                for key, kind in excused.items():
                    health.retract(key, kind, now_s, model)
        else:
            excused = None
        if excused is not None or len(failed) > 1:
            for key in failed:
                health.undecided(key, model, now_s)
            return
        for key, kind in failed.items():
            self._transitions(health.attempt_failed(key, kind, now_s, model))

    def _count(self, endpoint: EndpointKey, kind: FailureKind) -> None:
        self._state.endpoints[endpoint].failures += 1
        self._state.metrics.endpoint_failed(endpoint, kind)

    def _transitions(self, transitions: Iterable[Transition]) -> None:
        for transition in transitions:
            self._on_transition(transition)
