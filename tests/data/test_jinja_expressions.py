"""Expressions of Jinja: values by hand, and what is refused."""

import pytest

from minialign.data.jinja_expressions import UNDEFINED, Loop, UnreadableTemplate, evaluate

NAMES = {
    "message": {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " A "}]},
    "loop": Loop(index0=3, first=False),
    "empty": None,
}


@pytest.mark.parametrize(
    "expression, value",
    [
        ("message['role']", "user"),
        ("message.role.upper() + ': '", "USER: "),
        ("'a' ~ \"b~\" ~ 'c'", "ab~c"),
        ("'a\nb'", "a\nb"),
        ("'a' +\n'b'", "ab"),
        # A backslash before a line break drops both, unless it is one itself.
        ("'a\\\nb\nc'", "ab\nc"),
        ("'a\\\\\nb'", "a\\\nb"),
        ("-1", -1),
        ("3 - -1", 4),
        ("message.content[-1].text", " A "),
        ("message.content[-1:] | length", 1),
        ("'it\\'s'", "it's"),
        ("message.content | selectattr('type', 'equalto', 'image') | list", [{"type": "image"}]),
        ("message.content | rejectattr('type', 'equalto', 'text') | list", [{"type": "image"}]),
        ("message.content | rejectattr('text', 'equalto', none) | list | length", 2),
        ("message.content[1].text | trim", "A"),
        ("message['content'][1]['text'] | trim | lower", "a"),
        ("message.content | length", 2),
        # A filter binds tighter than every operator, "~" tighter than "+".
        ("'A' + ' B ' | trim", "AB"),
        ("'A' ~ 'B' | lower ~ ' C ' | trim | lower", "Abc"),
        ("'[INST] ' + message.content[1].text | trim + ' [/INST]'", "[INST] A [/INST]"),
        ("message.content | length - 1", 1),
        ("7 % message.content | length", 1),
        ("message.role | length is none", False),
        ("'A' + 'B' ~ nothing ~ 'C'", "ABC"),
        ("'|' + '@' + '**' + '~'", "|@**~"),
        ("message.content[1:]", [{"type": "text", "text": " A "}]),
        ("loop.index0 % 2 == 1 and not loop.first", True),
        ("message.role != 'user' or message.role == 'system'", False),
        ("'x' if loop.first else 'y'", "y"),
        ("message.role in ['user', 'system']", True),
        ("'us' in message.role", True),
        ("message.content is string", False),
        ("message.content is iterable and message.content is not mapping", True),
        ("message.name is defined", False),
        # What is not set is another value than none.
        ("message.name is none", False),
        ("message.name is undefined", True),
        ("empty is defined", True),
        ("empty is none", True),
        ("nothing == none", False),
        ("'x' if nothing else 'y'", "y"),
        ("nothing", UNDEFINED),
        ("nothing is iterable", True),
        ("message is sequence", True),
        ("loop.index0 > 2", True),
        ("loop.index0 <= 2", False),
    ],
)
def test_values_by_hand(expression, value):
    assert evaluate(expression, NAMES) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "'a' *",
        "'a' * 3",
        "'%9s' % 'a'",
        "1 % 0",
        "'a' + 1",
        "'a' < 'b'",
        "1 < 2 < 3",
        "+1",
        "~1",
        "-true",
        "-loop.index0",
        "-1 | string",
        "-'a' | length",
        "lambda: 1",
        "[c for c in 'ab']",
        "open('x')",
        "raise_exception('no')",
        "message.role.format(1)",
        "message.role.__class__()",
        "message.items",
        "message['keys']",
        "loop.depth",
        "1 ~ 2",
        "'a' ~ none",
        "'a' ** 'b'",
        "'a' @ 'b'",
        "'a' + message.role is string",
        "message.role | replace('a', 'b')",
        "message.role | list",
        "message | tojson",
        "message.role is even",
        "f'{message}'",
        "(yield)",
        "message.content[::-1]",
        "message.role.strip(chars='u')",
        "message.content | selectattr('type', 'equalto', 'text', default=1)",
        "message.content | selectattr('type', 'equalto')",
    ],
)
def test_other_expressions_are_refused(expression):
    with pytest.raises(UnreadableTemplate):
        evaluate(expression, NAMES)


def test_a_list_does_not_grow_without_bound():
    """A template may add a list to itself again and again."""
    with pytest.raises(UnreadableTemplate, match="too much"):
        evaluate("x + x", {"x": [0] * 1_000_000})
