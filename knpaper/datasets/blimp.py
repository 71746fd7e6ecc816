"""BLiMP (Warstadt et al. 2020): minimal pairs as queries."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from kncore.checks import unknown
from kncore.query import MASK, Query
from knpaper.datasets import files
from knpaper.datasets.files import PUNCTUATION
from knpaper.grammar import DETERMINERS, plural

NUMBER = {word: value for pair in DETERMINERS for word, value in zip(pair, ("singular", "plural"), strict=True)}
REFLEXIVE = {"himself": "masculine", "herself": "feminine", "itself": "neuter"}
# What the subjects of BLiMP's sentences start with, and what follows their noun.
BEFORE_NOUN = {"a", "an", "the", "this", "that", "these", "those", "some", "every", "all", "most", "many"}
AFTER_NOUN = {"of", "about", "that", "who", "which", "concerning", "by", "with", "on", "to"}


def paradigms() -> list[str]:
    """Return the names of the 67 paradigms of BLiMP."""
    return list(files.table()["blimp"]["sha256"])


def read(paradigm: str, path: str | Path | None = None, form: Literal["causal", "masked"] = "causal") -> list[Query]:
    """Return the minimal pairs of a BLiMP paradigm (Warstadt et al. 2020), one query each.

    Causal: the prompt is what both sentences begin with, target and foil are the words in which they differ, without
    punctuation. Masked: that word is masked in the good sentence. For agreement paradigms `value` is the number
    or gender, and `item` the noun as far as the order of words tells, in the singular where the file shows it;
    otherwise `item` counts pairs.

    A pair that differs in more than one word, or (causal) in the first word, cannot be asked for one word: it is left
    out with a warning. Raises ValueError for an unknown paradigm or form, a malformed file, or where nothing is left.
    """
    if paradigm not in paradigms():
        raise unknown("BLiMP paradigm", paradigm, paradigms())
    if form not in ("causal", "masked"):
        raise unknown("form", form, ("causal", "masked"))
    file = files.find(files.source("blimp", paradigm), path)
    fields = {"sentence_good": str, "sentence_bad": str, "UID": str, "pairID": str}
    rows = list(files.read_lines(file, fields))
    pairs = []
    for where, row in rows:
        if row["UID"] != paradigm:
            raise ValueError(f"{where}: the paradigm is {row['UID']!r}, expected {paradigm!r}; pass the file of it")
        good, bad = row["sentence_good"].split(), row["sentence_bad"].split()
        differ = [i for i, (one, other) in enumerate(zip(good, bad, strict=False)) if one != other]
        if len(good) == len(bad) and len(differ) == 1 and (form == "masked" or differ[0] > 0):
            pairs.append((where, row, good, bad, differ[0]))
    if len(pairs) < len(rows):
        left_out = f"{len(rows) - len(pairs)} of {len(rows)} pairs of {paradigm} cannot be asked in the {form} form"
        if not pairs:
            raise ValueError(f"{file}: {left_out}: they differ in more than one word, or at the first")
        warnings.warn(f"{left_out} and are left out", stacklevel=2)

    readings = [_agreement(paradigm, good, bad, at) for _, _, good, bad, at in pairs]
    singulars = {plural(noun): noun for noun, value in readings if value == "singular"}
    queries = []
    for (where, row, good, bad, at), (noun, value) in zip(pairs, readings, strict=True):
        target, foil = good[at].rstrip(PUNCTUATION), bad[at].rstrip(PUNCTUATION)
        lemma = singulars.get(noun, noun) if value == "plural" else noun
        masked = [*good[:at], MASK + good[at][len(target) :], *good[at + 1 :]]
        queries.append(
            files.query(
                where,
                prompt=" ".join(good[:at] if form == "causal" else masked),
                target=target,
                foil=foil,
                task=paradigm,
                item=f"{paradigm}:{lemma or row['pairID']}",
                value=value,
            )
        )
    return queries


def _agreement(paradigm: str, good: list[str], bad: list[str], at: int) -> tuple[str, str]:
    """Return the noun that decides the agreement in the good sentence (in the singular where the pair shows it) and the
    condition; two empty strings where the paradigm is not about agreement."""
    target, foil = good[at].rstrip(PUNCTUATION), bad[at].rstrip(PUNCTUATION)
    if paradigm.startswith("determiner_noun_agreement"):
        if target.lower() in NUMBER:
            return good[-1].rstrip(PUNCTUATION), NUMBER[target.lower()]
        value = next((NUMBER[word.lower()] for word in good[at - 1 :: -1] if word.lower() in NUMBER), "")
        return (foil if value == "plural" else target), value
    start = 3 if good[:3] == ["A", "lot", "of"] else int(good[0].lower() in BEFORE_NOUN)
    if paradigm.startswith("anaphor"):
        value = REFLEXIVE.get(target, "")
        if paradigm == "anaphor_number_agreement":
            value = "singular" if value else "plural"
        return _lower_plural(good, start, value), value
    if paradigm.endswith(("subject_verb_agreement_1", "relational_noun", "relative_clause")):
        subject = good[start:at]
        end = next((i for i, word in enumerate(subject) if i and word.lower() in AFTER_NOUN), len(subject))
        value = _verb_number(target)
        return _lower_plural(good, start + end - 1, value), value
    if paradigm.endswith("subject_verb_agreement_2"):
        value = _verb_number(good[at + 1].rstrip(PUNCTUATION))
        return (foil if value == "plural" else target), value
    return "", ""


def _lower_plural(words: list[str], at: int, value: str) -> str:
    """Return the word there; a plural that starts a sentence is no name, so its capital goes."""
    return words[at].lower() if at == 0 and value == "plural" else words[at]


def _verb_number(verb: str) -> str:
    ending = verb.removesuffix("n't")
    return "singular" if ending.endswith("s") and not ending.endswith("ss") else "plural"
