"""What models learnt from the controlled corpus, where every count and every fact is known.

`lms` are the trained models of each architecture, one for each training seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from kncore import ablation, editors, finetune, neurons, zoo
from kncore.ablation import Ablation
from kncore.models import LM
from kncore.predictions import predict
from kncore.query import Query
from knpaper import cases, chapter, corpus, criteria, stats
from knpaper.cases import Case
from knpaper.stats import Estimate
from knpaper.tasks import Relation

SIBLING = {"this": "that", "that": "this", "these": "those", "those": "these"}  # the other demonstrative of the number
EDITORS = {
    "fine-tuning": lambda lm, requests: editors.fine_tuning(lm, requests, finetune.HParams(len(lm.blocks) // 2)),
    "ROME": editors.rome_edits,
}
GROUPS = {
    "capital": {"two_way": "both sides", "one_way": "one side"},
    "field": {"linked": "linked", "unlinked": "never linked"},
}
OLD_CRITERIA = {"reliability": "edited prompt", "generality": "its paraphrases", "locality": "neighbours keep theirs"}
CRITERIA = {
    "capital": {"before": "reversed, before", **OLD_CRITERIA, "symmetry": "reversed, after"},
    "field": {"before": "occupation inferred, before", **OLD_CRITERIA, "synonymy": "occupation, after"},
}

Lms = Mapping[str, Sequence[LM]]


def _each(lms: Lms) -> Iterator[tuple[LM, dict[str, str]]]:
    """Yield each model with its columns in a table: its architecture and its name."""
    for architecture, trained in lms.items():
        for lm in trained:
            yield lm, {"architecture": architecture, "model": lm.name}


def training_logs(lms: Lms) -> pd.DataFrame:
    """Return the loss of each model after each number of tokens, in millions, as it was logged in training."""
    paths = ((zoo.SHIPPED / lm.name / "training.tsv", columns) for lm, columns in _each(lms))
    return pd.concat(pd.read_csv(path, sep="\t").assign(**columns) for path, columns in paths).eval(
        "millions = tokens / 1e6"
    )


# ------------------------------------------------------------------------------------------- what a model knows


def questions(masked: bool) -> dict[str, list[Query]]:
    """Return what the models are asked before any edit: pairs and facts, by what the text said of them."""
    world, real = corpus.world(), [pair for pair in corpus.pairs() if pair.kind != "invented"]
    facts = {
        "capitals, one way": world.capital["one_way"],
        "capitals, two ways": world.capital["two_way"],
        "the same, reversed": world.country["two_way"],
        "fields, linked": world.field["linked"],
        "fields, never linked": world.field["unlinked"],
        "occupations, linked": world.occupation["linked"],
    }
    return {
        "agreement, pairs in the text": corpus.pair_queries([pair for pair in real if pair.count][::7], masked),
        "agreement, held-out pairs": corpus.pair_queries([pair for pair in real if pair.held_out][::2], masked),
        **{label: corpus.fact_queries(relation) for label, relation in facts.items()},
    }


def held_out_questions(masked: bool) -> dict[str, list[Query]]:
    """Return the pairs of real nouns that never occurred, by how often the form stood with the other demonstrative."""
    pairs = {(pair.determiner, pair.form): pair for pair in corpus.pairs() if pair.kind != "invented"}
    held_out = [pair for pair in pairs.values() if pair.held_out]
    bins = binned([pairs[SIBLING[pair.determiner], pair.form].count for pair in held_out], [0, 3, 10, 30, 100])
    return {
        label: corpus.pair_queries([pair for pair, own in zip(held_out, bins, strict=True) if own == label], masked)
        for label in bins.categories
    }


def binned(counts: Sequence[int], highest: Sequence[int]) -> pd.Categorical:
    """Return the bin of each count, named by its limits; `highest` are the upper limits of the bins.

    >>> list(binned([0, 1, 3, 2], [0, 1, 4]))
    ['never', 'once', '2–4 times', '2–4 times']
    """
    limits = [(low + 1, high) for low, high in zip([-1, *highest], highest, strict=False)]
    names = {(0, 0): "never", (1, 1): "once"}
    labels = [names.get((low, high), f"{low}–{high} times") for low, high in limits]
    return pd.cut(np.asarray(counts), [-1, *highest], labels=labels)


def answers(lms: Lms, questions_of: Callable[[bool], Mapping[str, Sequence[Query]]]) -> pd.DataFrame:
    """Return the answers to questions: one row a model and query, with `success` if the model prefers the target.

    `questions_of` gives the queries by label (the column `question`) for masked models, and for causal ones.
    """
    parts = []
    for lm, columns in _each(lms):
        for label, queries in questions_of(lm.spec.masked).items():
            if queries:
                found = predict(lm, queries).rename(columns={"prefers": "success"})[["item", "success"]]
                parts.append(found.assign(question=label, **columns))
    table = pd.concat(parts, ignore_index=True)
    return _ordered(table, question=list(questions_of(False)), architecture=list(lms))


def success_share(table: pd.DataFrame) -> Estimate | None:
    """Return the share of successes of items, those of all training seeds together; None where nothing can be told."""
    judged = table[table.success.notna()]
    return stats.share(judged.success.astype(bool), judged["item"]) if len(judged) else None


def _ordered(table: pd.DataFrame, **orders: Sequence[str]) -> pd.DataFrame:
    """Make columns categorical, so that groups come in the order that is given."""
    return table.astype({column: pd.CategoricalDtype(order) for column, order in orders.items()})


# ------------------------------------------------------------------------------------------- neurons of number


def losses(lms: Lms, every: int = 1, seed: int = 0) -> pd.DataFrame:
    """Suppress each model's neurons of number and return the losses of one in `every` designed pairs.

    One row a model and pair: `ablation.measure`, what the corpus has of the pair, the `bin` of its count, and `other`,
    the logarithm (base 2) of one more than the other occurrences of the form. Where the search ends without a neuron,
    the three with the highest mean score are taken.
    """
    pairs = corpus.pairs()[::every]
    table = pd.concat(_losses(lm, pairs, seed).assign(**columns) for lm, columns in _each(lms))
    bins = binned(table["count"], [0, 1, 4, 12, 35, 100])
    table["bin"] = np.where(table.kind == "invented", "never, invented noun", bins.astype(str))
    return _ordered(table, bin=[*bins.categories, "never, invented noun"], architecture=list(lms))


def _losses(lm: LM, pairs: Sequence[corpus.Pair], seed: int) -> pd.DataFrame:
    held = ablation.capture_prompts(lm, corpus.pair_queries(pairs, lm.spec.masked))
    ablations = []
    for (_, number), scores in chapter.condition_scores(lm, ["determiner_noun"], 15, seed).items():
        own = neurons.find_neurons(scores).neurons or [neuron for neuron, _ in neurons.top(scores.mean(0), 3)]
        ablations += [Ablation(i, own, 0.0, number) for i, pair in enumerate(pairs) if pair.number == number]
    table = ablation.measure(held, ablations).set_index("prompt").sort_index()
    unigrams = corpus.counts().unigrams
    others = [unigrams.get(pair.form.lower(), 0) - pair.count for pair in pairs]
    both = table.merge(pd.DataFrame(pairs), left_index=True, right_index=True, suffixes=("", "_of"))
    return both.assign(other=np.log2(1 + np.array(others)))


def count_slopes(table: pd.DataFrame, outcome: str = "loss_margin") -> dict[str, Estimate]:
    """Return by how much an outcome of `losses` rises for each doubling of the `count`, and of `other` occurrences.

    Only pairs that did occur, with nouns as clusters.
    """
    seen = table[table["count"] > 0]
    predictors = {"count": np.log2(seen["count"]), "other": seen.other}
    return stats.regression(seen[outcome], predictors, standardise=False, clusters=seen.singular)


def count_shares(table: pd.DataFrame) -> tuple[Estimate, Estimate] | None:
    """Return the rise of the loss per doubling of the `count`, and by how much more the log-odds before the edit rise.

    Each as a share of its own mean, of pairs that did occur; the second is 0 if the edit takes the same share of the
    log-odds from rare and frequent pairs. Intervals take the means as given. None where the mean loss is below
    `LEAST_LOSS`: what takes nothing follows nothing.
    """
    seen = table[table["count"] > 0]
    if seen.loss_margin.mean() < LEAST_LOSS:
        return None
    loss = table.loss_margin / seen.loss_margin.mean()
    before = table.margin_before / seen.margin_before.mean()
    parts = table.assign(loss_share=loss, spared=before - loss)
    return count_slopes(parts, "loss_share")["count"], count_slopes(parts, "spared")["count"]


def reach(table: pd.DataFrame, seed: int = 0) -> Estimate:
    """Return the mean loss of held-out pairs minus half that of pairs that occurred, of real nouns that have both.

    In nats. Where pairs that occurred lose nothing (their mean loss is not above 0), half of it counts as nothing.
    """
    real = table[table.kind != "invented"]
    means = real.groupby(["singular", "held_out"]).loss_margin.mean().unstack().dropna()
    half = means[False] / 2 if means[False].mean() > 0 else 0.0
    return stats.mean(means[True] - half, seed=seed)


# ---------------------------------------------------------------------------------------------------- edits


def requests(relation: str, group: str, n: int, seed: int = 0) -> list[Case]:
    """Return `n` requests to rewrite invented facts of a group: the capital of a country, or the field of a worker."""
    world = corpus.world()
    if relation == "capital":
        return cases.bijective(world.capital[group], n, seed, inverse=world.country[group])
    field = world.field[group]
    names = {name for _, name in field.pairs}
    called = {name: (occupation,) for name, occupation in world.called.items() if name in names}
    return cases.synonymy(n, seed, known=field, called=called)


def implied(relation: str) -> dict[str, Relation]:
    """Return what follows from the facts of each group: the country of a capital, or the occupation in a field."""
    world = corpus.world()
    if relation == "capital":
        return {group: world.country[group] for group in GROUPS["capital"]}
    return {"linked": world.occupation["apart"], "unlinked": world.occupation["unlinked"]}


def rewritten(lms: Lms, relation: str, n: int, seed: int = 0) -> pd.DataFrame:
    """Rewrite `n` facts of each group of a relation ("capital" or "field") and return what every model then says.

    One row a model, editor (of `EDITORS`), request and query: `criteria.measure`, see `judged`, and `question`, the
    group and the criterion as figures name them. Rows with the criterion "before" and no editor are the answers about
    what the facts imply, before any edit.
    """
    implied_questions = {group: corpus.fact_queries(facts) for group, facts in implied(relation).items()}
    before = answers(lms, lambda masked: implied_questions).rename(columns={"question": "group"})
    before = before.astype({"group": str, "architecture": str, "success": "boolean"})
    parts = [before.assign(criterion="before", editor="", took=False)]
    for lm, columns in _each(lms):
        for group in GROUPS[relation]:
            some = requests(relation, group, n, seed)
            for editor, edit in EDITORS.items():
                found = criteria.measure(lm, some, edit(lm, [case.request for case in some]))
                parts.append(judged(found).assign(**columns, group=group, editor=editor))
    table = pd.concat(parts, ignore_index=True)
    table["question"] = table.group.map(GROUPS[relation]) + ": " + table.criterion.map(CRITERIA[relation])
    order = [f"{group}: {label}" for group in GROUPS[relation].values() for label in CRITERIA[relation].values()]
    return _ordered(table, question=order, architecture=list(lms))


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """Add to a table of `criteria.measure` the `success` of each row, and whether the edit of its item `took`.

    It took if the model gives the new answer to every edited prompt.
    """
    success = criteria.success(table)
    reliable = success.where(table.criterion == "reliability")
    return table.assign(success=success, took=reliable.groupby(table["item"]).transform("all"))


def edit_table(tables: Mapping[str, pd.DataFrame], editor: str) -> list[dict[str, str]]:
    """Return the shares of success of an editor as rows, one a model and group; `tables` of `rewritten` by group."""
    rows = []
    for model in dict.fromkeys(name for table in tables.values() for name in table.model):
        for group, table in tables.items():
            part = table[(table.model == model) & (table.group == group) & (table.editor == editor)]
            shares = {criterion: success_share(part[part.criterion == criterion]) for criterion in OLD_CRITERIA}
            follows = success_share(part[part.took & part.criterion.isin(("symmetry", "synonymy"))])
            labels = ["edited prompt", "its paraphrases", "neighbours", "follows, where it took"]
            values = [str(share or "–") for share in (*shares.values(), follows)]
            rows.append({"model": model, "group": group.replace("_", " "), **dict(zip(labels, values, strict=True))})
    return rows


# -------------------------------------------------------------------------------------------- over training seeds

_REVERSE = "group == 'two_way' and criterion == 'symmetry'"
_SYNONYM = "group == 'linked' and criterion == 'synonymy'"
ROWS = {  # of `rewritten`, by claim: the relation, and which rows
    "reverse-inferred": ("capital", "group == 'one_way' and criterion == 'before'"),
    "two-way-symmetry-follows": ("capital", f"{_REVERSE} and editor == 'fine-tuning'"),
    "two-way-symmetry-rome": ("capital", f"{_REVERSE} and editor == 'ROME' and took"),
    "synonym-inferred": ("field", "group == 'linked' and criterion == 'before'"),
    "linked-synonymy-follows": ("field", f"{_SYNONYM} and editor == 'fine-tuning'"),
    "linked-synonymy-rome": ("field", f"{_SYNONYM} and editor == 'ROME' and took"),
}
LEAST_LOSS = 0.1  # nats, the mean over pairs: a smaller one has no share that could be told
LEAST = 5  # edits that took: of fewer, what follows from them says nothing about a model


def claim_values(
    lost: pd.DataFrame, edits: Mapping[str, pd.DataFrame], seed: int = 0, model: str = ""
) -> dict[str, Estimate | None]:
    """Return what each claim of chapter 9 measures, with its interval over items, of a `model` or of all together.

    `lost` is of `losses` and `edits` are of `rewritten`, by relation. None where too few edits took, and where
    suppression takes too little to follow anything.
    """
    if model:
        lost = lost[lost.model == model]
        edits = {relation: table[table.model == model] for relation, table in edits.items()}
    shares = {claim: success_share(edits[relation].query(rows)) for claim, (relation, rows) in ROWS.items()}
    moves, survives = count_shares(lost) or (None, None)
    return {
        "count-is-learnt": count_slopes(lost, "margin_before")["count"],
        "count-moves": moves,
        "count-survives": survives,
        "rule-reaches": reach(lost, seed),
        **{claim: share if share and share.n >= LEAST else None for claim, share in shares.items()},
    }


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean over training seeds with Student's interval; of fewer than two the interval is endless."""
    if len(values) > 1:
        return stats.runs(values)
    return Estimate(values[0] if values else 0.0, -math.inf, math.inf, len(values))
