"""The callback: what it measures, which heads and prompts it shows, what it refuses."""

from __future__ import annotations

import json
import math

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from lightning_goldy.analysis import AttentionStatistics, attention_maps, attention_statistics
from lightning_goldy.analysis.attention import STATISTICS
from lightning_goldy.callbacks import AttentionTracker, ExactResume, GoldenSnapshot
from lightning_goldy.core import ClassifierObjective, load_vectors
from lightning_goldy.core.vector import substituted
from lightning_goldy.data.tokenization import byte_tokenizer
from lightning_goldy.report import write_report
from lightning_goldy.report.topics.attention import spectra
from tests.callbacks.training import Finetune, TokenData, fit
from tests.references.model_zoo import build_family
from tests.references.models import VOCABULARY, build, class_batch

EPOCH = 8  # optimizer steps: 16 samples in batches of 2
RESUMING = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:.*exists and is not empty")


def rows(callback: AttentionTracker) -> list[dict]:
    return [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]


class Speaking(TokenData):
    """Data with a tokenizer; its 53 first bytes are what the small models know."""

    tokenizer = byte_tokenizer()


def table(values: list) -> torch.Tensor:
    numbers = [[math.nan if value is None else value for value in line] for line in values]
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_row_is_what_the_functions_find(tmp_path):
    snapshot = GoldenSnapshot(every_n_steps=None, at=("end",))
    callback = AttentionTracker({"digits": [17, 18, 19, 17, 18]}, heads=[[1, 0], [0, 1]], n_samples=3, at=("end",))
    _, module, _ = fit(tmp_path, [snapshot, callback], max_epochs=1)
    (row,) = rows(callback)
    batches = list(TokenData().probe_dataloader())
    base, _ = load_vectors(snapshot.folder / "base.safetensors", module.model)
    expected = attention_statistics(module.model, batches, base=base, n_samples=3)
    assert set(row["result"]["statistics"]) == {*STATISTICS, "drift"}
    for name, values in row["result"]["statistics"].items():
        torch.testing.assert_close(table(values), expected.statistic(name), rtol=0, atol=1e-6, equal_nan=True)
        if expected.statistic(name).isfinite().any():
            assert row["metrics"][name] == pytest.approx(expected.mean(name), abs=1e-6)
    assert row["metrics"]["drift_max"] == pytest.approx(float(expected.drift.max()), abs=1e-6)
    assert row["metrics"]["drift"] > 1e-5
    for layer in range(2):
        assert row["metrics"][f"drift/layer_{layer}"] == pytest.approx(float(expected.drift[layer].mean()), abs=1e-6)
    assert row["result"]["n_samples"] == 3
    assert list(row["result"]["queries"].values()) == expected.queries[0].tolist()
    # Three samples and one prompt, each with both parameters.
    assert row["cost"]["forwards"] == 3 * 2 + 2

    (prompt,) = row["result"]["prompts"]
    ids = {"input_ids": torch.tensor([[17, 18, 19, 17, 18]])}
    maps = attention_maps(module.model, ids)
    with substituted(module.model, base):
        before = attention_maps(module.model, ids)
    assert prompt["tokens"] == ["17", "18", "19", "17", "18"]
    assert [(each["layer"], each["head"]) for each in prompt["maps"]] == [(1, 0), (0, 1)]
    for each in prompt["maps"]:
        pair = each["layer"], each["head"]
        torch.testing.assert_close(table(each["weights"]), maps.pattern(*pair).double(), rtol=0, atol=6e-5)
        torch.testing.assert_close(table(each["base"]), before.pattern(*pair).double(), rtol=0, atol=6e-5)
    values = torch.tensor(prompt["singular_values"], dtype=torch.float64)
    torch.testing.assert_close(values, maps.singular_values(4), rtol=0, atol=1e-6)
    means = values.mean(dim=(0, 1)).tolist()
    assert row["result"]["spectra"] == [{"prompt": "digits", "values": pytest.approx(means)}]


def test_without_a_snapshot_there_is_no_drift(tmp_path):
    alone = AttentionTracker(n_samples=2, at=("start",))
    asked = AttentionTracker(n_samples=2, drift=False, at=("start",), name="asked")
    fit(tmp_path, [alone], max_epochs=1)
    fit(tmp_path / "beside", [GoldenSnapshot(every_n_steps=None), asked], max_epochs=1)
    for callback in (alone, asked):
        (row,) = rows(callback)
        assert "drift" not in row["metrics"]
        assert row["result"]["prompts"][0]["maps"][0]["base"] is None
        assert row["cost"]["forwards"] == 2 + 1


