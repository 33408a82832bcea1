"""reshard.json: what a folder that we wrote can't say by its files alone: format, mesh, layout, engine release, sizes.

vLLM loads a folder made for a larger tp without a word and produces garbage; the manifest is how a reader can tell.
"""

import json
from collections.abc import Mapping

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import LIMIT, parse, quote
from reshard.layout import Mesh
from reshard.stores.files import AnyPath, read_small, safe_join
from reshard.text import some

NAME = "reshard.json"
_MOST = 65536  # ranks, as the command line allows


def read_manifest(folder: AnyPath) -> dict | None:
    """The manifest of `folder`, checked against the files beside it; None where there is none."""
    path = folder / NAME
    if not path.is_file():
        return None
    raw = read_small(path)
    try:
        manifest = parse(raw)
        problem = _problem(manifest)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise FormatError(f"{path} is not a manifest that reshard wrote: {problem}", "delete it to have the folder recognised by its files")
    if "rank" in manifest:  # as written up to version 0.1
        raise FormatError(
            f"{folder} holds rank {manifest['rank']} alone, of {mesh_of(manifest)}", "convert again, all ranks into one folder"
        )
    if "ranks" in manifest:
        held, count = manifest["ranks"]["held"], manifest["ranks"]["of"]
        missing = [str(rank) for rank in range(count) if rank not in held]
        text = f"{folder} holds {len(held)} of the {count} ranks of {mesh_of(manifest)}; missing: {some(missing)}"
        raise FormatError(text, f"convert into the same folder with --rank {missing[0]}{' and so on' * (len(missing) > 1)}")
    files = {name: safe_join(folder, name) for name in manifest["files"]}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise FormatError(f"{folder}: {missing[0]} is missing ({len(missing)} of the {len(files)} files that the manifest lists for {mesh_of(manifest)})",
                          "convert or copy the folder again, whole")  # fmt: skip
    for name, file in files.items():
        if file.stat().st_size != manifest["files"][name]:
            raise FormatError(f"{file} has {file.stat().st_size} bytes, the manifest says {manifest['files'][name]}",
                              "the file is truncated or was replaced; convert or copy it again")  # fmt: skip
    return manifest


