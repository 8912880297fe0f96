"""What the report says outside of its page: on the console and in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_goldy.callbacks import GoldenSnapshot, RunReport
from tests.callbacks.training import Finetune, TokenData, fit


def test_answers_are_told_on_the_console_and_in_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="a")
    trainer = L.Trainer(
        max_steps=4,
        logger=logger,
        callbacks=[GoldenSnapshot(every_n_steps=2), RunReport()],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Finetune(), datamodule=TokenData())
    told = capsys.readouterr().out
    assert "What did this finetune change?" in told
    assert "not measured" in told
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    texts = {tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)] for tag in TEXTS}
    (whole,) = texts["goldy/answers/text_summary"]
    assert whole.startswith("**Which parameters carry it?** The weights moved by ")
    assert "*(weak. " in whole
    each = texts["goldy/answers/golden_snapshot/text_summary"]
    assert len(each) == 2
    assert each[0] != each[1] == whole
    (config,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Which parameters carry it?"]
    assert layout.category[0].chart[0].multiline.tag == ["goldy/golden_snapshot/(?!cost/)"]


def test_a_run_is_set_beside_earlier_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compare names .*nowhere, which is no directory of a run"):
        RunReport(compare=[tmp_path / "nowhere"])
    fit(tmp_path / "a", [GoldenSnapshot(), RunReport()], max_epochs=1)
    fit(tmp_path / "b", [GoldenSnapshot(), RunReport(compare=[tmp_path / "a" / "run"])], max_epochs=1)
    page = (tmp_path / "b" / "run" / "comparison.html").read_text(encoding="utf-8")
    assert "b/run minus a/run" in page
    assert not (tmp_path / "a" / "run" / "comparison.html").exists()


TEXTS = ("goldy/answers/text_summary", "goldy/answers/golden_snapshot/text_summary")
