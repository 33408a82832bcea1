"""Descriptor files: found, read and checked. Every mistake in one is a LayoutError that names file, table and key."""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from reshard.errors import LayoutError
from reshard.layout import INDEX_AXES, Constant, Descriptor, Entry, Section, Tensor
from reshard.stores import DTYPE_SIZE
from reshard.stores.foreign import quote

#: the tables that say what a format stores
FORMAT_TABLES = ("hf", "vllm", "sglang", "megatron")
_TOP_KEYS = {"architectures", "extends", "description", "defaults", "conditions", "axes", "tensors", "replicate"}
_TENSOR_KEYS = {"dims", "when", "stage", "dtype"}
_ENTRY_KEYS = {"name", "of", "within", "dims", "dim", "cut", "split", "pad", "when", "stage", "alias", "only_rank0", "view", "dtype"}
_CONSTANT_KEYS = {"value", "dtype", "shape", "when"}
_SECTION_KEYS = {"constants", "drop", "omit", "variants", "args"}
_STAGES = ("first", "last", "all")


def layout_dir() -> Path:
    """Where the descriptors lie: inside the package in a wheel, beside it in a checkout."""
    inside = Path(__file__).parent / "layouts"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "layouts"


@lru_cache(maxsize=1)
def builtin_descriptors() -> Mapping[str, Descriptor]:
    return {path.stem: load_descriptor(path) for path in sorted(layout_dir().glob("*.toml"))}


def architectures(config: Mapping[str, object]) -> list[str]:
    """The model classes that config.json names."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LayoutError(f"config.json: architectures is {quote(repr(names))}, expected a list of names")
    return names


def find_descriptor(config: Mapping[str, object]) -> Descriptor | None:
    """The built-in descriptor that lists one of config.json's architectures."""
    wanted = architectures(config)
    for path in sorted(layout_dir().glob("*.toml")):
        text = path.read_text()
        if any(f'"{name}"' in text for name in wanted):  # parse only a file that may be it: start-up time
            descriptor = load_descriptor(path)
            if set(wanted) & set(descriptor.architectures):
                return descriptor
    return None


def load_descriptor(path: Path) -> Descriptor:
    """Read and check one TOML file. Every mistake in it is a LayoutError that names file, table and key."""
    return _parse(path.stem, _read(path))


def _read(path: Path, seen: tuple[str, ...] = ()) -> dict:
    """The TOML table of `path`, laid over that of the descriptor it extends."""
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise LayoutError(f"layout {path}: {error}") from None
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if parent in seen or not re.fullmatch(r"\w+", parent):
        raise LayoutError(f"layout {path}: cannot extend {parent!r}")
    beside = path.with_name(f"{parent}.toml")
    base = _read(beside if beside.exists() else layout_dir() / f"{parent}.toml", (*seen, path.stem))
    base.pop("architectures", None), base.pop("description", None)
    return _merge(base, table)


def _merge(base: dict, over: dict) -> dict:
    """`over` laid over `base`, tables inside tables; a false value takes a key away."""
    out = dict(base)
    for key, value in over.items():
        if value is False and key in out:
            del out[key]
        elif isinstance(value, dict) and isinstance(out.get(key), dict) and "name" not in value and "dims" not in value:
            out[key] = _merge(out[key], value)
        else:
            out[key] = value
    return out


def _parse(name: str, table: dict) -> Descriptor:
    axes = _strings(name, "axes", table.get("axes", {}))
    table = _spelled_out(table, _strings(name, "conditions", table.get("conditions", {})))
    tensors = {key: _tensor(name, key, value, axes) for key, value in table.get("tensors", {}).items()}
    replicate = _list(name, "replicate", table.get("replicate", []))
    for axis in replicate:
        _known_axis(name, "replicate", axis, axes)
    unknown = sorted(set(table) - _TOP_KEYS - set(FORMAT_TABLES))
    if unknown:
        raise LayoutError(f"layout {name}: unknown key {unknown[0]!r}", f"known keys: {', '.join(sorted(_TOP_KEYS))}; tables of formats: {', '.join(FORMAT_TABLES)}")
    formats = {key: _section(name, key, _like(name, key, table), tensors, axes) for key in table if key in FORMAT_TABLES}
    if not tensors or "hf" not in formats:
        raise LayoutError(f"layout {name}: needs [tensors] and [hf]")
    architectures = _list(name, "architectures", table.get("architectures", []))
    if not architectures:
        raise LayoutError(f"layout {name}: architectures must list the names that config.json uses")
    return Descriptor(name, tuple(architectures), table.get("description", ""),
                      _strings(name, "defaults", table.get("defaults", {})), axes, tensors, replicate, formats)  # fmt: skip


