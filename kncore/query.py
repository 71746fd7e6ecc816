"""Queries: one question to a language model each, and where its subject stands.

>>> query = Query("The capital of France is", "Paris", "France", template="The capital of {} is")
>>> query.prompt[subject_start(query):]
'France is'
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, fields

MASK = "[MASK]"
# Scripts without blanks between words, by how the Unicode names of their letters begin.
WITHOUT_BLANKS = ("CJK ", "HIRAGANA ", "KATAKANA", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


@dataclass(frozen=True)
class Query:
    """One question to a language model.

    Attributes:
        prompt: causal form: text that ends right before the target, without a trailing space; masked form:
            a text that holds "[MASK]" once, where the target belongs.
        target: the word or words that belong there, without a leading space.
        subject: what the query is about, as it occurs in the prompt: the subject of a fact, the word that
            decides the agreement of a minimal pair; "" where unknown.
        foil: the wrong member of a minimal pair, or the false object of a counterfactual; "" for facts.
        task: the relation or phenomenon.
        item: what queries cluster by: the fact ("capital:France") or lemma ("determiner_noun:book").
        template: the prompt with {} in place of the subject; text may stand before it in the prompt. A template
            without {}, or with more than one, is a name only.
        value: the condition within a phenomenon, such as "singular" or "feminine"; "" for facts.
        joined: whether the target follows the prompt without a space: after a quotation mark or a hyphen, or in a
            script without blanks. Where the prompt has [MASK], the target is joined if no white space stands before
            it, whatever this says.

    Raises ValueError where a field breaks these rules, TypeError where one is no text (`joined`: no bool).
    """

    prompt: str
    target: str
    subject: str = ""
    foil: str = ""
    task: str = ""
    item: str = ""
    template: str = ""
    value: str = ""
    joined: bool = False

    def __post_init__(self) -> None:
        def fail(problem: str) -> None:
            prompt, target = (f"{text[:200]!r}{'…' * (len(text) > 200)}" for text in (self.prompt, self.target))
            raise ValueError(f"Query(prompt={prompt}, target={target}): {problem}")

        for field in fields(self):
            text = getattr(self, field.name)
            kind, expected = (bool, "True or False") if field.name == "joined" else (str, "text")
            if not isinstance(text, kind):
                given = f"{type(text).__name__} {text!r:.80}"
                raise TypeError(f"the {field.name} of a Query must be {expected}, got {given}")
            if kind is str and any("\ud800" <= letter <= "\udfff" for letter in text):
                fail(f"the {field.name} holds half of a surrogate pair, which is no text; repair its encoding")

        for name in ("prompt", "target"):
            if not getattr(self, name).strip():
                fail(f"the {name} is empty")
        if self.prompt != self.prompt.rstrip():
            fail("the prompt ends with white space; the tokenizer puts the space before the target")
        for name in ("target", "foil", "subject"):
            word = getattr(self, name)
            if word != word.strip():
                fail(f"the {name} {word!r} has white space around it")
            if MASK in word:
                fail(f"the {name} {word!r} holds {MASK}, which marks the target's place in the prompt; give the word")
        if self.prompt.count(MASK) > 1:
            fail(f"the prompt holds {MASK} more than once; one target belongs to one mask")
        if self.target == self.foil:
            fail("target and foil are the same")
        if not any(self.subject in part for part in self.prompt.split(MASK)):
            fail(f"the subject {self.subject!r} does not occur in the prompt")
        if self.joined and self.prompt.partition(MASK)[0][-1:].isspace():
            fail(f"the target is joined, but white space stands before {MASK}; leave one of them out")

    @property
    def masked(self) -> bool:
        """Whether the target belongs inside the prompt, at [MASK], rather than after it."""
        return MASK in self.prompt


def subject_start(query: Query) -> int:
    """Return the index in a query's prompt where its subject begins.

    It is where the template has {}: the prompt ends with the filled template, and the subject may have a capital where
    it begins that. Without such a template it is where `locate` finds it outside of [MASK]. Raises ValueError for a
    query without a subject, and for a template that, filled with the subject, is not what the prompt ends with.
    """
    prompt, subject = query.prompt, query.subject
    if not subject:
        raise ValueError(f"prompt {prompt!r} has no subject; give the part of it that is to be found")
    if query.template.count("{}") != 1:
        return locate(prompt.replace(MASK, "\0" * len(MASK)), subject)
    before, after = query.template.split("{}")
    for word in (subject, *([] if before else [capital(subject)])):
        if prompt.endswith(before + word + after):
            return len(prompt) - len(word + after)
    filled = f"the template {query.template!r} with the subject {subject!r}"
    raise ValueError(f"{filled} is not what the prompt {prompt!r} ends with; mend the template, or leave it out")


def locate(text: str, subject: str) -> int:
    """Return the index in a text where a subject begins; -1 where it does not occur.

    Where it occurs several times it is the last one that stands alone, else the last one in a compound with a hyphen or
    an apostrophe ("Niger-Congo"; "Niger's" stands alone), else the last one inside a word. In scripts without blanks
    every occurrence stands alone.
    """
    starts = [i for i in range(len(text)) if text.startswith(subject, i)]
    return max(starts, key=lambda start: (_apart(text, start, start + len(subject)), start), default=-1)


def _apart(text: str, start: int, end: int) -> int:
    """Return how far a part of a text is a word of its own: 2 alone, 1 in a compound, 0 inside a word."""
    if _runs_on(text, start) or _runs_on(text, end):
        return 0
    compound = re.search(r"\w[-\u2010\u2011]$", text[:start]) or re.match(
        r"[-\u2010\u2011]\w|['\u2019](?!s\b)\w", text[end:]
    )
    return 1 if compound else 2


def _runs_on(text: str, at: int) -> bool:
    """Return whether a word goes on across an index of a text."""
    return 0 < at < len(text) and all(
        (letter.isalnum() or letter == "_" or unicodedata.category(letter).startswith("M"))
        and not unicodedata.name(letter, "").startswith(WITHOUT_BLANKS)
        for letter in text[at - 1 : at + 1]
    )


def capital(text: str) -> str:
    """Return the text with a capital at its beginning."""
    return text[:1].upper() + text[1:]
