from __future__ import annotations

import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from lightning_goldy.analysis import change_attribution, graft_curve
from lightning_goldy.analysis.attribution import interleaved
from lightning_goldy.callbacks import ChangeAttribution, GoldenParameters, GoldenSnapshot
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.objective import FunctionObjective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import StoreError
from lightning_goldy.report import draw_figures
from tests.callbacks.training import TokenData, Tokens, fit
from tests.references.models import build

SHARES = (0.05, 0.3)


class WithCollateral(TokenData):
    def collateral_dataloader(self):
        return torch.utils.data.DataLoader(Tokens(6, 9), batch_size=3)


def test_it_logs_what_the_functions_find_and_rows_can_be_drawn(tmp_path) -> None:
    snapshot = GoldenSnapshot(every_n_steps=4)
    watcher = ChangeAttribution(nodes=4, shares=SHARES, n_samples=4, n_collateral=3)
    _, module, _ = fit(tmp_path, [snapshot, watcher], data=WithCollateral(), max_epochs=1)
    scored, held_out = interleaved(TokenData().probe_dataloader(), 4)
    other = next(iter(WithCollateral().collateral_dataloader()))
    expected = change_attribution(module.model, snapshot.base, scored, nodes=4, shares=SHARES)
    curve = graft_curve(module.model, snapshot.base, expected, scored, held_out, [other])
    (row,) = [json.loads(line) for line in (watcher.folder / "results.jsonl").read_text().splitlines()]
    assert row["metrics"]["effect"] == pytest.approx(expected.change, rel=1e-5)
    assert row["metrics"]["share/mlp"] == pytest.approx(expected.by_kind["mlp"] / expected.total, rel=1e-3)
    assert row["metrics"]["harm"] == pytest.approx(curve.of("finetune")[0].harm, rel=1e-5)
    found = [point["recovered"] for point in row["result"]["graft"]["points"]]
    assert found == pytest.approx([point.recovered for point in curve.records], rel=1e-3, abs=1e-4)
    pairs = row["result"]["graft"]["per_sample"]
    assert {name: tuple(pairs[name]["keys"]) for name in pairs} == {n: r["keys"] for n, r in curve.pairs.items()}
    assert (row["cost"]["forwards"], row["cost"]["backwards"]) == (
        expected.cost.forwards + curve.cost.forwards,
        expected.cost.backwards + curve.cost.backwards,
    )
    mask = ParameterMask.load(watcher.folder / row["files"]["mask"], module.model)
    assert mask.density == pytest.approx(row["result"]["kept_share"], rel=0.01)
    assert set(draw_figures(row, [])) == {"places", "heads", "neurons", "graft"}


