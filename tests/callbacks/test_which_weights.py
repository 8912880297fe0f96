"""Which weights and which parameters are analysed, and when: whatever is swapped, unfrozen, counted or used again."""

from __future__ import annotations

import json
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

from lightning_goldy.analysis.heads import Scoring
from lightning_goldy.callbacks import (
    AttentionTracker,
    GoldenParameters,
    GoldenSnapshot,
    HeadPlasticity,
    ParameterDistribution,
    TaylorDiff,
)
from lightning_goldy.callbacks.engine.weights import _CACHED, _PLACE, _bits, _checksum
from lightning_goldy.core import load_vectors
from lightning_goldy.core.isolation import isolated_rng
from lightning_goldy.core.naming import bare_name
from tests.callbacks.training import Finetune, TokenData, Tokens, differences, fit
from tests.references.models import build

pytestmark = pytest.mark.filterwarnings("ignore:.*without a model", "ignore:.*no last checkpoint")


def rows(callback) -> list[dict]:
    path = callback.folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def told(callback) -> list[tuple]:
    return [(row["step"], row["trigger"], row["weights"]) for row in rows(callback)]


def start() -> dict[str, torch.Tensor]:
    L.seed_everything(7, verbose=False)
    return {name: value.detach().clone() for name, value in Finetune().model.named_parameters()}


def distance(values, before) -> float:
    return sum(float((values[name].detach() - value).double().norm() ** 2) for name, value in before.items()) ** 0.5


class SwapWhileValidating(L.Callback):
    """Adds one to every weight for the validation, and takes it away only after checkpoints may have been written."""

    def on_validation_start(self, trainer, pl_module):
        self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.data.add_(1.0)

    def on_train_epoch_end(self, trainer, pl_module):
        for parameter, value in zip(pl_module.parameters(), self.kept, strict=True):
            parameter.data.copy_(value)


