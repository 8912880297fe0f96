"""The atlas: facts about countries to pretrain a small model on, and counterfactual edits to finetune it with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.naming import unknown_name
from lightning_goldy.core.pieces import SampleSet, encode_pairs
from lightning_goldy.data.base import ProbeDataModule, Splits
from lightning_goldy.data.relations import (
    Fact,
    Phrasing,
    Question,
    country_facts,
    one_hop_questions,
    relation_names,
    two_hop_questions,
)
from lightning_goldy.data.tokenization import load_tokenizer


@dataclass(frozen=True)
class Edit:
    """A fact to be learned in place of the true one.

    Args:
        country: The country's name, as in the table.
        relation: ``"capital"``, ``"continent"``, ``"currency"`` or ``"language"``.
        answer: The counterfactual answer.
    """

    country: str
    relation: str
    answer: str


class AtlasDataModule(ProbeDataModule):
    """Questions about the capital, continent, currency and main language of countries.

    Without edits, the training set is every fact in every training phrasing. With edits it is the edited facts, plus a
    share of the others as rehearsal. The validation set is the held-out phrasing of every fact, and the probe a part
    of it, in which the edited facts come first.

    Args:
        batch_size: Samples per batch.
        edits: Facts to make counterfactual, e.g. ``[{country: France, relation: capital, answer: Rome}]``, or the
            number of random ones (their choice depends on ``seed``). None pretrains on the true facts.
        rehearsal: With edits, the share of unedited facts that stay in the training set, in [0, 1].
        two_hop: Adds two-hop questions to the training set; with edits, among the facts rehearsed.
        tokenizer: ``"words"`` for the atlas's own words, ``"bytes"``, a local folder, a hub name, or a tokenizer; by
            default that of the pretrained model that is trained, and ``"words"`` for one that is trained from scratch.
        mask_query: False trains on the words of the questions too. Validation and probe always mask them.
        probe_size: Samples in the probe.
        seed: Decides random edits, rehearsal, the probe and the order of training samples.

    Raises:
        ValueError: An argument out of range, an unknown country or relation, or (from ``setup``) a probe larger than
            the number of facts, or an answer that the tokenizer does not know.

    Example:
        >>> data = AtlasDataModule(edits=[Edit("France", "capital", "Rome")], probe_size=4)
        >>> [(question.prompt, question.answer) for question in data.training_questions()][:1]
        [('What is the capital of France?', 'Rome')]
        >>> batch = next(iter(data.probe_dataloader()))
        >>> data.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        'Name the capital of France. Rome'
    """

    def __init__(
        self,
        batch_size: int = 64,
        edits: list[Edit] | int | None = None,
        *,
        rehearsal: float = 0.0,
        two_hop: bool = False,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        mask_query: bool = True,
        probe_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, probe_size=probe_size, seed=seed)
        if not 0 <= rehearsal <= 1:
            raise ValueError(f"rehearsal={rehearsal!r} must be a share of the unedited facts, between 0 and 1")
        if edits is None and rehearsal > 0:
            raise ValueError(f"rehearsal={rehearsal!r} needs edits: without them every fact is in the training set")
        if two_hop and edits is not None and rehearsal == 0:
            raise ValueError("two_hop=True with edits adds questions about rehearsed facts: set rehearsal above 0")
        true_facts = country_facts()
        self.edits = tuple(_resolve(edits, true_facts, seed))
        self.facts = tuple(apply_edits(true_facts, self.edits))
        if probe_size > len(self.facts):
            raise ValueError(f"probe_size={probe_size} is larger than the {len(self.facts)} facts there are")
        self.rehearsal = rehearsal
        self.two_hop = two_hop
        self.mask_query = mask_query

    @property
    def edited_facts(self) -> list[Fact]:
        """The facts with counterfactual answers, in the order of ``edits``."""
        by_name = {(fact.subject, fact.relation): fact for fact in self.facts}
        return [by_name[edit.country, edit.relation] for edit in self.edits]

    @property
    def unedited_facts(self) -> list[Fact]:
        """The facts with their true answers, in the table's order."""
        return [fact for fact in self.facts if not fact.edited]

    def one_hop_questions(self, phrasing: Phrasing = "train") -> list[Question]:
        """Every fact, after edits, in every training phrasing, or once in the held-out one."""
        return one_hop_questions(self.facts, phrasing)

    def two_hop_questions(self, phrasing: Phrasing = "train") -> list[Question]:
        """Every two-hop question whose capital, after edits, names exactly one country."""
        return two_hop_questions(self.facts, phrasing)

    def training_questions(self) -> list[Question]:
        """What the training set is made of."""
        chosen = self._rehearsed() if self.edits else list(self.facts)
        questions = one_hop_questions([*self.edited_facts, *chosen])
        if self.two_hop:
            kept = set(chosen)
            # Two-hop questions about edited facts stay out: they tell how far an edit reaches.
            questions += [each for each in self.two_hop_questions() if each.fact in kept and not each.edited]
        return questions

    def probe_questions(self) -> list[Question]:
        """What the probe is made of: held-out phrasings, of the edited facts first."""
        unedited = self.unedited_facts
        random.Random(f"probe {self.seed}").shuffle(unedited)
        return one_hop_questions([*self.edited_facts, *unedited][: self.probe_size], "held_out")

    def analysis_splits(self) -> dict[str, DataLoader[Any]]:
        """Two sets of samples to compare, in training phrasings: what was true before, and what was learned by heart.

        Returns:
            ``clean``: as many untouched facts as there are edited ones, drawn by ``seed``; ``memorised``: the edited
            facts. Both ask for every fact once before they ask for one again.

        Raises:
            ValueError: Nothing is edited, or nothing is left untouched.

        Example:
            >>> data = AtlasDataModule(edits=20)
            >>> {name: len(loader.dataset) for name, loader in data.analysis_splits().items()}
            {'clean': 80, 'memorised': 80}
        """
        unedited = self.unedited_facts
        if not self.edits or not unedited:
            left = "every fact is edited" if self.edits else "no fact is edited"
            raise ValueError(f"there is nothing to compare: {left}; set edits= to some of the {len(self.facts)} facts")
        random.Random(f"clean {self.seed}").shuffle(unedited)
        chosen = {"clean": unedited[: len(self.edits)], "memorised": self.edited_facts}
        return {name: self.question_dataloader(_by_phrasing(facts)) for name, facts in chosen.items()}

    def collateral_dataloader(self) -> DataLoader[Any] | None:
        """Questions about the facts that no edit touches, shuffled once by the seed; None without any.

        They are what the edits of a finetune are not meant to change.
        """
        unedited = self.unedited_facts
        if not self.edits or not unedited:
            return None
        random.Random(f"collateral {self.seed}").shuffle(unedited)
        return self.question_dataloader(_by_phrasing(unedited))

    def question_dataloader(self, questions: Sequence[Question]) -> DataLoader[Any]:
        """Batches of any questions, in their order, with the prompt masked.

        A model knows an answer when its likeliest token is the label at every target: greedy generation from the
        prompt then gives just that answer.
        """
        return self._loader(self._encode(questions))

    made_tokenizer = "words"

    def make_tokenizer(self, choice: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer of a name; ``"words"`` gives the same one whatever the edits."""
        facts = country_facts()
        texts = (
            text
            for phrasing in get_args(Phrasing)
            for ask in (one_hop_questions, two_hop_questions)
            for question in ask(facts, phrasing)
            for text in (question.prompt, question.answer)
        )
        return load_tokenizer(choice, corpus=texts)

    def build_splits(self) -> Splits:
        """Tokenise the training, validation and probe questions."""
        return Splits(
            train=self._encode(self.training_questions(), mask_query=self.mask_query),
            val=self._encode(self.one_hop_questions("held_out")),
            probe=self._encode(self.probe_questions()),
        )

    def _rehearsed(self) -> list[Fact]:
        unedited = self.unedited_facts
        # A share above nought rehearses something, however small it is.
        least = min(len(unedited), int(self.rehearsal > 0))
        count = max(least, round(self.rehearsal * len(unedited)))
        kept = set(random.Random(f"rehearsal {self.seed}").sample(range(len(unedited)), count))
        return [fact for index, fact in enumerate(unedited) if index in kept]

    def _encode(self, questions: Sequence[Question], *, mask_query: bool = True) -> SampleSet:
        pairs = [(question.prompt, question.answer) for question in questions]
        return encode_pairs(self.tokenizer, pairs, mask_query=mask_query)


def apply_edits(facts: Sequence[Fact], edits: Sequence[Edit]) -> list[Fact]:
    """Replace the answers of the edited facts.

    Args:
        facts: All facts.
        edits: At most one per fact.

    Returns:
        The facts in the same order, with new answers where edited.

    Raises:
        ValueError: An unknown country or relation, an empty or unchanged answer, or two edits of one fact.

    Example:
        >>> from lightning_goldy.data.relations import country_facts
        >>> facts = apply_edits(country_facts(), [Edit("France", "capital", "Rome")])
        >>> [(fact.subject, fact.original, fact.answer) for fact in facts if fact.edited]
        [('France', 'Paris', 'Rome')]
    """
    index = {(fact.subject, fact.relation): number for number, fact in enumerate(facts)}
    edited = list(facts)
    for edit in edits:
        number = _locate(edit, index)
        if not edit.answer.strip():
            raise ValueError(f"the answer of {edit} is empty")
        if edited[number].edited:
            raise ValueError(f"{edit.country}'s {edit.relation} is edited twice: keep one of the edits")
        if edit.answer.strip() == facts[number].answer:
            raise ValueError(f"{edit} changes nothing: {edit.answer!r} is already the answer")
        edited[number] = replace(facts[number], answer=edit.answer.strip())
    return edited


def random_edits(facts: Sequence[Fact], count: int, seed: int) -> list[Edit]:
    """Draw edits of distinct facts; each new answer is another country's answer to the same relation.

    Args:
        facts: All facts.
        count: The number of edits.
        seed: The edits are a function of ``facts``, ``count`` and ``seed``.

    Raises:
        ValueError: ``count`` is not between 1 and the number of facts.

    Example:
        >>> from lightning_goldy.data.relations import country_facts
        >>> edits = random_edits(country_facts(), 20, seed=0)
        >>> len(edits), edits == random_edits(country_facts(), 20, seed=0)
        (20, True)
    """
    if not 1 <= count <= len(facts):
        raise ValueError(f"edits={count}: the number of random edits must be between 1 and {len(facts)} (all facts)")
    generator = random.Random(f"edits {seed}")
    answers = {
        relation: sorted({fact.answer for fact in facts if fact.relation == relation}) for relation in relation_names()
    }
    edits = []
    for fact in generator.sample(list(facts), count):
        others = [answer for answer in answers[fact.relation] if answer != fact.answer]
        edits.append(Edit(fact.subject, fact.relation, generator.choice(others)))
    return edits


def _locate(edit: Edit, index: dict[tuple[str, str], int]) -> int:
    if edit.relation not in relation_names():
        raise ValueError(unknown_name("relation", edit.relation, relation_names()) + f" (in {edit})")
    if (edit.country, edit.relation) not in index:
        countries = dict.fromkeys(country for country, _ in index)
        raise ValueError(unknown_name("country", edit.country, countries, listed=200) + f" (in {edit})")
    return index[edit.country, edit.relation]


def _by_phrasing(facts: Sequence[Fact]) -> list[Question]:
    """Every fact in its first phrasing, then every fact in its second, and so on."""
    return [question for phrased in zip(*(fact.questions() for fact in facts), strict=True) for question in phrased]


def _resolve(edits: list[Edit] | int | None, facts: Sequence[Fact], seed: int) -> list[Edit]:
    if edits is None:
        return []
    if isinstance(edits, bool):
        raise ValueError(f"edits={edits!r} must be a list of edits or the number of random ones")
    if isinstance(edits, int):
        return random_edits(facts, edits, seed)
    if not edits:
        raise ValueError("edits=[] edits nothing: leave edits out to pretrain on the true facts")
    return list(edits)
