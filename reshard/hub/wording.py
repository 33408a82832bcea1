"""Texts from the network, fit to be shown: no tokens, no signed URLs, no lines of their own."""

import re

from reshard.foreign import quote

_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>)]*")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{3,}|(?i:bearer) +\S+")


def safe(text: object) -> str:
    """`text` on one line, without tokens and the queries of URLs."""
    return quote(_TOKEN.sub("hf_…", _QUERY.sub(r"\1", " ".join(str(text).split()))), 400)
