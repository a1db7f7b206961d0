"""Telling several parties of what happened, where the one that tells knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec

News = ParamSpec("News")
"""What is told with each call."""


class Listeners(Generic[News]):
    """Who is told of one kind of news.

    It exists before both whoever tells and whoever listens, and is given to both: neither has to be changed
    after it was made. Listeners are told in the order in which they were added; one that raises keeps the
    rest from being told, and the error is that of whoever tells.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[News, None]] = []

    def add(self, *listeners: Callable[News, None]) -> None:
        """Have these told from now on."""
        self._listeners.extend(listeners)

    def tell(self, *news: News.args, **named: News.kwargs) -> None:
        """Tell all of them."""
        for listener in self._listeners:
            listener(*news, **named)
