"""Rivals on live traffic: what they see, what they learn, and what is forgotten."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from extproc.choosing.rivals.registry import RIVALS, make
from extproc.choosing.snapshots import Load, Prompt
from extproc.choosing.stateful import Decision, FleetView, Hold, Sent, StatefulPolicy
from extproc.routing import rivals as live
from extproc.routing.engines import Engines
from extproc.routing.rivals import Contender, Picked, Rivals
from extproc.values.decisions import DecisionRecord
from extproc.values.endings import Ending
from extproc.values.evidence import FailureKind, NoFailure
from extproc.values.outcomes import Ended, Outcome
from metadata_center.types import EndpointKey, RequestId

KEYS = (EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000"))
ONE = RequestId("one")


class Noting(StatefulPolicy):
    """Sends everything to the last row, and notes its views and notifications."""

    answer: Decision | None = None

    def __init__(self) -> None:
        self.views: list[FleetView] = []
        self.notified: list[tuple[Any, ...]] = []

    def choose(self, view: FleetView) -> Decision:
        """See `StatefulPolicy`."""
        self.views.append(view)
        return len(view.keys) - 1 if self.answer is None else self.answer

    def on_sent(self, sent: Sent) -> None:
        """See `StatefulPolicy`."""
        self.notified.append(("sent", sent.row))

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """See `StatefulPolicy`."""
        self.notified.append(("first", now_s))

    def on_usage(self, sent: Sent, prompt_tokens: int, cached_tokens: int) -> None:
        """See `StatefulPolicy`."""
        self.notified.append(("usage", prompt_tokens, cached_tokens))

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """See `StatefulPolicy`."""
        self.notified.append(("end", now_s, output_tokens))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Noting]:
    """Every policy that was made."""
    found: list[Noting] = []

    def make_one(rule: str) -> Noting:
        found.append(Noting())
        return found[-1]

    monkeypatch.setattr(live, "make", make_one)
    return found


def choose(rivals: Rivals, keys: tuple[EndpointKey, ...] = KEYS, rule: str = "lmetric") -> Picked | None:
    """One request of 1,000 tokens in two blocks, of which the second endpoint has one."""
    rows = len(keys)
    return rivals.choose(
        rule,
        Contender(5.0, [11, 12], Prompt(1000, [0, 512][:rows], [0, 1][:rows], 2), slo_ttft_s=3.0),
        keys,
        [1.0, 2.0][:rows],
        ["h100"],
        Load([2, 1][:rows], [1, 0][:rows], [600, 0][:rows], [2000, 900][:rows]),
        Random(1),
        6.0,
    )


def ending(evidence: Any = NoFailure.ANSWERED, status: int = 200) -> Ending:
    """The end of request `one`, 100 tokens of its 1,000 cached."""
    return Ending(
        DecisionRecord(request_id=ONE, time_unix_s=0.0, data_age_s={}),
        Outcome(
            ended=Ended.COMPLETED,
            duration_s=1.0,
            endpoint=KEYS[1],
            attempts=1,
            status=status,
            prompt_tokens=1000,
            completion_tokens=40,
            cached_tokens=100,
        ),
        now_s=9.0,
        evidence=evidence,
    )


def test_a_rival_sees_what_its_own_gateway_would(made: list[Noting]) -> None:
    """Load, caches in blocks, the engines' own metrics, and nothing of the product's predictions."""
    engines = Engines()
    engines.observe_kv_tokens(KEYS[0], 40_000)
    engines.observe_occupancy(KEYS[1], running=3, waiting=2, kv_usage_ratio=0.5)
    picked = choose(Rivals(engines, lambda _: [4.5, 0.0], lambda: 3))
    assert picked is not None
    assert picked.row == 1
    (view,) = made[0].views
    assert (view.now_s, view.gateways, view.block_size) == (6.0, 3, 500)
    assert (view.request.arrived_s, view.request.blocks, view.request.slo_ttft_s) == (5.0, [11, 12], 3.0)
    assert (view.keys, view.weights, view.groups) == (KEYS, [1.0, 2.0], ["h100", "h100"])
    assert (view.kv_tokens, view.matched_blocks) == ([40_000, 0], [0, 1])
    assert (view.requests, view.prefilling, view.context_tokens) == ([2, 1], [1, 0], [2000, 900])
    assert view.prompt_tokens == [1000, 0]  # a half of what is in flight there prefills
    assert (view.running, view.waiting, view.kv_usage) == ([0, 3], [0, 2], [0.0, 0.5])
    assert view.scraped_s[0] != view.scraped_s[1]
    assert view.since_s == [4.5, 6.0]


def test_it_is_notified_of_each_request_once(made: list[Noting]) -> None:
    """Sent, first token, usage, end; afterwards nothing is left of the request."""
    rivals = Rivals(Engines(), lambda keys: [0.0] * len(keys), lambda: 1)
    picked = choose(rivals)
    assert picked is not None
    rivals.sent(ONE, picked)
    rivals.first_token(ONE, 7.0)
    rivals.first_token(RequestId("another"), 7.0)
    assert len(rivals) == 1
    rivals.ended(ending())
    rivals.ended(ending())
    assert made[0].notified == [("sent", 1), ("first", 7.0), ("usage", 1000, 100), ("end", 9.0, 40)]
    assert len(rivals) == 0


@pytest.mark.parametrize("bad", [{"evidence": FailureKind.SERVER_ERROR}, {"status": 400}])
def test_what_failed_has_no_output(made: list[Noting], bad: dict[str, Any]) -> None:
    """As in the replayer: 0 tokens, and no usage."""
    rivals = Rivals(Engines(), lambda keys: [0.0] * len(keys), lambda: 1)
    picked = choose(rivals)
    assert picked is not None
    rivals.sent(ONE, picked)
    rivals.ended(ending(**bad))
    assert made[0].notified == [("sent", 1), ("end", 9.0, 0)]


def test_rows_never_change_under_it(made: list[Noting]) -> None:
    """Each rule and set of endpoints has an object of its own, and there is a bound."""
    rivals = Rivals(Engines(), lambda keys: [0.0] * len(keys), lambda: 1)
    for _ in range(2):
        choose(rivals)
        choose(rivals, KEYS[:1])
        choose(rivals, rule="smetric")
    assert [len(each.views) for each in made] == [2, 2, 2]
    for number in range(live.MAX_POLICIES):
        choose(rivals, rule=f"rule {number}")
    choose(rivals)
    assert len(made[-1].views) == 1
    assert len(rivals._policies) == live.MAX_POLICIES


def test_one_that_would_wait_leaves_the_choice_to_us(
    made: list[Noting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits here on a rival's behalf."""
    monkeypatch.setattr(Noting, "answer", Hold(7.0))
    assert choose(Rivals(Engines(), lambda keys: [0.0] * len(keys), lambda: 1)) is None


@pytest.mark.parametrize("rule", RIVALS)
def test_every_rival_can_decide_live(rule: str) -> None:
    """With what a gateway has: each chooses a row, and takes its notifications."""
    rivals = Rivals(Engines(), lambda keys: [0.0] * len(keys), lambda: 1)
    seen: set[int] = set()
    for number in range(40):
        picked = choose(rivals, rule=rule)
        assert picked is not None
        seen.add(picked.row)
        request_id = RequestId(f"request {number}")
        rivals.sent(request_id, picked)
        rivals.first_token(request_id, 7.0)
    assert seen <= {0, 1}
    assert len(rivals) == 40


def test_parameters_of_a_rule_are_checked() -> None:
    """When it is made, which is when the configuration is read."""
    with pytest.raises(ValueError, match="no policy is called"):
        make("unknown")
    assert type(make("dynamo_linear")).__name__ == "DynamoLinear"
