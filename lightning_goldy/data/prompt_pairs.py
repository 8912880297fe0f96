"""Tasks for circuits: prompts in two versions of equal length, made on the spot for any tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_goldy.core.naming import require_at_least, require_choice, unknown_name
from lightning_goldy.core.pieces import PromptPairs, leading_bos
from lightning_goldy.data.relations import RELATIONS, Fact, country_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PairTask = Literal["indirect_object", "greater_than", "induction", "atlas"]

_NAMES = (
    *("Mary", "John", "Anna", "Paul", "Sarah", "David", "Emma", "James", "Laura", "Peter", "Alice", "Mark", "Kate"),
    *(
        "Tom",
        "Lisa",
        "Robert",
        "Jane",
        "Simon",
        "Rachel",
        "Daniel",
        "Julia",
        "Martin",
        "Helen",
        "George",
        "Amy",
        "Jack",
    ),
)
_SCENES = (
    "When {A} and {B} went to the {place}, {C} gave the {thing} to",
    "After {A} and {B} had met at the {place}, {C} handed the {thing} to",
    "While {A} and {B} were working at the {place}, {C} passed the {thing} to",
    "Then {A} and {B} had lunch at the {place}, and {C} offered the {thing} to",
    "When {B} and {A} came home from the {place}, {C} showed the {thing} to",
    "After {B} and {A} had left the {place}, {C} sent the {thing} to",
)
_PLACES = ("store", "garden", "school", "station", "library", "hospital", "office", "market")
_THINGS = ("book", "letter", "ring", "bottle", "ball", "key", "picture", "basket")
_EVENTS = ("war", "journey", "siege", "project", "dispute", "reign", "famine", "exile")


@dataclass(frozen=True)
class TextPair:
    """A prompt in two versions, with what may follow the first.

    Args:
        clean: The prompt.
        corrupted: The version that lacks what the answer rests on.
        answers: What is right behind the prompt, without the space before it.
        wrong: What it is held against.
        spaced: Whether a space stands between prompt and answer.
    """

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    spaced: bool = True


def text_pairs(tokenizer: PreTrainedTokenizerBase, texts: Sequence[TextPair]) -> PromptPairs:
    """Prompts in words as pairs of token ids; of an answer its first token counts.

    Args:
        tokenizer: Of the model; where it puts a bos token first, so does this.
        texts: The prompts.

    Raises:
        ValueError: The versions of a prompt have different numbers of tokens, or its right and wrong answers begin with
            the same token; the prompt is named.

    Example:
        >>> from lightning_goldy.data import byte_tokenizer
        >>> pair = TextPair("Ada saw Bo. Bo saw", "Ada saw Bo. Cy saw", ("Ada",), ("Bo",))
        >>> pairs = text_pairs(byte_tokenizer(), [pair])
        >>> len(pairs.clean[0]), pairs.answers
        (19, ((65,),))
        >>> text_pairs(byte_tokenizer(), [TextPair("Ada saw", "Eve met", ("A",)), TextPair("a", "be", ("c",))])
        Traceback (most recent call last):
        ValueError: 'a' has 2 tokens and its corrupted version 'be' 3: both need the same number
    """
    return _pairs_of([(*_encoded(tokenizer, text), text.clean) for text in texts])


_Ids = tuple[int, ...]
_Row = tuple[_Ids, _Ids, _Ids, _Ids, str]
"""Clean and corrupted prompt, right and wrong answers, and the name."""


def _pairs_of(rows: Sequence[_Row]) -> PromptPairs:
    clean, corrupted, rights, wrongs, names = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return PromptPairs(clean, corrupted, rights, wrongs, names if any(names) else ())


class TooFewPairsError(ValueError):
    """A task has fewer different prompts than are asked for.

    Args:
        message: What lacks.
        pairs: Those that there are; None without any.
    """

    def __init__(self, message: str, pairs: PromptPairs | None) -> None:
        super().__init__(message)
        self.pairs = pairs


_VAIN = 300


def _draw_different(n: int, beside: PromptPairs | None, make: Callable[[], _Row]) -> PromptPairs:
    """Pairs no two of which have one clean prompt, and none a prompt of those that stand beside."""
    require_at_least("n", n, 1)
    rows: list[_Row] = []
    used, vain = _used_by(beside), 0
    while len(rows) < n:
        row = make()
        vain += 1
        if row[0] not in used:
            used.add(row[0])
            rows.append(row)
            vain = 0
        if vain == _VAIN:
            apart = "" if beside is None else " beside those already drawn"
            raise TooFewPairsError(
                f"{n} different prompts are asked for{apart}, and only {len(rows)} came up",
                _pairs_of(rows) if rows else None,
            )
    return _pairs_of(rows)


def _used_by(beside: PromptPairs | None) -> set[_Ids]:
    return set() if beside is None else {*beside.clean, *beside.corrupted}


def _require_tokenizer(task: str, tokenizer: object) -> None:
    if not callable(tokenizer):
        raise ValueError(f"task {task!r} is made of words and needs a tokenizer; got {tokenizer!r}")


def _encoded(tokenizer: PreTrainedTokenizerBase, text: TextPair) -> tuple[_Ids, _Ids, _Ids, _Ids]:
    for name in ("answers", "wrong"):
        words = getattr(text, name)
        if isinstance(words, str) or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"{name} to {text.clean!r} is a list of words, none of them empty; got {words!r}")
    bos = tuple(leading_bos(tokenizer))
    space = " " if text.spaced else ""
    whole = {word: _ids(tokenizer, f"{text.clean}{space}{word}") for word in (*text.answers, *text.wrong)}
    # The space before an answer is a token of the prompt's where it is one of its own.
    ends = [end for end in dict.fromkeys((space, "")) if _begin(whole.values(), _ids(tokenizer, f"{text.clean}{end}"))]
    if not ends:
        words = ", ".join(map(repr, whole))
        raise ValueError(f"the tokens of {text.clean!r} change when one of {words} follows: choose other answers")
    prompt, other = (_ids(tokenizer, f"{version}{ends[0]}") for version in (text.clean, text.corrupted))
    if len(prompt) != len(other):
        raise ValueError(
            f"{text.clean!r} has {len(prompt)} tokens and its corrupted version {text.corrupted!r} {len(other)}: both "
            "need the same number"
        )
    first = {word: ids[len(prompt)] for word, ids in whole.items()}
    unknown = next((word for word, token in first.items() if token == tokenizer.unk_token_id), None)
    if unknown is not None:
        raise ValueError(f"the tokenizer does not know {unknown!r}, which follows {text.clean!r}")
    right, wrong = (tuple(dict.fromkeys(first[word] for word in words)) for words in (text.answers, text.wrong))
    if set(right) & set(wrong):
        raise ValueError(f"right and wrong answers to {text.clean!r} begin with the same token")
    return (*bos, *prompt), (*bos, *other), right, wrong


def _begin(texts: Iterable[_Ids], start: _Ids) -> bool:
    """Whether all go on from the same beginning."""
    return all(ids[: len(start)] == start and len(ids) > len(start) for ids in texts)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> _Ids:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def indirect_object_pairs(
    tokenizer: PreTrainedTokenizerBase,
    n: int = 32,
    *,
    names: Sequence[str] | None = None,
    corrupted: Literal["flip", "third"] = "flip",
    beside: PromptPairs | None = None,
    seed: int = 0,
) -> PromptPairs:
    """Two people and who is given something: "When Mary and John went to the store, John gave the book to", Mary.

    Args:
        tokenizer: Of the model.
        n: Prompts.
        names: To choose from; by default those of 26 of which the tokenizer makes equally many tokens.
        corrupted: Who acts in the other version: ``flip``, the other of the two, so that the wrong answer is right
            there; ``third``, somebody else, so that neither is.
        beside: Pairs none of whose prompts is drawn again, such as those that a circuit was found on.
        seed: Decides names and scenes.

    Raises:
        ValueError: Two versions differ in length, as names of different lengths do; the prompt is named.
        TooFewPairsError: There are fewer different prompts.

    Example:
        >>> from lightning_goldy.data import byte_tokenizer
        >>> pairs = indirect_object_pairs(byte_tokenizer(), 2)
        >>> [len(a) == len(b) for a, b in zip(pairs.clean, pairs.corrupted)]
        [True, True]
    """
    require_choice("corrupted", corrupted, ("flip", "third"))
    _require_tokenizer("indirect_object", tokenizer)
    if isinstance(names, str):
        raise ValueError(f"names is a list of names; got {names!r}")
    chosen = _equally_long(tokenizer, _NAMES) if names is None else list(names)
    if len(set(chosen)) < 3:
        told = ": it knows none of Mary, John, Anna, ...; give names= of its own words" if names is None else ""
        raise ValueError(f"three names are needed, of equally many tokens; there are {chosen}{told}")
    draw = random.Random(f"indirect object {seed}")

    def make() -> _Row:
        scene, place, thing = draw.choice(_SCENES), draw.choice(_PLACES), draw.choice(_THINGS)
        first, second, third = _unlike(tokenizer, chosen, draw)
        filled = [
            scene.format(A=first, B=second, C=actor, place=place, thing=thing)
            for actor in (second, first if corrupted == "flip" else third)
        ]
        return (*_encoded(tokenizer, TextPair(filled[0], filled[1], (first,), (second,))), filled[0])

    return _draw_different(n, beside, make)


def _equally_long(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[str]:
    """The largest set of words of which the tokenizer makes equally many tokens, the shorter of two."""
    lengths = {word: len(_ids(tokenizer, f" {word}")) for word in words}
    unknown = {word for word in words if tokenizer.unk_token_id in _ids(tokenizer, word)}
    sets = [
        [word for word in words if lengths[word] == length and word not in unknown] for length in (1, 2, 3, 4, 5, 6)
    ]
    return max(sets, key=len)


def _unlike(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], draw: random.Random) -> list[str]:
    """Three words of which the first two begin with different tokens."""
    for _ in range(100):
        drawn = draw.sample(list(dict.fromkeys(words)), 3)
        if _ids(tokenizer, f" {drawn[0]}!")[:1] != _ids(tokenizer, f" {drawn[1]}!")[:1] or drawn[0][0] != drawn[1][0]:
            return drawn
    raise ValueError(f"all of {', '.join(words)} begin with the same token")


def greater_than_pairs(
    tokenizer: PreTrainedTokenizerBase, n: int = 32, *, beside: PromptPairs | None = None, seed: int = 0
) -> PromptPairs:
    """Years that come later: "The war lasted from the year 1732 to the year 17" goes on with 33 to 99, not 00 to 32.

    The other version begins in a year 01. Where a tokenizer makes a token of each digit, the next digit counts, and the
    one that may be either is left out.

    Args:
        tokenizer: Of the model.
        n: Prompts.
        beside: Pairs none of whose prompts is drawn again.
        seed: Decides events and years.

    Raises:
        ValueError: The tokenizer joins the digits of a year in a way that no answer can follow; the prompt is named.
        TooFewPairsError: There are fewer different prompts.

    Example:
        >>> from lightning_goldy.data import byte_tokenizer
        >>> pairs = greater_than_pairs(byte_tokenizer(), 1)
        >>> byte_tokenizer().decode(pairs.clean[0])
        'The famine lasted from the year 1826 to the year 18'
        >>> byte_tokenizer().decode(pairs.answers[0]), byte_tokenizer().decode(pairs.wrong[0])
        ('3456789', '01')
    """
    _require_tokenizer("greater_than", tokenizer)
    draw = random.Random(f"greater than {seed}")

    def make() -> _Row:
        event, century, year = draw.choice(_EVENTS), draw.randrange(11, 19), draw.randrange(15, 85)
        clean, other = (f"The {event} lasted from the year {century}{y:02} to the year {century}" for y in (year, 1))
        firsts = {y: _first_digits(tokenizer, clean, y) for y in range(100)}
        later, earlier = ({firsts[y] for y in years} for years in (range(year + 1, 100), range(year + 1)))
        right = tuple(f"{y:02}" for y in range(year + 1, 100) if firsts[y] not in earlier)
        wrong = tuple(f"{y:02}" for y in range(year + 1) if firsts[y] not in later)
        if not right or not wrong:
            raise ValueError(f"the tokenizer tells no year after {clean!r} from one before it by its next token")
        return (*_encoded(tokenizer, TextPair(clean, other, right, wrong, spaced=False)), clean)

    return _draw_different(n, beside, make)


def _first_digits(tokenizer: PreTrainedTokenizerBase, prompt: str, year: int) -> int:
    ids, whole = _ids(tokenizer, prompt), _ids(tokenizer, f"{prompt}{year:02}")
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        raise ValueError(
            f"the tokenizer joins the digits of {prompt!r} with those that follow: greater-than prompts need a token "
            "between century and year"
        )
    return whole[len(ids)]


def induction_pairs(
    vocabulary: int | Sequence[int],
    n: int = 32,
    *,
    length: int = 8,
    start: Sequence[int] = (),
    beside: PromptPairs | None = None,
    seed: int = 0,
) -> PromptPairs:
    """Random tokens, repeated: what followed the last token the first time is right.

    In the other version two tokens of the first round have changed places, so that another one follows there, which is
    the wrong answer.

    Args:
        vocabulary: The tokens to draw from, or their number, from 0.
        n: Prompts.
        length: Tokens of a round, at least 5.
        start: Tokens put first, such as bos.
        beside: Pairs none of whose prompts is drawn again.
        seed: Decides the tokens.

    Raises:
        ValueError: ``length`` is below 5, or there are fewer tokens than a round has.
        TooFewPairsError: There are fewer different prompts.

    Example:
        >>> pairs = induction_pairs(20, 1, length=5)
        >>> pairs.clean[0], pairs.answers[0]
        ((19, 17, 3, 1, 5, 19, 17, 3), (1,))
        >>> pairs.corrupted[0], pairs.wrong[0]
        ((3, 17, 19, 1, 5, 19, 17, 3), (17,))
    """
    require_at_least("length", length, 5)
    tokens = list(range(vocabulary)) if isinstance(vocabulary, int) else list(dict.fromkeys(vocabulary))
    if len(tokens) < length:
        raise ValueError(f"a round of {length} needs as many different tokens; there are {len(tokens)}")
    draw = random.Random(f"induction {seed}")
    last = length // 2

    def make() -> _Row:
        drawn = draw.sample(tokens, length)
        other = draw.choice([place for place in range(length - 1) if abs(place - last) > 1])
        changed = list(drawn)
        changed[last], changed[other] = drawn[other], drawn[last]
        again = drawn[: last + 1]
        return (*start, *drawn, *again), (*start, *changed, *again), (drawn[last + 1],), (changed[other + 1],), ""

    return _draw_different(n, beside, make)


def atlas_pairs(
    tokenizer: PreTrainedTokenizerBase,
    n: int | None = 32,
    *,
    relations: Sequence[str] = ("capital",),
    facts: Sequence[Fact] | None = None,
    beside: PromptPairs | None = None,
    seed: int = 0,
) -> PromptPairs:
    """Facts, and the same of another country of equally many tokens, whose answer is the wrong one.

    Args:
        tokenizer: Of the model.
        n: Facts, drawn by the seed from those that have such a partner; None for all of them.
        relations: Of the atlas.
        facts: To choose from instead, such as the edited ones of a data module; each must have a partner among all
            countries.
        beside: Pairs none of whose prompts is drawn again.
        seed: Decides facts and partners.

    Raises:
        ValueError: A relation is unknown, or a given fact has no partner; its prompt is named.
        TooFewPairsError: Fewer facts have a partner.

    Example:
        >>> from lightning_goldy.data import AtlasDataModule
        >>> tokenizer = AtlasDataModule().load_tokenizer()
        >>> pairs = atlas_pairs(tokenizer, 4)
        >>> len(pairs), all(len(a) == len(b) for a, b in zip(pairs.clean, pairs.corrupted))
        (4, True)
    """
    _require_tokenizer("atlas", tokenizer)
    if n is not None:
        require_at_least("n", n, 1)
    _require_relations(relations)
    draw = random.Random(f"atlas {seed}")
    others = [fact for fact in country_facts() if fact.relation in relations or facts is not None]
    drawn = list(others if facts is None else facts)
    draw.shuffle(drawn)
    sizes = {fact: _sizes_and_first(tokenizer, fact) for fact in dict.fromkeys((*others, *drawn))}
    rows: list[_Row] = []
    used = _used_by(beside)
    for fact in drawn:
        fitting = _partners(fact, others, sizes)
        if fitting:
            other = draw.choice(fitting)
            text = TextPair(fact.prompts[0], other.prompts[0], (fact.answer,), (other.answer,))
            row = (*_encoded(tokenizer, text), fact.prompts[0])
            if row[0] not in used:
                used.add(row[0])
                rows.append(row)
        elif facts is not None:
            raise ValueError(
                f"{fact.prompts[0]!r} has {sizes[fact][0][0]} tokens, as has no other country's whose answer begins "
                "with another token"
            )
        if len(rows) == n:
            break
    if not rows or (n is not None and (facts is None or beside is not None) and len(rows) < n):
        apart = "" if beside is None else " and are not drawn already"
        raise TooFewPairsError(
            f"{len(rows)} facts have a partner of equally many tokens{apart}; {n} are asked for",
            _pairs_of(rows) if rows else None,
        )
    return _pairs_of(rows)


def _require_relations(relations: Sequence[str]) -> None:
    known = {relation.name for relation in RELATIONS}
    if isinstance(relations, str):
        raise ValueError(f"relations is a list of relations; got {relations!r}")
    for relation in relations:
        if relation not in known:
            raise ValueError(unknown_name("relation", relation, sorted(known)))


_Sizes = tuple[tuple[int, int], int | None]


def _partners(fact: Fact, others: Sequence[Fact], sizes: Mapping[Fact, _Sizes]) -> list[Fact]:
    """The same of other countries, of equally many tokens, whose answers begin with another one."""
    size, first = sizes[fact]
    return [
        other
        for other in others
        if (other.relation, sizes[other][0]) == (fact.relation, size)
        and other.subject != fact.subject
        and sizes[other][1] != first
    ]


def _sizes_and_first(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> _Sizes:
    """Tokens of a fact's prompt with the space if it is one of its own, and without, and the answer's first after it.

    Two prompts have equally many tokens before whichever answer where both numbers are the same.
    """
    text = TextPair(fact.prompts[0], fact.prompts[0], (fact.answer,))
    try:
        prompt, _, right, _ = _encoded(tokenizer, text)
    except ValueError:  # nothing that the tokenizer can ask for
        return (-1, -1), None
    return (len(prompt), len(_ids(tokenizer, fact.prompts[0]))), right[0]


_BUILDERS: dict[str, Callable[..., PromptPairs]] = {
    "indirect_object": indirect_object_pairs,
    "greater_than": greater_than_pairs,
    "atlas": atlas_pairs,
}


def pairs_of_task(
    task: PairTask,
    n: int = 32,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: int = 0,
    beside: PromptPairs | None = None,
    seed: int = 0,
) -> PromptPairs:
    """The pairs of a task by its name.

    Args:
        task: ``indirect_object``, ``greater_than``, ``atlas``, which need a tokenizer, or ``induction``, which needs
            the size of the vocabulary; with a tokenizer it leaves out special tokens, and begins with its bos token.
        n: Prompts.
        tokenizer: Of the model.
        vocabulary: Number of tokens.
        beside: Pairs none of whose prompts is drawn again.
        seed: Decides the prompts.

    Raises:
        ValueError: The task is unknown, or lacks what it needs.

    Example:
        >>> len(pairs_of_task("induction", 4, vocabulary=30))
        4
    """
    require_choice("task", task, get_args(PairTask))
    if task == "induction":
        tokens, start = _ordinary_tokens(tokenizer, vocabulary)
        return induction_pairs(tokens, n, start=start, beside=beside, seed=seed)
    if tokenizer is None:
        raise ValueError(f"task {task!r} is made of words and needs a tokenizer; induction needs none")
    return _BUILDERS[task](tokenizer, n, beside=beside, seed=seed)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> tuple[int | list[int], list[int]]:
    """The tokens of random prompts, and those put first."""
    if tokenizer is None:
        return vocabulary, []
    special = set(tokenizer.all_special_ids)
    known = min(vocabulary, len(tokenizer)) if vocabulary else len(tokenizer)
    return [token for token in range(known) if token not in special], leading_bos(tokenizer)


def split_of_task(
    task: PairTask,
    n: int = 32,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: int = 0,
    one_length: bool = False,
    seed: int = 0,
) -> tuple[PromptPairs, PromptPairs | None]:
    """Pairs of a task that a circuit is found on, and as many others that it is measured on.

    No clean prompt of the others is among the prompts of the first, clean or corrupted. Where the task has fewer
    left (the atlas has about 170 facts a relation), there are fewer, or None.

    Args:
        task: See :func:`pairs_of_task`.
        n: Prompts of each.
        tokenizer: Of the model.
        vocabulary: Number of tokens.
        one_length: Whether all have equally many tokens, the commonest number, as means over prompts need.
        seed: Decides the prompts.

    Raises:
        TooFewPairsError: There are fewer than ``n``, or fewer of one length.

    Example:
        >>> found_on, others = split_of_task("induction", 4, vocabulary=30)
        >>> len(others), {*others.clean} & {*found_on.clean, *found_on.corrupted}
        (4, set())
    """
    shared: dict[str, Any] = {"tokenizer": tokenizer, "vocabulary": vocabulary, "seed": seed}
    if one_length:
        return _split_of_one_length(task, n, shared)
    found_on = pairs_of_task(task, n, **shared)
    try:
        return found_on, pairs_of_task(task, n, beside=found_on, **shared)
    except TooFewPairsError as error:
        return found_on, error.pairs


def check_other_tasks(others: Sequence[PairTask], task: PairTask | None) -> None:
    """Checks names of tasks whose circuits stand beside that of a task; None where that one has no name.

    Raises:
        ValueError: They are no list, one is unknown or the task itself, or one comes twice.

    Example:
        >>> check_other_tasks(("induction",), "induction")
        Traceback (most recent call last):
        ValueError: other_tasks are other tasks than 'induction', each once; got ('induction',)
    """
    if not isinstance(others, (list, tuple)):
        raise ValueError(f"other_tasks is a list of tasks; got {others!r}")
    for other in others:
        require_choice("other_tasks", other, get_args(PairTask))
    if task in others or len(set(others)) < len(others):
        own = "" if task is None else f"other tasks than {task!r}, "
        raise ValueError(f"other_tasks are {own}each once; got {tuple(others)!r}")


def pairs_of_tasks(
    tasks: Iterable[PairTask],
    n: int = 32,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: int = 0,
    one_length: bool = False,
    seed: int = 0,
) -> dict[str, PromptPairs]:
    """Pairs of several tasks by name, as circuits of other tasks are found on; see :func:`split_of_task`.

    Example:
        >>> {task: len(pairs) for task, pairs in pairs_of_tasks(["induction"], 4, vocabulary=30).items()}
        {'induction': 4}
    """
    shared: dict[str, Any] = {"tokenizer": tokenizer, "vocabulary": vocabulary, "one_length": one_length, "seed": seed}
    return {task: split_of_task(task, n, **shared)[0] for task in tasks}


def _split_of_one_length(task: PairTask, n: int, shared: Mapping[str, Any]) -> tuple[PromptPairs, PromptPairs | None]:
    group: list[int] = []
    for times in (2, 4, 8, 16, 32):
        whole = True
        try:
            pool = pairs_of_task(task, times * n, **shared)
        except TooFewPairsError as error:
            if error.pairs is None:
                raise
            pool, whole = error.pairs, False
        group = max(pool.batches(len(pool)), key=len)
        if not whole or len(group) >= 3 * n:
            break
    found_on = pool.take(group[:n])
    if len(found_on) < n:
        raise TooFewPairsError(
            f"{n} prompts of one length are asked for; of the commonest, {len(found_on.clean[0])} tokens, only "
            f"{len(found_on)} came up",
            found_on,
        )
    used = _used_by(found_on)
    rest = [place for place in group[n:] if pool.clean[place] not in used][:n]
    # One alone would be its own mean.
    return found_on, pool.take(rest) if len(rest) > 1 else None
