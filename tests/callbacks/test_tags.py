"""How many scalars reach the loggers does not grow with the model."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_goldy.callbacks import (
    ActivationDifferences,
    AttentionTracker,
    BasinVolume,
    ChangeAttribution,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    TaylorDiff,
)
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data import byte_tokenizer
from lightning_goldy.report import figures
from lightning_goldy.report.descriptions import description_of

PIECES = [KnowledgePiece(f"p{n}", f"{n} + {n}?", str(2 * n), group=f"g{n % 2}") for n in range(6)]


class Deep(L.LightningModule):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        config = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 258}
        self.model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **config))
        self.tokenizer = byte_tokenizer()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def everything():
    few = {"n_samples": 4}
    return [
        GoldenSnapshot(track_updates=True, every_n_steps=1),
        GoldenParameters(**few, every_n_steps=1),
        ReverseGoldenParameters(**few, search={"rounds": 1}, every_n_steps=1),
        ParameterDistribution(),
        TaylorDiff(**few),
        AttentionTracker(**few),
        BasinVolume(2, **few),
        ChangeAttribution(nodes=1, **few),
        ActivationDifferences(**few),
        KnowledgeCoupling(PIECES, edits=["p0"], template="{question}"),
    ]


def tags(folder, layers):
    """Of this package, as they stand in the event file."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 250, (8, 6))]
    loader = DataLoader(rows, batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=TensorBoardLogger(folder), callbacks=everything(),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Deep(layers), loader)
    found = EventAccumulator(trainer.logger.log_dir, size_guidance={"scalars": 0}).Reload().Tags()["scalars"]
    return sorted(tag for tag in found if tag.startswith("goldy/"))


def test_headlines_are_few():
    """Of metrics that there is one of for each block, or each kind of pair, none is a headline."""
    for analysis, metrics in {
        "golden_snapshot": ("relative_change/model.layers.3", "delta_norm/model.layers.3"),
        "golden_parameters": ("density/model.layers.3", "count"),
        "attention_tracker": ("entropy/layer3", "drift/layer3"),
        "parameter_distribution": ("stable_rank/model.layers.3",),
        "change_attribution": ("share/model.layers.3", "share/mlp"),
        "coupling_drift": ("measured_change/same_subject", "exact/same_relation", "slope"),
        "activation_differences": ("clearest_layer", "stream_null"),
        "basin_volume": ("bits_per_parameter", "eps"),
        # It is the nonlinearity.
        "taylor_diff": ("relative_error/order1",),
    }.items():
        assert not any(description_of(analysis).is_headline(name) for name in metrics), analysis


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_of_thirty_layers_there_are_as_many_as_of_four_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {})
    few = tags(tmp_path / "few", 4)
    assert tags(tmp_path / "many", 30) == few
    assert len({tag.split("/")[1] for tag in few}) == len(everything())
    assert len(few) <= 40, few
