"""Descriptor files: found, read and checked. Every mistake in one is a LayoutError that names file, table and key."""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from reshard.descriptor_entries import read_constant, read_entry
from reshard.descriptor_values import STAGES, At, dtype_of, read_dims
from reshard.errors import LayoutError
from reshard.expr import Expression
from reshard.foreign import quote
from reshard.layout import INDEX_AXES, Descriptor, Section, Tensor, parse_version
from reshard.stores.files import read_small, reading

#: the tables that say what a format stores
FORMAT_TABLES = ("hf", "vllm", "sglang", "megatron")
_TOP_KEYS = {"architectures", "extends", "description", "defaults", "conditions", "axes", "tensors", "replicate"}
_TENSOR_KEYS = {"dims", "when", "stage", "dtype"}
_SECTION_KEYS = {"constants", "drop", "omit", "variants", "args", "like"}
#: names that an expression finds without a descriptor's help
_TAKEN = {"true", "false", "null", "tp", "pp", "ep", "engine", *INDEX_AXES}
_LIMIT = 1_000_000  # bytes of a descriptor


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
        text = path.read_text(encoding="utf-8")
        if any(f'"{name}"' in text for name in wanted):  # parse only a file that may be it: start-up time
            descriptor = load_descriptor(path)
            if set(wanted) & set(descriptor.architectures):
                return descriptor
    return None


def load_descriptor(path: Path) -> Descriptor:
    """Read and check one TOML file. Every mistake in it is a LayoutError that names file, table and key."""
    path = Path(path)
    with reading(f"layout {path}", LayoutError):
        own = "" if path.parent == layout_dir() else str(path)
        return _descriptor(At(own or path.stem), path.stem, _read(path), own)


def _read(path: Path, seen: tuple[str, ...] = ()) -> dict:
    """The TOML table of `path`, laid over that of the descriptor it extends."""
    try:
        table = tomllib.loads(read_small(path, _LIMIT).decode("utf-8"))
    except ValueError as error:  # of TOML, of UTF-8, of a file that can't be opened
        raise LayoutError(f"layout {path}: {error}") from None
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str) or parent in (*seen, path.stem) or not re.fullmatch(r"\w{1,100}", parent, re.ASCII):
        raise LayoutError(f"layout {path}: extends: cannot extend {quote(repr(parent))}", _known())
    beside = path.with_name(f"{parent}.toml")
    chosen = beside if beside.exists() else layout_dir() / f"{parent}.toml"
    if not chosen.exists():
        raise LayoutError(f"layout {path}: extends: there is no descriptor {parent!r}", _known())
    base = _read(chosen, (*seen, path.stem))
    base.pop("architectures", None), base.pop("description", None)
    return _merge(base, table)


def _known() -> str:
    names = ", ".join(sorted(path.stem for path in layout_dir().glob("*.toml")))
    return f"known: {names}; or a file beside this one, by its name without .toml"


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


def _descriptor(at: At, name: str, table: dict, path: str) -> Descriptor:
    tables = f"known keys: {', '.join(sorted(_TOP_KEYS))}; tables of formats: {', '.join(FORMAT_TABLES)}"
    unknown = sorted(set(table) - _TOP_KEYS - set(FORMAT_TABLES))
    if unknown:
        at.fail(f"unknown key {unknown[0]!r}", tables)
    axes = _expressions(at / "[axes]", table.get("axes", {}))
    defaults = _expressions(at / "[defaults]", table.get("defaults", {}))
    conditions = _expressions(at / "[conditions]", table.get("conditions", {}))
    for place, names in (("[axes]", axes), ("[conditions]", conditions)):
        taken = sorted(set(names) & (_TAKEN - set(INDEX_AXES if place == "[axes]" else ())))
        odd = next((key for key in names if not key.isidentifier()), None)
        if taken or odd is not None:
            (at / place).fail(
                f"{taken[0] if taken else odd!r} can't be a name", "use a word that no other table uses, of letters, digits and _"
            )
    both = sorted(set(conditions) & (set(axes) | set(defaults)))
    if both:
        (at / "[conditions]").fail(f"{both[0]!r} is defined in [axes] or [defaults] too")
    tensors = {
        key: _tensor(at / f"[tensors] {key}", key, value, axes) for key, value in (at / "[tensors]").table(table.get("tensors", {})).items()
    }
    replicate = (at / "replicate").texts(table.get("replicate", []))
    for axis in replicate:
        (at / "replicate").known_axis(axis, axes)
    sections = {key: _section(at, key, _like(at / f"[{key}]", key, table), tensors, axes) for key in table if key in FORMAT_TABLES}
    if not tensors or "hf" not in sections:
        at.fail("needs [tensors] and [hf]")
    architectures = (at / "architectures").texts(table.get("architectures", []))
    if not architectures:
        at.fail("architectures must list the names that config.json uses")
    description = (at / "description").text(table.get("description", ""))
    return Descriptor(name, architectures, description, defaults, axes, tensors, replicate, sections, conditions, path)


def _expressions(at: At, value: object) -> dict[str, Expression]:
    return {key: (at / key).expression(text) for key, text in at.table(value).items()}


def _like(at: At, format: str, table: dict) -> object:
    """The table of `format`, laid over the entries (and they alone) of the one that its `like` names."""
    own = table[format]
    if not isinstance(own, dict) or "like" not in own:
        return own
    other = table.get(own["like"]) if isinstance(own["like"], str) and own["like"] in FORMAT_TABLES else None
    if not isinstance(other, dict) or "like" in other:
        raise LayoutError(f"{at} like = {quote(repr(own['like']))}: no format's table that is written out")
    entries = {key: value for key, value in other.items() if key not in _SECTION_KEYS}
    return _merge(entries, {key: value for key, value in own.items() if key != "like"})


def _tensor(at: At, key: str, value: object, axes: Mapping[str, str]) -> Tensor:
    table = {"dims": value} if isinstance(value, str) else at.table(value, "dims or a table")
    at.keys(table, _TENSOR_KEYS)
    index, dims, split = read_dims(at, table.get("dims"), axes)
    return Tensor(
        key, index, dims, split, at.when(table), at.choice("stage", table.get("stage", "last"), STAGES), dtype_of(at, table.get("dtype"))
    )


def _section(at: At, label: str, table: object, tensors: Mapping[str, Tensor], axes: Mapping[str, str], variant: bool = False) -> Section:
    here = at / f"[{label}]"
    entries = dict(here.table(table))
    constants = (here / "constants").table(entries.pop("constants", {}))
    drop, omit = ((here / key).texts(entries.pop(key, [])) for key in ("drop", "omit"))
    for key, patterns in (("drop", drop), ("omit", omit)):
        for pattern in patterns:
            (here / key).template(pattern, ("layer",))
    args = _expressions(at / f"[{label}.args]", entries.pop("args", {}))
    variants = []
    for name, inner in (here / "variants").table(entries.pop("variants", {})).items():
        place = at / f"[{label}.variants.{name}]"
        inner = dict(place.table(inner))
        until = inner.pop("until", None)
        if variant or "variants" in inner or "args" in inner:
            place.fail("a variant has no variants or args of its own")
        if until is not None:
            (place / "until").version(until, parse_version)
        variants.append((name, until, _section(at, f"{label}.variants.{name}", inner, tensors, axes, variant=True)))
    read = tuple(read_entry(here / key, key, value, tensors, axes) for key, value in entries.items())
    values = tuple(read_constant(at / f"[{label}.constants]" / key, key, value) for key, value in constants.items())
    return Section(read, values, drop, omit, tuple(args.items()), tuple(variants))
