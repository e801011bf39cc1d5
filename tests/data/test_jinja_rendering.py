"""Chat templates in Jinja: what they write, equal to Jinja's own results."""

import pytest

from minialign.data.jinja_expressions import UnreadableTemplate
from minialign.data.jinja_rendering import render

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
]


# The results are those of jinja2 3.1 with trim_blocks and lstrip_blocks, as in transformers.
@pytest.mark.parametrize(
    "template, text",
    [
        ("a\n", "a"),
        ("a\n\n", "a\n"),
        ("a {# comment #} b", "a  b"),
        ("{# comment #}\nb", "b"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("a  {%- if true -%}  b  {%- endif -%}  c", "abc"),
        ("a {% if false %}b{% elif 1 == 1 %}c{% else %}d{% endif %}", "a c"),
        ("  {{ 'x' }}\n  y", "  x\n  y"),
        ("  {{- 'x' -}}\n  y", "xy"),
        (
            "{% for m in messages %}{{ m.role }}{{ '' if loop.last else ', ' }}{% endfor %}",
            "user, assistant",
        ),
        ("{% set x = 'a' %}{% for m in messages %}{% set x = 'b' %}{% endfor %}{{ x }}", "a"),
        ("{% set x = 'a' %}{% if true %}{% set x = 'b' %}{% endif %}{{ x }}", "b"),
        ("{% if true +%}\na\n{%+ endif +%}\nb", "\na\n\nb"),
        ("{# comment +#}\nb", "\nb"),
        ("a\r\n  {% if true %}\r\n  b\r  {% endif %}\r\nc\r\n", "a\n  b\nc"),
        ("{% set x = none %}{% if x is defined %}a{% endif %}{% if y is none %}b{% endif %}", "a"),
        ("{% if tools is defined and tools is none %}a{% endif %}", "a"),
        ("{% if eos_token is defined %}a{% endif %}", ""),
        (
            "{% for m in messages %}{{ 'p' if loop.previtem is defined else '-' }}"
            "{{ 'n' if loop.nextitem is defined else '-' }}{% endfor %}",
            "-np-",
        ),
        (
            "{% for m in messages %}{% if loop.length == 2 and loop.revindex == 1 %}"
            "{{ loop.previtem.role + m.role }}{% endif %}{% endfor %}",
            "userassistant",
        ),
        ("{% for m in messages %}{{ 'a' if loop.revindex0 == 1 else 'b' }}{% endfor %}", "ab"),
        # The items that selectattr keeps are true even if there are none, and can be read once.
        (
            "{% if messages[0].content | selectattr('type', 'equalto', 'video') %}a{% endif %}",
            "a",
        ),
        (
            "{% set c = messages[0].content | selectattr('type', 'equalto', 'image') %}"
            "{% for i in c %}a{% endfor %}{% for i in c %}b{% endfor %}",
            "a",
        ),
        ("{% generation %}{{ bos_token }}{% endgeneration %}{{ nothing }}", "<s>"),
    ],
)
def test_texts_tags_and_white_space(template, text):
    assert render(template, MESSAGES, bos_token="<s>") == text


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}", "a loop has no end"),
        ("{% if true %}", "a condition has no end"),
        ("{% if true %}{% else %}", "a condition has no end"),
        ("{% endif %}", "endif in the wrong place"),
        ("{% for m in messages %}{% else %}{% endfor %}", "else in the wrong place"),
        ("{% include 'x' %}", "include 'x'"),
        ("{% set messages[0] = 'x' %}", "set messages"),
        ("{% for m in messages[0] %}{% endfor %}", "it loops over"),
        ("{% for c in 'abc' %}{% endfor %}", "it loops over"),
        ("{{ messages[9] }}", "IndexError"),
        ("{{ messages | length }}", "it writes 2, no text"),
        ("{{ none }}", "it writes None, no text"),
        ("{% for m in messages %}{{ loop.depth }}{% endfor %}", "it uses 'loop.depth'"),
        ("{% for a, b in messages %}{% endfor %}", "it loops over a, b in messages"),
    ],
)
def test_other_tags_are_refused(template, reason):
    with pytest.raises(UnreadableTemplate, match=reason):
        render(template, MESSAGES)


def test_the_work_is_bounded():
    """Twenty nested loops over two messages would take a million steps."""
    loops = "{% for m in messages %}" * 20 + "x" + "{% endfor %}" * 20
    with pytest.raises(UnreadableTemplate, match="it loops too long"):
        render(loops, MESSAGES)

    doubled = "{% set x = 'a' %}" + "{% set x = x + x %}" * 60
    with pytest.raises(UnreadableTemplate, match="it writes too much"):
        render(doubled, MESSAGES)
