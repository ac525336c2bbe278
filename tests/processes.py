"""What the tests of several processes run in each: python tests/processes.py SCENARIO FOLDER, with RANK 0 and 1.

A scenario returns what its process has seen, in plain tensors, for the tests to compare; it is saved as FOLDER/RANK.pt.
Every process seeds its model and its data differently.
"""

import contextlib
import copy
import io
import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from conftest import CRITERIA, EXAMPLE, follower_masks, show_data, small_net  # isort: skip
from sparsifai import (
    Distil,
    Freeze,
    Quantize,
    Regularize,
    Sparsifier,
    Sparsify,
    TrainingManager,
    criteria,
    quantities,
    taken,
)
from sparsifai.integrations.scaled import call_after_backward
from sparsifai.model.parallel import is_sharded, whole

RANK = int(os.environ.get("RANK", "0"))
CAN_SHARD_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # not yet in torch 2.6

REPLICATED_AXES = [("weight", "global", name) for name in CRITERIA] + [
    ("kernel", "local", "large_final"),
    ("filter", "global", "movement"),
    ("filter", "local", "random"),
]
SHARDED_AXES = [
    ("weight", context, name) for context in ("global", "local") for name in ("large_final", "movement", "random")
] + [("kernel", "local", "large_final"), (("h",), "global", "updating_movement")]
MADE_BEFORE_AXES = [("weight", "global", "movement"), ("filter", "global", "large_final")]
COMPENSATED = ["large_final", "obs", "sparsegpt"]
STRAIGHT = ["large_final", "movement_pruning", "random"]
MESHES = [(2,), (2, 1), (1, 2)]  # replicas, if there are two numbers, and shards

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
}


def values_of(model, of=lambda parameter: parameter):
    """What `of` gives of every parameter, as whole plain tensors by name."""
    return {name: whole(of(parameter).detach()).clone() for name, parameter in model.named_parameters()}


def train(model, module, sparsifier, make_optimizer):
    """Train to 40 and to 80 %, on data that differs by process. Returns what can be compared, stage by stage.

    module: what is in the wrapper. Weights and masks are those before and after `sparsify`. In the step that follows
    only the gradients and moments are masked.
    """
    optimizer = make_optimizer(model.parameters())
    stages = []
    for sparsity in (0.4, 0.8):
        step(model, optimizer, sparsifier)
        sparsifier.apply_masks()
        if sparsifier.collected.at("forward", "loss"):
            show_data(sparsifier, seed=0 if sparsifier.ranking.process_group is None else RANK)
        weights, collected = values_of(module), sparsifier.collected.state()
        sparsifier.sparsify(sparsity)
        sparsifier.mask_moments(optimizer)
        stage = {"weights": weights, "sparsity": sparsity, "masks": dict(sparsifier.masks), "collected": collected}
        stage["buffers"] = {name: buffer.clone() for name, buffer in module.named_buffers()}
        stage["measured"], stage["report"] = sparsifier.sparsity, str(sparsifier.report())
        step(model, optimizer, sparsifier)
        stage["gradients"] = values_of(module, lambda parameter: parameter.grad)
        stage["stepped"] = values_of(module)
        stages.append(stage)
    sparsifier.apply_masks()
    return {"stages": stages, "trained": values_of(module), "followers": follower_masks(sparsifier)}


def step(model, optimizer, sparsifier):
    loss = cross_entropy(model(torch.randn(4, 2, 8, 8)), torch.randint(3, (4,)))
    optimizer.zero_grad()
    loss.backward()
    sparsifier.mask_gradients()
    optimizer.step()


# --- DistributedDataParallel --------------------------------------------------------------------------------------


def replicated():
    runs = {}
    for axes in REPLICATED_AXES:
        for given in ("wrapper", "module"):
            torch.manual_seed(RANK)
            net = small_net()
            drawn = values_of(net)
            model = DistributedDataParallel(net)
            start = values_of(net)
            sparsifier = Sparsifier(model if given == "wrapper" else net, *axes, example_input=EXAMPLE)
            runs[axes, given] = {
                "drawn": drawn, "start": start, **train(model, net, sparsifier, OPTIMIZERS["SGD"]),
            }  # fmt: skip
    others = {"data_driven": data_driven(), "straight through": dict(straight_through()), "managed": managed()}
    others["compensated"] = {criterion: compensated(criterion) for criterion in COMPENSATED}
    return {"runs": runs, "regrown": regrown(DistributedDataParallel), **others}


def data_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(2)]


