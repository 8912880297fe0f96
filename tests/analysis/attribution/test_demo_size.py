"""On the demo's finetune, at reduced size, attribution finds what carries it, and sizes of changes do not."""

from __future__ import annotations

import lightning.pytorch as L
import pytest

from lightning_goldy import GoldyModule
from lightning_goldy.analysis import change_attribution, graft_curve
from lightning_goldy.commands.demo import DemoSettings, cached_base
from lightning_goldy.core import ParameterVector
from lightning_goldy.data import one_hop_questions
from lightning_goldy.optim import OptimizerOptions, ScheduleOptions


@pytest.mark.slow
def test_attribution_dominates_on_phrasings_that_were_not_trained(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = DemoSettings.fast()
    base, _ = cached_base(settings, tmp_path)
    L.seed_everything(0, verbose=False)
    data = settings.finetuning_data()
    module = GoldyModule(
        str(base),
        optimizer=OptimizerOptions(learning_rate=settings.finetuning_rate),
        schedule=ScheduleOptions("linear", warmup_fraction=0.1),
    )
    start = ParameterVector.of(module.model)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = L.Trainer(accelerator="cpu", max_epochs=4 * settings.finetuning_epochs, **options)
    trainer.fit(module, data)
    model = module.model.eval()
    scored, held_out = (
        list(data.question_dataloader(one_hop_questions(data.edited_facts, phrasing)))
        for phrasing in ("train", "held_out")
    )
    found = change_attribution(model, start, scored, shares=[0.05, 0.2])
    curve = graft_curve(model, start, found, scored, held_out, baselines=["magnitude", "random"])
    recovered = {name: [p.recovered for p in curve.of(name)] for name in ("attribution", "magnitude", "random")}
    for place in (0, 1):  # 5 % and 20 % of the elements
        others = (recovered["magnitude"][place], recovered["random"][place])
        assert recovered["attribution"][place] > max(others) + 0.5, recovered
