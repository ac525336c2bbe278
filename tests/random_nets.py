"""Random small convolutional nets, with branches, concatenations, gates, depthwise and grouped convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

_ACTIVATIONS = (F.relu, F.silu, F.hardswish, F.leaky_relu, torch.tanh, F.gelu)
_CONSTANT_ACTIVATIONS = (torch.sigmoid, F.softplus)  # they turn a zero into another constant


class RandomNet(nn.Module):
    """Operations on a growing list of feature maps of one size, then a classifier.

    constants: whether zeros may become other constants, which the next layer may pad with zeros.
    """

    def __init__(self, random, constants=True):
        super().__init__()
        torch.manual_seed(random.randrange(1000))
        self.random, self.constants = random, constants
        self.layers, self.steps = nn.ModuleList(), []
        self.channels = [3]
        self._layer(0, 6)
        makers = (self._layer, self._layer, self._sum, self._concatenation, self._depthwise, self._grouped, self._gate)
        for _ in range(random.randint(2, 6)):
            random.choice(makers)(self._latest(), 2 * random.randint(2, 4))
        self._head(random.choice((1, 2)))
        del self.random

    def _latest(self):
        return self.random.randrange(max(1, len(self.channels) - 3), len(self.channels))

    def _add(self, function, layers, places, channels):
        numbers = [len(self.layers) + number for number in range(len(layers))]
        self.layers.extend(layers)
        self.steps.append((function, numbers, places))
        self.channels.append(channels)
        return len(self.channels) - 1

    def _activation(self):
        return self.random.choice(_ACTIVATIONS + (_CONSTANT_ACTIVATIONS if self.constants else ()))

    def _layer(self, place, out, groups=1, inputs=None):
        inputs = self.channels[place] if inputs is None else inputs
        kernel = self.random.choice((1, 3))
        mode = self.random.choice(("zeros", "zeros", "replicate"))
        conv = nn.Conv2d(
            inputs, out, kernel, padding=kernel // 2, groups=groups, padding_mode=mode, bias=self.random.random() < 0.5
        )
        activation = self._activation()
        if self.random.random() < 0.3:
            return self._add(lambda layers, x: activation(layers[0](x)), [conv], [place], out)
        norm = nn.BatchNorm2d(out)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        return self._add(lambda layers, x: activation(layers[1](layers[0](x))), [conv, norm], [place], out)

    def _sum(self, place, out):
        other = self._latest()
        first, second = self._layer(place, out), self._layer(other, out)
        return self._add(lambda layers, x, y: x + y, [], [first, second], out)

    def _concatenation(self, place, out):
        other = self._layer(self._latest(), out)
        return self._add(
            lambda layers, x, y: torch.cat([x, y], 1), [], [place, other], self.channels[place] + self.channels[other]
        )

    def _depthwise(self, place, out):
        return self._layer(place, self.channels[place], groups=self.channels[place])

    def _grouped(self, place, out):
        if self.channels[place] % 2:
            return self._layer(place, out)
        return self._layer(place, out, groups=2)

    def _gate(self, place, out):
        count = self.channels[place]
        squeeze, excite = nn.Conv2d(count, 4, 1), nn.Conv2d(4, count, 1)
        return self._add(
            lambda layers, x: x * layers[1](F.relu(layers[0](x.mean((2, 3), keepdim=True)))).sigmoid(),
            [squeeze, excite], [place], count,
        )  # fmt: skip

    def _head(self, side):
        read = {place for _, _, places in self.steps for place in places}
        self.last = [place for place in range(1, len(self.channels)) if place not in read]
        count = sum(self.channels[place] for place in self.last)
        side = side if len(self.last) == 1 else 1
        self.hidden, self.out = nn.Linear(count * side * side, 8), nn.Linear(8, 4)
        self.side = side

    def forward(self, x):
        maps = [x]
        for function, numbers, places in self.steps:
            maps.append(function([self.layers[number] for number in numbers], *(maps[place] for place in places)))
        pooled = [F.adaptive_avg_pool2d(maps[place], self.side) for place in self.last]
        return self.out(F.relu(self.hidden(torch.cat(pooled, 1).flatten(1))))


@torch.no_grad()
def kill(model, random, share):
    """Set filters, inputs of layers, biases and entries of norm layers to zero, at random."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for place in range(module.weight.shape[0]):
                if random.random() < share:
                    module.weight[place] = 0
                    if module.bias is not None and random.random() < 0.7:
                        module.bias[place] = 0
            for place in range(module.weight.shape[1]):
                if random.random() < share / 4:
                    module.weight[:, place] = 0
        elif isinstance(module, nn.BatchNorm2d):
            for place in range(module.num_features):
                if random.random() < share / 2:
                    module.weight[place] = 0
                    module.bias[place] = random.choice((0.0, -1.0, 0.5))