class SavesDoubled(Finetune):
    """A module whose checkpoints hold twice its weights."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: 2 * value for name, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("first", [True, False], ids=["averaging first", "analysis first"])
def test_a_checkpoint_and_the_end_have_the_averaged_weights(tmp_path, first):
    before = start()
    snapshot = GoldenSnapshot(every_n_steps=8, at=("checkpoint", "end"))
    golden = GoldenParameters(n_samples=2, every_n_steps=8, at=("end",))
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    averaging = EMAWeightAveraging(decay=0.9)
    order = [averaging, snapshot, golden] if first else [snapshot, golden, averaging]
    _, module, _ = fit(tmp_path, [*order, saver], enable_checkpointing=True)
    found = {(row["step"], row["weights"]): row for row in rows(snapshot)}
    assert list(found) == [(8, "training"), (8, "averaged"), (16, "training"), (16, "averaged")]
    for step in (8, 16):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        for key, weights in (("state_dict", "averaged"), ("current_model_state", "training")):
            saved = {name.removeprefix("model."): value for name, value in checkpoint[key].items()}
            assert found[step, weights]["metrics"]["delta_norm"] == pytest.approx(distance(saved, before), rel=1e-6)
    assert distance(dict(module.model.named_parameters()), before) == pytest.approx(
        found[16, "averaged"]["metrics"]["delta_norm"], rel=1e-6
    )
    assert found[8, "averaged"]["metrics"]["update_cosine"] is None
    # The mask of the averaged weights does not take the place of the training's file.
    assert told(golden)[-2:] == [(16, "step", "training"), (16, "end", "averaged")]
    files = [row["files"]["mask"] for row in rows(golden)]
    assert len(set(files)) == len(files) == 3
    assert rows(golden)[-1]["metrics"]["jaccard_previous"] is None


def test_averaging_is_undisturbed_and_stochastic_averaging_is_told(tmp_path):
    def callbacks():
        return [EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, every_n_epochs=1)]

    plain = fit(tmp_path / "plain", callbacks(), enable_checkpointing=True)[2]
    watchers = [GoldenParameters(n_samples=2, every_n_steps=3, at=("checkpoint", "end"))]
    watched = fit(tmp_path / "watched", [*watchers, *callbacks()], enable_checkpointing=True)[2]
    assert differences(plain, watched) == []
    before, snapshot = start(), GoldenSnapshot(every_n_epochs=1, every_n_steps=None)
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    _, module, _ = fit(tmp_path / "swa", [snapshot, averaging], max_epochs=3)
    # The module has a batch norm, for which the averaging makes an epoch of its own, with the averages.
    assert [entry[2] for entry in told(snapshot)] == ["training", "training", "training", "averaged"]
    assert rows(snapshot)[-1]["metrics"]["delta_norm"] == pytest.approx(
        distance(dict(module.model.named_parameters()), before), rel=1e-6
    )


def test_weights_that_others_put_in_place_are_those_in_the_file(tmp_path):
    before = start()
    for name, module, swaps in (("module", SavesDoubled, []), ("callback", Finetune, [SwapWhileValidating()])):
        snapshot = GoldenSnapshot(every_n_steps=None, at=["checkpoint"])
        saver = ModelCheckpoint(
            tmp_path / name, filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=False
        )
        fit(tmp_path / f"{name}-run", [*swaps, snapshot, saver], module=module, enable_checkpointing=True, max_epochs=1,
            num_sanity_val_steps=0)  # fmt: skip
        saved = torch.load(tmp_path / name / "step=8.ckpt", weights_only=True)["state_dict"]
        (row,) = rows(snapshot)
        assert (row["step"], row["weights"]) == (8, "replaced")
        values = {key.removeprefix("model."): value for key, value in saved.items()}
        assert row["metrics"]["delta_norm"] == pytest.approx(distance(values, before), rel=1e-6)


@pytest.mark.filterwarnings("ignore:unable does not run at the checkpoint of a run that has failed")
def test_checkpoints_of_weights_only_by_hand_and_on_an_exception_count(tmp_path):
    class ByHand(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "hand.ckpt", weights_only=True)

    snapshot = GoldenSnapshot(every_n_steps=None, at=["checkpoint"])
    saver = ModelCheckpoint(
        tmp_path / "w", save_weights_only=True, every_n_train_steps=3, save_top_k=-1, save_last=True
    )
    fit(tmp_path, [snapshot, ByHand(), saver], max_epochs=1, enable_checkpointing=True)
    assert told(snapshot) == [
        (3, "checkpoint", "training"),
        (5, "checkpoint", "training"),
        (6, "checkpoint", "training"),
    ]

    class Fails(Finetune):
        def training_step(self, batch, batch_idx):
            if batch_idx == 6:
                raise ArithmeticError("of the user")
            return super().training_step(batch, batch_idx)

    class Unable(GoldenSnapshot):
        def compute(self, context):
            raise ValueError("of the analysis")

    # An analysis costs no checkpoint: that of a run which has failed is written without it.
    with pytest.raises(ArithmeticError, match="of the user"):
        fit(
            tmp_path / "e",
            [Unable(every_n_steps=None, at=["checkpoint"]), OnExceptionCheckpoint(tmp_path)],
            enable_checkpointing=True,
            module=Fails,
        )
    assert (tmp_path / "on_exception.ckpt").is_file()


class Unfreeze(BaseFinetuning):
    def __init__(self, refreeze: bool = False):
        super().__init__()
        self.refreeze = refreeze

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.transformer.h)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.transformer.h, optimizer, lr=1e-2)
        if epoch == 2 and self.refreeze:
            self.freeze(pl_module.model.transformer.wte)


class OfTrainable(Finetune):
    def configure_optimizers(self):
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=1e-2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("refreeze", [False, True])
def test_what_becomes_trainable_belongs_to_the_change(tmp_path, refreeze):
    before = start()
    watchers = [
        GoldenSnapshot(every_n_steps=4),
        AttentionTracker(n_samples=2),
        ParameterDistribution(),
        GoldenParameters(n_samples=2, every_n_epochs=1, at=()),
        TaylorDiff([1], n_samples=2, function_space=False, every_n_epochs=1),
        TaylorDiff([1], n_samples=2, function_space=False, every_n_epochs=1, reset="each", name="moving"),
    ]
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_epochs=1, save_top_k=-1)
    options = {"module": OfTrainable, "max_epochs": 3, "enable_checkpointing": True}
    _, module, found = fit(tmp_path, [Unfreeze(refreeze), *watchers, saver], **options)
    assert (
        differences(
            fit(tmp_path / "plain", [Unfreeze(refreeze)], **{**options, "enable_checkpointing": False})[2], found
        )
        == []
    )
    true = distance(dict(module.model.named_parameters()), before)
    assert rows(watchers[0])[-1]["metrics"]["delta_norm"] == pytest.approx(true, rel=1e-6)
    assert {row["name"] for row in rows(watchers[2])[-1]["result"]["tensors"]} == set(before)
    assert rows(watchers[1])[-1]["metrics"]["drift"] > 1e-6
    golden = rows(watchers[3])
    assert "jaccard_previous is over the" in golden[1]["headline"]
    assert "became trainable at step 8" in golden[1]["headline"]
    assert 0 <= golden[1]["metrics"]["jaccard_previous"] <= 1
    assert "notes" not in golden[2]["result"]
    # Earlier checkpoints still know the base as it was, later ones all of it.
    for step in (8, 16):
        again = GoldenSnapshot(every_n_epochs=1)
        module = OfTrainable if step == 8 else Finetune
        checkpoint = tmp_path / "ckpt" / f"step={step}.ckpt"
        fit(
            tmp_path / f"again{step}",
            [Unfreeze(refreeze), again],
            module=OfTrainable,
            max_epochs=3,
            ckpt_path=checkpoint,
        )
        assert all(torch.equal(again.base.vector(Finetune().model)[name], value) for name, value in before.items())


class Critic(Finetune):
    """Three steps of one optimizer per batch and one of another at every fourth batch."""

    counts = (3, 4)

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        parameters = list(self.parameters())
        return [torch.optim.SGD(part, lr=0.1) for part in (parameters[:5], parameters[5:])]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(self.counts[0]):
            self.zero_grad()
            self.manual_backward(self.model(**batch).loss)
            first.step()
        if batch_idx % self.counts[1] == 0:
            second.step()


class Pair(Critic):
    counts = (1, 1)


def test_schedules_fire_when_a_multiple_is_crossed(tmp_path):
    snapshot = GoldenSnapshot(every_n_steps=10, at=())
    trainer, _, _ = fit(tmp_path / "critic", [snapshot], module=Critic, max_epochs=1)
    assert [row["step"] for row in rows(snapshot)] == [10, 20]
    assert trainer.global_step == 26
    coarse = GoldenSnapshot(every_n_steps=2, at=())
    fit(tmp_path / "coarse", [coarse], module=Critic, max_epochs=1)
    assert [row["step"] for row in rows(coarse)] == [4, 7, 10, 13, 17, 20, 23, 26]


def test_fractions_of_plasticity_are_of_the_whole_training_with_two_optimizers(tmp_path):
    heads = HeadPlasticity(pruning_level=0.25, scoring=Scoring(n_samples=2))
    fit(tmp_path, [heads], module=Pair)
    assert rows(heads)[-1]["step"] == 32
    assert heads.plasticity.plan.last_step == 16
    assert heads.plasticity.state.phase == "done"


def test_a_callback_that_is_used_again_starts_anew_and_one_that_goes_on_does_not(tmp_path):
    callbacks = [GoldenSnapshot(every_n_steps=None, at=("start", "end")), GoldenParameters(n_samples=2, at=("end",))]
    for name in ("first", "second"):
        trainer, module, _ = fit(tmp_path / name, callbacks, max_epochs=1)
        assert [row["step"] for row in rows(callbacks[0])] == [0, 8]
        base, _ = load_vectors(tmp_path / name / "run" / "goldy" / "golden_snapshot" / "base.safetensors")
        assert all(torch.equal(base[key], value) for key, value in start().items())
        assert rows(callbacks[1])[-1]["metrics"]["jaccard_previous"] is None
    # A validation between two fits of one trainer changes nothing; the second fit goes on.
    trainer.validate(module, datamodule=TokenData(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=TokenData())
    assert [row["step"] for row in rows(callbacks[0])] == [0, 8, 16]
    assert rows(callbacks[1])[-1]["metrics"]["jaccard_previous"] is not None
    # Another model in the same trainer is another run.
    trainer.fit_loop.max_epochs = 3
    L.seed_everything(8, verbose=False)
    other = Finetune()
    other_start = {name: value.detach().clone() for name, value in other.model.named_parameters()}
    trainer.fit(other, datamodule=TokenData())
    kept = callbacks[0].base.vector(other.model)
    assert all(torch.equal(kept[name], value) for name, value in other_start.items())


def test_a_search_before_the_training_is_no_resume(tmp_path):
    """Lightning's takes back a checkpoint from before any training; callbacks travel to spawned processes after one."""
    before = start()
    callbacks = [GoldenSnapshot(every_n_steps=4), GoldenParameters(n_samples=2, every_n_steps=8, at=["start"])]
    trainer = L.Trainer(
        default_root_dir=tmp_path, callbacks=callbacks, max_epochs=1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Finetune()
    module.model.load_state_dict(before, strict=False)
    Tuner(trainer).lr_find(module, datamodule=TokenData(), num_training=3, update_attr=False)
    trainer.fit(module, datamodule=TokenData())
    assert [row["step"] for row in rows(callbacks[0])] == [4, 8]
    assert [row["step"] for row in rows(callbacks[1])] == [0, 8]
    moved = distance(dict(module.model.named_parameters()), before)
    assert rows(callbacks[0])[-1]["metrics"]["delta_norm"] == pytest.approx(moved, rel=1e-5)
    assert [pickle.loads(pickle.dumps(callback)).name for callback in callbacks] == [each.name for each in callbacks]


def test_a_validation_of_a_checkpoint_is_no_resume(tmp_path):
    snapshot = GoldenSnapshot(every_n_epochs=1, every_n_steps=None)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_epochs=1, save_top_k=-1)
    trainer, module, _ = fit(tmp_path, [snapshot, saver], enable_checkpointing=True)
    trainer.validate(module, datamodule=TokenData(), ckpt_path=tmp_path / "ckpt" / "step=8.ckpt", verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=TokenData())
    assert [row["step"] for row in rows(snapshot)] == [8, 16, 24]


