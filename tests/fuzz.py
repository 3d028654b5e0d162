"""Broken files of every kind: what a stranger's JSON, YAML, safetensors, torch or HDF5 file may be like.

The random numbers are those that hypothesis gives.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import torch

DEEP = json.loads("[" * 60 + "]" * 60)
ODD = [
    *(None, True, False, 0, -1, 1, 7, 1.5, -1e30, 1e308, 10**30, 10**400, float("nan"), float("inf")),
    *("", "x", "a\nb", "a\0b", "\ud800", "../../etc/passwd", "/dev/zero", "x" * 5000, "é▁", "hf-hub:a/b", "1e400"),
    *([], {}, [[]], {"x": {}}, [0] * 50, ["x"], [None] * 8, {"bytes": 1}, DEEP),
]
TENSORS = [
    *(lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.zeros(3, 2), lambda: torch.ones(7).bool()),
    *(lambda: torch.full((4,), torch.nan), lambda: torch.arange(5), lambda: torch.zeros(1, dtype=torch.complex64)),
    *(lambda: torch.zeros(1).expand(2**40), lambda: torch.zeros(2).to_sparse(), lambda: torch.zeros(3, device="meta")),
]


def nodes(value: Any, at: tuple = ()) -> list[tuple]:
    """The way to each value in nested dicts and lists; () is the whole."""
    found = [at]
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list | tuple) else ()
    return found + [inner for key in keys for inner in nodes(value[key], (*at, key))]


def mutated_value(rng: random.Random, value: Any, odd: Callable[[random.Random], Any] | None = None) -> Any:
    """A copy in which one to three values are another, gone, twice, renamed or deeper."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        new = odd(rng) if odd is not None and rng.random() < 0.5 else copy.deepcopy(rng.choice(ODD))
        at = rng.choice(nodes(value))
        if not at:
            if rng.random() < 0.2:
                return new
            continue
        parent = value
        for key in at[:-1]:
            parent = parent[key]
        if isinstance(parent, tuple):
            continue
        way = rng.randrange(6)
        if way == 0:
            del parent[at[-1]]
        elif way == 1 and isinstance(parent, list):
            parent.insert(at[-1], copy.deepcopy(parent[at[-1]]))
        elif way == 1:
            parent[rng.choice(("x", "a\nb", "../x", "", "\ud800", str(at[-1]) * 2))] = parent.pop(at[-1])
        elif way == 2:
            parent[at[-1]] = [parent[at[-1]]] * rng.choice((1, 2, 9))
        else:
            parent[at[-1]] = new
    return value


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut off, with bytes changed, put in, left out or doubled, or with a number that claims a size."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 4, 30, 1000))
        way = rng.randrange(7)
        if way == 0:
            del data[place:]
        elif way == 1:
            data[place : place + size] = rng.randbytes(min(size, len(data) - place))
        elif way == 2:
            data[place:place] = rng.randbytes(size)
        elif way == 3:
            del data[place : place + size]
        elif way == 4:
            data[place:place] = data[place : place + size]
        elif way == 5:
            number = rng.choice((0, 2**20, 2**31, 2**42, 2**60, 2**64 - 1))
            data[place : place + 8] = struct.pack("<Q", number)
        elif data:
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def json_file(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    text = json.dumps(mutated_value(rng, json.loads(data)), ensure_ascii=rng.random() < 0.9)
    return text.encode("utf-8", "surrogatepass")


def json_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = json_file(rng, lines[number])
    return b"\n".join(lines) + b"\n"


def safetensors_file(rng: random.Random, data: bytes) -> bytes:
    """With another header; the values stay."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3:  # another shape or type that has as many bytes, which the format's own checks let through
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]))
        if rng.random() < 0.3:
            entry["dtype"] = {"F32": "I32", "BF16": "F16"}.get(entry["dtype"], "U8")
        changed = json.dumps(header).encode()
    else:
        changed = json_file(rng, json.dumps(header).encode())
    claimed = len(changed) if rng.random() < 0.8 else rng.choice((0, 1, 2**20, 2**32, 2**60))
    return struct.pack("<Q", claimed) + changed + data[8 + size :]


def torch_file(rng: random.Random, data: bytes) -> bytes:
    """A torch.save of other values."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    value = torch.load(io.BytesIO(data), weights_only=True)
    buffer = io.BytesIO()
    torch.save(mutated_value(rng, value, lambda rng: rng.choice(TENSORS)()), buffer)
    return buffer.getvalue()
