"""Notifying several listeners of an event whose source knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec

News = ParamSpec("News")
"""The arguments of each call."""


class Listeners(Generic[News]):
    """The listeners to one kind of event.

    It exists before the source and the listeners, and is given to both: neither has to be changed
    after it was made. Listeners are called in the order in which they were added; one that raises keeps the
    rest from being called, and its error reaches the source.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[News, None]] = []

    def add(self, *listeners: Callable[News, None]) -> None:
        """Have these called from now on."""
        self._listeners.extend(listeners)

    def notify(self, *news: News.args, **named: News.kwargs) -> None:
        """Call all of them."""
        for listener in self._listeners:
            listener(*news, **named)
