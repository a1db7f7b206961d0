"""How much of what costs us and brings nothing a peer may send: floods end the connection.

A budget is a bucket: full at the start, refilled with time, and by each call that was served to its end,
since busy peers rightly send more of everything. The bounds are far above what Envoy sends, and emptying a
bucket costs us some hundredths of a second of CPU.

Source: CVE-2023-44487 (resets), CVE-2025-8671 (resets that we are made to send), CVE-2019-9512 to 9518 (PING,
SETTINGS, PRIORITY and empty frames); Envoy bounds the same kinds (`Http2ProtocolOptions.max_*`).
"""

from __future__ import annotations

from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason


class Budget:
    """One kind of frame.

    Args:
        reason: What the fault is called when there is nothing left.
        burst: Frames allowed at once.
        per_s: Frames that come back each second.
        per_call: Frames that come back with each call that was served.
        now_s: When the connection began.
    """

    __slots__ = ("_at_s", "_burst", "_left", "_per_call", "_per_s", "_reason", "_served")

    def __init__(self, reason: FaultReason, burst: int, per_s: float, per_call: float, now_s: float) -> None:
        self._reason = reason
        self._burst = float(burst)
        self._left = float(burst)
        self._per_s = per_s
        self._per_call = per_call
        self._at_s = now_s
        self._served = 0

    def spend(self, now_s: float, served: int) -> None:
        """Take note of one frame.

        Args:
            now_s: By the clock of the connection's begin.
            served: Calls that the connection has served so far.

        Raises:
            ConnectionFault: It is one too many.
        """
        if self._left < 1.0:
            earned = (now_s - self._at_s) * self._per_s + (served - self._served) * self._per_call
            self._left = min(self._burst, self._left + earned)
            self._at_s, self._served = now_s, served
            if self._left < 1.0:
                raise ConnectionFault(
                    self._reason, ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring nothing"
                )
        self._left -= 1.0


class Budgets:
    """Those of one connection.

    Args:
        now_s: When it began.
    """

    __slots__ = ("empty", "late", "left", "pings", "resets", "settings", "windows")

    def __init__(self, now_s: float) -> None:
        self.resets = Budget(FaultReason.RESET_FLOOD, 5_000, 500.0, 1.0, now_s)
        """Streams that end before we have answered anything, by the peer's doing."""

        self.left = Budget(FaultReason.RESET_FLOOD, 20_000, 4_000.0, 1.0, now_s)
        """Streams that end in the middle: a proxy's clients leave while they send or wait, as they like.
        One of them is not to end all others' calls, and a thread of Envoy brings no more than this."""

        self.pings = Budget(FaultReason.PING_FLOOD, 1_000, 100.0, 1.0, now_s)
        self.settings = Budget(FaultReason.SETTINGS_FLOOD, 100, 1.0, 0.0, now_s)
        self.empty = Budget(FaultReason.EMPTY_FLOOD, 10_000, 1_000.0, 1.0, now_s)
        """DATA without content, PRIORITY, frames of unknown kinds."""

        self.windows = Budget(FaultReason.WINDOW_FLOOD, 20_000, 2_000.0, 10.0, now_s)
        self.late = Budget(FaultReason.LATE_FLOOD, 20_000, 2_000.0, 10.0, now_s)
        """Frames for streams that are over."""