def compensated(criterion):
    """Masks, and weights before and after, where the batches differ by process."""
    torch.manual_seed(RANK)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    model = DistributedDataParallel(net)
    start = values_of(net)
    sparsifier = Sparsifier(model, context="local", criteria=criterion, compensate=True)
    sparsifier.calibrate(data_of(RANK), nn.functional.cross_entropy)
    sparsifier.sparsify(0.5)
    return {"start": start, "masks": dict(sparsifier.masks), "weights": values_of(net)}


def straight_through():
    """Dense weights and masks after each step, where data and seeds differ by process."""
    for criterion, given in (*((name, "wrapper") for name in STRAIGHT), ("large_final", "module")):
        torch.manual_seed(RANK)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        model, stages = DistributedDataParallel(net), []
        sparsifier = Sparsifier(
            model if given == "wrapper" else net, context="local", criteria=criterion, seed=RANK, straight_through=True,
            decay=0.01, gradient_sparsity=0.3,
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for number in range(8):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            sparsifier.mask_gradients()
            with sparsifier.dense_weights():
                optimizer.step()
            sparsifier.update_masks(min(0.6, 0.1 * number + 0.1), optimizer)
            stages.append(straight_state(sparsifier))
        sparsifier.settle(optimizer)
        yield (criterion, given), {"stages": stages, "settled": values_of(net)}


def straight_state(sparsifier):
    state = sparsifier.state_dict()["straight_through"]
    weights, masks = values_of(sparsifier.model), {name: mask.clone() for name, mask in sparsifier.masks.items()}
    return {"dense": state["values"], "trained": state["trained"], "masks": masks, "weights": weights}


def regrown(wrap):
    """Masks that move, where gradients, numbers drawn and seeds differ by process."""
    seen = {}
    for regrow in ("grad", "random"):
        torch.manual_seed(RANK)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        model = wrap(net)
        sparsifier = Sparsifier(model, context="erk", regrow=regrow, seed=RANK)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        sparsifier.sparsify(0.5)
        seen[regrow] = [dict(sparsifier.masks)]
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            sparsifier.collect_gradients()
            sparsifier.update_masks(0.5, optimizer, drop=0.5)
            sparsifier.mask_gradients()
            optimizer.step()
            seen[regrow].append(dict(sparsifier.masks))
        seen[regrow, "trained"], seen[regrow, "explored"] = values_of(net), sparsifier.report().explored
    return seen


def data_driven():
    """Masks by a criterion that sees the data of its process alone, from all that a Sparsifier may be given."""
    squares = {}

    @quantities.register
    @taken("score")
    def squared_inputs_here(sparsifier, name):
        return squares[name]

    @criteria.register
    def weight_times_inputs_here(weight, squared_inputs_here):
        return weight.abs() * squared_inputs_here.sqrt()

    torch.manual_seed(RANK)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    inputs = torch.randn(16, 4)
    for name, layer in model.module.named_children():
        squares[f"{name}.weight"] = inputs.square().mean(0)
        inputs = layer(inputs).detach()
    seen = {}
    modules = {"module": model.module, "compiled": torch.compile(model, backend="eager"), "wrapper": model}
    for criterion in ("weight_times_inputs_here", "random"):
        for given, module in modules.items():
            sparsifier = Sparsifier(module, criteria=criterion, seed=RANK)
            sparsifier.check(0.5)
            sparsifier.sparsify(0.5)
            seen[criterion, given] = dict(sparsifier.masks)
    seen["copied"] = dict(copy.deepcopy(sparsifier).masks)
    seen["pickled"] = dict(pickle.loads(pickle.dumps(sparsifier)).masks)
    return seen


# --- fully_shard --------------------------------------------------------------------------------------------------


def uneven_net():
    """No number of outputs is even; of the last layer, the second of two processes holds nothing."""
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 1), nn.Linear(1, 3),
    )  # fmt: skip


