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
