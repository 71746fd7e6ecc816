"""What the neurons of number respond to: how often words occur together, a rule, or the letter s.

Two experiments suppress the neurons of number. In the first a noun follows a determiner ("She liked these" and then
"books" or "book"), so that the loss can be compared with how often the two words occur together. In the second a noun
is the subject of a verb ("The books" and then "are" or "is"), so that it may have several tokens or be an invented one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

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
PREDICTORS = ("association", "frequency", "irregular", "those")


def phenomena(source: str = "own") -> tuple[str, str]:
    """Return the phenomena in which a determiner decides on the number of a noun, and a subject on that of a verb."""
    if source == "own":
        return "determiner_noun", "subject_verb"
    return "determiner_noun_agreement_1", "regular_plural_subject_verb_agreement_1"


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


def slopes(table: pd.DataFrame, predictors: Sequence[str] = PREDICTORS) -> dict[str, Estimate]:
    """Return the slopes of `loss_margin` on columns of a table, standardised, with the nouns (`item`) as clusters.

    Rows without a value in one of the columns are left out.
    """
    table = table.dropna(subset=list(predictors))
    return stats.regression(table.loss_margin, {name: table[name] for name in predictors}, clusters=table["item"])


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
    lm: LM, own: Sequence[Neuron], nouns: pd.DataFrame, counts: Counts, draws: int, seed: int = 0
) -> pd.DataFrame:
    """Suppress the neurons of the plural, `own`, and return what each real noun loses after each determiner.

    `label` is the set that is suppressed: "own", "without block 0" (if one of them is above it) or "random" (the mean
    over `draws` sets of neurons that are as active). `loss_margin` and `margin_before` are means over the beginnings of
    the sentence, in nats; `association` is that of determiner and noun in bits, nan where the pair is not in the table.
    Nouns of which a form has several tokens are left out.
    """
    nouns = nouns[nouns.kind != "invented"]
    first = [noun_query(lm, noun, "these", OPENERS[0]) for noun in nouns.itertuples()]
    nouns = nouns[[_of_one_token(lm, query) for query in first]]
    frames = itertools.product(nouns.itertuples(), DETERMINERS, OPENERS)
    queries = [noun_query(lm, noun, determiner, opener) for noun, determiner, opener in frames]
    held = ablation.capture_prompts(lm, queries)
    # The prompts of one noun: to a causal model all nouns have the same ones.
    sizes = held.activations(range(len(OPENERS) * len(DETERMINERS))).abs().mean(0)
    sets = [("own", own)]
    if upper := [neuron for neuron in own if neuron[0] > 0]:
        sets.append(("without block 0", upper))
    sets += [("random", drawn) for drawn in ablation.matched_controls(sizes, own, draws, seed)]
    edits = ablation.measure(held, [Ablation(i, some, 0.0, label) for label, some in sets for i in range(len(queries))])
    lost = edits.groupby(["label", "item", "value"], as_index=False)[["loss_margin", "margin_before"]].mean()
    lost = lost.rename(columns={"value": "determiner"}).merge(nouns, left_on="item", right_index=True)
    associations = map(counts.association, lost.determiner, lost.plural)
    return lost.assign(
        association=pd.Series(associations, lost.index, dtype=float),
        irregular=(lost.kind == "irregular").astype(float),
        those=(lost.determiner == "those").astype(float),
    )


def _of_one_token(lm: LM, query: Query) -> bool:
    return all(len(tokens.encode(lm, query, word).target) == 1 for word in (query.target, query.foil))


def association_slopes(lost: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """Return the slopes of what is lost after determiners, for each set of neurons and for further predictors."""
    own, upper = lost[lost.label == "own"], lost[lost.label == "without block 0"]
    paired = own.assign(paired=own.association.notna().astype(float))
    fits = {
        "own neurons": slopes(own),
        "own, given the log-odds before": slopes(own, [*PREDICTORS, "margin_before"]),
        "random neurons": slopes(lost[lost.label == "random"]),
        "own, all nouns: is the pair in the table?": slopes(paired, ["paired", *PREDICTORS[1:]]),
    }
    return fits | ({"own, without block 0": slopes(upper)} if len(upper) else {})


def slope_table(fits: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, object]]:
    """Return the slopes of `association_slopes` with their intervals as the rows of a table."""
    titles = {"association": "association", "paired": "pair in table", "frequency": "frequency"}
    titles |= {"irregular": "irregular", "margin_before": "log-odds before"}
    return [
        {"loss under": label, "n": next(iter(fit.values())).n}
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
    held: CapturedPrompts, sets: Mapping[str, Sequence[Neuron]], draws: int, seed: int = 0
) -> pd.DataFrame:
    """Suppress the neurons of each number after subjects of that number; return `ablation.measure` of it.

    `label` is "own", or "random" for `draws` sets of neurons of the same blocks that are as active. `subjects` names
    kind and number, with the kinds of the singular before those of the plural.
    """
    ablations = []
    for value, own in sets.items():
        prompts = [i for i, query in enumerate(held.queries) if query.value == value]
        sizes = held.activations(prompts).abs().mean(0)
        drawn = [("random", some) for some in ablation.matched_controls(sizes, own, draws, seed)]
        ablations += [Ablation(i, some, 0.0, label) for label, some in [("own", own), *drawn] for i in prompts]
    table = ablation.measure(held, ablations)
    order = [f"{kind}, {value}" for value in VERBS for kind in KINDS]
    return table.assign(subjects=pd.Categorical(table.task + ", " + table.value, order))


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
    """Return the slopes of what is lost after real subjects on their frequency, kind and number.

    What is the same for all of them is no predictor.
    """
    lost = lost[lost.task != "invented"].merge(nouns[["frequency"]], left_on="item", right_index=True)
    kinds = {"irregular": lost.task == "irregular", "split": lost.task == "regular, split"}
    flags = kinds | {"plural": lost.value == "plural"}
    lost = lost.assign(**{name: flag.astype(float) for name, flag in flags.items()})
    return slopes(lost, [name for name in ("frequency", *flags) if lost[name].nunique() > 1])


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
