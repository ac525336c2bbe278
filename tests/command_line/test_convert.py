"""sparsifai convert: recipes of SparseML, and files that are written whole or not at all."""

import sys
from contextlib import suppress

import pytest
from sparseml_texts import RECIPE as SPARSEML

from sparsifai import Recipe
from sparsifai.command_line.main import main


@pytest.fixture
def sparseml(tmp_path):
    path = tmp_path / "sparseml.md"
    path.write_text(SPARSEML)
    return path


LOST = "  - !LayerPruningModifier\n    layers: [layer1]\n"


def test_convert_writes_or_prints_a_recipe_and_lists_what_has_no_counterpart(sparseml, tmp_path, capsys):
    converted = tmp_path / "converted.yaml"
    assert main(["convert", str(sparseml), "--to", str(converted)]) == 0
    assert "LearningRateFunctionModifier" in capsys.readouterr().err
    assert Recipe.load(converted) == Recipe.from_sparseml(sparseml)
    assert main(["convert", str(sparseml), "--strict"]) == 0
    assert Recipe.loads(capsys.readouterr().out) == Recipe.from_sparseml(sparseml)


def test_convert_says_with_its_exit_status_that_something_is_lost(sparseml, tmp_path, capsys):
    sparseml.write_text(SPARSEML + LOST)
    assert main(["convert", str(sparseml), "--to", str(tmp_path / "converted.yaml")]) == 3
    assert "LayerPruningModifier: has no counterpart" in capsys.readouterr().err
    assert Recipe.load(tmp_path / "converted.yaml").epochs == 30
    assert main(["convert", str(sparseml), "--strict"]) == 2
    assert "LayerPruningModifier" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "the exit status is 3" in " ".join(capsys.readouterr().out.split())


def test_convert_replaces_a_file_only_with_force(sparseml, tmp_path, capsys):
    kept = tmp_path / "kept.yaml"
    for make in (lambda: kept.write_text("mine"), lambda: (kept.unlink(), kept.symlink_to("nowhere"))):
        make()
        assert main(["convert", str(sparseml), "--to", str(kept)]) == 2
        assert "kept.yaml exists already; choose another name, or give --force to replace it" in capsys.readouterr().err
        assert kept.is_symlink() or kept.read_text() == "mine"
    kept.unlink()
    kept.write_text("mine")
    assert main(["convert", str(sparseml), "--to", str(kept), "--force"]) == 0
    assert Recipe.load(kept) == Recipe.from_sparseml(sparseml)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files, and /dev/full")
def test_convert_writes_a_whole_file_or_none(sparseml, tmp_path, monkeypatch, capsys):
    import resource

    before = {*tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk was full after some bytes
    try:
        status = main(["convert", str(sparseml), "--to", str(tmp_path / "new.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, {*tmp_path.iterdir()}) == (2, before)
    assert "new.yaml" in (error := capsys.readouterr().err)
    assert "the file was not written, and an earlier one is unchanged" in error
    status = None
    with suppress(OSError), open("/dev/full", "w") as full:  # an error of the disk, when it is closed
        monkeypatch.setattr(sys, "stdout", full)
        status = main(["convert", str(sparseml)])
    assert status == 2
    assert "No space left on device" in capsys.readouterr().err


def test_convert_takes_the_number_of_epochs(tmp_path, capsys):
    sparseml = tmp_path / "sparseml.yaml"
    sparseml.write_text("modifiers:\n  - !ConstantPruningModifier\n")
    assert main(["convert", str(sparseml), "--epochs", "3"]) == 0
    assert Recipe.loads(capsys.readouterr().out).epochs == 3
