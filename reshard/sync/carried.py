"""A side as text, for a control plane (HTTP, Ray) to carry: not its tensors, but what it was made from. Pure.

The other end makes the same side with its own reshard; where that places tensors otherwise, the plans' fingerprints differ and the
first step is refused.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reshard.errors import PlanError
from reshard.layout import Layout, load_descriptor
from reshard.layout.find import layout_dir
from reshard.sync.fp8_blocks import Fp8
from reshard.sync.sharding import Sharding, tuples

_VERSION = 1


def written(layout: Layout, recipe: Mapping[str, Any], *, whole: bool) -> str:
    """The text of a side made as `recipe` says. Raises PlanError where it has none."""
    descriptor, made = layout.descriptor, dict(recipe)
    builtin = not descriptor.path and (layout_dir() / f"{descriptor.name}.toml").is_file()
    if not made or not whole or not (builtin or descriptor.path):
        raise PlanError(
            [f"this side of {layout.name} has no JSON form"], "carry one that placed() or sharded() made, of a layout that has a file"
        )
    if "sharded" in made:
        alike: dict[Sharding, list[str]] = {}
        for name, sharding in made["sharded"]["shardings"].items():
            alike.setdefault(sharding, []).append(name)
        groups = [{"ranks": s.ranks, "cuts": s.cuts, "names": names} for s, names in alike.items()]
        made["sharded"] = {**made["sharded"], "shardings": groups}
    if isinstance(fp8 := made.get("placed", {}).get("fp8"), Fp8):
        made["placed"] = {**made["placed"], "fp8": {"tensors": sorted(fp8.tensors), "edge": fp8.edge}}
    return json.dumps({"reshard side": _VERSION, "layout": descriptor.name, "builtin": builtin, "config": layout.config, **made})


def read(text: str, descriptor: str | Path | None) -> tuple[str, Layout, dict[str, Any], dict[str, str]]:
    """How to make the side: the constructor's name, the layout, arguments, and dtypes that tensors have. Raises PlanError."""
    with reading():
        found = json.loads(text)
        if found["reshard side"] != _VERSION:
            raise ValueError(f"version {found['reshard side']}, expected {_VERSION}")
        name, kind = found["layout"], "placed" if "placed" in found else "sharded"
        if not found["builtin"] and descriptor is None:
            raise PlanError([f"layout {name} is not one of reshard's"], "pass its file: Side.from_json(text, 'my.toml')")
        file = layout_dir() / f"{Path(name).name}.toml" if found["builtin"] else Path(descriptor or "")
        made = dict(found[kind])
        if kind == "sharded":
            groups = [(Sharding(group["ranks"], tuples(group["cuts"])), group["names"]) for group in made["shardings"]]
            made["shardings"] = {name: sharding for sharding, names in groups for name in names}
        elif isinstance(made["fp8"], dict):
            made["fp8"] = Fp8(frozenset(made["fp8"]["tensors"]), made["fp8"]["edge"])
        return kind, load_descriptor(file).bind(found["config"]), made, dict(found.get("typed", {}))


@contextmanager
def reading() -> Iterator[None]:
    """What goes wrong with a text from elsewhere is a PlanError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise PlanError([f"this is no side's JSON: {type(error).__name__}: {error}"], "use what Side.to_json wrote") from None
