"""Records what a real engine tokenizes for random requests: `captures.jsonl` beside each tokenizer.

`python tests/data/rendering/capture.py FOLDER URL NUMBER [SEED]` asks a vLLM server that serves FOLDER's
tokenizer as model `m`, with its render endpoints on (`--enable-scale-out`), for NUMBER requests. A line is
`{"path", "body", "tokens"}`; tokens is null where the engine refuses.
"""

from __future__ import annotations

import json
import random
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

WORDS = (
    *(
        "the",
        "KV cache",
        "don't",
        "I'm",
        "x = 1\n",
        "\n\n",
        "  ",
        "\t",
        "\n    return y\n",
        "3.1415",
        "1234567",
    ),
    *(
        "naïve",
        "e\u0301",
        "\u212b",
        "日本語の文。",
        "今天，天气很好！",
        "Привет",
        "مرحبا",
        "한국어",
        "😀",
        "\u00a0",
        "\u2009",
    ),
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "</s>",
        "<think>",
        "[INST]",
        "<|end|> ",
        "▁",
        "<0x0A>",
        '{"a": [1]}',
        "…",
        "—",
    ),
    *("&<>'\"", "\\n", "\r\n", "``` \n", "\u3000", "\x1c", "\u2028", "ﬁ", "각", "Ā̈", "🏳️‍🌈"),
)


def text(rng: random.Random, most: int = 12) -> str:
    """Words of many scripts, with and without spaces between and around them."""
    said = "".join(rng.choice(WORDS) + rng.choice(("", " ")) for _ in range(rng.randrange(most)))
    return said or rng.choice(("", "a"))


def content(rng: random.Random) -> Any:
    """A string, or a list of text parts in one of the forms that engines take."""
    if rng.random() < 0.7:
        return text(rng)
    kinds = ({"type": "text"}, {"type": "text", "cache_control": {"type": "ephemeral"}})
    parts: list[Any] = [{**rng.choice(kinds), "text": text(rng)} for _ in range(rng.randrange(1, 4))]
    return [*parts, text(rng)] if rng.random() < 0.2 else parts


def arguments(rng: random.Random) -> str:
    """Arguments of a call, mostly an object."""
    given = {"term": text(rng, 3), "n": rng.choice((1, 2.5, None, True, [1, "é"], {"b": 1, "a": 2}, 1e22))}
    return rng.choice((json.dumps(given), json.dumps(given, ensure_ascii=False), "", "[1]", "{bad", "{}"))


def turns(rng: random.Random, *, tools: bool) -> list[dict[str, Any]]:
    """A conversation that most templates take."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": content(rng)})
    elif rng.random() < 0.1:
        messages.append({"role": "developer", "content": content(rng)})
    for turn in range(rng.randrange(1, 5)):
        messages.append({"role": "user", "content": content(rng)})
        if rng.random() < 0.2:
            messages[-1]["name"] = "bob"
        if tools and rng.random() < 0.6:
            calls = [
                {
                    "id": f"call0{turn}{number:03}",
                    "type": "function",
                    "function": {"name": rng.choice(("look_up", "now")), "arguments": arguments(rng)},
                }
                for number in range(1 if rng.random() < 0.8 else 2)
            ]
            messages.append(
                {"role": "assistant", "content": rng.choice((None, "", text(rng))), "tool_calls": calls}
            )
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": content(rng)} for call in calls
            ]
        answer: dict[str, Any] = {"role": "assistant", "content": content(rng)}
        if rng.random() < 0.3:
            answer[rng.choice(("reasoning", "reasoning_content"))] = text(rng)
        if rng.random() < 0.1:
            answer |= {"refusal": None, "tool_calls": []}
        messages.append(answer)
    if rng.random() < 0.8:
        messages.append({"role": "user", "content": content(rng)})
    return messages


def tool(rng: random.Random) -> dict[str, Any]:
    """A function, its fields in any order, some of them missing or unknown."""
    fields: list[tuple[str, Any]] = [
        ("parameters", {"type": "object", "properties": {"term": {"type": "string", "enum": ["é", "<b>"]}}}),
        ("name", "look_up"),
    ]
    if rng.random() < 0.6:
        fields.append(("description", text(rng)))
    if rng.random() < 0.2:
        fields.append(("strict", rng.random() < 0.5))
    if rng.random() < 0.2:
        fields.append(("x-own", 1))
    rng.shuffle(fields)
    return {"type": "function", "function": dict(fields)}


def chat(rng: random.Random) -> dict[str, Any]:
    """A chat request."""
    has_tools = rng.random() < 0.4
    body: dict[str, Any] = {"model": "m", "messages": turns(rng, tools=has_tools), "max_tokens": 4}
    if has_tools:
        body["tools"] = [tool(rng) for _ in range(rng.randrange(1, 3))]
    if rng.random() < 0.2:
        body["add_generation_prompt"] = False
        body["continue_final_message"] = rng.random() < 0.7
    if rng.random() < 0.15:
        body["add_special_tokens"] = True
    if rng.random() < 0.25:
        options = {
            "enable_thinking": rng.random() < 0.5,
            "cutoff": "June 2026",
            "own": [1],
            "bos_token": "<s>",
        }
        body["chat_template_kwargs"] = dict(rng.sample(sorted(options.items()), rng.randrange(1, 4)))
    if rng.random() < 0.2:
        body["reasoning_effort"] = rng.choice(("none", "low", "high"))
    return body


def completion(rng: random.Random) -> dict[str, Any]:
    """A completion request."""
    prompt: Any = text(rng, 40)
    if rng.random() < 0.2:
        prompt = [prompt]
    elif rng.random() < 0.2:
        prompt = [rng.randrange(1200) for _ in range(rng.randrange(1, 30))]
    body: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": 4}
    if rng.random() < 0.2:
        body["add_special_tokens"] = rng.random() < 0.5
    return body


def tokens(url: str, path: str, body: dict[str, Any]) -> list[int] | None:
    """What the engine makes of a request."""
    request = urllib.request.Request(
        f"{url}{path}/render", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (400, 422):
            return None
        raise
    rendered = answer[0] if isinstance(answer, list) else answer
    ids: list[int] = rendered["token_ids"]
    return ids


def main(folder: str, url: str, number: str, seed: str = "1") -> None:
    """Write the captures: three chats to each completion."""
    rng = random.Random(int(seed))
    with (Path(folder) / "captures.jsonl").open("w", encoding="utf-8") as file:
        for index in range(int(number)):
            path, body = (
                ("/v1/completions", completion(rng))
                if index % 4 == 0
                else ("/v1/chat/completions", chat(rng))
            )
            line = {"path": path, "body": body, "tokens": tokens(url, path, body)}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
