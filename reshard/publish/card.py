"""The model card of a pushed checkpoint: where the weights come from, which format and mesh they are in, how to load them."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from reshard import formats
from reshard.checkpoint import Checkpoint
from reshard.foreign import quote
from reshard.layout import Mesh
from reshard.text import count, human, some

MARK = "<!-- written by reshard -->"


def card(repo: str, folder: str, format: str, mesh: Mesh, engine_version: str | None, source: Checkpoint, base_model: str | None = None,
         left_out: Mapping[str, Any] = {}) -> bytes:  # fmt: skip
    """README.md for `repo`/`folder`. `source` tells architecture and origin; `base_model` says the origin's name where files don't; `left_out`
    are, under "tensors" and "bytes", weights of the origin that are not here."""
    origin = source.origin or {}
    base = _plain(base_model or origin.get("repo") or "")
    architecture, revision, engine_version = _plain(source.architecture), _plain(origin.get("revision") or ""), _plain(engine_version or "")
    local = repo.rpartition("/")[2] + (f"/{folder}" if folder else "")
    head = {"library_name": "transformers" if format == "hf" else "reshard", "tags": ["reshard", format]}
    if base:
        head = {"base_model": base, **head}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", MARK, "", f"# {local}", ""]
    lines += [f"{architecture} in the format `{format}` on the mesh `{mesh}`, written by reshard.", ""]
    rows = [("format", format), ("mesh", f"tp {mesh.tp}, pp {mesh.pp}, ep {mesh.ep}"), ("architecture", architecture)]
    if engine_version:
        rows.append(("engine release", engine_version))
    if base:
        rows.append(("base model", f"[{base}](https://huggingface.co/{base})"))
    if revision:
        rows.append(("source revision", f"`{revision}`"))
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows), ""]
    if left_out.get("tensors"):
        names = left_out["tensors"]
        lines += [f"Not here: {count(len(names), 'tensor')} of the source, {human(left_out['bytes'])}: {_plain(some(names))}", ""]
    where = f'"{repo}"' + (f', subfolder="{folder}"' if folder else "")
    usage = formats.get(format).usage
    load = usage.format(repo=where, id=f"{repo}/{folder}".rstrip("/"), folder=local, tp=mesh.tp, pp=mesh.pp)
    lines += ["Load it:", ""]
    if format not in ("hf", "tp"):  # the others read folders only
        lines += ["```", f"hf download {repo} --local-dir {repo.rpartition('/')[2]}", "```", ""]
    lines += ["```python" if usage.startswith(("import ", "from ")) else "```", load, "```", ""]
    lines += ["Into another format or mesh, straight from here:", "", "```"]
    lines += [f"reshard convert hf://{repo}{'/' + folder if folder else ''} DIR --to hf", "```", ""]
    return "\n".join(lines).encode()


def _plain(text: str) -> str:
    """A name from a file that others wrote, for a page: no markup, no control characters."""
    return html.escape(re.sub(r"[`|\[\]()*\\]", "", quote(text)))