def _problem(manifest: object) -> str | None:
    """What is wrong with a manifest's own content; None if nothing."""
    if not isinstance(manifest, dict):
        return f"it is a {type(manifest).__name__}, not an object"
    mesh, files, dtypes = manifest.get("mesh"), manifest.get("files"), manifest.get("dtypes", {})
    if not isinstance(mesh, dict) or not all(type(mesh.get(key)) is int and mesh[key] > 0 for key in ("tp", "pp", "ep")):
        return f"its mesh is {quote(mesh)}, expected sizes tp, pp and ep"
    etp = mesh.get("etp", 0)
    if type(etp) is not int or etp < 0:
        return f"its mesh is {quote(mesh)}, expected a size etp or none"
    if max(mesh["tp"] * mesh["pp"], mesh["ep"], etp) > _MOST:
        return f"its mesh is {quote(mesh)}, of more than {_MOST} ranks"
    for key in ("format", "layout", "engine_version", "engine_platform"):
        if not isinstance(manifest.get(key, None if key == "format" else ""), str):
            return f"its {key} is {quote(manifest.get(key))}, expected text"
    if not isinstance(files, dict) or not all(type(size) is int and len(name.encode()) <= 255 for name, size in files.items()):
        return f"its files are {quote(files)}, expected names and sizes"
    if type(manifest.get("rank", 0)) is not int:
        return f"its rank is {quote(manifest['rank'])}, expected a number"
    if "ranks" in manifest and not _sound_ranks(manifest["ranks"]):
        return f"its ranks are {quote(manifest['ranks'])}, expected those that it holds and the number of all"
    source = manifest.get("source", {})
    if not isinstance(source, dict) or not all(isinstance(source.get(key, ""), str) for key in ("repo", "revision")):
        return f"its source is {quote(source)}, expected a repository and a revision"
    left = manifest.get("left_out", {"tensors": [], "bytes": 0})
    names, size = (left.get("tensors"), left.get("bytes")) if isinstance(left, dict) else (None, None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or type(size) is not int:
        return f"its left_out is {quote(left)}, expected tensors and bytes"
    if not isinstance(dtypes, dict) or not all(isinstance(word, str) and word in DTYPE_SIZE for word in dtypes.values()):
        return f"its dtypes are {quote(dtypes)}, expected names and dtypes"
    return None


def mesh_of(manifest: dict) -> Mesh:
    mesh = manifest["mesh"]
    return Mesh(mesh["tp"], mesh["pp"], mesh["ep"], mesh.get("etp", 0))


def _sound_ranks(ranks: object) -> bool:
    if not isinstance(ranks, dict) or not isinstance(ranks.get("held"), list) or type(ranks.get("of")) is not int:
        return False
    held = ranks["held"]
    numbers = all(type(rank) is int for rank in held) and 0 < len(set(held)) == len(held) < ranks["of"] <= _MOST
    return numbers and isinstance(ranks.get("conversion", ""), str)


def read_incomplete(folder: AnyPath) -> dict | None:
    """The manifest of a folder that holds some of a mesh's ranks and waits for the others; None of any other folder."""
    path = folder / NAME
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LIMIT:
            return None
        manifest = parse(path.read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if _problem(manifest) is None and "ranks" in manifest else None


def manifest_bytes(format: str, mesh: Mesh, layout: str, engine_version: str | None, files: dict[str, int], dtypes: dict[str, str],
                   source: Mapping[str, str] | None = None, rank: tuple[int, int] | None = None, left_out: Mapping = {},
                   engine_platform: str | None = None) -> bytes:  # fmt: skip
    """A manifest. `rank` is the only one that the folder holds as yet, and the number of all; `left_out` are, under "tensors"
    and "bytes", weights of the source that are not here."""
    from reshard import __version__

    sizes = {"tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep} | ({"etp": mesh.etp} if mesh.etp else {})
    table = {"reshard": __version__, "format": format, "mesh": sizes, "layout": layout}
    if engine_version:
        table["engine_version"] = engine_version
    if engine_platform:
        table["engine_platform"] = engine_platform
    if dtypes:
        table["dtypes"] = dict(sorted(dtypes.items()))
    if source:
        table["source"] = dict(source)
    if rank is not None:
        table["ranks"] = {"held": [rank[0]], "of": rank[1]}
    if left_out.get("tensors"):
        table["left_out"] = dict(left_out)
    return _text({**table, "files": files})


def of_conversion(manifest: bytes, conversion: str) -> bytes:
    """One rank's manifest with a digest of the conversion that it is of: other ranks must be of the same."""
    table = parse(manifest)
    table["ranks"]["conversion"] = conversion
    return _text(table)


def merged(there: dict, new: bytes) -> bytes:
    """The manifest of a folder that held what `there` says and to which the ranks of `new` were added; with the last one it is
    that of a folder made at once."""
    table = parse(new)
    held = sorted({*there["ranks"]["held"], *table["ranks"]["held"]})
    table["files"] |= there["files"]
    dtypes = there.get("dtypes", {}) | table.get("dtypes", {})
    if dtypes:
        table["dtypes"] = dict(sorted(dtypes.items()))
    if len(held) < table["ranks"]["of"]:
        table["ranks"]["held"] = held
    else:
        del table["ranks"]
    order = ("reshard", "format", "mesh", "layout", "engine_version", "engine_platform", "dtypes", "source", "ranks", "left_out", "files")
    return _text({key: table[key] for key in order if key in table})


def _text(table: dict) -> bytes:
    table["files"] = dict(sorted(table["files"].items()))
    return (json.dumps(table, indent=1) + "\n").encode()