def _spelled_out(table: dict, conditions: Mapping[str, str]) -> dict:
    """`table` with the names of `conditions` in every `when`, at any depth, replaced by what they stand for."""
    if not conditions:
        return table
    names = re.compile(rf"\b({'|'.join(map(re.escape, conditions))})\b")
    out = {}
    for key, value in table.items():
        if isinstance(value, dict):
            value = _spelled_out(value, conditions)
        elif key == "when" and isinstance(value, str):
            value = names.sub(lambda match: f"({conditions[match[0]]})", value)
        out[key] = value
    return out


def _like(name: str, format: str, table: dict) -> object:
    """The table of `format`, laid over the entries (and they alone) of the one that its `like` names."""
    own = table[format]
    if not isinstance(own, dict) or "like" not in own:
        return own
    other = table.get(own["like"]) if isinstance(own["like"], str) else None
    if not isinstance(other, dict) or own["like"] in _TOP_KEYS or "like" in other:
        raise LayoutError(f"layout {name}: [{format}] like = {own['like']!r}: no format's table that is written out")
    entries = {key: value for key, value in other.items() if key not in _SECTION_KEYS}
    return _merge(entries, {key: value for key, value in own.items() if key != "like"})


def _list(name: str, where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LayoutError(f"layout {name}: {where} must be a list of texts, got {value!r}")
    return tuple(value)


def _strings(name: str, where: str, table: dict) -> dict[str, str]:
    if not isinstance(table, dict):
        raise LayoutError(f"layout {name}: [{where}] must be a table, got {table!r}")
    for key, value in table.items():
        if not isinstance(value, str):
            raise LayoutError(f"layout {name}: [{where}] {key} must be an expression in quotes, got {value!r}")
    return table


def _known_axis(name: str, where: str, axis: str, axes: Mapping[str, str]) -> str:
    if axis not in axes:
        raise LayoutError(f"layout {name}: {where} uses axis {axis!r}, which [axes] does not define")
    return axis


def _dims(name: str, where: str, text: str, axes: Mapping[str, str]):
    """Parse ``{layer} (kv* group* head) hidden`` into index axes, dims of axes, and starred axes."""
    if not isinstance(text, str) or not re.fullmatch(r"\s*(\{\w+\}\s*)*(\(\s*[\w* ]+\)|\w+\*?|1)?(\s+(\([\w* ]+\)|\w+\*?|1))*\s*", text):
        raise LayoutError(f"layout {name}: {where}: cannot read dims {text!r}", 'write them like "{layer} (kv* head) hidden"')
    index = tuple(re.findall(r"\{(\w+)\}", text))
    dims, split = [], []
    for group, single in re.findall(r"\(([^)]*)\)|([\w*]+)", re.sub(r"\{\w+\}", " ", text)):
        words = (group or single).split()
        split += [w.rstrip("*") for w in words if w.endswith("*")]
        dims.append(tuple(_known_axis(name, where, w.rstrip("*"), axes) for w in words if w != "1"))
    for axis in index:
        if axis not in INDEX_AXES:
            raise LayoutError(f"layout {name}: {where}: {{{axis}}} must be one of {{layer}}, {{expert}}")
        _known_axis(name, where, axis, axes)
    flat = [axis for dim in dims for axis in dim]
    if len(set(flat)) != len(flat):
        raise LayoutError(f"layout {name}: {where}: an axis stands twice in {text!r}")
    return index, tuple(dims), tuple(split)


def _check_keys(name: str, where: str, table: dict, allowed: set[str]) -> None:
    unknown = sorted(set(table) - allowed)
    if unknown:
        raise LayoutError(f"layout {name}: {where}: unknown key {unknown[0]!r}", f"known keys: {', '.join(sorted(allowed))}")


def _tensor(name: str, key: str, value: object, axes: Mapping[str, str]) -> Tensor:
    where = f"[tensors] {key}"
    table = {"dims": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise LayoutError(f"layout {name}: {where}: expected dims or a table, got {value!r}")
    _check_keys(name, where, table, _TENSOR_KEYS)
    index, dims, split = _dims(name, where, table.get("dims"), axes)
    stage = table.get("stage", "last")
    if stage not in _STAGES:
        raise LayoutError(f"layout {name}: {where}: stage must be one of {', '.join(_STAGES)}, got {stage!r}")
    return Tensor(key, index, dims, split, str(table.get("when", "true")), stage, _dtype(name, where, table.get("dtype")))


def _dtype(name: str, where: str, word: object) -> str | None:
    if word is not None and word not in DTYPE_SIZE:
        raise LayoutError(f"layout {name}: {where}: unknown dtype {word!r}", f"known: {', '.join(DTYPE_SIZE)}")
    return word


def _section(name: str, format: str, table: object, tensors: Mapping[str, Tensor], axes: Mapping[str, str]) -> Section:
    if not isinstance(table, dict):
        raise LayoutError(f"layout {name}: unknown key {format!r}", f"known keys: {', '.join(sorted(_TOP_KEYS))}, and one table per format")
    table = dict(table)
    constants = tuple(_constant(name, format, key, value) for key, value in table.pop("constants", {}).items())
    drop = _list(name, f"[{format}] drop", table.pop("drop", []))
    omit = _list(name, f"[{format}] omit", table.pop("omit", []))
    args = tuple(_strings(name, f"{format}.args", table.pop("args", {})).items())
    variants = []
    for label, variant in table.pop("variants", {}).items():
        variant = dict(variant)
        until = variant.pop("until", None)
        variants.append((label, until, _section(name, f"{format}.variants.{label}", variant, tensors, axes)))
    entries = tuple(_entry(name, format, key, value, tensors, axes) for key, value in table.items())
    return Section(entries, constants, drop, omit, args, tuple(variants))


def _constant(name: str, format: str, key: str, value: object) -> Constant:
    where = f"[{format}.constants] {key}"
    if not isinstance(value, dict):
        raise LayoutError(f"layout {name}: {where}: expected a table with value and dtype")
    _check_keys(name, where, value, _CONSTANT_KEYS)
    if not isinstance(value.get("value"), int | float) or value.get("dtype") is None:
        raise LayoutError(f"layout {name}: {where}: needs a value and a dtype")
    return Constant(key, float(value["value"]), _dtype(name, where, value["dtype"]), tuple(value.get("shape", ())), str(value.get("when", "true")))


def _entry(name: str, format: str, key: str, value: object, tensors: Mapping[str, Tensor], axes: Mapping[str, str]) -> Entry:
    where = f"[{format}] {key}"
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or "name" not in table:
        raise LayoutError(f"layout {name}: {where}: expected a name or a table with a name, got {value!r}")
    _check_keys(name, where, table, _ENTRY_KEYS)
    of = tuple(table.get("of", [key]))
    if not of or isinstance(table.get("of"), str):
        raise LayoutError(f"layout {name}: {where}: of must be a list of tensors, got {table['of']!r}")
    for tensor in of:
        if tensor not in tensors:
            raise LayoutError(f"layout {name}: {where}: no tensor {tensor!r} in [tensors]", 'say which it holds with of = ["…"]')
    index = tensors[of[0]].index
    fields = set(re.findall(r"\{(\w*)\}", table["name"]))
    if not fields <= set(index) or any(tensors[t].index != index for t in of):
        raise LayoutError(f"layout {name}: {where}: {table['name']!r} and its tensors must be numbered alike, by {index}")
    dims = _dims(name, where, table["dims"], axes)[1] if "dims" in table else None
    within = table.get("within")
    for tensor in of:
        stored = dims or tensors[tensor].dims
        if sorted(axis for dim in stored for axis in dim) != sorted(tensors[tensor].axes):
            raise LayoutError(f"layout {name}: {where}: dims {table.get('dims')!r} must hold the axes of {tensor}: {tensors[tensor].axes}")
        if within is not None and not any(within in dim for dim in stored):
            raise LayoutError(f"layout {name}: {where}: within = {within!r}, but {tensor} has no such axis")
    if not 0 <= table.get("dim", 0) < max(1, len(dims or tensors[of[0]].dims)):
        raise LayoutError(f"layout {name}: {where}: dim = {table['dim']!r}, but {of[0]} has {len(dims or tensors[of[0]].dims)} dimensions")
    if table.get("cut", "parts") not in ("parts", "whole"):
        raise LayoutError(f"layout {name}: {where}: cut must be parts or whole, got {table['cut']!r}")
    if table.get("stage") not in (None, *_STAGES):
        raise LayoutError(f"layout {name}: {where}: stage must be one of {', '.join(_STAGES)}, got {table['stage']!r}")
    if "view" in table and not (isinstance(table["view"], list) and all(isinstance(g, list) and all(type(d) is int for d in g) for g in table["view"])):
        raise LayoutError(f"layout {name}: {where}: view must list, per dimension, the dimensions that it joins, got {table['view']!r}")
    split = tuple(_known_axis(name, where, axis, axes) for axis in _list(name, f"{where} split", table["split"])) if "split" in table else None
    pad = tuple((_known_axis(name, where, axis, axes), text) for axis, text in _strings(name, where, table.get("pad", {})).items())
    return Entry(key, table["name"], of, within, dims, int(table.get("dim", 0)), table.get("cut", "parts"), split, pad,
                 str(table.get("when", "true")), table.get("stage"), bool(table.get("alias")), bool(table.get("only_rank0")),
                 tuple(map(tuple, table["view"])) if "view" in table else None,
                 _dtype(name, where, table.get("dtype")))  # fmt: skip
