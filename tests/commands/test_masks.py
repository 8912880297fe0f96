"""``goldy masks``: what it prints is what the masks hold, and what it writes loads again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_goldy import ParameterMask, ParameterSpace
from lightning_goldy.cli import main
from lightning_goldy.commands.files import combined
from lightning_goldy.core.files import percentage

SPACE = ParameterSpace(
    ("h.0.weight", "h.1.weight", "wte.weight"),
    (torch.Size((4, 5)), torch.Size((10,)), torch.Size((70,))),
    (torch.float32,) * 3,
)
FIRST = {"h.0.weight": torch.tensor([0, 1, 2, 3]), "wte.weight": torch.tensor([69])}
SECOND = {"h.0.weight": torch.tensor([2, 3, 4]), "h.1.weight": torch.arange(10)}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name, indices in (("a", FIRST), ("b", SECOND)):
        ParameterMask.from_indices(SPACE, indices).save(name, model="GPT2LMHeadModel", step=7)
    return tmp_path


def cells(shown: str) -> list[list[str]]:
    lines = [line for line in shown.splitlines() if "│" in line]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_show_counts_every_block(files, capsys):
    assert main(["masks", "show", "a", "b"]) == 0
    shown = capsys.readouterr().out
    assert "a: GPT2LMHeadModel, step 7" in shown
    assert cells(shown) == [
        ["h.0", "4", "20", "20.0000 %"],
        ["h.1", "0", "10", "0.0000 %"],
        ["embeddings", "1", "70", "1.4286 %"],
        ["all", "5", "100", "5.0000 %"],
        ["h.0", "3", "20", "15.0000 %"],
        ["h.1", "10", "10", "100.0000 %"],
        ["embeddings", "0", "70", "0.0000 %"],
        ["all", "13", "100", "13.0000 %"],
    ]


def test_compare_sets_chance_beside_what_is_shared(files, capsys):
    # By chance 4 x 3 / 20 in h.0; at most 3 can be shared.
    assert main(["masks", "compare", "a", "b"]) == 0
    assert cells(capsys.readouterr().out) == [["a", "b", "2", "0.6", "0.1250", f"{(2 - 0.6) / (3 - 0.6):+.4f}"]]
    assert main(["masks", "compare", "a", "b", "--scope", "global"]) == 0
    assert cells(capsys.readouterr().out)[0][3:] == ["0.7", "0.1250", f"{(2 - 0.65) / (5 - 0.65):+.4f}"]


def test_compare_takes_every_pair_and_says_when_sizes_leave_no_choice(files, capsys):
    (~ParameterMask.from_indices(SPACE, {})).save("all", model="GPT2LMHeadModel")
    assert main(["masks", "compare", "a", "b", "all"]) == 0
    assert [[*row[:2], row[-1]] for row in cells(capsys.readouterr().out)] == [
        ["a", "b", "+0.5833"],
        ["a", "all", "-"],
        ["b", "all", "-"],
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["and", "a", "b"], {"h.0.weight": [2, 3]}),
        (["or", "a", "b"], {"h.0.weight": [0, 1, 2, 3, 4], "h.1.weight": [*range(10)], "wte.weight": [69]}),
        (["minus", "a", "b"], {"h.0.weight": [0, 1], "wte.weight": [69]}),
        (["not", "b"], {"h.0.weight": [0, 1, *range(5, 20)], "wte.weight": [*range(70)]}),
    ],
)
def test_combine_writes_a_mask_that_loads(files, capsys, words, expected):
    assert main(["masks", "combine", *words, "--output", "out/c"]) == 0
    found = {name: index.tolist() for name, index in ParameterMask.load("out/c").indices().items()}
    assert found == {name: expected.get(name, []) for name in SPACE}
    total = sum(map(len, expected.values()))
    assert capsys.readouterr().out.strip() == f"out/c: {total} of 100 elements ({percentage(total / 100, 4)})"


def test_three_masks_are_combined_from_the_left():
    masks = [ParameterMask.from_indices(SPACE, {"h.1.weight": torch.arange(n)}) for n in (9, 6, 3)]
    assert combined(masks, "minus").indices()["h.1.weight"].tolist() == [6, 7, 8]
    assert combined(masks, "and").total == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "missing"], "missing: no such file"),
        (["compare", "a"], "two masks or more can be compared; got 1"),
        (["compare", "a", "a"], "named twice"),
        (["combine", "and", "a", "--output", "c"], "'and' takes two masks or more; got 1"),
        (["combine", "not", "a", "b", "--output", "c"], "'not' takes one mask; got 2"),
        (["combine", "and", "a", "b", "--output", "b"], "b exists; --force replaces it"),
        (["combine", "and", "a", "other", "--output", "c"], "a belongs to GPT2LMHeadModel, other to Llama"),
        (["compare", "a", "small"], "two parameter spaces differ"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(files, capsys, words, message):
    ParameterMask.from_indices(SPACE, {}).save("other", model="Llama")
    ParameterMask.from_indices(SPACE.subspace(["h.0.weight"]), {}).save("small", model="GPT2LMHeadModel")
    assert main(["masks", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not (files / "c").exists()


def test_names_in_brackets_are_shown_as_they_are(files, capsys):
    ParameterMask.from_indices(SPACE, {}).save("[red]x", model="M")
    assert main(["masks", "show", "[red]x"]) == 0
    assert "[red]x: M" in capsys.readouterr().out


def test_the_command_line_itself_does_not_wait_for_torch():
    code = "import sys, lightning_goldy.commands.files; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"
