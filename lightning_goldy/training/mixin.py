"""The analyses as methods of any LightningModule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lightning_goldy.core.objective import Objective
from lightning_goldy.training.subject import find_model, find_objective, find_probe

if TYPE_CHECKING:
    from lightning_goldy.analysis import GoldenResult, TaylorDiffResult, VolumeResult
    from lightning_goldy.core.base import Base


class GoldyMixin:
    """Gives a LightningModule the analyses as methods.

    Put it before ``LightningModule`` among the bases. The callbacks find the model, the objective and the probe of a
    module in the same way.

    Example:
        >>> import lightning.pytorch as L, torch
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> class Mine(GoldyMixin, L.LightningModule):
        ...     goldy_model_attribute = "network"
        ...     objective = ClassifierObjective()
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = nn.Linear(4, 2)
        >>> batch = (torch.randn(3, 4), torch.tensor([0, 1, 1]))
        >>> Mine().golden_parameters([batch], top_k_percent=50.0).n_samples
        3
    """

    goldy_model_attribute: str | None = None
    """Dotted name of the submodule to analyse: ``model`` by default when there is one, else the whole module."""

    @property
    def goldy_model(self) -> nn.Module:
        """The module that the analyses look at.

        Raises:
            ValueError: There is no such submodule.
        """
        return find_model(cast("nn.Module", self), self.goldy_model_attribute)

    @property
    def goldy_objective(self) -> Objective:
        """``self.objective``, or next-token prediction when the model is a causal language model.

        Raises:
            ValueError: Neither applies.
        """
        return find_objective(cast("nn.Module", self), self.goldy_model, None)

    def golden_parameters(self, batches: Iterable[Any] | None = None, **options: Any) -> GoldenResult:
        """Which parameters carry what these batches ask for; see :func:`lightning_goldy.analysis.golden_parameters`.

        Args:
            batches: What to analyse; by default the probe that a callback on the attached trainer would use.
            **options: Passed on, such as ``top_k_percent`` or ``score``.

        Returns:
            The result, its tensors on the CPU.

        Raises:
            ValueError: There are no batches, or an option is out of range.
        """
        # Imported here, so that a module can be defined and trained without loading the analyses.
        from lightning_goldy.analysis import golden_parameters

        return golden_parameters(self.goldy_model, self.goldy_probe(batches), self.goldy_objective, **options)

    def basin_volume(self, batches: Iterable[Any] | None = None, **options: Any) -> VolumeResult:
        """How robust the predictions on these batches are; see :func:`lightning_goldy.analysis.basin_volume`.

        Args:
            batches: What the predictions are compared on; by default the probe.
            **options: Passed on, such as ``n_directions`` or ``cutoff``.

        Returns:
            The estimates, direction by direction.

        Raises:
            ValueError: There are no batches, or an option is out of range.
        """
        from lightning_goldy.analysis import basin_volume

        return basin_volume(self.goldy_model, self.goldy_probe(batches), self.goldy_objective, **options)

    def taylor_diff(self, base: Base, batches: Iterable[Any] | None = None, **options: Any) -> TaylorDiffResult:
        """Whether the step since a base is small; see :func:`lightning_goldy.analysis.taylor_diff`.

        Args:
            base: Where the expansion is made, such as a ``GoldenSnapshot``'s ``base``: anything that
                :func:`~lightning_goldy.core.base.base_of` takes.
            batches: What the loss is taken over; by default the probe.
            **options: Passed on, such as ``orders``.

        Returns:
            Losses, predictions, shares and the regime.

        Raises:
            ValueError: There are no batches, or an option is out of range.
        """
        from lightning_goldy.analysis import taylor_diff

        return taylor_diff(self.goldy_model, base, self.goldy_probe(batches), self.goldy_objective, **options)

    def goldy_probe(self, batches: Iterable[Any] | None = None) -> Iterable[Any]:
        """The given batches; without any, the probe of this module, the data module, or the validation set.

        Raises:
            ValueError: There is none, or it is empty.
        """
        if batches is not None:
            return batches
        trainer = getattr(self, "_trainer", None)
        if trainer is None:
            raise ValueError(
                f"{type(self).__name__} is attached to no trainer whose data could be analysed: pass batches="
            )
        return find_probe(trainer, self, None)
