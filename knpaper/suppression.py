"""Neurons of facts and of agreement suppressed, beside other sets of neurons and on other prompts (chapter 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from kncore import ablation, predictions, prose, tokens
from kncore.ablation import Ablation, CapturedPrompts
from kncore.interventions import suppress
from kncore.models import LM
from kncore.neurons import Neuron
from kncore.query import Query
from knpaper import chapter, stats
from knpaper.groups import Condition, Group, join, mates
from knpaper.stats import Estimate
from knpaper.stimuli import TEMPLATES, Selection
from knpaper.words import next_words

OWN, UPPER, ANOTHER = "its own", "its own, without block 0", "another fact's"
ACTIVE, RANDOM = "the most active", "random"
UNSPECIFIC = "unspecific damage of the same size"
SUREST = 1e-6  # the least probability of all other words together
DAMAGE = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 120, 200)  # active neurons, of which the number is matched to a loss


def examples(
    held: CapturedPrompts, facts: Sequence[Group], conditions: Mapping[Condition, Group]
) -> list[dict[str, str]]:
    """Return what one fact and one sentence would say next, before and after their neurons are suppressed.

    The fact is the first whose answer is the most probable word of all, the sentence that with the surest right word.
    """
    said = (held.predicted == held.words[:, 0]).tolist()
    fact, first = next(((fact, p) for fact in facts for p in fact.right if said[p]), (facts[0], facts[0].prompts[0]))
    tested = [(condition, p) for condition in conditions.values() for p in condition.prompts]
    condition, second = max(tested, key=lambda pair: float(held.logp[pair[1], 0]))
    rows = []
    for group, p in ((fact, first), (condition, second)):
        rows.append({"prompt": held.queries[p].prompt, "": "before"} | _next_words(held.lm, held.queries[p]))
        with suppress(held.lm, group.neurons):
            rows.append({"prompt": "", "": "after"} | _next_words(held.lm, held.queries[p]))
    return rows


def _next_words(lm: LM, query: Query) -> dict[str, str]:
    (logp,) = predictions.log_probabilities(lm, [query])
    both = [word for word in (query.target, query.foil) if word]
    shown = [f"{word} {logp[tokens.encode(lm, query, word).target[0]].exp():.3f}" for word in both]
    return {"most probable next": chapter.most_probable(lm, [query], 5)[0], "right, wrong": ", ".join(shown)}


# ------------------------------------------------------------------------------------------ other sets of neurons


def compare(
    held: CapturedPrompts, groups: Iterable[Group], draws: int, seed: int = 0, neighbours: bool = False
) -> pd.DataFrame:
    """Measure each group's prompts under its own neurons and under other sets of as many neurons.

    The sets, by label: `OWN`; `UPPER`, the own ones above block 0, where there are any; `ACTIVE`; `RANDOM`, `draws`
    sets of neurons of the same blocks that are as active; with `neighbours`, `ANOTHER`: those ranked first for another
    fact of the relation. Returns the table of `ablation.measure`.
    """
    groups, ablations = list(groups), []
    for i, group in enumerate(groups):
        upper = [neuron for neuron in group.neurons if neuron.block > 0]
        sets = [(OWN, group.neurons)]
        if neighbours:
            others = mates(groups, i)
            sets.append((ANOTHER, groups[others[i % len(others)]].ranked(len(group.neurons))))
        sets.append((ACTIVE, ablation.most_active(group.sizes, len(group.neurons))))
        sets += [(RANDOM, drawn) for drawn in group.alike(draws, seed + i)]
        sets += [(UPPER, upper)] if upper else []
        ablations += [Ablation(p, chosen, 0.0, label) for p in group.prompts for label, chosen in sets]
    return ablation.measure(held, ablations)


def match(groups: Sequence[Group], draws: int, seed: int = 0) -> Estimate:
    """Return how many times as active the random neurons of `compare` are as those that they stand in for."""

    def activity(group: Group, some: Sequence[tuple[int, int]]) -> float:
        return float(np.mean([group.sizes[block, index] for block, index in some]))

    theirs = [activity(group, sum(group.alike(draws, seed + i), [])) for i, group in enumerate(groups)]
    return stats.ratio(theirs, [activity(group, group.neurons) for group in groups], seed=seed)


def own_edits(edits: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `compare` under a group's own neurons, by prompt."""
    return edits[edits.label == OWN].set_index("prompt")