def test_without_shares_nothing_is_grafted_and_without_other_text_no_harm_is_told(tmp_path) -> None:
    plain = ChangeAttribution(nodes=1, shares=[], n_samples=4, name="plain")
    grafted = ChangeAttribution(nodes=1, shares=[0.5], baselines=["random"], n_samples=4, name="grafted")
    fit(tmp_path, [GoldenSnapshot(), plain, grafted], max_epochs=1, max_steps=2)
    rows = [json.loads((watcher.folder / "results.jsonl").read_text()) for watcher in (plain, grafted)]
    assert "graft" not in rows[0]["result"]
    assert not rows[0]["files"]
    assert [point["method"] for point in rows[1]["result"]["graft"]["points"]] == ["attribution", "random", "finetune"]
    assert rows[1]["metrics"]["harm"] is None
    assert "harm to other text was not measured" in rows[1]["headline"]


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"add GoldenSnapshot\(\) to the callbacks"):
        fit(tmp_path, [ChangeAttribution(n_samples=2)])
    for options, message in (
        ({"n_samples": 1}, "n_samples must be at least 2"),
        ({"baselines": ["size"]}, "unknown baseline 'size'"),
        ({"pieces": "layers"}, "unknown pieces 'layers'"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'"),
    ):
        with pytest.raises(ValueError, match=message):
            ChangeAttribution(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": ["a"]}, r"shares lie in \(0, 1\]; got 'a'"),
        ({"shares": [math.inf]}, r"shares lie in \(0, 1\]; got inf"),
        ({"shares": [-0.1]}, r"shares lie in \(0, 1\]; got -0.1"),
        ({"shares": [0.1, 0.1]}, "shares name 0.1 twice"),
        ({"shares": 0.1}, "shares is a list of fractions"),
        ({"keep": math.nan}, "keep must be a finite number; got nan"),
        ({"keep": 2}, r"keep must lie in \(0, 1\]; got 2"),
        ({"tolerance": "a"}, r"tolerance must lie in \(0, 1\); got a"),
        ({"baselines": ["random", "random"]}, "baselines name 'random' twice"),
        ({"baselines": "random"}, r"baselines must be a list \(items: 'magnitude'.*got 'random'"),
        ({"learn": {"step": 3}}, "step"),
    ],
)
def test_wrong_settings_are_told_as_they_are_given(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ChangeAttribution(**options)


@pytest.mark.filterwarnings("ignore:n_samples=2, but the probe holds only 1")
def test_grafts_of_a_probe_without_a_held_out_sample_are_refused_before_the_first_step(tmp_path) -> None:
    probe = [{"input_ids": torch.ones(1, 8, dtype=torch.long)}]
    with pytest.raises(ValueError, match=r"the probe has 1 sample, and grafts need 2.*shares=\[\]"):
        fit(tmp_path, [GoldenSnapshot(), ChangeAttribution(probe=probe, n_samples=2)], max_steps=1)


def test_the_gradient_at_the_base_alone_is_taken_by_option(tmp_path) -> None:
    watcher = ChangeAttribution(nodes="base", shares=[], n_samples=4)
    fit(tmp_path, [GoldenSnapshot(), watcher], max_epochs=1, max_steps=2)
    assert json.loads((watcher.folder / "results.jsonl").read_text())["metrics"]["n_nodes"] == 1


def test_links_with_the_runs_masks_interactions_and_the_kept_share_are_in_the_row(tmp_path) -> None:
    golden = GoldenParameters(n_samples=2, quorum=0.5, at=["end"])
    options = {"nodes": 2, "shares": [0.3], "baselines": ["random", "learned"], "n_samples": 4}
    watcher = ChangeAttribution(interactions=True, keep=0.1, **options)
    _, module, _ = fit(tmp_path, [GoldenSnapshot(), golden, watcher], data=WithCollateral(), max_epochs=1, max_steps=2)
    row = json.loads((watcher.folder / "results.jsonl").read_text())
    mask = ParameterMask.load(next(golden.folder.glob("mask-*.safetensors")), module.model)
    (link,) = row["result"]["links"]
    assert link["mask"] == "golden_parameters"
    assert link["elements"] == pytest.approx(mask.density)
    assert row["metrics"]["inside/golden_parameters"] == link["attribution"]
    assert {entry["block"] for entry in row["result"]["interactions"]} >= {"transformer.h.0", "transformer.h.1"}
    assert ParameterMask.load(watcher.folder / row["files"]["mask"], module.model).density == pytest.approx(0.1, 1e-2)
    assert {point["method"] for point in row["result"]["graft"]["points"]} >= {"random", "learned"}
    assert set(draw_figures(row, [])) == {"places", "heads", "neurons", "graft", "interactions", "links"}
    assert "the golden_parameters mask holds" in row["headline"]

    file = watcher.folder / row["files"]["mask"]
    again = ChangeAttribution(nodes=1, shares=[], masks={"before": str(file)}, n_samples=2, name="again")
    fit(tmp_path / "again", [GoldenSnapshot(), again], max_epochs=1, max_steps=1)
    assert json.loads((again.folder / "results.jsonl").read_text())["result"]["links"][0]["mask"] == "before"
    with pytest.raises(FileNotFoundError, match="there is no mask file at nowhere"):
        fit(tmp_path / "none", [GoldenSnapshot(), ChangeAttribution(masks={"x": "nowhere"}, n_samples=2)])


def test_other_text_and_metrics_that_cannot_be_measured_fail_before_the_first_step(tmp_path) -> None:
    tokens = torch.ones(1, 5, dtype=torch.long)
    for place, (options, message) in enumerate(
        (
            (
                {"collateral": [{"x": tokens}]},
                "collateral batch 0 cannot be measured by GPT2LMHeadModel: .*'input_ids'",
            ),
            ({"collateral": [{"input_ids": 10**6 * tokens}]}, "collateral batch 0 cannot be measured .*out of range"),
            ({"collateral": [{"input_ids": tokens, "labels": -100 * tokens}]}, "has no target"),
            ({"metric": "kl", "objective": FunctionObjective(own_loss)}, "probe batch 0 .* has a loss but no logits"),
        )
    ):
        watcher, steps = ChangeAttribution(n_samples=2, shares=[0.5], baselines=[], **options), []
        counting = LambdaCallback(on_train_batch_end=lambda *args, steps=steps: steps.append(args))
        with pytest.raises(ValueError, match=message):
            fit(tmp_path / str(place), [GoldenSnapshot(), watcher, counting])
        assert not steps


def own_loss(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def test_a_loss_without_logits_has_harm_and_no_divergence(tmp_path) -> None:
    watcher = ChangeAttribution(n_samples=4, nodes=2, shares=[0.5], baselines=[], objective=FunctionObjective(own_loss))
    fit(tmp_path, [GoldenSnapshot(), watcher], data=WithCollateral(), max_epochs=1, max_steps=2)
    row = json.loads((watcher.folder / "results.jsonl").read_text())
    for point in row["result"]["graft"]["points"]:
        assert math.isfinite(point["harm"])
        assert point["kl"] is None


def test_a_mask_file_of_another_model_is_refused_before_the_first_step(tmp_path) -> None:
    other = build("llama")
    space = ParameterSpace.of(other)
    ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in zip(space.names, space.shapes, strict=True)}
    mask = ParameterMask(space, ones)
    mask.save(tmp_path / "other.safetensors", model=other)
    watcher = ChangeAttribution(n_samples=2, shares=[], masks={"other": str(tmp_path / "other.safetensors")})
    with pytest.raises(StoreError, match=r"other\.safetensors"):
        fit(tmp_path / "run", [GoldenSnapshot(), watcher], max_steps=1, max_epochs=1)
