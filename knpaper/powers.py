"""What each rule of the book does with planted knowledge neurons: its power, and its false alarms.

    python -m knpaper.powers --out results/planted.tsv

plants the same facts into the controlled models, in several shares, and applies the rules. It is resumable: what is in
the table, from this code, is not made anew. One row for each model, share and measure; `units` are the values of the
single facts, or groups of facts, of which `value` is the mean, with its interval from `low` to `high`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import kncore
from kncore import ablation, editors, interventions, neurons, predictions, rome, tokens
from kncore.ablation import Ablation
from kncore.attribution import attribute
from kncore.covariance import covariance
from kncore.models import LM
from kncore.neurons import Neuron
from kncore.query import Query
from kncore.store import disk, fingerprint
from knpaper import corpus, likeness, planted, stats, tasks
from knpaper.planted import Planting
from knpaper.records import results_folder
from knpaper.stats import Estimate

MODELS = ("controlled-gpt2", "controlled-gpt2-1", "controlled-gpt2-2", "controlled-llama", "controlled-bert")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
EDITED = (1.0, 0.5, 0.0)  # shares at which ROME is asked to rewrite
BLOCKS = {"gpt2": 2, "llama": 2, "bert": 3}  # the first in which a key tells the facts
N, WORDS, SENTENCES = 24, 20, 400
COPIES = (1, 2, 4, 5, 6, 10, 20, 50)
LARGE = 0.5  # of the answer's probability: what one neuron must carry by the second rule
TABLE = "planted.tsv"
COLUMNS = "model revision seed share measure value low high n units code".split()

CLAIMED = {  # the measures of claims, wholly planted
    "planted-found": "planted: found, search",
    "planted-false-alarms": "free: found, search",
    "planted-mixed-alarms": "planted, mixed: found, search",
    "planted-rewritten": "ROME, first block: rewritten",
    "planted-rewritten-there": "ROME, planted block: rewritten",
}
SILENCED = {"planted-silenced": "search", "planted-by-hand": "by hand"}


# ------------------------------------------------------------------------------------------------- what is planted


def invented(n: int = N) -> list[list[Query]]:
    """Return n facts that no model was taught: the language of an invented nation, in every template of the relation.

    The nations are those whose capital the models know, the languages words that they know from elsewhere."""
    world, relation = corpus.world(), tasks.describe("official_language")
    nations = [nation for nation, _ in world.capital["two_way"].pairs][:n]
    words = [city for _, city in world.capital["one_way"].pairs][:n]
    pairs = zip(nations, words, strict=True)
    return [[tasks.ask(relation, pair, template) for template in relation.templates] for pair in pairs]


def learnt_before() -> list[list[Query]]:
    """Return facts that the models learnt freely in training: the capitals of the same nations, and of others."""
    relation = corpus.world().capital["two_way"]
    return [[tasks.ask(relation, pair, template) for template in relation.templates] for pair in relation.pairs]


@cache
def surroundings() -> tuple[list[Query], list[str]]:
    """Return what the planted neurons must leave alone: queries of known facts, and text of the corpus."""
    languages = tasks.describe("official_language")
    queries = [query for fact in learnt_before() for query in fact]
    queries += [tasks.ask(languages, pair, template) for pair in languages.pairs for template in languages.templates]
    return queries, [" ".join(text.split()[:WORDS]) for text, _ in corpus.sentences()[:SENTENCES]]


def planting(lm: LM, n: int = N, steps: int = 80, seed: int = 0) -> Planting:
    """Return n invented facts planted into a controlled model; without `steps` nothing is learnt freely."""
    return planted.plant(lm, invented(n), *surroundings(), BLOCKS[lm.spec.family], steps=steps, seed=seed)


# --------------------------------------------------------------------------------------------------- the search


def searched(
    scores: Float[Tensor, "prompt block neuron"], p: Float[Tensor, " prompt"], sought: Sequence[Neuron]
) -> dict[str, float]:
    """Return what the rules find in the prompts of a fact or a group: whether one of the neurons that are `sought`.

    "search" is the book's, for two to five neurons; "from one" for one to five; "half" counts of its set the neurons in
    the coarse set of more than half of the prompts; "ratio" takes the neuron with the largest mean score over P, if it
    carries more than `LARGE`.
    """
    found, from_one = neurons.find_neurons(scores), neurons.find_neurons(scores, at_least=1)
    half = [neuron for neuron, share in zip(found.neurons, found.shares, strict=True) if share > 0.5]
    ((best, ratio),) = neurons.top((scores / p[:, None, None]).mean(0), 1)
    hits = {name: len({*sought} & {*some}) for name, some in (("search", found.neurons), ("half", half))}
    hits |= {"from one": len({*sought} & {*from_one.neurons})}
    return {
        **{f"found, {name}": float(hit > 0) for name, hit in hits.items()},
        "found, ratio": float(best in sought and ratio > LARGE),
        "alarm, ratio": float(ratio > LARGE),
        "alarm, search": float(found.converged),
        "alarm, from one": float(from_one.converged),
        "precision, search": hits["search"] / max(1, len(found.neurons)),
        "precision, from one": hits["from one"] / max(1, len(from_one.neurons)),
        "size, search": float(len(found.neurons)),
        "size, from one": float(len(from_one.neurons)),
        "largest score / P": ratio,
    }


def copied(
    scores: Float[Tensor, "prompt block neuron"], neuron: Neuron, k: int
) -> tuple[Float[Tensor, "prompt block neuron"], list[Neuron]]:
    """Return the scores of a model in which k copies, each with a k-th of the value vector, are in the place of a
    neuron, and the copies. They share its score alike, since P depends on their sum alone."""
    block, index = neuron
    wide = torch.cat([scores, torch.zeros(*scores.shape[:2], k - 1)], 2)
    places = [index, *range(scores.shape[2], wide.shape[2])]
    wide[:, block, places] = scores[:, block, index, None] / k
    return wide, [Neuron(block, place) for place in places]


def localised(lm: LM, facts: Sequence[Sequence[Query]], own: Sequence[Sequence[Neuron]], of: str) -> Iterator:
    """Yield the measures of the searches for the neurons of facts, and then the scores of each fact's prompts."""
    queries, k = [query for fact in facts for query in fact], len(facts[0])
    found = attribute(lm, queries, store=False)
    scores, p = (x.unflatten(0, (len(facts), k)) for x in (found.scores, found.probability))
    yield _columns(of, [searched(*row) for row in zip(scores, p, own, strict=True)])
    anyone = [neuron for some in own for neuron in some]
    places = likeness.mixed(np.arange(len(queries)).reshape(-1, k))
    mixed = [searched(found.scores[rows], found.probability[rows], anyone) for rows in places]
    yield _columns(f"{of}, mixed", mixed)
    yield scores


