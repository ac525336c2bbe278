"""Random changes of what a file holds: seeded, so that a failure comes back."""

import math

import torch
from torch import Tensor

WRONG = [
    None, True, 0, 1, -1, 3, 2**63, 10**30, 0.5, -0.5, math.nan, math.inf, "", "x", "re:(a|a)*b", "x" * 2000, 1j, (),
    (1, 2), [], [[]], {}, {"x": 1}, {1: 2}, torch.Size([1]), torch.float32, torch.device("cpu"), torch.tensor(1.0),
    torch.ones(2, 2), torch.zeros(3, dtype=torch.bool), torch.full((2, 2), 3, dtype=torch.uint8),
    torch.tensor(math.nan), torch.empty(0), torch.ones(1).expand(2, 2), torch.empty(2, 2, device="meta"),
    torch.eye(2).to_sparse(),
]  # fmt: skip
DTYPES = [torch.uint8, torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool]


def of_tensor(value, random):
    """Another tensor in place of one."""
    number = value.is_floating_point()
    changes = [
        lambda: value.to(random.choice(DTYPES)), lambda: value.to(torch.uint8) * 3, lambda: value.to("meta"),
        lambda: value.reshape(-1), lambda: value[None], lambda: value.flatten()[:-1], lambda: value.t().contiguous(),
        lambda: value.to_sparse(), lambda: torch.cat([value, value]) if value.dim() else value[None],
        lambda: value.flatten()[:1].expand(value.numel()).reshape(value.shape) if value.numel() else value,
        lambda: torch.full_like(value, math.nan) if number else value.logical_not().to(value.dtype),
        lambda: torch.full_like(value, math.inf) if number else value,
    ]  # fmt: skip
    return random.choice(changes)()


def places(value, at=()):
    """The places of all entries, as tuples of keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, (list, tuple)) else ()
    if isinstance(keys, range) and len(keys) > 20:
        keys = (0, 1, len(value) - 1)  # a random state has hundreds of numbers
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def with_entry(value, way, new):
    """A copy with another entry at a place; the rest is shared."""
    if not way:
        return new
    kind, copy = type(value), dict(value) if isinstance(value, dict) else list(value)
    copy[way[0]] = with_entry(copy[way[0]], way[1:], new)
    return tuple(copy) if kind is tuple else copy


def mutated(value, random):
    """A copy with one change, the place of the change, and its kind."""
    way = random.choice(list(places(value)))
    holder = value
    for step in way[:-1]:
        holder = holder[step]
    key, entry = way[-1], holder[way[-1]]
    kind = random.choice(["removed", "replaced", "replaced", "swapped", *["renamed"] * isinstance(holder, dict)])
    if isinstance(entry, Tensor) and random.random() < 0.6:
        return with_entry(value, way, of_tensor(entry, random)), way, "another tensor"
    if kind == "replaced" or isinstance(holder, tuple):
        return with_entry(value, way, random.choice(WRONG)), way, "replaced"
    changed = dict(holder) if isinstance(holder, dict) else list(holder)
    changed.pop(key)
    if kind == "renamed":
        changed[random.choice([f"{key}x", "__class__", "0", 7, "*"])] = entry
    elif kind == "swapped" and isinstance(changed, dict):
        changed[key] = entry  # now the last
    elif kind == "swapped":
        changed.insert(0, entry)
    return with_entry(value, way[:-1], changed), way, kind


def damaged(data, random):
    """Bytes of which some are changed, removed, added or doubled, or whose end is cut off."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4])):
        place = random.randrange(len(changed))
        kind = random.choice(["flip", "flip", "set", "cut", "remove", "add", "double"])
        if kind == "flip":
            changed[place] ^= 1 << random.randrange(8)
        elif kind == "set":
            changed[place] = random.choice(b"\x00\xff(.}]RQcXKMJ\x8a\x85\x86")
        elif kind == "cut" and place:
            del changed[place:]
        elif kind == "remove" and len(changed) > 20:
            del changed[place : place + random.randrange(1, 9)]
        elif kind == "add":
            changed[place:place] = bytes([random.randrange(256)])
        else:
            changed[place:place] = changed[place : place + random.randrange(1, 40)]
    return bytes(changed)