def test_a_batch_norm_alone_does_not_make_weights_others(tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

        def training_step(self, batch, batch_idx):
            return self.model(batch).sum()

        def train_dataloader(self):
            return DataLoader(torch.randn(8, 2), batch_size=2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    snapshot = GoldenSnapshot(every_n_steps=2, at=("checkpoint", "end"))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[snapshot, saver], **quiet).fit(Plain())
    assert [entry[0] for entry in told(snapshot)] == [1, 2, 3, 4]
    assert {entry[2] for entry in told(snapshot)} == {"training"}


def test_a_base_that_moves_stays_with_the_training(tmp_path):
    moving = TaylorDiff(
        [1], n_samples=2, function_space=False, reset="each", every_n_steps=8, at=("checkpoint", "end"), by=None
    )
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    fit(tmp_path, [EMAWeightAveraging(decay=0.9), moving, saver], enable_checkpointing=True)
    found = [(row["step"], row["weights"], row["result"]["base_step"]) for row in rows(moving)]
    assert found == [(8, "training", 0), (8, "averaged", 8), (16, "training", 8), (16, "averaged", 16)]
    saved = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["current_model_state"]
    base, _ = load_vectors(moving.folder / "base-step=00000016.safetensors")
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in base.items())


@pytest.mark.parametrize("first", [True, False])
def test_a_base_of_an_epoch_is_of_the_training(tmp_path, first):
    swap, moving = SwapWhileValidating(), TaylorDiff([1], n_samples=2, reset="epoch", every_n_epochs=1, at=())
    _, module, _ = fit(tmp_path, [swap, moving] if first else [moving, swap], num_sanity_val_steps=0)
    found = [(row["step"], row["weights"], row["result"]["base_step"]) for row in rows(moving)]
    if first:
        assert found == [(8, "training", 0), (16, "training", 8)]
        base = moving._base.vector(module.model)
        assert all(torch.equal(base[name], value.detach()) for name, value in module.model.named_parameters())
        return
    # The weights are still the validation's as this callback sees the epoch end.
    assert found == [(8, "replaced", 0), (16, "replaced", 0)]
    assert rows(moving)[1]["result"]["notes"] == [
        "the base stayed at step 0, for epoch 0 ended with other weights than those of the training"
    ]


