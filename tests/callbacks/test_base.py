from __future__ import annotations

import dataclasses
import json
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_goldy.analysis import AnalysisResult, Cost, Row
from lightning_goldy.callbacks import AnalysisCallback, Findings, GoldenParameters, GoldenSnapshot, RunReport
from lightning_goldy.callbacks.base import default_name
from lightning_goldy.core import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    ParameterVector,
    load_vectors,
)
from lightning_goldy.core.base import BaseParameters
from tests.callbacks.training import Finetune, TokenData, fit
from tests.core.test_base import write_folder, write_vector
from tests.references.models import build, token_batch


def rows(callback) -> list[dict]:
    return [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]


class Counting(AnalysisCallback[int]):
    """Counts its runs; fails when told to."""

    needs_probe = False
    fails = False

    def compute(self, context):
        if self.fails:
            raise ArithmeticError("no number")
        return context.step

    def describe(self, result, context):
        return Row("", {"steps": float(result)}, cost=Cost(forwards=2))


class Plain(AnalysisCallback[AnalysisResult]):
    """Describes nothing itself."""

    needs_probe = False
    result: object = None

    def compute(self, context):
        return self.result


class Failing(Counting):
    fails = True


@pytest.mark.parametrize(
    ("options", "accumulate", "expected"),
    [
        ({"every_n_steps": 3, "at": ()}, 1, [(3, "step"), (6, "step"), (9, "step"), (12, "step"), (15, "step")]),
        ({"every_n_epochs": 2, "at": ()}, 1, [(16, "epoch")]),
        ({"at": ("start", "end")}, 1, [(0, "start"), (16, "end")]),
        # The end is the step that was analysed just before, and is not analysed twice.
        ({"every_n_steps": 4}, 1, [(4, "step"), (8, "step"), (12, "step"), (16, "step")]),
        # Steps of the optimizer count, not batches: 3 batches a step, and the epoch's end makes one of its own.
        ({"every_n_steps": 2, "at": ()}, 3, [(2, "step"), (4, "step"), (6, "step")]),
    ],
)
def test_schedule(tmp_path, options, accumulate, expected):
    callback = Counting(**options)
    fit(tmp_path, [callback], accumulate_grad_batches=accumulate)
    assert [(row["step"], row["trigger"]) for row in rows(callback)] == expected
    assert [row["metrics"]["steps"] for row in rows(callback)] == [step for step, _ in expected]


def test_rows_carry_their_cost(tmp_path):
    callback = Counting()
    fit(tmp_path, [callback], max_epochs=1)
    (row,) = rows(callback)
    assert (row["cost"]["forwards"], row["cost"]["backwards"]) == (2, 0)
    assert 0 < row["cost"]["seconds"] < 60
    assert row["cost"]["peak_memory_bytes"] > 1e7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Counting(every_n_steps=0), "every_n_steps must be at least 1; got 0"),
        (lambda: Counting(at=("begin",)), "unknown moment at='begin'.*start, checkpoint, end"),
        (lambda: Counting(at=()), "Counting would never run"),
        (lambda: Counting(on_error="ignore"), "on_error is 'raise' or 'warn'; got 'ignore'"),
        (lambda: Counting(name="../x"), "name becomes a folder"),
        (lambda: GoldenParameters(score="grad"), "did you mean 'gradient'"),
        (lambda: GoldenParameters(top_k_percent=101), r"\(0, 100\]; got 101"),
        (lambda: GoldenParameters(quorum=2), r"\(0, 1\]; got 2"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TrainedError(Exception):
    """A training step was made."""


class Never(Finetune):
    def training_step(self, batch, batch_idx):
        raise TrainedError


class EmptyProbe(TokenData):
    def probe_dataloader(self):
        return []


class Masked(TokenData):
    def probe_dataloader(self):
        return [token_batch(3, query=12)]


class Broken(Never):
    def __init__(self):
        super().__init__()
        self.model.transformer.h[0].ln_1.weight.data[0] = float("inf")


class Frozen(Never):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("callback", "module", "data", "message"),
    [
        (lambda: GoldenParameters(n_samples=2), Never, EmptyProbe(), "the probe is empty: EmptyProbe.probe_dataloader"),
        (lambda: GoldenParameters(n_samples=2), Never, Masked(), "every label is masked"),
        (
            lambda: GoldenParameters(n_samples=2, include=["*conv*"]),
            Never,
            TokenData(),
            r"'\*conv\*' matches no trainable",
        ),
        (
            lambda: GoldenParameters(n_samples=2, last_layers=9),
            Never,
            TokenData(),
            "number of blocks from 1 to 2; got 9",
        ),
        (
            lambda: GoldenParameters(n_samples=2),
            Broken,
            TokenData(),
            r"weights of transformer\.h\.0\.ln_1\.weight are not",
        ),
        (lambda: GoldenSnapshot(), Broken, TokenData(), "are not finite"),
        (lambda: GoldenSnapshot(), Frozen, TokenData(), "has no trainable parameter"),
        (lambda: GoldenSnapshot(source="nowhere"), Never, TokenData(), "neither a vector file"),
        (lambda: GoldenParameters(model_attribute="modle"), Never, TokenData(), "its children: model, monitor"),
        (lambda: GoldenParameters(n_samples=2, probe=[]), Never, TokenData(), "the probe is empty: probe="),
    ],
)
def test_bad_input_is_an_error_before_the_first_step(tmp_path, callback, module, data, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [callback()], module=module, data=data)


