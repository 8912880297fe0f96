"""What an analysis will do is tried before the first step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from lightning_goldy.callbacks import (
    BasinVolume,
    GoldenParameters,
    GoldenSnapshot,
    ReverseGoldenParameters,
    TaylorDiff,
)
from lightning_goldy.core import FunctionObjective
from tests.callbacks.training import Finetune, differences, fit

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:.*exists and is not empty")


class StepError(Exception):
    """A training step was made."""


class Never(Finetune):
    def training_step(self, batch, batch_idx):
        raise StepError


class WithUnused(Finetune):
    def __init__(self) -> None:
        super().__init__()
        self.model.spare = nn.Linear(2, 2)


class Checkpointed(Finetune):
    def __init__(self) -> None:
        super().__init__()
        self.model.gradient_checkpointing_enable()
        self.model.enable_input_require_grads()


class Bloom(Finetune):
    def __init__(self) -> None:
        super().__init__()
        self.model = BloomForCausalLM(BloomConfig(vocab_size=53, hidden_size=16, n_layer=1, n_head=2))


class Ranked(nn.Module):
    """Logits by way of what torch has no forward mode for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.table = model, nn.Parameter(torch.eye(53))

    @property
    def config(self):
        return self.inner.config

    def prepare_inputs_for_generation(self) -> None:
        """What makes it a language model."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        found = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        found.logits = found.logits - torch.cdist(found.logits, self.table)
        return found


class Distances(Finetune):
    def __init__(self) -> None:
        super().__init__()
        self.model = Ranked(self.model)


class Hidden(Distances):
    """Whose gradient lacks what the distances say."""

    def __init__(self) -> None:
        super().__init__()
        self.model.register_forward_hook(self.without_distances)

    @staticmethod
    def without_distances(model, args, found):
        with torch.no_grad():
            distances = torch.cdist(found.logits, model.table)
        found.logits = found.logits + 3 * distances
        return found


# Its value has no gradient, which no forward pass tells.
FLAT = FunctionObjective(lambda model, batch: model(input_ids=batch["input_ids"]).logits.detach().square().mean())


def row(callback) -> dict:
    return json.loads((callback.folder / "results.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: [GoldenParameters(n_samples=2, objective=FLAT, **options)],
        lambda **options: [ReverseGoldenParameters(n_samples=2, objective=FLAT, **options)],
        lambda **options: [BasinVolume(2, n_samples=2, preconditioner="kronecker", objective=FLAT, **options)],
        lambda **options: [
            GoldenSnapshot(),
            TaylorDiff(n_samples=2, function_space=False, objective=FLAT, **options),
        ],
    ],
    ids=["golden", "reverse", "basin", "taylor"],
)
def test_what_has_no_gradient_fails_before_the_first_step_unless_it_is_not_to_be_checked(tmp_path, make) -> None:
    with pytest.raises(ValueError, match=r"depends on none of the \d+ "):
        fit(tmp_path / "checked", make(), module=Never)
    with pytest.raises(StepError):
        fit(tmp_path / "unchecked", make(check=False), module=Never)


@pytest.mark.filterwarnings("ignore:the objective does not depend on")
def test_what_the_loss_does_not_use_ends_no_run(tmp_path) -> None:
    callbacks = [
        GoldenParameters(n_samples=2),
        ReverseGoldenParameters(n_samples=2),
        GoldenSnapshot(),
        TaylorDiff(n_samples=2, by="tensor"),
        BasinVolume(2, n_samples=2, preconditioner="best"),
    ]
    fit(tmp_path, callbacks, module=WithUnused, max_epochs=1)
    assert row(callbacks[3])["result"]["loss_shares"]["spare.weight"] == 0
    counts = {tensor["name"]: tensor["golden"] for tensor in row(callbacks[0])["result"]["tensors"]}
    assert counts["spare.weight"] == 0 < sum(counts.values())


@pytest.mark.parametrize("module", [Checkpointed, Bloom])
def test_the_expansion_goes_by_forward_mode(tmp_path, module) -> None:
    taylor = TaylorDiff(n_samples=2)
    _, _, found = fit(tmp_path / "with", [GoldenSnapshot(), taylor], module=module, max_epochs=1)
    assert row(taylor)["result"]["route"] == "forward"
    _, _, expected = fit(tmp_path / "without", module=module, max_epochs=1)
    assert differences(expected, found) == []


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*torch.jit.script.* is deprecated")
def test_differences_are_announced_at_the_start_and_stand_in_the_row(tmp_path) -> None:
    taylor = TaylorDiff(n_samples=2)
    with pytest.warns(UserWarning, match=r"taylor_diff: Ranked has no forward-mode.*torch has none of _.*differences"):
        fit(tmp_path, [GoldenSnapshot(), taylor], module=Distances, max_epochs=1)
    result, metrics = row(taylor)["result"], row(taylor)["metrics"]
    assert result["route"] == "differences"
    assert result["error"] > 0
    # The loss bends within a tenth of this step, so that differences over it are no derivative, and the gradient is.
    assert math.fsum(result["loss_shares"].values()) == pytest.approx(metrics["first_order"])


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_gradient_that_is_none_of_the_values_is_refused_also_where_the_loss_bends(tmp_path) -> None:
    with pytest.raises(ValueError, match="gradient of Ranked is not the derivative of its loss"):
        fit(tmp_path, [GoldenSnapshot(), TaylorDiff(n_samples=2, check=False)], module=Hidden, max_epochs=1)
