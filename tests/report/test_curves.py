from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_goldy.report.run import quantity_of, read_curves

PageOf = Callable[..., Any]
WriteEvents = Callable[..., None]


def test_costs_are_compared_with_the_run_when_its_duration_is_known(
    run: Path, page_of: PageOf, write_events: WriteEvents
) -> None:
    write_events(run, [[("train/loss", 1, 1.0, 1000.0), ("train/loss", 2, 0.5, 1100.0)]])
    page = page_of(run)
    assert "10 % of the run" in page.text("small")
    assert "6 %" in page.cells()


def test_training_curves_come_from_the_event_files(run: Path, page_of: PageOf, write_events: WriteEvents) -> None:
    points = [("train/loss", step, 10.0 / step, 1000.0 + step) for step in range(1, 11)]
    points += [("val/loss", 10, 1.5, 1010.0), ("val/perplexity", 10, 4.5, 1010.0), ("lr-AdamW", 1, 0.1, 1001.0)]
    points += [("goldy/golden_parameters/count", 10, 3.0, 1010.0)]
    write_events(run, [points])
    page = page_of(run)
    assert page.text("h4")[-3:] == ["loss", "perplexity", "lr AdamW"]
    loss = page.table(-3, "points")
    assert list(dict.fromkeys(loss["line"])) == ["train/loss", "val/loss"]
    assert loss["x"][:10] == list(range(1, 11))
    assert loss["y"][1] == pytest.approx(5.0)


def test_a_resumed_run_replaces_what_was_logged_after_its_checkpoint(tmp_path: Path, write_events: WriteEvents) -> None:
    first = [("loss", step, 1.0, 100.0 + step) for step in (1, 2, 3, 4)]
    second = [("loss", step, 2.0, 9000.0 + step) for step in (3, 5)]
    write_events(tmp_path, [first, second])
    training = read_curves(tmp_path)
    assert training.curves["loss"].steps == (1, 2, 3, 5)
    assert training.curves["loss"].values == (1.0, 1.0, 2.0, 2.0)
    # The pause between the launches does not count.
    assert training.seconds == pytest.approx(5.0)


def test_training_curves_come_from_the_csv_logger(run: Path, page_of: PageOf) -> None:
    (run / "metrics.csv").write_text(
        "epoch,step,train_loss_step,val_acc,goldy/x/count\n0,1,2.0,,\n0,2,nan,0.5,3\n0,3,oops,,\n"
    )
    page = page_of(run)
    assert page.text("h4")[-2:] == ["loss", "acc"]
    assert page.table(-2, "points")["y"] == [2.0, None]
    assert "1 cells of metrics.csv are not numbers; they are left out of the curves." in page.text("p")


def test_a_table_without_steps_is_named(run: Path, page_of: PageOf) -> None:
    (run / "metrics.csv").write_text("loss\n1.0\n")
    assert "metrics.csv has no column 'step'; it is left out of the curves." in page_of(run).text("p")


def test_event_files_that_hold_nothing_are_named(run: Path, page_of: PageOf) -> None:
    (run / "events.out.tfevents.1").write_bytes(b"not records" * 20)
    assert "The TensorBoard event files hold no scalars." in page_of(run).text("p")


def test_long_curves_keep_their_spikes(tmp_path: Path) -> None:
    lines = "".join(f"{step},{100.0 if step == 7777 else 1.0}\n" for step in range(20000))
    (tmp_path / "metrics.csv").write_text("step,loss\n" + lines)
    curve = read_curves(tmp_path).curves["loss"]
    assert len(curve.steps) <= 2002
    assert (curve.steps[0], curve.steps[-1]) == (0, 19999)
    assert curve.values[curve.steps.index(7777)] == 100.0


@pytest.mark.parametrize(("tag", "quantity"), [("train/loss", "loss"), ("val_loss_epoch", "loss"), ("step", "step")])
def test_quantities_drop_the_words_for_where(tag: str, quantity: str) -> None:
    assert quantity_of(tag) == quantity
