"""The command line: parse, call the library, print. Results go to stdout, everything else to stderr."""

import gc
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import click

from reshard import __version__
from reshard.errors import ReshardError
from reshard.text import count, human, table

FORMATS = ["hf", "tp", "vllm", "sglang", "megatron", "rank-pt"]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Size(click.ParamType):
    """A number of bytes such as 128MB."""

    name = "size"

    def convert(self, value, param, ctx):
        if isinstance(value, int):
            return value
        text = value.strip().upper().removesuffix("/S")
        number = text.rstrip("KMGTIB")
        try:
            return int(float(number) * _UNITS[text[len(number):]])
        except (ValueError, KeyError):
            self.fail(f"{value!r} is not a size; write it like 128MB", param, ctx)


class Place(click.ParamType):
    """A folder, or hf://ORG/NAME[@REV][/SUBDIR]; a malformed one is wrong usage."""

    name = "location"

    def __init__(self, target: bool = False, exists: bool = False):
        self._target, self._exists = target, exists

    def convert(self, value, param, ctx):
        from reshard.hub import is_remote

        if is_remote(value):
            from reshard.hub.location import parse, parse_target

            try:
                return str((parse_target if self._target else parse)(value))
            except ReshardError as error:
                usage = click.BadParameter(str(error), ctx, param)
                usage.hint = error.hint
                raise usage from None
        return click.Path(exists=True).convert(value, param, ctx) if self._exists else value

    def shell_complete(self, ctx, param, incomplete):
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


def mesh_options(command):
    for name, text in (("--ep", "expert-parallel ranks"), ("--pp", "pipeline stages"), ("--tp", "tensor-parallel ranks")):
        command = click.option(name, type=click.IntRange(1, 65536), default=1, show_default=True, help=f"Number of {text} of the result.")(command)
    command = click.option("--etp", type=click.IntRange(0, 65536), default=0, hidden=True)(command)
    return command


def source_options(command):
    command = click.option("--config", type=Place(exists=True), help="config.json of the model, or its folder, where the checkpoint has none.")(command)
    command = click.option("--layout", type=click.Path(exists=True, dir_okay=False), help="A layout descriptor of your own.")(command)
    return click.option("--from", "from_", type=click.Choice(FORMATS), help="Format of SRC, where its files don't tell.")(command)


def target_options(command, required=True):
    command = click.option("--engine-version", metavar="V", help="Release of vLLM or SGLang that will read the files; the newest known by default.")(command)
    command = click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Store floating-point tensors as this.")(command)
    command = mesh_options(command)
    return click.option("--to", "to", type=click.Choice(FORMATS), required=required, help="Format of the result.")(command)


rank_option = click.option("--rank", type=click.IntRange(0), help="Only what this rank needs.")
cache_option = click.option("--cache", is_flag=True, help="Download SRC's files into the Hub's cache first, for others too, and read them there.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reshard")
def cli():
    """Move a model's weights from the shape they are in to the shape they must be in."""


def _open(path: str, from_=None, layout=None, config=None, cache=False):
    from reshard.checkpoint import open_checkpoint

    return open_checkpoint(path, format=from_, layout=layout, config=config, cache=cache)


def _plan(source, to, tp, pp, ep, etp, dtype, engine_version, **options):
    from reshard.api import plan

    return plan(source, format=to, tp=tp, pp=pp, ep=ep, etp=etp, dtype=dtype, engine_version=engine_version, **options)