def test_a_snapshot_takes_its_base_in_every_form(tmp_path):
    base = build("gpt2", seed=5)
    forms = {
        "file": write_vector(base, tmp_path),
        "folder": str(write_folder(base, tmp_path)),
        "module": base,
        "vector": ParameterVector.of(base),
        "base": BaseParameters(ParameterVector.of(base)),
    }
    found = {}
    for form, source in forms.items():
        watcher = GoldenSnapshot(source=source, at=("end",))
        fit(tmp_path / form, [watcher], max_epochs=1, limit_train_batches=2)
        found[form] = rows(watcher)[-1]["metrics"]
    assert found["file"]["delta_norm"] > 1
    assert [form for form, metrics in found.items() if metrics != found["file"]] == []
    with pytest.raises(TypeError, match=r"a base is a module, .*; got int"):
        fit(tmp_path / "none", [GoldenSnapshot(source=3)], module=Never)


class Smoothed(Never):
    """Its model's own loss is not the mean negative log-probability of its labels."""

    def __init__(self):
        super().__init__()
        plain = self.model.loss_function
        self.model.loss_function = lambda *args, **kwargs: 0.9 * plain(*args, **kwargs)


class LabelledPadding(TokenData):
    def probe_dataloader(self):
        batch = token_batch(3)
        mask = torch.ones_like(batch["input_ids"])
        mask[:, -2:] = 0
        return [{**batch, "attention_mask": mask, "labels": batch["input_ids"]}]


class TrainsByObjective(Never):
    objective = CausalLMObjective()


def test_another_loss_than_the_models_own_ends_the_run_before_its_first_step(tmp_path):
    for module, data in ((Smoothed, TokenData()), (Never, LabelledPadding())):
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel: its own loss .* that of CausalLMObjective \d"):
            fit(tmp_path / module.__name__, [GoldenParameters(n_samples=2)], module=module, data=data)
        with pytest.raises(TrainedError):
            fit(
                tmp_path / f"unchecked-{module.__name__}",
                [GoldenParameters(n_samples=2, check=False)],
                module=module,
                data=data,
            )
    # What the module trains by leaves the padding out.
    with pytest.raises(TrainedError):
        fit(tmp_path / "own", [GoldenParameters(n_samples=2)], module=TrainsByObjective, data=LabelledPadding())


