"""The header blocks of a connection's calls, each understood once."""

from __future__ import annotations

from typing import Final

from extproc.transport.http2.headers import HeaderReader, HeadersTooLargeError
from extproc.transport.http2.requests import Opening, opening

_MAX_MEMO: Final = 256
_MAX_MEMO_BYTES: Final = 2_048
"""The memo holds so many blocks of at most so many bytes: half a megabyte a connection."""


class OpeningReader:
    """Those of one connection."""

    def __init__(self) -> None:
        self._headers = HeaderReader()
        self._memo: dict[bytes, Opening] = {}

    def table_is_gone(self) -> None:
        """The peer has acknowledged a dynamic table of size 0."""
        self._headers.table_is_gone()

    def read(self, block: bytes) -> Opening:
        """What a call asks for.

        Raises:
            ConnectionFault: The block cannot be decoded: neither can any later one.
            HeadersTooLargeError: It says more than we take.
            StreamFault: It is no request.
        """
        known = self._memo.get(block)
        if known is not None:
            return known
        asked = opening(self._headers.read(block))
        if self._headers.is_stateless and len(block) <= _MAX_MEMO_BYTES:
            if len(self._memo) >= _MAX_MEMO:
                del self._memo[next(iter(self._memo))]
            self._memo[block] = asked
        return asked

    def skip(self, block: bytes) -> None:
        """Decode trailers for the sake of the decoder's state.

        Raises:
            ConnectionFault: They cannot be decoded.
        """
        if not self._headers.is_stateless:
            try:
                self._headers.read(block)
            except HeadersTooLargeError:
                return