def beyond_random(edits: pd.DataFrame, column: str) -> pd.Series:
    """Return by prompt what a column of `compare` is under a group's own neurons, minus its mean under random ones."""
    return own_edits(edits)[column] - edits[edits.label == RANDOM].groupby("prompt")[column].mean()


def by_condition(values: pd.Series, edits: pd.DataFrame, seed: int = 0) -> Estimate:
    """Return the mean over conditions (a task with a value), each of which has one set of neurons and counts once."""
    return stats.mean(values, edits.task + ", " + edits.value, seed)


def stays(edits: pd.DataFrame, what: str = "prefers") -> Estimate:
    """Return the share of what was right before and still is, by item; `what` is a column of `ablation.measure`.

    Where nothing was right before, nothing is known of what stays: Wilson's interval without trials.
    """
    right = edits[edits[f"{what}_before"]]
    return stats.share(right[f"{what}_after"], right.item) if len(right) else Estimate(0.5, 0.0, 1.0, 0)


def by_relation(
    edits: pd.DataFrame, estimates: Mapping[str, Callable[[pd.DataFrame], Estimate]]
) -> dict[str, dict[str, Estimate]]:
    """Return named estimates of all rows, and of those of each relation, as `figures.grouped` takes them."""
    parts = {"all facts": edits} | {chapter.spaced(task): part for task, part in edits.groupby("task", sort=False)}
    return {name: {label: estimate(part) for label, estimate in estimates.items()} for name, part in parts.items()}


def unspecific(held: CapturedPrompts, facts: Sequence[Group], own: pd.DataFrame) -> pd.DataFrame:
    """Measure each fact's prompts under unspecific damage that costs its answer as much as its own neurons do.

    The damage is the most active neurons above block 0 (a model has two blocks at least); of `DAMAGE` the number is
    taken whose mean loss over the fact's prompts is nearest to that in `own`, the table of `own_edits`. Returns the
    rows of `ablation.measure`, by prompt.
    """
    ablations, doses = [], []
    for fact in facts:
        order = ablation.most_active(fact.sizes[1:], DAMAGE[-1])
        order = [(block + 1, index) for block, index in order]
        for p in fact.prompts:
            doses += [dose for dose in DAMAGE if dose <= len(order)]
            ablations += [Ablation(p, order[:dose], 0.0, UNSPECIFIC) for dose in DAMAGE if dose <= len(order)]
    table = ablation.measure(held, ablations).assign(dose=doses)
    gap = table.groupby(["item", "dose"]).loss.mean()
    gap = (gap - own.groupby("item").loss.mean().reindex(gap.index.get_level_values("item")).to_numpy()).abs()
    nearest = gap.groupby("item").idxmin()
    return table[pd.MultiIndex.from_frame(table[["item", "dose"]]).isin(nearest)].set_index("prompt")


def enhanced(held: CapturedPrompts, facts: Sequence[Group], factor: float = 2.0) -> pd.DataFrame:
    """Measure each fact's prompts with its own neurons enhanced (`OWN`), and with as many of another fact's."""
    ablations = []
    for i, fact in enumerate(facts):
        others = mates(facts, i)
        another = facts[others[i % len(others)]].ranked(len(fact.neurons))
        ablations += [Ablation(p, fact.neurons, factor, OWN) for p in fact.prompts]
        ablations += [Ablation(p, another, factor, ANOTHER) for p in fact.prompts]
    return ablation.measure(held, ablations)


