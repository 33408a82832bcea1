"""Expressions over config.json, as descriptors write them: parsed by Python's own grammar, evaluated by us, never by ``eval``.

Allowed: integers, true/false/null, names, texts, lists, ``+ - * / // %``, comparisons, ``in``, ``and or not``,
``x if c else y``, subscripts of lists, texts and tables, and the functions ``ceil_to(n, multiple)`` and ``len(list)``. ``/`` must
divide exactly, and no number may reach 2⁶³. A name is looked up in the scope; a dotted name goes into nested tables.
"""

import ast
import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Self

from reshard.errors import LayoutError
from reshard.foreign import quote

_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
               ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Div: operator.floordiv}  # fmt: skip
_CONSTANTS = {"true": True, "false": False, "null": None}
_FUNCTIONS = {"ceil_to": 2, "len": 1}
#: sizes and counts are below this: a tower of squares would otherwise compute for hours
_LARGEST = 1 << 63
#: of operators inside one another
_DEEPEST = 40


class Expression(str):
    """The text of an expression that remembers where it stands, such as ``layout llama: [axes] kv``, for its errors."""

    __slots__ = ("where",)
    where: str

    def __new__(cls, text: str, where: str = "") -> Self:
        self = super().__new__(cls, text)
        self.where = where
        return self

    def __reduce__(self):
        return type(self), (str(self), self.where)


def check(text: str) -> None:
    """Raises LayoutError for a text that is no expression, whatever the scope."""
    try:
        _parse(str(text))
    except LayoutError as error:
        raise LayoutError(_located(text, str(error)), error.hint) from None


def evaluate(text: str, scope: Mapping[str, object]) -> object:
    """The value of `text` in `scope`. Raises LayoutError that quotes the expression, and says where it stands."""
    try:
        return _evaluate(text, scope)
    except LayoutError as error:
        where = getattr(text, "where", "")
        raise LayoutError(_located(text, str(error)), error.hint) if where and where not in str(error) else error from None


def names_in(text: str) -> frozenset[str]:
    """The names that expression `text` looks up."""
    return _names(str(text))


@lru_cache(maxsize=4096)
def _names(text: str) -> frozenset[str]:
    nodes = list(ast.walk(_parse(text)))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name) and node.id not in _CONSTANTS and id(node) not in called)


def both(*conditions: str) -> str:
    """The condition that holds where all of `conditions` do. Its errors name the place of the last."""
    kept = list(dict.fromkeys(condition for condition in conditions if condition != "true"))
    if len(kept) < 2:
        return kept[0] if kept else "true"
    return Expression(" and ".join(f"({condition})" for condition in kept), getattr(kept[-1], "where", ""))


def holds(condition: str, scope: Mapping[str, object]) -> bool:
    """Whether `condition` is true in `scope`. Raises LayoutError, also for what is neither true nor false."""
    return True if condition == "true" else _truth(condition, evaluate(condition, scope))


def _located(text: str, message: str) -> str:
    where = getattr(text, "where", "")
    return f"{where}: {message}" if where else message


