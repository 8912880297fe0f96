"""What a training or evaluation stage measures, over batches of different sizes and over processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_goldy.core.objective import CausalLMObjective, FunctionObjective, Objective


class Perplexity(MeanMetric):
    """The exponential of the mean loss, over everything it was updated with.

    Example:
        >>> import math, torch
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor(math.log(8.0)), 3)
        >>> round(metric.compute().item(), 4)
        8.0
    """

    def compute(self) -> Tensor:
        """The exponential of the weighted mean."""
        return super().compute().exp()


class StageMetrics(nn.Module):
    """Loss, perplexity and accuracy of one stage, each target counting once.

    Args:
        objective: Decides which of the three there are.

    Example:
        >>> import torch
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> objective = ClassifierObjective()
        >>> metrics = StageMetrics(objective)
        >>> batch = (torch.ones(4, 3), torch.tensor([0, 0, 0, 1]))
        >>> loss, scalars, size = metrics.measure(objective, nn.Linear(3, 2), batch)
        >>> sorted(metrics.named()), sorted(scalars), size
        (['accuracy', 'loss'], ['accuracy', 'loss'], 4)
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self._has_logits = not (isinstance(objective, FunctionObjective) and objective.logits is None)
        self._predicts_tokens = isinstance(objective, CausalLMObjective)
        self._accuracy_name = "token_accuracy" if self._predicts_tokens else "accuracy"
        # A NaN loss must show, not be left out of the mean.
        self.loss = MeanMetric(nan_strategy="disable")
        self.accuracy = MeanMetric(nan_strategy="disable")
        self.perplexity = Perplexity(nan_strategy="disable")

    def measure(self, objective: Objective, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        """One forward pass.

        Args:
            objective: How the batch becomes logits and targets.
            model: What the objective applies to.
            batch: What the objective understands.

        Returns:
            The mean loss over the targets (nats, with its graph), the batch's own scalars, and the number of samples.
        """
        if not self._has_logits:
            loss = objective.loss(model, batch)
            size = sum(1 for _ in objective.samples(batch))
            self.loss.update(loss.detach(), size)
            return loss, {"loss": loss.detach()}, size
        target = objective.logits_and_targets(model, batch)
        loss = target.loss()
        accuracy = (target.logits.detach().argmax(dim=-1) == target.targets).float().mean()
        count = len(target.targets)
        self.loss.update(loss.detach(), count)
        self.accuracy.update(accuracy, count)
        scalars = {"loss": loss.detach(), self._accuracy_name: accuracy}
        if self._predicts_tokens:
            self.perplexity.update(loss.detach(), count)
            scalars["perplexity"] = loss.detach().exp()
        return loss, scalars, target.n_samples

    def named(self) -> dict[str, MeanMetric]:
        """The metrics that this objective has, by name."""
        metrics = {"loss": self.loss}
        if self._has_logits:
            metrics[self._accuracy_name] = self.accuracy
        if self._predicts_tokens:
            metrics["perplexity"] = self.perplexity
        return metrics