def run_options(command):
    """What ``convert`` and ``pull`` share besides source and target."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Tracebacks with errors."),
        click.option("-q", "--quiet", is_flag=True, help="No progress, no summary."),
        json_option,
        click.option("--overwrite", is_flag=True, help="Replace what the destination holds."),
        click.option("--no-fsync", is_flag=True, help="Don't wait until the files are durable."),
        click.option("--buffer", type=Size(), default="128MB", show_default=True, help="Memory for buffers, in all."),
        click.option("-j", "--jobs", type=click.IntRange(1, 256), help="Threads; default 2, and 8 where SRC is on the Hub."),
        click.option("-n", "--dry-run", is_flag=True, help="Plan only; write nothing."),
        cache_option,
        rank_option,
    ):
        command = option(command)
    return command


def push_options(command):
    command = click.option("--base-model", metavar="ORG/NAME", help="For the model card, where the files don't tell.")(command)
    command = click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")(command)
    return click.option("--public/--private", default=False, help="A new repository is private, and a public one is refused, unless --public.")(command)


@cli.command()
@click.argument("src", type=Place())
@click.argument("dst", type=Place(target=True))
@target_options
@source_options
@run_options
@push_options
def convert(src, dst, from_, layout, config, cache, public, create_pr, base_model, **options):
    """Convert the checkpoint in SRC into DST, in another format or on another mesh. Both may be hf://ORG/NAME[@REV][/SUBDIR].

    To the Hub, files are written and sent one by one, with disk for one of them, and appear there in one commit."""
    from reshard.hub import is_remote

    push = {"public": public, "create_pr": create_pr, "base_model": base_model}
    if any(push.values()) and not is_remote(dst):
        raise click.UsageError("--public, --create-pr and --base-model go with a destination on the Hub (hf://ORG/NAME)")
    run_conversion(_open(src, from_, layout, config, cache), dst, push if is_remote(dst) else None, **options)


def run_conversion(source, dst, push=None, *, to, tp, pp, ep, etp, dtype, engine_version, rank, dry_run, jobs, buffer, no_fsync, overwrite, as_json, quiet, verbose):
    """What is left of ``convert`` and ``pull`` once the source is open; `push` are options for a destination on the Hub."""
    from reshard.transaction import convert as run

    job = _plan(source, to, tp, pp, ep, etp, dtype, engine_version, rank=rank, jobs=jobs, buffer=buffer)
    if push is not None and not dry_run:
        from reshard.hub.push import convert_and_push

        with progress_bar(job.bytes_read, quiet or as_json) as tell:
            done = convert_and_push(job, dst, overwrite=overwrite, jobs=jobs, buffer=buffer, progress=tell, **push)
        say_pushed(done, {**job.to_json(dst), "bytes_written": job.bytes_written}, as_json, quiet)
        return
    if dry_run:
        click.echo(json.dumps({"ok": True, **job.to_json(dst)})) if as_json else click.echo(job.describe(dst))
        return
    with progress_bar(job.bytes_read, quiet or as_json) as tell:
        report = run(job, dst, overwrite=overwrite, fsync=not no_fsync, jobs=jobs, buffer=buffer, progress=tell)
    if as_json:
        done = {"bytes_read": report.bytes_read, "bytes_written": report.bytes_written, "seconds": round(report.seconds, 3)}
        if source.remote:
            done |= {"bytes_received": report.bytes_received, "checked_files": report.checked_files}
        click.echo(json.dumps({"ok": True, **job.to_json(dst), **done, "resumed_files": report.resumed_files}))
    elif not quiet:
        rate = human(report.bytes_written / max(report.seconds, 1e-9))
        files = len(report.files)
        went_on = f"went on from {report.resumed_files} of {files} files; " if report.resumed_files else ""
        came = f"; {human(report.bytes_received)} came from {source.revision[:12]}" if source.remote else ""
        came += f", sha256 of {count(report.checked_files, 'file')} checked" if report.checked_files else ""
        click.echo(f"{went_on}wrote {count(files - report.resumed_files, 'file')}, {human(report.bytes_written)} in {report.seconds:.1f}s ({rate}/s): {dst}, {job.format} {job.mesh}{came}")


@cli.command()
@click.argument("src", type=Place())
@click.argument("dst", metavar="DIR")
@partial(target_options, required=False)
@source_options
@run_options
def pull(src, dst, from_, layout, config, cache, **options):
    """Fetch the model SRC, hf://ORG/NAME[@REV][/SUBDIR], into DIR: its files as they are, or with --to, converted on the way."""
    from reshard.hub import is_remote

    if not is_remote(src):
        raise click.BadParameter(f"{src} is not on the Hub; write hf://ORG/NAME", param_hint="SRC")
    if is_remote(dst):
        raise click.BadParameter(f"{dst} is no folder", param_hint="DIR")
    if options["to"]:
        run_conversion(_open(src, from_, layout, config, cache), dst, **options)
        return
    given = [name for name in ("tp", "pp", "ep") if options[name] != 1] + [name for name in ("dtype", "engine_version", "rank") if options[name] is not None]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --to: without it, files are fetched as they are")
    from reshard.hub.folder import open_folder
    from reshard.hub.pull import pull as run
    from reshard.hub.pull import wanted

    folder = open_folder(src, cache)
    files = wanted(folder)
    result = {"source": {"path": src, "revision": folder.revision}, "destination": {"path": dst},
              "files": [{"path": name, "bytes": size} for name, size in sorted(files.items())]}  # fmt: skip
    if options["dry_run"]:
        rows = [(name, human(size)) for name, size in sorted(files.items())]
        click.echo(json.dumps({"ok": True, **result})) if options["as_json"] else click.echo(table(rows, ("file", "size")))
        return
    silent = options["quiet"] or options["as_json"]
    with progress_bar(sum(files.values()), silent) as tell:
        done = run(folder, dst, overwrite=options["overwrite"], progress=tell)
    if options["as_json"]:
        click.echo(json.dumps({"ok": True, **result, "seconds": round(done.seconds, 3)}))
    elif not silent:
        click.echo(f"fetched {count(len(done.files), 'file')}, {human(done.bytes)} in {done.seconds:.1f}s, checksums compared: {dst}, {src} at {done.revision[:12]}")


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.argument("dst", type=Place(target=True))
@source_options
@push_options
@click.option("--overwrite", is_flag=True, help="Remove other weights that the repository holds, in the same commit.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks with errors.")
def push(folder, dst, from_, layout, config, public, create_pr, base_model, overwrite, as_json, quiet, verbose):
    """Publish the checkpoint in DIR as hf://ORG/NAME[@BRANCH][/SUBDIR], with a model card, in one commit."""
    from reshard.hub import is_remote
    from reshard.hub.push import push as run

    if not is_remote(dst):
        raise click.BadParameter(f"{dst} is not on the Hub; write hf://ORG/NAME", param_hint="DST")
    with progress_bar(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()), quiet or as_json) as tell:
        done = run(folder, dst, public=public, create_pr=create_pr, overwrite=overwrite, base_model=base_model, progress=tell,
                   format=from_, layout=layout, config=config)  # fmt: skip
    say_pushed(done, {"source": {"path": folder}, "destination": {"path": dst}}, as_json, quiet)


