"""Section `steps`: a training step with masks that are fixed or move in every step, as a multiple of the dense step."""

import traceback
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.gpu.running import autocast, no_waiting, wait
from benchmarks.gpu.workloads import convolutional, copied, side_of_pictures, transformer
from benchmarks.peers import kinds_of
from benchmarks.timing import seconds_of
from sparsifai import Sparsifier

TABLE = "a training step beside the dense one"
# What the masks rise through in a round's steps; a schedule moves as slowly.
FIRST, LAST = 0.3, 0.6
WARM_UP = 3
# Pictures in a batch, also of a rehearsal.
BATCHES = {
    ("resnet50", False): 256,
    ("vit_b_16", False): 128,
    ("resnet50", True): 4,
    ("vit_b_16", True): 4,
}


def steps(section):
    "Eager, as a CUDA graph and compiled"
    some = {name: VARIANTS[name] for name in ("dense", "fixed", "moving", "straight-through")}
    for name, run, variants in (
        ("resnet50", "eager", VARIANTS),
        ("vit_b_16", "eager", VARIANTS),
        ("resnet50", "CUDA graph", some),
        ("vit_b_16", "torch.compile", some),
    ):
        section.part(f"{name}, {run}", _steps, name, run, variants)


class Training:
    """A model that trains on one random batch.

    run: 'eager'; 'CUDA graph', forward and backward replayed; 'torch.compile'. Weights are float32, computed with in
    bfloat16 where there is a GPU.
    """

    def __init__(self, section, name, run, pool=None):
        self.device = device = section.device
        batch, side = BATCHES[name, section.quick], side_of_pictures(section)
        if name == "resnet50":
            layout, model = torch.channels_last, copied(convolutional(section))
            make_optimizer = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
        else:
            layout, model = torch.contiguous_format, transformer(section)
            make_optimizer = partial(torch.optim.AdamW, lr=1e-4)
        self.model = model.to(device, memory_format=layout)
        self.optimizer = make_optimizer(self.model.parameters())
        self.images = torch.randn(batch, 3, side, side, device=device).to(memory_format=layout)
        self.labels = torch.randint(1000, (batch,), device=device)
        self.computed = torch.compile(self.model) if run == "torch.compile" else self.model
        self.graph = self._captured(pool) if run == "CUDA graph" and device.type == "cuda" else None

    def gradients(self):
        "Forward and backward"
        if self.graph is not None:
            self.graph.replay()
            return
        self.optimizer.zero_grad()
        self._forward_and_backward()

    def _forward_and_backward(self):
        with autocast(self.device):
            loss = F.cross_entropy(self.computed(self.images), self.labels)
        loss.backward()

    def _captured(self, pool):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.optimizer.zero_grad()
                self._forward_and_backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        # The gradients that are made here are those of all replays: no zero_grad comes between.
        with torch.cuda.graph(graph, pool=pool):
            self._forward_and_backward()
        return graph


def dense(training):
    "No masks"

    def step(progress):
        training.gradients()
        training.optimizer.step()

    return step


def fixed(training):
    "Masks that are there: gradients masked before the step, weights after it"
    sparsifier = _sparsifier(training)
    return _masked(training, sparsifier, lambda progress: sparsifier.apply_masks())


def moving(training):
    "As SparsifyCallback does: gradients masked before the step, masks built anew after it"
    sparsifier = _sparsifier(training)
    return _masked(
        training,
        sparsifier,
        lambda progress: sparsifier.update_masks(FIRST + (LAST - FIRST) * progress, training.optimizer),
    )


def _masked(training, sparsifier, after_step):
    "A step with masked gradients, and what comes after it"

    def step(progress):
        training.gradients()
        with no_waiting(training.device):
            sparsifier.mask_gradients()
        training.optimizer.step()
        with no_waiting(training.device):
            after_step(progress)

    return step


def sparsify(training, context="global"):
    "The least that a loop of one's own needs: `sparsify` after the step, and nothing else"
    sparsifier = _sparsifier(training, context)

    def step(progress):
        training.gradients()
        training.optimizer.step()
        with no_waiting(training.device):
            sparsifier.sparsify(FIRST + (LAST - FIRST) * progress)

    return step


def straight_through(training, **options):
    "As `moving`, with dense weights kept beside the sparse ones, which the optimizer moves and masks are ranked from"
    sparsifier = _sparsifier(training, straight_through=True, **options)

    def step(progress):
        training.gradients()
        with no_waiting(training.device):
            sparsifier.mask_gradients()
            with sparsifier.dense_weights():
                training.optimizer.step()
            sparsifier.update_masks(FIRST + (LAST - FIRST) * progress, training.optimizer)

    return step


VARIANTS = {
    "dense": dense,
    "fixed": fixed,
    "moving": moving,
    "straight-through": straight_through,
    "straight-through, no decay": partial(straight_through, decay=0),
    "sparsify alone": sparsify,
    "sparsify alone, local": partial(sparsify, context="local"),
}


def _sparsifier(training, context="global", **options):
    sparsifier = Sparsifier(training.model, "weight", context, layers=kinds_of(training.model), **options)
    sparsifier.sparsify(FIRST)
    return sparsifier


def _steps(section, model, run, variants):
    "Rounds of a few steps of each variant in turn; all variants start from the same weights"
    name = f"{model}, {run}, batch {BATCHES[model, section.quick]}"
    rounds, length = (1, 2) if section.quick else (4, 6)
    prepared, seconds, hosts = {}, {}, {}
    # One for all graphs: none is replayed beside another, and activations for several would not fit.
    pool = torch.cuda.graph_pool_handle() if run == "CUDA graph" and section.on_gpu else None
    for variant, prepare in variants.items():
        try:
            prepared[variant] = prepare(Training(section, model, run, pool))
            for number in range(WARM_UP):
                prepared[variant](0.01 * number)
            seconds[variant], hosts[variant] = [], []
        except Exception as error:
            prepared.pop(variant, None)
            section.fail(f"{name}, {variant}", f"{type(error).__name__}: {error}", traceback.format_exc())
    wait(section.device)
    total = rounds * length
    for number in range(rounds):
        for variant, step in prepared.items():
            progress = [0.03 + (number * length + place) / total for place in range(length)]
            device, host = _of_steps(section.device, step, progress)
            seconds[variant] += device
            hosts[variant] += host
    middle = {variant: median(several) for variant, several in seconds.items()}
    for variant in prepared:
        section.row(
            TABLE,
            model=name,
            masks=variant,
            **{
                "ms": 1000 * middle[variant],
                "/ dense": middle[variant] / middle["dense"] if "dense" in middle else None,
                "lowest / lowest dense": min(seconds[variant]) / min(seconds["dense"]) if "dense" in middle else None,
                "host ms": 1000 * median(hosts[variant]),
            },
        )


def _of_steps(device, step, progress):
    "Seconds of each step but the first, on the device from the end of one to that of the next; and of the host"
    if device.type != "cuda":
        taken = [seconds_of(step, each) for each in progress]
        return taken[1:], taken[1:]
    ends, hosts = [torch.cuda.Event(enable_timing=True) for _ in progress], []
    for end, each in zip(ends, progress, strict=True):
        hosts.append(seconds_of(step, each))
        end.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1000 for first, last in zip(ends, ends[1:], strict=False)], hosts[1:]
