"""``presharded``: files of which each tensor-parallel rank reads its own, ``…-TP-RRR.safetensors``, and all read ``…-TP-common.safetensors``.

As grok-2 is published. Which tensors every rank has whole, the descriptors' table ``presharded`` says. Read, not written. Source: SGLang
0.5.23 ``models/grok.py``.
"""

import re
from collections import defaultdict

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Format
from reshard.formats.pieces import Piece, pieces_of
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import safetensors
from reshard.stores.files import AnyPath

_FILE = re.compile(r"(.{0,200})-TP-(common|[0-9]{3})\.safetensors")


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    return any(_FILE.fullmatch(name) for name in names)


def _read(folder: AnyPath) -> Contents:
    own: dict[str, dict[int, str]] = defaultdict(dict)
    common = []
    for name in sorted(path.name for path in folder.iterdir()):
        match = _FILE.fullmatch(name)
        if match and match[2] == "common":
            common.append(name)
        elif match:
            own[match[1]][int(match[2])] = name
    if not own:
        raise FormatError(f"{folder} holds no …-TP-RRR.safetensors of a rank's", "copy the folder again, whole")
    count = max(max(ranks) for ranks in own.values()) + 1
    missing = [f"{stem}-TP-{rank:03d}.safetensors" for stem, ranks in own.items() for rank in range(count) if rank not in ranks]
    if missing:
        text = quote(", ".join(missing[:4])) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise FormatError(f"{folder} holds files of {count} ranks, and lacks {text}", "copy the folder again, whole")
    pieces: list[Piece] = []
    for rank in range(count):
        for ranks in own.values():
            pieces += pieces_of(ranks[rank], safetensors.read(folder / ranks[rank])[0], rank)
    for name in common:
        whole = pieces_of(name, safetensors.read(folder / name)[0])
        pieces += [piece._replace(rank=rank) for rank in range(count) for piece in whole]
    return Contents(Mesh(count), pieces)


FORMAT = Format("presharded", "presharded", Rules(grid, even_stages), _recognise, _read, None)