def odds_gains(edits: pd.DataFrame) -> pd.Series:
    """Return by row of `ablation.measure` the gain of the answer's log-odds in nats, after minus before.

    Unlike log P, log-odds have no ceiling. An answer counts as no surer than 1 − 10⁻⁶, about which rounding decides.
    """

    def odds(when: str) -> pd.Series:
        logp = edits[f"logp_{when}"].clip(upper=np.log1p(-SUREST))
        return logp - np.log(-np.expm1(logp))

    return odds("after") - odds("before")


# ----------------------------------------------------------------------------------------------------- other prompts


def with_first_tokens(lm: LM, relations: Mapping[str, Selection], facts: Sequence[Group]) -> pd.DataFrame:
    """Measure each fact's prompts under its own neurons where all answers of the relation compete, whole or not."""
    queries = [query for selection in relations.values() for query in selection.queries]
    answers = [list(selection.candidates) for selection in relations.values() for _ in selection.queries]
    ablations = [Ablation(p, fact.neurons) for fact in facts for p in fact.prompts]
    return ablation.measure(ablation.capture_prompts(lm, queries, answers), ablations)


def on_unseen_templates(held: CapturedPrompts, facts: Sequence[Group], searched: int = 3) -> pd.DataFrame:
    """Measure the neurons found in the first `searched` templates of each fact on the prompts of its other ones."""
    ablations = []
    for fact in facts:
        found = chapter.refined(fact.scores[:searched])
        ablations += [Ablation(p, found) for p in fact.prompts[searched:]]
    return ablation.measure(held, ablations)


def on_neighbours(held: CapturedPrompts, facts: Sequence[Group]) -> pd.DataFrame:
    """Measure every fact's neurons on its neighbours' prompts, one template of each; `label` is the neurons' fact."""
    ablations = [
        Ablation(facts[j].prompts[(i + j) % TEMPLATES], fact.neurons, 0.0, fact.name)
        for i, fact in enumerate(facts)
        for j in mates(facts, i)
    ]
    return ablation.measure(held, ablations)


def everything(
    held: CapturedPrompts,
    facts: Sequence[Group],
    conditions: Mapping[Condition, Group],
    rng: np.random.Generator,
    seed: int = 0,
    count: int = 24,
) -> pd.DataFrame:
    """Measure the neurons of every relation and phenomenon (`row`) on `count` prompts of each (`column`) and of texts.

    The prompts of texts are cut before a word drawn from `seed`. Neurons are drawn anew for each prompt: on the
    diagonal those of another fact of the relation, or of the prompt's own condition. `neurons of` and `prompts of` say
    in words of what kind a row and its column are.
    """
    groups, relations = [*facts, *conditions.values()], {fact.task for fact in facts}
    texts = range(len(held.queries), len(held.queries) + count)
    held = join([held, ablation.capture_prompts(held.lm, next_words(count, seed))])
    names = list(dict.fromkeys(group.task for group in groups))
    columns = {name: [p for group in groups if group.task == name for p in group.prompts] for name in names}
    columns["text"] = list(texts)
    ablations, places = [], []
    for row in names:
        for column, prompts in columns.items():
            for p in rng.permutation(prompts)[:count].tolist():
                query, members = held.queries[p], [group for group in groups if group.task == row]
                same = [group for group in members if row == column and group.name == query.value]
                taken = (query.item, query.value if row == column else None)
                free = same or [group for group in members if group.name not in taken]
                ablations.append(Ablation(p, free[rng.integers(len(free))].neurons))
                places.append((row, column, *_kinds(row, column, relations)))
    table = ablation.measure(held, ablations)
    table[["row", "column", "neurons of", "prompts of"]] = places
    return table


