"""What a training or evaluation stage measures, over batches of different sizes and over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_goldy.core.objective import (
    CausalLMObjective,
    FunctionObjective,
    MaskedLMObjective,
    Objective,
    Seq2SeqObjective,
)


class TargetMean(Metric):
    """The mean over targets of batch means, each counting as often as its batch has targets; NaN stays NaN.

    Not torchmetrics' MeanMetric, which either leaves NaN out or (``nan_strategy="disable"``) ignores the weights.

    Example:
        >>> metric = TargetMean()
        >>> metric.update(torch.tensor(1.0), 3)
        >>> metric.update(torch.tensor(5.0), 1)
        >>> metric.compute().item()
        2.0
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        # Integers: float32 could not count an epoch's tokens.
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, count: int) -> None:
        """Adds a batch.

        Args:
            mean: Over the batch, a scalar.
            count: Its targets.
        """
        self.total += mean.float() * count
        self.count += count

    def compute(self) -> Tensor:
        """The mean over everything."""
        return self.total / self.count


class Perplexity(TargetMean):
    """The exponential of the mean loss.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor(8.0).log(), 3)
        >>> round(metric.compute().item(), 4)
        8.0
    """

    def compute(self) -> Tensor:
        """The exponential of the mean over everything."""
        return super().compute().exp()


class StageMetrics(nn.Module):
    """Loss, perplexity and accuracy of one stage, each target counting once.

    Args:
        objective: Decides which of the three there are.

    Example:
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
        self._predicts_tokens = isinstance(objective, (CausalLMObjective, MaskedLMObjective, Seq2SeqObjective))
        self._accuracy_name = "token_accuracy" if self._predicts_tokens else "accuracy"
        self.loss = TargetMean()
        self.accuracy = TargetMean()
        self.perplexity = Perplexity()

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

    def named(self) -> dict[str, TargetMean]:
        """The metrics that this objective has, by name."""
        metrics: dict[str, TargetMean] = {"loss": self.loss}
        if self._has_logits:
            metrics[self._accuracy_name] = self.accuracy
        if self._predicts_tokens:
            metrics["perplexity"] = self.perplexity
        return metrics
