"""How large the demo is, and the data that follows from that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning_goldy
from lightning_goldy.data import AtlasDataModule, Edit, country_facts, random_edits


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's result.

    Args:
        countries: How many of the table's countries, spread over the alphabet; None for all.
        n_layer: Blocks of the model.
        n_embd: Its width.
        pretraining_rate: Peak learning rate of the pretraining.
        max_epochs: The pretraining's limit.
        target: The share of one-hop facts that ends the pretraining.
        edits: Facts made false for the finetuning.
        finetuning_rate: Peak learning rate of the finetuning.
        rehearsal: Share of the true facts that the finetuning repeats.
        finetuning_epochs: Passes over the false and the repeated facts.
        every_n_steps: How often the callbacks look.
        seed: Decides weights, edits and order.
    """

    countries: int | None = None
    n_layer: int = 4
    n_embd: int = 128
    pretraining_rate: float = 1e-3
    max_epochs: int = 40
    target: float = 0.98
    edits: int = 20
    finetuning_rate: float = 3e-4
    rehearsal: float = 0.1
    finetuning_epochs: int = 10
    every_n_steps: int = 20
    seed: int = 0

    @classmethod
    def fast(cls, seed: int = 0) -> DemoSettings:
        """The reduced form."""
        return cls(
            countries=16,
            n_layer=2,
            n_embd=64,
            pretraining_rate=3e-3,
            edits=5,
            rehearsal=0.5,
            finetuning_epochs=8,
            seed=seed,
        )

    @property
    def model_config(self) -> dict[str, Any]:
        """The model's configuration; the tokenizer gives the rest."""
        # Without dropout: it would slow down what is meant to be learned by heart.
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": 4, "n_positions": 64}
        return {"model_type": "gpt2", **size, **dropout}

    @property
    def pretraining_hash(self) -> str:
        """Differs between pretrained models that differ."""
        decisive = asdict(self)
        for field in ("edits", "finetuning_rate", "rehearsal", "finetuning_epochs", "every_n_steps"):
            del decisive[field]
        facts = [[fact.subject, fact.relation, fact.answer, *fact.prompts] for fact in country_facts()]
        text = json.dumps([lightning_goldy.__version__, decisive, self.model_config, facts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pretraining_data(self) -> AtlasDataModule:
        """All true facts."""
        return self._restricted(None)

    def finetuning_data(self) -> AtlasDataModule:
        """The false facts, and a share of the true ones as rehearsal."""
        facts = [fact for fact in country_facts() if fact.subject in self._chosen()]
        return self._restricted(random_edits(facts, self.edits, self.seed))

    def _restricted(self, edits: Sequence[Edit] | None) -> AtlasDataModule:
        data = AtlasDataModule(
            batch_size=64 if edits is None and self.countries is None else 32,
            edits=None if edits is None else list(edits),
            rehearsal=0.0 if edits is None else self.rehearsal,
            probe_size=32,
            seed=self.seed,
        )
        chosen = self._chosen()
        data.facts = tuple(fact for fact in data.facts if fact.subject in chosen)
        return data

    def _chosen(self) -> set[str]:
        names = list(dict.fromkeys(fact.subject for fact in country_facts()))
        step = 1 if self.countries is None else len(names) / self.countries
        return {names[int(index * step)] for index in range(self.countries or len(names))}
