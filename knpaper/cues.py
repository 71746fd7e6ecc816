"""What the neurons of number respond to: how often words occur together, a rule, or the letter s.

Two experiments suppress the neurons of number. In the first a noun follows a determiner ("She liked these" and then
"books" or "book"), so that the loss can be compared with how often the two words occur together. In the second a noun
is the subject of a verb ("The books" and then "are" or "is"), so that it may have several tokens or be an invented one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from kncore import ablation, neurons, tokens
from kncore.ablation import Ablation, CapturedPrompts
from kncore.attribution import attribute
from kncore.models import LM
from kncore.neurons import Neuron
from kncore.query import MASK, Query
from knpaper import chapter, grammar, stats, stimuli, words
from knpaper.frequencies import Counts
from knpaper.stats import Estimate

OPENERS = ("She liked", "We needed", "They noticed", "He mentioned")
DETERMINERS = {"these": "this", "those": "that"}  # of the plural, and of the singular
VERBS = {"singular": ("is", "are"), "plural": ("are", "is")}  # the right one first
KINDS = ("regular", "regular, split", "irregular", "invented")  # split: of several tokens
MOST = 250  # nouns after determiners
PREDICTORS = ("association", "frequency", "irregular", "those")


def phenomena(source: str = "own") -> tuple[list[str], str]:
    """Return the phenomena in which a determiner decides on the number of a noun, and one of a subject and its verb."""
    known = stimuli.phenomena(source)
    subject = "subject_verb" if source == "own" else "regular_plural_subject_verb_agreement_1"
    return [name for name in known if name.startswith("determiner_noun")], subject


# --------------------------------------------------------------------------------------------------- nouns


def noun_table(counts: Counts) -> pd.DataFrame:
    """Return the nouns of the book with the `frequency` of their plural, one row a noun, named by the singular."""
    rows = [noun._asdict() | {"frequency": counts.frequency(noun.plural)} for noun in words.nouns()]
    return pd.DataFrame(rows).set_index("singular", drop=False)


def noun_kinds(nouns: pd.DataFrame) -> pd.DataFrame:
    """Return how many nouns of each kind there are, how frequent they are, and five examples."""
    rows = []
    for kind, part in nouns.groupby("kind", sort=False):
        low, high = 10 ** part.frequency.min(), 10 ** part.frequency.max()
        occurrences = "none" if part.frequency.isna().all() else f"{low:,.0f} to {high:,.0f}"
        examples = ", ".join(part.plural.iloc[:: len(part) // 5][:5])
        rows.append((kind, len(part), occurrences, examples))
    columns = ["nouns", "how many", "occurrences of the plural per billion words", "for example"]
    return pd.DataFrame(rows, columns=columns)


def slopes(table: pd.DataFrame, outcome: str, predictors: Sequence[str] = PREDICTORS) -> dict[str, Estimate]:
    """Return the slopes of an outcome on columns of a table, in its unit, with the nouns (`item`) as clusters.

    They are for a standard deviation of the predictor, or from 0 to 1 of one that has no other values. Rows without a
    value in one of the columns are left out.
    """
    table, columns = _columns(table, predictors)
    return stats.regression(table[outcome], dict(columns.items()), standardise=False, clusters=table["item"])


def _columns(table: pd.DataFrame, predictors: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows that have all predictors, and the predictors, z-scored where they are not 0 and 1 only."""
    table = table.dropna(subset=list(predictors))
    columns = table[list(predictors)].astype(float)
    graded = ~columns.isin((0, 1)).all()
    columns.loc[:, graded] = (columns - columns.mean()).loc[:, graded] / columns.std()[graded]
    return table, columns


def number_sets(
    scores: Mapping[tuple[str, str], Float[Tensor, "query block neuron"]], size: int = stimuli.TEMPLATES
) -> dict[tuple[str, str, int], list[Neuron]]:
    """Return the neurons of disjoint groups of `size` sentences of each condition, by phenomenon, number and group.

    `scores` are of `chapter.condition_scores`; sentences that do not fill a group are left out, unless they are all.
    """
    found = {}
    for (phenomenon, value), some in scores.items():
        groups = some.split(size)
        for i, group in enumerate(groups):
            if len(group) == size or len(groups) == 1:
                found[phenomenon, value, i] = chapter.refined(group)
    return found


# ---------------------------------------------------------------------------------------- after a determiner


def noun_query(lm: LM, noun: words.Noun, determiner: str, opener: str) -> Query:
    """Return the choice between the plural and the singular of a noun after a determiner of the plural.

    A masked model chooses the determiner before the plural instead.
    """
    names = {"item": noun.singular, "value": determiner}
    if lm.spec.masked:
        prompt = f"{opener} {MASK} {noun.plural}."
        return Query(prompt, determiner, subject=noun.plural, foil=DETERMINERS[determiner], **names)
    return Query(f"{opener} {determiner}", noun.plural, subject=determiner, foil=noun.singular, **names)


