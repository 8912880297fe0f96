"""A run scores first and trains only what it marked; resumed in the middle it ends as if it had never stopped."""

from __future__ import annotations

import math

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_goldy import GoldyModule, MaskedAdamW, ParameterMask, ParameterSpace
from lightning_goldy.callbacks import GoldenParameters, GoldenSnapshot, ReverseGoldenParameters
from lightning_goldy.core import StoreError
from lightning_goldy.optim import OptimizerOptions, build_optimizer
from lightning_goldy.training.module import MASK_CALLBACKS, MaskedTraining
from tests.callbacks.training import TokenData, Tokens
from tests.references.common import paired
from tests.references.models import build

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using", "ignore:.*exists and is not empty", "ignore:Found .* in eval mode"
)

EPOCH = 8  # optimizer steps: 16 samples in batches of 2
GOLDEN = {"name": "masked_adamw", "mask": "golden", "learning_rate": 1e-2, "weight_decay": 0.1}


class InOrder(TokenData):
    """The same rows in the same order in every epoch, so that no random state has to be resumed."""

    def train_dataloader(self):
        return DataLoader(Tokens(self.n_train, 1), batch_size=2)


def scoring(**options):
    return GoldenParameters(n_samples=3, quorum=0.5, at=("start",), **options)


def train(folder, optimizer, callbacks=(), *, ckpt_path=None, schedule="linear", **options):
    L.seed_everything(7, verbose=False)
    module = GoldyModule(build("gpt2").eval(), optimizer=optimizer, schedule={"name": schedule, "final_fraction": 0.0})
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )
    trainer.fit(module, datamodule=InOrder(), ckpt_path=ckpt_path)
    return trainer, module.model


def start():
    return dict(build("gpt2").named_parameters())


def moved(model) -> dict[str, torch.Tensor]:
    before = start()
    return {name: parameter.detach() != before[name] for name, parameter in model.named_parameters()}


def checkpoints(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)


def test_the_run_scores_first_and_then_trains_only_those(tmp_path):
    scores = scoring(top_k_percent=5)
    _, model = train(tmp_path, GOLDEN, [scores])
    mask = ParameterMask.load(scores.folder / "mask-step=00000000.safetensors", model)
    assert 0.001 < mask.density < 0.2
    changed = moved(model)
    inside = sum(int((changed[name] & mask[name]).sum()) for name in mask)
    assert sum(int((changed[name] & ~mask[name]).sum()) for name in mask) == 0
    # Golden elements have gradients on the probe, so all but a few move.
    assert inside > 0.9 * mask.total


def test_rates_on_both_sides_and_schedules(tmp_path):
    options = {**GOLDEN, "lr_outside": 1e-4}
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.callback_metrics["train/learning_rate"].item())

    trainer, model = train(tmp_path, options, [scoring(), Watch()])
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, MaskedAdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert seen == pytest.approx([1e-2 * (1 - step / (2 * EPOCH)) for step in range(2 * EPOCH)])
    mask, before = optimizer.mask, start()
    assert mask is not None
    change = {name: (parameter.detach() - before[name]).abs() for name, parameter in model.named_parameters()}
    means = [torch.cat([change[name][side[name]] for name in side]).mean() for side in (mask, ~mask)]
    assert means[0] > 20 * means[1] > 0


@pytest.mark.parametrize("lr_outside", [0.0, 1e-3])
def test_equal_files_and_callbacks_train_alike(tmp_path, lr_outside):
    scores = scoring()
    _, first = train(tmp_path, {**GOLDEN, "lr_outside": lr_outside}, [scores])
    path = str(scores.folder / "mask-step=00000000.safetensors")
    _, second = train(tmp_path, {**GOLDEN, "mask": path, "lr_outside": lr_outside})
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_equal_rates_train_as_adamw_does(tmp_path):
    path = ParameterMask.random(ParameterSpace.of(build("gpt2")), 5).save(tmp_path / "m", model="GPT2LMHeadModel")
    options = {"learning_rate": 1e-2, "weight_decay": 0.1}
    _, plain = train(tmp_path, options)
    _, masked = train(tmp_path, {**options, "name": "masked_adamw", "mask": str(path), "lr_outside": 1e-2})
    assert all(map(torch.equal, plain.parameters(), masked.parameters()))


