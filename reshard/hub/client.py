"""The Hub's client, set up as the environment says, and watched: no token to another host, no wait without end.

The client follows a listing's ``Link`` wherever it leads, obeys any ``Retry-After``, and sets no time-out of its own for most
requests. Reshard asks for listings itself (``answers.py``); what it leaves to the client passes the two checks below.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_session

from reshard import __version__
from reshard.errors import HubError

if TYPE_CHECKING:
    import httpx

_SILENCE = 600  # seconds without a byte, for requests of the client's that set no time-out: a large commit takes minutes
_watched: ContextVar[bool] = ContextVar("reshard_watched", default=False)


def endpoint() -> str:
    """HF_ENDPOINT as it is now; the client's own constant is of the time of its import."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def hub_api() -> HfApi:
    """Its token is HF_TOKEN's, or that of `hf auth login`."""
    session()
    return HfApi(endpoint=endpoint(), library_name="reshard", library_version=__version__)


def session() -> "httpx.Client":
    """The client's shared HTTP session. Others in this process use it too: its requests are checked inside ``watched`` only."""
    found = get_session()
    hooks = found.event_hooks
    if _check_request not in hooks["request"]:
        found.event_hooks = {"request": [*hooks["request"], _check_request], "response": [*hooks["response"], _check_response]}
    return found


@contextmanager
def watched() -> Iterator[None]:
    """Requests made inside are checked."""
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)


def same_origin(url: str, hub: str) -> bool:
    """Whether `url` is of the Hub's own origin, the only one that may see the token."""
    try:
        return _origin(url) == _origin(hub)
    except ValueError:  # a port that is no number
        return False


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _check_request(request: "httpx.Request") -> None:
    if not _watched.get():
        return
    if "authorization" in request.headers and not same_origin(str(request.url), endpoint()):
        raise HubError(f"{endpoint()} sends requests on to {request.url.host!r}, which must not see the token", "check HF_ENDPOINT")
    timeout = dict(request.extensions.get("timeout") or {})
    request.extensions["timeout"] = {
        name: _SILENCE if timeout.get(name) is None else timeout[name] for name in ("connect", "read", "write", "pool")
    }


def _check_response(response: "httpx.Response") -> None:
    """Headers that ask for a pause, made such that the client's own waiting is bounded."""
    if not _watched.get():
        return
    from reshard.hub.patience import asked_pause

    pause = asked_pause(response.headers)
    for name in ("Retry-After", "RateLimit"):
        response.headers.pop(name, None)
    if pause is not None:
        response.headers["Retry-After"] = str(round(pause))
