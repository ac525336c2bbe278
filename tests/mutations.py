"""Random changes of what a file holds: seeded, so that a failure comes back."""

import math
from copy import deepcopy

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


def mutated(value, random):
    """A copy with one change, and what was changed."""
    copy = deepcopy(value)
    *way, key = random.choice(list(places(copy)))
    parents = [copy]
    for step in way:
        parents.append(parents[-1][step])
    if isinstance(parents[-1], tuple):
        as_list = list(parents[-1])
        parents[-2][way[-1]] = as_list
        as_list[key] = random.choice(WRONG)
        parents[-2][way[-1]] = tuple(as_list)
        return copy, (*way, key), "replaced"
    holder = parents[-1]
    kinds = ["removed", "replaced", "replaced", "swapped"] + ["renamed"] * isinstance(holder, dict)
    kind = random.choice(kinds)
    if isinstance(holder[key], Tensor) and random.random() < 0.6:
        kind, holder[key] = "another tensor", of_tensor(holder[key], random)
    elif kind == "removed":
        del holder[key]
    elif kind == "replaced":
        holder[key] = random.choice(WRONG)
    elif kind == "renamed":
        holder[random.choice([f"{key}x", "__class__", "0", 7, "*"])] = holder.pop(key)
    elif isinstance(holder, dict):
        holder[key] = holder.pop(key)  # now the last
    else:
        holder.insert(0, holder.pop(key))
    return copy, (*way, key), kind


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
