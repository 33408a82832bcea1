"""Text from files that others wrote: parsed strictly, quoted shortly.

A file's own text may be of any length and hold any character: no error repeats it but through ``quote``.
"""

import json

#: a longer JSON is no header and no index of a checkpoint; the safetensors library draws the line here
LIMIT = 100_000_000
#: values in one JSON: 400,000 tensors' headers have as many, and Python needs some hundred bytes for each
_MOST_VALUES = 4_000_000


def printable(text: str, keep: str = "\n") -> str:
    """`text` with everything that a terminal would obey (or hide) written as an escape, but for the characters in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def quote(value: object, limit: int = 120) -> str:
    """`value` as text for a message: its beginning alone when it is long, and nothing that a terminal would obey."""
    if isinstance(value, (list, tuple)) and len(value) > limit:
        value = value[:limit]
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits, lists in lists in lists
        text = f"a {type(value).__name__} too long to print"
    if len(text) > limit:
        text = text[:limit] + "…"
    return printable(text, keep="")


def parse(raw: bytes) -> object:
    """JSON in UTF-8 in which no key stands twice. Raises ValueError, with a text that is safe to print."""
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > _MOST_VALUES:
        raise ValueError(f"it holds up to {values} values, more than the {_MOST_VALUES} allowed")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
        if raw.count(b":") != _pairs(value):  # else each colon is that of a key that is there: none stood twice
            value = json.loads(text, object_pairs_hook=_unique)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair, which is no text
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{quote(error.object[error.start : error.end])} is no text") from None
    except ValueError as error:
        raise ValueError(quote(error)) from None
    return value


def _pairs(value: object) -> int:
    """The keys of a table and of the tables in it; a header has no deeper ones."""
    return len(value) + sum([len(inner) for inner in value.values() if type(inner) is dict]) if type(value) is dict else -1


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} stands twice")
            seen.add(name)
    return table
