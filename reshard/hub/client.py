"""The Hub's client, set up as the environment says."""

import os

from huggingface_hub import HfApi, constants

from reshard import __version__


def endpoint() -> str:
    """HF_ENDPOINT as it is now; the client's own constant is of the time of its import."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def hub_api() -> HfApi:
    """Its token is HF_TOKEN's, or that of `hf auth login`."""
    return HfApi(endpoint=endpoint(), library_name="reshard", library_version=__version__)
