"""A conversion before it runs: the plan, the output folder laid out to the byte, and what it will cost.

``prepare`` touches headers only and raises everything that can be known to be wrong. ``transaction.py`` runs what it returns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from reshard import formats
from reshard.checkpoint import Checkpoint, read_config
from reshard.conversion.optimizer import Optimizer, optimizer_of
from reshard.conversion.placing import join_to, one_rank, place
from reshard.dtypes import DTYPE_SIZE, TABLE, USER_WORDS
from reshard.errors import PlanError
from reshard.formats import Folder, Target
from reshard.formats.manifest import NAME as MANIFEST
from reshard.formats.manifest import manifest_bytes
from reshard.formats.peft import CONFIG as ADAPTER
from reshard.formats.pieces import placed
from reshard.geometry.block import Stored
from reshard.layout import Layout, Mesh, Placement
from reshard.layout.check import omitted
from reshard.planner.batches import GAP, JOBS, Batch, batches, workers
from reshard.planner.batches import peak as peak_of_fetching
from reshard.planner.copies import Copy
from reshard.planner.plan import Plan
from reshard.planner.tiles import BUFFER, Portion, peak_buffer, portions
from reshard.planner.values import bare
from reshard.stores.beside import is_side_file
from reshard.stores.files import AnyPath
from reshard.stores.identity import Identity, identity
from reshard.text import count, human, some, table

if TYPE_CHECKING:
    from reshard.executor.casts import Casts


@dataclass
class Job:
    """A conversion of `source` to `format` on `mesh`: what is copied (`plan`) and which files come out (`folder`)."""

    source: Checkpoint
    format: str
    mesh: Mesh
    layout: Layout  # that the destination follows: the source's, or what that was before it was quantised
    plan: Plan
    folder: Folder
    companions: dict[str, AnyPath]
    engine_version: str | None
    engine_platform: str | None
    dtype: str | None
    peak_buffer_bytes: int
    batches: list[Batch] | None = None  # of a remote source: what is fetched together
    rank: int | None = None  # the one that is written, where there are others
    max_file: int | None = None
    identities: dict[str, Identity] = field(default_factory=dict)  # of the companions, by path

    @property
    def dequantises(self) -> bool:
        return self.layout is self.source.layout.plain

    @property
    def section(self) -> str:
        """The descriptors' table that the format follows."""
        return formats.get(self.format).section

    def portions(self) -> Sequence[Batch | Portion]:
        """The whole work in pieces that a journal notes by number."""
        return portions(self.plan) if self.batches is None else self.batches

    casts: "Casts | None" = None  # counts values that become infinite, where that is allowed; None: they are refused
    not_held: tuple[Stored, ...] = ()  # tensors of the source that this format is declared to do without
    optimizer: Optimizer | None = None  # whose state goes with the weights

    @property
    def bytes_read(self) -> int:
        return self.plan.bytes_read if self.batches is None else sum(batch.size for batch in self.batches)

    @property
    def bytes_written(self) -> int:
        return sum(file.image.size for file in self.folder.files)

    @property
    def copies(self) -> list[Copy]:
        return self.plan.copies

    @property
    def dropped(self) -> list[str]:
        return self.source.dropped

    @property
    def left_out(self) -> list[str]:
        """Names of weights in the source that no conversion carries."""
        return left_out(self.source, self.not_held)["tensors"]

    def what_is_computed(self) -> str:
        """The tensors that are not copied but computed, and by which functions."""
        names = self.plan.computes
        number = sum(run.count for run in self.plan.join.runs if self.plan.join.patterns[run.pattern].value)
        return f"computed: {count(number, 'tensor')} ({', '.join(sorted(set(names.values())))}): {some(sorted(names))}"

    def what_is_left_out(self) -> str | None:
        """The weights that the result will lack, in words; None where it lacks none."""
        names = self.left_out
        if not names:
            return None
        size = left_out(self.source, self.not_held)["bytes"]
        who = f"format {self.format} does not hold" if self.not_held else f"layout {self.source.layout.name} does not carry"
        return f"left out: {count(len(names), 'tensor')}, {human(size)}, which {who}: {some(names)}"

    def what_is_beside(self) -> list[str]:
        """What becomes of all that a trainer saved beside the model, in lines."""
        if self.optimizer is not None:
            return [self.optimizer.kept, *filter(None, [self.optimizer.lost])]
        return [told] if (told := self.source.what_is_beside()) else []

    def ranks(self) -> list[dict[str, int]]:
        """Per destination rank: bytes it needs read, bytes of its files, bytes of its tensors."""
        written: dict[int, int] = {}
        for file in self.folder.files:
            written[file.rank] = written.get(file.rank, 0) + file.image.size
        return [{**row, "bytes_written": written.get(row["rank"], 0)} for row in self.plan.per_rank()]

    def describe(self, path: str | None = None) -> str:
        """What moves where, as a table; `path` is the destination where one is known."""
        source, plan = self.source, self.plan
        rows = [(r["rank"], human(r["bytes_read"]), human(r["bytes_written"]), human(r["bytes_held"])) for r in self.ranks()]
        lines = [
            f"{source.path}  {source.format} {source.mesh}  {source.architecture}",
            f"→ {path or '(nothing is written)'}  {self.format} {self.mesh}\n",
            table(rows, ("rank", "reads", "writes", "holds")),
            f"\n{len(plan.destinations)} tensors in {len(self.folder.files)} file{'s' * (len(self.folder.files) != 1)}, {human(self.peak_buffer_bytes)} of buffers at most",
            f"reads {human(self.bytes_read)}, {_above(self.bytes_read, plan.least_bytes_read, self._why_more())}",
            f"writes {human(self.bytes_written)}, {_above(self.bytes_written, plan.bytes_held, 'headers')}",
        ]
        computed = sorted(set(self.dropped) - set(self.left_out))
        lines += [self.what_is_computed()] if self.plan.computes else []
        lines += [source.merges] if source.merges else []
        left = self.what_is_left_out()
        lines += [left] if left else []
        if computed:
            lines.append(
                f"dropped: {count(len(computed), 'buffer')}, {human(source.dropped_bytes - source.left_out_bytes)}: {some(computed)}"
            )
        lines += self.what_is_beside()
        lines += [f"padded: {some(plan.padded)}"] if plan.padded else []
        return "\n".join(lines)

    __str__ = describe

    def _why_more(self) -> str:
        return (
            "replicas are compared"
            if self.bytes_read == self.plan.bytes_read
            else f"what lies between, up to {human(GAP)} at a time, costs less than another request"
        )

    def to_json(self, path: str | None = None) -> dict[str, object]:
        """The keys that `convert` and `plan` share (CLI.md)."""
        source = self.source
        return {
            "source": {
                "path": str(source.path),
                "format": source.format,
                "architecture": source.architecture,
                "mesh": mesh_json(source.mesh),
            }
            | ({"revision": source.revision} if source.remote else {})
            | ({"merged": source.merges} if source.merges else {}),
            "destination": {"path": path, "format": self.format, "architecture": source.architecture, "mesh": mesh_json(self.mesh)},
            "tensors": len(self.plan.destinations),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "least_bytes_read": self.plan.least_bytes_read,
            "least_bytes_written": self.plan.bytes_held,
            "peak_buffer_bytes": self.peak_buffer_bytes,
            "files": [{"path": file.path, "bytes": file.image.size} for file in self.folder.files],
            "dropped": self.dropped,
            "dropped_bytes": source.dropped_bytes,
            "left_out": self.left_out,
            "left_out_bytes": left_out(source, self.not_held)["bytes"],
            "beside": {key: {"tensors": number, "bytes": size} for key, (number, size) in source.beside.items()},
            "computed": self.plan.computes,
            "padded": self.plan.padded,
        }