def _error(text: str, message: str, hint: str | None = None) -> LayoutError:
    return LayoutError(_located(text, f"{str(text)!r}: {message}"), hint)


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    if len(text) > 500:
        raise LayoutError(f"expression of {len(text)} characters is longer than 500: {text[:40]!r}…")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise LayoutError(f"cannot parse expression {text!r}") from None
    level, depth = [tree], 0
    while level:
        depth += 1
        for node in level:
            _allowed(text, node)
        level = [child for node in level for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    if depth > _DEEPEST:
        raise LayoutError(f"expression {text[:40]!r}… is nested {depth} deep, more than the {_DEEPEST} allowed")
    return tree


def _allowed(text: str, node: ast.expr) -> None:
    match node:
        case ast.Constant(value=int() | str() as value) if type(value) in (int, str) and (type(value) is str or value < _LARGEST):
            return
        case ast.Subscript(slice=at) if not isinstance(at, ast.Slice):
            return
        case ast.Name() | ast.Attribute() | ast.List() | ast.Tuple() | ast.BoolOp() | ast.IfExp():
            return
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return
        case ast.Compare(ops=ops) if all(type(op) in _COMPARE for op in ops):
            return
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            return
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if _FUNCTIONS.get(name) == len(args):
            return
    raise LayoutError(f"{text!r}: {type(node).__name__} is not allowed in an expression", f"allowed functions: {', '.join(_FUNCTIONS)}")


def _evaluate(text: str, scope: Mapping[str, object]) -> object:
    def value(node: ast.expr) -> object:
        match node:
            case ast.Constant(value=constant):
                return constant
            case ast.Name(id=name):
                return named(name)
            case ast.Attribute(value=inner, attr=name):
                table = value(inner)
                return table.get(name) if isinstance(table, Mapping) else None
            case ast.Subscript(value=inner, slice=at):
                return _item(text, value(inner), value(at))
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [value(item) for item in items]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not _truth(text, value(operand))
            case ast.UnaryOp(operand=operand):
                return -_integer(text, value(operand))
            case ast.BoolOp(op=op, values=items):
                stop_at = isinstance(op, ast.Or)
                result: object = None
                for item in items:
                    result = value(item)
                    if _truth(text, result) == stop_at:
                        break
                return result
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return value(body) if _truth(text, value(test)) else value(orelse)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                a = value(left)
                for op, comparator in zip(ops, comparators):
                    b = value(comparator)
                    try:
                        if not _COMPARE[type(op)](a, b):
                            return False
                    except (TypeError, RecursionError):
                        raise _error(text, f"cannot compare {_shown(a)} with {_shown(b)}") from None
                    a = b
                return True
            case ast.BinOp(left=left, op=op, right=right):
                return computed(op, _integer(text, value(left)), _integer(text, value(right)))
            case ast.Call(func=ast.Name(id="ceil_to"), args=[n, multiple]):
                size, unit = _integer(text, value(n)), _integer(text, value(multiple))
                if unit < 1:
                    raise _error(text, f"ceil_to a multiple of {unit}")
                return -(-size // unit) * unit
            case ast.Call(args=[items]):
                listed = value(items)
                if listed is not None and not isinstance(listed, (list, tuple, str, Mapping)):
                    raise _error(text, f"len of {_shown(listed)}, which is no list", "check config.json")
                return len(listed or ())
        raise AssertionError(node)  # _allowed has seen them all

    def named(name: str) -> object:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        try:
            return scope[name]
        except KeyError:
            hint = "give it in the descriptor's [defaults], or check the config"
            raise _error(text, f"config.json has no {name!r}", hint) from None

    def computed(op: ast.operator, a: int, b: int) -> int:
        if isinstance(op, (ast.Div, ast.FloorDiv, ast.Mod)) and b == 0:
            raise _error(text, f"division of {a} by zero")
        if isinstance(op, ast.Div) and a % b:
            raise _error(text, f"{a} is not divisible by {b}")
        result = _ARITHMETIC[type(op)](a, b)
        if not -_LARGEST < result < _LARGEST:
            raise _error(text, "the result is 2**63 or more", "check config.json")
        return result

    return value(_parse(str(text)))


def _item(text: str, held: object, at: object) -> object:
    """Of a table by its key (a number finds its text), else by number; null where a table, or null, has none."""
    if held is None:
        return None
    if isinstance(held, Mapping):
        return held.get(str(at) if isinstance(at, int) else at) if isinstance(at, (int, str)) else None
    if not isinstance(held, (list, tuple, str)):
        raise _error(text, f"{_shown(held)} is no list", "check config.json")
    number = _integer(text, at)
    if not 0 <= number < len(held):
        raise _error(text, f"there is no item {number}: it has {len(held)}", "check config.json")
    return held[number]


def _truth(text: str, x: object) -> bool:
    if x is not None and not isinstance(x, (int, float)):
        raise _error(text, f"expected true or false, got {_shown(x)}", "check config.json")
    return bool(x)


def _integer(text: str, x: object) -> int:
    if not isinstance(x, int) or not -_LARGEST < x < _LARGEST:
        raise _error(text, f"expected a whole number below 2**63, got {_shown(x)}", "check config.json")
    return int(x)


def _shown(x: object) -> str:
    """`x` as config.json has it, in short."""
    try:
        return quote(repr(x))
    except (ValueError, RecursionError):  # too many digits, or lists in lists in lists
        return f"a {type(x).__name__} too large to show"
