"""Open files by name, a limited number at a time: a process may hold about a thousand, a large mesh has more files than that."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

_MOST = 512  # open files of one kind: more of them are no faster


class Handles:
    """Descriptors of files, opened by ``open_file(name)`` when asked for; the one unused for longest is closed to make room.

    Between ``take`` and ``give`` a descriptor stays open, whatever the limit.
    """

    def __init__(self, open_file: Callable[[str], int], most: int):
        self._open_file, self._most = open_file, most
        self._held: OrderedDict[str, list[int]] = OrderedDict()  # name → [descriptor, users], least recently taken first
        self._lock = threading.Lock()

    def take(self, name: str) -> int:
        with self._lock:
            entry = self._held.get(name)
            if entry is None:
                self._make_room()
                entry = self._held[name] = [self._open_file(name), 0]
            else:
                self._held.move_to_end(name)
            entry[1] += 1
            return entry[0]

    def give(self, name: str) -> None:
        with self._lock:
            self._held[name][1] -= 1

    def drop(self, name: str) -> None:
        """Close `name`'s file unless somebody uses it."""
        with self._lock:
            if name in self._held and not self._held[name][1]:
                os.close(self._held.pop(name)[0])

    def close(self) -> None:
        with self._lock:
            while self._held:
                os.close(self._held.popitem()[1][0])

    def _make_room(self) -> None:
        if len(self._held) >= self._most:
            idle = next((name for name, (_, users) in self._held.items() if not users), None)
            if idle is not None:
                os.close(self._held.pop(idle)[0])


def allowed(share: float) -> int:
    """How many files may be open at a time if they get `share` of the descriptors that this process has left (``ulimit -n``)."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 16
    return max(2, min(_MOST, int((soft - used) * share)))
