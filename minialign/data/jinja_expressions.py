"""Evaluate the expressions of a chat template: what Jinja writes between {{ and }}.

Nothing of the file is run. An expression of Jinja is nearly always an expression of Python too, so
Python parses it, and this module walks what comes out. Whatever it does not know is refused.
"""

import ast
import re

# The literals of an expression, and what Python writes differently.
LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[~\n]", re.DOTALL)
MAX_LENGTH = 100_000  # of a template, and of any text in it


class UnreadableTemplate(ValueError):
    """A chat template uses something that is not known here."""


def require(condition, message):
    """Raise UnreadableTemplate with this message unless the condition holds."""
    if not condition:
        raise UnreadableTemplate(message)


def checked_text(text) -> str:
    """Return a text. Raises UnreadableTemplate if it grows without a bound."""
    require(len(text) <= MAX_LENGTH, "it writes too much")
    return text


CONSTANTS = {"true": True, "false": False, "none": None}
METHODS = ("upper", "lower", "title", "capitalize", "strip", "lstrip", "rstrip", "startswith")
# What "is" asks for: `x is string`. A name that is not defined counts as none.
TYPES = {
    "none": (type(None),),
    "string": (str,),
    "mapping": (dict,),
    "sequence": (str, list),
    "iterable": (str, list, dict),
}


def evaluate(expression, names):
    """Return the value of an expression of Jinja. A name that is not defined is None."""
    try:
        tree = ast.parse(LITERAL.sub(_in_python, expression).strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        raise UnreadableTemplate(f"it uses {expression[:60]!r}") from None
    return _value(tree.body, names)


def _in_python(match):
    """Return a literal of Jinja, a "~" or a line break as Python writes it."""
    replacements = {"~": "+", "\n": " "}  # "~" joins texts
    return replacements.get(match[0], match[0].replace("\n", "\\n"))


def _value(node, names):
    """Return the value of a parsed expression."""
    evaluate_node = EVALUATORS.get(type(node))
    require(evaluate_node is not None, f"it uses {ast.unparse(node)[:60]!r}")
    return evaluate_node(node, names)


def _constant(node, names):
    """Return a literal."""
    return node.value


def _list(node, names):
    """Return a list of values."""
    return [_value(element, names) for element in node.elts]


def _name(node, names):
    """Return the value of a variable."""
    return names.get(node.id, CONSTANTS.get(node.id))


def _attribute(node, names):
    """Return a field, as in message.role."""
    return _value(node.value, names).get(node.attr)


def _subscript(node, names):
    """Return an item, as in message['role'], messages[0] or messages[1:]."""
    container = _value(node.value, names)
    if isinstance(node.slice, ast.Slice):
        bounds = [node.slice.lower, node.slice.upper]
        return container[slice(*[bound and _value(bound, names) for bound in bounds])]
    key = _value(node.slice, names)
    return container.get(key) if isinstance(container, dict) else container[key]


def _binary(node, names):
    """Return a sum, a remainder, or what a filter makes of a value."""
    left = _value(node.left, names)
    if isinstance(node.op, ast.BitOr):
        return _filtered(left, node.right, names)
    right = _value(node.right, names)
    if isinstance(node.op, ast.Mod) and type(left) is int and type(right) is int and right:
        return left % right
    require(isinstance(node.op, ast.Add), f"it uses {ast.unparse(node)[:60]!r}")
    require(type(left) is type(right), f"it adds {ast.unparse(node)[:60]!r}")
    return checked_text(left + right) if isinstance(left, str) else left + right


def _filtered(value, node, names):
    """Return what a filter, such as trim or selectattr(...), makes of a value."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = ast.unparse(call.func)
    arguments = [_value(argument, names) for argument in call.args]
    if name in ("selectattr", "rejectattr") and arguments[1:2] == ["equalto"]:
        attribute, _, wanted = arguments
        keeps_equal = name == "selectattr"
        return [item for item in value if (item.get(attribute) == wanted) == keeps_equal]
    require(not arguments, f"it uses the filter {ast.unparse(node)[:60]!r}")
    if name in ("trim", "upper", "lower"):
        return {"trim": str.strip, "upper": str.upper, "lower": str.lower}[name](value)
    if name in ("length", "count"):
        return len(value)
    require(name == "list" and isinstance(value, list), f"it uses the filter {name[:60]!r}")
    return value


def _call(node, names):
    """Return what a method of a text returns."""
    require(isinstance(node.func, ast.Attribute), f"it calls {ast.unparse(node)[:60]!r}")
    value = _value(node.func.value, names)
    is_known = isinstance(value, str) and node.func.attr in METHODS
    require(is_known, f"it calls {ast.unparse(node)[:60]!r}")
    return getattr(value, node.func.attr)(*[_value(argument, names) for argument in node.args])


def _compare(node, names):
    """Return the result of a comparison, or of a test such as "is defined"."""
    require(len(node.ops) == 1, f"it uses {ast.unparse(node)[:60]!r}")
    operator = type(node.ops[0])
    left = _value(node.left, names)
    if operator in (ast.Is, ast.IsNot):
        return _is_of_type(left, node) == (operator is ast.Is)
    right = _value(node.comparators[0], names)
    if operator in (ast.Eq, ast.NotEq):
        return (left == right) == (operator is ast.Eq)
    if operator in (ast.In, ast.NotIn):
        return (left in right) == (operator is ast.In)
    require(type(left) is int and type(right) is int, f"it uses {ast.unparse(node)[:60]!r}")
    comparisons = {ast.Lt: left < right, ast.LtE: left <= right, ast.Gt: left > right}
    return comparisons.get(operator, left >= right)


def _is_of_type(value, node):
    """Return the result of a test such as `value is string`."""
    type_name = ast.unparse(node.comparators[0]).lower()
    if type_name == "defined":
        return value is not None
    require(type_name in TYPES, f"it uses {ast.unparse(node)[:60]!r}")
    return isinstance(value, TYPES[type_name])


def _boolean(node, names):
    """Return the value of "and" or "or", which stop at the first value that decides."""
    is_and = isinstance(node.op, ast.And)
    value = None
    for operand in node.values:
        value = _value(operand, names)
        if bool(value) != is_and:
            break
    return value


def _not(node, names):
    """Return the opposite of a condition."""
    require(isinstance(node.op, ast.Not), f"it uses {ast.unparse(node)[:60]!r}")
    return not _value(node.operand, names)


def _choice(node, names):
    """Return one of two values, as in `a if condition else b`."""
    return _value(node.body if _value(node.test, names) else node.orelse, names)


# How each kind of expression is evaluated.
EVALUATORS = {
    ast.Constant: _constant,
    ast.List: _list,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.Subscript: _subscript,
    ast.BinOp: _binary,
    ast.Call: _call,
    ast.Compare: _compare,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _not,
    ast.IfExp: _choice,
}
