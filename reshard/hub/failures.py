"""The Hub client's exceptions, and answers that nobody expected, as one line and a hint.

No text that leaves here holds a token or the query of a signed URL.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants, errors, get_token

from reshard.errors import HubError, ReshardError
from reshard.hub.client import endpoint, watched
from reshard.hub.location import Location
from reshard.hub.patience import Slow, patiently
from reshard.hub.wording import safe

T = TypeVar("T")


def asked(what: str, call: Callable[[], T], sleep: Callable[[float], object] | None = None) -> T:
    """`call()`, a request that the client makes and whose answer it reads, with patience.

    An answer that the client stumbles over (a field of another type, a body that is no JSON) is a HubError about `what`, a URL's path.
    """
    try:
        return patiently(call, sleep)
    except (ReshardError, errors.HTTPError, OSError, errors.EntryNotFoundError, errors.HFValidationError):
        raise
    except RuntimeError as error:
        if _is_of_xet(error):
            raise
        raise unexpected(what, error) from None
    except Exception as error:  # noqa: BLE001  whatever a hostile answer makes of the client
        raise unexpected(what, error) from None


def unexpected(what: str, why: object) -> HubError:
    """The Hub answered a request for `what`, a URL's path, as no Hub does."""
    kind = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
    return HubError(
        f"{endpoint()}: unexpected answer for {safe(urlsplit(what).path)}: {kind}{safe(why)}",
        "check HF_ENDPOINT, and run the same command again",
    )


def _is_of_xet(error: BaseException) -> bool:
    return bool(re.search(r"xet|\bcas\b|reconstruct", f"{type(error)} {error}", re.IGNORECASE))


@contextmanager
def told(location: Location, what: str = "") -> Iterator[None]:
    """Everything the client raises inside, as a HubError about `location` (and `what`, a file of it)."""
    try:
        with watched():
            yield
    except HubError:
        raise
    except Slow as error:
        raise HubError(f"{location}: {what}: {safe(error)}", "run the same command again later: it goes on from here") from None
    except (errors.HTTPError, OSError, errors.EntryNotFoundError, errors.RevisionResolutionError, errors.CachedRepoTreeNotFoundError,
            errors.HFValidationError, errors.XetDownloadError, errors.SafetensorsParsingError) as error:  # fmt: skip
        if type(error).__module__ == "hf_xet":  # OSErrors, of its own
            raise _of_xet(error, location) from None
        if isinstance(error, OSError) and not isinstance(
            error, errors.HTTPError | ConnectionError | TimeoutError | errors.EntryNotFoundError | errors.FileMetadataError
        ):
            raise  # a disk's, not the Hub's
        raise explain(error, location, what) from None
    except RuntimeError as error:  # hf_xet has no class of its own for these
        if _is_of_xet(error):
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
        return HubError(
            f"{location} is gated, and this account has no access to it yet ({token})", f"ask for access at {url}, then `hf auth login`"
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{location} is disabled: {said}", f"see {url}")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        hint = (
            "check the name, and that the token may read it"
            if get_token()
            else "check the name; a private model needs `hf auth login` or HF_TOKEN"
        )
        return HubError(f"{location}: no such model, or no access to it ({token})", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{location}: no branch, tag or commit {location.branch!r}", f"see {url}/tree/main")
    if isinstance(
        error,
        errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | errors.RevisionResolutionError | errors.CachedRepoTreeNotFoundError,
    ):
        if constants.HF_HUB_OFFLINE:
            return HubError(
                f"{where} is not (wholly) in the Hub's cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
            )
        return HubError(
            f"{where}: {endpoint()} can't be reached, and the Hub's cache does not hold it",
            "check the network, and HF_ENDPOINT if you set it",
        )
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
        return HubError(
            f"{where}: not allowed ({token}): {said}",
            "the token needs the right to write here" if token.startswith("a ") else "`hf auth login`",
        )
    if status:
        request = f" (request {safe(asked_by)})" if (asked_by := getattr(error, "request_id", None)) else ""
        return HubError(
            f"{where}: the Hub answered {status}: {said}{request}", "try again later; what was done is kept" if status >= 500 else None
        )
    return HubError(
        f"{where}: {endpoint()} can't be reached: {said or type(error).__name__}", "check the network, and HF_ENDPOINT if you set it"
    )
