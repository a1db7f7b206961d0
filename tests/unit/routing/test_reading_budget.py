"""Many bodies that are slow to read, one after another."""

from __future__ import annotations

from extproc.routing.reading_budget import ReadingBudget


def test_ordinary_bodies_never_spend_it() -> None:
    """A thousand of a millisecond each in a second."""
    budget = ReadingBudget()
    for number in range(1000):
        budget.spend(0.001, number / 1000)
    assert not budget.is_spent(1.0)


def test_a_burst_of_slow_bodies_spends_it_and_time_gives_it_back() -> None:
    """Six of 20 ms; a quarter of the time that passes is given back."""
    budget = ReadingBudget()
    spent = []
    for _ in range(6):
        spent.append(budget.is_spent(10.0))
        budget.spend(0.02, 10.0)
    assert spent == [False] * 6
    assert budget.is_spent(10.0)
    assert budget.is_spent(10.05)
    assert not budget.is_spent(10.09)
    budget.spend(0.02, 10.09)
    assert budget.is_spent(10.09)
    assert not budget.is_spent(1000.0)


def test_one_slow_body_is_no_burst() -> None:
    """As slow as one may be that is read here at all."""
    budget = ReadingBudget()
    budget.spend(0.05, 1.0)
    assert not budget.is_spent(1.0)


def test_processor_time_is_asked_for_while_bodies_are_slow() -> None:
    """Ordinary ones do not have it asked for."""
    budget = ReadingBudget()
    for number in range(100):  # each lost the processor for a moment
        budget.spend(0.004, number / 20)
    assert not budget.is_watched(5.0)
    budget.spend(0.05, 6.0)
    assert budget.is_watched(15.9)
    assert not budget.is_watched(16.1)
