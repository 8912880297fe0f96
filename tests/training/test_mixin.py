"""The analyses as methods of any LightningModule."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_goldy import ClassifierObjective, GoldyMixin, GoldyModule
from lightning_goldy.analysis import golden_parameters
from lightning_goldy.core import ParameterVector
from lightning_goldy.data import AtlasDataModule

CONFIG = {"model_type": "gpt2", "vocab_size": 16, "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}


class Mine(GoldyMixin, L.LightningModule):
    goldy_model_attribute = "network"

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(4, 2)
        self.objective = ClassifierObjective()


def _batch():
    return (torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1]))


def test_the_method_is_the_function_on_the_named_model():
    module, batch = Mine(), _batch()
    result = module.golden_parameters([batch], top_k_percent=30.0, quorum=0.5)
    expected = golden_parameters(module.network, [batch], ClassifierObjective(), top_k_percent=30.0, quorum=0.5)
    assert result.mask.space.names == ("weight", "bias")
    assert result.summary() == expected.summary()
    assert result.count > 0


def test_an_instance_may_name_another_model():
    module = Mine()
    module.other = nn.Linear(4, 2, bias=False)
    module.goldy_model_attribute = "other"
    assert module.golden_parameters([_batch()]).mask.space.names == ("weight",)


def test_a_missing_model_lists_those_there_are():
    module = Mine()
    module.goldy_model_attribute = "net"
    with pytest.raises(ValueError, match=r"'net'.*network"):
        module.golden_parameters([_batch()])


def test_without_batches_or_trainer_it_says_what_to_pass():
    with pytest.raises(ValueError, match=r"attached to no trainer.*batches="):
        Mine().golden_parameters()


def test_the_default_batches_are_the_probe_of_the_data_module(tmp_path):
    data = AtlasDataModule(batch_size=8, probe_size=6)
    module = GoldyModule({**CONFIG, "vocab_size": 653})
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        barebones=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    result = module.golden_parameters(top_k_percent=10.0)
    assert result.n_samples == 6
    expected = golden_parameters(module.model, data.probe_dataloader(), top_k_percent=10.0)
    for name, mask in expected.mask.items():
        assert torch.equal(result.mask[name], mask), name


def test_a_language_model_needs_no_objective():
    module = GoldyModule(CONFIG)
    del module.objective
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    assert module.golden_parameters([batch]).n_samples == 2


def test_another_task_needs_one():
    module = Mine()
    del module.objective
    with pytest.raises(ValueError, match="objective="):
        module.golden_parameters([_batch()])


def test_volumes_and_expansions_are_methods_too(tmp_path):
    class Mine(GoldyMixin, L.LightningModule):
        objective = ClassifierObjective()

        def __init__(self):
            super().__init__()
            self.model = nn.Linear(4, 3)

    module = Mine()
    batches = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]
    base = ParameterVector.of(module.model)
    assert module.basin_volume(batches, n_directions=2).n_directions == 2
    with torch.no_grad():
        module.model.weight.add_(0.1)
    found = module.taylor_diff(base, batches, by=None)
    assert found.regime == "lazy"
    assert found.step_norm == pytest.approx(0.1 * 12**0.5, rel=1e-5)
