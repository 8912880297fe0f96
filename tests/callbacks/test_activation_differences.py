from __future__ import annotations

import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from lightning_goldy.analysis import activation_differences
from lightning_goldy.callbacks import ActivationDifferences, GoldenSnapshot
from lightning_goldy.data.tokenization import byte_tokenizer
from lightning_goldy.report import draw_figures
from lightning_goldy.report.topics.activations import spelled_html
from tests.callbacks.training import TokenData, Tokens, fit


class WithText(TokenData):
    def collateral_dataloader(self):
        return torch.utils.data.DataLoader(Tokens(6, 9), batch_size=3)


def test_it_logs_what_the_function_finds_and_rows_can_be_drawn(tmp_path) -> None:
    snapshot, watcher = GoldenSnapshot(), ActivationDifferences(n_samples=4, positions=2)
    _, module, _ = fit(tmp_path, [snapshot, watcher], data=WithText(), max_epochs=1)
    first, second = WithText().collateral_dataloader()
    batches = [first, {key: value[:1] for key, value in second.items()}]
    expected = activation_differences(module.model, snapshot.base, batches, positions=2)
    (row,) = [json.loads(line) for line in (watcher.folder / "results.jsonl").read_text().splitlines()]
    for name, value in expected.metrics().items():
        assert row["metrics"][name] == pytest.approx(value, rel=1e-4), name
    assert row["headline"] == expected.headline()
    assert set(draw_figures(row, [])) == {"layers", "positions"}
    assert "What the mean difference spells" in spelled_html(row)


def test_without_unrelated_text_the_probe_serves_and_the_row_says_so(tmp_path) -> None:
    watcher = ActivationDifferences(n_samples=8)
    fit(tmp_path, [GoldenSnapshot(), watcher], max_epochs=1, max_steps=2)
    row = json.loads((watcher.folder / "results.jsonl").read_text())
    assert "the text is the probe, the finetune's own" in row["headline"]
    assert row["result"]["n_samples"] == 4  # all that the probe has
    few = ActivationDifferences(n_samples=3)
    fit(tmp_path / "few", [GoldenSnapshot(), few], max_epochs=1, max_steps=2)
    assert json.loads((few.folder / "results.jsonl").read_text())["result"]["n_samples"] == 3


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"add GoldenSnapshot\(\) to the callbacks"):
        fit(tmp_path, [ActivationDifferences()])
    with pytest.raises(ValueError, match="layers lie between 0 and 1; got 7"):
        fit(tmp_path / "b", [GoldenSnapshot(), ActivationDifferences([7])])
    with pytest.raises(ValueError, match="neither the module nor its data has a tokenizer"):
        fit(tmp_path / "c", [GoldenSnapshot(), ActivationDifferences(prompts=["a"])])
    short, one = torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)
    for text, message in (
        ([{"input_ids": short}], "text 0 has 3 tokens, fewer than the positions=5"),
        ([{"input_ids": one}], "two halves need at least two texts; got 1"),
        ([short], r"needs batches that are dicts with 'input_ids' of shape \[B, T\]; got Tensor"),
    ):
        watcher = ActivationDifferences(text=text, n_samples=2, on_error="warn")
        with pytest.raises(ValueError, match=message):
            fit(tmp_path / "d", [GoldenSnapshot(), watcher], max_steps=1)
    with pytest.raises(ValueError, match="layers is empty"):
        ActivationDifferences([])
    for layers, message in (
        ([0.5], "numbers of blocks, from 0; got 0.5"),
        ([-1], "numbers of blocks, from 0; got -1"),
        ("a", "layers is a list of numbers of blocks; got 'a'"),
        ([], "layers is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ActivationDifferences(layers)  # type: ignore[arg-type]
    for tolerance in (math.nan, math.inf, "a"):
        with pytest.raises(ValueError, match="tolerance must be positive and finite; got"):
            ActivationDifferences(tolerance=tolerance)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tolerance must be positive"):
        ActivationDifferences(tolerance=0)


def test_texts_that_the_model_cannot_read_or_continue_fail_before_the_first_step(tmp_path) -> None:
    words = torch.ones(2, 9, dtype=torch.long)
    for place, (options, message) in enumerate(
        (
            ({"text": [{"input_ids": 10**6 * words}]}, "batch 0 of the text cannot go through GPT2LMHeadModel"),
            ({"prompts": ["a"], "max_new_tokens": 1000}, "that exceeds the model's 32 positions"),
        )
    ):
        data, steps = WithText(), []
        data.tokenizer = byte_tokenizer()
        watcher = ActivationDifferences(n_samples=2, **options)
        counting = LambdaCallback(on_train_batch_end=lambda *args, steps=steps: steps.append(args))
        with pytest.raises(ValueError, match=message):
            fit(tmp_path / str(place), [GoldenSnapshot(), watcher, counting], data=data)
        assert not steps
    with pytest.raises(ValueError, match="prompts is a list of texts; got one text, 'My favourite'"):
        ActivationDifferences(prompts="My favourite")
