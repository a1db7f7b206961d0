"""Has kinds of cluster encoded by a process that ends when it has answered, so that its memory does as well.

Rules:
    1. One that was started ahead takes the next question; else one is started for it.
    2. Where a process fails, the kinds are encoded here.
    3. Imports little: the process is started before the rest of the gateway is imported.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Iterable
from typing import Final, Self

import msgspec

from extproc.server.process.modules import python_module
from extproc.xds.cluster_kinds import ClusterKind
from metadata_center import signals

_log = logging.getLogger("tokenway.cluster_encoder")

MAX_WAIT_S: Final = 10.0
"""Longest wait for an answer, which takes half a second of an idle processor."""


def encode_here(kind: ClusterKind) -> bytes:
    """The bytes of a kind, by importing what makes them."""
    # 10 MiB that a gateway whose kinds are known does without.
    from extproc.xds.cluster_encoding import encode

    return encode(kind)


def encode_all_here(kinds: Iterable[ClusterKind]) -> dict[ClusterKind, bytes]:
    """The bytes of each of these kinds, made in this process."""
    return {kind: encode_here(kind) for kind in kinds}


class ClusterEncoder:
    """Encodes elsewhere; as a context manager it starts a process ahead and ends it if it was not asked."""

    def __init__(self) -> None:
        self._ahead: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the process that will take the next question; it imports what it needs meanwhile."""
        with contextlib.suppress(OSError):  # `encode` says so, if it cannot have one either
            self._ahead = self._ahead or _process()
        return self

    def __exit__(self, *_: object) -> None:
        """`close`."""
        self.close()

    def encode(self, kinds: Iterable[ClusterKind]) -> dict[ClusterKind, bytes]:
        """The bytes of each of these kinds; blocks."""
        asked = list(kinds)
        process, self._ahead = self._ahead, None
        try:
            return dict(zip(asked, _answer(process or _process(), asked), strict=True))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            _log.warning("clusters are encoded here", extra={"cause": str(error)})
            return encode_all_here(asked)

    def close(self) -> None:
        """End the process that was started ahead, if it was not asked."""
        process, self._ahead = self._ahead, None
        if process is not None:
            _end(process)


def _process() -> subprocess.Popen[bytes]:
    with signals.kept_from_helper():
        return subprocess.Popen(  # noqa: S603 - our own module
            python_module("extproc.server.envoys.encoding_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )


def _answer(process: subprocess.Popen[bytes], kinds: list[ClusterKind]) -> list[bytes]:
    """Raises ValueError for an answer that is none, TimeoutExpired for one that does not come."""
    try:
        answer, _ = process.communicate(msgspec.json.encode(kinds), MAX_WAIT_S)
    finally:
        _end(process)
    return msgspec.json.decode(answer, type=list[bytes])


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:
        process.kill()
