"""More than one process: the same masks in all of them, and the same as in one process alone.

Two processes on the CPU run each scenario of tests/processes.py once; the tests compare what they have seen.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import processes
import pytest
import torch
from conftest import CRITERIA, EXAMPLE, follower_masks, misses_sparsity, small_net
from filelock import FileLock

from sparsifai import Sparsifier

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="two processes on the CPU need gloo"),
]
shards_on_the_cpu = pytest.mark.skipif(not processes.CAN_SHARD_ON_CPU, reason="this torch shards on GPUs only")


# Now and then torch ends a process so when it is done, because a thread of its communication still runs. Then the
# processes are started again; a failure of any other kind, and one that comes every time, is a failure.
ABORTED = "terminate called without an active exception"
TRIES = 3


def seen_in(scenario, tmp_path_factory):
    """What both processes of a scenario of tests/processes.py have seen, run once for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / scenario
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
            environments = [{"RANK": rank, "LOCAL_RANK": rank, **sizes} for rank in "01"]
            for _ in range(TRIES):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                done = forked.run_together(
                    processes.__file__, scenario, folder, folder=folder, environments=environments
                )
                if not any(ABORTED in each.stderr for each in done):
                    break
            assert not any(each.returncode for each in done), [each.stderr for each in done]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    return seen_in("replicated", tmp_path_factory)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return seen_in("sharded", tmp_path_factory)


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    pytest.importorskip("fastai", reason="a Learner is fastai's")
    pytest.importorskip("accelerate", reason="distrib_ctx needs accelerate")
    return seen_in("learner", tmp_path_factory)


def same(*dictionaries):
    """Whether dictionaries of tensors are equal bit for bit."""
    first, *others = dictionaries
    assert all(type(value) is torch.Tensor for value in first.values())
    return all(
        first.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in first.items())
        for other in others
    )


def zeros_hold(weights, masks):
    """Whether all masked values are zero."""
    assert masks
    return all((weights[name].masked_select(~mask.expand_as(weights[name])) == 0).all() for name, mask in masks.items())