def say_pushed(done, result: dict, as_json: bool, quiet: bool) -> None:
    if as_json:
        result["destination"] |= {"revision": done.commit, "url": done.url}
        click.echo(json.dumps({"ok": True, **result, "committed": done.committed, "new_files": done.new, "bytes_new": done.bytes_new,
                               "pull_request": done.pull_request, "seconds": round(done.seconds, 3)}))  # fmt: skip
    elif not quiet and not done.committed:
        click.echo(f"nothing to do: {done.location} holds these {count(len(done.files), 'file')} already, at {done.commit[:12]}")
    elif not quiet:
        where = done.pull_request or done.url
        click.echo(f"pushed {len(done.new)} of {count(len(done.files), 'file')}, {human(done.bytes_new)} in {done.seconds:.1f}s: {done.location} at {done.commit[:12]}, {where}")


@cli.command()
@click.argument("src", type=Place())
@target_options
@source_options
@rank_option
@click.option("--bandwidth", type=Size(), help="Bytes per second, such as 25GB/s: adds the time it takes.")
@json_option
def plan(src, to, tp, pp, ep, etp, dtype, engine_version, from_, layout, config, rank, bandwidth, as_json):
    """Tell which bytes a conversion of SRC would read and write, per rank. Writes nothing."""
    job = _plan(_open(src, from_, layout, config), to, tp, pp, ep, etp, dtype, engine_version, rank=rank)
    if as_json:
        extra = {"seconds_at_bandwidth": (job.bytes_read + job.bytes_written) / bandwidth} if bandwidth else {}
        click.echo(json.dumps({"ok": True, **job.to_json(), "ranks": job.ranks(), **extra}))
        return
    click.echo(job.describe())
    if bandwidth:
        click.echo(f"at {human(bandwidth)}/s: {(job.bytes_read + job.bytes_written) / bandwidth:.3g} s")