class Overflowing(Finetune):
    """Trains in half precision with losses that are scaled, of which those of some batches overflow."""

    overflows = (1, 4)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in self.overflows else loss


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**4))


def watchers() -> list:
    return [
        GoldenSnapshot(every_n_steps=1),
        AttentionTracker(n_samples=2, every_n_steps=3),
        ParameterDistribution(every_n_steps=3),
        GoldenParameters(n_samples=2, every_n_steps=3),
        TaylorDiff([1], n_samples=2, function_space=False, every_n_steps=3, reset="each", by=None),
    ]


def test_steps_that_a_gradient_scaler_skips_leave_the_weights_where_they_were(tmp_path):
    options = {"module": Overflowing, "max_epochs": 1}
    plain, looking = fit(tmp_path / "plain", [], plugins=[half()], **options), watchers()
    trainer, _, found = fit(tmp_path / "watched", looking, plugins=[half()], **options)
    # A loss that is not finite stays out of the comparison by its number.
    assert differences(plain[2], found) == []
    norms = {row["step"]: row["metrics"]["delta_norm"] for row in rows(looking[0])}
    assert list(norms) == list(range(1, 9))
    assert [step for step in norms if step > 1 and norms[step] == norms[step - 1]] == [2, 5]
    assert {row["weights"] for row in rows(looking[0])} == {"training"}
    assert plain[0].precision_plugin.scaler.state_dict() == trainer.precision_plugin.scaler.state_dict()