@paired(
    {
        "lr_outside": {"still": 0.0, "slow": 1e-3},
        "stop": {"stopped at the checkpoint": EPOCH, "trained past it": EPOCH + 3},
    },
    strength=1,
)
def test_resumed_equals_uninterrupted(tmp_path, lr_outside, stop):
    options = {**GOLDEN, "lr_outside": lr_outside}

    def callbacks(name):
        return [scoring(), checkpoints(tmp_path / name)]

    whole, expected = train(tmp_path / "whole", options, callbacks("a"), max_epochs=3, enable_checkpointing=True)
    # The schedule is that of three epochs, so the run is stopped from outside.
    stopping = Stop(stop)
    train(tmp_path / "first", options, [*callbacks("b"), stopping], max_epochs=3, enable_checkpointing=True)
    again, found = train(
        tmp_path / "second",
        options,
        callbacks("b"),
        max_epochs=3,
        enable_checkpointing=True,
        ckpt_path=tmp_path / "b" / f"step={EPOCH}.ckpt",
    )
    assert again.global_step == whole.global_step == 3 * EPOCH
    assert all(map(torch.equal, expected.parameters(), found.parameters()))
    for one, other in zip(whole.optimizers[0].state.values(), again.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


class Stop(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.should_stop = True


def test_a_checkpoint_holds_the_mask_packed_and_loads_without_pickle(tmp_path):
    trainer, _ = train(tmp_path, GOLDEN, [scoring(), checkpoints(tmp_path / "c")], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "c" / f"step={EPOCH}.ckpt", weights_only=True)
    held = checkpoint["goldy_mask"]
    assert held.keys() == trainer.optimizers[0].mask.keys()
    assert sum(each["packed"].nbytes for each in held.values()) < trainer.optimizers[0].mask.space.numel / 4
    assert checkpoint["hyper_parameters"]["optimizer"]["mask"] == "golden"
    loaded = GoldyModule.load_from_checkpoint(tmp_path / "c" / f"step={EPOCH}.ckpt", model=build("gpt2"))
    assert loaded.optimizer_options.mask == "golden"


def test_a_resume_with_another_file_is_refused(tmp_path):
    space = ParameterSpace.of(build("gpt2"))
    paths = [ParameterMask.random(space, 5, seed=s).save(tmp_path / f"{s}", model="GPT2LMHeadModel") for s in (0, 1)]
    options = [{**GOLDEN, "mask": str(path)} for path in paths]
    train(tmp_path, options[0], [checkpoints(tmp_path / "c")], enable_checkpointing=True)
    last = tmp_path / "c" / f"step={EPOCH}.ckpt"
    with pytest.raises(ValueError, match=r"mask in .*1 is not the one that the checkpoint was trained with"):
        train(tmp_path, options[1], ckpt_path=last)
    train(tmp_path, options[0], ckpt_path=last)


def test_the_mask_of_an_earlier_look_is_forgotten(tmp_path):
    training = MaskedTraining(OptimizerOptions(name="masked_adamw", mask="golden"))
    training.note({"goldy_mask": {"weight": {}}})
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[scoring()], default_root_dir=tmp_path)
    training.check(trainer)
    assert training._noted is None


@pytest.mark.parametrize(
    ("mask", "callbacks", "error", "message"),
    [
        ("golden", [], ValueError, "needs the callback GoldenParameters; the trainer has"),
        ("reverse_golden", [scoring()], ValueError, "needs the callback ReverseGoldenParameters"),
        ("golden", [GoldenParameters(n_samples=3)], ValueError, r"one GoldenParameters with at=\['start'.*0 of 1"),
        ("golden", [scoring(name="a"), scoring(name="b")], ValueError, "2 of 2"),
        ("goldn", [scoring()], StoreError, "no such file, nor a callback's name; did you mean 'golden'"),
    ],
    ids=["no callback", "another callback", "too late", "two of them", "misspelt"],
)
def test_a_source_that_will_have_no_mask_is_refused_before_training(tmp_path, mask, callbacks, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path, {**GOLDEN, "mask": mask}, callbacks)


def test_a_file_of_values_is_refused_before_training(tmp_path):
    snapshot = GoldenSnapshot()
    train(tmp_path, {}, [snapshot], max_epochs=1)
    with pytest.raises(StoreError, match="holds values, not a mask"):
        train(tmp_path, {**GOLDEN, "mask": str(snapshot.folder / "base.safetensors")})


@pytest.mark.filterwarnings("ignore:failing failed at step 0")
def test_an_analysis_that_failed_leaves_no_mask_to_train_with(tmp_path):
    class Failing(GoldenParameters):
        def compute(self, context):
            raise ArithmeticError("no")

    failing = Failing(n_samples=3, at=("start",), on_error="warn")
    with pytest.raises(FileNotFoundError, match="Failing has made no mask before the first step"):
        train(tmp_path, GOLDEN, [failing])


def test_what_the_predictions_hang_on_is_all_that_trains(tmp_path):
    search = ReverseGoldenParameters(2.0, n_samples=3, at=("start",), strategy="none")
    trainer, model = train(tmp_path, {**GOLDEN, "mask": "reverse_golden"}, [search])
    mask = ParameterMask.load(search.folder / "mask-step=00000000.safetensors", model)
    trained = trainer.optimizers[0].mask
    assert all(torch.equal(trained[name], mask[name]) for name in mask)
    assert mask.total == sum(max(1, math.floor(0.02 * tensor.numel() + 0.5)) for tensor in mask.values())
    changed = moved(model)
    assert sum(int((changed[name] & ~mask[name]).sum()) for name in mask) == 0
    assert sum(int((changed[name] & mask[name]).sum()) for name in mask) > 0.5 * mask.total


def test_a_callback_is_known_by_the_name_of_its_class(tmp_path):
    class OwnScoring(GoldenParameters):
        pass

    trainer, _ = train(tmp_path, GOLDEN, [OwnScoring(n_samples=3, at=("start",))])
    assert trainer.optimizers[0].mask.total > 0
    assert set(MASK_CALLBACKS.values()) == {GoldenParameters.__name__, ReverseGoldenParameters.__name__}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, r"unknown optimizer.name 'adam'; did you mean 'adamw'\? Valid: adamw, masked_adamw"),
        ({"name": "masked_adamw"}, "needs optimizer.mask"),
        ({"mask": "golden"}, "mask='golden'.*belong to optimizer.name='masked_adamw'; the name is 'adamw'"),
        ({"lr_outside": 0.1}, "lr_outside=0.1 belong"),
        ({"name": "masked_adamw", "mask": "golden", "lr_inside": -1.0}, "lr_inside must be.*-1.0"),
        ({"name": "masked_adamw", "mask": "golden", "lr_outside": float("inf")}, "lr_outside must be.*inf"),
    ],
)
def test_options_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**options)


