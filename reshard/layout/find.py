"""Descriptors by file and by architecture: a file with those that it extends, resolved."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.layout.files import File, Use, layout_dir, parse_file
from reshard.layout.model import Descriptor
from reshard.layout.resolve import resolve
from reshard.stores.files import reading


@lru_cache(maxsize=1)
def builtin_descriptors() -> Mapping[str, Descriptor]:
    """All descriptors of layouts/ that are for an architecture."""
    found = {path.stem: _chain(path) for path in sorted(layout_dir().glob("*.toml"))}
    return {name: resolve(name, chain) for name, chain in found.items() if chain[-1].architectures}


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
            chain = _chain(path)
            if set(wanted) & set(chain[-1].architectures):
                return resolve(path.stem, chain)
    return None


def parts_of(name: str, place: str) -> tuple[Use, ...]:
    """The parts that stand in `place` of a built-in descriptor, in order."""
    given = [file.places[place] for file in _chain(layout_dir() / f"{name}.toml") if isinstance(file.places.get(place), dict)]
    return next((keys["parts"] for keys in reversed(given) if "parts" in keys), ())


def load_descriptor(path: Path) -> Descriptor:
    """Read, check and resolve one TOML file. Every mistake in it is a LayoutError that names file, table and key."""
    path = Path(path)
    with reading(f"layout {path}", LayoutError):
        try:
            return _loaded(path)
        except LayoutError as error:
            if str(path) in str(error):
                raise
            raise LayoutError(f"layout {path}: {error}", error.hint) from None  # a part's own sentence, with the file that uses it


def _loaded(path: Path) -> Descriptor:
    chain = _chain(path)
    if not chain[-1].architectures:
        raise LayoutError(f"layout {path}: architectures must list the names that config.json uses")
    return resolve(path.stem, chain)


def _chain(path: Path, below: tuple[str, ...] = ()) -> list[File]:
    """The file and those it extends, parent first."""
    file = parse_file(path)
    if file.extends is None:
        return [file]
    beside = path.with_name(f"{file.extends}.toml")
    parent = beside if beside.is_file() and beside != path else layout_dir() / f"{file.extends}.toml"
    if file.extends in below or parent == path or not parent.is_file():
        hint = f"built in are {', '.join(sorted(p.stem for p in layout_dir().glob('*.toml')))}"
        raise LayoutError(f"layout {path}: extends: cannot extend {file.extends!r}", hint)
    return [*_chain(parent, (*below, path.stem)), file]
