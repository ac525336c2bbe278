"""The page of the documentation: its blocks run in the order in which a reader can paste them."""

import re
import shlex

import pytest
from forked import ROOT

from sparsifai.command_line.main import COMMANDS, main


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision", reason="the models are torchvision's")
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?s)```(\w+)\n(.*?)```", (ROOT / "docs/command_line.md").read_text())
    ran = set()
    for kind, text in blocks:
        if kind == "python":
            exec(text, {})
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "sparsifai"
            assert main(arguments) == 0, (line, capsys.readouterr().err)
            ran.add(arguments[0])
    assert ran == COMMANDS.keys() - {"convert"}
