"""Pauses of the machine that the system charges to the process that ran: on a virtual machine some are.

    python -m benchmarks.pauses [--seconds S]

Where the host lets a virtual processor wait and the guest is not told (`steal` stays as it is), the wait is
processor time of whoever had the processor. A loop that does nothing but read its own processor time finds
them: between two readings lies a microsecond, or a pause. `benchmarks.stalls` runs it beside what it
measures, at the lowest priority, so that turns of the event loop have something to be compared with. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

LEAST_S: Final = 0.005
"""What counts as a pause: what counts as a long turn of the event loop."""

BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05)
_LOWEST: Final = 19


def pauses(
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.thread_time,
) -> tuple[list[float], float]:
    """Pauses over `LEAST_S`, each in seconds, and the processor time that was looked at; blocks.

    Args:
        seconds: How long to look.
        clock: Seconds.
        cpu_clock: This thread's processor time, in seconds.
    """
    found_s: list[float] = []
    end_s = clock() + seconds
    first_s = before_s = cpu_clock()
    while clock() < end_s:
        now_s = cpu_clock()
        if now_s - before_s > LEAST_S:
            found_s.append(now_s - before_s)
        before_s = now_s
    return found_s, before_s - first_s


def figures(found_s: Sequence[float], cpu_s: float) -> dict[str, Any]:
    """How many pauses lasted longer than each bound, and the longest in ms.

    Args:
        found_s: Each, in seconds.
        cpu_s: Processor time that was looked at, in seconds.
    """
    counts = {
        f"over {bound_s * 1e3:g} ms": sum(each_s > bound_s for each_s in found_s) for bound_s in BOUNDS_S
    }
    return {"cpu_s": round(cpu_s, 1), **counts, "longest_ms": round(max(found_s, default=0.0) * 1e3, 1)}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # whoever started it may go before others
    os.nice(_LOWEST)
    print(json.dumps(figures(*pauses(options.seconds))))


if __name__ == "__main__":
    main()