def test_accumulated_and_clipped_gradients_are_left_alone(tmp_path):
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "val_check_interval": 2}
    looking = watchers()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    plain = fit(tmp_path / "plain", [], **options)[2]
    watched = fit(tmp_path / "watched", [*looking, saver], enable_checkpointing=True, **options)
    assert differences(plain, watched[2]) == []
    # Three steps for the eight batches of an epoch, the last one with two.
    assert [row["step"] for row in rows(looking[0])] == list(range(1, 7))
    for row in rows(looking[0]):
        if (tmp_path / f"step={row['step']}.ckpt").is_file():
            saved = torch.load(tmp_path / f"step={row['step']}.ckpt", weights_only=True)["state_dict"]
            values = {name.removeprefix("model."): value for name, value in saved.items()}
            assert row["metrics"]["delta_norm"] == pytest.approx(distance(values, start()), rel=1e-6)
    assert [row["step"] for row in rows(looking[3])] == [3, 6]


class Adapted(Finetune):
    def __init__(self):
        super().__init__()
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        self.model = get_peft_model(self.model, config)


class AdaptedLater(Finetune):
    """Trains everything for one epoch, and adapters from then on, in the layers or around the model."""

    around = False

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
            with isolated_rng():
                if self.around:
                    self.model = get_peft_model(self.model, config)
                else:
                    inject_adapter_in_model(config, self.model)
            adapters = {name: value for name, value in self.model.named_parameters() if "lora" in name}
            self.trainer.optimizers[0].add_param_group({"params": list(adapters.values())})
            self.added = {name: value.detach().clone() for name, value in adapters.items()}


class AdaptedAround(AdaptedLater):
    around = True


