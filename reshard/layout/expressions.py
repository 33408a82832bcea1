"""Expressions over config.json, as descriptors write them: parsed by Python's own grammar, evaluated by us, never by ``eval``.

Allowed: integers, true/false/null, names, texts, lists, ``+ - * / // %``, comparisons, ``in``, ``and or not``,
``x if c else y``, subscripts ``list[n]``, and the functions ``ceil_to(n, multiple)`` and ``len(list)``. ``/`` must divide
exactly; no number may reach 2⁶³. A name is looked up in the scope; a dotted name goes into nested tables of config.json.
"""

import ast
import operator
from collections.abc import Mapping
from functools import lru_cache

from reshard.errors import LayoutError
from reshard.stores.foreign import quote

_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CONSTANTS = {"true": True, "false": False, "null": None}
_FUNCTIONS = {"ceil_to": 2, "len": 1}
#: sizes and offsets are 64-bit numbers everywhere below
_LIMIT = 2**63


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    if len(text) > 500:
        raise LayoutError(f"expression of {len(text)} characters is longer than 500: {text[:40]!r}…")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise LayoutError(f"cannot parse expression {text!r}") from None


@lru_cache(maxsize=4096)
def names_in(text: str) -> frozenset[str]:
    """The names that expression `text` looks up. Raises LayoutError where it cannot be parsed."""
    tree = _parse(text)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return frozenset(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in _CONSTANTS and id(node) not in called
    )


def evaluate(text: str, scope: Mapping[str, object]) -> object:
    """The value of `text` in `scope`. Raises LayoutError that quotes the expression."""

    def value(node: ast.expr) -> object:
        match node:
            case ast.Constant(value=int() | str() as constant):
                return constant
            case ast.Name(id=name):
                if name in _CONSTANTS:
                    return _CONSTANTS[name]
                try:
                    return scope[name]
                except KeyError:
                    hint = "give it in the descriptor's [defaults], or check the config"
                    raise LayoutError(f"{text!r}: config.json has no {name!r}", hint) from None
            case ast.Attribute(value=inner, attr=name):
                table = value(inner)
                return table.get(name) if isinstance(table, Mapping) else None
            case ast.Subscript(value=inner, slice=at):
                return _item(value(inner), value(at))
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
                return _compared(value(left), ops, [value(comparator) for comparator in comparators])
            case ast.BinOp(left=left, op=op, right=right):
                return _computed(op, _integer(value(left)), _integer(value(right)))
            case ast.Call(func=ast.Name(id="ceil_to"), args=[n, multiple], keywords=[]):
                size, unit = _integer(value(n)), _integer(value(multiple))
                if unit < 1:
                    raise LayoutError(f"{text!r}: cannot round up to a multiple of {unit}")
                return _integer(-(-size // unit) * unit)
            case ast.Call(func=ast.Name(id="len"), args=[items], keywords=[]):
                held = value(items)
                if held is not None and not isinstance(held, list | str | Mapping):
                    raise LayoutError(f"{text!r}: {quote(repr(held))} has no length", "check config.json")
                return len(held or ())
            case ast.Call(func=ast.Name(id=name), args=given) if name in _FUNCTIONS:
                raise LayoutError(f"{text!r}: {name} takes {_FUNCTIONS[name]} arguments, got {len(given)}")
        raise LayoutError(f"{text!r}: {type(node).__name__} is not allowed in an expression")

    def _compared(a: object, ops: list[ast.cmpop], others: list[object]) -> bool:
        for op, b in zip(ops, others):
            if type(op) not in _COMPARE:
                raise LayoutError(f"{text!r}: {type(op).__name__} is not allowed in an expression")
            try:
                if not _COMPARE[type(op)](a, b):
                    return False
            except TypeError:
                raise LayoutError(f"{text!r}: cannot compare {quote(repr(a))} with {quote(repr(b))}") from None
            a = b
        return True

    def _computed(op: ast.operator, a: int, b: int) -> int:
        if isinstance(op, ast.Div | ast.FloorDiv | ast.Mod) and b == 0:
            raise LayoutError(f"{text!r}: division of {a} by zero")
        if isinstance(op, ast.Div):
            if a % b:
                raise LayoutError(f"{text!r}: {a} is not divisible by {b}")
            return a // b
        if type(op) not in _ARITHMETIC:
            raise LayoutError(f"{text!r}: BinOp is not allowed in an expression")
        return _integer(_ARITHMETIC[type(op)](a, b))

    def _item(held: object, at: object) -> object:
        """Of a table by its key (a number's text is one), else by number; null where a table or null has none."""
        if held is None:
            return None
        if isinstance(held, Mapping):
            return held.get(str(at) if isinstance(at, int) else at) if isinstance(at, int | str) else None
        if not isinstance(held, list | str):
            raise LayoutError(f"{text!r}: {quote(repr(held))} is no list", "check config.json")
        number = _integer(at)
        if not 0 <= number < len(held):
            raise LayoutError(f"{text!r}: there is no item {number}, it has {len(held)}", "check config.json")
        return held[number]

    def truth(x: object) -> bool:
        if x is not None and not isinstance(x, int | float):
            raise LayoutError(f"{text!r}: expected true or false, got {quote(repr(x))}", "check config.json")
        return bool(x)

    def _integer(x: object) -> int:
        if not isinstance(x, int):
            raise LayoutError(f"{text!r}: expected a whole number, got {quote(repr(x))}", "check config.json")
        if not -_LIMIT < x < _LIMIT:
            raise LayoutError(f"{text!r}: {quote(x)} is too large: numbers must stay below 2^63", "check config.json")
        return int(x)

    return value(_parse(text))


def holds(condition: str, scope: Mapping[str, object]) -> bool:
    """Whether `condition` is true in `scope`. Raises LayoutError, also for what is neither true nor false."""
    return evaluate(f"not not ({condition})", scope) if condition != "true" else True


def both(*conditions: str | None) -> str:
    """The condition that holds where all of `conditions` do."""
    kept = list(dict.fromkeys(c for c in conditions if c is not None and c != "true"))
    return " and ".join(f"({c})" for c in kept) if len(kept) > 1 else kept[0] if kept else "true"
