"""Render a checkpoint's own chat template, which is written in Jinja, on a short conversation.

The result is compared with that of the built-in templates (template_choice.py). What chat templates
use is known here: loops, conditions and variables. Everything else is refused.

The text of a template becomes a flat list of Blocks (here without empty texts), then a tree of
them, and then the text that it writes:

    {% if x %}a{% endif %}     Block("if", "x"), Block("text", "a"), Block("endif", "")
                               Block("if", "x", body=[Block("text", "a")])
                               "a", if x is true
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from minialign.data.jinja_expressions import (
    MAX_LENGTH,
    UNDEFINED,
    Loop,
    UnreadableTemplate,
    checked_text,
    evaluate,
    require,
)

# A comment, a statement or an expression. The group makes `split` return the tags too.
TAG = re.compile(r"(\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\})", re.DOTALL)
MAX_STEPS = 10_000  # far more than a template needs for three messages
# Tags without an effect on the text: TRL marks what a model learns with them.
IGNORED_TAGS = ("generation", "endgeneration")
LOOP_END = ("endfor",)
BRANCH_ENDS = ("elif", "else", "endif")


def render(source, messages, **variables) -> str:
    """Return what a template writes for `messages`, up to where the next answer begins.

    variables: what else the template may use, such as bos_token. One that is None is not set.
    Raises UnreadableTemplate.
    """
    require(len(source) <= MAX_LENGTH, f"it has {len(source)} characters")
    blocks = _parse(_tokenize(source))
    # transformers always sets the tools and documents of a conversation, if only to none.
    all_variables = {"messages": messages, "add_generation_prompt": True}
    all_variables |= {"tools": None, "documents": None}
    all_variables |= {name: value for name, value in variables.items() if value is not None}
    try:
        return _Renderer().render(blocks, all_variables)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise UnreadableTemplate(f"it fails with {error!r}") from None
    except RecursionError:
        raise UnreadableTemplate("its expressions are nested too deeply") from None


# --- from text to blocks ---


@dataclass
class Block:
    """A text or a tag of a template."""

    kind: str  # "text", "emit" for an expression that is written, or a statement's first word
    content: str  # the text, the expression, or the rest of the statement
    body: list = field(default_factory=list)  # the Blocks inside of a loop or a condition
    otherwise: list = field(default_factory=list)  # those of the else branch


def _tokenize(source) -> list[Block]:
    """Return the texts and tags of a template, with white space removed as transformers does.

    A "-" in a tag removes all white space on that side. A statement also removes the spaces before
    it on its line, and the line break behind it (Jinja's lstrip_blocks and trim_blocks).
    """
    # 1. Texts and tags alternate: text, tag, text, ..., text. Each text has a tag on either side.
    source = source.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    pieces = TAG.split(source)
    texts = pieces[::2]
    tags = ["", *pieces[1::2], ""]

    blocks = []
    for i, text in enumerate(texts):
        # 2. The text between two tags.
        tag = tags[i + 1]
        trimmed_text = _trim(text, previous_tag=tags[i], next_tag=tag)
        blocks.append(Block("text", trimmed_text))

        # 3. The tag behind it. A comment writes nothing.
        content = tag[2:-2].strip("-+ \t\r\n")
        word = content.split(" ")[0]
        if tag.startswith("{{"):
            blocks.append(Block("emit", content))
        elif tag.startswith("{%") and word not in IGNORED_TAGS:
            blocks.append(Block(word, content.removeprefix(word).strip()))
    return blocks


def _trim(text, previous_tag, next_tag):
    """Remove the white space that the tags around a text take away.

    A tag is "" at the beginning and at the end of the template.
    """
    # 1. Before the next tag: "{%-" removes all of it, "{%+" none, and "{%" the spaces before it if
    #    nothing else stands before it on its line.
    without_spaces = text.rstrip(" \t")
    is_template_start = previous_tag == "" and without_spaces == ""
    begins_line = is_template_start or without_spaces.endswith("\n")
    if next_tag[2:3] == "-":
        text = text.rstrip()
    elif next_tag[:2] in ("{%", "{#") and next_tag[2:3] != "+" and begins_line:
        text = without_spaces

    # 2. Behind the previous tag: "-%}" removes all of it, "+%}" none, and "%}" a line break.
    if previous_tag[-3:-2] == "-":
        text = text.lstrip()
    elif previous_tag[-2:] in ("%}", "#}") and previous_tag[-3:-2] != "+":
        text = text.removeprefix("\n")
    return text


def _parse(blocks) -> list[Block]:
    """Return the blocks as a tree, in which a loop or a condition holds the blocks inside of it."""
    remaining = iter(blocks)
    tree, _ = _parse_until(remaining, end_kinds=())
    return tree


def _parse_until(remaining, end_kinds):
    """Return (the tree of the blocks up to one of `end_kinds`, that block).

    remaining: an iterator over the blocks, which the calls for inner loops and conditions advance.
    At the end of the template the second value is None.
    """
    tree = []
    for block in remaining:
        if block.kind in end_kinds:
            return tree, block
        if block.kind == "for":
            block.body, end = _parse_until(remaining, LOOP_END)
            require(end is not None, "a loop has no end")
        elif block.kind == "if":
            _parse_condition(block, remaining)
        require(block.kind not in LOOP_END + BRANCH_ENDS, f"{block.kind} in the wrong place")
        tree.append(block)
    return tree, None


def _parse_condition(block, remaining):
    """Read the branches of a condition. An "elif" is a condition in the else branch."""
    block.body, end = _parse_until(remaining, BRANCH_ENDS)
    require(end is not None, "a condition has no end")
    if end.kind == "else":
        block.otherwise, end = _parse_until(remaining, ("endif",))
        require(end is not None, "a condition has no end")
    elif end.kind == "elif":
        nested = Block("if", end.content)
        _parse_condition(nested, remaining)
        block.otherwise = [nested]


# --- from blocks to text ---


class _Renderer:
    """Renders blocks, at most MAX_STEPS of them, because a template may nest loops."""

    def __init__(self):
        self.num_steps = 0

    def render(self, blocks, variables) -> str:
        """Return the text of blocks. `variables` is changed by "set"."""
        texts = []
        for block in blocks:
            self.num_steps += 1
            require(self.num_steps <= MAX_STEPS, "it loops too long")
            texts.append(self.render_block(block, variables))
        return checked_text("".join(texts))

    def render_block(self, block, variables):
        """Return the text of one block."""
        if block.kind == "text":
            return block.content
        if block.kind == "emit":
            value = evaluate(block.content, variables)
            return as_text(value)
        if block.kind == "if":
            branch = block.body if evaluate(block.content, variables) else block.otherwise
            return self.render(branch, variables)
        if block.kind == "for":
            return self.render_loop(block, variables)

        # The only other statement is "set name = expression".
        name, equals, expression = block.content.partition("=")
        require(
            block.kind == "set" and equals and name.strip().isidentifier(),
            f"it uses {{% {block.kind} {block.content[:60]} %}}",
        )
        variables[name.strip()] = evaluate(expression, variables)
        return ""

    def render_loop(self, block, variables):
        """Return the text of a loop. What it sets is forgotten after each pass, as in Jinja."""
        name, _, expression = block.content.partition(" in ")
        require(name.strip().isidentifier(), f"it loops over {block.content[:60]}")
        items = evaluate(expression, variables)
        require(isinstance(items, list | Iterator), f"it loops over {expression[:60]}")
        items = list(items)
        texts = []
        for i, item in enumerate(items):
            loop = _loop_fields(items, i)
            variables_of_pass = {**variables, name.strip(): item, "loop": loop}
            texts.append(self.render(block.body, variables_of_pass))
        return "".join(texts)


def _loop_fields(items, i) -> Loop:
    """Return what `loop` tells in pass i of a loop over these items."""
    remaining = len(items) - i  # passes, this one included
    return Loop(
        first=i == 0,
        last=remaining == 1,
        index0=i,
        index=i + 1,
        length=len(items),
        revindex0=remaining - 1,
        revindex=remaining,
        previtem=items[i - 1] if i > 0 else UNDEFINED,
        nextitem=items[i + 1] if remaining > 1 else UNDEFINED,
    )


def as_text(value) -> str:
    """Return what Jinja writes for a value: nothing for one that is not defined."""
    if value is UNDEFINED:
        return ""
    require(isinstance(value, str), f"it writes {str(value)[:60]}, no text")
    return value
