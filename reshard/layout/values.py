"""Single values in a descriptor, checked: texts, expressions, versions, names with braces in them.

`where` says where one stands, as ``layout NAME: [table] key``; every error begins with it.
"""

import re
from collections.abc import Mapping

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.layout.expressions import Expression, check

#: the tables that say what a format stores
FORMATS = ("hf", "vllm", "sglang", "megatron", "meta", "presharded")
STAGES = ("first", "last", "all")
#: names that expressions may use beside config.json, axes and conditions
GIVEN = ("tp", "pp", "ep", "engine", "platform", "scheme", "attention_scales")
#: what engines run on; the first is meant where nothing is said
PLATFORMS = ("cuda", "rocm", "cpu")
_LONGEST = 250  # of a tensor's name
#: keys of an earlier notation, and what is written instead
GONE = {
    "within": 'write of = "axis: a b"',
    "dim": "tensors are fused along their first dimension, wherever dims puts it",
    "alias": 'write form = "…", copy = true',
    "variants": "write a list of alternatives under the label, with until or form",
    "constants": 'write label = { name = "…", constant = 1.0, dtype = "F32" }',
}


def known_keys(where: str, table: Mapping[str, object], known: set[str], word: str) -> None:
    for key in sorted(set(table) - known):
        if isinstance(table[key], dict) and key not in GONE:
            raise LayoutError(
                f"{where}: unknown key {key!r}", f"known {word}: {', '.join(sorted(known))}; formats are {', '.join(FORMATS)}"
            )
        raise LayoutError(f"{where}: unknown key {key!r}", GONE.get(key, f"known {word}: {', '.join(sorted(known))}"))


def table_of(where: str, key: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise LayoutError(f"{where}: [{key}] must be a table, got {quote(repr(value))}")
    return value


def text_of(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise LayoutError(f"{where} must be a text, got {quote(repr(value))}")
    return value


def texts(where: str, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LayoutError(f"{where}: {key} must be a list of texts, got {quote(repr(value))}")
    return tuple(value)


def flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise LayoutError(f"{where} must be true or false, got {quote(repr(value))}")
    return value


def stage_of(where: str, value: object) -> str:
    if value not in STAGES:
        raise LayoutError(f"{where}: stage must be one of {', '.join(STAGES)}, got {quote(repr(value))}")
    return value


def dtype_of(where: str, word: object) -> str | None:
    if word is not None and (not isinstance(word, str) or word not in DTYPE_SIZE):
        raise LayoutError(f"{where}: unknown dtype {quote(repr(word))}", f"known: {', '.join(DTYPE_SIZE)}")
    return word


def when_of(where: str, table: Mapping[str, object]) -> str:
    given = table.get("when", "true")
    if isinstance(given, bool):
        given = "true" if given else "false"
    return "true" if given == "true" else expression(f"{where}: when", given)


def expression(where: str, text: object) -> str:
    if not isinstance(text, str):
        raise LayoutError(f"{where} must be an expression in quotes, got {quote(repr(text))}")
    text = Expression(text, where)
    check(text)
    return text


def expressions(where: str, key: str, value: object, removable: bool = True) -> dict[str, "str | bool"]:
    """Expressions by name; False takes one away, where it is `removable`."""
    table = table_of(where, key, value)
    return {name: given if given is False and removable else expression(f"{where}: [{key}] {name}", given) for name, given in table.items()}


def until_of(where: str, value: object, key: str = "until") -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){1,2}", value):
        raise LayoutError(f"{where}: {key} = {quote(repr(value))} is not a version", "write it like 0.32")
    return value


def fields_of(where: str, text: str) -> list[str]:
    """What stands in braces in a prefix or a name. Raises LayoutError where braces do not match."""
    if len(text) > _LONGEST:
        raise LayoutError(f"{where}: a name of {len(text)} characters", f"it may have up to {_LONGEST}")
    if re.fullmatch(r"(?:[^{}]|\{[^{}]+\})*", text) is None:
        raise LayoutError(f"{where}: cannot read {quote(repr(text))}: a brace is not closed")
    found = re.findall(r"\{([^{}]+)\}", text)
    for text in found:
        expression(where, text)
    return found
