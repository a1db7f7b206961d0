"""Templates that would make much of little: stopped before it is made, and all others left as they are."""

# ruff: noqa: E501 - a template is a line

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import jinja2.ext
import jinja2.sandbox
import orjson
import pytest

from extproc.rendering.metering import CHARS, CHARS_PER_BYTE, OUTPUT_CHARS, OUTPUT_PER_BYTE
from extproc.rendering.prompt_text import build_rendering
from extproc.rendering.template import ChatTemplate
from extproc.request.parse import parse
from tests.unit.prompts import CHAT, DATA, prompt

NOW_UNIX_S = 1_782_777_600.0
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief", "n": 1},
    {"role": "user", "content": "hi <b>\n there\tyou\n", "n": 2},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, {"b": None}]}}}]},
    {"role": "user", "content": "50% of {x} é 日本"},
]  # fmt: skip

HARMLESS = (
    "{{ 1 + 2 + 3 }}{{ 'a' + 'b' + messages[0].content + '!' }}{{ [1] + [2, 3] }}{{ 1.5 + 1 - 2 }}",
    "{{ 'a' ~ 1 ~ none ~ [1, 'x'] ~ undefined_name }}{{ '-' * 3 }}{{ 2 * 3 }}{{ [0] * 2 }}{{ 2 ** 5 }}",
    "{{ 7 % 4 }}{{ '%s=%d' % ('a', 2) }}{{ '%05.1f|%-4s|' | format(2.25, 'x') }}{{ '%(a)s' | format(a=1) }}",
    "{{ messages[1:] | length }}{{ messages[::-1][0].content[3:6] }}{{ 'abcdef'[-3:] }}{{ 'abc'[::2] }}",
    "{{ 'b' in 'abc' }}{{ 'x' not in 'abc' }}{{ 'n' in messages[0] }}{{ 3 in [1, 2] }}{{ 1 < 2 < 3 }}",
    "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ (loop.previtem or m).role }}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in [] %}{{ m }}{% else %}none{% endfor %}",
    "{% for x in [{'a': 1, 'c': [{'a': 2, 'c': []}]}] recursive %}{{ x.a }}({{ loop(x.c) }}){% endfor %}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{{ f(1, 3, 4) }}"
    "{% call f(5) %}inner{% endcall %}",
    "{% set ns = namespace(text='', found=false) %}{% for m in messages %}{% set ns.text = ns.text + m.role[0] %}"
    "{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.text }}{{ ns.found }}",
    "{% set x %}a{{ messages | length }}{% endset %}{{ x }}{% filter upper %}b{{ 'c' }}{% endfilter %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join(',', attribute='n') }}{{ 'abc' | join('-') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | last }}",
    "{{ messages | rejectattr('tool_calls', 'defined') | list | length }}{{ [3, 1, 2] | sort | join }}",
    "{{ ['b', 'a', 'b'] | unique | list }}{{ messages[0] | dictsort | first }}{{ [1, 2] | map('string') | list }}",
    "{{ messages[1].content | replace('i', 'oo') | replace('o', 'u', 1) }}{{ 'a\nb' | indent(2) }}|{{ 'x' | center(5) }}|",
    "{{ 'a\nb\n\nc' | indent(width='> ', first=true, blank=true) }}{{ ' x ' | trim }}{{ 'abc' | upper | first }}",
    "{{ messages[1].content.split('\n') }}{{ 'a,b'.split(',') | length }}{{ ' a '.strip() }}{{ 'a'.join(['b', 'c']) }}",
    "{{ 'ab'.replace('a', 'cc') }}{{ 'x'.center(5) }}{{ '{} {}'.format(1, 'b') }}{{ 'abc'.startswith('ab') }}",
    "{{ 'a\tb'.expandtabs(4) }}{{ '7'.zfill(3) }}{{ 'Ab'.lower().title() }}{{ 'a-b'.rsplit('-', 1)[1] }}",
    "{{ messages }}{{ messages[2].tool_calls[0].function.arguments.items() | list }}{{ messages[0].keys() | list }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ range(3) | list }}{{ 5 | string + 'x' }}",
    "{{ 'é' | tojson }}{{ messages[2] | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "{% if messages[0].content is string and 'b' is in 'abc' %}y{% endif %}{{ none }}{{ true }}{{ 1.0 }}{{ x is defined }}",
    "{{ (messages | first).content | default('d') }}{{ nope | default('d') }}{{ [1, [2, [3]]] }}{{ (1, 'a') }}",
    "{% set a, b = 1, [2] %}{{ a }}{{ b }}{% set c = [messages[0].role, b] %}{{ c }}{{ c | tojson }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{{ messages[1].content | length }}{{ messages | map(attribute='content') | map('length') | list }}{{ -3 | abs }}",
)  # fmt: skip


@pytest.mark.parametrize("source", HARMLESS)
def test_a_metered_template_renders_as_a_plain_one(source: str) -> None:
    """Operators, slices, loops, macros, filters and methods give what Jinja's own give."""
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    plain.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    wanted = plain.from_string(source).render(messages=MESSAGES)
    assert ChatTemplate(source, {}).render(MESSAGES, NOW_UNIX_S, num_bytes=1000) == wanted