@pytest.mark.parametrize("module", [AdaptedLater, AdaptedAround])
def test_layers_that_are_wrapped_in_the_middle_of_a_run_stay_what_they_were(tmp_path, module):
    before = start()
    options = {"n_samples": 2, "function_space": False, "by": None, "every_n_epochs": 1, "at": (), "space": "adapters"}
    snapshot, taylor = (
        GoldenSnapshot(every_n_steps=None, every_n_epochs=1, at=(), space="adapters"),
        TaylorDiff([1], **options),
    )
    trained = fit(tmp_path, [snapshot, taylor], module=module, max_epochs=2, num_sanity_val_steps=0)[1]
    now = dict(trained.model.named_parameters())
    bare = {bare_name(name): value for name, value in now.items()}
    moved = (distance(bare, before) ** 2 + distance(now, trained.added) ** 2) ** 0.5
    assert distance(now, trained.added) > 0
    assert rows(snapshot)[1]["metrics"]["delta_norm"] == pytest.approx(moved, rel=1e-5)
    assert rows(taylor)[1]["metrics"]["step_norm"] == pytest.approx(moved, rel=1e-5)


class MergeWhileValidating(L.Callback):
    """Validates the merged model, as one that is to be deployed, and unmerges it exactly."""

    def on_validation_start(self, trainer, pl_module):
        self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]
        pl_module.model.merge_adapter()

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.model.unmerge_adapter()
        for parameter, value in zip(pl_module.parameters(), self.kept, strict=True):
            parameter.data.copy_(value)


