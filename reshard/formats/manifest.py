"""reshard.json: what a folder that we wrote can't say by its files alone: format, mesh, layout, engine release, sizes.

vLLM loads a folder made for a larger tp without a word and produces garbage; the manifest is how a reader can tell.
"""

import json
from pathlib import Path

from reshard.errors import FormatError
from reshard.place import Mesh
from reshard.stores import DTYPE_SIZE

NAME = "reshard.json"


def read_manifest(folder: Path) -> dict | None:
    """The manifest of `folder`, checked against the files beside it; None where there is none."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        mesh = manifest["mesh"]
        valid = isinstance(manifest["format"], str) and all(isinstance(mesh[k], int) and mesh[k] > 0 for k in ("tp", "pp", "ep"))
        files = manifest["files"].items()
        valid = valid and all(dtype in DTYPE_SIZE for dtype in manifest.get("dtypes", {}).values())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise FormatError(f"{path} is not a manifest that reshard wrote", "delete it to have the folder recognised by its files")
    from reshard.formats import safe_join

    for name, size in files:
        file = safe_join(folder, name)
        if not file.is_file():
            raise FormatError(f"{folder}: {name} is missing; the manifest lists {len(manifest['files'])} files for {mesh_text(mesh)}", "convert or copy the folder again, whole")
        if file.stat().st_size != size:
            raise FormatError(f"{file} has {file.stat().st_size} bytes, the manifest says {size}", "the file is truncated or was replaced; convert or copy it again")
    return manifest


def mesh_of(manifest: dict) -> Mesh:
    mesh = manifest["mesh"]
    return Mesh(mesh["tp"], mesh["pp"], mesh["ep"], mesh.get("etp", 0))


def mesh_text(mesh: dict) -> str:
    return str(Mesh(mesh["tp"], mesh["pp"], mesh["ep"]))


def manifest_bytes(format: str, mesh: Mesh, layout: str, engine_version: str | None, files: dict[str, int], dtypes: dict[str, str]) -> bytes:
    from reshard import __version__

    sizes = {"tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep} | ({"etp": mesh.etp} if mesh.etp else {})
    table = {"reshard": __version__, "format": format, "mesh": sizes, "layout": layout}
    if engine_version:
        table["engine_version"] = engine_version
    if dtypes:
        table["dtypes"] = dtypes
    return (json.dumps({**table, "files": files}, indent=1) + "\n").encode()
