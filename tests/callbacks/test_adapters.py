"""Callbacks on a model with adapters: merged weights by default, the adapters by option, the training undisturbed."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_goldy import ParameterMask
from lightning_goldy.analysis import change_attribution, taylor_diff
from lightning_goldy.analysis.attribution import interleaved
from lightning_goldy.analysis.change import weight_change
from lightning_goldy.callbacks import (
    ChangeAttribution,
    FinetuneComparison,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    RunReport,
    TaylorDiff,
)
from lightning_goldy.commands.checkpoints import find_base, follow_frozen, read_saved
from lightning_goldy.core.architecture.adapters import AdapterError
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import StoreError
from lightning_goldy.report.formatting import SPACES
from tests.callbacks.training import Finetune, TokenData, differences, fit
from tests.core.architecture.test_merged_adapters import unloaded
from tests.references.models import build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


class Adapted(Finetune):
    def __init__(self) -> None:
        super().__init__()
        self.model = peft.get_peft_model(build("gpt2"), peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([own for own in self.parameters() if own.requires_grad], lr=1e-2)


LEFT_OUT = "its mask is of adapters, the contributions of merged weights"


def last_row(callback: Any) -> dict[str, Any]:
    return json.loads((callback.folder / "results.jsonl").read_text().splitlines()[-1])


def test_rows_are_of_merged_weights_and_say_so_while_nothing_is_disturbed(tmp_path) -> None:
    short = {"module": Adapted, "max_epochs": 1, "limit_train_batches": 3}
    _, _, plain = fit(tmp_path / "plain", **short)
    merged = GoldenSnapshot(every_n_steps=1, track_updates=True)
    apart = GoldenSnapshot(every_n_steps=None, space="adapters", name="apart")
    shape, taylor = ParameterDistribution(), TaylorDiff(orders=[1], n_samples=2)
    golden = GoldenParameters(n_samples=2, quorum=0.5)
    carried = ChangeAttribution(nodes=4, shares=[0.2, 1.0], baselines=["magnitude", "random", "gradient"], n_samples=4)
    inner = ChangeAttribution(nodes=4, shares=[], n_samples=4, space="adapters", name="inner")
    callbacks = [merged, apart, shape, taylor, golden, carried, inner, RunReport()]
    _, module, watched = fit(tmp_path / "watched", callbacks, **short)
    assert differences(plain, watched) == []

    before = Adapted()
    space = merged.base.space
    with torch.no_grad():
        for name, parameter in space.resolve(before.model).items():
            parameter.copy_(merged.base.vector(module.model)[name])
    now, base = unloaded(module.model), unloaded(before.model)
    expected = weight_change(now, base)
    row = last_row(merged)
    assert row["result"]["space"] == "merged"
    assert row["metrics"]["delta_norm"] == pytest.approx(expected.delta_norm, rel=1e-5)
    assert -1 <= row["metrics"]["update_cosine"] <= 1
    assert {tensor["name"] for tensor in row["result"]["tensors"]} <= set(expected.names)
    assert last_row(apart)["result"]["space"] == "adapters"
    assert last_row(apart)["metrics"]["delta_norm"] != pytest.approx(expected.delta_norm, rel=1e-2)
    assert all(tensor["stable_rank"] <= 2 + 1e-6 for tensor in last_row(shape)["result"]["tensors"])
    batches = next(iter(TokenData().probe_dataloader()))
    along = taylor_diff(now, base, [batches], orders=[1])
    assert last_row(taylor)["metrics"]["first_order"] == pytest.approx(along.first_order, rel=1e-3)
    assert set(last_row(taylor)["result"]["loss_shares"]) <= set(along.loss_shares)
    assert last_row(golden)["result"]["space"] == "adapters"

    row = last_row(carried)
    assert row["result"]["space"] == "merged"
    scored, _ = interleaved(TokenData().probe_dataloader(), 4)
    found = change_attribution(now, base, scored, nodes=4, shares=[0.2, 1.0])
    assert row["metrics"]["effect"] == pytest.approx(found.change, rel=1e-3)
    told = {entry["name"]: entry["contribution"] for entry in row["result"]["tensors"]}
    for name, value in told.items():
        assert value == pytest.approx(found.by_tensor[name], rel=1e-2, abs=1e-4 * abs(found.change))
    points = row["result"]["graft"]["points"]
    assert [point["recovered"] for point in points if point["share"] == 1.0] == pytest.approx([1.0] * 5)
    mask = ParameterMask.load(carried.folder / row["files"]["mask"])
    assert "transformer.h.0.attn.c_attn.weight" in mask.space
    assert row["result"]["left_out"] == {"golden_parameters": LEFT_OUT}
    assert last_row(inner)["result"]["space"] == "adapters"
    assert [link["mask"] for link in last_row(inner)["result"]["links"]] == ["golden_parameters"]

    page = next(tmp_path.glob("watched/**/report.html")).read_text()
    assert SPACES["merged"] in page
    assert SPACES["adapters"] in page
    assert "the weights with adapters moved by" in page
    assert "the adapters moved by" in page
    assert "the whole model" not in page


@pytest.mark.parametrize(
    "make", [GoldenSnapshot, ParameterDistribution, TaylorDiff, KnowledgeCoupling, FinetuneComparison]
)
def test_an_unknown_space_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="unknown space 'weights'"):
        make(space="weights")


def test_low_precision_is_told_by_every_row(tmp_path) -> None:
    snapshot, taylor = GoldenSnapshot(every_n_steps=None), TaylorDiff(orders=[1], by=None, n_samples=2)
    golden, distribution = GoldenParameters(n_samples=2), ParameterDistribution()
    callbacks = [snapshot, taylor, golden, distribution, RunReport()]
    fit(tmp_path, callbacks, module=Adapted, max_epochs=1, precision="bf16-mixed", limit_train_batches=3)
    floor = last_row(snapshot)
    assert floor["result"]["precision"]["dtype"] == "bfloat16"
    assert 1e-3 < floor["metrics"]["rounding_floor"] < 3e-3  # about 2^-8 / sqrt(12), relative
    assert 0 < floor["metrics"]["lost_share"] <= 1
    assert floor["headline"].endswith(f"rounding to bfloat16 alone makes {floor['metrics']['rounding_floor']:.2g}")
    assert last_row(taylor)["result"]["precision"]["training"] == "bfloat16"
    assert last_row(golden)["result"]["precision"] == {"dtype": "bfloat16", "by": "autocast", "epsilon": 2**-7}
    assert "computed in bfloat16 (autocast)" in last_row(golden)["headline"]
    # Weights of float32 are looked at in float32.
    assert "precision" not in last_row(distribution)["result"]
    assert "bfloat16" not in last_row(distribution)["headline"]
    page = next(tmp_path.glob("**/report.html")).read_text()
    assert "Computed in float32, while the training computes in bfloat16 (autocast)." in page
    assert "by whose rounding alone weights change by" in page


class Renewed(Adapted):
    """Merges its adapters into the frozen weights in the middle and begins them anew, as ReLoRA does."""

    merges = 2

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step % self.merges:
            return
        for layer in self.model.modules():
            if hasattr(layer, "merged_adapters"):
                layer.merge()
                layer.merged_adapters.clear()
                layer.reset_lora_parameters("default", True)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*dataloader is not resumable")
def test_weights_that_move_below_adapters_are_part_of_the_change(tmp_path) -> None:
    def watching() -> list[Any]:
        snapshot, taylor = GoldenSnapshot(every_n_steps=1, track_updates=True), TaylorDiff(orders=[1], n_samples=2)
        apart = GoldenSnapshot(every_n_steps=None, space="adapters", name="apart")
        return [snapshot, taylor, apart, TaylorDiff(n_samples=2, reset="each", every_n_steps=1, name="moving")]

    L.seed_everything(7, verbose=False)
    first = unloaded(Renewed().model)
    options = {"module": Renewed, "max_epochs": 1, "limit_train_batches": 5, "limit_val_batches": 0}
    plain = fit(tmp_path / "plain", **options)[2]
    callbacks = watching()
    _, module, watched = fit(tmp_path / "watched", callbacks, **options)
    assert differences(plain, watched) == []
    now, row = unloaded(module.model), last_row(callbacks[0])
    expected = weight_change(now, first)
    changed = {tensor["name"]: tensor["delta_norm"] for tensor in row["result"]["tensors"]}
    right = dict(zip(expected.names, expected.delta_norms, strict=True))
    assert changed == pytest.approx({name: right[name] for name in changed}, rel=1e-4)
    assert row["metrics"]["delta_norm"] == pytest.approx(expected.delta_norm, rel=1e-4)
    assert "base_layer.weight and 3 more changed although frozen" in row["result"]["notes"][0]
    batches = [next(iter(TokenData().probe_dataloader()))]
    along = taylor_diff(now, first, batches, orders=[1])
    told = last_row(callbacks[1])["metrics"]
    assert (told["base_loss"], told["first_order"]) == pytest.approx((along.base_loss, along.first_order), rel=1e-3)
    assert last_row(callbacks[2])["result"].get("notes", []) == []
    # A base that moves with the adapters.
    assert last_row(callbacks[3])["metrics"]["step_norm"] < told["step_norm"]

    # Killed after the first merge and resumed, it tells the same.
    saving = {**options, "enable_checkpointing": True}
    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path / "cut", [*watching(), kept], **{**saving, "limit_train_batches": 5})
    again = watching()
    _, module, _ = fit(tmp_path / "again", again, ckpt_path=tmp_path / "kept" / "step=3.ckpt", **options)
    assert (again[0].folder / "frozen.safetensors").is_file()
    row = last_row(again[0])
    assert "changed although frozen" in row["result"]["notes"][0]
    expected = weight_change(unloaded(module.model), first)
    assert row["metrics"]["delta_norm"] == pytest.approx(expected.delta_norm, rel=1e-4)


class Rescaled(Adapted):
    """Turns its adapters up in the middle, and when it goes on from there."""

    def turn_up(self) -> None:
        for layer in self.model.modules():
            if hasattr(layer, "merged_adapters"):
                layer.scaling["default"] = 3.0

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 2:
            self.turn_up()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.turn_up()

    def __init__(self) -> None:
        super().__init__()
        for name, parameter in self.model.named_parameters():
            # What the adapters come to at the start is not nothing.
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*dataloader is not resumable")
def test_the_change_is_from_what_the_adapters_came_to_as_they_were_scaled_at_the_start(tmp_path) -> None:
    def watching() -> list[Any]:
        moving = TaylorDiff(orders=[1], n_samples=2, reset="epoch", every_n_steps=4, name="moving")
        return [GoldenSnapshot(every_n_steps=1), TaylorDiff(orders=[1], n_samples=2), moving]

    L.seed_everything(7, verbose=False)
    first = unloaded(Rescaled().model)
    options = {"module": Rescaled, "max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0}
    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole = watching()
    module = fit(tmp_path / "whole", [*whole, kept], **options, enable_checkpointing=True)[1]
    again = watching()
    resumed = fit(tmp_path / "again", again, ckpt_path=tmp_path / "kept" / "step=3.ckpt", **options)[1]
    for model, (snapshot, taylor, moving) in ((module.model, whole), (resumed.model, again)):
        now = unloaded(model)
        along = taylor_diff(now, first, [next(iter(TokenData().probe_dataloader()))], orders=[1])
        row = last_row(snapshot)
        assert row["metrics"]["delta_norm"] == pytest.approx(weight_change(now, first).delta_norm, rel=1e-4)
        assert any("or their scaling are others than at the start in 4 layers" in it for it in row["result"]["notes"])
        for told in (last_row(taylor)["metrics"], last_row(moving)["metrics"]):
            found = told["base_loss"], told["first_order"], told["loss"]
            assert found == pytest.approx((along.base_loss, along.first_order, along.loss), rel=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_move_below_adapters_and_are_not_kept_are_refused_by_name(tmp_path) -> None:
    options = {"module": Renewed, "max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0}
    snapshot = GoldenSnapshot(frozen=False, on_error="warn", every_n_steps=1)
    apart = GoldenSnapshot(every_n_steps=None, space="adapters", name="apart", frozen=False)
    with pytest.warns(UserWarning, match=r"base_layer.weight and 3 more, which adapters lie on, changed .*frozen=True"):
        fit(tmp_path, [snapshot, apart], **options)
    assert (last_row(snapshot)["step"], last_row(apart)["step"]) == (2, 3)


@pytest.mark.parametrize("kept", [None, False])
def test_a_checkpoint_is_compared_with_what_adapters_lay_on_before_any_analysis_saw_it_move(tmp_path, kept) -> None:
    L.seed_everything(7, verbose=False)
    first = unloaded(Renewed().model)
    options = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0, "enable_checkpointing": True}
    snapshot = GoldenSnapshot(every_n_steps=None, at=("start",), frozen=kept)
    saver = ModelCheckpoint(tmp_path / "run" / "checkpoints", every_n_train_steps=3, filename="{step}")
    _, trained, _ = fit(tmp_path, [snapshot, saver], module=Renewed, **options)
    module, saved = Renewed(), read_saved(tmp_path / "run" / "checkpoints" / "step=3.ckpt")
    base = find_base(None, saved, module, module.model, CausalLMObjective(), "merged")
    saved.load_into(module, module.model)
    if kept is False:
        assert follow_frozen(saved, base, module.model, "adapters", "this") == []
        with pytest.raises(AdapterError, match=r"^this: .*, which adapters lie on, changed although frozen"):
            follow_frozen(saved, base, module.model, "merged", "this")
        return
    (note,) = follow_frozen(saved, base, module.model, "merged", "this")
    assert "changed although frozen, below adapters: the change is from the values at the start" in note
    found, expected = weight_change(module.model, base.values), weight_change(unloaded(trained.model), first)
    assert found.delta_norm == pytest.approx(expected.delta_norm, rel=1e-4)


def test_what_moves_beside_the_training_is_told(tmp_path) -> None:
    class Taught(Finetune):
        def __init__(self) -> None:
            super().__init__()
            self.model.teacher = torch.nn.Linear(2, 2).requires_grad_(False)
            self.model.norm = torch.nn.BatchNorm1d(2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.model.teacher.weight.mul_(0.9)
            return super().training_step(batch, batch_idx) + 0 * self.model.norm(torch.rand(4, 2)).sum()

    snapshot = GoldenSnapshot(every_n_steps=None)
    fit(tmp_path, [snapshot], module=Taught, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    assert last_row(snapshot)["result"]["notes"] == [
        "norm.running_mean and 2 more changed although not trained: no part of the change, and the base has it as it is"
    ]


def test_a_mask_file_of_adapters_is_no_mask_of_merged_weights_and_refused_before_the_first_step(tmp_path) -> None:
    model = Adapted().model
    space = ParameterSpace.of(model)
    ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in zip(space.names, space.shapes, strict=True)}
    path = ParameterMask(space, ones).save(tmp_path / "adapters.safetensors", model=model)
    watcher = ChangeAttribution(n_samples=2, shares=[], masks={"adapters": str(path)})
    with pytest.raises(StoreError, match="which is no merged weight of the model's adapters"):
        fit(tmp_path / "run", [GoldenSnapshot(), watcher], module=Adapted, max_steps=1)
