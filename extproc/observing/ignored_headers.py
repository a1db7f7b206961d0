"""Control headers that say nothing: each is counted, and who wrote them is told in the log.

Rules:
    1. A header, or an unknown name in one, is logged once in `QUIET_S`, and at most `MAX_NAMES` in that time:
       clients choose names.
    2. A value that is malformed is not logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from extproc.observing.recorder import Recorder
from extproc.values.control import Ignored

QUIET_S: Final = 60.0
MAX_NAMES: Final = 64

_log = logging.getLogger("tokenway.headers")


class IgnoredHeaders:
    """Reports them.

    Args:
        recorder: Counts.
        clock: Monotonic seconds.
    """

    def __init__(self, recorder: Recorder, clock: Callable[[], float]) -> None:
        self._recorder = recorder
        self._clock = clock
        self._quiet_until_s: dict[tuple[str, str], float] = {}

    def report(self, ignored: Iterable[Ignored]) -> None:
        """Those of one request."""
        for each in ignored:
            self._recorder.header_ignored(each.control, each.flaw)
            if self._is_news((each.header, each.unknown)):
                extra = {"sent_as": each.header, "reason": str(each.flaw)}
                if each.unknown:
                    extra["objective"] = each.unknown
                _log.warning("a request header says nothing", extra=extra)

    def _is_news(self, name: tuple[str, str]) -> bool:
        now_s, quiet = self._clock(), self._quiet_until_s
        if quiet.get(name, now_s) > now_s:
            return False
        if name not in quiet and len(quiet) >= MAX_NAMES:
            self._quiet_until_s = quiet = {old: until_s for old, until_s in quiet.items() if until_s > now_s}
            if len(quiet) >= MAX_NAMES:
                return False
        quiet[name] = now_s + QUIET_S
        return True