def test_the_short_forms_of_the_options():
    model = torch.nn.Linear(2, 2)
    for module in (
        GoldyModule(model, objective="classifier", optimizer="masked_adamw", mask="golden"),
        GoldyModule(model, objective="classifier", optimizer={"name": "masked_adamw", "mask": "golden"}),
        GoldyModule(
            model, objective="classifier", optimizer=OptimizerOptions(name="masked_adamw", mask="golden"), mask="golden"
        ),
    ):
        assert module.optimizer_options == OptimizerOptions(name="masked_adamw", mask="golden")
    for options, message in (("adam", "unknown optimizer 'adam'"), ({"mask": "a"}, "two masks: mask='golden'.*'a'")):
        with pytest.raises(ValueError, match=message):
            GoldyModule(model, optimizer=options, mask="golden")
    with pytest.raises(TypeError, match="optimizer must be OptimizerOptions"):
        GoldyModule(model, optimizer=3, mask="golden")


def test_only_the_outside_can_train():
    options = OptimizerOptions(name="masked_adamw", mask="golden", lr_inside=0.0, lr_outside=0.1)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), options)
    assert [(g["lr"], g["lr_inside"], g["lr_outside"]) for g in optimizer.param_groups] == [(0.1, 0.0, 0.1)] * 2