def test_the_base_itself_has_not_drifted(tmp_path):
    callback = AttentionTracker(n_samples=2, every_n_steps=4, at=("start",))
    fit(tmp_path, [GoldenSnapshot(every_n_steps=None), callback], max_epochs=1)
    drifts = [row["metrics"]["drift"] for row in rows(callback)]
    assert drifts[0] == 0.0
    assert all(drift > 0 for drift in drifts[1:])
    assert len(drifts) == 3


def test_heads_are_chosen_once(tmp_path):
    callback = AttentionTracker(n_samples=4, every_n_steps=2, at=("start",))
    fit(tmp_path, [callback])
    found = rows(callback)
    first = found[0]["result"]
    statistics = {name: table(values) for name, values in first["statistics"].items()}
    kinds = ("previous_token", "induction", "duplicate_token", "first_token")
    places = [int(statistics[name].nan_to_num(-1).argmax()) for name in kinds if statistics[name].isfinite().any()]
    assert first["heads"] == [list(pair) for pair in dict.fromkeys((place // 2, place % 2) for place in places)]
    assert all(row["result"]["heads"] == first["heads"] for row in found)
    steps, _ = spectra(found)["probe"][0]
    assert [row["step"] for row in found] == steps == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_all_heads_and_texts_with_token_names(tmp_path):
    prompts = {"sum": "1 + 1\n", "long": "01234" * 8}
    callback = AttentionTracker(prompts, heads="all", n_samples=2, max_tokens=7, at=("end",), log_scalars="all")
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    fit(tmp_path, [callback], data=Speaking(), max_epochs=1, logger=logger)
    (row,) = rows(callback)
    short, long = row["result"]["prompts"]
    assert short["tokens"] == ["1", "·", "+", "·", "1", "\\n"]
    assert (len(long["tokens"]), long["n_tokens"]) == (7, 40)
    assert row["result"]["heads"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert len(long["maps"]) == 4
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0}).Reload()
    drawn = {f"goldy/attention_tracker/figure/{name}" for name in ("heads", "patterns", "singular_values")}
    assert drawn <= set(events.Tags()["images"])
    for tag in ("entropy", "entropy/layer_1", "largest_singular_value/sum"):
        assert f"goldy/attention_tracker/{tag}" in events.Tags()["scalars"]
    page = write_report(tmp_path / "run").read_text()
    assert "What each head looks at" in page
    assert "add GoldenSnapshot for the drift" in page


def test_the_default_prompt_is_the_first_sample_without_padding(tmp_path):
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])}
    batch["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    # The model's own loss counts the positions of the padding, too.
    callback = AttentionTracker(probe=[batch], n_samples=2, at=("end",), check=False)
    _, module, _ = fit(tmp_path, [callback], max_epochs=1)
    (prompt,) = rows(callback)[0]["result"]["prompts"]
    assert (prompt["name"], prompt["tokens"]) == ("probe", ["5", "6", "7"])
    expected = attention_statistics(module.model, [batch])
    found = rows(callback)[0]["result"]["statistics"]["distance"]
    torch.testing.assert_close(table(found), expected.distance, rtol=0, atol=1e-6)


def test_a_classifier_of_ones_own(tmp_path):
    class Classifier(Finetune):
        def __init__(self):
            super().__init__()
            self.model = build("bert")

        def training_step(self, batch, batch_idx):
            loss = self.model(**class_batch(2)).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            return None

    callback = AttentionTracker(objective=ClassifierObjective(), probe=[class_batch()], n_samples=6, at=("end",))
    _, module, _ = fit(tmp_path, [callback], module=Classifier, max_epochs=1)
    expected = attention_statistics(module.model, [class_batch()])
    assert isinstance(expected, AttentionStatistics)
    assert rows(callback)[0]["metrics"]["entropy"] == pytest.approx(expected.mean("entropy"), abs=1e-6)


@RESUMING
@pytest.mark.parametrize(
    "same_folder", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new folder", "same folder"]
)
def test_resumed_equals_uninterrupted(tmp_path, same_folder):
    def callbacks(folder):
        watcher = AttentionTracker(n_samples=3, every_n_steps=5, at=())
        saver = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
        return [ExactResume(), GoldenSnapshot(every_n_steps=None, at=("end",)), watcher, saver]

    whole = callbacks(tmp_path / "whole_checkpoints")
    fit(tmp_path / "whole", whole, enable_checkpointing=True)
    first = callbacks(tmp_path / "checkpoints")
    fit(tmp_path / "first", first, max_steps=EPOCH + 5, enable_checkpointing=True)
    again = callbacks(tmp_path / "checkpoints")
    folder = tmp_path / ("first" if same_folder else "second")
    fit(folder, again, enable_checkpointing=True, ckpt_path=tmp_path / "checkpoints" / f"step={EPOCH}.ckpt")
    expected, found = ([{**row, "cost": None} for row in rows(each[2])] for each in (whole, again))
    assert found == expected
    assert [row["step"] for row in found] == [5, 10, 15]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": {}}, "prompts= names no prompt"),
        ({"prompts": {"a b": "x"}}, "prompt names become parts of tags.*'a b'"),
        ({"prompts": {"a": ""}}, "prompt 'a' is empty"),
        ({"prompts": {"a": [1.5]}}, "prompt 'a' is a text or a list of token ids"),
        ({"heads": []}, r"heads is 'all' or a list of \[layer, head\] pairs; got \[\]"),
        ({"heads": "some"}, "heads is 'all' or a list of .* got 'some'"),
        ({"heads": [[1, 2, 3]]}, r"heads is 'all' or a list of \[layer, head\] pairs"),
        ({"n_samples": 0}, "n_samples must be at least 1; got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"singular_values": 0}, "singular_values must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionTracker(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": {"a": "text"}}, "prompt 'a' is a text, but neither Watched nor its data module has a tokenizer"),
        ({"prompts": {"a": [1, VOCABULARY]}}, f"prompt 'a': token {VOCABULARY} is unknown to the model, which has"),
        ({"heads": [[0, 1], [2, 0]]}, "there is no head 0 in layer 2; layers go from 0 to 1"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, arguments, message):
    seen = []

    class Watched(Finetune):
        def __init__(self):
            super().__init__()
            seen.append(self)

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [AttentionTracker(**{"n_samples": 2, **arguments})], module=Watched)
    assert seen[0].losses == []


def test_a_snapshot_that_comes_later_is_there_all_the_same(tmp_path):
    tracker = AttentionTracker(n_samples=2, at=("start",))
    fit(tmp_path, [tracker, GoldenSnapshot()], max_epochs=1)
    (row,) = rows(tracker)
    assert row["metrics"]["drift"] == 0.0


class Summaries(Dataset):
    """Texts of six tokens with targets of four."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, 60, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids[:6], "labels": ids[6:]}


class SummaryData(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Summaries(), batch_size=2)

    val_dataloader = probe_dataloader = train_dataloader


class Summarise(Finetune):
    def __init__(self) -> None:
        super().__init__()
        self.model = build_family("T5").train()


def test_stacks_of_an_encoder_decoder_are_tracked_by_name(tmp_path):
    encoder = AttentionTracker(stack="encoder", n_samples=3, at=("end",), name="encoder")
    decoder = AttentionTracker({"words": [5, 6, 7, 8]}, stack="decoder", n_samples=3, at=("end",), name="decoder")
    shown = AttentionTracker(stack="decoder", n_samples=3, at=("end",), name="shown")
    callbacks = [GoldenSnapshot(every_n_steps=None, at=("end",)), encoder, decoder, shown]
    _, module, _ = fit(tmp_path, callbacks, max_epochs=1, data=SummaryData(), module=Summarise)
    batch = {name: value[None] for name, value in Summaries()[0].items()}
    words = {"input_ids": batch["input_ids"], "decoder_input_ids": torch.tensor([[5, 6, 7, 8]])}
    expected = {
        "encoder": attention_maps(module.model, batch, stack="encoder"),
        "shown": attention_maps(module.model, batch, stack="decoder"),
        "decoder": attention_maps(module.model, words, stack="decoder"),
    }
    for callback in (encoder, decoder, shown):
        (row,) = rows(callback)
        assert row["result"]["stack"] == callback.stack
        assert row["metrics"]["drift"] > 0
        (prompt,) = row["result"]["prompts"]
        values = torch.tensor(prompt["singular_values"], dtype=torch.float64)
        torch.testing.assert_close(
            values, expected[callback.name].singular_values(4), rtol=0, atol=1e-5, equal_nan=True
        )
    with pytest.raises(ValueError, match="an encoder and a decoder, which attend to different tokens: pass stack="):
        fit(tmp_path / "unnamed", [AttentionTracker(n_samples=3)], max_epochs=1, data=SummaryData(), module=Summarise)
    with pytest.raises(ValueError, match="names a part of an encoder-decoder"):
        fit(tmp_path / "one", [AttentionTracker(n_samples=3, stack="decoder")], max_epochs=1)
    with pytest.raises(ValueError, match="unknown stack 'decoders'; did you mean 'decoder'"):
        AttentionTracker(stack="decoders")
