"""The controlled corpus: English sentences whose every co-occurrence and every fact is known.

Written here for models that are trained on nothing else (`controlled-*` in `kncore.models`), so that a question about
what a model has seen has an exact answer. Everything is drawn from one seed. The corpus has two halves.

*Grammar.* Nouns in both numbers stand with determiners, with verbs, and with distractors between; antecedents stand
with reflexives. How often a form of a noun follows a demonstrative ("these castles") is designed: log-uniform from 1 to
100, independently for each noun, number and demonstrative, and 0 for the pairs that are *held out*. Invented nouns
("blicket") never follow a demonstrative at all. How often a form occurs otherwise is drawn apart from that.

*World.* The facts of this project, every one in its relation's templates, and invented entities in the same templates:
`two_way` countries and capitals, stated from both sides; `one_way` ones, only ever "the capital of X is Y"; `linked`
fields and occupations, of most workers both stated, of some (`apart`) only the field; `unlinked` ones, of some workers
only the field stated, of others only the occupation, so that it is never said which belong together; and persons who
`speak` two languages, in a designed proportion.

Each invented fact is stated `TIMES` times from each side that is stated at all.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, wraps
from itertools import pairwise, permutations
from math import exp, log
from pathlib import Path
from typing import NamedTuple

from kncore import checks, prose
from kncore.models import LM
from kncore.query import MASK, Query
from knpaper import cases, frequencies, grammar, tasks, words
from knpaper.tasks import Relation

TIMES = 40
OWN_TIMES = 20
PROSE_TIMES = 10
HELD_OUT = 0.15
NATIONS, FIELDS, WORKERS, APART, SPEAKERS = 60, 20, 6, 2, 40
SHARES = (1 / 2, 2 / 3, 4 / 5, 9 / 10)
SPEAKS = ("{} speaks", "At home {} speaks", "On the telephone {} speaks", "With old friends {} speaks")
OWN = (
    "capital",
    "country_of_capital",
    "largest_city",
    "official_language",
    "native_language",
    "birthplace",
    "field_of_work",
    "occupation",
)
MODALS = ("can", "will", "would", "should", "must", "may", "might")
AFTER_MODAL = ("see the river", "come home late", "need more money", "know the answer", "work at night")
SAYING = {"singular": "says", "plural": "say"}
VOWELS = "aeiou"


class Sentence(NamedTuple):
    """A sentence, and the words in it that are to be learnt (the object of a fact, what agrees), or ""."""

    text: str
    target: str = ""


class Pair(NamedTuple):
    """A form of a noun and a demonstrative: how often the one directly follows the other. `kind` as in `words.Noun`."""

    determiner: str
    form: str
    singular: str
    number: str
    kind: str
    count: int
    held_out: bool


@dataclass(frozen=True)
class World:
    """The invented part of the world. Relations carry their pairs.

    `capital` and `country` are a relation from each side, by group ("two_way", "one_way"); `field` and `occupation`
    what is true of the workers of a group ("linked", "apart", "unlinked"; of the last two only the field is stated).
    `others` are (person, occupation) of the workers whose field is not stated, `called` is the occupation of each
    field, and `speaks` has for each person ((language, times stated), (language, times stated)).
    """

    capital: dict[str, Relation]
    country: dict[str, Relation]
    field: dict[str, Relation]
    occupation: dict[str, Relation]
    others: Relation
    called: dict[str, str]
    speaks: dict[str, tuple[tuple[str, int], tuple[str, int]]]


def _once(function: Callable) -> Callable:
    """Return a function of a seed that computes its result once; it raises ValueError for what is no whole number."""
    kept = cache(function)

    @wraps(function)
    def of_seed(seed: int = 0):
        return kept(checks.whole(seed, "seed"))

    return of_seed


@_once
def pairs(seed: int = 0) -> tuple[Pair, ...]:
    """Return the designed pairs of demonstrative and noun, in a fixed order."""
    rng = random.Random(f"pairs {seed}")
    drawn = []
    for noun in _nouns().values():
        for number, demonstratives in zip(("singular", "plural"), zip(*grammar.DETERMINERS, strict=True), strict=True):
            for determiner in demonstratives:
                held = rng.random() < HELD_OUT or noun.kind == "invented"
                count = 0 if held else _log_uniform(rng, 1, 100)
                drawn.append(Pair(determiner, getattr(noun, number), noun.singular, number, noun.kind, count, held))
    return tuple(drawn)


@_once
def world(seed: int = 0) -> World:
    """Return the invented entities and what is true of them."""
    rng = random.Random(f"world {seed}")
    names = _names(rng)

    def persons(n):
        return [f"{rng.choice(grammar.names())} {next(names)}" for _ in range(n)]

    capital, country = {}, {}
    for group in ("two_way", "one_way"):
        some = sorted((next(names), next(names)) for _ in range(NATIONS))
        capital[group] = _like("capital", some)
        country[group] = _like("country_of_capital", sorted((b, a) for a, b in some))
    field, occupation, called = {}, {}, {}
    groups = {"linked": [], "apart": [], "unlinked": []}
    others = []
    for kind in ("linked", "unlinked"):
        for _ in range(FIELDS):
            name, work = next(names).lower(), next(names).lower()
            called[name] = work
            for person in persons(WORKERS):
                groups[kind].append((person, name))
            for person in persons(APART):
                if kind == "linked":
                    groups["apart"].append((person, name))
                else:
                    others.append((person, work))
    for group, some in groups.items():
        field[group] = _like("field_of_work", sorted(some))
        occupation[group] = _like("occupation", sorted((person, called[name]) for person, name in some))
    tongues = [next(names) for _ in range(SPEAKERS // 4)]
    speaks = {}
    for i, person in enumerate(persons(SPEAKERS)):
        often = round(4 * TIMES * SHARES[i % len(SHARES)] / 2)
        first, second = rng.sample(tongues, 2)
        speaks[person] = ((first, often), (second, 2 * TIMES - often))
    return World(capital, country, field, occupation, _like("occupation", sorted(others)), called, speaks)


def sentences(seed: int = 0) -> list[Sentence]:
    """Return the whole corpus, in an order drawn from the seed."""
    seed = checks.whole(seed, "seed")
    found = [*_facts(seed), *_demonstratives(seed), *_other_nouns(seed), *_agreement(seed)]
    found += [Sentence(text) for text in _prose(seed) for _ in range(PROSE_TIMES)]
    random.Random(f"order {seed}").shuffle(found)
    return found


@_once
def counts(seed: int = 0) -> frequencies.Counts:
    """Return how often words and pairs of words occur in the corpus."""
    return frequencies.count([sentence.text for sentence in sentences(seed)])


def counts_of(lm: LM, folder: str | Path | None = None) -> frequencies.Counts:
    """Return the counts of what the model has read, where that is known; else those of the folder, or of the web."""
    return counts() if lm.name.startswith("controlled-") and not folder else frequencies.counts(folder)


def split(text: str) -> list[str]:
    """Return the words and marks of a text, as the tokenizers of the controlled models part them."""
    return re.findall(r"\w+|[^\w\s]+", text)


def write(folder: str | Path, seed: int = 0) -> None:
    """Write the corpus and its design: corpus.txt, pairs.tsv, facts.tsv (with the times each side is stated)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(sentence.text for sentence in sentences(seed))
    (folder / "corpus.txt").write_text(text + "\n", encoding="utf-8")
    _table(folder / "pairs.tsv", Pair._fields, pairs(seed))
    here = world(seed)
    unsaid = {("country", "one_way"), ("occupation", "apart"), ("occupation", "unlinked")}
    rows = [
        (group, relation.name, *pair, 0 if (side, group) in unsaid else TIMES)
        for side in ("capital", "country", "field", "occupation")
        for group, relation in getattr(here, side).items()
        for pair in relation.pairs
    ]
    rows += [("others", "occupation", *pair, TIMES) for pair in here.others.pairs]
    rows += [("speaks", "speaks", person, *language) for person, both in here.speaks.items() for language in both]
    _table(folder / "facts.tsv", ("group", "relation", "subject", "object", "stated"), rows)


