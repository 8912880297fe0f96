"""Follows which heads and MLPs carry a behaviour, on a schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.circuits import (
    Ablation,
    CircuitGraph,
    Method,
    Metric,
    TrackedCircuit,
    TrackingOptions,
    track_circuit,
)
from lightning_goldy.analysis.circuits.circuit import Circuit, Rank, Selection, check_groups
from lightning_goldy.analysis.circuits.runs import check_tokens, require_pairs
from lightning_goldy.analysis.forecast import Forecast, Plan, Run
from lightning_goldy.analysis.forecast.analyses import forecast_circuits
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.engine.store import Vectors
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.core.files import atomic_write, finite
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import require_at_least, require_choice, require_kinds
from lightning_goldy.core.pieces import PromptPairs
from lightning_goldy.core.tasks import transformers_model
from lightning_goldy.data import PairTask, split_of_task
from lightning_goldy.data.prompt_pairs import check_other_tasks, pairs_of_tasks
from lightning_goldy.training.subject import find_tokenizer


class CircuitTracker(AnalysisCallback[TrackedCircuit]):
    """Which heads and MLPs carry a behaviour, through which edges, how faithfully, and what that kept of the base's.

    Logs what circuits of fixed sizes keep of the behaviour beside random ones, the score of every node, and with a
    ``GoldenSnapshot`` the overlap with the base's circuit. Each analysis writes the circuit as JSON and GraphML.

    Args:
        task: Prompts made on the spot: ``indirect_object``, ``greater_than``, ``atlas`` (with the run's tokenizer) or
            ``induction`` (with none).
        pairs: Pairs of prompts, which take the task's place.
        held_out: Pairs that measure what the circuit keeps, such as those that ``split_of_task`` makes. True draws as
            many more of the task, none of whose prompts chose the edges (fewer where the task has no more); False,
            or ``pairs`` alone, measures on the prompts that chose, which flatters the circuit.
        n_pairs: Pairs of a task.
        metric: ``logit_difference``, ``probability``, ``probability_difference``, ``kl``, or a function.
        method: How edges are scored: ``eap``, ``eap_ig_inputs``, ``eap_ig_activations``, ``nodes`` or ``exact``.
        steps: Nodes of the line of integrated gradients.
        ablation: What a patched edge brings: ``counterfactual``, ``mean`` or ``zero``. For ``mean`` the task's prompts
            are all of one length.
        share: Of all edges that the circuit has.
        sizes: Shares of all edges at which faithfulness is measured.
        n_random: Random circuits of each kind per size: of any edges, joined from the input to the output, the circuit
            with the heads of every block exchanged, and with its edges drawn anew between the same layers.
        other_tasks: Tasks whose circuits of the same sizes stand beside it, the hardest null: what they keep is no sign
            of this behaviour. Each is searched like the own one, and costs as much.
        n_groups: Groups of the choosing pairs that are left out in turns, so that the interval holds the choice of the
            edges, too; a further circuit is measured for each and size. 0 for none.
        select: ``top``, or ``greedy`` from the output on.
        rank: By ``magnitude``, or ``signed``.
        batch_size: Pairs per pass.
        seed: Of the task's prompts.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> CircuitTracker(share=0)
        Traceback (most recent call last):
        ValueError: share is a share of all edges, above 0 and at most 1; got 0
    """

    compares = True
    dials: Mapping[str, Any] = {"n_pairs": 4}

    def __init__(
        self,
        task: PairTask = "induction",
        *,
        pairs: PromptPairs | None = None,
        held_out: PromptPairs | bool = True,
        n_pairs: int = 32,
        metric: Metric = "logit_difference",
        method: Method = "eap_ig_inputs",
        steps: int = 5,
        ablation: Ablation = "counterfactual",
        share: float = 0.05,
        sizes: Sequence[float] = (0.01, 0.03, 0.1),
        n_random: int = 3,
        other_tasks: Sequence[PairTask] = (),
        n_groups: int = 0,
        select: Selection = "top",
        rank: Rank = "magnitude",
        batch_size: int = 8,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require_choice("task", task, get_args(PairTask))
        require_at_least("n_pairs", n_pairs, 1)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed is a whole number; got {seed!r}")
        if pairs is not None:
            require_pairs("pairs", pairs)
        check_groups(n_groups, n_pairs if pairs is None else len(pairs))
        if not isinstance(held_out, bool):
            require_pairs("held_out", held_out)
        self.task_name, self.pairs, self.n_pairs, self.seed = task, pairs, n_pairs, seed
        check_other_tasks(other_tasks, None if pairs is not None else task)
        self.held_out, self.other_tasks = held_out, tuple(other_tasks)
        self.tracking = TrackingOptions(
            metric=metric,
            method=method,
            steps=steps,
            ablation=ablation,
            share=share,
            sizes=tuple(sizes) if isinstance(sizes, (list, tuple)) else sizes,  # type: ignore[arg-type]
            n_random=n_random,
            n_groups=n_groups,
            select=select,
            rank=rank,
            batch_size=batch_size,
        )
        require_kinds(CircuitTracker.__init__, locals())

    def forget(self) -> None:
        """Drops the prompts and the base's circuit."""
        super().forget()
        self._pairs: PromptPairs | None = None
        self._held_out: PromptPairs | None = None
        self._others: dict[str, PromptPairs] = {}
        self._base: Circuit | None = None
        self._found: TrackedCircuit | None = None

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """Passes over the prompts: those of the scores, and one per circuit that is measured."""
        return forecast_circuits(
            plan,
            n_pairs=self.n_pairs if self.pairs is None else len(self.pairs),
            tokens=20 if self.pairs is None else max(map(len, self.pairs.clean)),
            gradients=1 if self.tracking.method in ("eap", "nodes") else self.tracking.steps,
            searches=1 + len(self.other_tasks),
            circuits=len(self.tracking.sizes)
            * (2 + 4 * self.tracking.n_random + self.tracking.n_groups + len(self.other_tasks)),
            batch_size=self.tracking.batch_size,
        )

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Makes the prompts and the graph, so that what cannot work fails before the first step."""
        config = getattr(transformers_model(model), "config", None)
        vocabulary = 0 if config is None else config.get_text_config().vocab_size
        pairs, others = self.pairs, None if isinstance(self.held_out, bool) else self.held_out
        if pairs is None:
            pairs, more = split_of_task(
                self.task_name,
                self.n_pairs,
                tokenizer=find_tokenizer(trainer),
                vocabulary=vocabulary,
                one_length=self.tracking.ablation == "mean",
                seed=self.seed,
            )
            others = more if self.held_out is True else others
        self._others = pairs_of_tasks(
            self.other_tasks,
            self.n_pairs,
            tokenizer=find_tokenizer(trainer),
            vocabulary=vocabulary,
            one_length=self.tracking.ablation == "mean",
            seed=self.seed,
        )
        for given in (pairs, *([] if others is None else [others]), *self._others.values()):
            self.tracking.patching.check(given)
            check_tokens(model, given)
        with undisturbed(trainer, trainer.lightning_module):
            CircuitGraph.of(model)
        self._pairs, self._held_out = pairs, others

    def compute(self, context: AnalysisContext) -> TrackedCircuit:
        """Finds and measures the circuit, and once for the run that of the base."""
        assert self._pairs is not None
        snapshot = find_snapshot(context.trainer)
        if self._base is None and snapshot is not None:
            self._base = self.tracking.find_at_base(context.model, snapshot.base, self._pairs, context.progress)
        self._found = track_circuit(
            context.model,
            self._pairs,
            self.tracking,
            held_out=self._held_out,
            others=self._others,
            base=self._base,
            progress=context.progress,
        )
        return self._found

    def _saved(self, vectors: Vectors, context: AnalysisContext) -> dict[str, str]:
        """Adds the circuit as JSON and GraphML."""
        assert self._found is not None
        circuit = self._found.circuit
        names = {kind: context.file_name(self.name).replace(".safetensors", f".{kind}") for kind in ("json", "graphml")}
        if context.store.write:
            text = json.dumps(finite(circuit.details()), allow_nan=False, indent=1)
            atomic_write(self.folder / names["json"], text + "\n")
            atomic_write(self.folder / names["graphml"], circuit.to_graphml())
        return {**super()._saved(vectors, context), **names}
