"""Queries, and the facts written for this project.

A `Query` is one question to a language model: a prompt, the word that should come next and, for a minimal
pair, the word that should not. Facts are (subject, object) pairs of a relation, asked through several
paraphrase templates. Minimal pairs are made in `kncore.grammar`, public data sets are read in
`kncore.public`.

    >>> from kncore import tasks
    >>> query = tasks.facts("capital", n=1)[0]
    >>> query.prompt == query.template.replace("{}", query.subject)
    True
"""

import difflib
import random
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache

from kncore import resources
from kncore.resources import DATA

MASK = "[MASK]"
# Scripts without blanks between words, by how the Unicode names of their letters begin.
WITHOUT_BLANKS = ("CJK ", "HIRAGANA ", "KATAKANA", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


@dataclass(frozen=True)
class Query:
    """One question to a language model.

    prompt    causal form: text that ends right before the target, without a trailing space; masked form:
              a text that holds "[MASK]" once, where the target belongs.
    target    the word or words that belong there, without a leading space.
    subject   what the query is about, as it occurs in the prompt: the subject of a fact, the word that
              decides the agreement of a minimal pair. "" where unknown. Where it is, `subject_start` says.
    foil      the wrong member of a minimal pair, or the false object of a counterfactual; "" for facts.
    task      the relation or phenomenon.
    item      what queries cluster by: the fact ("capital:France") or lemma ("determiner_noun:book").
    template  the prompt with {} in place of the subject; text may stand before it in the prompt. A template without
              {}, or with more than one, is a name only.
    value     the condition within a phenomenon, such as "singular" or "feminine"; "" for facts.
    joined    whether the target follows the prompt without a space: after a quotation mark or a hyphen, or in a script
              without blanks. Where the prompt has [MASK], the target is joined if no white space stands before it,
              whatever this says.

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
            if field.name == "joined":
                if not isinstance(text, bool):
                    raise TypeError(f"joined of a Query must be True or False, got {type(text).__name__} {text!r:.80}")
                continue
            if not isinstance(text, str):
                raise TypeError(f"the {field.name} of a Query must be text, got {type(text).__name__} {text!r:.80}")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                fail(f"the {field.name} holds half of a surrogate pair, which is no text; repair its encoding")

        if not self.prompt.strip():
            fail("the prompt is empty")
        if not self.target.strip():
            fail("the target is empty")
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
    """Index in a query's prompt where its subject begins.

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
    raise ValueError(
        f"the template {query.template!r} with the subject {subject!r} is not what the prompt {prompt!r} ends with; "
        "mend the template, or leave it out"
    )


def locate(text: str, subject: str) -> int:
    """Index in a text where a subject begins; -1 where it does not occur.

    Where it occurs several times it is the last one that stands alone, else the last one in a compound with a hyphen or
    an apostrophe ("Niger-Congo"; "Niger's" stands alone), else the last one inside a word. In scripts without blanks
    every occurrence stands alone.
    """
    starts = [i for i in range(len(text)) if text.startswith(subject, i)]
    return max(starts, key=lambda start: (_apart(text, start, start + len(subject)), start), default=-1)


def _apart(text: str, start: int, end: int) -> int:
    """How far a part of a text is a word of its own: 2 alone, 1 in a compound, 0 inside a word."""
    if _runs_on(text, start) or _runs_on(text, end):
        return 0
    compound = re.search(r"\w[-\u2010\u2011]$", text[:start]) or re.match(
        r"[-\u2010\u2011]\w|['\u2019](?!s\b)\w", text[end:]
    )
    return 1 if compound else 2


def _runs_on(text: str, at: int) -> bool:
    """Whether a word goes on across an index of a text."""
    return 0 < at < len(text) and all(
        (letter.isalnum() or letter == "_" or unicodedata.category(letter).startswith("M"))
        and not unicodedata.name(letter, "").startswith(WITHOUT_BLANKS)
        for letter in text[at - 1 : at + 1]
    )


def capital(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Relation:
    """A relation of facts: its name, what it relates, its Wikidata property (or ""), the relation that is its
    inverse (or ""), the templates with {} in place of the subject, and the (subject, object) pairs sorted
    by subject."""

    name: str
    description: str
    wikidata: str
    inverse: str
    templates: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> ValueError:
    """The error for a name that is not among the known ones; it suggests the close ones."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.{remedy and ' ' + remedy}")


@cache
def _tables() -> dict[str, dict]:
    return tomllib.loads((DATA / "relations.toml").read_text(encoding="utf-8"))


def relations() -> list[str]:
    """The names of the relations that `facts` knows."""
    return sorted(_tables())


@cache
def describe(name: str) -> Relation:
    """The relation of that name: its description, templates and facts. Raises ValueError for an unknown one."""
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
    if n is not None and not 0 < n <= len(pairs):
        raise ValueError(f"n={n} facts of {relation!r} asked for; there are {len(pairs)}, n may be 1 to that")
    random.Random(seed).shuffle(pairs)
    return [ask(known, pair, template) for pair in pairs[:n] for template in templates]


def candidates(relation: str) -> list[str]:
    """The distinct objects of a relation, sorted: what a model chooses from when the choice is closed."""
    return sorted({target for _, target in describe(relation).pairs})


def ask(known: Relation, pair: tuple[str, str], template: str, foil: str = "") -> Query:
    """A (subject, object) pair of a relation asked through a template; a subject that starts the prompt gets a capital.

    Raises ValueError where the query breaks the rules of `Query`.
    """
    subject, target = pair
    item = f"{known.name}:{subject}"
    if template.startswith("{}"):
        subject = capital(subject)
    return Query(template.replace("{}", subject), target, subject, foil, known.name, item, template)
