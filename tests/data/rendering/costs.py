"""What a prompt's text costs on the request path, against tokenizing it.

`python tests/data/rendering/costs.py [FOLDER]`; without a tokenizer folder, the small ChatML tokenizer.
"""

from __future__ import annotations

import platform
import sys
import time
import timeit
from pathlib import Path
from typing import Any

import orjson

from extproc.rendering.loading import load
from extproc.request.parse import parse

HERE = Path(__file__).parent
WORDS = (HERE.parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
TURN_CHARACTERS = 600
NOW_UNIX_S = 1_782_777_600.0


def said(turn: int, characters: int = TURN_CHARACTERS) -> str:
    """A stretch of prose, another one for every turn."""
    text = WORDS * (2 + characters // len(WORDS))
    return text[turn * 97 % len(WORDS) :][:characters]


def chat(turns: int, **fields: Any) -> bytes:
    """A chat of so many turns, the last one the user's."""
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": said(0)}]
    messages += [{"role": roles[turn % 2], "content": said(turn)} for turn in range(turns - 1 + turns % 2)]
    return orjson.dumps({"model": "m", "messages": messages, **fields})


def best_us(work: Any, number: int) -> float:
    """Shortest of nine means, in microseconds of this thread's processor time."""
    return min(timeit.repeat(work, number=number, repeat=9, timer=time.thread_time)) / number * 1e6


def main(folder: str = str(HERE / "chatml")) -> None:
    """Print a line per request, then all as JSON."""
    rendering = load(Path(folder))
    tools = [{"type": "function", "function": {"name": "f", "description": said(1), "parameters": {}}}]
    requests = {f"chat of {turns} turns": ("/v1/chat/completions", chat(turns)) for turns in (2, 10, 50)}
    requests["chat of 10 turns, a tool"] = ("/v1/chat/completions", chat(10, tools=tools))
    for characters in (2_000, 30_000):
        body = orjson.dumps({"model": "m", "prompt": said(1, characters)})
        requests[f"completion of {characters} characters"] = ("/v1/completions", body)
    ids = rendering.encoder.encode(said(1, 8_000))
    requests[f"completion of {len(ids)} ids"] = (
        "/v1/completions",
        orjson.dumps({"model": "m", "prompt": ids}),
    )
    figures: dict[str, dict[str, float]] = {}
    for name, (path, body) in requests.items():
        request = parse(path, body)
        found = rendering.prompt_text(request, NOW_UNIX_S)
        assert found is not None
        text = found.text.decode(errors="replace")
        middle = len(found.text) // 2
        verify = found.verify
        assert verify is not None
        figures[name] = {
            "bytes": len(found.text),
            "tokens": len(rendering.encoder.encode(text)),
            "text_us": round(best_us(lambda: rendering.prompt_text(request, NOW_UNIX_S), 200), 1),  # noqa: B023
            "window_us": round(best_us(lambda: verify.tokens_between(middle, middle + 60), 100), 1),  # noqa: B023
            "tokenize_us": round(best_us(lambda: rendering.encoder.encode(text), 10), 1),  # noqa: B023
        }
        print(f"{name:28}", figures[name])
    print(orjson.dumps({"machine": platform.platform(), "figures": figures}).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
