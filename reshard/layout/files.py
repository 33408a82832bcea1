"""Descriptor files: read and checked, typed as they stand. Every mistake is a LayoutError that names file, table and key.

How files, parts and places come together is in ``resolve.py``.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.layout.entries import RawEntry, RawTensor, parse_entry, parse_tensor
from reshard.layout.values import (
    FORMATS,
    GIVEN,
    GONE,
    expression,
    expressions,
    fields_of,
    flag,
    known_keys,
    stage_of,
    table_of,
    text_of,
    texts,
    until_of,
    when_of,
)
from reshard.stores.files import read_small

_PART_KEYS = {"description", "at", "replicate", "defaults", "conditions", "axes", "tensors", "doubts", *FORMATS}
_FILE_KEYS = (_PART_KEYS - {"at"}) | {"architectures", "extends", "place", "part"}
_PLACE_KEYS = {"count", "parts", "optional", "carry", *FORMATS}
_USE_KEYS = {"part", "when", "at"}
_SECTION_KEYS = {"like", "drop", "omit", "args", "pad", "unit", "stage", "since"}
_LIMIT = 1_000_000  # bytes of a descriptor


class Table(NamedTuple):
    """What one file says of one format; an entry is False where it takes one away."""

    where: str
    like: str | None = None
    drop: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    args: Mapping[str, "str | bool"] = {}
    entries: Mapping[str, "tuple[RawEntry, ...] | bool"] = {}
    pad: Mapping[str, str] = {}  # of every entry that has the axis and says nothing of it
    stage: str | None = None  # of every entry that no number tells apart
    since: str | None = None  # the oldest release whose names these are
    unit: Mapping[str, str] = {}  # what an axis is cut in whole multiples of, the last ranks with less


class Prefixes(NamedTuple):
    """A place's prefix in one format: the names that files may have it under (the first is written), those that it
    had up to an engine's release, as (prefix, until), and those that it has in some of its numbers, as (prefix, when)."""

    names: tuple[str, ...]
    older: tuple[tuple[str, str], ...] = ()
    apart: tuple[tuple[str, str], ...] = ()


class Use(NamedTuple):
    """A part in a place."""

    where: str
    part: str
    when: str
    at: "str | Mapping[str, str] | None"


class Doubt(NamedTuple):
    """A tensor that authors of descriptors take for another: under the name `named`, beside a name like `beside`."""

    tensor: str
    named: str
    beside: str
    says: str


class Part(NamedTuple):
    """A part, or what an architecture's own file says in the same tables. Expressions are False where taken away."""

    name: str
    where: str
    description: str = ""
    at: "str | Mapping[str, str]" = {}
    replicate: tuple[str, ...] = ()
    defaults: Mapping[str, "str | bool"] = {}
    conditions: Mapping[str, "str | bool"] = {}
    axes: Mapping[str, "str | bool"] = {}
    tensors: Mapping[str, "RawTensor | bool"] = {}
    formats: Mapping[str, "Table | bool"] = {}
    doubts: tuple[Doubt, ...] = ()


