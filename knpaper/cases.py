"""Cases: what an editor is asked to write, and what the edited model is asked afterwards.

A request is a `Query` whose `target` is the present answer and whose `foil` is the answer that the edit shall install.
In what is asked afterwards `target` is what a model that took the edit in says, and `foil` its rival:

`reliability` is the request itself, `generality` paraphrases of it (for agreement, the same determiner before other
nouns), and by `locality` other subjects (the determiners of the other number) keep their own answers. `symmetry` (Niu
et al. 2024, section 4) reads the question backwards: after "the capital of Canada is Rome", Rome is the capital of
Canada, no longer of Italy; `symmetry_old` does so for the answer before the edit, which is left without a right answer:
its target is the subject of the request, and there is no foil. `largest_city` is a control of capitals, which is what
it was. `synonymy` (section 4) asks for the same fact in other words: whoever works in linguistics is a linguist. Where
the two words do not look alike, `decoy` asks for an occupation that begins as the field does and belongs to another,
and `occupations` for those of other fields, all in the same prompts.

Agreement is edited in a two-by-two of determiner and noun. In five other prompts stand the edited determiner
(`generality`: their own nouns, `same_noun`: that of the request) and the other one of its number, which follows if it
is a rule that was edited (`other_determiner`, `other_determiner_same_noun`); `other_number` has determiners of the
other number before the nouns of `generality`, asked for the same form.

Everything is drawn from lists with a seed. All cases are drawn before the first `n` are taken, so that a smaller `n`
gives the first cases of a larger one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

from kncore import checks
from kncore.query import Query, capital
from knpaper import grammar, resources, tasks
from knpaper.datasets import counterfact, pararel
from knpaper.tasks import Relation

CRITERIA = tuple(
    "reliability generality locality symmetry symmetry_old synonymy decoy occupations largest_city same_noun "
    "other_determiner other_determiner_same_noun other_number".split()
)
PUBLIC = ("counterfact", "P36", "P1376", "P101")
CONTROLS = {"capital": "largest_city"}
FEW = 5  # neighbours of a request; other nouns after a determiner
Fits = Callable[[str, str], bool]  # whether the second answer can replace the first


@dataclass(frozen=True)
class Case:
    """One request, and per criterion (of `CRITERIA`) the queries that are asked after the edit."""

    request: Query
    queries: Mapping[str, tuple[Query, ...]]


def scholars() -> dict[str, str]:
    """Return persons and the field that each is known for, sorted by person."""
    return dict(sorted(_rows("scholars")))


def work(public: bool = False, path: str | Path | None = None) -> Relation:
    """Return the fields of the scholars, or those of P101 of ParaRel whose workers `synonyms` names."""
    if public:
        return _named(_pararel("P101", path))
    return replace(tasks.describe("field_of_work"), pairs=tuple(scholars().items()))


def _named(known: Relation) -> Relation:
    return replace(known, pairs=tuple(pair for pair in known.pairs if pair[1] in synonyms()))


def synonyms() -> dict[str, tuple[str, ...]]:
    """Return fields of work and what a worker in the field is called: the usual word first, then other right ones."""
    return {field: (usual, *filter(None, more.split("|"))) for field, usual, more in _rows("synonyms")}


def unlike() -> list[tuple[str, str, str]]:
    """Return fields, what a worker in each is called, which begins otherwise, and an occupation that begins as the
    field does (three letters at least) and belongs to another one."""
    return [tuple(row) for row in _rows("unlike")]


def bijective(
    relation: str | Relation = "capital",
    n: int | None = None,
    seed: int = 0,
    subjects: Collection[str] | None = None,
    objects: Collection[str] | None = None,
    inverse: Relation | None = None,
) -> list[Case]:
    """`n` requests (None: all) that give a subject another object of the same relation, for symmetry (section 4).

    Only facts that stand in the table of the inverse relation too are edited. Subjects come in an order drawn from
    `seed`. The new object is drawn from `objects` (None: all), is never the old one, and comes only once before every
    object of the pool has come. `subjects` are those to edit and, as far as they suffice, to take neighbours from:
    give the ones that the model knows, and as `objects` the ones whose reverse it knows. A relation that is not in the
    tables comes with its `inverse`.

    Raises ValueError for an unknown relation, one without an inverse, a subject or object without such a fact, no
    object to draw, or an `n` that is not from 1 to the number of subjects.
    """
    control = None
    if not isinstance(relation, Relation):
        known = tasks.describe(relation)
        if not known.inverse:
            two_way = ", ".join(name for name in tasks.relations() if tasks.describe(name).inverse)
            raise ValueError(f"relation {relation!r} has no inverse to ask for symmetry; relations with one: {two_way}")
        inverse = tasks.describe(known.inverse)
        control = tasks.describe(CONTROLS[relation]) if relation in CONTROLS else None
    elif inverse is None:
        raise ValueError(f"the relation {relation.name!r} comes without its inverse; give it as inverse=Relation(...)")
    else:
        known = relation
    back = dict(inverse.pairs)
    pairs = [pair for pair in known.pairs if back.get(pair[1]) == pair[0]]
    pool = _chosen([target for _, target in pairs], objects, f"object of {known.name!r}")
    controls = dict(control.pairs) if control else {}
    cases = []
    for subject, old, new, queries in _edits(known, pairs, pool, lambda old, new: old != new, n, seed, subjects):
        queries["symmetry"] = _ask(inverse, new, subject, back[new])
        queries["symmetry_old"] = _ask(inverse, old, subject)
        if controls.get(subject, new) != new:
            queries[control.name] = _ask(control, subject, controls[subject], new)
        cases.append(Case(_flip(queries["reliability"][0]), queries))
    return cases


def synonymy(
    n: int | None = None,
    seed: int = 0,
    subjects: Collection[str] | None = None,
    known: Relation | None = None,
    called: Mapping[str, Sequence[str]] | None = None,
) -> list[Case]:
    """`n` requests (None: all) that move a scholar to another field of work, for synonymy (section 4).

    Persons come in an order drawn from `seed`. The new field is drawn among those whose workers bear no name that
    fits the old one, and comes only once before every field has come. Asked for synonymy: what the person is, with
    the occupation of the new field as target and that of the old field as foil. `subjects` as in `bijective`. `known`
    and `called` replace the scholars of the table and the names of who works in a field.

    Raises ValueError for a subject that is no scholar of the table, or an `n` that is not from 1 to their number.
    """
    known = known or work()
    called, occupation = called or synonyms(), tasks.describe("occupation")

    def differ(old: str, new: str) -> bool:
        return called[new][0] not in called[old] and called[old][0] not in called[new]

    pool = sorted({field for _, field in known.pairs})
    cases = []
    for person, old, new, queries in _edits(known, known.pairs, pool, differ, n, seed, subjects):
        queries["synonymy"] = _ask(occupation, person, called[new][0], called[old][0])
        cases.append(Case(_flip(queries["reliability"][0]), queries))
    return cases


def reverse(case: Case) -> Case:
    """Return the request of a case of `bijective` read backwards, with its questions: what is written is the same fact.

    After "the capital of Canada is Rome" that is "Rome is the capital of", now Canada and no longer Italy. Symmetry
    asks for the capital of Canada, `symmetry_old` for that of Italy, which was Rome.
    """
    first, *others = case.queries["symmetry"]
    asked = (*case.queries["reliability"], *case.queries["generality"])
    queries = {
        "reliability": (first,),
        "generality": tuple(others),
        "symmetry": asked,
        "symmetry_old": tuple(replace(_about(query, first.foil), foil="") for query in asked),
    }
    return Case(_flip(first), queries)


def elsewhere(drawn: Sequence[Case], cities: Mapping[str, str], seed: int = 0) -> list[Case]:
    """Return the requests of `bijective` with a city that is no capital in the place of the new one.

    No fact of the relation is then against the reversed question. `cities` maps each to its country, which is the foil
    of symmetry; they come in an order drawn from `seed`, none twice and none in its own country. There may be fewer
    cases than were given.
    """
    free = random.Random(f"cities {seed}").sample(sorted(cities), len(cities))
    found = []
    for case in drawn:
        city = next((city for city in free if cities[city] != case.request.subject), None)
        if city is None:
            break
        free.remove(city)
        queries = {
            name: tuple(replace(query, target=city) for query in case.queries[name])
            for name in ("reliability", "generality")
        }
        queries["symmetry"] = tuple(replace(_about(q, city), foil=cities[city]) for q in case.queries["symmetry"])
        found.append(Case(replace(case.request, foil=city), queries))
    return found


def cities() -> dict[str, str]:
    """Return cities that are the capital of no country, and the country of each."""
    return dict(map(tuple, _rows("cities")))


def moved(
    rows: Sequence[tuple[str, str, str]],
    n: int | None = None,
    seed: int = 0,
    subjects: Collection[str] | None = None,
    known: Relation | None = None,
    prompts: int = 3,
) -> list[Case]:
    """`n` requests as in `synonymy` to the fields of `rows` (as `unlike` has them), each once before any comes again.

    The foil of synonymy and of the decoy is the occupation of the old field. `occupations` asks for those of the other
    rows, prompt by prompt. Occupations are asked in so many `prompts`. Raises ValueError as `synonymy` does.
    """
    known = known or work()
    called, occupation = {field: names for field, *names in rows}, tasks.describe("occupation")
    usual = {field: names[0] for field, names in synonyms().items()}

    def differ(old: str, new: str) -> bool:
        return old != new and not {usual[old], *synonyms()[old]} & set(called[new])

    cases = []
    for person, old, new, queries in _edits(known, known.pairs, sorted(called), differ, n, seed, subjects):
        right, decoy = called[new]
        others = [word for word in dict.fromkeys(word for word, _ in called.values()) if word not in called[new]]
        queries["synonymy"] = _ask(occupation, person, right, usual[old])[:prompts]
        queries["decoy"] = _ask(occupation, person, decoy, usual[old])[:prompts]
        queries["occupations"] = tuple(replace(q, target=word, foil="") for q in queries["decoy"] for word in others)
        cases.append(Case(_flip(queries["reliability"][0]), queries))
    return cases


def agreement(n: int | None = None, seed: int = 0) -> list[Case]:
    """`n` requests (None: 400) that make a determiner take a noun in the wrong number: "Anna explored these" -> castle.

    They are the minimal pairs of `grammar.minimal_pairs("determiner_noun")`, half of them plural determiners that shall
    take a singular, half the other way round. The five other prompts are drawn from `seed`.

    Raises ValueError for an odd `n` or one that the grammar does not have.
    """
    pool = grammar.minimal_pairs("determiner_noun", seed=seed)
    partner = {word: other for two in zip(*grammar.DETERMINERS, strict=True) for word, other in permutations(two)}
    cases = []
    for request in grammar.minimal_pairs("determiner_noun", n=n, seed=seed):
        alike = [q for q in pool if q.subject == request.subject and q.item != request.item]
        others = {query.prompt: query for query in alike if query.prompt != request.prompt}
        drawn = random.Random(f"{request.prompt} {seed}").sample(list(others.values()), FEW)
        kept = [word for word in partner if word not in (request.subject, partner[request.subject])]
        value = "plural" if request.value == "singular" else "singular"
        nouns = tuple(map(_flip, drawn))
        same = tuple(replace(q, target=request.foil, foil=request.target, item=request.item) for q in nouns)
        queries = {
            "reliability": (_flip(request),),
            "generality": nouns,
            "locality": tuple(replace(_instead(_flip(request), word), value=value) for word in kept),
            "same_noun": same,
            "other_determiner": tuple(_instead(query, partner[request.subject]) for query in nouns),
            "other_determiner_same_noun": tuple(_instead(query, partner[request.subject]) for query in same),
            "other_number": tuple(replace(_instead(q, kept[i % 2]), value=value) for i, q in enumerate(nouns)),
        }
        cases.append(Case(request, queries))
    return cases


def public_cases(kind: str, path: str | Path | None = None, n: int | None = None, seed: int = 0) -> list[Case]:
    """`n` cases (None: all) from the public data that the paper used, in an order drawn from `seed`.

    "counterfact": reliability, generality and locality as the data have them. "P36" and "P1376" of ParaRel: as in
    `bijective`, each with the other as its inverse, over the facts that are unique in both. "P101": as in `synonymy`,
    over the subjects (a few are no persons) whose field `synonyms` knows. Prompts are the patterns that end in [MASK];
    those of P106 ask for an occupation without its article, so the occupation is asked in this project's templates.

    `path` as in `knpaper.datasets`. Raises ValueError for an unknown kind, an `n` that is not from 1 to the number of
    cases, or a malformed file; FileNotFoundError or ConnectionError where the data are missing.
    """
    if kind == "counterfact":
        found = counterfact.read(path)
        random.Random(f"{kind} {seed}").shuffle(found)
        cases = []
        for case in tasks.first(found, n, "cases of CounterFact"):
            paraphrases = tuple(map(_flip, case.paraphrases))
            queries = {"reliability": (_flip(case.rewrite),), "generality": paraphrases, "locality": case.neighbours}
            cases.append(Case(case.rewrite, queries))
        return cases
    if kind not in PUBLIC:
        raise checks.unknown("kind of public cases", kind, PUBLIC)
    known = _pararel(kind, path)
    if kind == "P101":
        return synonymy(n, seed, known=_named(known))
    return bijective(known, n, seed, inverse=_pararel({"P36": "P1376", "P1376": "P36"}[kind], path))


def shorten(case: Case, counts: Mapping[str, int | None], edited: Collection[str] = ()) -> Case:
    """Return a case with so many queries (None: all) of each criterion, of those that are named and that it has.

    Subjects that are `edited` together with it are no neighbours: they are left out of locality.
    """
    queries = {name: case.queries[name][:count] for name, count in counts.items() if name in case.queries}
    if "locality" in queries:
        queries["locality"] = tuple(query for query in queries["locality"] if query.subject not in edited)
    return replace(case, queries=queries)


def _edits(
    known: Relation,
    pairs: Sequence[tuple[str, str]],
    pool: Sequence[str],
    fits: Fits,
    n: int | None,
    seed: int,
    subjects: Collection[str] | None,
) -> list[tuple[str, str, str, dict[str, tuple[Query, ...]]]]:
    """Return the first `n` of: subject, old and new object, and the criteria that every relation has."""
    truth = dict(pairs)
    chosen = _chosen(list(truth), subjects, f"subject of {known.name!r}")
    rest = [subject for subject in truth if subject not in set(chosen)]
    rng = random.Random(f"{known.name} {seed}")
    order = rng.sample(chosen, len(chosen))
    drawn = list(zip(order, _new([truth[subject] for subject in order], pool, fits, rng), strict=True))
    edits = []
    for subject, new in tasks.first(drawn, n, f"subjects of {known.name!r}"):
        first, *others = _ask(known, subject, new, truth[subject])
        own = random.Random(f"{known.name} {seed} {subject}")
        nearest = [*own.sample(chosen, len(chosen)), *own.sample(rest, len(rest))]
        neighbours = [other for other in nearest if other != subject and truth[other] != new][:FEW]
        locality = (_ask(known, other, truth[other], new)[0] for other in neighbours)
        queries = {"reliability": (first,), "generality": tuple(others), "locality": tuple(locality)}
        edits.append((subject, truth[subject], new, queries))
    return edits


def _new(olds: Sequence[str], pool: Sequence[str], fits: Fits, rng: random.Random) -> list[str]:
    """For every old answer a new one that fits it; each of the pool once in as many as the pool has."""
    drawn: list[str] = []
    for start in range(0, len(olds), len(pool)):
        part = olds[start : start + len(pool)]
        new = rng.sample(pool, len(pool))
        for i, old in enumerate(part):
            if not fits(old, new[i]):
                others = rng.sample(range(len(new)), len(new))
                suited = (j for j in others if fits(old, new[j]) and (j >= len(part) or fits(part[j], new[i])))
                at = next(suited, None)
                if at is None:
                    raise ValueError(f"no answer other than {old!r} to draw from {', '.join(pool)}; give more objects")
                new[i], new[at] = new[at], new[i]
        drawn += new[: len(part)]
    return drawn


def _chosen(known: list[str], wanted: Collection[str] | None, what: str) -> list[str]:
    """Return the wanted ones in the order of the known ones, which no set can change."""
    if wanted is None:
        return known
    strange = [name for name in wanted if name not in set(known)]
    if strange or not wanted:
        raise ValueError(f"no {what} that a fact can be edited for: {', '.join(map(repr, strange)) or 'none given'}")
    return [name for name in known if name in set(wanted)]


def _ask(relation: Relation, subject: str, target: str, foil: str = "") -> tuple[Query, ...]:
    return tuple(tasks.ask(relation, (subject, target), template, foil) for template in relation.templates)


def _flip(query: Query) -> Query:
    return replace(query, target=query.foil, foil=query.target)


def _about(query: Query, subject: str) -> Query:
    """Return a question of a relation about another subject."""
    shown = capital(subject) if query.template.startswith("{}") else subject
    return replace(_instead(query, shown), item=f"{query.task}:{subject}")


def _instead(query: Query, subject: str) -> Query:
    return replace(query, subject=subject, prompt=query.template.replace("{}", subject))


def _rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in resources.text(f"{name}.tsv").splitlines()[1:]]


def _pararel(name: str, path: str | Path | None) -> Relation:
    """Return a relation of ParaRel: its causal patterns, and the facts of subjects that have one object."""
    queries = [query for query in pararel.read(name, path, "causal") if query.subject]
    if not queries:
        raise ValueError(f"ParaRel relation {name}: no pattern that ends in [MASK] shows its subject")
    facts = sorted({(query.subject, query.target) for query in queries})
    times = Counter(subject for subject, _ in facts)
    pairs = tuple((subject, target) for subject, target in facts if times[subject] == 1)
    return Relation(name, "", name, "", tuple(dict.fromkeys(query.template for query in queries)), pairs)
