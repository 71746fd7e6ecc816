"""Minimal pairs of agreement, from small grammars over the words of data/lexicon.toml.

Every *frame* is a sentence in two conditions that differ in the word which decides the agreement (a determiner, a
subject noun, an antecedent) and in the word that agrees with it:

    determiner_noun, causal   Anna explored this  -> castle  (foil castles)
                              Anna explored these -> castles (foil castle)
    determiner_noun, masked   Anna explored [MASK] castle.  -> this  (foil these)
                              Anna explored [MASK] castles. -> these (foil this)

`Query.subject` is the word that decides, as it occurs, `Query.template` the prompt with {} in its place,
`Query.item` the lemma (for gender: the antecedent) and `Query.value` the condition.
"""

import random
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache, partial
from math import prod
from typing import Literal, NamedTuple

from kncore import checks
from kncore.checks import unknown
from kncore.query import MASK, Query
from knpaper import resources

DEFAULT_N = 400
DETERMINERS = (("this", "these"), ("that", "those"))


class Side(NamedTuple):
    """One condition of a frame: the prompt with {} in place of the word that decides, that word, and the target."""

    item: str
    value: str
    template: str
    subject: str
    target: str


@cache
def lexicon() -> dict:
    """Return the words of the grammars, as data/lexicon.toml holds them."""
    return tomllib.loads(resources.text("lexicon.toml"))


def names() -> list[str]:
    """Return the given names of the lexicon."""
    return lexicon()["names"]["feminine"] + lexicon()["names"]["masculine"]


