"""``convert`` and ``plan``."""

import json

import click

from reshard.cli.options import (
    Place,
    Size,
    json_option,
    push_options,
    rank_option,
    report_option,
    run_options,
    source_options,
    target_options,
)
from reshard.cli.progress import progress_bar
from reshard.foreign import quote
from reshard.text import count, human, some


def opened(path: str, from_=None, layout=None, config=None, cache=False, adapter=None):
    from reshard.checkpoint import open_checkpoint

    return open_checkpoint(path, format=from_, layout=layout, config=config, cache=cache, adapter=adapter)


def planned(source, to, tp, pp, ep, etp, dtype, dequantise, quantise, refine, optimizer, engine_version, engine_platform, **options):
    from reshard.api import plan

    return plan(
        source,
        format=to,
        tp=tp,
        pp=pp,
        ep=ep,
        etp=etp,
        dtype=dtype,
        dequantise=dequantise,
        quantise=quantise,
        refine=refine,
        optimizer=optimizer,
        engine_version=engine_version,
        engine_platform=engine_platform,
        **options,
    )


@click.command()
@click.argument("src", type=Place())
@click.argument("dst", type=Place(target=True))
@target_options
@source_options
@run_options
@push_options
def convert(src, dst, from_, layout, config, cache, public, create_pr, include_code, base_model, **options):
    """Convert the checkpoint in SRC into DST, in another format or on another mesh. Both may be hf://ORG/NAME[@REV][/SUBDIR].

    To the Hub, files are written and sent one by one, with disk for one of them, and appear there in one commit."""
    convert_or_merge(src, dst, from_, layout, config, cache, public, create_pr, include_code, base_model, **options)


@click.command()
@click.argument("base", type=Place())
@click.argument("adapter", type=Place())
@click.argument("dst", type=Place(target=True))
@target_options
@source_options
@run_options
@push_options
def merge(base, adapter, dst, from_, layout, config, cache, public, create_pr, include_code, base_model, **options):
    """Merge the LoRA adapter in the folder ADAPTER into the checkpoint in BASE, and write DST in any format.

    Weights become base + scale·B·A while they are read: as `reshard convert` of what PEFT's merge_and_unload makes, without the model in memory.
    """
    convert_or_merge(base, dst, from_, layout, config, cache, public, create_pr, include_code, base_model, adapter, **options)


def convert_or_merge(src, dst, from_, layout, config, cache, public, create_pr, include_code, base_model, adapter=None, **options):
    from reshard.hub import is_remote

    push = {"public": public, "create_pr": create_pr, "include_code": include_code, "base_model": base_model}
    if any(push.values()) and not is_remote(dst):
        raise click.UsageError("--public, --create-pr, --include-code and --base-model go with a destination on the Hub (hf://ORG/NAME)")
    run_conversion(opened(src, from_, layout, config, cache, adapter), dst, push if is_remote(dst) else None, **options)


def run_conversion(
    source,
    dst,
    push=None,
    *,
    to,
    tp,
    pp,
    ep,
    etp,
    dtype,
    dequantise,
    quantise,
    refine,
    optimizer,
    engine_version,
    engine_platform,
    rank,
    max_shard_size,
    dry_run,
    jobs,
    buffer,
    no_fsync,
    overwrite,
    allow_overflow,
    as_json,
    quiet,
    verbose,
):
    """What is left of ``convert`` and ``pull`` once the source is open; `push` are options for a destination on the Hub."""
    from reshard.conversion.transaction import convert as run
    from reshard.conversion.transaction import resumed

    options = {"rank": rank, "jobs": jobs, "buffer": buffer, "allow_overflow": allow_overflow, "max_file": max_shard_size}
    job = planned(source, to, tp, pp, ep, etp, dtype, dequantise, quantise, refine, optimizer, engine_version, engine_platform, **options)
    if push is not None and not dry_run:
        from reshard.publish.push import convert_and_push

        with progress_bar(job.bytes_read, quiet or as_json) as tell:
            done = convert_and_push(job, dst, overwrite=overwrite, jobs=jobs, buffer=buffer, progress=tell, **push)
        say_pushed(done, {**job.to_json(dst), "bytes_written": job.bytes_written, **overflowed(job)}, as_json, quiet)
        if not (as_json or quiet):
            say_what_is_lost(job)
        return
    if dry_run:
        click.echo(json.dumps({"ok": True, **job.to_json(dst)})) if as_json else click.echo(job.describe(dst))
        return
    with progress_bar(job.bytes_read, quiet or as_json) as tell:
        report = run(job, dst, overwrite=overwrite, fsync=not no_fsync, jobs=jobs, buffer=buffer, progress=tell)
    for note in report.notes if not (quiet or as_json) else ():
        click.echo(note, err=True)
    if as_json:
        done = {"bytes_read": report.bytes_read, "bytes_written": report.bytes_written, "seconds": round(report.seconds, 3)}
        if source.remote:
            done |= {"bytes_received": report.bytes_received, "checked_files": report.checked_files, "unchecked_files": _unchecked(source)}
        click.echo(json.dumps({"ok": True, **job.to_json(dst), **done, "resumed_files": report.resumed_files, "resumed_bytes": report.resumed_bytes,
                               "notes": report.notes, **overflowed(job)}))  # fmt: skip
    elif not quiet:
        rate = human(report.bytes_written / max(report.seconds, 1e-9))
        files = len(report.files)
        came = f"; {human(report.bytes_received)} came from {source.revision[:12]}" if source.remote else ""
        came += f", sha256 of {count(report.checked_files, 'file')} checked" if report.checked_files else ""
        unchecked = _unchecked(source) if source.remote else []
        came += f", not checked: {count(len(unchecked), 'file')} (ranges only)" if unchecked else ""
        click.echo(
            f"{resumed(report)}wrote {count(files - report.resumed_files, 'file')}, {human(report.bytes_written)} in {report.seconds:.1f}s ({rate}/s): {dst}, {job.format} {job.mesh}{came}"
        )
        if source.merges:
            click.echo(source.merges)
        say_what_is_lost(job)


