"""Quantisation schemes: what a matrix is stored as instead.

A scheme is a page in ``layouts/schemes``: the tensors that stand for one matrix, what their dimensions are in terms of the
matrix's own (``out/128``: 128 rows share an element), their names in each format, and the function that gives the matrix back.
``quantised.py`` makes tensors of the layout of them. A tensor is quantised iff its codes and scales are in the files;
config.json's quantization_config only says which scheme it would be.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from reshard.errors import LayoutError, PlanError
from reshard.foreign import quote
from reshard.layout.expressions import evaluate, holds
from reshard.layout.files import layout_dir, read_table
from reshard.layout.values import FORMATS, dtype_of, expression, flag, known_keys, table_of, text_of

_KEYS = {"description", "quantised", "value", "dtype", "settings", "quantise", "blocks", "attention"}
_KIND_KEYS = {"dims", "dtype", "when", "beside", "made", *FORMATS}
_FORM_KEYS = {"name", "dtype", "scalar", "flat", "last"}
_DIM = re.compile(r"(out|in)(?:/(\S+))?|(\d+)")


@dataclass(frozen=True)
class Form:
    """How one format has it: its name's template, the dtype that the engine wants; `scalar`: without dimensions; `flat`: the last
    two dimensions in one; `last`: of fused tensors the last one's alone."""

    name: str
    dtype: str | None = None
    scalar: bool = False
    flat: bool = False
    last: bool = False

    def filled(self, name: str) -> str | None:
        """The name beside the matrix called `name`; None where that is not called as the template wants."""
        if "{base}" not in self.name:
            return self.name.replace("{name}", name)
        return self.name.replace("{base}", name.removesuffix("weight")) if name.endswith("weight") else None


@dataclass(frozen=True)
class Kind:
    """One tensor of a scheme. `beside`: the matrix does not depend on it (scales of activations). `made`: the function that
    computes it where the source's format has none."""

    label: str
    dims: tuple[str, ...]
    dtype: str | None
    when: str
    beside: bool
    made: str | None
    forms: Mapping[str, Form]

    @property
    def turned(self) -> bool:
        """Whether it is stored input first."""
        sides = [dim.partition("/")[0] for dim in self.dims]
        return "in" in sides and "out" in sides and sides.index("in") < sides.index("out")


@dataclass(frozen=True)
class Scheme:
    """One page. `quantised` is an expression over config.json's quantization_config, `value` the function of its operands,
    `settings` what else that wants to know, as expressions. `quantise`: the recipe by which weights become codes: its
    word, the tensors that it keeps, and the quantization_config that is written. `blocks`: where that says how large blocks are.
    `attention`: what vLLM registers for scales of attention beside such weights, as descriptors ask for it (attention_scales)."""

    name: str
    description: str
    quantised: str
    value: str
    dtype: str
    settings: tuple[tuple[str, str], ...]
    kinds: tuple[Kind, ...]
    quantise: Mapping[str, object] | None = None
    blocks: str | None = None
    attention: str = "none"

    def kinds_of(self, settings: "Settings") -> tuple[Kind, ...]:
        return tuple(kind for kind in self.kinds if holds(kind.when, settings))


class Settings(dict[str, object]):
    """quantization_config: what it does not say is null. `group` is the one table of config_groups, where all are alike."""

    def __init__(self, config: Mapping[str, object]):
        super().__init__(config)
        groups = config.get("config_groups")
        every = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
        if every and all(group.get("weights") == every[0].get("weights") for group in every):
            told = {"weights": every[0].get("weights") or {}, "input_activations": every[0].get("input_activations") or {}}
            self["group"] = {key: _Table(table) if isinstance(table, Mapping) else _Table() for key, table in told.items()}

    def __missing__(self, key: str) -> None:
        return None


class _Table(dict[str, object]):
    def __missing__(self, key: str) -> None:
        return None


@lru_cache(maxsize=1)
def schemes() -> tuple[Scheme, ...]:
    """All of ``layouts/schemes``."""
    return tuple(load_scheme(path) for path in sorted((layout_dir() / "schemes").glob("*.toml")))


def scheme_of(settings: Settings) -> Scheme | None:
    """The one that quantization_config names."""
    return next((each for each in schemes() if holds(each.quantised, settings)), None)


def attention_scales(name: str) -> str:
    """`attention` of the scheme called `name`; none where weights are not quantised."""
    return next((scheme.attention for scheme in schemes() if scheme.name == name), "none") if name != "none" else "none"


def settings_of(config: Mapping[str, object]) -> Settings | None:
    found = config.get("quantization_config") or config.get("compression_config")
    return Settings(found) if isinstance(found, Mapping) else None


def load_scheme(path: Path) -> Scheme:
    """One page, checked. Raises LayoutError."""
    where, table = f"scheme {path.stem}", read_table(path)
    kinds = tuple(_kind(f"{where}: [{label}]", label, table_of(where, label, own)) for label, own in table.items() if label not in _KEYS)
    value, dtype = (text_of(f"{where}: {key}", table.get(key)) for key in ("value", "dtype"))
    own = table_of(where, "settings", table.get("settings", {}))
    settings = tuple((key, expression(f"{where}: settings: {key}", text)) for key, text in sorted(own.items()))
    quantise = table_of(where, "quantise", table["quantise"]) if "quantise" in table else None
    if quantise is not None:
        known_keys(f"{where}: [quantise]", quantise, {"recipe", "keep", "config"}, "keys")
    return Scheme(path.stem, str(table.get("description", "")), expression(f"{where}: quantised", table.get("quantised")),
                  value, dtype, settings, kinds, quantise, table.get("blocks"), str(table.get("attention", "none")))  # fmt: skip


def _kind(at: str, label: str, table: Mapping[str, object]) -> Kind:
    known_keys(at, table, _KIND_KEYS, "keys")
    dims = tuple(text_of(f"{at} dims", table.get("dims")).split())
    wrong = next((dim for dim in dims if not _DIM.fullmatch(dim)), None)
    if wrong:
        raise LayoutError(f"{at} dims: cannot read {quote(repr(wrong))}", 'write "out", "in", "out/128", or a number')
    forms = {}
    for format in FORMATS:
        if format in table:
            given = table[format]
            each = given if isinstance(given, dict) else {"name": given}
            known_keys(f"{at} {format}", each, _FORM_KEYS, "keys")
            name, dtype = text_of(f"{at} {format}", each.get("name")), dtype_of(f"{at} {format}", each.get("dtype"))
            forms[format] = Form(name, dtype, *(flag(f"{at} {format}: {key}", each.get(key, False)) for key in ("scalar", "flat", "last")))
    when = expression(f"{at} when", table.get("when", "true"))
    made = text_of(f"{at} made", table["made"]) if "made" in table else None
    return Kind(label, dims, dtype_of(at, table.get("dtype")), when, flag(f"{at} beside", table.get("beside", False)), made, forms)


def grain_of(text: str, settings: Settings) -> tuple[str, int]:
    """A dimension of a kind, as (out, in or nothing; how many elements share one: 0 for all of them; or its own size). Raises PlanError."""
    match = _DIM.fullmatch(text)
    if match is None or match[3]:
        return "", int(text)
    grain = evaluate(match[2], settings) if match[2] else 1
    if grain is None or grain == -1:  # one for the whole dimension, as every scheme writes it
        return match[1], 0
    if not isinstance(grain, int) or isinstance(grain, bool) or grain < 1:
        raise PlanError([f"{text} of quantization_config is {quote(repr(grain))}, not a number of elements"])
    return match[1], grain
