"""An opened checkpoint: its tensors with the places of their bytes, its layout, and what of its files no conversion carries."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.dtypes import DTYPE_SIZE
from reshard.foreign import quote
from reshard.geometry.block import Stored
from reshard.layout import Layout, Mesh
from reshard.planner.values import bare
from reshard.stores.files import AnyPath
from reshard.stores.identity import Identity
from reshard.text import count, human

if TYPE_CHECKING:
    from reshard.checkpoint.adapter import Adapter
    from reshard.executor.sources import Source
    from reshard.formats import States
    from reshard.planner.batches import Batch


@dataclass
class Checkpoint:
    """An opened checkpoint. `stored` are its tensors.

    `left_out` are weights in its files that the layout declares but does not describe (`omit`: multi-token prediction), each
    under a key of its own name. `dropped` are the names of all that no conversion carries: those, constants that engines
    want, and buffers that can be computed again; `dropped_bytes` is their size in the files. `beside` is what a trainer saved
    with the model, key → (tensors, bytes): its optimizer's state.
    """

    path: AnyPath
    format: str
    mesh: Mesh
    layout: Layout
    stored: list[Stored]
    dropped: list[str] = field(default_factory=list)
    dropped_bytes: int = 0
    left_out: list[Stored] = field(default_factory=list)
    writer: str | None = None  # the program that wrote it, where its files show that
    beside: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    engine_version: str | None = None
    config_path: AnyPath | None = None
    origin: Mapping[str, str] | None = None  # repo and revision on the Hub that it comes from, where that is known
    native: Mapping[str, str] = field(default_factory=dict)  # the model's dtype of tensors that this format's engine widened
    states: "Callable[[], States] | None" = None  # of an optimizer, where the files may hold one
    whole: list[Stored] = field(default_factory=list)  # with `states`: the model's tensors as they are before they are cut
    key: str = ""  # what stands before their names in the files
    adapter: "Adapter | None" = None  # of a LoRA adapter: what it does to its base
    merges: str | None = None  # which adapter is merged into it as it is read, in words
    identities: Mapping[str, Identity] = field(default_factory=dict)  # of local files, by path, when their headers were read

    made: Mapping[str, object] | None = None  # a config.json made of the settings in `config_path`, where there is none
    masters: "Callable[[], Checkpoint] | None" = None  # opens its weights as an optimizer holds them beside it, in fp32

    def precise(self, dtype: str | None) -> "Checkpoint":
        """The checkpoint to read where `dtype` (a user's word) is wanted: an optimizer's own weights for fp32, where they are beside."""
        return self.masters() if dtype == "fp32" and self.masters else self

    @property
    def holders(self) -> int:
        """How many ranks' files it consists of."""
        return len({stored.rank for stored in self.stored})

    def what_is_beside(self) -> str | None:
        """What stands beside the model in its files, or was made for lack of a config.json, in words; None where nothing does."""
        if self.made and self.config_path:
            return f"config.json is made of {self.config_path.name}, which tells no ids of tokens, and of lengths only what it names"
        if not self.beside:
            return None
        each = [f"{quote(key)} ({count(number, 'tensor')}, {human(size)})" for key, (number, size) in sorted(self.beside.items())]
        return f"beside the model, and not read: {', '.join(each)}"

    @property
    def architecture(self) -> str:
        return quote((self.layout.config.get("architectures") or [self.layout.name])[0])

    @property
    def tensors(self) -> list[Stored]:
        return self.stored

    @property
    def files(self) -> list[str]:
        return sorted({stored.file for stored in self.stored})

    @property
    def parameters(self) -> int:
        """Numbers in the model's tensors, each tensor counted once, however many files hold it; those of an adapter merged into them aside."""
        keys = {
            key
            for stored in self.stored
            for part in stored.parts
            for key, _ in part.each()
            if bare(key[0]) in self.layout.descriptor.tensors
        }
        return sum(prod(self.layout.shape_of(key)) for key in keys)

    @property
    def bytes(self) -> int:
        return sum(stored.size * DTYPE_SIZE[stored.dtype] for stored in self.stored)

    @property
    def remote(self) -> bool:
        return not isinstance(self.path, Path)

    @property
    def name(self) -> str:
        """What it is called where it must not be confused: links followed, a branch's commit said."""
        return self.path.pinned if self.remote else os.path.realpath(self.path)

    @property
    def revision(self) -> str | None:
        """The commit, of a checkpoint on the Hub."""
        return self.path.revision if self.remote else None

    @property
    def received(self) -> int:
        """Bytes of content that came over the network so far."""
        return self.path.repository.received if self.remote else 0

    @property
    def left_out_bytes(self) -> int:
        return sum(stored.size * DTYPE_SIZE[stored.dtype] for stored in self.left_out)

    def source(self, whole: Iterable["Batch"] = (), jobs: int = 8) -> "Source":
        """Its bytes, to be read; of a remote one, `whole` are the batches of a run that fetches everything."""
        from reshard.executor.sources import Source

        if not self.remote:
            return Source(self.path, self.identities)
        from reshard.hub.source import HubSource

        return HubSource(self.path, whole, jobs)
