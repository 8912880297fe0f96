"""A subject and a relation as a question or as a sentence to complete."""

from __future__ import annotations

import re
from typing import Literal, get_args

from lightning_goldy.data.names import unknown_name

Form = Literal["question", "cloze"]

# "founded by", "participant of": the subject stands before such a relation and the answer after it.
_OPEN = re.compile(r"\b(?:of|in|by|to|at|from|on|with|for|after|as|than)$|^located\b", re.IGNORECASE)
_VERB = re.compile(r"^(?:has|have|interacts)\b", re.IGNORECASE)


def word(subject: str, relation: str, form: Form = "question") -> str:
    """A prompt that asks for the object of a subject and a relation.

    Args:
        subject: Whom or what it is about.
        relation: The relation's name; underscores count as spaces.
        form: ``question`` for ``Question: {question}``-like templates, ``cloze`` for a sentence that the answer
            completes, whose template is ``{question}`` alone.

    Raises:
        ValueError: No such form.

    Example:
        >>> word("Green", "performer"), word("Green", "performer", "cloze")
        ('What is the performer of Green?', 'The performer of Green is')
        >>> word("juan rossell", "participant_of"), word("juan rossell", "participant_of", "cloze")
        ('juan rossell is participant of what?', 'juan rossell is participant of')
        >>> word("water", "has part", "cloze")
        'water has part'
    """
    check_form(form)
    relation = " ".join(relation.replace("_", " ").split())
    if _VERB.search(relation):
        sentence = f"{subject} {relation}"
    elif _OPEN.search(relation):
        sentence = f"{subject} is {relation}"
    else:
        return f"What is the {relation} of {subject}?" if form == "question" else f"The {relation} of {subject} is"
    return f"{sentence} what?" if form == "question" else sentence


def check_form(form: str) -> None:
    """Raises ValueError unless it is one of the two forms."""
    if form not in get_args(Form):
        raise ValueError(unknown_name("form", form, get_args(Form)))
