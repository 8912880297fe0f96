"""VariantsModule: copies of one model that are trained side by side, and what is drawn of them."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_goldy import GoldyModule
from lightning_goldy.analysis.linearized import build_variant
from lightning_goldy.callbacks import VariantLosses
from lightning_goldy.callbacks.engine.store import RowHistory
from lightning_goldy.core import CausalLMObjective, ParameterVector
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from lightning_goldy.core.files import read_rows
from lightning_goldy.optim import OptimizerOptions
from lightning_goldy.report import draw_figures
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import ReportError
from lightning_goldy.report.topics.taylor import chart_variant_losses
from lightning_goldy.training.variants import VariantsModule
from tests.callbacks.training import TokenData
from tests.references.models import build

ALL = ("full", "frozen_attention", "linear_mlp", "tangent")
RATE = OptimizerOptions(learning_rate=1e-2, weight_decay=0.1)


def without_dropout(family: str = "gpt2") -> nn.Module:
    model = build(family)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def fit(
    folder, module: L.LightningModule, *, ckpt_path=None, max_epochs: int = 1, callbacks=(), **options
) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=max_epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, datamodule=TokenData(8), ckpt_path=ckpt_path)
    return trainer


def plain_training(variant: str, *, clip: float | None, order: list[dict[str, torch.Tensor]]) -> nn.Module:
    """One variant by itself, in a loop of its own."""
    model = without_dropout().train()
    trained = build_variant(variant, model, ParameterVector.of(model))  # type: ignore[arg-type]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(order))
    for batch in order:
        optimizer.zero_grad()
        CausalLMObjective().loss(trained, batch).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return model


class Batches(L.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(batch)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_each_copy_trains_as_it_would_alone(tmp_path, clip: float | None) -> None:
    from lightning_goldy.optim import ScheduleOptions

    batches = Batches()
    schedule = ScheduleOptions("linear", warmup_fraction=0.0, final_fraction=0.0)
    module = VariantsModule(without_dropout(), optimizer=RATE, schedule=schedule)
    fit(tmp_path, module, callbacks=[batches], gradient_clip_val=clip)
    assert len(batches.seen) == 4
    start = dict(without_dropout().named_parameters())
    assert all(torch.equal(value, start[name]) for name, value in module.base.named_parameters())
    models = module.trained_models()
    assert tuple(models) == ALL
    for variant, model in models.items():
        alone = dict(plain_training(variant, clip=clip, order=batches.seen).named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, alone[name], rtol=0, atol=1e-6)
            assert not torch.equal(parameter, start[name])
    weights = [dict(model.named_parameters())["transformer.wte.weight"] for model in models.values()]
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(weights[first], weights[second], atol=1e-5)


def test_the_full_model_trains_as_in_the_plain_module(tmp_path) -> None:
    together, alone = (
        VariantsModule(build("gpt2"), variants=["full"], optimizer=RATE),
        GoldyModule(build("gpt2"), optimizer=RATE),
    )
    logged = [fit(tmp_path, module).callback_metrics for module in (together, alone)]
    for (name, mine), theirs in zip(together.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert {name for name in logged[0] if "/full" not in name} == set(logged[1])
    assert logged[0]["val/loss/full"] == logged[0]["val/loss"] == logged[1]["val/loss"]


def test_every_loss_is_logged_and_is_that_of_its_variant(tmp_path) -> None:
    module = VariantsModule(without_dropout(), optimizer=RATE)
    metrics = fit(tmp_path, module).callback_metrics
    objective, batches = CausalLMObjective(), list(TokenData().val_dataloader())
    module.eval()
    for variant in ALL:
        assert f"train/loss/{variant}" in metrics
        model = module.trained_models()[variant]
        space = ParameterVector.of(model).space
        base = ParameterVector(space, {name: value.detach() for name, value in space.resolve(module.base).items()})
        with torch.no_grad():
            losses = [float(objective.loss(build_variant(variant, model, base), batch)) for batch in batches]
        assert float(metrics[f"val/loss/{variant}"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_resumed_run_keeps_its_base_and_a_checkpoint_holds_all_copies(tmp_path) -> None:
    whole = VariantsModule(without_dropout(), optimizer=RATE, variants=["tangent", "linear_mlp"])
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path / "a", whole, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    resumed = VariantsModule(without_dropout(), optimizer=RATE, variants=["tangent", "linear_mlp"])
    with torch.no_grad():
        # Whatever the module starts with, the base is that of the run.
        next(resumed.model.parameters()).add_(1.0)
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert set(state["hyper_parameters"]["variants"]) == {"tangent", "linear_mlp"}
    again = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    resumption = {"ckpt_path": tmp_path / "epoch=0.ckpt", "callbacks": [again], "enable_checkpointing": True}
    fit(tmp_path / "b", resumed, max_epochs=2, **resumption)
    for name, value in resumed.base.named_parameters():
        assert torch.equal(value, dict(whole.base.named_parameters())[name])
    assert resumed.trainer.global_step == whole.trainer.global_step
    loaded = VariantsModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt", model=without_dropout())
    assert loaded.variants == ("tangent", "linear_mlp")
    for variant, model in loaded.trained_models().items():
        for mine, theirs in zip(model.parameters(), whole.trained_models()[variant].parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_rows_and_figures_have_a_line_per_variant(tmp_path) -> None:
    module = VariantsModule(without_dropout(), optimizer=RATE)
    losses = VariantLosses(every_n_steps=2, at=["start", "end"])
    fit(tmp_path, module, callbacks=[losses])
    rows = read_rows(losses.folder / "results.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    # At the start all variants are one model.
    assert list(rows[0]["metrics"].values()) == pytest.approx([rows[0]["metrics"]["loss/full"]] * 4, rel=1e-6)
    assert len(set(rows[-1]["metrics"].values())) == 4
    module.eval()
    batches, objective = list(TokenData().probe_dataloader()), CausalLMObjective()
    with torch.no_grad():
        targets = [objective.logits_and_targets(module.variant_models()["tangent"], batch) for batch in batches]
    expected = sum(float(each.loss()) * len(each.targets) for each in targets) / sum(
        len(each.targets) for each in targets
    )
    assert rows[-1]["metrics"]["loss/tangent"] == pytest.approx(expected, rel=1e-6)
    # The full and the tangent model run once, each of the others beside a run at the base.
    samples = sum(len(batch["input_ids"]) for batch in batches)
    assert (rows[-1]["cost"]["forwards"], rows[-1]["cost"]["backwards"]) == (6 * samples, 0)
    row = rows[-1]
    assert row["result"]["n_targets"] == sum(len(each.targets) for each in targets)
    (figure,) = draw_figures(row, rows[:-1]).values()
    points = figure.data["points"]
    drawn = dict(zip(points["line"], points["y"], strict=True))  # the last point of each line
    assert list(drawn) == ["full", "attention frozen", "MLPs linear", "all linear (tangent)"]
    assert drawn["all linear (tangent)"] == pytest.approx(row["metrics"]["loss/tangent"], rel=1e-8)
    assert points["x"] == [0, 2, 4] * 4
    assert all(description_of("variant_losses").meaning(name) for name in row["metrics"])
    with pytest.raises(ReportError, match="needs metrics that begin with 'loss/'"):
        chart_variant_losses([{"step": 1, "metrics": {}, "result": {}}])


def test_a_long_run_is_thinned_evenly_and_keeps_its_latest_point() -> None:
    def row(step: int) -> dict:
        return {"analysis": "variant_losses", "step": step, "trigger": "step", "metrics": {"loss/full": float(step)}}

    history = RowHistory(row(step) for step in range(1002))
    points = chart_variant_losses([*history.rows, {**row(1002), "result": {}}]).data["points"]
    assert points["x"][0] == 0
    assert points["x"][-1] == 1002
    assert 100 < len(points["x"]) <= 201
    assert points["y"] == [float(step) for step in points["x"]]
    assert len(set(torch.tensor(points["x"][:-1]).diff().tolist())) == 1


def test_bad_input_is_refused(tmp_path) -> None:
    model = build("gpt2")
    for variants, message in (
        (["ful"], r"unknown variant 'ful'; did you mean 'full'"),
        ([], r"each of some variants once; got \[\]"),
        (["full", "full"], r"once; got \['full', 'full'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            VariantsModule(model, variants=variants)  # type: ignore[arg-type]
    masked = OptimizerOptions(name="masked_adamw", mask="golden")
    with pytest.raises(ValueError, match=r"optimizer\.name='adamw'; got 'masked_adamw'"):
        VariantsModule(model, optimizer=masked)
    bloom = {"model_type": "bloom", "vocab_size": 53, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    with pytest.raises(UnsupportedArchitectureError, match="Bloom"):
        fit(tmp_path, VariantsModule(bloom))
    with pytest.raises(ValueError, match="this is a GoldyModule"):
        fit(tmp_path, GoldyModule(model), callbacks=[VariantLosses()])
    assert math.isfinite(float(next(model.parameters()).sum().detach()))