def _above(size: int, least: int, why: str) -> str:
    """How far `size` is from the least that could do."""
    return "the least possible" if size == least else f"{size / max(least, 1):.4f} × the least possible ({why})"


def mesh_json(mesh: Mesh) -> dict[str, int]:
    return {"tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep}


def prepare(
    source: Checkpoint,
    *,
    format: str,
    mesh: Mesh,
    dtype: str | None = None,
    engine_version: str | None = None,
    engine_platform: str | None = None,
    max_file: int | None = None,
    rank: int | None = None,
    jobs: int | None = None,
    buffer: int = BUFFER,
    allow_overflow: bool = False,
    dequantise: bool = False,
    optimizer: bool = False,
) -> Job:
    """Plan the conversion of `source`, for all ranks or for `rank` alone (replicas in the source are then not compared).

    `dequantise`: the weights of a quantised checkpoint are computed from their codes and scales.
    `optimizer`: its state goes with the weights. `allow_overflow`: a value that has no room in its new dtype becomes infinite, and is counted, instead of ending the run.
    Raises PlanError with every problem found; nothing is written.
    """
    kind, source = formats.get(format), source.precise(dtype)
    jobs = jobs or default_jobs(source)
    if kind.write is None:
        raise PlanError([f"format {format} is read, not written"], "dcp, transformers and hf are written for the same readers")
    if format in ("hf", "peft") and (mesh.tp, mesh.pp, mesh.ep) != (1, 1, 1):
        raise PlanError([f"format {format} is whole: it has no {mesh}"], "leave --tp, --pp and --ep out, or use --to tp")
    placement = place(source, format, mesh, engine_version, engine_platform, dequantise)
    every = kind.rules.ranks(mesh) if kind.whole else placement.ranks  # those whose files there are
    ranks = every if rank is None else [one_rank(every, mesh, rank)]
    kept = optimizer_of(source, kind, placement) if optimizer else None
    plan = join_to(source, placement, dtype, None if kind.whole else ranks, complete=rank is None, optimizer=kept)
    without = not_held(source, placement)
    engine_version = engine_version or kind.newest
    target = Target(placement, ranks, engine_version, max_file, mesh if kind.whole else None, kept.beside if kept else None)
    folder = kind.write(target, list(plan.destinations))
    here = placed(plan.destinations, folder.pieces, complete=rank is None)
    if all(piece.region is None for piece in folder.pieces):
        plan = plan.located(here.stored)
    else:  # tensors that the format cuts itself: each of its pieces is a destination, counted like any
        plan = join_to(source, placement, dtype, None, rank is None, here.stored, kept)
    sizes = {file.path: file.image.size for file in folder.files}
    native = native_dtypes(source, plan)
    alone = rank is not None and len(every) > 1
    folder.small[MANIFEST] = manifest_bytes(format, target.mesh, source.layout.name, engine_version, sizes, native, source.origin,
                                            (rank, len(every)) if rank is not None and alone else None, left_out(source, without),
                                            engine_platform)  # fmt: skip
    told = source.made or (
        read_config(source.config_path) if (dtype or dequantise) and source.config_path and source.adapter is None else None
    )
    if told:
        config = without_quantisation(told) if dequantise else dict(told)
        if dtype:
            key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
            config[key] = TABLE[USER_WORDS[dtype]].torch
        folder.small["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    companions = {name: path for name, path in companion_files(source).items() if name not in folder.small}
    fetched = batches(plan) if source.remote else None
    peak = peak_buffer(plan, jobs, buffer) if fetched is None else peak_of_fetching(workers(jobs, buffer))
    seen = {str(path): identity(path.stat()) for path in companions.values() if isinstance(path, Path)}
    return Job(source, format, target.mesh, placement.layout, plan, folder, companions, engine_version, engine_platform, dtype, peak, fetched, rank if alone else None, max_file, seen,
               counting(allow_overflow), without, kept)  # fmt: skip


class LeftOut(TypedDict):
    """Weights that a result lacks: their names, and their bytes."""

    tensors: list[str]
    bytes: int


def left_out(source: Checkpoint, not_held: Iterable[Stored] = ()) -> LeftOut:
    """Weights in the files of `source` that no conversion carries, or (`not_held`) this one: their names, and their bytes."""
    every = [*source.left_out, *not_held]
    return {"tensors": sorted({stored.name for stored in every}), "bytes": sum(stored.size * DTYPE_SIZE[stored.dtype] for stored in every)}


def not_held(source: Checkpoint, placement: Placement) -> tuple[Stored, ...]:
    """Tensors of `source` that the destination's format is declared to do without."""
    gone = omitted(placement)
    likely = [s for s in source.stored if s.parts and all(part.first[0] in gone.names for part in s.parts)] if gone.names else []
    return tuple(s for s in likely if all(key in gone for key, _ in s.blocks))


def without_quantisation(config: Mapping[str, object]) -> dict[str, object]:
    """`config` of a model whose weights are numbers again."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    nested = kept.get("text_config")
    return kept | {"text_config": without_quantisation(nested)} if isinstance(nested, dict) else kept


def counting(allow_overflow: bool) -> "Casts | None":
    if not allow_overflow:
        return None
    from reshard.executor.casts import Casts

    return Casts(allow=True)


def default_jobs(source: Checkpoint) -> int:
    """Threads, where none are asked for."""
    return JOBS if source.remote else 2


def native_dtypes(source: Checkpoint, plan: Plan) -> dict[str, str]:
    """The model's own dtype of each tensor that the destination's engine wants in another: noted, so that it comes back."""
    wanted = {bare(part.first[0]): s.entry.dtype for s in plan.destinations if s.entry and s.entry.dtype for part in s.parts}
    if not wanted:
        return {}
    held = {name: s.dtype for s in source.stored for part in s.parts if (name := bare(part.first[0])) in wanted}
    return {name: own for name in held for own in [source.native.get(name, held[name])] if own != wanted[name]}


def companion_files(source: Checkpoint) -> dict[str, AnyPath]:
    """config.json, tokenizer and their like: name in the destination → file at the source."""
    if source.adapter is not None:  # its config.json is its base's
        return {
            path.name: path
            for path in sorted(source.path.iterdir())
            if path.name == ADAPTER or (is_side_file(path.name) and path.name != "config.json")
        }
    folder = source.config_path.parent if source.config_path else source.path
    # code that nobody here asked for is not taken from the Hub
    found = {path.name: path for path in folder.iterdir() if is_side_file(path.name, code=not source.remote) and path.is_file()}
    if source.config_path and not source.made:
        found["config.json"] = source.config_path
    return dict(sorted(found.items()))
