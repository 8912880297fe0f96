"""The callback: what it measures, what it keeps over a run, what it refuses."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_goldy.analysis import adam_preconditioner
from lightning_goldy.analysis.basin import (
    BridgeSettings,
    Estimator,
    Selection,
    basin_volume,
    kronecker_preconditioner,
)
from lightning_goldy.analysis.basin.tether import TetherWalk
from lightning_goldy.callbacks import BasinVolume, ExactResume
from lightning_goldy.core import CausalLMObjective, ClassifierObjective, ParameterSpace
from lightning_goldy.report.topics.basin import trajectories, trajectory_caption
from tests.callbacks.training import Finetune, TokenData, fit

EPOCH = 8  # optimizer steps: 16 samples in batches of 2
START = pytest.mark.filterwarnings("ignore:.*measured without a preconditioner")
RESUMING = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:.*exists and is not empty")


def rows(callback: BasinVolume) -> list[dict]:
    return [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]


class SplitData(TokenData):
    """Data with two named splits."""

    def analysis_splits(self):
        return {"first": list(self.probe_dataloader())[:1], "rest": list(self.probe_dataloader())[1:]}


def test_the_row_is_what_the_function_finds(tmp_path):
    callback = BasinVolume(3, n_samples=3, at=("end",))
    _, module, _ = fit(tmp_path, [callback], max_epochs=1)
    (row,) = rows(callback)
    evaluated = []

    class Counting(CausalLMObjective):
        def logits_and_targets(self, model, batch):
            evaluated.append(len(batch["input_ids"]))
            return super().logits_and_targets(model, batch)

    batches = list(TokenData().probe_dataloader())
    expected = basin_volume(module.model, batches, Counting(), n_directions=3, n_samples=3)
    (volume,) = row["result"]["volumes"]
    for name in ("estimates", "radii", "deltas", "props", "slopes", "log_integral", "sensitivities", "evaluations"):
        assert torch.equal(torch.tensor(volume[name], dtype=getattr(expected, name).dtype), getattr(expected, name))
    for name in ("log_volume", "spread", "bits_per_parameter", "scaling_exponent", "tolerance", "lower_bound"):
        assert row["metrics"][name] == pytest.approx(getattr(expected, name), rel=1e-12)
    # Nothing that a reader would take for an interval of the volume.
    assert not [name for name in row["metrics"] if "interval" in name]
    assert row["metrics"]["evaluations"] == expected.total_evaluations
    assert (volume["sigma"], volume["cutoff"], volume["dimension"]) == (expected.sigma, 1e-2, expected.dimension)
    # In samples, as they were counted; three lie in two batches.
    assert row["cost"]["forwards"] == sum(evaluated) == expected.cost.forwards
    assert row["cost"]["backwards"] == 0
    assert volume["batches"] == 2


def test_forward_passes_are_counted_without_a_cache_too(tmp_path):
    evaluated = []

    class Counting(CausalLMObjective):
        def logits_and_targets(self, model, batch):
            evaluated.append(len(batch["input_ids"]))
            return super().logits_and_targets(model, batch)

    callback = BasinVolume(
        2,
        cutoff=[1e-3, 1e-2],
        n_samples=3,
        objective=Counting(),
        estimator=Estimator(cache="none"),
        at=("end",),
        check=False,
    )
    fit(tmp_path, [callback], max_epochs=1)
    # Before the first step the callback reads its three samples once.
    assert rows(callback)[0]["cost"]["forwards"] == sum(evaluated) - 3


@START
def test_adam_keeps_the_damping_of_its_first_pilot(tmp_path):
    callback = BasinVolume(2, n_samples=2, preconditioner="adam", every_n_steps=3, at=("start", "end"))
    trainer, module, _ = fit(tmp_path, [callback], max_epochs=1)
    found = rows(callback)
    assert [row["step"] for row in found] == [0, 3, 6, 8]
    assert [row["result"]["preconditioner_used"] for row in found] == ["none", "adam", "adam", "adam"]
    assert [row["result"]["preconditioner"] for row in found] == ["adam"] * 4
    eps = [row["metrics"]["eps"] for row in found]
    assert eps[0] is None
    assert len(set(eps[1:])) == 1
    # The pilot is paid for once.
    forwards = [row["cost"]["forwards"] for row in found]
    # Two samples are one batch: the anchor's predictions, and its second run.
    spent = [2 * (row["result"]["volumes"][0]["total_evaluations"] + 2) for row in found]
    assert forwards[0] == spent[0]
    assert forwards[1] > spent[1] + 2 * 2 * 3
    assert forwards[2:] == spent[2:]

    space = ParameterSpace.of(module.model)
    proposal = adam_preconditioner(trainer.optimizers[0], space, module=module.model, eps=eps[-1])
    batches = list(TokenData().probe_dataloader())
    options = {"n_directions": 2, "n_samples": 2, "sigma": found[0]["metrics"]["sigma"]}
    expected = basin_volume(module.model, batches, preconditioner=proposal, **options)
    estimates = torch.tensor(found[-1]["result"]["volumes"][0]["estimates"], dtype=torch.float64)
    assert torch.allclose(estimates, expected.estimates, rtol=1e-9, atol=0.0)


def test_the_missing_moments_are_told_once(tmp_path):
    callback = BasinVolume(2, n_samples=2, preconditioner="best", at=("start",))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, [callback], max_epochs=1)
    assert sum("at step 0 volumes are measured without a preconditioner" in str(each.message) for each in told) == 1


def test_kronecker_is_the_function_with_the_preconditioner_made_by_hand(tmp_path):
    callback = BasinVolume(2, n_samples=3, preconditioner="kronecker", every_n_steps=5, at=("start", "end"))
    _, module, _ = fit(tmp_path, [callback], max_epochs=1)
    found = rows(callback)
    assert [row["result"]["preconditioner_used"] for row in found] == ["kronecker"] * 3
    assert len({row["metrics"]["eps"] for row in found}) == 1
    # The Fisher information takes one pass of each of the three samples.
    assert [row["cost"]["backwards"] for row in found] == [3] * 3
    assert found[0]["cost"]["forwards"] > found[1]["cost"]["forwards"]
    whole, half = TokenData().probe_dataloader()
    batches = [whole, {key: value[:1] for key, value in half.items()}]
    proposal = kronecker_preconditioner(module.model, batches, eps=found[-1]["metrics"]["eps"])
    sigma = found[0]["metrics"]["sigma"]
    expected = basin_volume(module.model, batches, n_directions=2, preconditioner=proposal, sigma=sigma)
    estimates = torch.tensor(found[-1]["result"]["volumes"][0]["estimates"], dtype=torch.float64)
    assert torch.equal(estimates, expected.estimates)
    plain = basin_volume(module.model, batches, n_directions=2, sigma=sigma)
    assert not torch.equal(plain.estimates, expected.estimates)


@START
def test_the_best_carries_all_proposals(tmp_path):
    callback = BasinVolume(2, n_samples=2, preconditioner="best", at=("end",))
    fit(tmp_path, [callback], max_epochs=1)
    (volume,) = rows(callback)[0]["result"]["volumes"]
    bounds = {name: numbers["lower_bound"] for name, numbers in volume["proposals"].items()}
    assert set(bounds) == {"none", "adam", "kronecker"}
    assert volume["preconditioner"] == max(bounds, key=bounds.__getitem__)
    assert volume["lower_bound"] == max(bounds.values())
    assert volume["total_evaluations"] == sum(each["evaluations"] for each in volume["proposals"].values())


def test_a_bridge_is_walked_at_the_end_and_not_between(tmp_path):
    settings = BridgeSettings(chains=2, nodes=2, max_gradients=200)
    callback = BasinVolume(1, n_samples=2, method="bridge", bridge=settings, every_n_steps=5, at=("end",))
    _, module, _ = fit(tmp_path, [callback], max_epochs=1)
    between, end = rows(callback)
    assert between["result"]["bridges"] == []
    assert "bridge_log_volume" not in between["metrics"]
    (bridge,) = end["result"]["bridges"]
    batches = list(TokenData().probe_dataloader())
    options = {"n_samples": 2, "sigma": end["metrics"]["sigma"], "method": "bridge", "bridge": settings}
    expected = basin_volume(module.model, batches, **options)
    assert end["metrics"]["bridge_log_volume"] == pytest.approx(expected.log_volume, rel=1e-9)
    assert end["metrics"]["bridge_error"] == pytest.approx(expected.error, rel=1e-6)
    assert end["metrics"]["bridge_weak"] == 1.0
    assert bridge["weak"] == expected.weak
    assert bridge["gradients"] == expected.gradients <= 200 + 6 * settings.chains
    # Each gradient is a pass of both samples there and back.
    assert end["cost"]["backwards"] >= 2 * expected.gradients
    page = trajectory_caption([end])
    assert "by a bridge" in page
    assert not list(callback.folder.glob("bridge-*"))


def test_a_bridge_that_a_run_died_in_goes_on_at_the_same_weights(tmp_path, monkeypatch):
    step, taken = TetherWalk._step, []

    def run(name: str, dies: bool, **keep: str) -> BasinVolume:
        def watched(walk, *rest):
            taken.append(walk.taken)
            step(walk, *rest)
            if dies and walk.taken > 120:
                raise RuntimeError("the power failed")

        monkeypatch.setattr(TetherWalk, "_step", watched)
        settings = BridgeSettings(chains=2, nodes=2, max_gradients=200, path="tether", **keep)
        callback = BasinVolume(1, n_samples=2, method="bridge", bridge=settings, at=("end",))
        if dies:
            with pytest.raises(RuntimeError, match="the power failed"):
                fit(tmp_path / name, [callback], max_epochs=1)
        else:
            fit(tmp_path / name, [callback], max_epochs=1)
        return callback

    dead = run("dead", True)
    (kept,) = dead.folder.glob("bridge-*")
    taken.clear()
    resumed = run("resumed", False, keep_in=str(dead.folder))
    assert taken[0] > 50
    assert not kept.exists()
    whole = run("whole", False)
    numbers = [{**rows(each)[-1]["result"]["bridges"][0], "seconds": 0} for each in (resumed, whole)]
    assert numbers[0] == numbers[1]


@START
def test_the_best_of_two_proposals_is_counted_pass_by_pass(tmp_path):
    evaluated = []

    class Counting(CausalLMObjective):
        def logits_and_targets(self, model, batch):
            evaluated.append(len(batch["input_ids"]))
            return super().logits_and_targets(model, batch)

    callback = BasinVolume(2, n_samples=3, preconditioner="best", objective=Counting(), at=("end",), check=False)
    fit(tmp_path, [callback], max_epochs=1)
    # Before the first step the callback reads its three samples once.
    assert rows(callback)[0]["cost"]["forwards"] == sum(evaluated) - 3


def test_sigma_stays_the_first_ones_or_the_given_one(tmp_path):
    first = BasinVolume(2, n_samples=2, every_n_epochs=1, at=("start",))
    given = BasinVolume(2, n_samples=2, every_n_epochs=1, at=("start",), sigma=0.3, name="given")
    fit(tmp_path, [first, given])
    torch.manual_seed(0)
    start = torch.cat([parameter.detach().flatten() for parameter in Finetune().model.parameters()]).double()
    for row in rows(first):
        assert row["metrics"]["sigma"] == pytest.approx(float(start.square().mean().sqrt()), rel=1e-6)
    assert {row["metrics"]["sigma"] for row in rows(given)} == {0.3}


def test_sigma_measured_anew_does_not_compare_and_says_so(tmp_path):
    callback = BasinVolume(2, n_samples=2, every_n_epochs=1, at=("start",), sigma=None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, [callback])
    assert sum("sigma=None every analysis has a measure of its own" in str(each.message) for each in told) == 1
    assert len({row["metrics"]["sigma"] for row in rows(callback)}) == 3


def test_splits_and_cutoffs_have_tags_of_their_own(tmp_path):
    callback = BasinVolume(2, cutoff=[1e-2, 1e-3], n_samples=2, splits=True, at=("start", "end"))
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    fit(tmp_path, [callback], data=SplitData(), max_epochs=1, logger=logger)
    row = rows(callback)[-1]
    labels = ["first-0.001", "first-0.01", "rest-0.001", "rest-0.01"]
    assert [volume["label"] for volume in row["result"]["volumes"]] == labels
    assert {name for name in row["metrics"] if name.startswith("log_volume")} == {f"log_volume/{x}" for x in labels}
    for split in ("first", "rest"):
        small, large = (row["metrics"][f"log_volume/{split}-{cutoff}"] for cutoff in ("0.001", "0.01"))
        slope = (large - small) / math.log(10)
        assert row["metrics"][f"scaling_exponent_fit/{split}"] == pytest.approx(slope, rel=1e-9)
        assert row["metrics"][f"learning_coefficient_slope/{split}"] == pytest.approx(slope, rel=1e-9)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert {f"goldy/basin_volume/log_volume/{label}" for label in labels} <= set(events.Tags()["scalars"])
    drawn = {f"goldy/basin_volume/figure/{name}" for name in ("trajectory", "estimates", "cutoffs")}
    assert drawn <= set(events.Tags()["images"])
    lines = trajectories(rows(callback))
    assert [(label, line.x) for label, line in lines.items()] == [(label, (0, EPOCH)) for label in labels]
    earlier = rows(callback)[0]["metrics"]
    assert [line.y[0] for line in lines.values()] == [earlier[f"log_volume/{label}"] for label in labels]


def test_only_the_selected_parameters_move(tmp_path):
    callback = BasinVolume(2, n_samples=2, selection=Selection(include=["*mlp*"], last_layers=1), at=("end",))
    _, module, _ = fit(tmp_path, [callback], max_epochs=1)
    space = ParameterSpace.of(module.model, ["*mlp*"], last_layers=1)
    assert rows(callback)[0]["result"]["dimension"] == space.numel


@RESUMING
@pytest.mark.parametrize(
    "same_folder", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new folder", "same folder"]
)
def test_resumed_equals_uninterrupted(tmp_path, same_folder):
    def callbacks(folder):
        watcher = BasinVolume(2, n_samples=2, preconditioner="best", every_n_steps=3, at=())
        saver = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
        return [ExactResume(), watcher, saver]

    whole = callbacks(tmp_path / "whole_checkpoints")
    fit(tmp_path / "whole", whole, enable_checkpointing=True)
    first = callbacks(tmp_path / "checkpoints")
    fit(tmp_path / "first", first, max_steps=EPOCH + 5, enable_checkpointing=True)
    again = callbacks(tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / f"step={EPOCH}.ckpt"
    folder = tmp_path / ("first" if same_folder else "second")
    fit(folder, again, enable_checkpointing=True, ckpt_path=checkpoint)
    expected, found = ([{**row, "cost": None} for row in rows(each[1])] for each in (whole, again))
    assert found == expected
    assert [row["step"] for row in found] == [3, 6, 9, 12, 15]
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["BasinVolume[basin_volume]"]
    assert state["sigma"] == found[0]["metrics"]["sigma"]
    assert state["eps"] == found[0]["metrics"]["eps"]
    assert state["kronecker_eps"] == found[0]["metrics"]["kronecker_eps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_directions": 0}, "n_directions must be at least 1; got 0"),
        ({"cutoff": [1e-2, -1.0]}, "cutoff must be positive and finite; got -1.0"),
        ({"cutoff": []}, "cutoff must be a number or a list of different ones"),
        ({"cutoff": [0.1, 0.1]}, "cutoff must be a number or a list of different ones"),
        ({"method": "bridges"}, "unknown method 'bridges'.*bridge"),
        ({"method": "bridge", "estimator": Estimator(measure="uniform")}, "measure='gaussian'"),
        ({"preconditioner": "adm"}, "unknown preconditioner 'adm'.*adam"),
        ({"sigma": "last"}, "sigma is a number, 'first' or None; got 'last'"),
        ({"sigma": -1.0}, "sigma must be positive and finite; got -1.0"),
        ({"n_samples": 0}, "n_samples must be at least 1; got 0"),
        ({"splits": {"a b": []}}, "split names become parts of tags.*'a b'"),
        ({"splits": {}}, "splits= names no set of samples"),
        ({"splits": True, "probe": [1]}, "give probe= or splits=, not both"),
        ({"preconditioner": "best", "estimator": Estimator(measure="sphere")}, "sphere' takes no preconditioner"),
        ({"preconditioner": "kronecker", "estimator": Estimator(measure="sphere")}, "sphere' takes no preconditioner"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BasinVolume(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": True}, r"asks the data module for analysis_splits\(\), which TokenData lacks"),
        ({"splits": {"a": []}}, "the split 'a' is empty"),
        (
            {"preconditioner": "kronecker", "selection": Selection(include=["*ln_*"])},
            "none of the .* selected parameters of GPT2LMHeadModel is one",
        ),
        ({"selection": Selection(include=["nothing*"])}, "pattern 'nothing\\*' matches no trainable parameter"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, arguments, message):
    module = None

    class Watched(Finetune):
        def __init__(self):
            super().__init__()
            nonlocal module
            module = self

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [BasinVolume(2, **{"n_samples": 2, **arguments})], module=Watched)
    assert module is not None
    assert module.losses == []


def test_an_optimizer_without_second_moments_is_refused_before_the_first_step(tmp_path):
    class Plain(Finetune):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    class Half(Finetune):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.transformer.h.parameters(), lr=1e-2)

    # The Fisher information asks nothing of the optimizer.
    fit(tmp_path / "fisher", [BasinVolume(1, n_samples=2, preconditioner="kronecker")], module=Plain, max_epochs=1)
    with pytest.raises(ValueError, match="SGD keeps no second moments"):
        fit(tmp_path / "plain", [BasinVolume(2, n_samples=2, preconditioner="adam")], module=Plain)
    with pytest.raises(ValueError, match=r"one optimizer that holds all .* none of \['AdamW'\] does"):
        fit(tmp_path / "half", [BasinVolume(2, n_samples=2, preconditioner="adam")], module=Half)


def test_a_classifier_of_ones_own(tmp_path):
    class Classifier(Finetune):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

        def training_step(self, batch, batch_idx):
            loss = self.model(torch.ones(2, 4)).square().sum()
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            return None

    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
    callback = BasinVolume(3, objective=ClassifierObjective(), probe=[batch], n_samples=5, at=("end",))
    _, module, _ = fit(tmp_path, [callback], module=Classifier, max_epochs=1)
    expected = basin_volume(module.model, [batch], ClassifierObjective(), n_directions=3)
    assert rows(callback)[0]["metrics"]["log_volume"] == pytest.approx(expected.log_volume, rel=1e-12)
