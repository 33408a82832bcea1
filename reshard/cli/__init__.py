"""The command line: parse, call the library, print. Results go to stdout, everything else to stderr."""

import gc
import io
import json
import signal
import sys

import click

from reshard import __version__
from reshard.cli.convert import convert, merge, plan
from reshard.cli.doctor import doctor
from reshard.cli.hub import pull, push
from reshard.cli.layouts import layouts
from reshard.cli.look import demo, diff, inspect
from reshard.cli.verify import verify
from reshard.errors import ReshardError
from reshard.executor.threads import one_interrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reshard")
def cli():
    """Move a model's weights from the shape they are in to the shape they must be in."""


for command in (convert, merge, plan, inspect, diff, verify, layouts, pull, push, demo, doctor):
    cli.add_command(command)


@one_interrupt()
def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors become text (or JSON) and an exit code: 1 failed, 2 usage, 3 the answer is no, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no → gets its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.disable()  # a plan is a million small objects and no cycle: the collector would only go over them again and again
    if sys.platform == "win32":
        sys.exit("reshard needs a POSIX system (file locks, renames in one step): use Linux, macOS, or WSL on Windows")
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
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nor has a further one anything to add while Python ends
        click.echo("interrupted; run the same command to go on where it stopped", err=True)
        sys.exit(130)


def _fail_json(kind: str, message: str, hint: str | None) -> None:
    click.echo(json.dumps({"ok": False, "error": {"type": kind, "message": message, "hint": hint}}))
