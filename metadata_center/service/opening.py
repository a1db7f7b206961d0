"""What is said where nothing can listen."""

from __future__ import annotations

import os


def not_opened(error: OSError, place: object) -> OSError:
    """What to raise where nothing can listen at `place`: the system's own words, with the place before them.

    Libraries leave the place out, or write it in words of theirs. What is no number of the system's, such as
    a name that nobody knows, is as it was.
    """
    if error.errno is None or error.errno <= 0:
        return error
    return OSError(error.errno, os.strerror(error.errno), str(place))