def put(weights, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def check_against_one_process(run, model, axes):
    """The masks of every stage are those of a Sparsifier that has the same weights in one process."""
    put(run["start"], model)
    sparsifier = Sparsifier(model, *axes, example_input=EXAMPLE)
    for stage in run["stages"]:
        put(stage["weights"], model)
        for name, buffer in model.named_buffers():
            buffer.copy_(stage["buffers"][name])
        if sparsifier.collected.at("backward", "forward", "loss"):  # copy the collected quantities
            saved = stage["collected"]
            vars(sparsifier.collected).update(saved, begins=set(saved["begins"]))
        sparsifier.sparsify(stage["sparsity"])
        assert same(stage["masks"], sparsifier.masks)
        assert stage["measured"] == sparsifier.sparsity
        assert stage["report"] == str(sparsifier.report())
    assert same(run["followers"], follower_masks(sparsifier))
    # Pruned filters mask a bias and the two parameters of a norm layer at least.
    assert (axes[0] == "filter") == (sum(not mask.all() for mask in run["followers"].values()) >= 3)


def check_zeros(run):
    """Masked gradients are zero, a step leaves masked weights zero, and so does all of training."""
    for stage in run["stages"]:
        assert zeros_hold(stage["gradients"], stage["masks"])
        assert zeros_hold(stage["stepped"], stage["masks"])
        moved = [(stage["stepped"][name] != weight).any() for name, weight in stage["weights"].items()]
        assert any(moved)
    assert zeros_hold(run["trained"], {**run["stages"][-1]["masks"], **run["followers"]})


def check_same_in_both(first, second):
    for one, other in zip(first["stages"], second["stages"], strict=True):
        for key in ("masks", "weights", "gradients", "stepped"):
            assert same(one[key], other[key]), key
        assert one["measured"] == other["measured"]
    assert same(first["trained"], second["trained"])
    assert same(first["followers"], second["followers"])


# --- DistributedDataParallel --------------------------------------------------------------------------------------


def test_every_criterion_is_among_the_replicated():
    assert {criterion for _, _, criterion in processes.REPLICATED_AXES} == set(CRITERIA)


@pytest.mark.parametrize("given", ["wrapper", "module"])
@pytest.mark.parametrize("axes", processes.REPLICATED_AXES, ids=str)
def test_replicas_get_the_masks_of_one_process(replicated, axes, given):
    first, second = (seen["runs"][axes, given] for seen in replicated)
    assert not same(first["drawn"], second["drawn"])
    check_same_in_both(first, second)
    check_zeros(first)
    check_against_one_process(first, small_net(), axes)


@pytest.mark.parametrize("criterion", processes.COMPENSATED)
def test_replicas_make_up_for_pruned_weights_by_the_batches_of_all(replicated, criterion):
    first, second = (seen["compensated"][criterion] for seen in replicated)
    assert same(first["masks"], second["masks"])
    assert same(first["weights"], second["weights"])
    alone = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    put(first["start"], alone)
    sparsifier = Sparsifier(alone, context="local", criteria=criterion, compensate=True)
    sparsifier.calibrate([*processes.data_of(0), *processes.data_of(1)], torch.nn.functional.cross_entropy)
    sparsifier.sparsify(0.5)
    assert same(first["masks"], sparsifier.masks)
    for name, weight in alone.named_parameters():
        assert torch.allclose(weight, first["weights"][name], atol=1e-5), name


def test_scores_that_differ_by_process_are_those_of_the_first(replicated):
    first, second = (seen["data_driven"] for seen in replicated)
    for criterion in ("weight_times_inputs_here", "random"):
        alone = first[criterion, "module"]
        assert not same(alone, second[criterion, "module"])  # else the next lines would show nothing
        for given in ("wrapper", "compiled"):
            assert same(alone, first[criterion, given], second[criterion, given])
        assert set(alone) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("regrow", ["grad", "random"])
@pytest.mark.parametrize("scenario", ["replicated", pytest.param("sharded", marks=shards_on_the_cpu)])
def test_masks_that_move_are_the_same_in_both_processes(scenario, regrow, request):
    first, second = (seen["regrown"] for seen in request.getfixturevalue(scenario))
    for one, other in zip(first[regrow], second[regrow], strict=True):
        assert same(one, other)
        assert sum(int((~mask).sum()) for mask in one.values()) == 36
    assert not any(same(one, other) for one, other in zip(first[regrow], first[regrow][1:], strict=False))
    assert same(first[regrow, "trained"], second[regrow, "trained"])
    assert zeros_hold(first[regrow, "trained"], first[regrow][-1])
    assert first[regrow, "explored"] == second[regrow, "explored"] > 0.5


def test_a_sparsifier_of_replicas_can_be_copied_and_pickled(replicated):
    for seen in replicated:
        seen = seen["data_driven"]
        assert same(seen["random", "wrapper"], seen["copied"], seen["pickled"])


def check_straight_through(first, second):
    """Both processes have the same dense weights and masks at each stage, and masks have changed their mind."""
    returned = 0
    for one, other in zip(first, second, strict=True):
        for part in ("dense", "trained", "masks", "weights"):
            assert one[part].keys() == other[part].keys()
            assert all(torch.equal(value, other[part][name]) for name, value in one[part].items()), part
        for name, mask in one["masks"].items():
            assert torch.equal(one["weights"][name], one["dense"].get(name, one["weights"][name]) * mask)
    for earlier, later in zip(first, first[1:], strict=False):
        returned += sum(int((later["masks"][name] & ~mask).sum()) for name, mask in earlier["masks"].items())
    assert returned


@pytest.mark.parametrize(
    ("criterion", "given"), [*((name, "wrapper") for name in processes.STRAIGHT), ("large_final", "module")]
)
def test_dense_weights_of_replicas_are_the_same_in_both_processes(replicated, criterion, given):
    first, second = (seen["straight through"][criterion, given] for seen in replicated)
    check_straight_through(first["stages"], second["stages"])
    assert same(first["settled"], second["settled"])
    assert zeros_hold(first["settled"], first["stages"][-1]["masks"])


# --- fully_shard --------------------------------------------------------------------------------------------------


@shards_on_the_cpu
@pytest.mark.parametrize("optimizer", processes.OPTIMIZERS)
@pytest.mark.parametrize("axes", processes.SHARDED_AXES, ids=str)
@misses_sparsity
def test_shards_get_the_masks_of_one_process(sharded, axes, optimizer):
    first, second = (seen["runs"][axes, optimizer] for seen in sharded)
    check_same_in_both(first, second)
    check_zeros(first)
    check_against_one_process(first, processes.uneven_net(), axes)


@shards_on_the_cpu
@pytest.mark.parametrize("axes", processes.MADE_BEFORE_AXES, ids=str)
def test_a_sparsifier_made_before_fully_shard(sharded, axes):
    first, second = (seen["runs"][axes, "made before"] for seen in sharded)
    assert not same(first["start"], second["start"])
    check_same_in_both(first, second)
    check_zeros(first)
    check_against_one_process(first, processes.uneven_net(), axes)


@pytest.mark.parametrize("sizes", processes.MESHES)
def test_scores_that_differ_by_process_are_those_of_the_first_on_every_mesh(sharded, sizes):
    first, second = (seen["meshes"][sizes] for seen in sharded)
    alone = Sparsifier(processes.uneven_net(), criteria="random", seed=0)
    alone.sparsify(0.5)
    assert same(alone.masks, first["masks"], second["masks"])
    for seen in (first, second):
        assert zeros_hold(seen["weights"], seen["masks"])
        assert seen["report"] == str(alone.report())


@pytest.mark.parametrize("sizes", processes.MESHES)
def test_whole_outputs_of_a_sharded_model_are_refused(sharded, sizes):
    for seen in sharded:
        for key in ("filters", "filters with an example"):
            assert "create the Sparsifier before calling fully_shard" in seen["meshes"][sizes][key]


@pytest.mark.parametrize("key", ["made after", "made before", "made before, updated"])
def test_dense_weights_of_shards_are_refused_and_nothing_changes(sharded, key):
    for seen in sharded:
        seen = seen["straight through"][key]
        assert " is sharded by fully_shard, whose parameters cannot hold other memory for a step; use " in seen["seen"]
        assert same(seen["before"], seen["after"])
        assert all(mask.all() for mask in seen["masks"].values())


@pytest.mark.parametrize("key", ["compensated", "compensated, made before"])
def test_shards_are_not_compensated_and_nothing_changes(sharded, key):
    for seen in sharded:
        seen = seen["straight through"][key]
        assert (
            " is sharded by fully_shard, and the curvature of a layer needs its whole weight in one process; "
            in (seen["seen"])
        )
        assert same(seen["before"], seen["after"])


@shards_on_the_cpu
def test_sparsify_after_a_forward_in_evaluation_mode(sharded):
    for seen in sharded:
        seen = seen["evaluated"]
        assert seen["gathered"]  # else there is nothing to test
        assert zeros_hold(seen["weights"], seen["masks"])
        assert seen["measured"] == pytest.approx(0.5, abs=0.005)
    assert same(*(seen["evaluated"]["weights"] for seen in sharded))


@shards_on_the_cpu
def test_reading_the_sparsity_between_forward_and_backward_changes_no_gradient(sharded):
    for seen in sharded:
        gradients = seen["asked between forward and backward"]
        assert same(*gradients)
        assert all(gradient.any() for gradient in gradients[0].values())


@shards_on_the_cpu
def test_the_state_of_a_sparsifier_of_shards_is_saved_and_loaded(sharded):
    first, second = (seen["states"] for seen in sharded)
    assert same(first["saved"], first["loaded"], first["recovered"], second["saved"], second["loaded"])
    assert zeros_hold(first["weights"], first["loaded"])
    assert same(first["saved, further"], first["loaded, further"], second["saved, further"], second["loaded, further"])
    assert not same(first["saved"], first["saved, further"])


# --- A fastai Learner ---------------------------------------------------------------------------------------------


@pytest.mark.fastai
def test_a_learner_in_two_processes(learner):
    first, second = learner
    for filters, other in zip(first["masks"], second["masks"], strict=True):
        assert same(filters, other)
    for fit in ("to 0.3", "to 0.8", "plain"):
        assert same(first["fits"][fit]["weights"], second["fits"][fit]["weights"])
    for seen in learner:
        of_filters, of_weights = seen["masks"]
        for fit, after in seen["fits"].items():
            assert zeros_hold(after["weights"], of_filters), fit
            assert fit == "to 0.3" or zeros_hold(after["weights"], of_weights), fit
            assert after["keepers"] == (fit != "exported")
        weights = sum(mask.numel() for mask in of_weights.values())
        assert sum(int((~mask).sum()) for mask in of_weights.values()) == int(0.8 * weights + 0.5)


@pytest.mark.fastai
def test_dense_weights_of_a_learner_are_the_same_in_both_processes(learner):
    first, second = learner
    check_straight_through(first["straight through"], second["straight through"])
    assert same(first["settled"]["weights"], second["settled"]["weights"])
    assert same(first["settled"]["masks"], second["settled"]["masks"])
    assert zeros_hold(first["settled"]["weights"], first["settled"]["masks"])
    weights = sum(mask.numel() for mask in first["settled"]["masks"].values())
    assert sum(int((~mask).sum()) for mask in first["settled"]["masks"].values()) == int(0.6 * weights + 0.5)


@pytest.mark.fastai
def test_a_learner_in_two_processes_prints_once(learner):
    first, second = (seen["printed"] for seen in learner)
    assert first.count("KeepSparsity keeps") == 1
    assert "valid_loss  sparsity" in first
    assert "parsity" not in second


# --- The example --------------------------------------------------------------------------------------------------


def test_the_example_trains_in_two_processes(tmp_path):
    pytest.importorskip("sklearn", reason="the example trains on scikit-learn's digits")
    assert "    torchrun --nproc-per-node 2 examples/distributed.py\n" in (ROOT / "README.md").read_text()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    for _ in range(TRIES):
        done = subprocess.run(
            [*torchrun, str(ROOT / "examples/distributed.py"), "--epochs", "5"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if ABORTED not in done.stdout:
            break
    printed = done.stdout
    assert done.returncode == 0, printed
    assert "2 processes, the same masks" in printed
    assert "90.00% zeros" in printed
    assert printed.count("selected layers") == 1
    assert float(re.findall(r"accuracy ([\d.]+)%", printed)[0]) > 80
