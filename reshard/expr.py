"""Expressions over config.json, as descriptors write them: parsed by Python's own grammar, evaluated by us, never by ``eval``.

Allowed: integers, true/false, names, strings (to compare with), lists, ``+ - * / // %``, comparisons, ``in``, ``and or not``,
``x if c else y``, and the functions ``ceil_to(n, multiple)`` and ``len(list)``. ``/`` must divide exactly. A name is looked up in the scope; a dotted name goes into nested
tables of config.json.
"""

import ast
import operator
from collections.abc import Mapping
from functools import lru_cache

from reshard.errors import LayoutError
from reshard.stores.foreign import quote

_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
               ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}  # fmt: skip
_CONSTANTS = {"true": True, "false": False, "null": None}


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    if len(text) > 500:
        raise LayoutError(f"expression of {len(text)} characters is longer than 500: {text[:40]!r}…")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise LayoutError(f"cannot parse expression {text!r}") from None


def evaluate(text: str, scope: Mapping[str, object]) -> object:
    """The value of `text` in `scope`. Raises LayoutError that quotes the expression."""

    def value(node: ast.expr) -> object:
        match node:
            case ast.Constant(value=int() | str() as constant):
                return constant
            case ast.Name(id=name):
                if name in _CONSTANTS:
                    return _CONSTANTS[name]
                if name not in scope:
                    raise LayoutError(f"{text!r}: config.json has no {name!r}", "give it in the descriptor's [defaults], or check the config")
                return scope[name]
            case ast.Attribute(value=inner, attr=name):
                table = value(inner)
                return table.get(name) if isinstance(table, Mapping) else None
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [value(item) for item in items]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not truth(value(operand))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -_integer(value(operand))
            case ast.BoolOp(op=op, values=items):
                stop_at = isinstance(op, ast.Or)
                result: object = None
                for item in items:
                    result = value(item)
                    if truth(result) == stop_at:
                        break
                return result
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return value(body) if truth(value(test)) else value(orelse)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                a = value(left)
                for op, comparator in zip(ops, comparators):
                    b = value(comparator)
                    if type(op) not in _COMPARE:
                        raise LayoutError(f"{text!r}: {type(op).__name__} is not allowed in an expression")
                    try:
                        if not _COMPARE[type(op)](a, b):
                            return False
                    except TypeError:
                        raise LayoutError(f"{text!r}: cannot compare {quote(repr(a))} with {quote(repr(b))}") from None
                    a = b
                return True
            case ast.BinOp(left=left, op=op, right=right):
                a, b = _integer(value(left)), _integer(value(right))
                if isinstance(op, (ast.Div, ast.FloorDiv, ast.Mod)) and b == 0:
                    raise LayoutError(f"{text!r}: division of {a} by zero")
                if isinstance(op, ast.Div):
                    if a % b:
                        raise LayoutError(f"{text!r}: {a} is not divisible by {b}")
                    return a // b
                if type(op) in _ARITHMETIC:
                    return _ARITHMETIC[type(op)](a, b)
            case ast.Call(func=ast.Name(id="ceil_to"), args=[n, multiple], keywords=[]):
                size, unit = _integer(value(n)), _integer(value(multiple))
                return -(-size // unit) * unit
            case ast.Call(func=ast.Name(id="len"), args=[items], keywords=[]):
                return len(value(items) or ())
        raise LayoutError(f"{text!r}: {type(node).__name__} is not allowed in an expression")

    def truth(x: object) -> bool:
        if x is not None and not isinstance(x, (int, float)):
            raise LayoutError(f"{text!r}: expected true or false, got {quote(repr(x))}", "check config.json")
        return bool(x)

    def _integer(x: object) -> int:
        if not isinstance(x, int):
            raise LayoutError(f"{text!r}: expected a whole number, got {quote(repr(x))}", "check config.json")
        return int(x)

    return value(_parse(text))


def holds(condition: str, scope: Mapping[str, object]) -> bool:
    """Whether `condition` is true in `scope`. Raises LayoutError, also for what is neither true nor false."""
    return evaluate(f"not not ({condition})", scope) if condition != "true" else True
