"""Bytes and JSON values changed at random, as damage or an attack would."""

import json
import random
import struct

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    4096,
    65536,
    1 << 31,
    1 << 63,
    10**400,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "2",
    "\0",
    "\x1b[2J",
    "../x",
    "/etc/passwd",
    "é" * 300,
    "F32",
    "I8",
    "BF16",
    [],
    {},
    [[]],
    [0],
    [0, 4],
    [1 << 62, 1 << 62],
    ["x"],
    {"x": 1},
    "\ud800",
]


def bytes_changed(r: random.Random, raw: bytes, low: int = 0, high: int | None = None) -> bytes:
    """`raw` with a few bytes between `low` and `high` flipped, cut out, put in or moved."""
    out = bytearray(raw)
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        end = min(len(out), len(out) if high is None else high)
        at = r.randrange(min(low, max(0, end - 1)), max(end, low + 1)) if end else 0
        match r.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << r.randrange(8)
            case 1 if at < len(out):
                out[at] = r.randrange(256)
            case 2:
                del out[at : at + r.choice([1, 2, 8, 64])]
            case 3:
                out[at:at] = r.choice(
                    [b"\0", b"\xff" * 8, b"[", b"{", b'"', b"PK\1\2", struct.pack("<Q", r.choice([0, 1, 1 << 31, 1 << 63]))]
                )
            case 4:
                out[at : at + 8] = struct.pack("<Q", r.choice([0, 1, len(out), 1 << 32, (1 << 64) - 1]))
            case 5:
                other = r.randrange(len(out) or 1)
                out[at : at + 16] = out[other : other + 16]
            case _:
                del out[at : None if r.random() < 0.3 else at + 1]
    return bytes(out)


def value_changed(r: random.Random, value: object) -> object:
    """A JSON value with something inside it replaced, taken away, doubled or put in."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        key = r.choice(list(value))
        match r.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, r.choice(["x", "", "__metadata__", "a" * 300, "\x1b[2J", "../x"]): r.choice(ODD)}
            case 2:
                return {**value, key: value[r.choice(list(value))]}
            case _:
                return {**value, key: value_changed(r, value[key])}
    if isinstance(value, list) and value and r.random() < 0.7:
        at = r.randrange(len(value))
        return value[:at] + [value_changed(r, value[at])] + value[at + 1 :] if r.random() < 0.7 else value[:at] + value[at + 1 :]
    if type(value) is int and r.random() < 0.5:
        return value + r.choice([-1, 1, 2, -2, 1 << 32, -value])
    return r.choice(ODD)


def json_changed(r: random.Random, raw: bytes) -> bytes:
    if r.random() < 0.4:
        return bytes_changed(r, raw)
    value = json.loads(raw)
    for _ in range(r.choice([1, 1, 2, 3])):
        value = value_changed(r, value)
    return json.dumps(value).encode()