def _columns(of: str, rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {f"{of}: {name}": [row[name] for row in rows] for name in rows[0]}


# -------------------------------------------------------------------------------------------------- suppression


def silenced(
    lm: LM, facts: Sequence[Sequence[Query]], others: Sequence[Query], sets: Sequence[Sequence[Neuron]], of: str
) -> dict[str, list[float]]:
    """Suppress for each fact a set of neurons at the target position and return, by fact: the share of its prompts, and
    of `others`' and the other facts', that keep their most probable word; and what log P loses, in nats. An empty set
    changes nothing."""
    k, alone = len(facts[0]), [fact[0] for fact in facts]
    held = ablation.capture_prompts(lm, [*(query for fact in facts for query in fact), *alone, *others])
    first, out = len(facts) * k, []
    for i, chosen in enumerate(sets):
        own = list(range(i * k, i * k + k))
        near = [first + j for j in range(len(alone) + len(others)) if j != i]
        if chosen:
            table = ablation.measure(held, [Ablation(prompt, list(chosen)) for prompt in own + near])
            kept, loss = 1.0 - table.changed, table.loss
        else:
            kept, loss = pd.Series([1.0] * (k + len(near))), pd.Series([0.0] * (k + len(near)))
        names = {"kept": kept, "loss": loss}
        out.append(
            {f"{what}, own": float(x[:k].mean()) for what, x in names.items()}
            | {f"{what}, others": float(x[k:].mean()) for what, x in names.items()}
        )
    return _columns(of, out)


# --------------------------------------------------------------------------------------------------------- ROME


def rewritten(
    lm: LM, facts: Sequence[Sequence[Query]], block: int, of: str, where_due: bool = False
) -> dict[str, list[float]]:
    """Rewrite the answer of each fact to that of the next by ROME at a block and return, by fact: whether the edited
    prompt gives the new answer, the share of its other prompts that do, and of other facts that keep their answer.

    The value is stored at the subject's last token, as published, or `where_due`, at the token before the answer.
    """

    def at_the_end(*given) -> list:
        return [(encoded, encoded.position) for encoded, _ in rome.prompts(*given)]

    requests = [replace(fact[0], foil=facts[(i + 1) % len(facts)][0].target) for i, fact in enumerate(facts)]
    settings = replace(rome.HPARAMS[lm.name.partition("+")[0]], block=block)
    found = rome.search(lm, requests, settings, read=at_the_end if where_due else None)
    rows = []
    for i, edit in enumerate(editors.write_searches(found, covariance(lm, block, settings.covariance), block)):
        others = [fact[0] for j, fact in enumerate(facts) if j != i]
        own = _says(lm, facts[i], [requests[i].foil] * len(facts[i]), edit)
        kept = _says(lm, others, [query.target for query in others], edit)
        paraphrases, kept = sum(own[1:]) / (len(own) - 1), sum(kept) / len(kept)
        rows.append({"rewritten": own[0], "paraphrases": paraphrases, "others keep": kept})
    return _columns(of, rows)


def _says(lm: LM, queries: Sequence[Query], words: Sequence[str], edit: editors.Edit) -> list[float]:
    with interventions.edited(lm, *edit.deltas) if edit.deltas else torch.no_grad():
        best = predictions.log_probabilities(lm, queries).argmax(1).tolist()
    return [float(b == tokens.encode(lm, q, word).target[0]) for b, q, word in zip(best, queries, words, strict=True)]


# --------------------------------------------------------------------------------------------------- the study


def measures(plan: Planting, share: float) -> dict[str, list[float]]:
    """Return all measures of a planting at a share, by fact."""
    lm, own_share = plan.calibrated(share)
    facts, before = plan.facts, learnt_before()
    nearby = [fact[0] for fact in before]
    own = [[neuron] for neuron in plan.neurons]
    first, mixed, scores = localised(lm, facts, own, "planted")
    out = {"share, measured": own_share.tolist(), **first, **mixed}
    answers = [query.target for fact in facts for query in fact]
    says = _says(lm, [query for fact in facts for query in fact], answers, editors.Edit())
    out["right before"] = torch.tensor(says).unflatten(0, (len(facts), -1)).mean(1).tolist()
    for name, least in (("search", 2), ("from one", 1)):
        sets = [neurons.find_neurons(of_fact, at_least=least).neurons for of_fact in scores]
        out |= silenced(lm, facts, nearby, sets, f"silenced, {name}")
    out |= silenced(lm, facts, nearby, own, "silenced, by hand")
    if share == 1:
        anyone = [plan.neurons] * len(before)
        first, mixed, of_before = localised(lm, before, anyone, "free")
        sets = [neurons.find_neurons(of_fact).neurons for of_fact in of_before]
        out |= first | mixed | silenced(lm, before, [fact[0] for fact in facts], sets, "free, silenced")
        for k in COPIES:
            both = [copied(x, neuron, k) for x, neuron in zip(scores, plan.neurons, strict=True)]
            found = [len({*neurons.find_neurons(wide).neurons} & {*copies}) / k for wide, copies in both]
            out[f"copies found, of {k}"] = found
    if share in EDITED:
        at = plan.neurons[0].block
        for what, block in {"first": 0, "planted": at, "next": at + 1 if at + 1 < len(lm.blocks) else at - 1}.items():
            out |= rewritten(lm, facts, block, f"ROME, {what} block")
    return out


def rows(lm: LM, plan: Planting, share: float, seed: int) -> pd.DataFrame:
    """Return the rows of the table of one model and share."""
    out = []
    for measure, units in measures(plan, share).items():
        units = [float(f"{x:.4g}") for x in units]
        found = stats.share(units) if {*units} <= {0.0, 1.0} else stats.mean(units)
        shown = " ".join(f"{x:g}" for x in units)
        numbers = [f"{x:.4g}" for x in found[:3]]
        out.append([lm.name, lm.revision, seed, share, measure, *numbers, found.n, shown, code()])
    return pd.DataFrame(out, columns=COLUMNS).astype({"value": float, "low": float, "high": float})


def code() -> str:
    """Return the hash of the code that makes the table."""
    return fingerprint.code(measures, planting)


def read(path: str | Path) -> pd.DataFrame:
    """Return a table that was stored; an empty one where there is none."""
    path = Path(path)
    return pd.read_csv(path, sep="\t", dtype={"units": str}) if path.exists() else pd.DataFrame(columns=COLUMNS)


def table_file() -> Path:
    """Return where the stored table lies: among the records, or else in the checkout of this package (a run with other
    parameters has records of its own)."""
    checkout = Path(__file__).resolve().parent.parent / "results"
    return next((f / TABLE for f in (results_folder(), checkout) if (f / TABLE).is_file()), checkout / TABLE)


def by_fact(table: pd.DataFrame, measure: str, share: float, models: Sequence[str]) -> np.ndarray:
    """Return the values of a measure, a row for each of the models that the table has, a column for each fact."""
    chosen = table[(table.measure == measure) & (table.share == share) & table.model.isin(models)]
    return np.array([[float(x) for x in shown.split()] for shown in chosen.units])


def over_facts(values: np.ndarray) -> Estimate:
    """Return the mean over facts of what `by_fact` gives, each averaged over the models first. n counts facts."""
    facts = np.broadcast_to(np.arange(values.shape[1]), values.shape).ravel()
    yes_or_no = bool(np.isin(values, (0, 1)).all())
    return stats.share(values.ravel(), facts) if yes_or_no else stats.mean(values.ravel(), facts)


def curve(table: pd.DataFrame, measure: str, models: Sequence[str]) -> dict[float, Estimate]:
    """Return a measure by the share of the fact that is planted, as it was measured on average, lowest first."""
    points = {}
    for share in sorted(set(table.share)):
        values = by_fact(table, measure, share, models)
        if len(values):
            points[float(by_fact(table, "share, measured", share, models).mean())] = over_facts(values)
    return points


def least_share(table: pd.DataFrame, measure: str, models: Sequence[str], below: bool = False) -> str:
    """Return the least measured share from which on all intervals of a measure lie above one half, or below it."""
    passed = "none"
    for share, point in sorted(curve(table, measure, models).items(), reverse=True):
        if not (point.high < 0.5 if below else point.low > 0.5):
            break
        passed = f"{share:.2f}"
    return passed


def shown_rows(
    table: pd.DataFrame, columns: Mapping[str, str], trained: Mapping[str, Sequence[str]], intervals: bool = False
) -> list[dict[str, str]]:
    """Return a row for each architecture and share: the measures that `columns` names, where the table has them all.

    `trained` are the models of each architecture."""
    shown = []
    for name, models in trained.items():
        for share in sorted(set(table.share), reverse=True):
            at = by_fact(table, "share, measured", share, models)
            values = {label: by_fact(table, measure, share, models) for label, measure in columns.items()}
            if len(at) and all(map(len, values.values())):
                text = {label: str(over_facts(x)) if intervals else f"{x.mean():.2f}" for label, x in values.items()}
                shown.append({"model": name, "share": f"{at.mean():.2f}", **text})
    return shown


def claimed(table: pd.DataFrame, claim: str, models: Sequence[str]) -> Estimate:
    """Return the number of a claim of chapter 11 on the models of an architecture, with its interval over facts."""

    def of(measure: str) -> np.ndarray:
        return by_fact(table, measure, 1.0, models)

    if claim == "planted-ratio":
        own = of("planted: found, ratio")
        return over_facts(own * (1 - of("free: alarm, ratio")[:, : own.shape[1]]))
    if claim in SILENCED:
        return over_facts(
            of(f"silenced, {SILENCED[claim]}: kept, others") - of(f"silenced, {SILENCED[claim]}: kept, own")
        )
    return over_facts(of(CLAIMED[claim]))


def main() -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the table, which is gone on with")
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of free learning")
    chosen = parser.parse_args()
    for name in chosen.models.split(","):
        lm, table = kncore.load(name), read(chosen.out)
        there = table[(table.model == name) & (table.revision == lm.revision) & (table.seed == chosen.seed)]
        todo = [share for share in SHARES if share not in set(there[there.code == code()].share)]
        plan = planting(lm, seed=chosen.seed) if todo else None
        for share in todo:
            made, old = rows(lm, plan, share, chosen.seed), read(chosen.out)
            same = (old.model == name) & (old.share == share) & (old.seed == chosen.seed)
            disk.write(chosen.out, pd.concat([old[~same], made]).to_csv(sep="\t", index=False))
            print(f"{name}, share {share:g}: {len(made)} measures", flush=True)


if __name__ == "__main__":
    from knpaper import powers

    powers.main()
