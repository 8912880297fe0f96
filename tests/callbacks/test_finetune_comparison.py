"""Masked, full and random finetunes of one start in one table; each row is what such a training alone comes to."""

from __future__ import annotations

import json

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_goldy import GoldyModule, ParameterMask, ParameterSpace, ParameterVector
from lightning_goldy.analysis import change_attribution
from lightning_goldy.callbacks import FinetuneComparison, GoldenParameters
from lightning_goldy.callbacks.finetune_comparison import Finetune, comparison_table
from lightning_goldy.core import load_vectors
from tests.callbacks.training import TokenData, Tokens
from tests.references.models import build

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using", "ignore:.*exists and is not empty", "ignore:Found .* in eval mode"
)
MASKED = {"name": "masked_adamw", "mask": "golden", "learning_rate": 1e-2, "weight_decay": 0.1}


class InOrder(TokenData):
    def train_dataloader(self):
        return DataLoader(Tokens(self.n_train, 1), batch_size=2)


def train(folder, optimizer, callbacks=(), *, data=None, **options):
    L.seed_everything(7, verbose=False)
    module = GoldyModule(build("gpt2").eval(), optimizer=optimizer, schedule={"name": "linear"})
    settings = {"max_epochs": 2, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    data = data or InOrder()
    trainer.fit(module, datamodule=data)
    return trainer, module, data


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    scores, comparison = GoldenParameters(n_samples=3, quorum=0.5, at=("start",)), FinetuneComparison(seed=3)
    trainer, module, data = train(folder, MASKED, [scores, comparison])
    (line,) = (comparison.folder / "results.jsonl").read_text().splitlines()
    return trainer, module, data, comparison.folder, json.loads(line)


def measured(model) -> tuple[float, float]:
    """The mean loss per target of the training and of the validation rows."""
    module = GoldyModule(model)
    found = []
    for rows in (Tokens(16, 1), Tokens(4, 2)):
        with torch.no_grad():
            found.append(float(module.objective.loss(model.eval(), rows.batch)))
    return found[0], found[1]


@pytest.mark.parametrize("name", ["start", "masked", "full", "random"])
def test_each_row_is_what_such_a_training_alone_comes_to(tmp_path, compared, name):
    _, module, _, folder, row = compared
    if name in ("start", "masked"):
        model = build("gpt2") if name == "start" else module.model
    else:
        options = {"learning_rate": 1e-2, "weight_decay": 0.1}
        if name == "random":
            options |= {"name": "masked_adamw", "mask": str(folder / "random.safetensors")}
        model = train(tmp_path, options)[1].model
    (found,) = (each for each in row["result"]["rows"] if each["name"] == name)
    losses = measured(model)
    assert (found["losses"]["train/loss"], found["losses"]["val/loss"]) == pytest.approx(losses, rel=1e-5)
    change = (ParameterVector.of(model) - ParameterVector.of(build("gpt2"))).norm()
    assert found["change"] == pytest.approx(change, rel=1e-6)
    assert row["metrics"][f"{name}/delta_norm"] == found["change"]
    assert row["metrics"][f"{name}/val_loss"] == found["losses"]["val/loss"]


def test_the_random_mask_is_of_the_same_size_in_every_tensor(compared):
    trainer, _, _, folder, row = compared
    chosen = ParameterMask.load(folder / "random.safetensors")
    golden = ParameterMask.from_dense(chosen.space, trainer.optimizers[0].mask.to_dense())
    assert chosen.count() == golden.count()
    assert chosen.iou(golden) < 0.2
    elements = {each["name"]: each["elements"] for each in row["result"]["rows"]}
    assert elements == {"start": 0, "masked": golden.total, "full": golden.space.numel, "random": golden.total}


def test_the_cost_is_that_of_the_other_trainings_and_of_all_measurements(compared):
    row = compared[4]
    trained, measured = 2 * 2 * 16, 4 * (16 + 4)
    assert (row["cost"]["forwards"], row["cost"]["backwards"]) == (trained + measured, trained)


def test_what_every_measurement_reads_is_made_once(tmp_path):
    made = []

    class WithOther(InOrder):
        def collateral_dataloader(self):
            made.append(self.trainer)
            return DataLoader(Tokens(4, 5), batch_size=2)

    comparison = FinetuneComparison(["full"])
    callbacks = [GoldenParameters(n_samples=2, at=("start",)), comparison]
    trainer, *_ = train(tmp_path, MASKED, callbacks, data=WithOther(), max_epochs=1)
    (line,) = (comparison.folder / "results.jsonl").read_text().splitlines()
    assert len({row["losses"]["other/loss"] for row in json.loads(line)["result"]["rows"]}) == 3
    # By the copy that is measured with, which has a trainer of its own.
    assert len(made) == 1
    assert made[0] not in (None, trainer)


def test_the_comparison_leaves_the_training_as_it_was(tmp_path, compared):
    trainer, module, data, _, _ = compared
    _, alone, _ = train(tmp_path, MASKED, [GoldenParameters(n_samples=3, quorum=0.5, at=("start",))])
    assert all(map(torch.equal, module.model.parameters(), alone.model.parameters()))
    assert data.trainer is trainer


def test_the_start_is_that_of_the_run(compared):
    start, _ = load_vectors(compared[3] / "start.safetensors")
    assert all(torch.equal(start[name], value) for name, value in build("gpt2").named_parameters())


def test_what_carried_a_full_finetune_is_trained_again(tmp_path):
    scores = GoldenParameters(n_samples=3, quorum=0.5, at=("start",))
    comparison = FinetuneComparison(["attribution", "full"], seed=3, n_samples=4)
    short = {"max_epochs": 1, "limit_train_batches": 4}
    trainer, _, data = train(tmp_path, MASKED, [scores, comparison], **short)
    (line,) = (comparison.folder / "results.jsonl").read_text().splitlines()
    row = json.loads(line)
    rows = {each["name"]: each for each in row["result"]["rows"]}
    options = {"learning_rate": 1e-2, "weight_decay": 0.1}
    full = train(tmp_path / "full", options, **short)[1].model
    space = ParameterSpace.of(full)
    golden = ParameterMask.from_dense(space, trainer.optimizers[0].mask.to_dense())
    share = golden.total / space.numel
    batches = list(data.probe_dataloader())
    start = ParameterVector.of(build("gpt2"), space)
    expected = change_attribution(full, start, batches, n_samples=4, shares=[share])
    chosen = ParameterMask.load(comparison.folder / "attribution.safetensors")
    assert chosen.total == golden.total == rows["attribution"]["elements"]
    assert all(torch.equal(chosen[name], expected.mask(share)[name]) for name in space)
    path = str(comparison.folder / "attribution.safetensors")
    again = train(tmp_path / "again", options | {"name": "masked_adamw", "mask": path}, **short)[1].model
    losses = (rows["attribution"]["losses"]["train/loss"], rows["attribution"]["losses"]["val/loss"])
    assert losses[1] == pytest.approx(measured(again)[1], rel=1e-5)
    assert "other/loss" not in rows["full"]["losses"]


def test_a_resumed_run_compares_from_the_first_start(tmp_path, compared):
    scores, comparison = GoldenParameters(n_samples=3, quorum=0.5, at=("start",)), FinetuneComparison(seed=3)
    first = [scores, comparison]
    trainer, _, _ = train(tmp_path / "first", MASKED, first, max_steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = GoldyModule(build("gpt2", seed=9).eval(), optimizer=MASKED, schedule={"name": "linear"})
    again = FinetuneComparison(["random"], seed=3)
    other = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path / "second",
        logger=False,
        callbacks=[GoldenParameters(n_samples=3, quorum=0.5, at=("start",)), again],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    other.fit(module, datamodule=InOrder(), ckpt_path=tmp_path / "half.ckpt")
    start, _ = load_vectors(again.folder / "start.safetensors")
    assert all(torch.equal(start[name], value) for name, value in build("gpt2").named_parameters())


def test_the_table_shows_every_row():
    rows = [
        Finetune("start", 0, 0.0, {"val/loss": 2.0, "val/perplexity": 7.4}),
        Finetune("full", 9, 1.5, {"val/loss": 1.0}),
    ]
    table = comparison_table(rows, 10)
    assert [str(column.header) for column in table.columns] == ["trained", "elements", "share", "change", "val/loss"]
    assert [list(column.cells) for column in table.columns][2:] == [
        ["0.00 %", "90.00 %"],
        ["0", "1.5"],
        ["2.0000", "1.0000"],
    ]


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ({}, {}, "needs a GoldyModule with optimizer.name='masked_adamw'"),
        (MASKED, {"devices": 2, "strategy": "ddp_spawn"}, "on one device; got 2"),
    ],
)
def test_what_cannot_be_repeated_is_refused(tmp_path, optimizer, options, message):
    module = GoldyModule(build("gpt2"), optimizer=optimizer)
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **options)
    trainer._data_connector.attach_datamodule(module, InOrder())
    with pytest.raises(ValueError, match=message):
        FinetuneComparison().setup(trainer, module, "fit")


def test_a_missing_data_module_and_empty_lists_are_refused(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="needs a data module"):
        FinetuneComparison().setup(trainer, GoldyModule(build("gpt2"), optimizer=MASKED), "fit")
    with pytest.raises(ValueError, match="against names nothing"):
        FinetuneComparison([])
