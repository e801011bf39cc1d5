"""Evaluate the expressions of a chat template: what Jinja writes between {{ and }}.

Nothing of the file is run. Nearly every expression of Jinja is an expression of Python too. So
Python parses it into a tree of nodes (its module ast), and this module computes the value of each
node from those below it. Whatever it does not know is refused.

Jinja's | and ~ bind more tightly than Python's. Before Python parses an expression, they become
** and @, which bind as tightly as Jinja needs. A template that contains ** or @ is refused.

    'a' + x | trim     becomes   'a' + x ** trim     a filter takes the x alone
    'a' + x ~ 'b'      becomes   'a' + x @ 'b'       "~" joins texts
"""

import ast
import operator
import re
from collections.abc import Iterator

# What Jinja and Python write differently. Literals are matched as a whole, so that a "~" inside of
# one is not taken for an operator.
LITERAL_OR_OPERATOR = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\*\*|[@|~\n]", re.DOTALL)
ESCAPE_OR_LINE_BREAK = re.compile(r"\\.|\n", re.DOTALL)
IN_PYTHON = {"|": "**", "~": "@", "\n": " "}
MAX_LENGTH = 100_000  # of a template, and of any text in it
CONSTANTS = {"true": True, "false": False, "none": None}
METHODS = ("upper", "lower", "title", "capitalize", "strip", "lstrip", "rstrip", "startswith")
TEXT_FILTERS = {"trim": str.strip, "upper": str.upper, "lower": str.lower}
EQUALITIES = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
INEQUALITIES = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
INTEGER_OPERATORS = {ast.Sub: operator.sub, ast.Mod: operator.mod}


class Undefined:
    """The type of a variable or a field that is not set. It is false, and Jinja writes nothing."""

    def __bool__(self):
        """Return False."""
        return False


UNDEFINED = Undefined()


class Loop(dict):
    """The fields of the variable `loop`, all of which are set. A template may ask for no other."""


# What "is" asks for: `x is string`.
TYPES = {
    "none": (type(None),),
    "undefined": (Undefined,),
    "string": (str,),
    "mapping": (dict,),
    "sequence": (str, list, dict, Undefined),
    "iterable": (str, list, dict, Undefined, Iterator),
}


class UnreadableTemplate(ValueError):
    """A chat template uses something that is not known here."""


def require(condition, message):
    """Raise UnreadableTemplate with this message unless the condition holds."""
    if not condition:
        raise UnreadableTemplate(message)


def require_known(condition, node):
    """Raise UnreadableTemplate that shows the expression of a node unless the condition holds."""
    if not condition:
        expression = ast.unparse(node).replace(" ** ", " | ").replace(" @ ", " ~ ")
        raise UnreadableTemplate(f"it uses {expression[:60]!r}")


def checked_text(text) -> str:
    """Return a text. Raises UnreadableTemplate if it grows without a bound."""
    require(len(text) <= MAX_LENGTH, "it writes too much")
    return text