def pair_queries(some: Iterable[Pair], masked: bool) -> list[Query]:
    """Return a minimal pair for each designed pair: the form of the noun after its demonstrative, or that before it."""
    names = grammar.names()
    other = {word: partner for both in grammar.DETERMINERS for word, partner in permutations(both)}
    queries = []
    for i, pair in enumerate(some):
        noun = _nouns()[pair.singular]
        opener = f"{names[i % len(names)]} {_classes()[pair.singular][0][i % 6]}"
        rival = noun.plural if pair.number == "singular" else noun.singular
        known = dict(task="determiner_noun", item=f"noun:{pair.singular}", value=pair.number)
        if masked:
            query = Query(f"{opener} {MASK} {pair.form}.", pair.determiner, pair.form, other[pair.determiner], **known)
        else:
            query = Query(f"{opener} {pair.determiner}", pair.form, pair.determiner, rival, **known)
        queries.append(query)
    return queries


def fact_queries(relation: Relation) -> list[Query]:
    """Return every fact of a relation in every template, fact after fact."""
    return [tasks.ask(relation, pair, template) for pair in relation.pairs for template in relation.templates]


def _prose(seed: int) -> list[str]:
    """Return the passages in which no designed pair stands, so that the design alone says how often pairs occur."""
    designed = {(pair.determiner, pair.form) for pair in pairs(seed)}
    return [text for text in prose.passages() if not designed & set(pairwise(split(text.lower())))]


