"""Chat templates: what they are given, what they may do, and what they cannot break."""

from typing import Any

import pytest

from extproc.rendering.template import ChatTemplate
from extproc.rendering.vocabulary import UnsupportedTemplate

NOW_UNIX_S = 1_782_777_600.0
"""2026-06-30 00:00 UTC."""

USER: dict[str, Any] = {"role": "user", "content": "hi"}
LOOP = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def render(source: str, *messages: dict[str, Any], **options: Any) -> str | None:
    """Compile and render; without messages, one."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, tokens).render(messages or (USER,), NOW_UNIX_S, **options)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (LOOP, "[hi]"),
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ tools }}{{ documents }}{{ add_generation_prompt }}", "NoneNoneTrue"),
        ("a\n{% if true %}\nb\n{% endif %}\n  {%- if false %}{% endif %}", "a\nb\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}", "hi!"),
        (
            "{% for m in messages %}{% set x = 1 %}{% generation %}{% set x = 2 %}{{ loop.index }}"
            "{% endgeneration %}{{ x }}{% endfor %}",
            "11",
        ),
        ("{{ {'b': '<é>', 'a': [1, 2.5, none]} | tojson }}", '{"b": "<é>", "a": [1, 2.5, null]}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{{ '<&>' | tojson(ensure_ascii=True) }}{{ 'é' | tojson(ensure_ascii=true) }}", '"<&>""\\u00e9"'),
        ("{{ strftime_now('%d %b %Y') }}", "30 Jun 2026"),
        ("{% if own is defined %}{{ own }}{% endif %}", ""),
    ],
)
def test_templates_render_as_the_library_renders_them(source: str, text: str) -> None:
    """Whitespace control, extensions, filters and functions are those that templates are written for."""
    assert render(source) == text


def test_variables_are_those_that_the_template_reads() -> None:
    """A client's variables neither replace messages nor names that the template sets itself."""
    source = "{% for m in messages %}{{ m.content }}{{ own }}{% endfor %}{{ bos_token }}"
    assert render(source, variables={"own": 1, "m": 2, "messages": [], "bos_token": "<b>"}) == "hi1<b>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ missing() }}",
        "{{ range(999999999) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_templates_that_fail_or_misbehave_render_nothing(source: str) -> None:
    """Whatever is raised inside is None outside, and messages stay as they were."""
    assert render(source) is None
    assert USER == {"role": "user", "content": "hi"}


@pytest.mark.parametrize("source", ["{{ bad", "{% nope %}", "{{ x | nope }}", "{% generation %}"])
def test_templates_that_do_not_compile_are_refused(source: str) -> None:
    """The operator sees it at start."""
    with pytest.raises(UnsupportedTemplate):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("wants_parts", "source"),
    [
        (False, LOOP),
        (True, "{% for m in messages %}{% for c in m['content'] %}{% endfor %}{% endfor %}"),
        (
            True,
            "{% for m in messages %}{% set content = m.x %}{% for c in content %}{% endfor %}{% endfor %}",
        ),
        (False, "{% for m in messages %}{% set k = m.content %}{% for c in k %}{% endfor %}{% endfor %}"),
        (False, "{% for m in messages %}{% for c in m.tool_calls %}{% endfor %}{% endfor %}"),
        (
            True,
            "{% set ms = messages[1:] %}{% for m in ms | list %}"
            "{% for c in m.content | selectattr('type') %}{% endfor %}{% endfor %}",
        ),
        (
            True,
            "{% macro r(a, b) %}{% for c in b %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ r(1, b=m['content']) }}{% endfor %}",
        ),
        (
            True,
            "{% macro r(said) %}{% for c in said %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ r(m.content) }}{% endfor %}",
        ),
        (
            False,
            "{% macro r(content) %}{% for c in content %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ r('x') }}{% endfor %}",
        ),
        (
            False,
            "{% set a, b = messages, 1 %}{% for m in a %}{% for c in m.content %}{% endfor %}{% endfor %}",
        ),
    ],
)
def test_a_template_that_loops_over_contents_wants_parts(wants_parts: bool, source: str) -> None:
    """Each answer here is vLLM 0.32's own for the same template."""
    assert ChatTemplate(source, {}).wants_parts is wants_parts


def test_developer_messages_are_known_if_the_template_names_them() -> None:
    """In either kind of quotes."""
    assert ChatTemplate("{% if messages[0].role == 'developer' %}{% endif %}", {}).knows_developer
    assert not ChatTemplate("{# developer #}" + LOOP, {}).knows_developer


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        (LOOP, "He said: ", "[hi][He said: "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "He said: ", "[hi][He said:"),
        (
            "{% for m in messages %}[{{ m.content[-1].text }}]{% endfor %}",
            [{"text": "a"}, {"text": "b"}],
            "[][b",
        ),
        ("{% for m in messages %}{{ m.role }}{# content #}{% endfor %}", "x", None),
        (LOOP, None, None),
        (LOOP, [{"type": "image"}], None),
        ("{{ messages[0].role }}", "x", None),
    ],
)
def test_a_continued_message_is_left_open(source: str, content: Any, text: str | None) -> None:
    """The text ends where the last message's does; None if the template does not show it."""
    last = {"role": "assistant", "content": content}
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, USER, last, **options) == text


def test_the_last_text_part_is_continued() -> None:
    """Of a list of parts, the last that has text; the messages stay as they were."""
    parts = [{"type": "text", "text": "a"}, {"type": "image"}]
    source = "{% for c in messages[-1].content %}<{{ c.text or c.type }}>{% endfor %}"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, {"role": "assistant", "content": parts}, **options) == "<a"
    assert parts == [{"type": "text", "text": "a"}, {"type": "image"}]


def test_a_message_is_not_both_continued_and_answered() -> None:
    """The engine refuses it."""
    assert render(LOOP, add_generation_prompt=True, continue_final_message=True) is None
