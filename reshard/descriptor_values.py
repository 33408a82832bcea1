"""Single values in a descriptor, checked: texts, expressions, dims, names with {layer} in them. ``At`` says where one stands."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import LayoutError
from reshard.expr import Expression, check
from reshard.foreign import quote
from reshard.layout import INDEX_AXES

STAGES = ("first", "last", "all")
_DIMS = re.compile(r" ?(?:\{\w+\} ?)*(?:(?:\([\w* ]+\)|\w+\*?) ?)*", re.ASCII)
_LONGEST = 250  # of a tensor's name, and of dims


@dataclass(frozen=True)
class At:
    """A place in a descriptor: which file, and which table and key in it. Values read there are checked, or fail by its name."""

    layout: str
    place: str = ""

    def __truediv__(self, part: str) -> "At":
        return At(self.layout, f"{self.place} {part}".strip())

    def __str__(self) -> str:
        return f"layout {self.layout}: {self.place}" if self.place else f"layout {self.layout}"

    def fail(self, message: str, hint: str | None = None) -> NoReturn:
        raise LayoutError(f"{self}: {message}", hint)

    def table(self, value: object, expected: str = "a table") -> dict:
        if not isinstance(value, dict):
            self.fail(f"expected {expected}, got {quote(repr(value))}")
        return value

    def keys(self, table: dict, allowed: Collection[str]) -> None:
        unknown = sorted(set(table) - set(allowed))
        if unknown:
            self.fail(f"unknown key {unknown[0]!r}", f"known keys: {', '.join(sorted(allowed))}")

    def text(self, value: object) -> str:
        if not isinstance(value, str):
            raise LayoutError(f"{self} must be a text, got {quote(repr(value))}")
        return value

    def texts(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise LayoutError(f"{self} must be a list of texts, got {quote(repr(value))}")
        return tuple(value)

    def expression(self, value: object) -> Expression:
        if not isinstance(value, str):
            raise LayoutError(f"{self} must be an expression in quotes, got {quote(repr(value))}")
        expression = Expression(value, str(self))
        check(expression)
        return expression

    def when(self, table: dict) -> Expression | str:
        value = table.get("when", "true")
        return "true" if value in (True, "true") else (self / "when").expression("false" if value is False else value)

    def choice(self, key: str, value: object, allowed: Collection[str]) -> str:
        if not isinstance(value, str) or value not in allowed:
            words = ", ".join(allowed) if len(allowed) > 2 else " or ".join(allowed)
            self.fail(f"{key} must be {'one of ' if len(allowed) > 2 else ''}{words}, got {quote(repr(value))}")
        return value

    def flag(self, key: str, table: dict) -> bool:
        if not isinstance(table.get(key, False), bool):
            self.fail(f"{key} must be true or false, got {quote(repr(table[key]))}")
        return table.get(key, False)

    def version(self, value: object, parse: Callable[[str], object]) -> None:
        if not isinstance(value, str):
            self.fail(f"expected a version in quotes, got {quote(repr(value))}")
        try:
            parse(value)
        except LayoutError as error:
            self.fail(str(error), error.hint)

    def known_axis(self, axis: str, axes: Mapping[str, str]) -> str:
        if axis not in axes:
            raise LayoutError(f"{self} uses axis {axis!r}, which [axes] does not define")
        return axis

    def template(self, text: str, fields: Collection[str]) -> set[str]:
        """The fields of a name such as ``layers.{layer}.w``, each one of `fields`; braces have no other use in one."""
        used = re.findall(r"\{(\w+)\}", text, re.ASCII)
        left = re.sub(r"\{\w+\}", "", text, flags=re.ASCII)
        if "{" in left or "}" in left:
            self.fail(f"cannot read the name {quote(repr(text))}: a brace is not closed, or holds more than a word")
        if not text or len(text) > _LONGEST:
            self.fail(f"a name of {len(text)} characters", f"it may have 1 to {_LONGEST}")
        odd = next((field for field in used if field not in fields), None)
        if odd is not None:
            self.fail(f"{quote(repr(text))} has a field {{{odd}}}: names and tensors must be numbered alike",
                      f"here it may have {', '.join(f'{{{field}}}' for field in fields) or 'none'}")  # fmt: skip
        return set(used)


def dtype_of(at: At, word: object) -> str | None:
    if word is not None and (not isinstance(word, str) or word not in DTYPE_SIZE):
        at.fail(f"unknown dtype {quote(repr(word))}", f"known: {', '.join(DTYPE_SIZE)}")
    return word


def read_dims(at: At, text: object, axes: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """``{layer} (kv* group* head) hidden`` as index axes, dims of axes, and starred axes."""
    plain = " ".join(text.split()) if isinstance(text, str) else ""
    if not isinstance(text, str) or len(plain) > _LONGEST or not _DIMS.fullmatch(plain):
        at.fail(f"cannot read dims {quote(repr(text))}", 'write them like "{layer} (kv* head) hidden"')
    index = tuple(re.findall(r"\{(\w+)\}", plain))
    dims, split = [], []
    for group, single in re.findall(r"\(([^)]*)\)|([\w*]+)", re.sub(r"\{\w+\}", " ", plain)):
        words = (group or single).split()
        split += [word.rstrip("*") for word in words if word.endswith("*")]
        dims.append(tuple(at.known_axis(word.rstrip("*"), axes) for word in words if word != "1"))
    for axis in index:
        if axis not in INDEX_AXES:
            at.fail(f"{{{axis}}} must be one of {', '.join(f'{{{known}}}' for known in INDEX_AXES)}")
        at.known_axis(axis, axes)
    if index != tuple(axis for axis in INDEX_AXES if axis in index):
        at.fail(f"{text!r} must be numbered by {', '.join(f'{{{known}}}' for known in INDEX_AXES)}, in this order and each once")
    flat = [*index, *(axis for dim in dims for axis in dim)]
    if len(set(flat)) != len(flat):
        at.fail(f"an axis stands twice in {text!r}")
    return index, tuple(dims), tuple(split)
