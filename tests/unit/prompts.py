"""Chat templates and the prompts that are made by them."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from extproc.rendering.loading import load
from extproc.rendering.prompt_text import (
    PromptText,
    Rendering,
)
from extproc.request.parse import parse

DATA = Path(__file__).parents[1] / "data" / "rendering"


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

NOW_UNIX_S = 1_782_777_600.0


@cache
def rendering(family: str = "chatml") -> Rendering:
    """One of the small tokenizers."""
    return load(DATA / family)


def prompt(path: str, using: Rendering | None = None, **body: Any) -> PromptText | None:
    """The prompt of a request; its body stays as it was."""
    request = parse(path, orjson.dumps({"model": "m", **body}))
    before = deepcopy(request.body)
    found = (using or rendering()).prompt_text(request, NOW_UNIX_S)
    assert request.body == before
    return found
