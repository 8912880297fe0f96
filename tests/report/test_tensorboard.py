"""TensorBoard itself, as a person sees a run in it: scalars by question, sentences, readable figures, a table."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_goldy.callbacks import GoldenSnapshot, RunReport, TaylorDiff
from tests.callbacks.training import Finetune, TokenData
from tests.report.test_browser import browser as browser  # the same browser, or the reason why there is none

pytestmark = pytest.mark.slow
PATIENCE = 60.0
# Characters of a figure's labels are 11 units high; TensorBoard may show them at no less than this part of it.
READABLE = 0.85


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard that shows one run."""
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    folder = tmp_path_factory.mktemp("runs")
    trainer = L.Trainer(
        max_steps=4,
        logger=TensorBoardLogger(folder, name="run", version="a"),
        callbacks=[GoldenSnapshot(every_n_steps=2), TaylorDiff(every_n_steps=2, n_samples=4), RunReport()],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Finetune(), datamodule=TokenData())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = ["--logdir", str(folder), "--port", address.rpartition(":")[2], "--host", "127.0.0.1", "--load_fast=false"]
    with subprocess.Popen([sys.executable, "-m", "tensorboard.main", *words], stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"{address}/data/plugin/custom_scalars/layout")
            yield address
        finally:
            server.terminate()


def _wait_for(address: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(address) as answer:
                if b"Which parameters" in answer.read():
                    return
        except OSError:
            pass
        assert time.monotonic() < end, f"{address} does not answer"
        time.sleep(0.5)


@pytest.fixture
def tab(board: str, browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a tab at the size of a small screen, and keeps a picture of it."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)

    def opened(name: str) -> Any:
        page.goto(f"{board}/#{name}")
        page.reload()
        return page

    yield opened
    page.screenshot(path=tmp_path / "tensorboard.png")
    context.close()


def test_custom_scalars_have_a_chart_for_each_headline_by_question(tab: Any) -> None:
    page = tab("custom_scalars")
    for words in ("Which parameters carry it?", "What kind of change is it?", "golden_snapshot: relative_change"):
        page.get_by_text(words, exact=True).first.wait_for()
    # Numbers of different units never share a chart.
    page.get_by_text("Matches (1)").nth(1).wait_for()
    # An option that is off leaves no empty chart.
    assert page.get_by_text("golden_snapshot: update_cosine").count() == 0
    assert page.get_by_text("Matches (0)").count() == 0


def test_sentences_are_told_as_text(tab: Any) -> None:
    page = tab("text")
    page.get_by_text("Which parameters carry it?").first.wait_for()
    page.get_by_text("goldy/answers/taylor_diff/text_summary").first.wait_for()


def test_letters_of_figures_can_be_read_at_the_default_size(tab: Any) -> None:
    page = tab("images")
    image = page.locator("img[src*='individualImage']").first
    image.wait_for()
    page.wait_for_timeout(500)
    shown, own = image.evaluate("image => [image.getBoundingClientRect().width, image.naturalWidth]")
    # 1.5 pixels are drawn for a unit.
    assert shown / (own / 1.5) >= READABLE


def test_the_table_of_hyperparameters_has_base_data_and_headlines(tab: Any) -> None:
    page = tab("hparams")
    for words in ("goldy/base", "goldy/data", "goldy/precision"):
        page.get_by_text(words, exact=True).first.wait_for()
    # The first headline of each question before the second of any.
    heads = [f"goldy/{name}" for name in ("golden_snapshot/relative_change", "taylor_diff/nonlinearity")]
    heads += ["goldy/golden_snapshot/delta_norm", "goldy/taylor_diff/loss"]
    places = []
    for head in heads:
        page.get_by_text(head, exact=True).first.wait_for()
        places.append(page.get_by_text(head, exact=True).first.bounding_box()["y"])
    assert places == sorted(places)
