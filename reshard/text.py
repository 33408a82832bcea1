"""Numbers and tables for people. Names in them come from files: nothing here lets one command the terminal."""

from collections.abc import Sequence

from reshard.foreign import printable


def human(size: float) -> str:
    """Bytes in powers of ten: 3.00 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError


def count(number: int, word: str) -> str:
    """1 file, 2 files."""
    return f"{number} {word}{'s' * (number != 1)}"


def table(rows: Sequence[tuple[object, ...]], head: tuple[str, ...]) -> str:
    """Rows in columns; numbers to the right."""
    cells = [tuple(printable(str(cell), keep="") for cell in row) for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def some(names: list[str], shown: int = 4) -> str:
    """The first few of `names`, and how many more there are."""
    return printable(", ".join(names[:shown]), keep="") + (f" and {len(names) - shown} more" if len(names) > shown else "")