@cli.command()
@click.argument("path", type=Place())
@source_options
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect(path, from_, layout, config, tensors, as_json):
    """Tell what PATH holds: format, architecture, mesh, and with --tensors every tensor."""
    from reshard.job import mesh_json

    ckpt = _open(path, from_, layout, config)
    result = {"ok": True, "path": str(path), "format": ckpt.format, "architecture": ckpt.architecture,
              "mesh": mesh_json(ckpt.mesh), "bytes": ckpt.bytes} | ({"revision": ckpt.revision} if ckpt.remote else {})  # fmt: skip
    rows = _tensor_rows(ckpt)
    if as_json:
        result["tensors"] = [dict(zip(("name", "shape", "dtype", "split_dim", "fused", "ranks"), row)) for row in rows] if tensors else len(rows)
        click.echo(json.dumps(result))
        return
    click.echo(f"{path}: {ckpt.format} {ckpt.mesh}, {ckpt.architecture} (layout {ckpt.layout.name}), {len(rows)} tensors, {human(ckpt.bytes)}")
    if tensors:
        text = [(n, "×".join(map(str, s)) or "scalar", d, "-" if x is None else x, "+".join(f) or "-", len(r)) for n, s, d, x, f, r in rows]
        click.echo(table(text, ("name", "shape per rank", "dtype", "split dim", "fused", "ranks")))


def _tensor_rows(ckpt) -> list[tuple]:
    rows: dict[str, list] = {}
    for s in ckpt.stored:
        row = rows.setdefault(s.name, [s.name, list(s.shape), s.dtype, split_dim(ckpt.layout.descriptor, s.entry, ckpt.mesh.tp), list(s.entry.of) if len(s.entry.of) > 1 else [], []])
        row[5].append(s.rank)
    return [tuple(row) for row in rows.values()]


def split_dim(descriptor, entry, tp: int) -> int | None:
    """The dimension of a stored tensor that tensor parallelism cuts; None where it is replicated."""
    tensor = descriptor.tensors[entry.of[0]]
    split = tensor.split if entry.split is None else entry.split
    if tp == 1 or not split:
        return None
    lead = sum(1 for axis in tensor.index if f"{{{axis}}}" not in entry.name)
    return lead + next(d for d, axes in enumerate(entry.dims or tensor.dims) if split[0] in axes)


@cli.command()
@click.argument("a", type=Place())
@click.argument("b", type=Place())
@click.option("--config", type=Place(exists=True), help="config.json of the model, or its folder, where neither A nor B has one.")
@click.option("--layout", type=click.Path(exists=True, dir_okay=False), help="A layout descriptor of your own, for both.")
@json_option
@click.option("-q", "--quiet", is_flag=True)
def diff(a, b, config, layout, as_json, quiet):
    """Tell whether A and B hold the same parameters, bit for bit, whatever their layouts. Exit code 3: they differ."""
    from reshard.api import diff as run
    from reshard.api import open_pair

    left, right = open_pair(a, b, layout=layout, config=config)
    with progress_bar(left.bytes + right.bytes, quiet or as_json) as tell:
        report = run(left, right, progress=tell)
    if as_json:
        differing = [{"name": d.name, "elements": d.elements, "max_abs_diff": d.max_abs_diff} for d in report.differing]
        click.echo(json.dumps({"ok": True, "equal": report.equal, "tensors": report.tensors, "differing": differing,
                               "missing_in_a": report.missing_in_a, "missing_in_b": report.missing_in_b}))  # fmt: skip
    elif report.equal:
        click.echo(f"equal: {report.tensors} tensors, bit for bit")
    else:
        for word, names in ((a, report.missing_in_a), (b, report.missing_in_b)):
            for name in names[:20]:
                click.echo(f"missing in {word}: {name}")
        if report.differing:
            rows = [(d.name, d.elements, f"{d.max_abs_diff:.3g}") for d in report.differing[:20]]
            click.echo(table(rows, ("differs", "elements", "max |a-b|")))
        click.echo(f"different: {len(report.differing)} of {report.tensors} tensors differ, {len(report.missing_in_a) + len(report.missing_in_b)} missing")
    if not report.equal:
        sys.exit(3)


