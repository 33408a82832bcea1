"""verify's own knowledge of names and cuts: one strict table per engine and family, read from ``tables/*.toml``.

The tables are written from the engines' own code and know nothing of the layout descriptors: a descriptor that is wrong about a
name or an order must not be able to make its own test pass. ``tables/engines.toml`` says which formats an engine reads and what
its files hold beside weights; every other file is a family (it lists transformers' ``model_types``) or a part that families use.
``tables/README.md`` explains the words of a row.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from reshard.errors import FormatError, LayoutError

TABLES = Path(__file__).parent / "tables"
CUTS = ("column", "row", "whole", "vocabulary", "heads", "experts")
HOLDS = ("query", "key", "value", "latent_query", "latent_key_value", "heads", "gate", "up", "down")
BESIDE = ("scales", "prediction", "ignored")
#: the words of a row beside `to` and `cut`: the cuts that take it, and its values where these are a few
_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "holds": (("column", "row", "experts"), HOLDS),
    "parts": (("column", "whole"), None),
    "order": (("column", "experts"), ("sections", "groups", "heads", "alternate")),
    "becomes": (("column",), ("sections", "heads")),
    "gathered": (("whole",), None),
    "transposed": (("column", "row", "experts"), ("always", "without ep")),
    "precise": (("whole",), None),
    **dict.fromkeys(("local", "flat", "copied"), (("experts",), None)),
}


@dataclass(frozen=True)
class Row:
    """What one stored name means: `path` and `kind` are transformers' module and parameter, `pattern` the name in files, both with
    ``{layer}`` and ``{expert}``; the other fields are the words that ``tables/README.md`` explains. `where` is for messages."""

    pattern: str
    path: str
    kind: str
    cut: str
    where: str
    holds: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    order: str = "sections"
    becomes: str = ""
    gathered: str = ""
    transposed: str = ""
    local: bool = False
    flat: bool = False
    copied: bool = False
    precise: bool = False


@dataclass(frozen=True)
class Engine:
    """An engine (or a way of writing files): the formats that are its own, and patterns of names that are no weights, by kind."""

    name: str
    formats: tuple[str, ...]
    beside: Mapping[str, tuple[re.Pattern, ...]]

    def kind_beside(self, name: str) -> str | None:
        """Which of BESIDE `name` is; None for a weight."""
        return next((kind for kind, patterns in self.beside.items() if any(pattern.fullmatch(name) for pattern in patterns)), None)


class Table:
    """The rows of one family for one engine. No two of them match the same name."""

    def __init__(self, family: str, engine: str, rows: tuple[Row, ...]):
        self.family, self.engine, self.rows = family, engine, rows
        self._rows: dict[str, list[tuple[Row, re.Pattern]]] = {}
        for row in rows:
            example, regex = row.pattern.format(layer=0, expert=0), _regex(row.pattern)
            alike = self._rows.setdefault(_shape(example), [])
            for other, theirs in alike:
                if theirs.fullmatch(example) or regex.fullmatch(other.pattern.format(layer=0, expert=0)):
                    raise LayoutError(f"{row.where}: a name like {example} matches {other.where} too", "each name has one row")
            alike.append((row, regex))

    def paths(self, word: str, layer: int) -> list[str]:
        """Modules of layer `layer` that hold `word`, each once, in the table's order."""
        return list(dict.fromkeys(row.path.format(layer=layer) for row in self.rows if word in row.holds and row.cut != "experts"))

    def find(self, name: str) -> tuple[Row, int | None, int | None] | None:
        """The row of stored name `name`, and the numbers of layer and expert in it; None where there is no row. Raises LayoutError for two."""
        found = [(row, match) for row, regex in self._rows.get(_shape(name), ()) if (match := regex.fullmatch(name))]
        if len(found) > 1:
            raise LayoutError(f"{name} matches {' and '.join(row.where for row, _ in found)}", "each name has one row")
        if not found:
            return None
        numbers = found[0][1].groupdict()
        layer, expert = (None if numbers.get(key) is None else int(numbers[key]) for key in ("layer", "expert"))
        return found[0][0], layer, expert


@cache
def engines(folder: Path = TABLES) -> dict[str, Engine]:
    """All engines, by name."""
    out = {}
    for name, given in _read(folder / "engines.toml").items():
        where = f"engines.toml: [{name}]"
        given = _keys(given, {"formats", *BESIDE}, where)
        beside = {
            kind: tuple(_regex(text) for pattern in _texts(given.get(kind, []), f"{where} {kind}") for text in _spelled(pattern))
            for kind in BESIDE
        }
        out[name] = Engine(name, _texts(given.get("formats"), f"{where} formats"), beside)
    return out


@cache
def engine_of() -> dict[str, Engine]:
    """The engine whose format each format is."""
    return {format: engine for engine in engines().values() for format in engine.formats}


@cache
def families(folder: Path = TABLES) -> dict[str, str]:
    """The file, without its ending, of every model type that has one."""
    out: dict[str, str] = {}
    for path in sorted(folder.glob("*.toml")):
        if path.stem == "engines":
            continue
        for model_type in _file(path.stem, folder).get("model_types", ()):
            if model_type in out:
                raise LayoutError(f"{path.name}: model_types: {model_type} is in {out[model_type]}.toml too")
            out[model_type] = path.stem
    return out