class File(NamedTuple):
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
        return tomllib.loads(read_small(path, _LIMIT).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a file that can't be opened
        raise LayoutError(f"layout {path}: {quote(error)}") from None


@lru_cache(maxsize=64)
def library_part(name: str) -> Part | None:
    """The part in layouts/parts; None where there is none."""
    path = layout_dir() / "parts" / f"{name}.toml"
    return parse_part(name, f"layout parts/{name}", read_table(path)) if path.is_file() else None


def parse_file(path: Path) -> File:
    builtin = path.parent == layout_dir()
    where = f"layout {path.stem if builtin else path}"
    table = _apart(where, read_table(path))
    known_keys(where, table, _FILE_KEYS, "tables and keys")
    extends = table.get("extends")
    if extends is not None and not (isinstance(extends, str) and re.fullmatch(r"\w{1,100}", extends, re.ASCII)):
        raise LayoutError(f"{where}: cannot extend {quote(repr(extends))}", 'write the name of a descriptor: extends = "llama"')
    places = {name: _place(f"{where}: [place.{name}]", value) for name, value in table_of(where, "place", table.get("place", {})).items()}
    for name in places:
        if not re.fullmatch(r"[^\W\d]\w*", name, re.ASCII) or name in (*GIVEN, "expert", "true", "false", "null"):
            raise LayoutError(f"{where}: [place] {quote(repr(name))} can't be a name", "use a word of letters, digits and _")
    parts = {
        name: parse_part(name, f"{where}: part.{name}", table_of(where, f"part.{name}", value))
        for name, value in table_of(where, "part", table.get("part", {})).items()
    }
    own = parse_part(path.stem, where, {key: value for key, value in table.items() if key in _PART_KEYS})
    return File(own, "" if builtin else str(path), extends, texts(where, "architectures", table.get("architectures", [])), places, parts)


def _apart(where: str, table: dict) -> dict:
    """`table` with what it says of several formats at once, as in ``["hf, vllm"]``, said of each."""
    out: dict = {}
    for key, value in table.items():
        formats = key.split(", ")
        for name in formats if len(formats) > 1 and set(formats) <= set(FORMATS) else [key]:
            before = table_of(where, name, out[name]) if name in out else {}
            twice = sorted(before.keys() & table_of(where, name, value).keys()) if name in out else ()
            if twice:
                raise LayoutError(f"{where}: [{name}] {twice[0]} stands in two tables of {name}")
            out[name] = before | value if before else value
    return out


def parse_part(name: str, where: str, table: dict) -> Part:
    table = _apart(where, table)
    known_keys(where, table, _PART_KEYS, "tables and keys")
    description = table.get("description", "")
    if not isinstance(description, str):
        raise LayoutError(f"{where}: description must be a text, got {quote(repr(description))}")
    at = _at(where, table.get("at", {}))
    tensors = {
        key: value if value is False else parse_tensor(f"{where}: [tensors] {key}", value)
        for key, value in table_of(where, "tensors", table.get("tensors", {})).items()
    }
    formats = {key: _format(where, key, table[key]) for key in FORMATS if key in table}
    defaults, conditions, axes = (expressions(where, key, table.get(key, {})) for key in ("defaults", "conditions", "axes"))
    for kind, names in (("axes", axes), ("conditions", conditions)):
        for key in names:
            if key in (*GIVEN, "true", "false", "null", "layer") or not re.fullmatch(r"[^\W\d]\w*", key, re.ASCII):
                hint = "use a word that no other table uses, of letters, digits and _"
                raise LayoutError(f"{where}: [{kind}] {quote(repr(key))} can't be a name", hint)
    replicate, doubts = texts(where, "replicate", table.get("replicate", [])), _doubts(where, table.get("doubts", {}), tensors)
    return Part(name, where, description, at, replicate, defaults, conditions, axes, tensors, formats, doubts)


def _doubts(where: str, value: object, tensors: Mapping[str, object]) -> tuple[Doubt, ...]:
    out = []
    for tensor, given in table_of(where, "doubts", value).items():
        at = f"{where}: [doubts] {tensor}"
        known_keys(at, table_of(where, f"doubts.{tensor}", given), {"named", "beside", "says"}, "keys")
        if tensor not in tensors:
            raise LayoutError(f"{at}: the part has no such tensor")
        out.append(Doubt(tensor, *(text_of(f"{at} {key}", given.get(key)) for key in ("named", "beside", "says"))))
    return tuple(out)


def _place(where: str, value: object) -> dict[str, object] | bool:
    if value is False:
        return False
    if not isinstance(value, dict):
        raise LayoutError(f"{where} must be a table, got {quote(repr(value))}")
    known_keys(where, value, _PLACE_KEYS, "keys")
    out: dict[str, object] = {}
    for key, given in value.items():
        if key in FORMATS:
            out[key] = given if given is False else _prefixes(f"{where} {key}", given)
        elif key == "count":
            out[key] = expression(f"{where} count", given)
        elif key == "parts":
            if not isinstance(given, list):
                raise LayoutError(f"{where} parts must be a list, got {quote(repr(given))}")
            out[key] = tuple(_use(f"{where} parts", item) for item in given)
        else:
            out[key] = flag(f"{where} {key}", given)
    return out


def _prefixes(where: str, value: object) -> Prefixes:
    names, older, apart = [], [], []
    for item in value if isinstance(value, list) else [value]:
        table = item if isinstance(item, dict) else {"prefix": item}
        known_keys(where, table, {"prefix", "until", "when"}, "keys")
        prefix = text_of(f"{where}: a prefix", table.get("prefix"))
        fields_of(where, prefix)
        if "until" in table:
            older.append((prefix, until_of(where, table["until"])))
        elif "when" in table:
            apart.append((prefix, when_of(where, table)))
        else:
            names.append(prefix)
    if not names:
        raise LayoutError(f"{where} needs a prefix without until and when, got {quote(repr(value))}")
    return Prefixes(tuple(names), tuple(older), tuple(apart))


def _use(where: str, value: object) -> Use:
    table = {"part": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("part"), str):
        raise LayoutError(f'{where}: expected a part\'s name or {{ part = "…" }}, got {quote(repr(value))}')
    known_keys(f"{where}: {table['part']}", table, _USE_KEYS, "keys")
    if not re.fullmatch(r"\w{1,100}", table["part"], re.ASCII):
        raise LayoutError(f"{where}: {quote(repr(table['part']))} is no part's name")
    at = _at(f"{where}: {table['part']}", table["at"]) if "at" in table else None
    return Use(f"{where}: {table['part']}", table["part"], when_of(f"{where}: {table['part']}", table), at)


def _at(where: str, value: object) -> "str | dict[str, str]":
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise LayoutError(f"{where}: at must be a text or a table of one per format, got {quote(repr(value))}")
    known_keys(f"{where}: at", value, set(FORMATS), "formats")
    return value


def _format(where: str, format: str, value: object) -> Table | bool:
    if value is False:
        return False
    table = table_of(where, format, value)
    at = f"{where}: [{format}]"
    like = table.get("like")
    if like is not None and (like not in FORMATS or like == format):
        raise LayoutError(f"{at} like = {quote(repr(like))}: no other format's table", f"formats are {', '.join(FORMATS)}")
    drop, omit = (texts(where, f"[{format}] {key}", table.get(key, [])) for key in ("drop", "omit"))
    for pattern in (*drop, *omit):
        fields_of(f"{at} drop", pattern)
    entries: dict[str, tuple[RawEntry, ...] | bool] = {}
    for label, given in table.items():
        if label in _SECTION_KEYS:
            continue
        if label in GONE:
            raise LayoutError(f"{at}: unknown key {label!r}", GONE[label])
        if given is False:
            entries[label] = False
            continue
        alternatives = given if isinstance(given, list) else [given]
        if not alternatives:
            raise LayoutError(f"{at} {label}: an empty list of alternatives")
        numbered = [f"{at} {label}" + (f" [{i}]" if len(alternatives) > 1 else "") for i in range(len(alternatives))]
        entries[label] = tuple(parse_entry(place, label, item) for place, item in zip(numbered, alternatives))
    args = expressions(where, f"{format}.args", table.get("args", {}))
    pad, unit = (expressions(where, f"{format}.{key}", table.get(key, {}), False) for key in ("pad", "unit"))
    stage = stage_of(at, table["stage"]) if "stage" in table else None
    since = until_of(at, table["since"], "since") if "since" in table else None
    return Table(at, like, drop, omit, args, entries, pad, stage, since, unit)