def nested(levels: int) -> Any:
    """An object as deep as that."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


MUCH = (
    "{{ documents | tojson(indent=4) }}",
    "{% for m in messages %}{{ documents | tojson }}{% endfor %}",
    "{% for m in messages %}{{ messages | tojson(indent=1) }}{% endfor %}",
    "{% for m in messages %}{{ messages }}{% endfor %}",
    "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}",
    "{% macro f() %}{% for m in messages %}{% for n in messages %}{{ messages }}{% endfor %}{% endfor %}{% endmacro %}"
    "{% set x = f() %}",
    "{% for m in messages %}{% for n in messages %}{% for o in messages %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for m in range(30) recursive %}{{ loop(range(30)) }}{% endfor %}",
    "{{ messages[0].content * 100000 }}",
    "{{ 100000 * messages[0].content }}",
    "{{ ([messages] * 10000000) | length }}",
    "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = '{}{}'.format(ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for m in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for m in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for m in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=[1]) %}{% for m in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x ~ '' }}",
    "{% set ns = namespace(x=[1]) %}{% for m in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}"
    "{{ ns.x | string }}",
    "{% for m in range(100) %}{% set x %}{{ messages }}{{ messages }}{% endset %}{{ x | length }}{% endfor %}",
    "{{ messages[0].content | replace('', messages[1].content * 20) }}",
    "{{ messages[0].content.replace('a', 'b' * 100000) }}",
    "{{ messages[0].content | center(1000000000) }}",
    "{{ messages[0].content.center(1000000000) }}",
    "{{ messages[0].content.ljust(1000000000) }}",
    "{{ messages[0].content.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('a\n' * 1000) | indent(1000000) }}",
    "{{ ('a\n' * 1000) | indent(' ' * 100000) }}",
    "{{ (messages * 1000) | join('x' * 1000) }}",
    "{{ range(100000) | list | join(messages[0].content) }}",
    "{{ messages | join(messages[0].content * 100) }}",
    "{{ messages | slice(1000000000) | list }}",
    "{{ messages | batch(1000000000, 0) | list }}",
    "{{ lipsum(1000000) }}",
    "{{ messages | pprint }}",
    "{{ (messages * 200) | sum(attribute='x', start=[]) }}",
    "{{ (9 + (messages | length)) ** 1000000 }}",
    "{% for i in range(100000) %}{{ i }}{% endfor %}",
    "{% for i in range(100000) %}{% if 'x' in messages[0].content %}{% endif %}{% endfor %}",
    "{% for i in range(8000) %}{% if messages[0].content.strip('x') %}{% endif %}{% endfor %}",
    "{% for i in range(8000) %}{% if messages[0].content[1:] %}{% endif %}{% endfor %}",
    "{% for i in range(8000) %}{% if messages[0].content | trim %}{% endif %}{% endfor %}",
    "{% for i in range(8000) %}{% if messages | map(attribute='role') | list %}{% endif %}{% endfor %}",
)  # fmt: skip


@pytest.mark.parametrize("source", MUCH)
def test_a_template_that_makes_much_of_little_is_stopped(source: str) -> None:
    """Nothing is rendered, and no more is held meanwhile than the meter gives for a request of that size."""
    template = ChatTemplate(source, {})
    messages = [{"role": "user", "content": "a" * 400, "x": [1]}] * 80
    num_bytes = len(json.dumps(messages))
    documents = [nested(180), *[nested(180)] * 5]
    tracemalloc.start()
    text = template.render(messages, NOW_UNIX_S, documents=documents, num_bytes=num_bytes)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert text is None or len(text) <= OUTPUT_CHARS + OUTPUT_PER_BYTE * num_bytes
    assert text is None or source.startswith(("{{ documents", "{% for m in messages %}{{ documents"))
    assert peak_bytes < 2 * (CHARS + CHARS_PER_BYTE * num_bytes) + 2**22


def test_indented_tools_end_at_a_multiple_of_what_came() -> None:
    """Deep schemas and a template that indents them: history speaks, and little was made."""
    using = build_rendering(
        (DATA / "chatml" / "tokenizer.json").read_bytes(),
        b"{}",
        "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{{ messages[0].content }}",
    )
    hi = [{"role": "user", "content": "hi"}]

    def tools(parameters: Any, number: int) -> list[Any]:
        return [{"type": "function", "function": {"name": "f", "parameters": parameters}}] * number

    usual = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x", "y"]}}}
    assert prompt(CHAT, using, messages=hi, tools=tools(usual, 30)) is not None
    body = orjson.dumps({"model": "m", "messages": hi, "tools": tools({"a": [nested(100)] * 30}, 40)})
    request = parse(CHAT, body)
    tracemalloc.start()
    assert using.prompt_text(request, NOW_UNIX_S) is None
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 16 * len(body)


def test_one_rendering_takes_nothing_from_the_next() -> None:
    """The meter is filled for each."""
    template = ChatTemplate("{% for m in messages %}{{ m.content * n }}{% endfor %}", {})
    for _ in range(3):
        assert template.render(MESSAGES, NOW_UNIX_S, variables={"n": 10**7}, num_bytes=100) is None
        assert template.render(MESSAGES, NOW_UNIX_S, variables={"n": 1}, num_bytes=100) is not None
