"""Small nets with attentions and MLPs of all layouts, and by hand which entries of their weights make up each group."""

import torch
import torch.nn.functional as F
from torch import nn

from sparsifai import register_attention, register_layer, register_mlp

WIDTH = 5  # of what goes from one layer to the next


class Transposed(nn.Module):
    """As GPT-2's Conv1D: a linear layer whose weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


register_layer(Transposed, weight=("in", "out"))


class Attention(nn.Module):
    """`gates`, if it is set, multiplies what each head hands on."""

    gates = None

    def __init__(self, heads=3, key_value_heads=None, size=2):
        super().__init__()
        self.num_heads, self.kv, self.size = heads, key_value_heads or heads, size

    def attend(self, query, key, value):
        """query, key and value: (batch, tokens, heads * size)."""
        query, key, value = (each.unflatten(-1, (-1, self.size)).transpose(1, 2) for each in (query, key, value))
        key, value = (each.repeat_interleave(self.num_heads // self.kv, 1) for each in (key, value))
        heads = (query @ key.mT / self.size**0.5).softmax(-1) @ value
        heads = heads if self.gates is None else heads * self.gates.view(-1, 1, 1)
        return heads.transpose(1, 2).flatten(2)


class Separate(Attention):
    def __init__(self, heads=3, key_value_heads=None, size=2, **options):
        super().__init__(heads, key_value_heads, size)
        self.q, self.o = nn.Linear(WIDTH, heads * size, **options), nn.Linear(heads * size, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, self.kv * size, **options) for _ in range(2))

    def forward(self, x):
        return self.o(self.attend(self.q(x), self.k(x), self.v(x)))


class Gated(Separate):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 6)

    def forward(self, x):
        return self.o(self.attend(self.q(x), self.k(x), self.v(x)) * self.gate(x).sigmoid())


class Cross(Attention):
    def __init__(self):
        super().__init__()
        self.q, self.kv_proj, self.o = nn.Linear(WIDTH, 6, bias=False), nn.Linear(WIDTH, 12), nn.Linear(6, WIDTH)

    def forward(self, x):
        return self.o(self.attend(self.q(x), *self.kv_proj(x.flip(1)).chunk(2, -1)))


class Fused(Attention):
    layer = nn.Linear

    def __init__(self, heads=3, key_value_heads=None, size=2, **options):
        super().__init__(heads, key_value_heads, size)
        self.qkv = self.layer(WIDTH, (heads + 2 * self.kv) * size, **options)
        self.proj = self.layer(heads * size, WIDTH)

    def forward(self, x):
        sizes = [self.num_heads * self.size, self.kv * self.size, self.kv * self.size]
        return self.proj(self.attend(*self.qkv(x).split(sizes, -1)))


class FusedTransposed(Fused):
    layer = Transposed


class Interleaved(Fused):
    def forward(self, x):
        queries = self.num_heads // self.kv
        fused = self.qkv(x).unflatten(-1, (self.kv, queries + 2, self.size))
        query, key, value = fused[..., :queries, :], fused[..., queries, :], fused[..., queries + 1, :]
        return self.proj(self.attend(query.flatten(2), key.flatten(2), value.flatten(2)))


class Torch(nn.Module):
    def __init__(self, batch_first=True, **sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, batch_first=batch_first, **sizes)
        self.before, self.after, self.sizes = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH), sizes

    def forward(self, x):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        memory = x[..., : self.sizes["kdim"]] if "kdim" in self.sizes else self.before(x)
        y = self.after(self.attention(self.before(x), memory, memory)[0])
        return y if self.attention.batch_first else y.transpose(0, 1)


register_attention(Separate, query="q", key="k", value="v", output="o")
register_attention(Gated, query="q", key="k", value="v", output="o", also=("gate",))
register_attention(Cross, query="q", key="kv_proj", value="kv_proj", output="o")
register_attention(Fused, query="qkv", key="qkv", value="qkv", output="proj")
register_attention(Interleaved, query="qkv", key="qkv", value="qkv", output="proj", interleaved=True)


class Mlp(nn.Module):
    gates = None

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def hidden(self, x):
        return self.up(x).tanh()

    def forward(self, x):
        hidden = self.hidden(x)
        return self.down(hidden if self.gates is None else hidden * self.gates)


class GatedMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)

    def hidden(self, x):
        return F.silu(self.gate(x)) * self.up(x)


class FusedGatedMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)

    def hidden(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return F.silu(gate) * up


register_mlp(Mlp, up="up", down="down")
register_mlp(GatedMlp, up="up", down="down", gate="gate")


class Net(nn.Module):
    """Two blocks of one kind, each of which adds to what goes through, and a classifier."""

    def __init__(self, kind, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.classifier = nn.ModuleList(kind() for _ in range(blocks)), nn.Linear(WIDTH, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)  # torch's attention begins with biases of zero

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.classifier(x.mean(1))


def sides(**places):
    """Parameter -> (axis, places along it), from q=(axis, places): 'q' stands for 'q.weight', and '__' for a dot."""
    named = {name.replace("__", "."): where for name, where in places.items()}
    return {name if name.endswith("_weight") else f"{name}.weight": where for name, where in named.items()}


# For every kind of block: how it is made, its granularity, the weights of each group and the entries of its biases.
PAIRS = [[0, 1], [2, 3], [4, 5]]
THREE = [[0, 1, 6, 7, 12, 13], [2, 3, 8, 9, 14, 15], [4, 5, 10, 11, 16, 17]]
SIX = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
BLOCKS = {
    "separate": (
        Separate,
        "head",
        [sides(q=(0, rows), k=(0, rows), v=(0, rows), o=(1, rows)) for rows in PAIRS],
        [{"q.bias": rows, "k.bias": rows, "v.bias": rows} for rows in PAIRS],
    ),
    "gated": (
        Gated,
        "head",
        [sides(q=(0, rows), k=(0, rows), v=(0, rows), gate=(0, rows), o=(1, rows)) for rows in PAIRS],
        [{"q.bias": rows, "k.bias": rows, "v.bias": rows, "gate.bias": rows} for rows in PAIRS],
    ),
    "grouped": (
        lambda: Separate(4, 2),
        "head",
        [
            sides(q=(0, [0, 1, 2, 3]), k=(0, [0, 1]), v=(0, [0, 1]), o=(1, [0, 1, 2, 3])),
            sides(q=(0, [4, 5, 6, 7]), k=(0, [2, 3]), v=(0, [2, 3]), o=(1, [4, 5, 6, 7])),
        ],
        [
            {"q.bias": [0, 1, 2, 3], "k.bias": [0, 1], "v.bias": [0, 1]},
            {"q.bias": [4, 5, 6, 7], "k.bias": [2, 3], "v.bias": [2, 3]},
        ],
    ),
    "multi-query": (
        lambda: Separate(3, 1),
        "head",
        [sides(q=(0, rows), o=(1, rows)) for rows in PAIRS],
        [{"q.bias": rows} for rows in PAIRS],
    ),
    "cross": (
        Cross,
        "head",
        [
            sides(q=(0, [0, 1]), kv_proj=(0, [0, 1, 6, 7]), o=(1, [0, 1])),
            sides(q=(0, [2, 3]), kv_proj=(0, [2, 3, 8, 9]), o=(1, [2, 3])),
            sides(q=(0, [4, 5]), kv_proj=(0, [4, 5, 10, 11]), o=(1, [4, 5])),
        ],
        [{"kv_proj.bias": rows} for rows in ([0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11])],
    ),
    "fused": (
        Fused,
        "head",
        [sides(qkv=(0, rows), proj=(1, columns)) for rows, columns in zip(THREE, PAIRS, strict=True)],
        [{"qkv.bias": rows} for rows in THREE],
    ),
    "transposed": (
        FusedTransposed,
        "head",
        [sides(qkv=(1, rows), proj=(0, columns)) for rows, columns in zip(THREE, PAIRS, strict=True)],
        [{"qkv.bias": rows} for rows in THREE],
    ),
    "fused multi-query": (
        lambda: Fused(3, 1),
        "head",
        [sides(qkv=(0, rows), proj=(1, rows)) for rows in PAIRS],
        [{"qkv.bias": rows} for rows in PAIRS],
    ),
    "fused grouped": (
        lambda: Fused(4, 2),
        "head",
        [
            sides(qkv=(0, [0, 1, 2, 3, 8, 9, 12, 13]), proj=(1, [0, 1, 2, 3])),
            sides(qkv=(0, [4, 5, 6, 7, 10, 11, 14, 15]), proj=(1, [4, 5, 6, 7])),
        ],
        [{"qkv.bias": [0, 1, 2, 3, 8, 9, 12, 13]}, {"qkv.bias": [4, 5, 6, 7, 10, 11, 14, 15]}],
    ),
    "interleaved": (
        Interleaved,
        "head",
        [sides(qkv=(0, rows), proj=(1, columns)) for rows, columns in zip(SIX, PAIRS, strict=True)],
        [{"qkv.bias": rows} for rows in SIX],
    ),
    "interleaved grouped": (
        lambda: Interleaved(4, 2),
        "head",
        [
            sides(qkv=(0, [0, 1, 2, 3, 4, 5, 6, 7]), proj=(1, [0, 1, 2, 3])),
            sides(qkv=(0, [8, 9, 10, 11, 12, 13, 14, 15]), proj=(1, [4, 5, 6, 7])),
        ],
        [{"qkv.bias": [0, 1, 2, 3, 4, 5, 6, 7]}, {"qkv.bias": [8, 9, 10, 11, 12, 13, 14, 15]}],
    ),
    "torch": (
        Torch,
        "head",
        [
            sides(attention__in_proj_weight=(0, rows), attention__out_proj=(1, columns))
            for rows, columns in zip(THREE, PAIRS, strict=True)
        ],
        [{"attention.in_proj_bias": rows} for rows in THREE],
    ),
    "torch with kdim": (
        lambda: Torch(kdim=4, vdim=4),
        "head",
        [
            sides(
                attention__q_proj_weight=(0, rows), attention__k_proj_weight=(0, rows),
                attention__v_proj_weight=(0, rows), attention__out_proj=(1, rows),
            )
            for rows in PAIRS
        ],
        [{"attention.in_proj_bias": rows} for rows in THREE],
    ),
    "mlp": (
        Mlp,
        "neuron",
        [sides(up=(0, [number]), down=(1, [number])) for number in range(4)],
        [{"up.bias": [number]} for number in range(4)],
    ),
    "gated mlp": (
        GatedMlp,
        "neuron",
        [sides(up=(0, [number]), gate=(0, [number]), down=(1, [number])) for number in range(4)],
        [{"up.bias": [number]} for number in range(4)],
    ),
    "fused gated mlp": (
        FusedGatedMlp,
        "neuron",
        [sides(up=(0, [number, number + 4]), down=(1, [number])) for number in range(4)],
        [{"up.bias": [number, number + 4]} for number in range(4)],
    ),
}  # fmt: skip


def weights_of(model, block, group):
    """The values of one group of one block, from the table."""
    parameters = model.blocks[block].state_dict()
    return {name: parameters[name].index_select(axis, torch.tensor(at)) for name, (axis, at) in group.items()}


def masks_of(model, kind, pruned):
    """The masks that the table gives. pruned: for each block, numbers of its pruned groups."""
    _, _, groups, biases = BLOCKS[kind]
    masks = {}
    for number, of_block in enumerate(pruned):
        parameters = dict(model.blocks[number].named_parameters())
        for name in {name for group in groups for name in group}:
            masks[f"blocks.{number}.{name}"] = torch.ones_like(parameters[name], dtype=torch.bool)
        for name in {name for group in biases for name in group}:
            masks[f"blocks.{number}.{name}"] = torch.ones_like(parameters[name], dtype=torch.bool)
        for group in of_block:
            for name, (axis, at) in groups[group].items():
                masks[f"blocks.{number}.{name}"].index_fill_(axis, torch.tensor(at), False)
            for name, at in biases[group].items():
                masks[f"blocks.{number}.{name}"][at] = False
    return masks
