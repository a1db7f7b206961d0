"""What is pending ends once, for one listener, whichever end is first."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from extproc.errors import Reason, RouterError
from extproc.values.deciding import Deciding, Later, Now, Refusal, settle
from extproc.values.pending import Pending

ERROR = RouterError(Reason.NO_HEALTHY_ENDPOINT, "None.")

STEPS: dict[str, Callable[[Pending[int | None]], None]] = {
    "give": lambda pending: pending.give(1),
    "give none": lambda pending: pending.give(None),
    "fail": lambda pending: pending.fail(ERROR),
    "cancel": lambda pending: pending.cancel(),
}
PASSED_ON = {"give": [1], "give none": [None], "fail": [ERROR], "cancel": []}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(STEPS, STEPS)))
@pytest.mark.parametrize("listens_at", [0, 1, 2])
def test_the_first_end_is_passed_on_once(first: str, second: str, listens_at: int) -> None:
    """Whenever the listener comes, and whatever is done to it afterwards."""
    cancelled: list[str] = []
    passed_on: list[object] = []
    pending: Pending[int | None] = Pending(lambda: cancelled.append("x"))
    for number, step in enumerate([*(STEPS[name] for name in (first, second)), None]):
        if number == listens_at:
            pending.then(passed_on.append, passed_on.append)
        if step is not None:
            step(pending)
    assert pending.is_over
    assert passed_on == PASSED_ON[first]
    assert cancelled == (["x"] if first == "cancel" else [])


@pytest.mark.parametrize("end", STEPS)
@pytest.mark.parametrize("is_early", [False, True])
def test_one_follows_another(end: str, is_early: bool) -> None:
    """It becomes what the other becomes, also if that is over already."""
    passed_on: list[object] = []
    one: Pending[int | None] = Pending()
    other: Pending[int | None] = Pending()
    one.then(passed_on.append, passed_on.append)
    if is_early:
        STEPS[end](other)
    one.follow(other)
    STEPS[end](other)
    assert passed_on == PASSED_ON[end]


def test_cancelling_goes_through() -> None:
    """To what works at it now, and to what works at it later."""
    reached: list[str] = []
    one: Pending[int] = Pending(lambda: reached.append("first"))
    one.follow(Pending(lambda: reached.append("second")))
    one.cancel()
    one.follow(Pending(lambda: reached.append("third")))
    assert reached == ["second", "third"]


@pytest.mark.parametrize("end", STEPS)
@pytest.mark.parametrize("ends_at", [0, 1, 2])
def test_a_second_listener_is_a_fault(end: str, ends_at: int) -> None:
    """It would wait for ever for what the first one was given."""
    pending: Pending[int | None] = Pending()
    if ends_at == 0:
        STEPS[end](pending)
    pending.then(lambda _: None, lambda _: None)
    if ends_at == 1:
        STEPS[end](pending)
    with pytest.raises(RuntimeError, match="one listener"):
        pending.then(lambda _: None, lambda _: None)


@pytest.mark.parametrize(
    ("deciding", "passed_on"), [(Now(7), [7]), (Refusal(ERROR), [ERROR]), (Later(Pending(), 1.0), [])]
)
def test_a_step_settles_what_was_promised(deciding: Deciding[int], passed_on: list[object]) -> None:
    """Now and no end it; later goes on."""
    heard: list[object] = []
    pending: Pending[int] = Pending()
    pending.then(heard.append, heard.append)
    settle(pending, deciding)
    assert heard == passed_on
    assert pending.is_over is bool(passed_on)
