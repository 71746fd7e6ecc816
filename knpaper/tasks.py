"""The facts written for this project: (subject, object) pairs of a relation, asked through several templates.

Minimal pairs are made in `knpaper.grammar`, public data sets are read in `knpaper.datasets`.

    >>> query = facts("capital", n=1)[0]
    >>> query.prompt == query.template.replace("{}", query.subject)
    True
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from kncore.checks import unknown
from kncore.query import Query, capital
from knpaper import resources
from knpaper.resources import DATA


@dataclass(frozen=True)
class Relation:
    """A relation of facts: its name, what it relates, its Wikidata property and its inverse (or ""), the templates with
    {} in place of the subject, and the (subject, object) pairs sorted by subject."""

    name: str
    description: str
    wikidata: str
    inverse: str
    templates: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


@cache
def _tables() -> dict[str, dict]:
    return resources.toml("relations.toml")


def relations() -> list[str]:
    """Return the names of the relations that `facts` knows."""
    return sorted(_tables())


@cache
def describe(name: str) -> Relation:
    """Return the relation of that name: its description, templates and facts. Raises ValueError for an unknown one."""
    if name not in _tables():
        raise unknown("relation", name, _tables())
    table = _tables()[name]
    lines = (DATA / "facts" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    relation = Relation(
        name=name,
        description=table["description"],
        wikidata=table["wikidata"],
        inverse=table.get("inverse", ""),
        templates=tuple(table["templates"]),
        pairs=tuple(sorted(tuple(line.split("\t")) for line in lines)),
    )
    resources.note(f"relation {name}", relation)
    return relation


def facts(relation: str, n: int | None = None, seed: int = 0, templates: Sequence[str] | None = None) -> list[Query]:
    """`n` facts of a relation (None: all), each asked through every template, fact after fact.

    The facts come in an order drawn from `seed`, so that a smaller `n` gives the first facts of a larger
    one. `templates` replaces the relation's own; each holds {} once and ends right before the object.

    Raises ValueError for an unknown relation, a template without exactly one {}, or more facts than exist.
    """
    known = describe(relation)
    templates = known.templates if templates is None else tuple(templates)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"the template {template!r} must hold {{}} exactly once, where the subject goes")
    pairs = list(known.pairs)
    random.Random(seed).shuffle(pairs)
    return [ask(known, pair, template) for pair in first(pairs, n, f"facts of {relation!r}") for template in templates]


def first(items: Sequence, n: int | None, what: str) -> Sequence:
    """Return the first `n` items (None: all). Raises ValueError for an `n` that is not from 1 to their number."""
    if n is not None and not 0 < n <= len(items):
        raise ValueError(f"n={n} {what} asked for; there are {len(items)}, n may be 1 to that")
    return items[:n]


def candidates(relation: str) -> list[str]:
    """Return the distinct objects of a relation, sorted: what a model chooses from when the choice is closed."""
    return sorted({target for _, target in describe(relation).pairs})


def ask(known: Relation, pair: tuple[str, str], template: str, foil: str = "") -> Query:
    """Return a (subject, object) pair asked through a template; a subject that starts the prompt gets a capital.

    Raises ValueError where the query breaks the rules of `Query`.
    """
    subject, target = pair
    item = f"{known.name}:{subject}"
    if template.startswith("{}"):
        subject = capital(subject)
    return Query(template.replace("{}", subject), target, subject, foil, known.name, item, template)


def paraphrases(query: Query) -> list[Query]:
    """Return what a query of a fact asks in every template of its relation; none where the relation is unknown, the
    prompt has a mask, or the query breaks a template."""
    if query.task not in relations() or query.masked:
        return []
    relation = describe(query.task)
    return [ask(relation, (query.subject, query.target), template) for template in relation.templates]