def shard(model, *sizes, units=(0, 5)):
    """Shard a net over a mesh: some layers as units of their own, the rest with the root."""
    from torch.distributed.fsdp import fully_shard

    names = ("replicas", "shards")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for index in units:
        fully_shard(model[index], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded():
    results = {"meshes": {sizes: ranked_over(*sizes) for sizes in MESHES}, "straight through": dict(refused())}
    if CAN_SHARD_ON_CPU:
        results["runs"] = dict(sharded_runs())
        results["evaluated"] = evaluated()
        results["asked between forward and backward"] = asked_between_forward_and_backward()
        results["states"] = states()
        results["regrown"] = regrown(lambda net: shard(net, 2, units=()))
    return results


def ranked_over(*sizes):
    """A Sparsifier whose scores differ by process, on a mesh of these sizes; and what is told of filters."""
    torch.manual_seed(RANK)
    model = shard(uneven_net(), *sizes)
    sparsifier = Sparsifier(model, criteria="random", seed=RANK)
    sparsifier.sparsify(0.5)
    seen = {"masks": dict(sparsifier.masks), "weights": values_of(model), "report": str(sparsifier.report())}
    example = torch.randn(1, 2, 8, 8)
    for key, options in (("filters", {}), ("filters with an example", {"example_input": example})):
        try:
            Sparsifier(model, "filter", **options)
        except ValueError as error:
            seen[key] = str(error)
    return seen


def refused():
    """What straight-through training of shards is refused with, and the masks and weights before and after."""
    torch.manual_seed(RANK)
    model = uneven_net()
    made_before = Sparsifier(model, straight_through=True)
    compensated_before = Sparsifier(model, compensate=True)
    shard(model, 2)
    for key, function in {
        "made after": lambda: Sparsifier(model, straight_through=True),
        "made before": lambda: made_before.sparsify(0.5),
        "made before, updated": lambda: made_before.update_masks(0.5),
        "made before, settled": lambda: made_before.settle(),
        "compensated": lambda: Sparsifier(model, compensate=True),
        "compensated, made before": lambda: compensated_before.sparsify(0.5),
    }.items():
        before, seen = values_of(model), ""
        try:
            function()
        except ValueError as error:
            seen = str(error)
        yield key, {"seen": seen, "before": before, "after": values_of(model), "masks": dict(made_before.masks)}


def sharded_runs():
    for axes in SHARDED_AXES:
        for name, make_optimizer in OPTIMIZERS.items():
            torch.manual_seed(RANK)
            model = shard(uneven_net(), 2)
            start = values_of(model)
            yield (axes, name), {"start": start, **train(model, model, Sparsifier(model, *axes), make_optimizer)}
    for axes in MADE_BEFORE_AXES:
        torch.manual_seed(RANK)
        model = uneven_net()
        start = values_of(model)  # those of the first process count: it is its ranking that all get
        sparsifier = Sparsifier(model, *axes)
        shard(model, 2)
        yield (axes, "made before"), {"start": start, **train(model, model, sparsifier, OPTIMIZERS["AdamW"])}


def evaluated():
    """Sparsify after a forward in evaluation, which leaves the parameters of the root gathered, and train a step."""
    torch.manual_seed(RANK)
    model = shard(uneven_net(), 2)
    sparsifier, optimizer = Sparsifier(model), OPTIMIZERS["SGD"](model.parameters())
    with torch.no_grad():
        model.eval()(torch.randn(4, 2, 8, 8))
    gathered = [name for name, parameter in model.named_parameters() if not is_sharded(parameter)]
    sparsifier.sparsify(0.5)
    measured = sparsifier.sparsity
    step(model.train(), optimizer, sparsifier)
    return {"gathered": gathered, "measured": measured, "weights": values_of(model), "masks": dict(sparsifier.masks)}


def asked_between_forward_and_backward():
    """The gradients of one loss, computed without and with a look at the sparsity in between."""
    torch.manual_seed(RANK)
    model = shard(uneven_net(), 2)
    sparsifier = Sparsifier(model)
    images, gradients = torch.randn(4, 2, 8, 8), []
    for asks in (False, True):
        model.zero_grad()
        loss = model(images).square().sum()
        if asks:
            sparsifier.report()
        loss.backward()
        gradients.append(values_of(model, lambda parameter: parameter.grad))
    return gradients


def states():
    """A Sparsifier saved, loaded into another of another model, and both taken further; and masks recovered."""
    torch.manual_seed(RANK)
    model, other = shard(uneven_net(), 2), shard(uneven_net(), 2)
    saver, loader, recoverer = Sparsifier(model, criteria="movement"), Sparsifier(other, criteria="movement"), None
    step(model, OPTIMIZERS["SGD"](model.parameters()), saver)
    saver.sparsify(0.4)
    stored = io.BytesIO()
    torch.save(saver.state_dict(), stored)
    stored.seek(0)
    loader.load_state_dict(torch.load(stored))
    seen = {"saved": dict(saver.masks), "loaded": dict(loader.masks), "weights": values_of(other)}
    recoverer = Sparsifier(other)
    recoverer.recover_masks()
    seen["recovered"] = dict(recoverer.masks)
    other.load_state_dict(model.state_dict())
    for key, sparsifier in (("saved, further", saver), ("loaded, further", loader)):
        sparsifier.sparsify(0.7)
        seen[key] = dict(sparsifier.masks)
    return seen


# --- A fastai Learner ---------------------------------------------------------------------------------------------


def image_of(number):
    return torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(number))


def label_of(number):
    return torch.tensor(number % 3)


