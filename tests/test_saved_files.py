"""Every file that the package saves is written whole or not at all, and keeps links and permissions."""

import os
import stat

import pytest
import torch
from sparseml_texts import RECIPE as SPARSEML
from torch import nn

from sparsifai import Recipe, save_sparse
from sparsifai.__main__ import main


def save_tickets(path):
    pytest.importorskip("fastai", reason="tickets are found with fastai")
    from sparsifai import LotteryTickets, Ticket

    LotteryTickets([Ticket({"weight": torch.ones(2, 2, dtype=torch.bool)}, 0.0, {"valid_loss": 1.0})]).save(path)


def convert(path):
    given = path.parents[1] / "sparseml.md"
    given.write_text(SPARSEML)
    check(main(["convert", str(given), "--to", str(path), "--force"]))


def draw(path):
    pytest.importorskip("torchvision", reason="the model is torchvision's")
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    given = path.parents[1] / "recipe.yaml"
    given.write_text("epochs: 4\nsteps:\n- sparsify: {sparsity: 0.5}\n")
    check(main(["plan", str(given), "--model", "torchvision:squeezenet1_1", "--picture", str(path)]))


def check(status):
    if status:
        raise OSError("the command failed")


SAVERS = {
    "sparse file": lambda path: save_sparse(nn.Linear(20, 20), path),
    "tickets": save_tickets,
    "recipe": lambda path: Recipe({"epochs": 10, "steps": [{"sparsify": {"sparsity": 0.9}}]}).save(path),
    "converted recipe": convert,
    "picture": draw,
}
saving = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "saved").mkdir()
    return tmp_path / "saved"


@saving
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_the_old_file(save, step, folder, monkeypatch):
    path = folder / "file"
    path.write_text("old")

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left|the command failed"):
            save(path)
    assert (path.read_text(), os.listdir(folder)) == ("old", ["file"])


@saving
def test_links_permissions_and_neighbours_stay(save, folder):
    (folder / "file").write_text("old")
    (folder / "file").chmod(0o640)
    (folder / "link").symlink_to("file")
    (folder / "link.part").write_text("another's")
    save(folder / "link")
    assert os.readlink(folder / "link") == "file"
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o640
    assert (folder / "file").read_bytes() != b"old"
    assert (folder / "link.part").read_text() == "another's"
    assert sorted(os.listdir(folder)) == ["file", "link", "link.part"]


@saving
def test_a_folder_or_a_pipe_is_no_file_to_save_to(save, folder, capsys):
    os.mkfifo(folder / "pipe")
    for path in (folder / "pipe", folder):
        with pytest.raises(OSError, match="a pipe|a folder|the command failed"):
            save(path)
    assert stat.S_ISFIFO((folder / "pipe").lstat().st_mode)
    assert os.listdir(folder) == ["pipe"]
