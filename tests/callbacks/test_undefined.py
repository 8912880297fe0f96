"""A training whose weights become NaN goes on as without callbacks; rows, page and loggers say that it is undefined."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lightning_goldy.analysis.heads import PruningSchedule, Scoring
from lightning_goldy.callbacks import (
    ActivationDifferences,
    AnalysisCallback,
    BasinVolume,
    ChangeAttribution,
    GoldenParameters,
    GoldenSnapshot,
    HeadPlasticity,
    ReverseGoldenParameters,
    RunReport,
    TaylorDiff,
)
from lightning_goldy.core.files import parse_json
from lightning_goldy.report import write_report
from lightning_goldy.report.comparison import differences
from lightning_goldy.report.page import answers_json
from lightning_goldy.report.run import read_run
from tests.callbacks.knowledge import WordData
from tests.callbacks.test_isolation_of_callbacks import CALLBACKS
from tests.callbacks.training import Finetune, fit
from tests.callbacks.training import differences as training_differences

UNDEFINED = "ignore:analyses are undefined from here on"


class Diverging(Finetune):
    """Whose gradient is NaN at the fourth step."""

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 3:
            next(self.parameters()).grad.fill_(torch.nan)


def rows_of(callback: AnalysisCallback) -> list[dict]:
    return [parse_json(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings(UNDEFINED, "ignore:.*measured without a preconditioner")
def test_the_training_goes_on_and_rows_say_so(tmp_path):
    kinds = ("taylor", "golden", "basin", "attention", "activations", "circuits", "knowledge")
    watchers = {watcher.name: watcher for kind in kinds for watcher in CALLBACKS[kind]()}
    runs = [
        fit(tmp_path / name, callbacks, module=Diverging, data=WordData(), max_epochs=1)[2]
        for name, callbacks in (("plain", []), ("watched", watchers.values()))
    ]
    assert any(math.isnan(loss) for loss in runs[0]["losses"])
    # A NaN equals none.
    assert training_differences(*({**run, "losses": [*map(str, run["losses"])]} for run in runs)) == []
    assert len(watchers) == 8
    for watcher in watchers.values():
        last = rows_of(watcher)[-1]
        assert last["metrics"] == {}
        assert last["result"]["undefined"].startswith("the weights of ")
        assert last["headline"] == f"undefined: {last['result']['undefined']}"


@pytest.mark.filterwarnings(UNDEFINED)
def test_the_page_tells_it_and_shows_what_there_was(tmp_path):
    watchers = [GoldenSnapshot(every_n_steps=2, at=("start", "end")), RunReport()]
    trainer, _, _ = fit(tmp_path, watchers, module=Diverging, data=WordData(), max_epochs=1)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "It is undefined since step 4: the weights of" in page
    assert "Undefined at step 4, 6, 8: the weights of" in page
    assert "Where the weights changed" in page
    answer = json.loads(answers_json(tmp_path / "run"))["answers"][0]
    assert (answer["trust"], answer["doubts"]) == ("weak", ["nothing can be measured on weights that are no numbers"])
    other = fit(tmp_path / "other", [GoldenSnapshot()], data=WordData(), max_epochs=1)[0]
    told = differences(read_run(tmp_path / "other" / "run"), read_run(tmp_path / "run"))
    assert [(entry.what, entry.value) for entry in told] == [("golden_snapshot", None)]
    assert told[0].remark.startswith("undefined: the weights of")
    assert other.global_step == trainer.global_step


@pytest.mark.filterwarnings(UNDEFINED)
def test_a_page_of_nothing_but_undefined_rows(tmp_path):
    fit(tmp_path, [GoldenSnapshot(every_n_steps=8, at=())], module=Diverging, data=WordData(), max_epochs=1)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "It is undefined since step 8" in page
    assert "Where the weights changed" not in page


@pytest.mark.filterwarnings(UNDEFINED)
def test_heads_are_not_cut_on_weights_that_are_no_numbers(tmp_path):
    schedule = PruningSchedule(warmup_steps=5, steps_per_cycle=3, ramp_steps=1, cuts=1, regrow_at=2)
    watcher = HeadPlasticity(pruning_level=0.5, schedule=schedule, scoring=Scoring(n_samples=4))
    trainer, _, _ = fit(tmp_path, [watcher], module=Diverging, data=WordData(), max_epochs=1)
    assert trainer.global_step == 8
    assert [(row["step"], bool(row["result"].get("undefined"))) for row in rows_of(watcher)] == [(5, True), (8, True)]


class LostLogits(Finetune):
    """Whose logits are NaN once the training has ended, with finite weights."""

    def __init__(self):
        super().__init__()
        self.model.lm_head.register_forward_hook(lambda layer, given, found: found * (math.nan if self.ended else 1))

    @property
    def ended(self) -> bool:
        return self._trainer is not None and self.trainer.global_step == 2


@pytest.mark.parametrize(
    ("watcher", "value"),
    [
        (TaylorDiff(n_samples=4), "the present loss is nan, not finite"),
        (GoldenParameters(n_samples=4), r"the gradient of transformer\.\S+ is not finite"),
        (ReverseGoldenParameters(n_samples=4), r"the gradient scores of transformer\.\S+ are not finite"),
        (BasinVolume(2, n_samples=4), "the cost at the anchor is nan nats"),
        (ChangeAttribution(nodes=1, n_samples=4), r"the metric is not finite at the base: \[nan, nan\]"),
        (ActivationDifferences(n_samples=4), "text 0: the divergence from the base is nan nats, not finite"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.filterwarnings("ignore")
def test_an_error_names_callback_step_value_and_what_to_do(watcher, value, tmp_path):
    with pytest.raises(ValueError, match=value) as failure:
        fit(
            tmp_path, [GoldenSnapshot(at=(), every_n_steps=9), watcher], module=LostLogits, data=WordData(), max_steps=2
        )
    told = str(failure.value)
    assert told.startswith(f"{watcher.name} failed at step 2: ")
    assert told.endswith(f'Give {watcher.name} on_error="warn" to let the training go on without it.')
    assert told.count("failed at step") == 1


class Missing(GoldenSnapshot):
    def compute(self, context):
        return {}["a key that is not there"]


def test_an_error_that_is_not_only_words_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError) as failure:
        fit(tmp_path, [Missing()], data=WordData(), max_steps=2)
    assert failure.value.args == ("a key that is not there",)
