"""Descriptor files: found, read and checked. Every mistake in one is a LayoutError that names file, table and key.

What comes out says the same as the file, typed; how files, parts and places come together is in ``resolve.py``.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from reshard.errors import LayoutError
from reshard.layout.expressions import Expression, check, names_in
from reshard.layout.fusion import Group, parse
from reshard.layout.model import Dims
from reshard.stores import DTYPE_SIZE
from reshard.stores.foreign import quote

#: the tables that say what a format stores
FORMATS = ("hf", "vllm", "sglang", "megatron")
STAGES = ("first", "last", "all")
#: functions of a value that an entry may name
TRANSFORMS = ("minus_exp", "minus_one", "plus_one")
#: names that expressions may use beside config.json, axes and conditions
GIVEN = ("tp", "pp", "ep", "engine", "scheme")
_PART_KEYS = {"description", "at", "replicate", "defaults", "conditions", "axes", "tensors", *FORMATS}
_FILE_KEYS = (_PART_KEYS - {"at"}) | {"architectures", "extends", "place", "part"}
_PLACE_KEYS = {"count", "parts", "optional", "carry", *FORMATS}
_USE_KEYS = {"part", "when", "at"}
_TENSOR_KEYS = {"dims", "when", "stage", "dtype", "optional"}
_ENTRY_KEYS = {
    "name", "of", "dims", "cut", "split", "pad", "align", "when", "stage", "only_rank0", "view", "dtype", "copy", "omit", "until",
    "form", "constant", "shape", "transform", "scheme",
}  # fmt: skip
_CONSTANT_KEYS = {"name", "constant", "dtype", "shape", "when", "until"}
_OMIT_KEYS = {"omit", "when", "of"}
_SECTION_KEYS = {"like", "drop", "omit", "args"}
_GONE = {
    "within": 'write of = "axis: a b"',
    "dim": "tensors are fused along their first dimension, wherever dims puts it",
    "alias": 'write form = "…", copy = true',
    "variants": "write a list of alternatives under the label, with until or form",
    "constants": 'write label = { name = "…", constant = 1.0, dtype = "F32" }',
}


@dataclass(frozen=True)
class RawTensor:
    """`where` names file, table and key, for errors."""

    where: str
    expert: bool
    dims: Dims
    split: tuple[str, ...]
    when: str
    stage: str
    dtype: str | None
    optional: str | None


@dataclass(frozen=True)
class RawEntry:
    """One alternative of one label of one format."""

    where: str
    label: str
    name: str
    fusion: Group | None
    dims: Dims | None = None
    cut: str = "parts"
    split: tuple[str, ...] | None = None
    pad: tuple[tuple[str, str], ...] = ()
    align: str = "1"
    aligned: tuple[tuple[str, str], ...] = ()
    when: str = "true"
    stage: str | None = None
    only_rank0: bool = False
    view: tuple[tuple[int, ...], ...] | None = None
    dtype: str | None = None
    copy: bool = False
    omit: bool = False
    until: str | None = None
    form: str | None = None
    constant: float | None = None
    shape: tuple[int, ...] = ()
    transform: str | None = None
    scheme: str | None = None


@dataclass(frozen=True)
class Table:
    """What one file says of one format; an entry is False where it takes one away."""

    where: str
    like: str | None = None
    drop: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    args: Mapping[str, "str | bool"] = field(default_factory=dict)
    entries: Mapping[str, "tuple[RawEntry, ...] | bool"] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefixes:
    """A place's prefix in one format: the names that files may have it under (the first is written), and those that it
    had up to an engine's release, as (prefix, until)."""

    names: tuple[str, ...]
    older: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Use:
    """A part in a place."""

    where: str
    part: str
    when: str
    at: "str | Mapping[str, str] | None"


