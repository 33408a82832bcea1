"""``pull`` and ``push``."""

import json
from functools import partial

import click

from reshard.cli.convert import opened, run_conversion, say_left_out, say_pushed
from reshard.cli.options import Place, json_option, push_options, run_options, source_options, target_options
from reshard.cli.progress import progress_bar
from reshard.text import count, human, table


@click.command()
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
        run_conversion(opened(src, from_, layout, config, cache), dst, **options)
        return
    given = [name for name in ("tp", "pp", "ep") if options[name] != 1] + [
        name
        for name in ("dtype", "dequantise", "quantise", "refine", "engine_version", "engine_platform", "rank")
        if options[name] not in (None, False)
    ]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --to: without it, files are fetched as they are")
    from reshard.hub.folder import open_folder
    from reshard.publish.pull import left_out, wanted
    from reshard.publish.pull import pull as run

    folder = open_folder(src, cache)
    files = wanted(folder)
    result = {"source": {"path": src, "revision": folder.revision}, "destination": {"path": dst},
              "files": [{"path": name, "bytes": size} for name, size in sorted(files.items())],
              "left_out": [{"path": name, "bytes": size} for name, size in left_out(folder).items()]}  # fmt: skip
    if options["dry_run"]:
        rows = [(name, human(size)) for name, size in sorted(files.items())]
        click.echo(json.dumps({"ok": True, **result})) if options["as_json"] else click.echo(table(rows, ("file", "size")))
        return
    silent = options["quiet"] or options["as_json"]
    with progress_bar(sum(files.values()), silent) as tell:
        done = run(folder, dst, overwrite=options["overwrite"], progress=tell)
    if options["as_json"]:
        click.echo(json.dumps({"ok": True, **result, "seconds": round(done.seconds, 3), "notes": done.notes}))
    elif not silent:
        click.echo(
            f"fetched {count(len(done.files), 'file')}, {human(done.bytes)} in {done.seconds:.1f}s, checksums compared: {dst}, {src} at {done.revision[:12]}"
        )
        for note in done.notes:
            click.echo(note, err=True)
        say_left_out(left_out(folder), "code, hidden files and other formats are not fetched")


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.argument("dst", type=Place(target=True))
@source_options
@push_options
@click.option("--overwrite", is_flag=True, help="Remove other weights that the repository holds, in the same commit.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks with errors.")
def push(folder, dst, from_, layout, config, public, create_pr, include_code, base_model, overwrite, as_json, quiet, verbose):
    """Publish the checkpoint in DIR as hf://ORG/NAME[@BRANCH][/SUBDIR], with a model card, in one commit.

    Weights, configuration, tokenizer, card and licence go up; nothing else that lies in DIR does."""
    from reshard.hub import is_remote
    from reshard.publish.push import push as run
    from reshard.publish.selection import select

    if not is_remote(dst):
        raise click.BadParameter(f"{dst} is not on the Hub; write hf://ORG/NAME", param_hint="DST")
    selection = select(folder, include_code, format=from_, layout=layout, config=config)
    with progress_bar(selection.size, quiet or as_json) as tell:
        done = run(selection, dst, public=public, create_pr=create_pr, overwrite=overwrite, base_model=base_model, progress=tell)
    say_pushed(done, {"source": {"path": folder}, "destination": {"path": dst}}, as_json, quiet)
