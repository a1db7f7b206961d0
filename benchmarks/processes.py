"""Child processes of a benchmark: starting them, waiting, and what they used according to Linux's /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
POLL_S = 0.05
"""Between two looks at a condition: short beside the start of a Python process or of Envoy."""

_REAL_TIME = 10
"""Any priority of the real-time class goes before all that is not in it."""


def cpu_name() -> str:
    """What the processor calls itself, or else its kind, for the figures of a machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """What a benchmark runs on, for its report; the load is that of now."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, all threads, in seconds.

    Raises:
        FileNotFoundError: It is gone.
    """
    return cpu_ticks(Path(f"/proc/{pid}/stat").read_text()) / TICKS_PER_S


def scheduled_s(pid: int) -> float:
    """Time that the scheduler gave to all threads of a process so far, in seconds: to the nanosecond.

    Source: Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat".

    Raises:
        FileNotFoundError: It is gone.
    """
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def cpu_ticks(stat: str) -> int:
    """User + system time in clock ticks, from the text of /proc/<pid>/stat.

    Source: proc_pid_stat(5), fields 14 (utime) and 15 (stime), counted from behind the name, which
    may hold anything.
    """
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def rss_mib(pid: int) -> float:
    """Resident memory of a process in MiB.

    Raises:
        FileNotFoundError: It is gone.
    """
    return resident_kib(Path(f"/proc/{pid}/status").read_text()) / 1024


def resident_kib(status: str) -> int:
    """VmRSS in KiB, from the text of /proc/<pid>/status.

    Raises:
        ValueError: There is none: a kernel thread, or a process that has ended but is not yet reaped.
    """
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise ValueError("no VmRSS")


def tree(pid: int) -> list[int]:
    """A process and all that it started, and they in turn; those that are there now."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread has ended
                found.extend(int(child) for child in children.read_text().split())
    return found


def on_cpu_s(pids: Iterable[int]) -> float:
    """Time that processes and their children have been on a processor, in seconds, to the nanosecond.

    Clock ticks are too coarse for phases of a second. What a thread took that has ended is not in it.
    Source: Linux, Documentation/scheduler/sched-stats.rst, `/proc/<pid>/schedstat`, first field.
    """
    return sum(
        int(thread.split()[0]) / 1e9 for pid in pids for each in tree(pid) for thread in _schedstats(each)
    )


def _schedstats(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            yield path.read_text()


def tree_rss_mib(pids: Iterable[int]) -> float:
    """Resident memory of processes and their children in MiB; a page that several have counts for each."""
    return sum(rss_mib(each) for pid in pids for each in tree(pid))


@contextlib.contextmanager
def running(*command: str, folder: Path | None = None) -> Iterator[int]:
    """A silent child process, in `folder` or here, killed at the end; yields its pid."""
    process = subprocess.Popen(  # noqa: S603 - the benchmarks' own commands
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def go_first() -> None:
    """Have this process, and all that it starts from now on, go before all others of the machine.

    Raises:
        PermissionError: It may not.
    """
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_REAL_TIME))


async def until(ready: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 60.0) -> None:
    """Wait for a condition; one that cannot be looked at yet (no connection, half an answer) is not met.

    Raises:
        TimeoutError: `what` did not come about in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, ValueError, EOFError):
            if await ready():
                return
        await asyncio.sleep(POLL_S)
    raise TimeoutError(what)