def _kinds(row: str, column: str, relations: set[str]) -> tuple[str, str]:
    of = "facts" if row in relations else "agreement"
    if column == "text":
        return of, "plain text"
    if column == row:
        return of, "other facts of the relation" if of == "facts" else "the same condition"
    if (column in relations) == (row in relations):
        return of, "other relations" if of == "facts" else "other phenomena"
    return of, "agreement" if of == "facts" else "facts"


def shared_neurons(groups: Sequence[Group], most: int = 3) -> list[Neuron]:
    """Return the neurons that the most groups have, those of the first group first where as many have them."""
    return pd.Series([neuron for group in groups for neuron in group.neurons]).value_counts().head(most).index.tolist()


def perplexities(lm: LM, sets: Mapping[str, Sequence[Neuron]], seed: int = 0, count: int = 16) -> list[dict[str, str]]:
    """Return the perplexity of `count` passages with no neurons and with each set suppressed everywhere, a row each."""
    texts = prose.passages()[:count]
    base = predictions.text_loss(lm, texts)
    rows = [("none", base, "")]
    for name, chosen in sets.items():
        with suppress(lm, chosen, position="all"):
            loss = predictions.text_loss(lm, texts)
        label = f"{chapter.spaced(name)}: {chapter.neuron_names(chosen)}"
        rows.append((label, loss, str(stats.mean(loss - base, seed=seed))))
    columns = ["neurons suppressed everywhere", "perplexity", "loss per token, nats [95 %]"]
    return [dict(zip(columns, (label, f"{loss.mean().exp():.1f}", added), strict=True)) for label, loss, added in rows]


def title(condition: Group) -> str:
    """Return what the neurons of a condition are called above a panel."""
    return f"neurons of {chapter.spaced(condition.task)}, {condition.name}: {chapter.neuron_names(condition.neurons)}"


def word_changes(
    held: CapturedPrompts,
    condition: Group,
    number_words: Mapping[str, Sequence[str]],
    others: Mapping[str, Sequence[Sequence[tuple[int, int]]]],
    seed: int = 0,
) -> tuple[dict[str, dict[str, tuple[Estimate, bool]]], dict[str, dict[str, float]]]:
    """Return how the mean probability of words changes on a condition's sentences when neurons are suppressed.

    First under the condition's own neurons, for each group of `number_words`: the change as in `stats.relative_change`
    over lemmas, and whether p of Wilcoxon's signed-rank test is below 0.05 after Holm's correction over all words. Then
    under `others`, by label: of several sets the mean of the probabilities counts.
    """
    lm, queries = held.lm, [held.queries[p] for p in condition.prompts]
    words = [word for group in number_words.values() for word in group]
    ids = [tokens.encode(lm, queries[0], word).target[0] for word in words]
    items = [query.item for query in queries]

    def probabilities() -> Float[np.ndarray, "query word"]:
        return predictions.log_probabilities(lm, queries).exp().double()[:, ids].numpy()

    def after(sets: Sequence[Sequence[tuple[int, int]]]) -> Float[np.ndarray, "query word"]:
        found = []
        for chosen in sets:
            with suppress(lm, chosen):
                found.append(probabilities())
        return np.mean(found, axis=0)

    def changes(edited: Float[np.ndarray, "query word"]) -> dict[str, Estimate]:
        pairs = zip(words, before.T, edited.T, strict=True)
        return {word: stats.relative_change(b, a, items, seed) for word, b, a in pairs}

    before, own = probabilities(), after([condition.neurons])
    tests = [stats.paired(np.log(b), np.log(a), items, seed) for b, a in zip(before.T, own.T, strict=True)]
    p_values = dict(zip(words, stats.holm([test.p_wilcoxon for test in tests]), strict=True))
    own_changes = changes(own)
    shown = {
        name: {word: (own_changes[word], p_values[word] < 0.05) for word in group}
        for name, group in number_words.items()
    }
    values = {label: changes(after(sets)) for label, sets in others.items()}
    return shown, {label: {word: change.value for word, change in some.items()} for label, some in values.items()}
