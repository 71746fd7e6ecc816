"""The prompts of a sweep: drawn by the names of relations and phenomena, or read from a file of JSON lines."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from knbook.errors import UsageError
from kncore import editors, rome, tokens
from kncore.models import LM
from kncore.query import Query
from knpaper import cases, grammar, stimuli, tasks
from knpaper.cases import Case
from knpaper.datasets import blimp, pararel

FIELDS = [field.name for field in fields(Query)]


def named(
    lm: LM, kind: str, names: Sequence[str] = (), source: str = "own", n: int | None = None, seed: int = 0
) -> list[Query] | list[Case]:
    """Return the queries of a sweep of attribution, or the cases of one of edits: at most `n` of each of `names`.

    `names` are relations and phenomena (default: those of the chapters); `source` is "own", "public" (ParaRel, BLiMP
    and CounterFact, fetched) or a folder with the public data. Raises UsageError or ValueError for an unknown name.
    """
    draw = _edits if kind == "edits" else _queries
    form = "masked" if lm.spec.masked else "causal"
    return [item for name in names or _default_names(kind, source) for item in draw(name, source, seed, form)[:n]]


def _default_names(kind: str, source: str) -> Sequence[str]:
    if kind == "attribution":
        return [*stimuli.relations(source), *stimuli.phenomena(source)]
    if source != "own":
        return cases.PUBLIC
    return [*(name for name in tasks.relations() if tasks.describe(name).inverse), "field_of_work", "agreement"]


def _edits(name: str, source: str, seed: int, form: str) -> list[Case]:
    if source != "own":
        return cases.public_cases(name, None if source == "public" else source, seed=seed)
    draw = {"field_of_work": cases.synonymy, "agreement": cases.agreement}.get(name)
    return draw(seed=seed) if draw else cases.bijective(name, seed=seed)


def _queries(name: str, source: str, seed: int, form: str) -> list[Query]:
    if source == "own":
        own = name in grammar.phenomena()
        return grammar.minimal_pairs(name, seed=seed, form=form) if own else tasks.facts(name, seed=seed)
    path = None if source == "public" else source
    if re.fullmatch(r"P\d+", name):
        return pararel.read(name, path, form)
    if name not in blimp.paradigms():
        near = ", ".join(difflib.get_close_matches(name, blimp.paradigms(), 3)) or "determiner_noun_agreement_1"
        raise UsageError(f"{name!r} is neither a relation of ParaRel, e.g. P36, nor a paradigm of BLiMP, e.g. {near}")
    return blimp.read(name, path, form)


def read_queries(path: Path, kind: str) -> list[Query] | list[Case]:
    """Return the prompts of a file: lines of JSON with fields of `Query`; an edit's `foil` is the answer to install.

    Blank lines are skipped. Raises UsageError for a line that is no prompt, by its number, and for a file without one.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); expected lines of JSON") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            query = _query(line)
            found.append(_case(query) if kind == "edits" else query)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{path.name}, line {number}: {error}. Expected an object with prompt and target, and as needed "
                f"{', '.join(FIELDS[2:])}"
            ) from error
    if not found:
        raise UsageError(f"{path} holds no prompts; expected lines of JSON, each an object with prompt and target")
    return found


def _query(line: str) -> Query:
    """Return the query of a line of JSON; raise TypeError or ValueError where it is none."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if twice := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
            raise ValueError(f"{twice[0]!r:.80} stands there twice; leave one of them out")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg}, at letter {error.pos + 1})") from error
    if not isinstance(row, dict):
        raise TypeError(f"it holds {json.dumps(row):.60}, no object")
    if unknown := [name for name in row if name not in FIELDS]:
        near = difflib.get_close_matches(unknown[0], FIELDS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"a prompt has no {', '.join(f'{name!r:.80}' for name in unknown[:5])}{hint}")
    if absent := [name for name in FIELDS[:2] if name not in row]:
        raise ValueError(f"there is no {' and no '.join(absent)}")
    return Query(**row)


def _case(query: Query) -> Case:
    if not (query.subject and query.foil):
        raise ValueError("an edit needs a subject and a foil, the answer to install")
    return Case(query, {"reliability": (replace(query, target=query.foil, foil=query.target),)})


def refusal(lm: LM, item: Query | Case, editor: str) -> str:
    """Return why the tokenizer or the context of a model refuses an item; "" where they do not."""
    try:
        with warnings.catch_warnings():  # of a word that the model cannot write
            warnings.filterwarnings("error", message=".* is not in the vocabulary of ", category=UserWarning)
            if isinstance(item, Query):
                tokens.encode(lm, item)
            else:
                _encode_case(lm, item, editor)
    except (ValueError, UserWarning) as error:
        return str(error)
    return ""


def _encode_case(lm: LM, case: Case, editor: str) -> None:
    """Encode all that is asked to make an edit and to judge it; raise ValueError where something of it cannot be."""
    judged = [query for queries in case.queries.values() for query in queries]
    _encode_words(lm, [case.request, *judged])
    step = ""
    try:
        if editor == "context":
            step = "with the new fact stated before it"
            context = editors.in_context(lm, [case.request])[0].context
            _encode_words(lm, [replace(query, prompt=context + query.prompt) for query in judged])
        if editor.startswith("rome"):
            step = "ROME cannot ask it after a piece of prose, or what it is about"
            for query in rome.contexts(case.request, rome.hparams_for(lm).prefixes):
                tokens.encode(lm, query, query.foil)
                tokens.span(lm, query, query.foil)
    except ValueError as error:
        raise ValueError(f"{step}: {error}") from error


def _encode_words(lm: LM, queries: Sequence[Query]) -> None:
    for query in queries:
        for word in filter(None, (query.target, query.foil)):
            tokens.encode(lm, query, word)