@cli.command()
@click.argument("ckpt")
@click.option("--reference", required=True, metavar="HF", help="Folder of the original Hugging Face checkpoint.")
@click.option("--nproc", type=click.IntRange(1), help="Processes to start, one per rank: as many as CKPT has ranks. Not under torchrun.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is a GPU.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Compute in this, both sides.")
@click.option("--method", type=click.Choice(["tp", "permute"]), default="tp", show_default=True,
              help="tp: a tensor-parallel forward. permute: one process; shards merged with ranks permuted must compute the same.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Run this text instead of built-in ids; may be repeated.")
@click.option("--low-memory", is_flag=True, help="Stream the original from disk, layer by layer.")
@click.option("--trace", is_flag=True, help="Show the error of every part of the model.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE", help="Write an HTML page too.")
@click.option("--from", "from_", type=click.Choice(FORMATS), help="Format of CKPT, where its files don't tell.")
@click.option("--config", type=click.Path(exists=True), help="config.json of the model, or its folder, where CKPT has none (default: HF's).")
@click.option("--layout", type=click.Path(exists=True, dir_okay=False), help="A layout descriptor of your own, for --method permute; tp reads none.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks with errors.")
def verify(ckpt, reference, nproc, device, dtype, method, prompts, low_memory, trace, report, from_, config, layout, as_json, quiet, verbose):
    """Prove the shards in CKPT by running them as their engine would, and comparing logits with the original's.

    Defects are planted in the same run, and must be found. Exit code 3: the logits differ, or a planted defect did not show.
    """
    from reshard.verify import verify as run

    try:
        found = run(ckpt, reference=reference, nproc=nproc, format=from_, config=config, layout=layout, device=device, dtype=dtype, method=method,
                    prompts=prompts, low_memory=low_memory, told=not (quiet or as_json))  # fmt: skip
    except ReshardError:
        if os.environ.get("RANK", "0") != "0":  # of torchrun's ranks one tells
            sys.exit(1)
        raise
    if found is None:
        return
    if report:
        from reshard.verify.page import page

        Path(report).write_text(page(found), encoding="utf-8")
    click.echo(json.dumps({"ok": True, **found.to_json()})) if as_json else click.echo(found.describe(trace))
    if not found:
        sys.exit(3)


@cli.group(invoke_without_command=True)
@click.pass_context
def layouts(ctx):
    """List the architectures that reshard knows; `layouts show NAME` explains one."""
    if ctx.invoked_subcommand:
        return
    from reshard.descriptors import builtin_descriptors

    rows = [(n, ", ".join(d.architectures), ", ".join(sorted(d.formats)), d.description) for n, d in builtin_descriptors().items()]
    click.echo(table(rows, ("layout", "architectures", "formats", "what")))


