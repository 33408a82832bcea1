"""Write docs/reference/cli.md from the commands themselves; with --check, fail if it is not what they say."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from reshard.cli import cli

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
HEAD = """# Command line

Written by `python scripts/cli_reference.py` from the commands themselves.

Results go to stdout, progress and messages to stderr. A place is a folder or `hf://ORG/NAME[@REV][/SUBDIR]`.
Exit codes: 0 done, 1 failed, 2 usage, 3 the answer is no (`diff`: they differ; `verify`: FAILED or INCONCLUSIVE), 130 interrupted.
"""


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """All commands below `group`, with their names in full, in the order in which they were added."""
    for own, command in group.commands.items():
        yield f"{name} {own}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {own}")


def page() -> str:
    chapters = [HEAD]
    for name, command in commands(cli, "reshard"):
        context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
        chapters.append(f"## {name}\n\n```\n{command.get_help(context).strip()}\n```\n")
    return "\n".join(chapters)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == text else f"{PAGE} is not what the commands say: run python scripts/cli_reference.py")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
