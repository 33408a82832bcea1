"""Patience with failures that pass by themselves, and its bounds: how long, how often, and how slow an answer may be."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub import errors

from reshard.hub.wording import safe

T = TypeVar("T")
log = logging.getLogger("reshard.hub")

LONGEST_WAIT = 310  # seconds: the Hub counts requests in windows of five minutes
PASSING = (408, 429, 500, 502, 503, 504)
TRIES = 5
WINDOW = 30.0  # seconds in which at least SLOWEST bytes must come, else the connection is given up and the range asked for again
SLOWEST = 32 << 10  # bytes
_NUMBER = re.compile(r"[0-9]{1,9}")
_LIMIT = re.compile(r'"[^"]*"\s*;\s*r\s*=\s*([0-9]{1,9})\s*;\s*t\s*=\s*([0-9]{1,9})(?![0-9])')


class Slow(TimeoutError):
    """A server sends, but so little that it would take for ever."""


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds for which a server asks to be left alone, by RateLimit or Retry-After (seconds or a date); at most LONGEST_WAIT.

    None where it asks for nothing, or for what can't be read.
    """
    limit = _LIMIT.search(str(headers.get("RateLimit", "")))
    if limit and int(limit[1]) == 0:
        return min(float(limit[2]) + 1.0, LONGEST_WAIT)
    after = str(headers.get("Retry-After", "")).strip()
    if after.isascii() and after.isdigit():
        return float(min(int(after), LONGEST_WAIT)) if _NUMBER.fullmatch(after) else float(LONGEST_WAIT)
    try:
        until = parsedate_to_datetime(after)
        left = (until if until.tzinfo else until.replace(tzinfo=UTC)) - datetime.now(UTC)
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
    return min(max(left.total_seconds(), 0.0), float(LONGEST_WAIT))


def wait_for(headers: Mapping[str, str], tries: int) -> float:
    """Seconds until the next attempt: as the server says, within bounds, else 1, 2, 4, 8, 8 …"""
    asked = asked_pause(headers)
    return min(8.0, 2.0 ** (tries - 1)) if asked is None else asked


def passing(error: BaseException) -> bool:
    """Whether `error` may be gone the next time."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, errors.HTTPError | TimeoutError | ConnectionError) and not isinstance(error, errors.OfflineModeIsEnabled)


def patiently(call: Callable[[], T], sleep: Callable[[float], object] | None = None) -> T:
    """`call()`, again after a failure that may pass, at most five times; the last failure is raised as it is."""
    for tries in range(1, TRIES + 1):
        try:
            return call()
        except (errors.HTTPError, OSError) as error:
            if tries == TRIES or not passing(error):
                raise
            pause(wait_for(getattr(getattr(error, "response", None), "headers", {}), tries), safe(error), sleep or time.sleep)
    raise AssertionError


def pause(seconds: float, why: str, sleep: Callable[[float], object]) -> None:
    """Wait; who must wait long is told why."""
    log.log(logging.WARNING if seconds > 10 else logging.INFO, "waiting %.0f s: %s", seconds, why)
    sleep(seconds)


def steadily(chunks: Iterable[bytes], clock: Callable[[], float] = time.monotonic) -> Iterator[bytes]:
    """`chunks` as they arrive; raises Slow when fewer than SLOWEST bytes came in a WINDOW."""
    began, came = clock(), 0
    for chunk in chunks:
        came += len(chunk)
        yield chunk
        now = clock()
        if came >= SLOWEST:
            began, came = now, 0
        elif now - began > WINDOW:
            raise Slow(f"only {came} bytes came in {now - began:.0f} s")
