"""Classifiers of plain torch: the page's example, and which modules are taken for one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_goldy.core import ClassifierObjective, FunctionObjective
from lightning_goldy.core.batches import take_samples
from lightning_goldy.training.subject import find_objective
from tests.house import ROOT

PAGE = (ROOT / "docs" / "classifiers.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_the_page_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(compile(code, "docs/classifiers.md", "exec"), {"__name__": "page"})
    rows = {
        path.parent.name: json.loads(path.read_text().splitlines()[-1])
        for path in tmp_path.glob("lightning_logs/version_0/goldy/*/results.jsonl")
    }
    names = set(re.findall(r"^    (\w+),$", PAGE, re.M)) - {"RunReport"}
    assert len(names) == 6
    assert {name.replace("_", "") for name in rows} == {name.lower() for name in names}
    assert rows["taylor_diff"]["metrics"]["base_loss"] == pytest.approx(1.1, abs=0.6)  # of three classes
    assert next(tmp_path.glob("lightning_logs/version_0/report.html")).is_file()


class Module(nn.Module):
    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.model = nn.Linear(4, 3)
        if loss is not None:
            self.criterion = loss


PAIR = (torch.zeros(2, 4), torch.tensor([0, 2]))


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(), nn.NLLLoss()], ids=str)
def test_pairs_with_class_indices_are_classified(loss: nn.Module | None) -> None:
    module = Module(loss)
    assert type(find_objective(module, module.model, None, [PAIR])) is ClassifierObjective
    given = FunctionObjective(lambda model, batch: model(batch[0]).sum())
    assert find_objective(module, module.model, given, [PAIR]) is given


@pytest.mark.parametrize(
    ("loss", "batches", "why"),
    [
        (None, [], "its batches are no pairs"),
        (None, [{"x": PAIR[0], "labels": PAIR[1]}], "its batches are no pairs"),
        (None, [(PAIR[0], torch.zeros(2))], "its batches are no pairs"),
        (None, [(PAIR[0], torch.tensor([0, 3]))], r"it gives \(1, 3\) for one sample"),
        (nn.MSELoss(), [PAIR], "its loss criterion is MSELoss"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), [PAIR], "its loss criterion has weights or smooths labels"),
        (nn.CrossEntropyLoss(torch.ones(3)), [PAIR], "its loss criterion has weights or smooths labels"),
        (nn.CrossEntropyLoss(ignore_index=0), [PAIR], r"its loss criterion leaves class 0 out \(ignore_index\)"),
        (nn.NLLLoss(ignore_index=2), [PAIR], r"its loss criterion leaves class 2 out \(ignore_index\)"),
    ],
)
def test_what_is_no_plain_classifier_is_told_what_to_import(loss: nn.Module | None, batches: list, why: str) -> None:
    module = Module(loss)
    with pytest.raises(ValueError, match=why) as told:
        find_objective(module, module.model, None, batches)
    assert "from lightning_goldy import ClassifierObjective" in str(told.value)
    assert "from lightning_goldy import FunctionObjective" in str(told.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities_are_not_taken_for_logits(dtype: torch.dtype) -> None:
    module, pair = Module().to(dtype), (torch.ones(2, 4, dtype=dtype), PAIR[1])
    module.model = nn.Sequential(module.model, nn.Softmax(-1))
    with pytest.raises(ValueError, match=r"it gives what sums to 1 .*, probabilities and no logits"):
        find_objective(module, module.model, None, [pair])
    module.model[1] = nn.LogSoftmax(-1)
    assert type(find_objective(module, module.model, None, [pair])) is ClassifierObjective


def test_a_model_that_is_tried_as_a_classifier_keeps_statistics_modes_and_random_states() -> None:
    module = Module()
    module.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    assert type(find_objective(module, module.model, None, [PAIR])) is ClassifierObjective
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.model[2].training


def test_the_import_paths_of_the_message_are_right() -> None:
    import lightning_goldy

    assert lightning_goldy.ClassifierObjective is ClassifierObjective
    assert lightning_goldy.FunctionObjective is FunctionObjective
    assert take_samples(PAIR, slice(0, 1))[0].shape == (1, 4)