def test_two_callbacks_of_one_class_need_names(tmp_path):
    with pytest.raises(ValueError, match="two callbacks are called 'counting'"):
        fit(tmp_path, [Counting(), GoldenSnapshot(name="counting")])
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Counting`"):
        fit(tmp_path, [Counting(), Counting()])
    first, second = Counting(name="first"), Counting(name="second")
    assert first.state_key != second.state_key
    fit(tmp_path, [first, second], max_epochs=1)
    assert first.folder.parent == second.folder.parent


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_an_unwritable_directory_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "goldy").write_text("a file where the folder should be")
    with pytest.raises(PermissionError, match="results cannot be written to"):
        fit(tmp_path, [Counting()], module=Never, logger=CSVLogger(tmp_path, name=None, version="run"))


def test_fsdp1_is_refused_by_name():
    class FSDPStrategy:
        pass

    trainer = L.Trainer(accelerator="cpu", callbacks=[Counting()], logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match=r"FSDPStrategy \(FSDP1\).*FSDP2"):
        trainer.callbacks[0].setup(trainer, Finetune(), "fit")


def test_on_error_warn_lets_training_go_on(tmp_path):
    with pytest.raises(ArithmeticError, match="no number"):
        fit(tmp_path / "raise", [Failing()], max_epochs=1)
    callback = Failing(on_error="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _, _ = fit(tmp_path / "warn", [callback], max_epochs=1)
    assert "failing failed at step 8 and training goes on: no number" in [str(each.message) for each in caught]
    assert trainer.global_step == 8
    assert not (callback.folder / "results.jsonl").exists()


def test_tensorboard_receives_scalars_figures_and_histograms(tmp_path):
    logger = TensorBoardLogger(tmp_path, name=None, version="tb")
    watchers = [
        GoldenSnapshot(track_updates=True, every_n_steps=4, log_scalars="all"),
        GoldenParameters(n_samples=3, quorum=0.5, every_n_steps=4, log_scalars="all"),
    ]
    fit(tmp_path, watchers, logger=logger, max_epochs=1)
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    golden = {"count", "density", "null_count", "over_null", "control_count", "jaccard_previous", "delta_share"}
    expected = {f"goldy/golden_parameters/{name}" for name in golden}
    expected |= {f"goldy/golden_snapshot/{name}" for name in ("delta_norm", "relative_change", "update_cosine")}
    expected |= {"goldy/golden_snapshot/relative_change/transformer.h.0", "goldy/golden_parameters/cost/seconds"}
    assert expected <= set(tags["scalars"])
    assert any(tag.startswith("goldy/golden_parameters/") for tag in tags["images"])
    assert any(tag.startswith("goldy/golden_snapshot/") for tag in tags["images"])
    kinds = [set(tags[kind]) for kind in ("scalars", "images", "histograms")]
    assert sum(map(len, kinds)) == len(set.union(*kinds)), "TensorBoard shows a tag in one of its plugins only"
    assert len(tags["images"]) == 3
    assert tags["histograms"] == ["goldy/golden_snapshot/change_log10"]
    logged = events.Scalars("goldy/golden_parameters/count")
    assert [(event.step, event.value) for event in logged] == [
        (r["step"], r["metrics"]["count"]) for r in rows(watchers[1])
    ]


def test_the_folder_tells_whose_it_is_before_anything_is_analysed(tmp_path):
    callback = Counting(every_n_steps=1000, at=(), name="counted")
    fit(tmp_path, [callback], max_epochs=1)
    assert not (callback.folder / "results.jsonl").exists()
    assert json.loads((callback.folder / ".run.json").read_text())["callback"] == "Counting"


def test_several_loggers_and_none(tmp_path):
    callback = Counting()
    loggers = [CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="b")]
    fit(tmp_path, [callback], logger=loggers, max_epochs=1)
    assert "goldy/counting/steps" in (tmp_path / "a" / "version_0" / "metrics.csv").read_text()
    for number in range(2):
        callback = Counting()
        fit(tmp_path / "none", [callback], logger=False, max_epochs=1)
        assert callback.folder == tmp_path / "none" / "goldy_logs" / f"version_{number}" / "goldy" / "counting"


def test_the_metrics_of_a_known_change(tmp_path):
    """One SGD step of a linear layer, whose change is known in closed form."""

    class Linear(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1, bias=False)
            self.net.weight.data.fill_(1.0)

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), batch_size=1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.25)

    module = Linear()
    snapshot = GoldenSnapshot(track_updates=True, every_n_steps=1, model_attribute="net")
    golden = GoldenParameters(
        25.0,
        n_samples=1,
        every_n_steps=1,
        model_attribute="net",
        objective=FunctionObjective(lambda model, x: model(x).sum()),
        probe=[torch.tensor([[1.0, 3.0, 0.0, 0.0]])],
    )
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, callbacks=[snapshot, golden], **options).fit(
        module
    )
    first, second = rows(snapshot)
    assert first["metrics"]["delta_norm"] == pytest.approx(0.25 * 5**0.5)
    assert second["metrics"]["relative_change"] == pytest.approx(0.5 * 5**0.5 / 2)
    assert first["metrics"]["update_cosine"] is None
    assert second["metrics"]["update_cosine"] == pytest.approx(1.0)
    assert second["metrics"]["unchanged_share"] == 0.5
    histogram = second["result"]["histogram"]
    assert (sum(histogram["counts"]), histogram["zero"]) == (2, 2)
    # The golden quarter is the second weight, whose change of 1.0 is four fifths of the squared change.
    shares = [row["metrics"] for row in rows(golden)]
    assert [row["count"] for row in shares] == [1, 1]
    assert shares[1]["delta_share"] == pytest.approx(0.8)
    assert shares[1]["delta_share_over_density"] == pytest.approx(3.2)
    assert [row["jaccard_previous"] for row in shares] == [None, 1.0]
    mask, header = load_vectors(golden.folder / rows(golden)[1]["files"]["mask"], module.net)
    assert mask["weight"].tolist() == [[False, True, False, False]]
    assert (header.kind, header.step, header.model_class) == ("mask", 2, "Linear")


def test_a_classifier_of_a_users_own_without_a_probe_uses_the_validation_set(tmp_path):
    class Digits(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            return self.layers(x)

        def loss(self, batch):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(12, 6), torch.randint(0, 3, (12,)))
    callback = GoldenParameters(n_samples=5, objective=ClassifierObjective(), quorum=0.5, top_k_percent=20)
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=[callback], **options)
    trainer.fit(Digits(), torch.utils.data.DataLoader(data, 4), torch.utils.data.DataLoader(data, 4))
    (row,) = rows(callback)
    assert row["metrics"]["count"] > 0
    assert {tensor["name"] for tensor in row["result"]["tensors"]} == {
        f"layers.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")
    }


def test_run_report_writes_the_page_and_refuses_an_empty_run(tmp_path):
    with pytest.raises(ValueError, match="RunReport has nothing to report"):
        fit(tmp_path / "empty", [RunReport()], module=Never)
    fit(tmp_path / "run", [GoldenSnapshot(every_n_steps=4), RunReport()], max_epochs=1)
    page = (tmp_path / "run" / "run" / "report.html").read_text()
    assert "<html" in page
    assert "relative_change" in page or "relative change" in page.lower()


@dataclasses.dataclass(frozen=True)
class Found(AnalysisResult):
    analysis = "found"
    value: float
    cost: Cost = dataclasses.field(default=Cost(), compare=False)

    def metrics(self):
        return {"value": self.value, "nothing": float("nan")}

    def details(self):
        return {"steps": [1, 2]}

    def vectors(self):
        layer = nn.Linear(2, 1)
        return {"weights": (ParameterVector.of(layer), "values")}


def test_a_result_tells_its_own_row(tmp_path):
    named, plain = Plain(name="named"), Plain()
    named.analysis = "renamed"
    named.result = plain.result = Found(0.5, Cost(forwards=3))
    fit(tmp_path, [named, plain], max_epochs=1)
    (row,) = rows(plain)
    assert (row["analysis"], row["name"], row["headline"]) == ("found", "plain", "found: value 0.5")
    assert row["metrics"] == {"value": 0.5, "nothing": None}
    assert row["result"] == {"steps": [1, 2]}
    assert (row["cost"]["forwards"], row["cost"]["backwards"]) == (3, 0)
    saved, header = load_vectors(plain.folder / row["files"]["weights"])
    assert (list(saved), header.kind) == (["weight", "bias"], "values")
    assert rows(named)[0]["analysis"] == "renamed"
    assert Found.from_json(plain.result.to_json()) == plain.result


def test_a_result_without_a_row_is_an_error(tmp_path):
    with pytest.raises(TypeError, match=r"Plain\.compute gives NoneType, which has no row"):
        fit(tmp_path, [Plain()], max_epochs=1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_findings_still_work(tmp_path):
    class Older(Counting):
        def describe(self, result, context):
            vectors = {"weights": (ParameterVector.of(nn.Linear(2, 1)), "values")}
            histograms = {"sizes": ([0.0, 1.0, 2.0], [3, 4])}
            return Findings({"steps": float(result)}, {"more": 1}, vectors, histograms, evaluations=5)

    callback, logger = Older(), TensorBoardLogger(tmp_path, name=None, version="tb")
    with pytest.warns(DeprecationWarning, match=r"Older\.describe returns Findings; return a lightning_goldy"):
        fit(tmp_path, [callback], max_epochs=1, logger=logger)
    (row,) = rows(callback)
    assert (row["format"], row["analysis"], row["metrics"], row["result"]) == (2, "older", {"steps": 8.0}, {"more": 1})
    assert (row["cost"]["forwards"], row["cost"]["backwards"]) == (5, 0)
    assert row["headline"] == "older: steps 8"
    assert (callback.folder / row["files"]["weights"]).is_file()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == ["goldy/older/sizes"]


@pytest.mark.parametrize("callback", [GoldenSnapshot, GoldenParameters])
def test_default_names(callback):
    assert callback().name == default_name(callback)
