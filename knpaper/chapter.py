"""What several chapters share: what they ask, the neurons that they find, and the names under which they show it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from kncore import editors, neurons
from kncore.attribution import attribute
from kncore.editors import Edit
from kncore.interventions import edited
from kncore.models import LM
from kncore.neurons import Neuron
from kncore.predictions import log_probabilities
from kncore.query import Query
from knpaper import criteria, stats, stimuli, tasks
from knpaper.cases import Case
from knpaper.stats import Estimate
from knpaper.stimuli import Selection


def known_facts(lm: LM, n: int, seed: int = 0, source: str = "own") -> dict[str, Selection]:
    """Return `n` facts of every relation that the chapters ask about, as `stimuli.known_facts` finds them."""
    return {relation: stimuli.known_facts(lm, relation, n, seed, source) for relation in stimuli.relations(source)}


def known_pairs(lm: LM, n: int, seed: int = 0, source: str = "own") -> dict[tuple[str, str], Selection]:
    """Return `n` minimal pairs of every condition such as ("subject_verb", "plural"); see `stimuli.known_pairs`."""
    return _pairs_of(lm, stimuli.phenomena(source), n, seed, source)


def _pairs_of(lm: LM, phenomena: Iterable[str], n: int, seed: int, source: str) -> dict[tuple[str, str], Selection]:
    return {
        (phenomenon, value): pairs
        for phenomenon in phenomena
        for value, pairs in stimuli.known_pairs(lm, phenomenon, n, seed, source).items()
    }


def refined(scores: Float[Tensor, "query block neuron"]) -> list[Neuron]:
    """Return the refined neurons of prompts, or where the search ends with none the one with the highest mean score."""
    return neurons.find_neurons(scores).neurons or [neurons.top(scores.mean(0), 1)[0][0]]


def most_probable(lm: LM, queries: Sequence[Query], n: int = 3) -> list[str]:
    """Return the n most probable next tokens of each prompt with their probabilities; a blank is shown as ␣."""
    return [
        ", ".join(f"{lm.tokenizer.decode([i]).strip() or '␣'} {row[i].exp():.2f}" for i in row.topk(n).indices.tolist())
        for row in log_probabilities(lm, queries)
    ]


def neuron_names(found: Sequence[tuple[int, int]], most: int = 5) -> str:
    """Return the first neurons as text, "3·141, 5·92", and an ellipsis where there are more than `most`."""
    return ", ".join(f"{block}·{index}" for block, index in found[:most]) + " …" * (len(found) > most)


def spaced(name: str) -> str:
    """Return the name of a relation or a phenomenon in words."""
    return name.replace("_", " ")


# What is asked after an edit, as tables and figures call it.
KINDS = {
    "reliability": "the request",
    "generality": "paraphrase",
    "locality": "neighbour",
    "largest_city": "same subject, another question",
    "symmetry": "reversed",
    "synonymy": "in other words",
}


def before_and_after(lm: LM, case: Case, edit: Edit) -> pd.DataFrame:
    """Return one row per query of a case: its kind, prompt and answer, and what is most probable around the edit."""
    queries = [query for some in case.queries.values() for query in some]
    before = most_probable(lm, queries)
    with edited(lm, *edit.deltas):
        after = most_probable(lm, queries)
    return pd.DataFrame(
        {
            "asked": [KINDS[kind] for kind, some in case.queries.items() for _ in some],
            "prompt": [query.prompt for query in queries],
            "should say": [query.target for query in queries],
            "before": before,
            "after": after,
        }
    )


def edit_and_measure(
    lm: LM,
    cases: Sequence[Case],
    editor_names: Mapping[str, str],
    few: int | None = None,
    whole: Collection[str] = (),
) -> tuple[dict[str, list[Edit]], dict[str, pd.DataFrame]]:
    """Return the edits of each editor and their table of `criteria.measure`, by the editors' labels.

    `editor_names` maps labels to names of `editors.EDITORS`. Each writes the first `few` cases (None: all); those whose
    labels are in `whole` write all.
    """
    edits, tables = {}, {}
    for label, name in editor_names.items():
        some = cases if label in whole else cases[:few]
        requests = [case.request for case in some]
        edits[label] = editors.edit(lm, requests, name, progress=True, paraphrases=tasks.paraphrases)
        tables[label] = criteria.measure(lm, some, edits[label], progress=True)
    return edits, tables


def both(first: Sequence[Edit], second: Sequence[Edit]) -> list[Edit]:
    """Return the edits of weights that make the changes of two, request by request; failed where one of the two did."""
    return [
        Edit(one.deltas + two.deltas, failed=one.failed or two.failed) for one, two in zip(first, second, strict=True)
    ]


def statements(lm: LM, cases: Sequence[Case]) -> dict[str, list[Edit]]:
    """Return what is put before the questions of each case: its fact, and two controls of what in it is read.

    These give the same subject the new answer of the next case, or name subject and new answer in another sentence.
    """
    requests = [case.request for case in cases]
    foils = [request.foil for request in requests]
    others = [
        next(foil for foil in foils[i + 1 :] + foils[:i] if foil not in (request.foil, request.target))
        for i, request in enumerate(requests)
    ]
    elsewhere = [replace(request, foil=foil) for request, foil in zip(requests, others, strict=True)]
    named = [f"Anna visited {request.subject} in the winter and {request.foil} in the summer. " for request in requests]
    return {
        "the fact": editors.in_context(lm, requests),
        "another answer": editors.in_context(lm, elsewhere),
        "both names": [Edit(context=text) for text in named],
    }


def shares(
    tables: Mapping[str, pd.DataFrame], by: str = "says", few: int | None = None
) -> dict[str, dict[str, stats.Estimate]]:
    """Return the share of successes by criterion and by table, as `figures.grouped` takes them.

    `tables` are of `criteria.measure`; `few`: of each only the first cases count. `by` as in `criteria.success`.
    """
    rows: dict[str, dict[str, stats.Estimate]] = {}
    for label, table in tables.items():
        for row in criteria.summary(table if few is None else table[table["case"] < few], by).itertuples():
            if row.cases:
                estimate = stats.Estimate(row.after, row.low, row.high, row.cases)
                rows.setdefault(row.criterion.replace("_", " "), {})[label] = estimate
    return rows


def edit_table(tables: Mapping[str, pd.DataFrame], by: str = "margin") -> pd.DataFrame:
    """Return one row per table of `criteria.measure` and criterion: what is given and preferred, and the margins.

    Preferred is as in `criteria.success`, to the rival or by "best" to all that the prompt is asked for.
    """
    rows, column = [], "best of all asked, after" if by == "best" else "preferred, after"
    for label, table in tables.items():
        for given, preferred in zip(*(criteria.summary(table, way).itertuples() for way in ("says", by)), strict=True):
            rows.append(
                {
                    "editor": label,
                    "criterion": given.criterion.replace("_", " "),
                    "n": given.cases,
                    "failed": given.failed,
                    "given, before": f"{given.before:.2f}",
                    "after": f"{given.after:.2f} [{given.low:.2f}, {given.high:.2f}]",
                    column: f"{preferred.after:.2f}",
                    "margin, before": f"{given.margin_before:+.1f}",
                    "margin, after": f"{given.margin_after:+.1f}",
                }
            )
    return pd.DataFrame(rows)


def continuations(lm: LM, prompts: Sequence[str], edits: Mapping[str, Edit], length: int = 14) -> pd.DataFrame:
    """Return how the model goes on after each prompt under each edit, by its most probable tokens.

    Edits that failed are left out; a masked model goes on with no text, so that its table is empty.
    """
    rows = []
    for label, edit in edits.items():
        if not (lm.spec.masked or edit.failed):
            texts = criteria.generations(lm, prompts, [edit] * len(prompts), length, None)
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                shown = " ".join(text.split())
                rows.append({"editor": "" if i else label, "prompt": f"{prompt} …", "it goes on": shown})
    return pd.DataFrame(rows)


def fluency_changes(
    lm: LM, prompts: Sequence[str], edits: Mapping[str, Sequence[Edit]], length: int = 30, seed: int = 0
) -> dict[str, stats.Estimate]:
    """Return how the entropy of sampled text changes under each editor's first edits, one a prompt, in bits.

    Editors with a failed edit among them are left out, and all of them for a masked model. See `criteria.entropy`.
    """
    if lm.spec.masked:
        return {}
    first = {label: some[: len(prompts)] for label, some in edits.items()}

    def fluency(some: Sequence[Edit]) -> list[float]:
        return [criteria.entropy(text) for text in criteria.generations(lm, prompts, some, length, seed)]

    usual = fluency([Edit()] * len(prompts))
    return {
        label: stats.mean([after - before for after, before in zip(fluency(some), usual, strict=True)], seed=seed)
        for label, some in first.items()
        if not any(edit.failed for edit in some)
    }


def promoted(lm: LM, neuron: Neuron, k: int = 6) -> str:
    """Return the `k` words that the value vector of a neuron raises most; "" for a masked model.

    The head of a masked model is a network of its own, through which no vector can be read directly.
    """
    return "" if lm.spec.masked else ", ".join(neurons.promoted(lm, neuron, k))


def condition_scores(
    lm: LM, phenomena: Iterable[str], n: int, seed: int = 0, source: str = "own", **options
) -> dict[tuple[str, str], Float[Tensor, "query block neuron"]]:
    """Attribute the first `n` sentences of each condition that the model knows; return their scores by condition.

    `seed` and `source` as in `stimuli.known_pairs`, `options` as in `kncore.attribute`.
    """
    pairs = _pairs_of(lm, phenomena, n, seed, source)
    queries = [query for known in pairs.values() for query in known.queries]
    scores = attribute(lm, queries, **options).scores
    return dict(zip(pairs, scores.split([len(known.queries) for known in pairs.values()]), strict=True))


def grouped(
    table: pd.DataFrame, rows: str, columns: str, estimate: Callable[[pd.DataFrame], Estimate]
) -> dict[str, dict[str, Estimate]]:
    """Return the estimate of each part of a table, by its value in the column `rows` and its value in `columns`.

    Values come in the order of categories, else of the alphabet; what no row of the table has is left out.
    """
    return {
        row: {column: estimate(cell) for column, cell in part.groupby(columns, observed=True)}
        for row, part in table.groupby(rows, observed=True)
    }