def test_merged_adapters_are_analysed_apart(tmp_path):
    def looking():
        options = {"n_samples": 2, "function_space": False, "by": None, "reset": "epoch", "every_n_epochs": 1, "at": ()}
        return [GoldenParameters(n_samples=2, every_n_epochs=1, at=()), TaylorDiff([1], **options)]

    options = {"module": Adapted, "max_epochs": 1, "num_sanity_val_steps": 0}
    apart, merged, merging = looking(), looking(), MergeWhileValidating()
    plain = fit(tmp_path / "plain", apart, **options)[2]
    # Before the callback that takes the adapters apart again at the end of an epoch.
    found = fit(tmp_path / "merged", [*merged, merging], **options)[2]
    assert differences({**plain, "losses": []}, {**found, "losses": []}) == []
    for one, other in zip(apart, merged, strict=True):
        (expected,), (row,) = rows(one), rows(other)
        assert row["result"]["notes"] == ["the adapters that are merged in 2 layers were taken apart"]
        assert "notes" not in expected["result"]
        for name in (name for name, value in expected["metrics"].items() if value is not None):
            assert row["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-3, abs=1e-6), name
    masks = [load_vectors(one.folder / rows(one)[0]["files"]["mask"])[0] for one in (apart[0], merged[0])]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


class WithTexts(TokenData):
    """Batches that hold more than the model takes, and several loaders to validate with."""

    probe_dataloader = None

    def rows(self, n_samples, seed):
        rows = [{**Tokens(n_samples, seed)[index], "text": f"row {index}"} for index in range(n_samples)]
        return DataLoader(rows, batch_size=2)

    def train_dataloader(self):
        return self.rows(16, 1)

    def val_dataloader(self):
        return [self.rows(1, 2), self.rows(3, 3)]


class Odd(Finetune):
    """The model lies deeper, beside a frozen one that it learns from; texts are taken out on the way to the device."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"student": self.model, "teacher": build("gpt2").requires_grad_(False)})
        del self.model

    @property
    def model(self):
        return self.inner["student"]

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {name: value for name, value in batch.items() if name != "text"}

    def training_step(self, batch, batch_idx):
        apart = self.inner["teacher"](**batch).logits - self.model(**batch).logits
        return super().training_step(batch, batch_idx) + 0.1 * apart.pow(2).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`")
def test_an_odd_set_up_is_looked_at_and_left_alone(tmp_path):
    options = {"module": Odd, "max_epochs": 1}
    looking = watchers()
    for callback in looking[1::2]:
        callback.model_attribute = "inner.student"
    plain = fit(tmp_path / "plain", [], data=WithTexts(), **options)[2]
    _, module, found = fit(tmp_path / "watched", looking, data=WithTexts(), **options)
    assert differences(plain, found) == []
    assert all(rows(callback)[-1]["step"] == 8 for callback in looking)
    assert {name for name, _ in module.model.named_parameters()} == set(looking[0].base.space)


def test_averages_of_what_was_unfrozen_on_the_way(tmp_path):
    before, looking = start(), watchers()
    _, module, _ = fit(tmp_path, [Unfreeze(), EMAWeightAveraging(decay=0.9), *looking], module=OfTrainable)
    row = rows(looking[0])[-1]
    assert (row["step"], row["trigger"], row["weights"]) == (16, "end", "averaged")
    true = distance(dict(module.model.named_parameters()), before)
    assert row["metrics"]["delta_norm"] == pytest.approx(true, rel=1e-6)
    assert all(rows(callback)[-1]["weights"] == "averaged" for callback in looking)


class Pruned(Finetune):
    """Prunes a layer in the middle of the training, and gives another one a norm of its own."""

    def on_train_batch_end(self, *args):
        if self.global_step == 2:
            block = self.model.transformer.h[0]
            prune.l1_unstructured(block.mlp.c_fc, "weight", 0.5)
            parametrizations.weight_norm(block.mlp.c_proj, "weight")
        if self.global_step == 3:
            prune.l1_unstructured(self.model.transformer.h[0].mlp.c_fc, "weight", 0.2)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_parameters_that_come_to_be_computed_of_others_are_what_they_come_to(tmp_path):
    def watching():
        return [GoldenSnapshot(every_n_steps=1, track_updates=True), TaylorDiff(orders=[1], n_samples=2), *masks()]

    def masks():
        return [GoldenParameters(n_samples=2, quorum=0.5), ParameterDistribution()]

    options = {"module": Pruned, "max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0}
    before, plain, callbacks = start(), fit(tmp_path / "plain", **options)[2], watching()
    _, module, watched = fit(tmp_path / "watched", callbacks, **options)
    assert differences(plain, watched) == []
    effective = {name: value for name, value in module.model.named_parameters() if name in before}
    mlp = module.model.transformer.h[0].mlp
    # What a pruned layer has as its weight is that of its last forward pass.
    values = {"c_fc": mlp.c_fc.weight_orig * mlp.c_fc.weight_mask, "c_proj": mlp.c_proj.weight}
    computed = {f"transformer.h.0.mlp.{name}.weight": value for name, value in values.items()}
    assert not set(computed) & set(effective)
    row = rows(callbacks[0])[-1]
    assert row["metrics"]["delta_norm"] == pytest.approx(distance({**effective, **computed}, before), rel=1e-6)
    assert "computed of other parameters (parametrize, prune)" in row["result"]["notes"][-1]
    assert rows(callbacks[1])[-1]["metrics"]["step_norm"] == pytest.approx(row["metrics"]["delta_norm"], rel=1e-6)
    assert all(len(rows(callback)) == 1 for callback in callbacks[2:])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:n_samples=16")
def test_who_changes_parameters_refuses_those_that_are_computed_of_others(tmp_path):
    plasticity = HeadPlasticity(every_n_steps=3, on_error="warn")
    with pytest.warns(UserWarning, match=r"head_plasticity changes parameters, and transformer.h.0.mlp.c_\w+.w"):
        fit(tmp_path, [plasticity], module=Pruned, max_epochs=1, limit_train_batches=4, limit_val_batches=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mark_is_the_sum_of_all_bits_and_one_in_which_places_count(dtype):
    values = torch.randn(2 * _CACHED + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    bits = _bits(values).tolist()
    total, placed = sum(bits), sum(bit * (place * _PLACE + 1) for place, bit in enumerate(bits))
    found = [int(part) % (1 << 64) for part in _checksum(values)]
    assert found == [total % (1 << 64), placed % (1 << 64)]
    assert torch.equal(values, before)
