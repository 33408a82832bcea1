"""The Hub client's exceptions as one line and a hint, and patience with those that pass by themselves.

No text that leaves here holds a token or the query of a signed URL.
"""

import logging
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants, errors, get_token
from huggingface_hub.utils import parse_ratelimit_headers

from reshard.errors import HubError
from reshard.hub.client import endpoint
from reshard.hub.location import Location
from reshard.stores.foreign import quote

T = TypeVar("T")
log = logging.getLogger("reshard.hub")

PASSING = (408, 429, 500, 502, 503, 504)
TRIES = 5
_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>)]*")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{3,}|(?i:bearer) +\S+")


def safe(text: object) -> str:
    """`text` on one line, without tokens and the queries of URLs."""
    return quote(_TOKEN.sub("hf_…", _QUERY.sub(r"\1", " ".join(str(text).split()))), 400)


def wait_for(headers, tries: int) -> float:
    """Seconds until the next attempt: as the server says, else 1, 2, 4, 8, 8 …"""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    after = str(headers.get("Retry-After", "")).strip()
    return float(after) if after.isdigit() else min(8.0, 2.0 ** (tries - 1))


def passing(error: BaseException) -> bool:
    """Whether `error` may be gone the next time."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, errors.HTTPError | TimeoutError | ConnectionError) and not isinstance(error, errors.OfflineModeIsEnabled)


def patiently(call: Callable[[], T], sleep: Callable[[float], object] = time.sleep) -> T:
    """`call()`, again after a failure that may pass, at most five times; the last failure is raised as it is."""
    for tries in range(1, TRIES + 1):
        try:
            return call()
        except (errors.HTTPError, OSError) as error:
            if tries == TRIES or not passing(error):
                raise
            pause(wait_for(getattr(getattr(error, "response", None), "headers", {}), tries), safe(error), sleep)
    raise AssertionError


def pause(seconds: float, why: str, sleep: Callable[[float], object]) -> None:
    """Wait; who must wait long is told why."""
    log.log(logging.WARNING if seconds > 10 else logging.INFO, "waiting %.0f s: %s", seconds, why)
    sleep(seconds)


@contextmanager
def told(location: Location, what: str = ""):
    """Everything the client raises inside, as a HubError about `location` (and `what`, a file of it)."""
    try:
        yield
    except HubError:
        raise
    except (errors.HTTPError, OSError, errors.EntryNotFoundError, errors.RevisionResolutionError, errors.CachedRepoTreeNotFoundError,
            errors.HFValidationError, errors.XetDownloadError, errors.SafetensorsParsingError) as error:  # fmt: skip
        if type(error).__module__ == "hf_xet":  # OSErrors, of its own
            raise _of_xet(error, location) from None
        if isinstance(error, OSError) and not isinstance(error, errors.HTTPError | ConnectionError | TimeoutError | errors.EntryNotFoundError | errors.FileMetadataError):
            raise  # a disk's, not the Hub's
        raise explain(error, location, what) from None
    except RuntimeError as error:  # hf_xet has no class of its own for these
        if re.search(r"xet|\bcas\b|reconstruct", f"{type(error)} {error}", re.IGNORECASE):
            raise _of_xet(error, location) from None
        raise


def _of_xet(error: BaseException, location: Location) -> HubError:
    return HubError(f"{location}: {safe(error)}", "try again with HF_HUB_DISABLE_XET=1")


def explain(error: BaseException, location: Location, what: str = "") -> HubError:
    """What happened, and what to do. The most special classes first: GatedRepoError is a RepositoryNotFoundError."""
    url = f"{endpoint()}/{location.repo}"
    where = f"{location}: {what}" if what else str(location)
    said = safe(getattr(error, "server_message", None) or error)
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    token = "a token was sent" if get_token() else "no token was sent"
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{location} is gated, and this account has no access to it yet ({token})", f"ask for access at {url}, then `hf auth login`")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{location} is disabled: {said}", f"see {url}")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        hint = "check the name, and that the token may read it" if get_token() else "check the name; a private model needs `hf auth login` or HF_TOKEN"
        return HubError(f"{location}: no such model, or no access to it ({token})", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{location}: no branch, tag or commit {location.branch!r}", f"see {url}/tree/main")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | errors.RevisionResolutionError | errors.CachedRepoTreeNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return HubError(f"{where} is not (wholly) in the Hub's cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
        return HubError(f"{where}: {endpoint()} can't be reached, and the Hub's cache does not hold it", "check the network, and HF_ENDPOINT if you set it")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{where} is not there", f"see {url}/tree/{location.branch}")
    if isinstance(error, errors.FileMetadataError):
        return HubError(f"{where}: {endpoint()} does not answer as the Hub does: {said}", "check HF_ENDPOINT")
    if isinstance(error, errors.XetDownloadError):
        return HubError(f"{where}: {said}", "try again with HF_HUB_DISABLE_XET=1")
    if status == 412:
        return HubError(f"{location}: the branch moved while this was being done; nothing was committed", "run the same command again")
    if status == 429:
        hint = "try again later" if get_token() else "log in (`hf auth login`) for a higher limit, or try again later"
        return HubError(f"{location}: the Hub's rate limit is used up: {said}", hint)
    if status == 403:
        return HubError(f"{where}: not allowed ({token}): {said}", "the token needs the right to write here" if token.startswith("a ") else "`hf auth login`")
    if status:
        request = f" (request {safe(error.request_id)})" if error.request_id else ""
        return HubError(f"{where}: the Hub answered {status}: {said}{request}", "try again later; what was done is kept" if status >= 500 else None)
    return HubError(f"{where}: {endpoint()} can't be reached: {said or type(error).__name__}", "check the network, and HF_ENDPOINT if you set it")