@cache
def table(model_type: str, engine: str, folder: Path = TABLES) -> Table:
    """The table of `model_type` (transformers' word for it) for `engine`. Raises FormatError where there is none, LayoutError for one that is wrong."""
    family = families(folder).get(model_type)
    rows = rows_of(family, engine, folder) if family else ()
    if not rows:
        known = sorted(kind for kind, own in families(folder).items() if rows_of(own, engine, folder))
        raise FormatError(f"verify has no table of how {engine} names and cuts {model_type} (known: {', '.join(known)})",
                          "use --method permute, or add one to reshard/verify/tables")  # fmt: skip
    return Table(family, engine, rows)


@cache
def rows_of(family: str, engine: str, folder: Path = TABLES) -> tuple[Row, ...]:
    """The rows for `engine` in file `family`, and in those that it uses."""
    known, file = engines(folder), _file(family, folder)
    out: list[Row] = []
    for part, chosen in _keys(file.get("use", {}), None, f"{family}.toml: [use]").items():
        wanted = tuple(known) if chosen == "every" else _texts(chosen, f"{family}.toml: [use] {part}", tuple(known))
        out += rows_of(part, engine, folder) if engine in wanted else ()
    for number, group in enumerate(file.get("group", ()), 1):
        where = f"{family}.toml: group {number}"
        group = _keys(group, {"engines", "stored", "module", "rows"}, where)
        if engine in _texts(group.get("engines"), f"{where} engines", tuple(known)):
            stored = group.get("stored", "")
            for key, words in _keys(group.get("rows"), None, f"{where} rows").items():
                out += _row(
                    key, {"cut": words} if isinstance(words, str) else words, stored, group.get("module", stored), f"{where} {key!r}"
                )
    return tuple(out)


def _row(key: str, words: object, stored: str, module: str, where: str) -> list[Row]:
    """The rows that `key` spells: one for each alternative in braces."""
    words = dict(_keys(words, {"to", "cut", *_WORDS}, where))
    to, cut = words.pop("to", None), words.get("cut")
    if cut not in CUTS:
        raise LayoutError(f"{where}: unknown cut {cut!r}", f"known are {', '.join(CUTS)}")
    for word, value in words.items():
        kind = type(getattr(Row, word, ""))
        if cut not in _WORDS.get(word, (CUTS,))[0]:
            raise LayoutError(f"{where}: {word!r} is no word for cut {cut!r}")
        if kind is tuple:
            words[word] = _texts(value, f"{where} {word}", _WORDS[word][1])
        elif not isinstance(value, kind):
            raise LayoutError(f"{where}: {word} is {value!r}, and should be {'true or false' if kind is bool else 'a text'}")
        elif word in _WORDS and kind is str:
            _texts([value], f"{where} {word}", _WORDS[word][1])
    if cut == "column" and words.get("parts") and len(words["parts"]) != len(words.get("holds", ())):
        raise LayoutError(f"{where}: {len(words['parts'])} parts, but it holds {len(words.get('holds', ()))}", "name what each part holds")
    out = []
    for spelled, kind in product(_spelled(key), ("weight", "bias") if "{kind}" in key else ("",)):
        pattern, target = (
            ".".join(filter(None, (base, text.replace("{kind}", kind)))) for base, text in ((stored, spelled), (module, to or spelled))
        )
        braces, known = ([set(re.findall(r"\{[^}]*\}?|\}", text)) for text in (pattern, target)], {"{layer}", "{expert}"})
        if braces[0] != braces[1] or not braces[0] <= known:
            raise LayoutError(
                f"{where}: {pattern} and {target} do not have the same braces", "{layer}, {expert}, {kind} and {one|other} are known"
            )
        path, _, name = target.rpartition(".")
        out.append(Row(pattern, path, name, where=where, **words))
    return out


def _spelled(pattern: str) -> list[str]:
    """`pattern` with each choice of ``{one|other}``."""
    choices = [part.split("|") if place % 2 else [part] for place, part in enumerate(re.split(r"\{([^{}]*\|[^{}]*)\}", pattern))]
    return ["".join(parts) for parts in product(*choices)]


def _regex(pattern: str) -> re.Pattern:
    """`pattern` with ``{layer}``, ``{expert}`` for numbers, and ``*`` for anything."""
    text = re.escape(pattern).replace(r"\*", ".*")
    return re.compile(re.sub(r"\\\{(layer|expert)\\\}", r"(?P<\1>0|[1-9][0-9]*)", text))


def _shape(name: str) -> str:
    """`name` with all numbers alike: names of one row have one shape."""
    return re.sub(r"[0-9]+", "#", name)


@cache
def _file(name: str, folder: Path) -> dict:
    path = folder / f"{name}.toml"
    file = _keys(_read(path), {"model_types", "use", "group"}, path.name)
    _texts(file.get("model_types", []), f"{path.name}: model_types")
    if not isinstance(file.get("group", []), list):
        raise LayoutError(f"{path.name}: group is a list of tables", "write [[group]]")
    return file


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{path} can't be read: {error}") from None


def _keys(value: object, allowed: set[str] | None, where: str) -> dict:
    if not isinstance(value, dict):
        raise LayoutError(f"{where} is {value!r}, and should be a table")
    for key in value.keys() - (allowed or value.keys()):
        raise LayoutError(f"{where}: unknown key {key!r}", f"known are {', '.join(sorted(allowed))}")
    return value


def _texts(value: object, where: str, allowed: tuple[str, ...] | None = None) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LayoutError(f"{where} is {value!r}, and should be a list of texts")
    for item in value:
        if allowed is not None and item not in allowed:
            raise LayoutError(f"{where}: unknown word {item!r}", f"known are {', '.join(allowed)}")
    return tuple(value)
