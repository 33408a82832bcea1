"""What can go wrong, as exceptions. Every one names the thing, both numbers, and (``hint``) what to do next."""

from reshard.foreign import printable, quote


class ReshardError(ValueError):
    """Base of all errors that reshard raises on purpose. ``str(e)`` is the message; ``e.hint`` is advice or None.

    Both are safe to print: names in them come from files, and a file may try to command the terminal.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(printable(str(message)))
        self.hint = None if hint is None else printable(str(hint))

    def __reduce__(self) -> tuple[object, ...]:  # errors cross from one process to another
        return type(self), (str(self), self.hint)


class LayoutError(ReshardError):
    """A descriptor is malformed, or does not fit the config.json it was bound to."""


class FormatError(ReshardError):
    """A file or folder is not what its format demands: truncated, hostile, of another version."""


class PlanError(ReshardError):
    """Source and destination do not join. ``problems`` lists every problem found, one line each."""

    def __init__(self, problems: list[str], hint: str | None = None, shown: int = 20):
        self.problems = tuple(problems := [quote(problem, 400) for problem in problems])
        lines = problems[:shown] + ([f"… and {len(problems) - shown} more"] if len(problems) > shown else [])
        head = problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(lines)
        super().__init__(head, hint)
        self._shown = shown

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (list(self.problems), self.hint, self._shown)


class CastError(ReshardError):
    """Values of the source have no room in the dtype that they would be stored in."""


class DestinationError(ReshardError):
    """The destination cannot be written: not empty, locked by another run, another run's leftovers, no space."""


class SourceError(ReshardError):
    """A file of the source can't be read: its disk, or the way to it, failed. What was done so far is kept, and the same command goes on."""


class HubError(ReshardError):
    """The Hub, or the way to it, refused or failed. What was done so far is kept: the same command goes on from there."""


class BadBytes(HubError, FormatError):
    """Bytes of a source file, `file`, came otherwise than the Hub lists them. Whatever was made of that file must be made again."""

    def __init__(self, message: str, hint: str | None = None, file: str = ""):
        super().__init__(message, hint)
        self.file = file
        self.source_files: frozenset[str] = (
            frozenset()
        )  # as a checkpoint's tensors name them: this one, and those that nobody has checked to their end

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.hint, self.file)


class SyncError(ReshardError):
    """A weight sync was refused before its first byte, or failed. ``state`` of the Sync says what the engine holds now."""


class PeerLost(SyncError):
    """A process died or did not answer within the time-out."""
