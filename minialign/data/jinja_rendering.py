"""Render a checkpoint's own chat template, which is written in Jinja, on a short conversation.

The result is compared with that of the built-in templates (template_choice.py). Only what chat
templates use is known here, loops, conditions and variables. Everything else is refused.
"""

import re
from dataclasses import dataclass, field

from minialign.data.jinja_expressions import (
    MAX_LENGTH,
    UnreadableTemplate,
    checked_text,
    evaluate,
    require,
)

TAG = re.compile(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
MAX_STEPS = 10_000  # far more than a template needs for three messages
# Tags without an effect on the text: TRL marks what a model learns with them.
IGNORED_TAGS = ("generation", "endgeneration")
LOOP_END = ("endfor",)
BRANCH_ENDS = ("elif", "else", "endif")


def render(source, messages, **names) -> str:
    """Return what a template writes for `messages`, up to where the next answer begins.

    names: what else the template may use, such as bos_token. Raises UnreadableTemplate.
    """
    require(len(source) <= MAX_LENGTH, f"it has {len(source)} characters")
    blocks = _parse(_tokenize(source))
    values = {"messages": messages, "add_generation_prompt": True, **names}
    try:
        return _Renderer().render(blocks, values)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise UnreadableTemplate(f"it fails with {error!r}") from None
    except RecursionError:
        raise UnreadableTemplate("its expressions are nested too deeply") from None


# --- from text to blocks ---


@dataclass
class Block:
    """A piece of text or a tag, with what a loop or a condition holds."""

    kind: str  # "text", "emit", or the first word of a statement
    content: str
    body: list = field(default_factory=list)
    otherwise: list = field(default_factory=list)


def _tokenize(source) -> list[Block]:
    """Return the texts and tags of a template, with white space removed as transformers does.

    A "-" in a tag removes all white space on that side. A statement also removes the spaces before
    it on its line, and the line break behind it (Jinja's lstrip_blocks and trim_blocks).
    """
    source = source.removesuffix("\n")
    blocks = []
    position = 0
    previous_tag = ""
    for match in [*TAG.finditer(source), None]:
        # 1. The text between two tags.
        tag = match[0] if match else ""
        end = match.start() if match else len(source)
        text = _trim(source[position:end], previous_tag, tag, is_first=position == 0)
        blocks.append(Block("text", text))
        position = match.end() if match else end

        # 2. The tag.
        content = tag[2:-2].strip("-+ \t\r\n")
        word = content.split(" ")[0]
        if tag.startswith("{{"):
            blocks.append(Block("emit", content))
        elif tag.startswith("{%") and word not in IGNORED_TAGS:
            blocks.append(Block(word, content.removeprefix(word).strip()))
        previous_tag = tag
    return blocks


def _trim(text, previous_tag, next_tag, *, is_first):
    """Remove the white space that the tags around a text take away."""
    begins_line = is_first or "\n" in text
    spaces_before_tag = len(text) - len(text.rstrip(" \t"))
    stands_alone = begins_line and text.rstrip(" \t")[-1:] in ("", "\n")

    if next_tag[2:3] == "-":
        text = text.rstrip()
    elif next_tag[:2] in ("{%", "{#") and next_tag[2:3] != "+" and stands_alone:
        text = text[: len(text) - spaces_before_tag]
    if previous_tag[-3:-2] == "-":
        text = text.lstrip()
    elif previous_tag[-2:] in ("%}", "#}"):
        text = text.removeprefix("\n")
    return text


def _parse(blocks) -> list[Block]:
    """Return the blocks with what belongs into a loop or a condition inside of it."""
    remaining = iter(blocks)
    tree, end = _parse_until(remaining, ())
    require(end is None, "a loop or a condition has no beginning")
    return tree


def _parse_until(remaining, end_kinds):
    """Return the blocks up to one of `end_kinds`, and that one (None at the end of the text)."""
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
    """Read the branches of an "if" or "elif" block."""
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
    """Renders blocks, with a limit on the number of steps."""

    def __init__(self):
        self.num_steps = 0

    def render(self, blocks, names) -> str:
        """Return the text of blocks. `names` are the variables, which "set" changes."""
        texts = []
        for block in blocks:
            self.num_steps += 1
            require(self.num_steps <= MAX_STEPS, "it loops too long")
            texts.append(self.render_block(block, names))
        return checked_text("".join(texts))

    def render_block(self, block, names):
        """Return the text of one block."""
        if block.kind == "text":
            return block.content
        if block.kind == "emit":
            return as_text(evaluate(block.content, names))
        if block.kind == "if":
            branch = block.body if evaluate(block.content, names) else block.otherwise
            return self.render(branch, names)
        if block.kind == "for":
            return self.render_loop(block, names)
        name, equals, expression = block.content.partition("=")
        require(
            block.kind == "set" and equals and name.strip().isidentifier(),
            f"it uses {{% {block.kind} {block.content[:60]} %}}",
        )
        names[name.strip()] = evaluate(expression, names)
        return ""

    def render_loop(self, block, names):
        """Return the text of a loop. What it sets is forgotten after each pass, as in Jinja."""
        name, _, expression = block.content.partition(" in ")
        items = evaluate(expression, names)
        require(isinstance(items, list), f"it loops over {expression[:60]}")
        texts = []
        for i, item in enumerate(items):
            loop = {"first": i == 0, "last": i == len(items) - 1, "index0": i, "index": i + 1}
            texts.append(self.render(block.body, {**names, name.strip(): item, "loop": loop}))
        return "".join(texts)


def as_text(value) -> str:
    """Return what Jinja writes for a value: nothing for one that is not defined."""
    require(value is None or isinstance(value, str), f"it writes {str(value)[:60]}, no text")
    return value or ""