def overflowed(job) -> dict:
    return {"overflowed": job.casts.values} if job.casts else {}


def say_what_is_lost(job) -> None:
    """Weights that the result lacks, and values that became infinite because that was allowed."""
    if job.left_out:
        click.echo(job.what_is_left_out())
    for told in job.what_is_beside():
        click.echo(told)
    for loss in job.casts.lost.values() if job.casts else ():
        click.echo(f"infinite now: {loss.words()}")


def _unchecked(source) -> list[str]:
    """Weight files of which only ranges came over the network: the Hub's checksums are of whole files."""
    repository = source.path.repository
    return [path for path in repository.unchecked if path in {(source.path / file).path for file in source.files}]


def say_left_out(files: dict[str, int], why: str) -> None:
    """Names and sizes of what a push or pull left out, on stderr."""
    if files:
        names = some([f"{quote(name)} ({human(size)})" for name, size in files.items()], 12)
        click.echo(f"left out: {names}; {why}", err=True)


def say_pushed(done, result: dict, as_json: bool, quiet: bool) -> None:
    if not (as_json or quiet):
        say_left_out(done.left_out, "only weights and the files known to go with them are published; --include-code adds .py files")
    if as_json:
        result["destination"] |= {"revision": done.commit, "url": done.url}
        click.echo(json.dumps({"ok": True, **result, "committed": done.committed, "new_files": done.new, "bytes_new": done.bytes_new,
                               "pull_request": done.pull_request,
                               "left_out": [{"path": name, "bytes": size} for name, size in done.left_out.items()], "seconds": round(done.seconds, 3)}))  # fmt: skip
    elif not quiet and not done.committed:
        click.echo(f"nothing to do: {done.location} holds these {count(len(done.files), 'file')} already, at {done.commit[:12]}")
    elif not quiet:
        where = done.pull_request or done.url
        click.echo(
            f"pushed {len(done.new)} of {count(len(done.files), 'file')}, {human(done.bytes_new)} in {done.seconds:.1f}s: {done.location} at {done.commit[:12]}, {where}"
        )


@click.command()
@click.argument("src", type=Place(), required=False)
@target_options
@source_options
@rank_option
@click.option("--bandwidth", type=Size(), help="Bytes per second, such as 25GB/s: adds the time it takes.")
@report_option
@json_option
def plan(
    src,
    to,
    tp,
    pp,
    ep,
    etp,
    dtype,
    dequantise,
    quantise,
    refine,
    optimizer,
    engine_version,
    engine_platform,
    from_,
    layout,
    config,
    rank,
    bandwidth,
    report,
    as_json,
):
    """Tell which bytes a conversion of SRC would read and write, per rank. Writes nothing.

    Without SRC, of the model that --config describes: names and shapes alone, no weights."""
    if src is None:
        if config is None or from_:
            raise click.UsageError("name SRC, or the config.json of a model with --config")
        from reshard.checkpoint import describe_checkpoint

        source = describe_checkpoint(config, layout)
    else:
        source = opened(src, from_, layout, config)
    job = planned(source, to, tp, pp, ep, etp, dtype, dequantise, quantise, refine, optimizer, engine_version, engine_platform, rank=rank)
    if report:
        from reshard.pages.plan import plan_page

        report.write_text(plan_page(job))
    if as_json:
        extra = {"seconds_at_bandwidth": (job.bytes_read + job.bytes_written) / bandwidth} if bandwidth else {}
        extra |= {"parameters": source.parameters} if src is None else {}
        click.echo(json.dumps({"ok": True, **job.to_json(), "ranks": job.ranks(), **extra}))
        return
    click.echo(job.describe())
    if src is None:
        click.echo(f"{source.parameters:,} parameters, by config.json alone; a tower beside the text model is not in it")
    if bandwidth:
        click.echo(f"at {human(bandwidth)}/s: {(job.bytes_read + job.bytes_written) / bandwidth:.3g} s")