def evaluate(expression, variables):
    """Return the value of an expression of Jinja. A variable that is not set is UNDEFINED."""
    python_expression = LITERAL_OR_OPERATOR.sub(_in_python, expression)
    try:
        tree = ast.parse(python_expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        raise UnreadableTemplate(f"it uses {expression[:60]!r}") from None
    return _evaluate_node(tree.body, variables)


def _in_python(match):
    """Return a literal of Jinja, an operator or a line break as Python writes it."""
    matched_text = match[0]
    require(matched_text not in ("**", "@"), f"it uses {matched_text}")
    if matched_text in IN_PYTHON:
        return IN_PYTHON[matched_text]
    return ESCAPE_OR_LINE_BREAK.sub(_in_literal, matched_text)


def _in_literal(match):
    """Return an escape or a line break of a literal as Python writes it.

    Escapes are the same in both languages. A backslash before a line break drops both.
    """
    return "\\n" if match[0] == "\n" else match[0]


def _evaluate_node(node, variables):
    """Return the value of an expression that Python has parsed."""
    evaluate_node = EVALUATORS.get(type(node))
    require_known(evaluate_node is not None, node)
    return evaluate_node(node, variables)


# --- one function for each kind of node, with the node and the variables as arguments ---


def _constant(node, variables):
    """Return the value of a literal."""
    return node.value


def _list(node, variables):
    """Return a list of values."""
    return _evaluate_all(node.elts, variables)


def _evaluate_all(nodes, variables):
    """Return the values of several nodes."""
    return [_evaluate_node(node, variables) for node in nodes]


def _variable(node, variables):
    """Return the value of a variable, or of a constant such as true."""
    if node.id in CONSTANTS:
        return CONSTANTS[node.id]
    return variables.get(node.id, UNDEFINED)


def _attribute(node, variables):
    """Return a field, as in message.role."""
    container = _evaluate_node(node.value, variables)
    return _field(container, node.attr, node)


def _field(container, name, node):
    """Return a field of a message or of a loop. One that a message lacks is UNDEFINED."""
    require_known(isinstance(container, dict), node)
    require_known(not hasattr(dict, str(name)), node)  # Jinja takes "items" for the method
    require_known(name in container or not isinstance(container, Loop), node)
    return container.get(name, UNDEFINED)


def _subscript(node, variables):
    """Return an item, as in message['role'], messages[0] or messages[1:]."""
    container = _evaluate_node(node.value, variables)
    if isinstance(node.slice, ast.Slice):
        require_known(node.slice.step is None, node)
        start = _evaluate_bound(node.slice.lower, variables)
        stop = _evaluate_bound(node.slice.upper, variables)
        return container[start:stop]
    key = _evaluate_node(node.slice, variables)
    if isinstance(container, dict):
        return _field(container, key, node)
    return container[key]


def _evaluate_bound(node, variables):
    """Return the start or the end of a slice, None if it is left out."""
    if node is None:
        return None
    return _evaluate_node(node, variables)


def _binary(node, variables):
    """Return a sum, a difference, a remainder, or what filters make of a value."""
    # 1. A filter, which "|" stands before.
    left = _evaluate_node(node.left, variables)
    if isinstance(node.op, ast.Pow):
        return _apply_filters(node.right, left, variables)

    # 2. A difference or a remainder.
    right = _evaluate_node(node.right, variables)
    if type(node.op) in INTEGER_OPERATORS:
        require_known(_are_integers(left, right), node)
        require_known(isinstance(node.op, ast.Sub) or right != 0, node)
        return INTEGER_OPERATORS[type(node.op)](left, right)

    # 3. A sum of two texts, lists or integers. "~" is one of texts.
    if isinstance(node.op, ast.MatMult):
        left = _text_to_join(left, node)
        right = _text_to_join(right, node)
    require_known(isinstance(node.op, ast.Add | ast.MatMult), node)
    require_known(type(left) is type(right), node)
    if isinstance(left, str | list):
        require(len(left) + len(right) <= MAX_LENGTH, "it writes too much")
    return left + right


def _text_to_join(value, node):
    """Return a text that "~" joins to another one. What is not set is an empty text."""
    if value is UNDEFINED:
        return ""
    require_known(isinstance(value, str), node)
    return value


def _apply_filters(node, value, variables):
    """Return what one filter after the other makes of a value: x | trim | lower.

    Python groups x ** trim ** lower from the right, so the node holds all filters.
    """
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        value = _apply_filter(node.left, value, variables)
        node = node.right
    return _apply_filter(node, value, variables)


def _apply_filter(node, value, variables):
    """Return what the filter of a node, such as trim or selectattr(...), makes of a value."""
    # 1. Find its name and its arguments.
    name_node = node
    arguments = []
    if isinstance(node, ast.Call):
        name_node = node.func
        arguments = _evaluate_arguments(node, variables)
    name = ast.unparse(name_node)

    # 2. A filter with arguments keeps the items of a list that have a value in a field, or others.
    if arguments:
        is_selection = name in ("selectattr", "rejectattr") and len(arguments) == 3
        require_known(is_selection and arguments[1] == "equalto", node)
        field, _, wanted = arguments
        keeps_equal = name == "selectattr"
        kept = []
        for item in value:
            is_equal = _field(item, field, node) == wanted
            if is_equal == keeps_equal:
                kept.append(item)
        return iter(kept)  # as in Jinja, where it has no length and is true even if it is empty

    # 3. A filter without arguments.
    if name in TEXT_FILTERS:
        return TEXT_FILTERS[name](value)
    if name in ("length", "count"):
        return len(value)
    require_known(name == "list" and isinstance(value, list | Iterator), node)
    return list(value)


def _call(node, variables):
    """Return what a method of a text returns."""
    function = node.func
    require_known(isinstance(function, ast.Attribute), node)
    text = _evaluate_node(function.value, variables)
    require_known(isinstance(text, str) and function.attr in METHODS, node)
    method = getattr(text, function.attr)
    arguments = _evaluate_arguments(node, variables)
    return method(*arguments)


def _evaluate_arguments(node, variables):
    """Return the arguments of a call. Raises UnreadableTemplate if one of them has a name."""
    require_known(not node.keywords, node)
    return _evaluate_all(node.args, variables)


def _compare(node, variables):
    """Return the result of a comparison, or of a test such as "is defined"."""
    # 1. A test has the name of a type on its right.
    require_known(len(node.ops) == 1, node)  # not 1 < 2 < 3
    comparison = type(node.ops[0])
    left = _evaluate_node(node.left, variables)
    if comparison in (ast.Is, ast.IsNot):
        # In Jinja a test takes the b of `a + b is string` alone, as a filter does.
        is_operation = isinstance(node.left, ast.BinOp) and not isinstance(node.left.op, ast.Pow)
        require_known(not is_operation, node)
        is_of_type = _is_of_type(left, node)
        return is_of_type if comparison is ast.Is else not is_of_type

    # 2. A comparison has another value there.
    right = _evaluate_node(node.comparators[0], variables)
    if comparison is ast.In:
        return left in right
    if comparison is ast.NotIn:
        return left not in right
    if comparison in EQUALITIES:
        return EQUALITIES[comparison](left, right)
    require_known(_are_integers(left, right), node)
    return INEQUALITIES[comparison](left, right)


def _is_of_type(value, node):
    """Return the result of a test such as `value is string`."""
    type_name = ast.unparse(node.comparators[0]).lower()
    if type_name == "defined":
        return value is not UNDEFINED
    require_known(type_name in TYPES, node)
    return isinstance(value, TYPES[type_name])


def _are_integers(left, right):
    """Return whether both values are whole numbers, which booleans are not."""
    return type(left) is int and type(right) is int


def _boolean(node, variables):
    """Return the value of "and" or "or", which stop at the first value that decides."""
    is_and = isinstance(node.op, ast.And)
    value = None
    for operand in node.values:
        value = _evaluate_node(operand, variables)
        if bool(value) != is_and:
            break
    return value


def _unary(node, variables):
    """Return the opposite of a condition, or a negative integer."""
    operand = _evaluate_node(node.operand, variables)
    if isinstance(node.op, ast.Not):
        return not operand
    # In `-1 | x` Jinja applies the filter to -1, and Python would apply it to 1. So a minus may
    # stand only before a literal integer.
    is_literal = isinstance(node.operand, ast.Constant) and type(operand) is int
    require_known(isinstance(node.op, ast.USub) and is_literal, node)
    return -operand


def _choice(node, variables):
    """Return one of two values, as in `a if condition else b`."""
    if _evaluate_node(node.test, variables):
        return _evaluate_node(node.body, variables)
    return _evaluate_node(node.orelse, variables)


EVALUATORS = {
    ast.Constant: _constant,
    ast.List: _list,
    ast.Name: _variable,
    ast.Attribute: _attribute,
    ast.Subscript: _subscript,
    ast.BinOp: _binary,
    ast.Call: _call,
    ast.Compare: _compare,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.IfExp: _choice,
}
