"""The Hub's sha256 of a file, checked while its bytes pass by in whatever order: no second reading, little memory.

Workers fetch the batches of a file nearly in order. What comes too early waits, as a copy; where more than a little would
have to wait, the file is not checked.
"""

import hashlib
import threading


class Checksum:
    """Of one file of `size` bytes. Bytes may be offered twice; `result` is the hex digest once all have been, else None."""

    def __init__(self, size: int, waiting_at_most: int):
        self._size, self._room = size, waiting_at_most
        self._hash, self._at = hashlib.sha256(), 0
        self._waiting: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._lost = False

    def offer(self, start: int, data: memoryview) -> None:
        with self._lock:
            if self._lost or start + len(data) <= self._at:
                return
            if start > self._at:
                self._waiting[start] = bytes(data)
                if sum(map(len, self._waiting.values())) > self._room:
                    self._lost = True
                    self._waiting.clear()
                return
            self._feed(start, data)
            while ready := [s for s in self._waiting if s <= self._at]:
                self._feed(ready[0], memoryview(self._waiting.pop(ready[0])))

    def _feed(self, start: int, data: memoryview) -> None:
        if start + len(data) > self._at:
            self._hash.update(data[self._at - start :])
            self._at = start + len(data)

    @property
    def result(self) -> str | None:
        return self._hash.hexdigest() if self._at == self._size and not self._lost else None
