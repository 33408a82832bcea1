"""The library: open, plan, convert, load, diff. The command line calls these and prints what they return."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.checkpoint import Checkpoint, open_checkpoint
from reshard.comparison.difference import DiffReport
from reshard.conversion.job import Job, prepare
from reshard.conversion.placing import one_rank, place, rank_at
from reshard.errors import PlanError
from reshard.hub import is_remote
from reshard.layout import Mesh
from reshard.planner.tiles import BUFFER

if TYPE_CHECKING:
    from reshard.conversion.transaction import Report
    from reshard.publish.pull import Pulled
    from reshard.publish.push import Pushed

open = open_checkpoint


def _opened(source: Checkpoint | str | Path, options: dict[str, Any]) -> Checkpoint:
    chosen = {name: options.pop(name) for name in ("layout", "config", "cache", "adapter") if name in options}
    if not isinstance(source, Checkpoint):
        return open_checkpoint(source, **chosen)
    if chosen:
        names = " and ".join(chosen)
        raise PlanError([f"{names} given with a checkpoint that is open already, as {source.layout.name}"], f"pass {names} to reshard.open")
    return source


def plan(source: Checkpoint | str | Path, *, format: str, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 0, **options: Any) -> Job:
    """What a conversion of `source` to `format` would read and write, to the byte. Reads headers, writes nothing.

    `options`: `dtype` (bf16, fp16, fp32), `dequantise` (weights of a quantised checkpoint are computed), `quantise` (fp8: weights become codes and scales), `refine` (scales are repeated on finer blocks where a cut misses them), `optimizer` (its state goes with the weights), `allow_overflow` (values with no room in it become infinite), `engine_version`, `engine_platform` (cuda, rocm, cpu), `max_file` (bytes), `rank` (that one alone), `jobs`, `buffer` (bytes), and `layout`, `config`, `cache`, `adapter` for opening.
    Raises ReshardError with all problems at once.
    """
    ckpt = _opened(source, options)
    return prepare(ckpt, format=format, mesh=Mesh(tp, pp, ep, etp), **options)


def convert(
    source: Checkpoint | str | Path,
    destination: str | Path,
    *,
    format: str,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 0,
    overwrite: bool = False,
    fsync: bool = True,
    jobs: int | None = None,
    buffer: int = BUFFER,
    progress: Callable[[int], None] = lambda size: None,
    **options: Any,
) -> "Report | Pushed":
    """Convert `source` into the folder `destination`; `progress` is told bytes read as they are read. Returns a Report.

    Options as for ``plan``. The destination appears whole or not at all, and an interrupted call continues when repeated.
    It may be hf://ORG/NAME[@BRANCH][/SUBDIR]: then `public`, `create_pr`, `include_code`, `base_model` and `scratch` are options too, and
    what comes back is ``hub.push.Pushed``.
    """
    from reshard.conversion.transaction import convert as run

    if is_remote(destination):
        from reshard.publish.push import convert_and_push

        chosen = {name: options.pop(name) for name in ("public", "create_pr", "include_code", "base_model", "scratch") if name in options}
        job = plan(source, format=format, tp=tp, pp=pp, ep=ep, etp=etp, jobs=jobs, buffer=buffer, **options)
        return convert_and_push(job, str(destination), overwrite=overwrite, jobs=jobs, buffer=buffer, progress=progress, **chosen)
    job = plan(source, format=format, tp=tp, pp=pp, ep=ep, etp=etp, jobs=jobs, buffer=buffer, **options)
    return run(job, destination, overwrite=overwrite, fsync=fsync, jobs=jobs, buffer=buffer, progress=progress)


def load(
    source: Checkpoint | str | Path,
    *,
    format: str,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 0,
    rank: int = 0,
    at: tuple[int, ...] | None = None,
    into: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    engine_version: str | None = None,
    engine_platform: str | None = None,
    dequantise: bool = False,
    allow_overflow: bool = False,
    jobs: int | None = None,
    buffer: int = BUFFER,
    **options: Any,
) -> Mapping[str, "object"]:
    """The tensors of one rank of (`format`, mesh), as {stored name: torch tensor} on `device` (cpu by default, cuda, cuda:N).

    The rank is one by number, or stands `at` (tp, pp) or (tp, pp, ep). Reads this rank's bytes only. Constants that the engine demands are
    among the tensors. `dequantise` computes the weights of a quantised checkpoint. `into`: {stored name: tensor} to be filled in place instead,
    each on its device and in its dtype: all that the rank has must be there, and nothing else (constants may be left out). `jobs` threads read,
    within `buffer` bytes of buffers; on the way to a device as many again stage them, page-locked where the system has such memory: the host
    never holds the rank. Raises ReshardError.
    """
    from reshard.executor.devices import device_of
    from reshard.loading import load_into, load_rank

    ckpt = _opened(source, options).precise(dtype)
    if options:
        raise TypeError(f"load() got an unexpected option {next(iter(options))!r}")
    if into is not None and (device is not None or dtype is not None):
        raise PlanError(["device or dtype given together with into, whose tensors have their own"], "leave them out")
    placement = place(ckpt, format, Mesh(tp, pp, ep, etp), engine_version, engine_platform, dequantise)
    chosen = one_rank(placement.ranks, placement.mesh, rank) if at is None else rank_at(placement, at)
    limits: dict[str, Any] = {"jobs": jobs, "buffer": buffer, "allow_overflow": allow_overflow}
    if into is not None:
        return load_into(ckpt, placement, chosen, into, **limits)
    return load_rank(ckpt, placement, chosen, dtype, device_of(device or "cpu"), **limits)


def diff(
    a: Checkpoint | str | Path,
    b: Checkpoint | str | Path,
    *,
    layout: str | Path | None = None,
    config: str | Path | None = None,
    formats: tuple[str | None, str | None] = (None, None),
    dtype: str | None = None,
    atol: float = 0.0,
    maps: bool = False,
    dequantise: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> DiffReport:
    """Compare two checkpoints of any layouts, bit for bit, in the axes they share; nothing is written, no model held.

    `formats` are those of `a` and of `b`, where their files don't tell. With `dtype` (bf16, fp16, fp32) floating-point tensors are equal when they are once both sides are cast to it, which confirms a
    cast; with `atol` elements are equal that lie within it of each other. `maps`: each difference tells where it lies (`heat`).
    `dequantise`: of a quantised checkpoint its weights are compared with those of the other, which is not.
    """
    from reshard.comparison.compare import Likeness, compare
    from reshard.dtypes import USER_WORDS

    if dtype is not None and dtype not in USER_WORDS:
        raise PlanError([f"dtype {dtype!r} is none to compare in"], f"use one of {', '.join(USER_WORDS)}")
    likeness = Likeness(USER_WORDS[dtype] if dtype else None, atol)
    opened = open_pair(a, b, layout=layout, config=config, formats=formats)
    if dequantise:
        from reshard.comparison.dequantised import compare_dequantised

        return compare_dequantised(*opened, progress, likeness)
    return compare(*opened, progress, likeness, maps)


def open_pair(
    a: Checkpoint | str | Path,
    b: Checkpoint | str | Path,
    *,
    layout: str | Path | None = None,
    config: str | Path | None = None,
    formats: tuple[str | None, str | None] = (None, None),
) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints to be compared, opened; one without a config.json has `config`, or else the other's."""

    def opened(one: Checkpoint | str | Path, other: Checkpoint | str | Path, format: str | None) -> Checkpoint:
        if isinstance(one, Checkpoint):
            return _opened(one, {"layout": layout} if layout is not None else {})
        if config or is_remote(one) or (Path(one) / "config.json").is_file() or not Path(one).is_dir():
            return open_checkpoint(one, format=format, layout=layout, config=config)
        return open_checkpoint(one, format=format, layout=layout, config=other.config_path if isinstance(other, Checkpoint) else other)

    return opened(a, b, formats[0]), opened(b, a, formats[1])


def pull(source: str, destination: str | Path, **options: Any) -> "Pulled":
    """Fetch hf://ORG/NAME[@REV][/SUBDIR] into a folder, its files as they are; ``convert`` takes such a source too. See ``hub.pull``."""
    from reshard.publish.pull import pull as run

    return run(source, destination, **options)


def push(folder: str | Path, destination: str, **options: Any) -> "Pushed":
    """Publish the checkpoint in `folder` as hf://ORG/NAME[@BRANCH][/SUBDIR], in one commit. See ``hub.push``."""
    from reshard.publish.push import push as run

    return run(folder, destination, **options)