def losses_after_determiners(
    lm: LM,
    sets: Mapping[Hashable, Sequence[Neuron]],
    nouns: pd.DataFrame,
    counts: Counts,
    draws: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Suppress sets of neurons of the plural and return what each real noun loses after each determiner.

    One row a set (`set`, its place in `sets`), noun and determiner. `found` is the loss of log-odds under the set,
    `random` the mean under `draws` sets of neurons of the same blocks that are as active, and `beyond` the first minus
    the second; with `margin_before` means over the beginnings of the sentence, in nats. `association` is that of
    determiner and noun in bits, nan where the pair is not in the table. Nouns of which a form has several tokens are
    left out; where more than `MOST` are left, those in the table beside a determiner and some of the others are taken.
    """
    nouns = nouns[nouns.kind != "invented"]
    first = [noun_query(lm, noun, "these", OPENERS[0]) for noun in nouns.itertuples()]
    nouns = nouns[[_of_one_token(lm, query) for query in first]]
    nouns = _fewer(nouns, counts)
    frames = itertools.product(nouns.itertuples(), DETERMINERS, OPENERS)
    held = ablation.capture_prompts(lm, [noun_query(lm, *frame) for frame in frames])
    prompts = range(len(held.queries))
    # The prompts of one noun: to a causal model all nouns have the same ones.
    sizes = held.activations(range(len(OPENERS) * len(DETERMINERS))).abs().mean(0)
    parts = []
    for number, own in enumerate(sets.values()):
        some = [("found", own)] + [("random", drawn) for drawn in ablation.matched_controls(sizes, own, draws, seed)]
        edits = ablation.measure(held, [Ablation(i, each, 0.0, label) for label, each in some for i in prompts])
        keys = ["item", "value"]
        part = edits.groupby([*keys, "label"]).loss_margin.mean().unstack()
        part["margin_before"] = edits.groupby(keys).margin_before.mean()
        parts.append(part.reset_index().assign(set=number))
    lost = pd.concat(parts, ignore_index=True).eval("beyond = found - random")
    lost = lost.rename(columns={"value": "determiner"}).merge(nouns, left_on="item", right_index=True)
    associations = map(counts.association, lost.determiner, lost.plural)
    return lost.assign(
        association=pd.Series(associations, lost.index, dtype=float),
        irregular=(lost.kind == "irregular").astype(float),
        those=(lost.determiner == "those").astype(float),
    )


def _fewer(nouns: pd.DataFrame, counts: Counts) -> pd.DataFrame:
    """Return the nouns that tell of association, and every second, or third, … of the others: about `MOST` in all."""
    paired = [any(pd.notna(counts.association(each, plural)) for each in DETERMINERS) for plural in nouns.plural]
    others = np.cumsum(~np.array(paired, dtype=bool))
    step = max(1, -(-int(others[-1]) // max(1, MOST - sum(paired)))) if len(nouns) > MOST else 1
    return nouns[np.array(paired, dtype=bool) | (others % step == 0)]


def _of_one_token(lm: LM, query: Query) -> bool:
    return all(len(tokens.encode(lm, query, word).target) == 1 for word in (query.target, query.foil))


def association_slopes(lost: pd.DataFrame, seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """Return slopes of what is lost after determiners, each the mean over the sets of neurons, which are the units.

    The first row is what is lost beyond random neurons, the others are parts of it or have further predictors.
    """
    with_pairs = lost.assign(paired=lost.association.notna().astype(float))
    fits = {
        "found beyond random": (lost, "beyond", PREDICTORS),
        "found": (lost, "found", PREDICTORS),
        "random": (lost, "random", PREDICTORS),
        "beyond random, given the log-odds before": (lost, "beyond", [*PREDICTORS, "margin_before"]),
        "beyond random, all nouns: is the pair in the table?": (with_pairs, "beyond", ["paired", *PREDICTORS[1:]]),
    }
    return {label: _over_sets(*fit, seed) for label, fit in fits.items() if fit[0][fit[2][0]].nunique() > 1}


def _over_sets(table: pd.DataFrame, outcome: str, predictors: Sequence[str], seed: int) -> dict[str, Estimate]:
    each = pd.DataFrame([set_slopes(part, outcome, predictors) for _, part in table.groupby("set")])
    return {name: stats.mean(each[name], seed=seed) for name in predictors}


def set_slopes(table: pd.DataFrame, outcome: str, predictors: Sequence[str] = PREDICTORS) -> dict[str, float]:
    """Return the slopes of `slopes` without intervals."""
    table, columns = _columns(table, predictors)
    fit = np.linalg.lstsq(np.column_stack([np.ones(len(table)), columns]), table[outcome].to_numpy(), rcond=None)
    return dict(zip(predictors, fit[0][1:].tolist(), strict=True))


def relative_slope(lost: pd.DataFrame, seed: int = 0) -> Estimate:
    """Return the slope of what is lost beyond random neurons on association, as a share of its mean, over sets.

    0.1: a noun one standard deviation above the mean in association loses a tenth of the mean loss more. The interval
    is over sets of neurons, and the whole line where the mean loss beyond random neurons may be 0.
    """
    parts = [part for _, part in lost.dropna(subset="association").groupby("set")]
    steps = [set_slopes(part, "beyond")["association"] for part in parts]
    return stats.ratio(steps, [part.beyond.mean() for part in parts], seed=seed)


def set_table(sets: Mapping[tuple[str, str, int], Sequence[Neuron]], lost: pd.DataFrame) -> list[dict[str, object]]:
    """Return a row for each set of neurons: its neurons, the mean losses in nats, and the slope on association."""
    rows = []
    for ((phenomenon, _, group), own), (_, part) in zip(sets.items(), lost.groupby("set"), strict=True):
        slope = slopes(part, "beyond")["association"]
        rows.append(
            {
                "sentences": f"{chapter.spaced(phenomenon)}, group {group + 1}",
                "neurons": chapter.neuron_names(own),
                "mean loss": f"{part.found.mean():.2f}",
                "with random neurons": f"{part.random.mean():.2f}",
                "slope on association (interval over nouns)": with_interval(slope),
            }
        )
    return rows


def slope_table(fits: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, object]]:
    """Return the slopes of `association_slopes` with their intervals as the rows of a table."""
    titles = {"association": "association", "paired": "pair in table", "frequency": "frequency"}
    titles |= {"irregular": "irregular", "margin_before": "log-odds before"}
    return [
        {"loss under": label, "sets": next(iter(fit.values())).n}
        | {title: with_interval(fit[name]) if name in fit else "" for name, title in titles.items()}
        for label, fit in fits.items()
    ]


def with_interval(slope: Estimate) -> str:
    """Return a slope with its sign and its interval as text."""
    return f"{slope.value:+.2f} [{slope.low:.2f}, {slope.high:.2f}]"


# --------------------------------------------------------------------------------------------- as a subject


def subject_queries(lm: LM, nouns: pd.DataFrame) -> list[Query]:
    """Return the choice between *is* and *are* after a noun in both numbers; `Query.task` is its kind, of `KINDS`.

    All irregular and invented nouns are taken. Of the regular ones, in the order of frequency, it is every sixth of
    those whose plural is one token, and every third of the others.
    """
    regular = nouns[nouns.kind == "regular"].sort_values("frequency", kind="stable")
    split = regular.plural.map(lambda word: len(tokens.encode(lm, Query("the", word)).target)) > 1
    chosen = [regular[~split].iloc[::6], regular[split].iloc[::3].assign(kind="regular, split")]
    openers = grammar.lexicon()["subject"]["openers"]
    ending = f" {MASK} very old." if lm.spec.masked else ""
    queries = []
    for i, noun in enumerate(pd.concat([*chosen, nouns[nouns.kind != "regular"]]).itertuples()):
        for value, (right, wrong) in VERBS.items():
            form = getattr(noun, value)
            prompt = f"{openers[i % len(openers)]} {form}{ending}"
            queries.append(Query(prompt, right, form, wrong, item=noun.singular, value=value, task=noun.kind))
    return queries


def losses_after_subjects(
    held: CapturedPrompts, sets: Mapping[tuple[str, str, int], Sequence[Neuron]], draws: int, seed: int = 0
) -> pd.DataFrame:
    """Suppress sets of neurons of each number after subjects of that number; return `ablation.measure` of it.

    `label` is "found", or "random" for `draws` sets of neurons of the same blocks that are as active; `set` is a set's
    place in `sets`, of `number_sets`. `subjects` names kind and number, with the kinds of the singular before those of
    the plural.
    """
    parts = []
    for number, ((_, value, _), own) in enumerate(sets.items()):
        prompts = [i for i, query in enumerate(held.queries) if query.value == value]
        sizes = held.activations(prompts).abs().mean(0)
        some = [("found", own)] + [("random", drawn) for drawn in ablation.matched_controls(sizes, own, draws, seed)]
        table = ablation.measure(held, [Ablation(i, each, 0.0, label) for label, each in some for i in prompts])
        parts.append(table.assign(set=number))
    table = pd.concat(parts, ignore_index=True)
    order = [f"{kind}, {value}" for value in VERBS for kind in KINDS]
    return table.assign(subjects=pd.Categorical(table.task + ", " + table.value, order))


def beyond_random(table: pd.DataFrame) -> pd.Series:
    """Return what each noun loses under found neurons beyond random ones, in nats, by kind and noun.

    `table` is of `losses_after_subjects`; prompts whose verb was wrong before the edit are left out. Sets of neurons
    weigh alike, and so do the two numbers of a noun.
    """
    right = table[table.prefers_before]
    means = right.groupby(["task", "item", "value", "set", "label"]).loss_margin.mean().unstack()
    return (means.found - means.random).groupby(level=["task", "item", "value"]).mean().groupby(level=[0, 1]).mean()


def compared_kinds(kinds: Collection[str]) -> list[str]:
    """Return the real nouns that invented ones are compared with: those that are split, where there are any."""
    split = [kind for kind in kinds if kind == "regular, split"]
    return split or [kind for kind in kinds if kind != "invented"]


def invented_share(beyond: pd.Series, kinds: Sequence[str], seed: int = 0) -> Estimate:
    """Return what invented nouns lose beyond random neurons, relative to real nouns of some kinds, minus 1.

    −1 if they lose nothing, 0 if they lose as much. The interval is the whole line where real nouns may lose nothing
    beyond random neurons (their 95 % interval is not above 0): then nothing can be relative to it. n is the smaller
    group of nouns.
    """
    invented, real = beyond["invented"], beyond[list(kinds)]
    found = stats.relative_difference(invented, real, seed)
    if stats.mean(real, seed=seed).low > 0:
        return found
    return Estimate(found.value, -math.inf, math.inf, found.n, found.sample)


def separations(
    held: CapturedPrompts, sets: Mapping[str, Sequence[Neuron]], seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Return how often the plural noun of a pair excites a neuron more than the singular one, by neuron and kind."""
    rows: dict[tuple[str, str], list[int]] = {}
    for i, query in enumerate(held.queries):
        rows.setdefault((query.task, query.value), []).append(i)
    states = {condition: held.activations(some) for condition, some in rows.items()}

    def separation(kind: str, neuron: Neuron) -> Estimate:
        plural, singular = (states[kind, value][:, *neuron].tolist() for value in ("plural", "singular"))
        return stats.separation(plural, singular, seed)

    kinds = [kind for kind in KINDS if (kind, "plural") in states]
    return {
        f"{neuron[0]}·{neuron[1]} ({value})": {kind: separation(kind, neuron) for kind in kinds}
        for value, own in sets.items()
        for neuron in own
    }


def frequency_slopes(lost: pd.DataFrame, nouns: pd.DataFrame) -> dict[str, Estimate]:
    """Return the slopes of what is lost after real subjects, in nats, on their frequency, kind and number.

    What is the same for all of them is no predictor.
    """
    lost = lost[lost.task != "invented"].merge(nouns[["frequency"]], left_on="item", right_index=True)
    kinds = {"irregular": lost.task == "irregular", "split": lost.task == "regular, split"}
    flags = kinds | {"plural": lost.value == "plural"}
    lost = lost.assign(**{name: flag.astype(float) for name, flag in flags.items()})
    return slopes(lost, "loss_margin", [name for name in ("frequency", *flags) if lost[name].nunique() > 1])


# ------------------------------------------------------------------------------------- where neurons are active


def shared_fact_neurons(lm: LM, n: int, seed: int = 0, source: str = "own", k: int = 5, **options) -> dict[Neuron, int]:
    """Return the `k` neurons that are refined for the most facts, `n` known ones of each relation, and for how many.

    `options` as in `kncore.attribute`.
    """
    facts = [stimuli.known_facts(lm, relation, n, seed, source) for relation in stimuli.relations(source)]
    scores = attribute(lm, [query for some in facts for query in some.queries], **options).scores
    per_fact = scores.unflatten(0, (-1, stimuli.TEMPLATES))
    found = pd.Series([neuron for fact in per_fact for neuron in neurons.find_neurons(fact).neurons])
    return found.value_counts().head(k).to_dict()


def context_table(lm: LM, texts: Sequence[str], found_for: Mapping[Neuron, str], k: int = 4) -> list[dict[str, str]]:
    """Return rows that show for each neuron the `k` tokens at which it is most active, and the words that it raises."""
    contexts = neurons.contexts(lm, texts, list(found_for), k=k)
    return [
        {
            "neuron": f"{neuron.block}·{neuron.index}",
            "found for": purpose,
            "most active at": " · ".join(f"{c.before} [{c.token}] {c.activation:+.1f}" for c in contexts[neuron]),
            "its value vector raises": chapter.promoted(lm, neuron),
        }
        for neuron, purpose in found_for.items()
    ]
