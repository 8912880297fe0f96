from __future__ import annotations

import json

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_goldy.analysis import taylor_diff
from lightning_goldy.callbacks import ExactResume, GoldenSnapshot, TaylorDiff
from lightning_goldy.core import FunctionObjective
from lightning_goldy.report import draw_figures
from tests.callbacks.training import TokenData, differences, fit

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:.*exists and is not empty")

EPOCH = 8  # optimizer steps: 16 samples in batches of 2


def rows_of(callback: TaylorDiff) -> list[dict]:
    rows = [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]
    for row in rows:
        row["cost"] = {name: row["cost"][name] for name in ("forwards", "backwards")}
    return rows


def test_it_logs_what_the_function_finds_and_rows_can_be_drawn(tmp_path) -> None:
    snapshot, taylor = GoldenSnapshot(every_n_steps=4), TaylorDiff(every_n_steps=4, n_samples=3)
    _, module, _ = fit(tmp_path, [snapshot, taylor], max_epochs=1)
    batches = list(TokenData().probe_dataloader())
    batches = [batches[0], {key: value[:1] for key, value in batches[1].items()}]
    expected = taylor_diff(module.model, snapshot.base, batches)
    rows = rows_of(taylor)
    assert [row["step"] for row in rows] == [4, 8]
    # Three of the probe's samples: the expansion, the present model and two gradients for the shares.
    assert rows[-1]["cost"] == vars(expected.cost) == {"forwards": 9, "backwards": 6}
    metrics = rows[-1]["metrics"]
    assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert metrics["residual/order2"] == pytest.approx(expected.orders[1].residual, rel=1e-4)
    assert metrics["nonlinearity"] == pytest.approx(expected.nonlinearity, rel=1e-4)
    assert rows[-1]["result"]["regime"] == expected.regime
    figures = draw_figures(rows[-1], rows[:-1])
    assert set(figures) == {"prediction", "shares"}
    assert figures["prediction"].data["points_1"]["x"] == [4, 8]


def test_a_moving_base_is_that_of_the_last_analysis_or_of_the_epoch(tmp_path) -> None:
    each = TaylorDiff(every_n_steps=4, at=(), reset="each", name="each", n_samples=2, by=None)
    epoch = TaylorDiff(every_n_steps=4, at=(), reset="epoch", name="epoch", n_samples=2, by=None)
    fit(tmp_path, [each, epoch], max_epochs=2)
    assert [row["result"]["base_step"] for row in rows_of(each)] == [0, 4, 8, 12]
    assert [row["result"]["base_step"] for row in rows_of(epoch)] == [0, 0, 8, 8]
    found = {row["step"]: row["metrics"] for row in rows_of(each)}
    for before, now in ((4, 8), (8, 12)):
        assert found[now]["base_loss"] == pytest.approx(found[before]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "reset", ["each", *(pytest.param(each, marks=pytest.mark.slow) for each in ("never", "epoch"))]
)
def test_resumed_equals_uninterrupted(tmp_path, reset) -> None:
    def callbacks(folder):
        taylor = TaylorDiff(every_n_steps=3, reset=reset, n_samples=2)
        saver = ModelCheckpoint(
            folder, filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
        )
        return taylor, [ExactResume(), GoldenSnapshot(every_n_epochs=1), taylor, saver]

    whole, watchers = callbacks(tmp_path / "a")
    _, _, expected = fit(tmp_path / "whole", watchers, max_epochs=2, enable_checkpointing=True)
    _, watchers = callbacks(tmp_path / "checkpoints")
    fit(tmp_path / "run", watchers, max_epochs=2, max_steps=EPOCH + 3, enable_checkpointing=True)
    again, watchers = callbacks(tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / f"step={EPOCH}.ckpt"
    _, _, found = fit(tmp_path / "again", watchers, max_epochs=2, enable_checkpointing=True, ckpt_path=checkpoint)
    found.pop("losses"), expected.pop("losses")
    assert differences(expected, found) == []
    assert rows_of(again) == rows_of(whole)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ValueError, match="add GoldenSnapshot"):
        fit(tmp_path, [TaylorDiff(n_samples=2)])
    plain = FunctionObjective(lambda model, batch: model(**batch).loss)
    with pytest.raises(ValueError, match="no logits: give it logits=, or pass function_space=False"):
        fit(tmp_path, [GoldenSnapshot(), TaylorDiff(n_samples=2, objective=plain, check=False)])
    for options, message in (
        ({"reset": "always"}, "unknown reset='always'"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"by": "head"}, "unknown by='head'"),
        ({"orders": 2}, r"orders is a list of whole numbers, as \[1, 2\]; got 2"),
        ({"orders": [1, 1.5]}, "each of orders must be a whole number; got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            TaylorDiff(**options)