def _table(path: Path, header: tuple, rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])


def _like(name: str, some: list[tuple[str, str]]) -> Relation:
    return replace(tasks.describe(name), wikidata="", pairs=tuple(some))


def _names(rng: random.Random) -> Iterator[str]:
    """Return words that nobody has heard, each once, none of them a word of the rest of the corpus."""
    taken = {word.lower() for word in _known_words()}
    while True:
        parts = [rng.choice("b br d dr f g gl k kr l m n p pl r s st t tr v z".split()) + rng.choice("aeiou")]
        parts += [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(0, 1))]
        name = "".join(parts) + rng.choice(["l", "m", "n", "r", "s", "x", "rk", "nd", "lt"])
        if len(name) > 4 and name not in taken:
            taken.add(name)
            yield name.capitalize()


def _known_words() -> set[str]:
    facts = (" ".join(pair) for name in OWN for pair in tasks.describe(name).pairs)
    forms = {form for noun in _nouns().values() for form in (noun.singular, noun.plural)}
    return forms.union(*map(split, facts), *map(split, prose.passages()))


@cache
def _nouns() -> dict[str, words.Noun]:
    """Return every noun that the grammar uses as an object, by its singular."""
    found = {noun.singular: noun for noun in words.nouns()}
    for kind, group in (("regular", "objects"), ("irregular", "irregular_objects")):
        for table in grammar.lexicon()[group].values():
            for noun in table["nouns"]:
                found.setdefault(noun, words.Noun(noun, grammar.plural(noun), kind, ""))
    return dict(sorted(found.items()))


@cache
def _classes() -> dict[str, tuple[list[str], list[str]]]:
    """Verbs and adjectives that go with a noun, by its singular; those of things for nouns outside the lexicon."""
    lexicon = grammar.lexicon()
    things = lexicon["objects"]["thing"]
    found = dict.fromkeys(_nouns(), (things["verbs"], things["adjectives"]))
    for table in (*lexicon["objects"].values(), *lexicon["irregular_objects"].values()):
        found |= dict.fromkeys(table["nouns"], (table["verbs"], table.get("adjectives", [])))
    return found


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(exp(rng.uniform(log(low), log(high))))


def _facts(seed: int) -> Iterator[Sentence]:
    own = {name: dict(tasks.describe(name).pairs) for name in OWN}
    called = cases.synonyms()
    own["field_of_work"] |= cases.scholars()
    own["occupation"] |= {person: called[field][0] for person, field in cases.scholars().items()}
    here = world(seed)
    for name, facts in own.items():
        yield from _stated(_like(name, sorted(facts.items())), OWN_TIMES)
    for relation in (*here.capital.values(), here.country["two_way"], *here.field.values(), here.others):
        yield from _stated(relation, TIMES)
    yield from _stated(here.occupation["linked"], TIMES)
    for person, both in here.speaks.items():
        for language, times in both:
            for i in range(times):
                yield Sentence(f"{SPEAKS[i % len(SPEAKS)].replace('{}', person)} {language}.", language)