@dataclass(frozen=True)
class Part:
    """A part, or what an architecture's own file says in the same tables. Expressions are False where taken away."""

    name: str
    where: str
    description: str = ""
    at: "str | Mapping[str, str]" = ""
    replicate: tuple[str, ...] = ()
    defaults: Mapping[str, "str | bool"] = field(default_factory=dict)
    conditions: Mapping[str, "str | bool"] = field(default_factory=dict)
    axes: Mapping[str, "str | bool"] = field(default_factory=dict)
    tensors: Mapping[str, "RawTensor | bool"] = field(default_factory=dict)
    formats: Mapping[str, "Table | bool"] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    """One descriptor file. `places` are the keys of each, as they overlay those of the parent; False takes one away."""

    own: Part
    path: str  # of the user's own; empty for those that come with reshard
    extends: str | None
    architectures: tuple[str, ...]
    places: Mapping[str, "Mapping[str, object] | bool"]
    parts: Mapping[str, Part]


def layout_dir() -> Path:
    """Where the descriptors lie: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "layouts"
    return inside if inside.is_dir() else package.parent / "layouts"


def read_table(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise LayoutError(f"layout {path}: {quote(error)}") from None


@lru_cache(maxsize=64)
def library_part(name: str) -> Part | None:
    """The part in layouts/parts; None where there is none."""
    path = layout_dir() / "parts" / f"{name}.toml"
    return parse_part(name, f"layout parts/{name}", read_table(path)) if path.is_file() else None


def parse_file(path: Path) -> File:
    builtin = path.parent == layout_dir()
    where = f"layout {path.stem if builtin else path}"
    table = read_table(path)
    _known_keys(where, table, _FILE_KEYS, "tables and keys")
    extends = table.get("extends")
    if extends is not None and not (isinstance(extends, str) and re.fullmatch(r"\w+", extends)):
        raise LayoutError(f"{where}: cannot extend {quote(repr(extends))}", 'write the name of a descriptor: extends = "llama"')
    places = {name: _place(f"{where}: [place.{name}]", value) for name, value in _table(where, "place", table.get("place", {})).items()}
    parts = {
        name: parse_part(name, f"{where}: part.{name}", _table(where, f"part.{name}", value))
        for name, value in _table(where, "part", table.get("part", {})).items()
    }
    own = parse_part(path.stem, where, {key: value for key, value in table.items() if key in _PART_KEYS})
    return File(own, "" if builtin else str(path), extends, _texts(where, "architectures", table.get("architectures", [])), places, parts)


def parse_part(name: str, where: str, table: dict) -> Part:
    _known_keys(where, table, _PART_KEYS, "tables and keys")
    description = table.get("description", "")
    if not isinstance(description, str):
        raise LayoutError(f"{where}: description must be a text, got {quote(repr(description))}")
    at = _at(where, table.get("at", ""))
    tensors = {
        key: value if value is False else _tensor(f"{where}: [tensors] {key}", value)
        for key, value in _table(where, "tensors", table.get("tensors", {})).items()
    }
    formats = {key: _format(where, key, table[key]) for key in FORMATS if key in table}
    defaults, conditions, axes = (_expressions(where, key, table.get(key, {})) for key in ("defaults", "conditions", "axes"))
    for key in {*GIVEN, "platform"} & {*conditions, *axes}:
        raise LayoutError(f"{where}: {key!r} is reserved", f"expressions know {', '.join(GIVEN)}")
    return Part(
        name, where, description, at, _texts(where, "replicate", table.get("replicate", [])), defaults, conditions, axes, tensors, formats
    )


def _place(where: str, value: object) -> dict[str, object] | bool:
    if value is False:
        return False
    if not isinstance(value, dict):
        raise LayoutError(f"{where} must be a table, got {quote(repr(value))}")
    _known_keys(where, value, _PLACE_KEYS, "keys")
    out: dict[str, object] = {}
    for key, given in value.items():
        if key in FORMATS:
            out[key] = given if given is False else _prefixes(f"{where} {key}", given)
        elif key == "count":
            out[key] = _expression(f"{where} count", given)
        elif key == "parts":
            if not isinstance(given, list):
                raise LayoutError(f"{where} parts must be a list, got {quote(repr(given))}")
            out[key] = tuple(_use(f"{where} parts", item) for item in given)
        else:
            out[key] = _flag(f"{where} {key}", given)
    return out


def _prefixes(where: str, value: object) -> Prefixes:
    names, older = [], []
    for item in value if isinstance(value, list) else [value]:
        table = item if isinstance(item, dict) else {"prefix": item}
        _known_keys(where, table, {"prefix", "until"}, "keys")
        prefix = _text(f"{where}: a prefix", table.get("prefix"))
        fields_of(where, prefix)
        if "until" in table:
            older.append((prefix, _until(where, table["until"])))
        else:
            names.append(prefix)
    if not names:
        raise LayoutError(f"{where} needs a prefix without until, got {quote(repr(value))}")
    return Prefixes(tuple(names), tuple(older))


def _until(where: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\d+(\.\d+){0,2}", value):
        raise LayoutError(f"{where}: until = {quote(repr(value))} is not a version", "write it like 0.32")
    return value


def fields_of(where: str, text: str) -> list[str]:
    """What stands in braces in a prefix or a name. Raises LayoutError where braces do not match."""
    if re.fullmatch(r"(?:[^{}]|\{[^{}]+\})*", text) is None:
        raise LayoutError(f"{where}: braces do not match in {quote(repr(text))}")
    found = re.findall(r"\{([^{}]+)\}", text)
    for expression in found:
        _expression(where, expression)
    return found


def _use(where: str, value: object) -> Use:
    table = {"part": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("part"), str):
        raise LayoutError(f'{where}: expected a part\'s name or {{ part = "…" }}, got {quote(repr(value))}')
    _known_keys(f"{where}: {table['part']}", table, _USE_KEYS, "keys")
    if not re.fullmatch(r"\w+", table["part"]):
        raise LayoutError(f"{where}: {quote(repr(table['part']))} is no part's name")
    at = _at(f"{where}: {table['part']}", table["at"]) if "at" in table else None
    return Use(f"{where}: {table['part']}", table["part"], _when(f"{where}: {table['part']}", table), at)


def _at(where: str, value: object) -> "str | dict[str, str]":
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise LayoutError(f"{where}: at must be a text or a table of one per format, got {quote(repr(value))}")
    _known_keys(f"{where}: at", value, set(FORMATS), "formats")
    return value


def parse_dims(where: str, text: object) -> tuple[bool, Dims, tuple[str, ...]]:
    """``{expert} (kv* group* head) hidden`` as (numbered by expert, axes of each dimension, starred axes)."""
    shape = r"\s*(\{\w+\}\s*)*(\(\s*\w+\*?(\s+\w+\*?)*\s*\)|\w+\*?)?(\s+(\(\s*\w+\*?(\s+\w+\*?)*\s*\)|\w+\*?))*\s*"
    if not isinstance(text, str) or len(text) > 500 or not re.fullmatch(shape, text):
        raise LayoutError(f"{where}: cannot read dims {quote(repr(text))}", 'write them like "{expert} (kv* head) hidden"')
    index = re.findall(r"\{(\w+)\}", text)
    if index not in ([], ["expert"]):
        wrong = next((axis for axis in index if axis != "expert"), "expert")
        raise LayoutError(f"{where}: dims may begin with {{expert}} once, not {{{wrong}}}", "layers are numbered by the place, not by dims")
    dims, split = [], []
    for group, single in re.findall(r"\(([^)]*)\)|([\w*]+)", re.sub(r"\{\w+\}", " ", text)):
        words = (group or single).split()
        split += [word.rstrip("*") for word in words if word.endswith("*")]
        dims.append(tuple(word.rstrip("*") for word in words if word != "1"))
    flat = [axis for dim in dims for axis in dim]
    twice = next((axis for axis in flat if flat.count(axis) > 1), None)
    if twice is not None:
        raise LayoutError(f"{where}: an axis stands twice in {quote(repr(text))}: {twice}", "give one of the two another name in [axes]")
    number = next((axis for axis in flat if axis[0].isdigit()), None)
    if number is not None:
        raise LayoutError(f"{where}: {number!r} is no axis in {quote(repr(text))}", "only 1 may stand for itself")
    return bool(index), tuple(dims), tuple(split)


def _tensor(where: str, value: object) -> RawTensor:
    table = {"dims": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise LayoutError(f"{where}: expected dims or a table, got {quote(repr(value))}")
    _known_keys(where, table, _TENSOR_KEYS, "keys")
    expert, dims, split = parse_dims(where, table.get("dims"))
    when = _when(where, table)
    optional = _expression(f"{where}: optional", table["optional"]) if "optional" in table else None
    return RawTensor(where, expert, dims, split, when, _stage(where, table.get("stage", "last")), _dtype(where, table.get("dtype")), optional)


def _format(where: str, format: str, value: object) -> Table | bool:
    if value is False:
        return False
    table = _table(where, format, value)
    at = f"{where}: [{format}]"
    like = table.get("like")
    if like is not None and (like not in FORMATS or like == format):
        raise LayoutError(f"{at} like = {quote(repr(like))}: no other format's table", f"formats are {', '.join(FORMATS)}")
    drop, omit = (_texts(where, f"[{format}] {key}", table.get(key, [])) for key in ("drop", "omit"))
    for pattern in (*drop, *omit):
        fields_of(f"{at} drop", pattern)
    entries: dict[str, tuple[RawEntry, ...] | bool] = {}
    for label, given in table.items():
        if label in _SECTION_KEYS:
            continue
        if label in _GONE:
            raise LayoutError(f"{at}: unknown key {label!r}", _GONE[label])
        if given is False:
            entries[label] = False
            continue
        alternatives = given if isinstance(given, list) else [given]
        if not alternatives:
            raise LayoutError(f"{at} {label}: an empty list of alternatives")
        numbered = [f"{at} {label}" + (f" [{i}]" if len(alternatives) > 1 else "") for i in range(len(alternatives))]
        entries[label] = tuple(_entry(place, label, item) for place, item in zip(numbered, alternatives))
    return Table(at, like, drop, omit, _expressions(where, f"{format}.args", table.get("args", {})), entries)


def _entry(where: str, label: str, value: object) -> RawEntry:
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("name", ""), str) or not ("name" in table or "omit" in table):
        raise LayoutError(f"{where}: expected a name or a table with a name, got {quote(repr(value))}")
    constant, omit = "constant" in table, _flag(f"{where}: omit", table.get("omit", False))
    _known_keys(where, table, _CONSTANT_KEYS if constant else _OMIT_KEYS if omit else _ENTRY_KEYS, "keys")
    when = _when(where, table)
    until, form = _until(where, table["until"]) if "until" in table else None, table.get("form")
    if form is not None and (not isinstance(form, str) or not re.fullmatch(r"\w+", form)):
        raise LayoutError(f"{where}: form = {quote(repr(form))} is no name")
    if until and form:
        raise LayoutError(f"{where}: until and form together", "write one alternative for each")
    name = table.get("name", "")
    for text in fields_of(where, name):
        if text != "expert":
            raise LayoutError(f"{where}: {{{text}}} in {name!r}: only {{expert}} may stand in a name", "numbers of layers stand in the place's prefix")
    if constant:
        return _constant(where, label, table, when, until)
    try:
        fusion = parse(_text(f"{where}: of", table.get("of", label)))
    except ValueError as error:
        raise LayoutError(f"{where}: of = {quote(repr(table.get('of', label)))}: {error}", 'write it like "kv: q k v"') from None
    if omit:
        return RawEntry(where, label, "", fusion, when=when, omit=True)
    dims = parse_dims(where, table["dims"])[1] if "dims" in table else None
    if table.get("cut", "parts") not in ("parts", "whole"):
        raise LayoutError(f"{where}: cut must be parts or whole, got {quote(repr(table['cut']))}")
    if "align" in table and table.get("cut") == "whole":
        raise LayoutError(f'{where}: align does not go with cut = "whole"')
    align, aligned = table.get("align", "1"), ()
    if isinstance(align, dict):
        align, aligned = "1", tuple(_expressions(where, "align", align, False).items())
    view = table.get("view")
    if view is not None and not (isinstance(view, list) and all(isinstance(g, list) and all(type(d) is int for d in g) for g in view)):
        raise LayoutError(f"{where}: view must list, per dimension, the dimensions that it joins, got {quote(repr(view))}")
    transform = table.get("transform")
    if transform is not None and transform not in TRANSFORMS:
        raise LayoutError(f"{where}: unknown transform {quote(repr(transform))}", f"known are {', '.join(TRANSFORMS)}")
    if table.get("scheme", "none") != "none":
        raise LayoutError(f"{where}: scheme = {quote(repr(table['scheme']))}: an entry can only say none", "schemes are not part of the notation yet")
    return RawEntry(
        where, label, name, fusion, dims, table.get("cut", "parts"),
        _texts(where, "split", table["split"]) if "split" in table else None,
        tuple(_expressions(where, "pad", table.get("pad", {}), False).items()), _expression(f"{where}: align", align), aligned, when,
        None if "stage" not in table else _stage(where, table["stage"]), _flag(f"{where}: only_rank0", table.get("only_rank0", False)),
        tuple(map(tuple, view)) if view is not None else None, _dtype(where, table.get("dtype")),
        _flag(f"{where}: copy", table.get("copy", False)), False, until, form, transform=transform, scheme=table.get("scheme"),
    )  # fmt: skip


def _constant(where: str, label: str, table: dict, when: str, until: str | None) -> RawEntry:
    value, shape = table["constant"], table.get("shape", [])
    if isinstance(value, bool) or not isinstance(value, int | float) or table.get("dtype") is None:
        raise LayoutError(f"{where}: a constant needs a value and a dtype, got {quote(repr(value))} and {quote(repr(table.get('dtype')))}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise LayoutError(f"{where}: shape must list the sizes of its dimensions, got {quote(repr(shape))}")
    if not table.get("name"):
        raise LayoutError(f"{where}: a constant needs a name")
    dtype = _dtype(where, table["dtype"])
    return RawEntry(where, label, table["name"], None, when=when, dtype=dtype, until=until, constant=float(value), shape=tuple(shape))


def _known_keys(where: str, table: Mapping[str, object], known: set[str], word: str) -> None:
    for key in sorted(set(table) - known):
        if isinstance(table[key], dict) and key not in _GONE:
            raise LayoutError(f"{where}: unknown key {key!r}", f"known {word}: {', '.join(sorted(known))}; formats are {', '.join(FORMATS)}")
        raise LayoutError(f"{where}: unknown key {key!r}", _GONE.get(key, f"known {word}: {', '.join(sorted(known))}"))


def _table(where: str, key: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise LayoutError(f"{where}: [{key}] must be a table, got {quote(repr(value))}")
    return value


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise LayoutError(f"{where} must be a text, got {quote(repr(value))}")
    return value


def _texts(where: str, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LayoutError(f"{where}: {key} must be a list of texts, got {quote(repr(value))}")
    return tuple(value)


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise LayoutError(f"{where} must be true or false, got {quote(repr(value))}")
    return value


def _stage(where: str, value: object) -> str:
    if value not in STAGES:
        raise LayoutError(f"{where}: stage must be one of {', '.join(STAGES)}, got {quote(repr(value))}")
    return value


def _dtype(where: str, word: object) -> str | None:
    if word is not None and (not isinstance(word, str) or word not in DTYPE_SIZE):
        raise LayoutError(f"{where}: unknown dtype {quote(repr(word))}", f"known: {', '.join(DTYPE_SIZE)}")
    return word


def _when(where: str, table: Mapping[str, object]) -> str:
    given = table.get("when", "true")
    if isinstance(given, bool):
        given = "true" if given else "false"
    return "true" if given == "true" else _expression(f"{where}: when", given)


def _expression(where: str, text: object) -> str:
    if not isinstance(text, str):
        raise LayoutError(f"{where} must be an expression in quotes, got {quote(repr(text))}")
    text = Expression(text, where)
    check(text)
    if "platform" in names_in(text):
        raise LayoutError(f"{where}: {text!r} uses platform, which is not part of the notation yet", f"expressions know {', '.join(GIVEN)}")
    return text


def _expressions(where: str, key: str, value: object, removable: bool = True) -> dict[str, "str | bool"]:
    """Expressions by name; False takes one away, where it is `removable`."""
    table = _table(where, key, value)
    return {
        name: given if given is False and removable else _expression(f"{where}: [{key}] {name}", given) for name, given in table.items()
    }