def plural(noun: str) -> str:
    """Return the plural of a noun: the irregular one of the lexicon, else by the spelling rules of regular nouns.

    Raises ValueError for what is no word.

    >>> [plural(noun) for noun in ("castle", "city", "toy", "church", "child")]
    ['castles', 'cities', 'toys', 'churches', 'children']
    """
    if not isinstance(noun, str) or not noun.strip():
        raise ValueError(f"{noun!r} is no word, so it has no plural")
    if noun in lexicon()["irregular"]:
        return lexicon()["irregular"][noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def number_words(form: Literal["causal", "masked"]) -> dict[str, list[str]]:
    """Return words that express number where a sentence has room for them, as `plural`, `singular` and `neutral`.

    Causal form: verbs, which follow a subject. Masked form: determiners, which stand before a noun. Raises ValueError
    for an unknown form.
    """
    if form not in ("causal", "masked"):
        raise unknown("form", form, ("causal", "masked"))
    return lexicon()["number_words"]["determiners" if form == "masked" else "verbs"]


def phenomena() -> list[str]:
    """Return the names of the phenomena that `minimal_pairs` knows."""
    return list(GRAMMARS)


def available(phenomenon: str) -> int:
    """Return how many minimal pairs the grammar of a phenomenon has. Raises ValueError for an unknown one."""
    if phenomenon not in GRAMMARS:
        raise unknown("phenomenon", phenomenon, GRAMMARS)
    return 2 * sum(prod(map(len, lists)) for _, lists in GRAMMARS[phenomenon][0]())


def minimal_pairs(
    phenomenon: str, n: int | None = None, seed: int = 0, form: Literal["causal", "masked"] = "causal"
) -> list[Query]:
    """`n` minimal pairs of a phenomenon (None: 400), half of them in each condition.

    Queries 2k and 2k+1 are the two conditions of one frame. Frames are drawn from `seed` without repetition, every
    lemma once before any comes again; a smaller `n` gives the first queries of a larger one, and both forms draw the
    same frames. Causal: the pair differs in the word after the prompt. Masked: determiner, verb or reflexive is masked
    inside a whole sentence.

    Raises ValueError for an unknown phenomenon or form, an odd `n`, or more pairs than the grammar has.
    """
    most = available(phenomenon)
    if form not in ("causal", "masked"):
        raise unknown("form", form, ("causal", "masked"))
    slots, build = GRAMMARS[phenomenon]
    n, seed = DEFAULT_N if n is None else checks.whole(n, "n"), checks.whole(seed, "seed")
    if n % 2 or not 0 < n <= most:
        raise ValueError(f"n={n} queries of {phenomenon!r} asked for; n must be even, from 2 to {most}")
    queries = []
    for lemma, words, tail in _draw(list(slots()), n // 2, random.Random(f"{phenomenon} {seed}")):
        sides = build(form, lemma, *words, tail)
        for side, other in (sides, sides[::-1]):
            prompt, item = side.template.replace("{}", side.subject), f"{phenomenon}:{side.item}"
            known = dict(task=phenomenon, item=item, template=side.template, value=side.value)
            queries.append(Query(prompt, side.target, side.subject, other.target, **known))
    return queries


def _draw(frames: list, n: int, rng: random.Random) -> Iterator[tuple]:
    """n times a lemma, one word from each of its lists, and a number in [0, 1) that picks how the masked sentence
    ends. Lemmas take turns in an order that is shuffled anew each round."""
    seen = [set() for _ in frames]
    sizes = [prod(map(len, lists)) for _, lists in frames]
    order: list[int] = []
    for _ in range(n):
        while not order or len(seen[order[-1]]) == sizes[order[-1]]:
            if order:
                order.pop()
            else:
                order = rng.sample(range(len(frames)), len(frames))
        i = order.pop()
        index = rng.randrange(sizes[i])
        while index in seen[i]:
            index = rng.randrange(sizes[i])
        seen[i].add(index)
        lemma, lists = frames[i]
        words = []
        for words_of_slot in lists:
            index, at = divmod(index, len(words_of_slot))
            words.append(words_of_slot[at])
        yield lemma, words, rng.random()


def _numbers(lemma: str, templates: Sequence[str], subjects: Sequence[str], targets: Sequence[str]) -> list[Side]:
    return [Side(lemma, *side) for side in zip(("singular", "plural"), templates, subjects, targets, strict=True)]


def _end(form: str, ends: list[str], tail: float) -> str:
    return f" {MASK} {ends[int(tail * len(ends))]}." if form == "masked" else ""


def _object_slots(group: str, adjective: bool) -> Iterator[tuple[str, list]]:
    for kind in lexicon()[group].values():
        for noun in kind["nouns"]:
            yield noun, [names(), kind["verbs"], DETERMINERS, *([kind["adjectives"]] if adjective else [])]


def _determiner_noun(form: str, noun: str, name: str, verb: str, determiners: tuple, *rest) -> list[Side]:
    *adjective, _ = rest
    between = "".join(f" {word}" for word in adjective)
    nouns = (noun, plural(noun))
    if form == "causal":
        return _numbers(noun, [f"{name} {verb} {{}}{between}"] * 2, determiners, nouns)
    return _numbers(noun, [f"{name} {verb} {MASK}{between} {{}}."] * 2, nouns, determiners)


def _subject_slots() -> Iterator[tuple[str, list]]:
    words = lexicon()["subject"]
    for noun in words["nouns"]:
        yield noun, [words["openers"], words["verbs"]]


def _subject_verb(form: str, noun: str, opener: str, verb: list, tail: float) -> list[Side]:
    *verbs, ends = verb
    return _numbers(noun, [f"{opener} {{}}{_end(form, ends, tail)}"] * 2, (noun, plural(noun)), verbs)


def _distractor_slots() -> Iterator[tuple[str, list]]:
    words, subject = lexicon()["relational"], lexicon()["subject"]
    for noun in words["heads"]:
        distractors = [word for word in words["distractors"] if word != noun]
        yield noun, [subject["openers"], distractors, subject["verbs"]]


def _distractor(form: str, noun: str, opener: str, distractor: str, verb: list, tail: float) -> list[Side]:
    *verbs, ends = verb
    end = _end(form, ends, tail)
    templates = [f"{opener} {{}} of the {other}{end}" for other in (plural(distractor), distractor)]
    return _numbers(noun, templates, (noun, plural(noun)), verbs)


def _number_slots() -> Iterator[tuple[str, list]]:
    words = lexicon()["reflexive"]
    for noun in [pair[0] for pair in words["pairs"]] + words["masculine"]:
        yield noun, [words["openers"], words["verbs"]]


def _anaphor_number(form: str, noun: str, opener: str, verb: list, tail: float) -> list[Side]:
    past, ends = verb
    template = f"{opener} {{}} {past}{_end(form, ends, tail)}"
    return _numbers(noun, [template] * 2, (noun, plural(noun)), ("himself", "themselves"))


def _gender_slots() -> Iterator[tuple[tuple[str, str], list]]:
    names, words = lexicon()["names"], lexicon()["reflexive"]
    for pair in zip(names["masculine"], names["feminine"], strict=True):
        yield pair, [words["name_openers"], words["verbs"]]
    for pair in words["pairs"]:
        yield tuple(pair), [words["openers"], words["verbs"]]


def _anaphor_gender(form: str, pair: tuple[str, str], opener: str, verb: list, tail: float) -> list[Side]:
    past, ends = verb
    template = f"{opener} {{}} {past}{_end(form, ends, tail)}"
    masculine, feminine = pair
    return [
        Side(feminine, "feminine", template, feminine, "herself"),
        Side(masculine, "masculine", template, masculine, "himself"),
    ]


# phenomenon: (what to draw from for each lemma, how a drawn frame reads)
GRAMMARS = {
    "determiner_noun": (partial(_object_slots, "objects", False), _determiner_noun),
    "determiner_noun_adjective": (partial(_object_slots, "objects", True), _determiner_noun),
    "determiner_noun_irregular": (partial(_object_slots, "irregular_objects", False), _determiner_noun),
    "subject_verb": (_subject_slots, _subject_verb),
    "subject_verb_distractor": (_distractor_slots, _distractor),
    "anaphor_number": (_number_slots, _anaphor_number),
    "anaphor_gender": (_gender_slots, _anaphor_gender),
}