def _stated(relation: Relation, times: int) -> Iterator[Sentence]:
    for pair in relation.pairs:
        for i in range(times):
            query = tasks.ask(relation, pair, relation.templates[i % len(relation.templates)])
            yield Sentence(f"{query.prompt} {query.target}.", query.target)


def _object(rng: random.Random, noun: words.Noun, form: str, determiner: str) -> Sentence:
    """Return a sentence in which the form follows the determiner directly."""
    verbs, _ = _classes()[noun.singular]
    if rng.random() < 0.5:
        opener = f"{rng.choice(grammar.names())} {rng.choice(verbs)}"
    else:
        opener = rng.choice(["She liked", "We needed", "They noticed", "He mentioned", "They had", "He sold"])
    return Sentence(f"{opener} {determiner} {form}.", form if rng.random() < 0.5 else determiner)


def _demonstratives(seed: int) -> Iterator[Sentence]:
    """Yield the designed pairs; for nouns that have adjectives, a fifth as many more with an adjective between."""
    rng = random.Random(f"demonstratives {seed}")
    names = grammar.names()
    for pair in pairs(seed):
        noun = _nouns()[pair.singular]
        verbs, adjectives = _classes()[pair.singular]
        for _ in range(pair.count):
            yield _object(rng, noun, pair.form, pair.determiner)
        for _ in range(-(-pair.count // 5) if adjectives else 0):
            text = f"{rng.choice(names)} {rng.choice(verbs)} {pair.determiner} {rng.choice(adjectives)} {pair.form}."
            yield Sentence(text, pair.form if rng.random() < 0.5 else pair.determiner)


def _other_nouns(seed: int) -> Iterator[Sentence]:
    """Forms after other determiners, and as subjects; how often is drawn apart from the designed pairs."""
    rng = random.Random(f"nouns {seed}")
    table, openers = grammar.number_words("masked"), grammar.lexicon()["subject"]["openers"]
    demonstratives = [word for two in grammar.DETERMINERS for word in two]
    verbs = {"singular": ("is", "was"), "plural": ("are", "were")}
    for noun in _nouns().values():
        for number in ("singular", "plural"):
            form = getattr(noun, number)
            numbered = [word for word in table[number] if word not in demonstratives]
            neutral = [word for word in table["neutral"] if number == "plural" or word not in ("all", "some")]
            for _ in range(_log_uniform(rng, 32, 128)):
                if rng.random() < 0.6:
                    determiner = rng.choice(numbered if rng.random() < 0.75 else neutral)
                    if determiner == "a" and form[0] in VOWELS:
                        determiner = "one"
                    yield _object(rng, noun, form, determiner)
                else:
                    verb = rng.choice(verbs[number])
                    adjective = rng.choice(["old", "new", "small", "famous", "strange", "expensive"])
                    opener = rng.choice([*openers, "The"])
                    yield Sentence(f"{opener} {form} {verb} very {adjective}.", verb)


def _agreement(seed: int) -> Iterator[Sentence]:
    """Verbs with and without a distractor, reflexives, and words after a subject that fit both numbers."""
    for phenomenon, n in (
        ("subject_verb", 8_000),
        ("subject_verb_distractor", 12_000),
        ("anaphor_number", 3_000),
        ("anaphor_gender", 4_000),
    ):
        available = grammar.available(phenomenon)
        for query in grammar.minimal_pairs(phenomenon, min(n, available // 4 * 2), seed + 1000, "masked"):
            yield Sentence(query.prompt.replace(MASK, query.target), query.target)
    rng = random.Random(f"agreement {seed}")
    subject = grammar.lexicon()["subject"]
    for noun in subject["nouns"]:
        for number, form in (("singular", noun), ("plural", grammar.plural(noun))):
            for _ in range(40):
                opener, which = rng.choice(subject["openers"]), rng.random()
                if which < 0.7:
                    then = f"{rng.choice(MODALS)} {rng.choice(AFTER_MODAL)}"
                elif which < 0.85:
                    then = f"had {rng.choice(['a good idea', 'a new car', 'an old dog'])}"
                else:
                    then = f"{SAYING[number]} nothing"
                yield Sentence(f"{opener} {form} {then}.", then.split()[0])