def learner():
    from fastai.distributed import DistributedDL
    from fastai.vision.all import SGD, Callback, Datasets, Learner, load_learner

    from sparsifai import KeepSparsity, SparsifyCallback

    def broadcast(self, indices, rank):
        indices = torch.tensor(indices)
        torch.distributed.broadcast(indices, rank)
        return indices.tolist()

    DistributedDL._broadcast = broadcast  # fastai's own sends from a GPU
    torch.manual_seed(RANK)
    dls = Datasets(range(32), [image_of, label_of], splits=(range(24), range(24, 32))).dataloaders(bs=2, device="cpu")
    learn = Learner(dls, small_net(), loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
    callbacks = [
        SparsifyCallback(0.3, "filter", criteria="random", seed=RANK),
        SparsifyCallback(0.8, "weight", criteria="random", seed=RANK),
    ]
    fits = {}

    def note(key):
        fits[key] = {"weights": values_of(learn.model), "keepers": len(learn._grab_cbs(KeepSparsity))}

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with learn.distrib_ctx(sync_bn=False, cpu=True):
            for callback in callbacks:
                learn.fit(2, 0.1, cbs=callback)
                note(f"to {callback.pruning.ramp.sparsity}")
            learn.fit(1, 0.1)
            note("plain")
        learn.fit(1, 0.1)
        note("plain, alone")
    straight = Learner(
        dls, nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 3)),
        loss_func=nn.CrossEntropyLoss(), opt_func=SGD,
    )  # fmt: skip
    changing = SparsifyCallback(0.6, schedule="lin", straight_through=True, gradient_sparsity=0.2, settle=0.9)
    stages = []

    class Look(Callback):
        order = 70

        def after_step(self):
            stages.append(straight_state(changing.sparsifier))

    with contextlib.redirect_stdout(io.StringIO()), straight.distrib_ctx(sync_bn=False, cpu=True):
        straight.fit(2, 0.5, cbs=[changing, Look()])
    if RANK == 0:
        learn.export(FOLDER / "exported.pkl")
    loaded = load_learner(FOLDER / "exported.pkl")  # waits for all
    fits["exported"] = {"weights": values_of(loaded.model), "keepers": len(loaded._grab_cbs(KeepSparsity))}
    masks = [dict(each.sparsifier.all_masks) for each in callbacks]
    settled = {"weights": values_of(straight.model), "masks": dict(changing.sparsifier.masks)}
    return {
        "fits": fits, "masks": masks, "printed": printed.getvalue(), "straight through": stages, "settled": settled,
    }  # fmt: skip


# --- TrainingManager ----------------------------------------------------------------------------------------------

MANAGED = {
    "weights": lambda: [Sparsify(0.6)],
    "random": lambda: [Sparsify(0.6, criteria="random", schedule="lin")],
    "RigL": lambda: [Sparsify(0.6, regrow="grad", every=2, initial_sparsity=0.3)],
    "straight-through": lambda: [Sparsify(0.6, criteria="movement_pruning", straight_through=True)],
    "several": lambda: [
        Sparsify(0.8, layers="0"), Sparsify(0.5, layers="2", regrow="random", every=3), Regularize(0.01),
        Distil(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))), Freeze("0", end=0.4),
        Quantize(0.3),
    ],
}  # fmt: skip


def managed():
    """Weights and masks after each step of a TrainingManager, on data that differ by process."""
    runs = {}
    for name, parts in MANAGED.items():
        torch.manual_seed(0)
        made = parts()
        torch.manual_seed(RANK)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        model, stages = DistributedDataParallel(net, find_unused_parameters=name == "several"), []
        optimizer = torch.optim.AdamW(net.parameters(), 0.05)
        manager = TrainingManager(model, optimizer, *made, epochs=2, steps_per_epoch=5)
        for _ in range(manager.steps):
            inputs = torch.randn(8, 6)
            optimizer.zero_grad()
            output = model(inputs)
            seen = []
            call_after_backward(output, lambda seen=seen, net=net: seen.append(net[2].weight.grad.clone()))
            manager.loss(output.square().mean(), output, inputs).backward()
            assert torch.equal(*seen, net[2].weight.grad)
            manager.step()
            stages.append({"weights": values_of(net), "masks": manager.masks, "averaged": seen[0]})
        runs[name] = {"stages": stages, "sparsity": manager.sparsity}
    return runs


if __name__ == "__main__":
    scenario, FOLDER = sys.argv[1], Path(sys.argv[2])
    # Nobody has to find a port that is free.
    meeting = (FOLDER / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=RANK, world_size=2)
    torch.save({"replicated": replicated, "sharded": sharded, "learner": learner}[scenario](), FOLDER / f"{RANK}.pt")
    torch.distributed.destroy_process_group()
