"""What is measured of attention heads on probe samples, shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention_entropy import EntropyRecorder, batch_length
from lightning_goldy.core.gates import BatchMismatchError, HeadGates
from lightning_goldy.core.objective import FunctionObjective, Objective, map_batch, split_batch
from lightning_goldy.core.sharding import Replicas, is_sharded

Progress = Callable[[int, int], None]


class HeadProbe:
    """The measurements that strategies of importance are made of, each made once and averaged over samples.

    All are of shape ``[layers, heads]``, float64, on the CPU; where a layer has fewer heads the values mean nothing.
    Padding never counts, and every sample counts the same however long it is.

    Args:
        model: In evaluation mode.
        batches: The same on every rank.
        objective: How a batch becomes log-probabilities.
        gates: Of the model.
        replicas: The ranks that share the samples out.
        seed: Of random strategies.
        weights: What a strategy weighs, by name.
        progress: Called with (passes done, passes in all) of one measurement on this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        objective: Objective,
        *,
        gates: HeadGates,
        replicas: Replicas,
        seed: int = 0,
        weights: dict[str, float] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.gates = gates
        self.seed = seed
        self.weights = dict(weights or {})
        self._replicas = replicas
        self._progress = progress or (lambda done, total: None)
        with replicas.together("reading the samples"):
            self._batches, self.n_samples = _share(batches, replicas, next(model.parameters()).device)
        self.measured: dict[str, Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and the largest number of heads of a layer."""
        return (len(self.gates.heads_per_layer), max(self.gates.heads_per_layer))

    def magnitude(self) -> Tensor:
        r"""Mean magnitude of the gate's gradient, :math:`\mathbb E_i |\partial L_i / \partial \xi_h|`, nats."""
        return self._keep("magnitude", self._gradient_moments[1])

    def gradient(self) -> Tensor:
        r"""Mean gradient of the gate, :math:`\mathbb E_i\, \partial L_i / \partial \xi_h`, nats."""
        return self._keep("gradient", self._gradient_moments[0])

    def curvature(self) -> Tensor:
        r"""Second derivative in the gate by the empirical Fisher information of the mean loss per token, nats.

        .. math:: \mathbb E_i \big[ T_i \, (\partial L_i / \partial \xi_h)^2 \big]

        where T_i is the number of the sample's targets, whose terms are taken for independent.
        """
        return self._keep("curvature", self._gradient_moments[2])

    def entropy(self) -> Tensor:
        """Mean entropy of attention rows over the logarithm of the visible length, a fraction in [0, 1].

        Raises:
            UnsupportedArchitectureError: The family's attention patterns cannot be read.
            ValueError: No sample has a row that sees two keys.
        """
        return self._keep("entropy", self._entropy)

    def ablation(self) -> Tensor:
        """What the mean loss gains when a head alone is closed (of a closed head: loses when it alone is opened), nats.

        One forward pass over all samples per head.
        """
        return self._keep("ablation", self._ablation)

    def loss(self) -> float:
        """Mean loss of the samples with the present gates, nats."""
        return float(self._mean(((losses, torch.ones_like(losses)) for losses in self._losses()), ()))

    @cached_property
    def _gradient_moments(self) -> Tensor:
        """Mean gradient, mean magnitude, and mean square times the number of targets: [3, layers, heads]."""

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for done, batch in enumerate(self._batches, 1):
                for gradient, targets in self._in_parts(batch, self._gradients):
                    square = targets[:, None, None] * gradient.square()
                    moments = torch.stack([gradient, gradient.abs(), square], dim=1)  # [B, 3, layers, heads]
                    yield moments, torch.ones_like(moments)
                self._progress(done, len(self._batches))

        frozen = [parameter for parameter in self.model.parameters() if not is_sharded(parameter)]
        needed = [parameter.requires_grad for parameter in frozen]
        try:
            # Only gradients of activations are needed; FSDP2 decides for itself what to differentiate.
            for parameter in frozen:
                parameter.requires_grad_(False)
            return self._mean(rows(), (3, *self.shape))
        finally:
            for parameter, before in zip(frozen, needed, strict=True):
                parameter.requires_grad_(before)

    def _gradients(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Gradient of each sample's loss in its gates, [B, layers, heads] float64, and its number of targets."""
        with self.gates.measured(batch_length(batch)) as leaf:
            log_probs, targets = self._log_probs(batch)
            (gradient,) = torch.autograd.grad(-log_probs.sum(), [leaf])
        return gradient.double(), targets

    def _in_parts(self, batch: Any, measure: Callable[[Any], Any]) -> Iterator[Any]:
        """Measures a batch at once, or sample by sample when the objective calls the model so."""
        alone = batch_length(batch) == 1
        if alone or not isinstance(self.objective, FunctionObjective):
            try:
                yield measure(batch)
                return
            except BatchMismatchError:
                if alone:
                    raise
        for sample in split_batch(batch):
            yield measure(sample)

    def _log_probs(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(self.objective, FunctionObjective) and self.objective.logits is None:
            log_probs = self.objective.log_probs(self.model, batch)
            return log_probs, torch.ones_like(log_probs, dtype=torch.float64)
        target = self.objective.logits_and_targets(self.model, batch)
        return target.log_probs(), torch.bincount(target.sample, minlength=target.n_samples).double()

    @cached_property
    def _entropy(self) -> Tensor:
        recorder = EntropyRecorder(self.gates.architecture)

        def measure(batch: Any) -> list[Tensor]:
            with recorder.watching(self.model, batch), torch.no_grad():
                self.objective.log_probs(self.model, batch)
            return recorder.entropies()

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for done, batch in enumerate(self._batches, 1):
                for layers in self._in_parts(batch, measure):
                    found = layers[0].new_zeros(len(layers[0]), *self.shape, dtype=torch.float64)
                    for index, layer in enumerate(layers):
                        found[:, index, : layer.shape[1]] = layer
                    yield found.nan_to_num(nan=0.0), (~found.isnan()).double()
                self._progress(done, len(self._batches))

        entropy = self._mean(rows(), self.shape)
        if any(bool(entropy[layer, :size].isnan().any()) for layer, size in enumerate(self.gates.heads_per_layer)):
            raise ValueError("entropy needs a sample of at least two tokens: no attention row sees two keys")
        return entropy

    @cached_property
    def _ablation(self) -> Tensor:
        present, heads = set(self.gates.closed), self.gates.heads
        # One table more than layers, so that the number of samples travels with the sums.
        sums = torch.zeros(self.shape[0] + 1, self.shape[1], dtype=torch.float64)
        with self._replicas.together("measuring heads"):
            kept, sums[-1, 0] = self._total_loss(), sum(batch_length(batch) for batch in self._batches)
            for done, head in enumerate(heads, 1):
                with self.gates.closing_only(sorted(present ^ {head})):
                    changed = self._total_loss()
                sums[head] = kept - changed if head in present else changed - kept
                self._progress(done, len(heads))
        sums = self._replicas.sum_(sums.to(self._device)).cpu()
        return sums[:-1] / sums[-1, 0]

    def _total_loss(self) -> float:
        return sum(float(losses.sum()) for losses in self._losses())

    def _losses(self) -> Iterator[Tensor]:
        for batch in self._batches:
            with torch.no_grad():
                yield -self.objective.log_probs(self.model, batch).double()

    def _mean(self, rows: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Tensor:
        """Weighted mean over the samples of all ranks, from (values, weights) whose first dimension is samples."""
        total = torch.zeros((2, *shape), dtype=torch.float64, device=self._device)
        # What fails on one rank must not leave the others waiting in the sum.
        with self._replicas.together("measuring heads"):
            for values, weights in rows:
                total[0] += (values * weights).sum(dim=0)
                total[1] += weights.sum(dim=0)
        self._replicas.sum_(total)
        return (total[0] / total[1]).cpu()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _keep(self, name: str, value: Tensor) -> Tensor:
        self.measured[name] = value
        return value


def _share(batches: Iterable[Any], replicas: Replicas, device: torch.device) -> tuple[list[Any], int]:
    """This rank's rows of every batch, and the number of samples of all."""
    mine, seen = [], 0
    for batch in batches:
        length = batch_length(batch)
        rows = torch.tensor(list(range((replicas.rank - seen) % replicas.size, length, replicas.size)))
        seen += length
        if len(rows) == length:
            mine.append(map_batch(batch, lambda tensor: tensor.to(device)))
        elif len(rows):
            mine.append(map_batch(batch, lambda tensor, rows=rows: tensor[rows.to(tensor.device)].to(device)))  # type: ignore[misc]
    if not seen:
        raise ValueError("there is no sample: the batches are empty")
    return mine, seen
