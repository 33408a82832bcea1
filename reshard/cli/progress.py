"""Progress on stderr."""

import sys
import time

from reshard.text import human


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