@layouts.command("show")
@click.argument("name")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True)
@click.option("--format", "format_", type=click.Choice(FORMATS), default="hf", show_default=True)
@click.option("--config", type=click.Path(exists=True), help="config.json to take sizes from; without it sizes are shown by name.")
def show(name, tp, format_, config):
    """Tell for each tensor of layout NAME its dims, what it is fused with, and which dim tensor parallelism splits."""
    from reshard import formats
    from reshard.descriptors import builtin_descriptors, load_descriptor

    known = builtin_descriptors()
    if not name.endswith(".toml") and name not in known:
        raise ReshardError(f"no layout {name!r}", f"known: {', '.join(known)}")
    descriptor = load_descriptor(Path(name)) if name.endswith(".toml") else known[name]
    kind = formats.get(format_)
    if config is None:
        rows = [_entry_row(descriptor, entry, tp) for entry in descriptor.section(kind.section).entries]
        click.echo(table(rows, ("name", "holds", "interleaved within", "split dim", f"dims per rank of tp{tp}", "when")))
        return
    from reshard.checkpoint import find_config, model_config, read_config
    from reshard.place import Mesh, Placement

    layout = descriptor.bind(model_config(read_config(find_config(Path(config), config))))
    placement = Placement(layout, layout.section(kind.section), kind.rules, Mesh(tp))
    rows = [(s.name, "×".join(map(str, s.shape)), "-" if (d := split_dim(descriptor, s.entry, tp)) is None else d, "+".join(s.entry.of))
            for s in placement.stored(placement.ranks[:1])]  # fmt: skip
    click.echo(table(rows, ("name", "shape on rank 0", "split dim", "holds")))


def _entry_row(descriptor, entry, tp: int) -> tuple:
    """One line of `layouts show` without a config: sizes by the names of their axes."""
    tensor = descriptor.tensors[entry.of[0]]
    split = tensor.split if entry.split is None else entry.split

    def size(axis: str) -> str:
        return f"{axis}/{tp}" if tp > 1 and split[:1] == (axis,) else axis

    lead = [f"[{name}]" for name in tensor.index if f"{{{name}}}" not in entry.name]
    dims = [" ".join(map(size, axes)) for axes in entry.dims or tensor.dims]
    text = " ".join(lead + [f"({d})" if " " in d else d for d in dims])
    cut = split_dim(descriptor, entry, max(tp, 2))
    when = tensor.when if entry.when == "true" else entry.when
    return entry.name, " + ".join(entry.of), entry.within or "-", "-" if cut is None else cut, text, "" if when == "true" else when


@cli.command()
def demo():
    """The whole story on a small model: convert, convert again, come back, compare. No download, a few seconds."""
    from reshard.demo import demo as run

    if not run(click.echo):
        raise ReshardError("the demo did not come back to where it began", "this is a defect of reshard; please report it")


class progress_bar:
    """Bytes on stderr: a bar on a terminal, one line every 30 s elsewhere, nothing when quiet."""

    def __init__(self, total: int, quiet: bool):
        self._total, self._quiet = total, quiet

    def __enter__(self):
        self._bar, self._done, self._said = None, 0, time.monotonic()
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="B", unit_scale=True, unit_divisor=1000, delay=1, smoothing=0.1, file=sys.stderr)
        return self.tell

    def tell(self, size: int) -> None:
        self._done += size
        if self._bar is not None:
            self._bar.update(size)
        elif not self._quiet and time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            print(f"{human(self._done)} of {human(self._total)}", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors become text (or JSON) and an exit code: 1 failed, 2 usage, 3 the answer is no, 130 interrupted."""
    gc.disable()  # a plan is a million small objects and no cycle: the collector would only go over them again and again
    args = sys.argv[1:] if argv is None else argv
    as_json = "--json" in args
    try:
        code = cli.main(args, prog_name="reshard", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        if as_json:
            _fail_json("UsageError", error.format_message(), getattr(error, "hint", None))
        else:
            error.show()
            if getattr(error, "hint", None):
                click.echo(f"\nhint: {error.hint}", err=True)
        sys.exit(2)
    except (ReshardError, OSError) as error:
        if "-v" in args or "--verbose" in args:
            import traceback

            traceback.print_exc()
        hint = getattr(error, "hint", None)
        if as_json:
            _fail_json(type(error).__name__, str(error), hint)
        else:
            click.echo(f"Error: {error}" + (f"\n\nhint: {hint}" if hint else ""), err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; run the same command to go on where it stopped", err=True)
        sys.exit(130)


def _fail_json(kind: str, message: str, hint: str | None) -> None:
    click.echo(json.dumps({"ok": False, "error": {"type": kind, "message": message, "hint": hint}}))
