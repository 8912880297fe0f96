"""The mean KL divergence of a moved model from its anchor, with the anchor's predictions kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.core.batches import batch_tensors, map_batch, sample_count, take_samples
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector, substituted

Cache = Literal["auto", "device", "cpu", "none"]
CACHES = ("auto", "device", "cpu", "none")
CACHE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)

# Elements of [rows, vocabulary] that are worked on at a time.
_CHUNK = 1 << 22
# Bins of a histogram, and elements that are binned at a time.
_BINS, _HISTOGRAM_CHUNK = 256, 1 << 16
# Below this difference of log-probabilities no exponential overflows.
_FAR = 80.0


class AnchoredDivergence:
    r"""Mean KL divergence of a module from itself as it was when this was made.

    .. math:: \frac{1}{|T|} \sum_{t \in T} \sum_v p_A(v \mid x_{<t})
        \log \frac{p_A(v \mid x_{<t})}{p_\theta(v \mid x_{<t})}

    over all target positions T of the batches and the whole vocabulary. One forward pass per batch and call; with
    ``cache="none"`` two. Evaluated as :math:`\sum_v p_A (e^{d_v} - 1 - d_v)` with :math:`d = \log p_\theta - \log p_A`,
    whose terms are not negative, so that rounding stays small beside small divergences.

    Args:
        model: The module at the anchor, in the mode in which it will be called.
        batches: What it is compared on; they must stay the same.
        objective: Where the targets are.
        cache: Where the anchor's log-probabilities are kept: on the ``device``, on the ``cpu``, ``none`` (the anchor
            runs again at each call, beside a second copy of the parameters), or ``auto``: the device while they fill at
            most half of its free memory, else the CPU.
        cache_dtype: Of the kept log-probabilities; the logits' own, at least float32, by default. With another the
            divergence is not 0 at the anchor, and what it is there is added to every value.

    Raises:
        ValueError: There is no batch, or an argument is unknown.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> model = nn.Linear(2, 3)
        >>> divergence = AnchoredDivergence(model, [(torch.ones(1, 2), torch.tensor([0]))], ClassifierObjective())
        >>> divergence(model)
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        objective: Objective,
        *,
        cache: Cache = "auto",
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        check_cache(cache, cache_dtype)
        if not batches:
            raise ValueError("there is no batch to compare predictions on")
        self.objective = objective
        self.batches = list(batches)
        self.cache: Cache = cache
        self.positions = 0
        """Number of target positions."""
        self.forwards = 0
        """Samples that forward passes held so far, those that made the anchor's predictions among them."""
        self.backwards = 0
        """Samples that backward passes held so far."""
        self.divided = 0
        """Those of them that other processes do not make, as far as whoever shares out the work has noted."""
        self._kept: list[Tensor] = []
        # At the anchor, of all batches but the first: what rounding adds to the sum.
        self._rounding = 0.0
        self._anchor: ParameterVector | None = None
        with torch.no_grad():
            if cache == "none":
                self._anchor = ParameterVector.of(model, ParameterSpace.of(model))
                self.positions = sum(len(self._log_probs(model, batch)) for batch in self.batches)
            else:
                self._keep(model, cache_dtype)

    def __call__(self, model: nn.Module) -> float:
        """The mean divergence, nats; infinite where the model gives 0 to what the anchor holds possible."""
        total = 0.0
        for index in range(len(self.batches)):
            total += self._from_anchor(model, index)
        return total / self.positions

    def backward(self, model: nn.Module) -> float:
        r"""The mean divergence, and its gradient added to ``grad`` of the parameters; nats.

        The gradient at the logits is known in closed form, :math:`(p_\theta - p_A) / |T|`.
        """
        total = 0.0
        for index, batch in enumerate(self.batches):
            logits = self._logits(model, batch)
            self.backwards += sample_count(batch)
            found = logits.detach()
            anchor = self._anchor_log_probs(model, index)
            total += divergence_sum(anchor, found)
            slope = torch.softmax(precise(found), dim=-1).sub_(anchor.to(found.device, precise(found).dtype).exp())
            logits.backward(slope.div_(self.positions).to(logits.dtype))
        return total / self.positions

    def divide(self, model: nn.Module, replicas: Replicas) -> float:
        """The value at one place, of whose batches each replica takes a share; with the bits that one process finds."""
        own = [self._from_anchor(model, index) for index in replicas.share(range(len(self.batches)))]
        parts = replicas.gather_objects(own)
        total = 0.0
        for index in range(len(self.batches)):
            total += parts[index % replicas.size][index // replicas.size]
        return total / self.positions

    def at_anchor(self, model: nn.Module) -> float:
        """What every value is too large by: the mean divergence of the anchor from what is kept of it, nats.

        It runs on the first batch alone, at every call: a module whose predictions are random, or that is no longer at
        the anchor, is noticed.

        Args:
            model: The module at the anchor, as it was when this was made.

        Returns:
            0 where nothing is rounded and a second run gives the same.
        """
        return (self._from_anchor(model, 0) + self._rounding) / self.positions

    @torch.no_grad()
    def _from_anchor(self, model: nn.Module, index: int) -> float:
        logits = self._logits(model, self.batches[index])
        return divergence_sum(self._anchor_log_probs(model, index), logits)

    def _anchor_log_probs(self, model: nn.Module, index: int) -> Tensor:
        if self._anchor is None:
            return self._kept[index]
        with substituted(model, self._anchor):
            return self._log_probs(model, self.batches[index])

    def _keep(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        for index, batch in enumerate(self.batches):
            exact = self._log_probs(model, batch)
            if index == 0 and self.cache == "auto":
                size = exact.numel() * (dtype or exact.dtype).itemsize * len(self.batches)
                free = torch.cuda.mem_get_info(exact.device)[0] if exact.device.type == "cuda" else math.inf
                self.cache = "device" if 2 * size <= free else "cpu"
            kept = exact if dtype is None else exact.to(dtype)
            self.positions += len(exact)
            if index and kept.dtype != exact.dtype:
                self._rounding += divergence_sum(kept, exact)
            self._kept.append(kept if self.cache == "device" else kept.cpu())

    def _log_probs(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.log_softmax(precise(self._logits(model, batch)), dim=-1)

    def _logits(self, model: nn.Module, batch: Any) -> Tensor:
        self.forwards += sample_count(batch)
        return self.objective.logits_and_targets(model, batch).logits


def divergence_sum(log_probs: Tensor, logits: Tensor) -> float:
    r"""Sum over rows of KL(p || softmax(logits)), nats, in pieces that bound the memory.

    Args:
        log_probs: log p, shape ``[rows, vocabulary]``, any device and dtype.
        logits: Shape ``[rows, vocabulary]``.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]])
        >>> divergence_sum(torch.log_softmax(logits, -1), logits + 3.0) < 1e-12
        True
    """
    rows = max(1, _CHUNK // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(logits), rows):
        found = torch.log_softmax(precise(logits[start : start + rows]), dim=-1)
        anchor = log_probs[start : start + rows].to(found.device, found.dtype)
        probability = anchor.exp()
        difference = found - anchor
        low, high = map(float, difference.aminmax())
        if -math.inf < low and high < _FAR:
            # Below it expm1 is -1 to the last bit, and slow where its exponential underflows.
            least = math.log(torch.finfo(difference.dtype).eps) - 4
            change = difference.clamp(min=least) if low < least else difference
            total += change.expm1().sub_(difference).mul_(probability).sum(dtype=torch.float64)
            continue
        for part in _far_terms(found, anchor, probability, difference, low, high):
            total += part.sum(dtype=torch.float64)
    return float(total)


def _far_terms(
    found: Tensor, anchor: Tensor, probability: Tensor, difference: Tensor, low: float, high: float
) -> Iterator[Tensor]:
    """Terms of a divergence of which the exponential may overflow; what is far off there has nothing to cancel."""
    lost = None if high < math.inf else torch.isneginf(anchor)
    if lost is not None:
        difference = difference.masked_fill(lost, 0.0)
    reached = _exponential_beside(found, anchor)
    change = probability * difference
    if not low > -math.inf:
        change.masked_fill_(probability == 0, 0.0)
    far = (reached - probability).sub_(change)
    inside = difference.clamp(-1.0, 1.0)
    near = inside.expm1().sub_(inside).mul_(probability)
    yield torch.where(difference.abs() < 1, near, far)
    if lost is not None:
        # Where the anchor's probability is exactly 0 all that the other gives it counts.
        yield torch.where(lost, reached, 0.0)


def _exponential_beside(values: Tensor, others: Tensor) -> Tensor:
    """The exponential of values, but 0 where it is so small that adding it to that of the others changes no bit.

    Processors take up to fifty times as long over what is smaller than their smallest normal number.
    """
    numbers = torch.finfo(values.dtype)
    least = math.ceil(math.log(numbers.tiny))
    small = values < least
    found = values.clamp(min=least).exp_().masked_fill_(small, 0.0)
    counts = small.logical_and_(others < least + 4 - math.log(numbers.eps))
    if counts.any():
        found[counts] = values[counts].exp()
    return found


def check_cache(cache: str, cache_dtype: torch.dtype | None) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is unknown.
    """
    require_choice("cache", cache, CACHES)
    if cache_dtype not in CACHE_DTYPES:
        names = ", ".join(str(dtype) for dtype in CACHE_DTYPES[1:])
        raise ValueError(f"cache_dtype must be one of {names}, or None; got {cache_dtype}")


def shortened(
    batches: Iterable[Any], objective: Objective, n_samples: int | None, max_seq_len: int | None
) -> list[Any]:
    """The first samples of the batches, each cut to a length, in batches of the size that they came in.

    Args:
        batches: Batches that the objective understands.
        objective: Cuts batches into samples.
        n_samples: Number of samples; all by default.
        max_seq_len: Tokens of each sample; all by default.

    Raises:
        ValueError: There are fewer samples, or an argument is below 1 (2 tokens).

    Example:
        >>> from lightning_goldy.core.objective import CausalLMObjective
        >>> ids = torch.arange(12).view(3, 4)
        >>> [part["input_ids"].tolist() for part in shortened([{"input_ids": ids}], CausalLMObjective(), 2, 2)]
        [[[0, 1], [4, 5]]]
    """
    if n_samples is not None:
        require_at_least("n_samples", n_samples, 1)
    if max_seq_len is not None and max_seq_len < 2:
        raise ValueError(f"max_seq_len must be at least 2, or there is nothing to predict; got {max_seq_len}")
    kept: list[Any] = []
    left = math.inf if n_samples is None else n_samples
    for batch in batches:
        if left <= 0:
            break
        size = sample_count(batch)
        take = int(min(size, left))
        left -= take
        kept.append(_cut(batch, take if take < size else None, max_seq_len))
    if not kept:
        raise ValueError("there is no sample: the batches are empty")
    if n_samples is not None and left > 0:
        raise ValueError(f"n_samples={n_samples}, but the batches hold only {int(n_samples - left)} samples")
    return kept


def own_share(
    batches: Sequence[Any], model: nn.Module, replicas: Replicas, progress: Callable[[int, int], None] | None
) -> Iterator[Any]:
    """This process's share of the batches on the model's device; each is told as done when the next is asked for."""
    device, mine = next(model.parameters()).device, replicas.share(batches)
    for done, batch in enumerate(mine, 1):
        yield map_batch(batch, lambda tensor: tensor.to(device))
        if progress is not None:
            progress(done, len(mine))


@contextmanager
def counted_forwards(model: nn.Module, sums: dict[str, float]) -> Iterator[None]:
    """Adds the samples of every pass of the model, whoever calls it, to ``forwards``."""

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        sums["forwards"] += len(next(batch_tensors((args, kwargs))))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _cut(batch: Any, samples: int | None, length: int | None) -> Any:
    if samples is not None:
        batch = take_samples(batch, slice(samples))
    if length is None:
        return batch
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError("max_seq_len cuts token sequences; these batches have no 'input_ids'")
    whole = batch["input_ids"].shape[1]
    return map_batch(
        batch, lambda tensor: tensor[:, :length] if tensor.ndim > 1 and tensor.shape[1] == whole else tensor
    )


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence between distributions along the last dimension.

    .. math:: \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m), \qquad m = \tfrac12 (p + q)

    Every element adds a term that is not negative, so equal rows give exactly 0, and close ones lose no more digits
    than their own rounding takes.

    Args:
        first: p, any shape.
        second: q, the same.

    Returns:
        The shape without its last dimension, nats, in [0, log 2]; at least float32.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", section IV.

    Example:
        >>> round(jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item(), 6)
        0.693147
    """
    first, second = precise(first), precise(second)
    middle = (first + second) / 2
    ratio = torch.where(middle > 0, (first - second) / (2 * middle), 0.0)
    # With p = m (1 + x) and q = m (1 - x); where one of them is 0 the logarithm is infinite and its factor 0.
    lowest = -torch.finfo(ratio.dtype).max
    rise = torch.log1p(ratio).clamp_min_(lowest).mul_(1 + ratio)
    fall = torch.log1p(-ratio).clamp_min_(lowest).mul_(1 - ratio)
    return rise.add_(fall).clamp_min_(0.0).mul_(middle).sum(dim=-1) / 2


def effective_rank(spectrum: Tensor) -> float:
    r"""How many directions a spectrum has: the exponential of its entropy.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \frac{\lambda_k}{\sum_l \lambda_l}

    Args:
        spectrum: Eigenvalues or singular values, not negative and not all zero.

    Source: Roy and Vetterli, "The effective rank" (2007).

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
        2.0
    """
    shares = spectrum / spectrum.sum()
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def spectrum_of(matrix: Tensor) -> Tensor:
    """All singular values, descending, by the Gram matrix in float64: exact to 1e-8 of the largest."""
    wide = matrix.double()
    gram = wide @ wide.t() if matrix.shape[0] <= matrix.shape[1] else wide.t() @ wide
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def product_spectrum(left: Tensor, right: Tensor) -> Tensor:
    r"""Singular values of a product of low rank, descending, without the product.

    .. math:: L R^\top = Q_L (R_L R_R^\top) Q_R^\top

    Args:
        left: L, shape ``[rows, rank]``.
        right: R, shape ``[columns, rank]``.

    Returns:
        At most ``rank`` values.

    Example:
        >>> product_spectrum(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [3.0]])).tolist()
        [6.0]
    """
    triangles = [torch.linalg.qr(side.double(), mode="r").R for side in (left, right)]
    return torch.linalg.svdvals(triangles[0] @ triangles[1].t())


def rank_of(spectrum: Tensor, norm: float, side: int) -> int | None:
    r"""How many leading directions hold 99.99 % of a matrix's squared norm.

    .. math:: r = \min \Big\{ r : \sum_{i \le r} \sigma_i^2 \ge (1 - 10^{-4}) \, \|\Delta\|_F^2 \Big\}

    None where that is half of the smaller side or more, or the values do not reach so far.

    Args:
        spectrum: Its largest singular values, descending.
        norm: Its Frobenius norm.
        side: The smaller of its sides.

    Example:
        >>> rank_of(torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0]), 5.0, 6), rank_of(torch.ones(6), 6**0.5, 6)
        (2, None)
    """
    held = spectrum.double().square().cumsum(0) >= (1 - 1e-4) * norm**2
    rank = int((~held).sum()) + 1
    return rank if bool(held.any()) and 2 * rank < side else None


def precise(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    if tensor.dtype is torch.float32:  # of small tensors the question takes longer than their work
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def histogram_drift(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon divergence between the histograms of two tensors' elements over their common range, nats.

    Example:
        >>> histogram_drift(torch.zeros(4), torch.zeros(4)), histogram_drift(torch.zeros(4), torch.ones(4))
        (0.0, 0.6931471805599453)
    """
    low = min(float(first.min()), float(second.min()))
    high = max(float(first.max()), float(second.max()))
    if low == high:
        return 0.0
    return float(jensen_shannon(*(_binned(each, low, high).double() / each.numel() for each in (first, second))))


def _binned(tensor: Tensor, low: float, high: float) -> Tensor:
    """Elements in each of 256 equal bins, by bytes and a piece at a time, which is twice as fast as ``histc``."""
    counts, flat = torch.zeros(_BINS, dtype=torch.int64), tensor.reshape(-1)
    # Halved, because the width of the range of two finite numbers may not be finite.
    scale = _BINS / 2 / (high / 2 - low / 2)
    for start in range(0, flat.numel(), _HISTOGRAM_CHUNK):
        place = flat[start : start + _HISTOGRAM_CHUNK].float().cpu().sub(low).mul_(scale).clamp_(0, _BINS - 1)
        counts += torch.bincount(place.to(torch.uint8), minlength=_BINS)
    return counts
