"""What the playground of the book shows: recorded answers of edited models, of doses of suppression, and of neurons.

    python -m knpaper.playground --out results/playground.json

asks the default model all that a reader can choose there, once. The edits are those of chapter 8, facts, conditions and
their neurons those of chapter 4. Edits and attributions are stored, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import kncore
from kncore import editors, interventions, neurons, predictions, prose, tokens
from kncore.attribution import attribute
from kncore.editors import Edit
from kncore.models import LM
from kncore.neurons import Neuron
from kncore.query import Query
from kncore.store import disk, fingerprint
from knpaper import cases, chapter, criteria, doses, groups, stimuli, tasks
from knpaper.cases import Case
from knpaper.groups import Condition, Group

FILE = "playground.json"
MODEL, SEED, FACTS = "smollm2-135m", 0, 7
CAPITALS, SCHOLARS, FEW = 40, 32, 8  # edits; FEW: of each kind, by all editors
EDITORS = {"ROME": "rome", "in context": "context", "MEMIT": "memit", "fine-tuning": "fine-tuning"}
NEURONS = {"neurons": "neurons"}  # writes answers only where the answer is one token
WHOLE = ("ROME", "in context")
LENGTH, WORDS, PROMOTED, PLACES = 12, 4, 10, 6
ASKED = {  # how many questions of each kind, and what a model is to say that knows the new fact
    "reliability": (1, "the new answer"),
    "generality": (2, "the new answer"),
    "symmetry": (2, "what follows"),
    "symmetry_old": (1, "no longer"),
    "synonymy": (2, "what follows"),
    "locality": (2, "as before"),
    "largest_city": (1, "as before"),
}
KINDS = chapter.KINDS | {"symmetry_old": "old answer, reversed"}


# ------------------------------------------------------------------------------------------------------- edits


def edits_of(lm: LM, drawn: Sequence[Case], names: Mapping[str, str], what: str) -> list[dict]:
    """Return each case with its questions and how the model goes on, unedited and under the edit of each editor.

    `names` are those of `editors.EDITORS`, by the labels that readers see."""
    edited = [case.request.subject for case in drawn[:FEW]]
    some = [cases.shorten(case, {kind: n for kind, (n, _) in ASKED.items()}, edited) for case in drawn]
    requests, edits = [case.request for case in some], {}
    for label, name in names.items():
        mine = requests if label in WHOLE else requests[:FEW]
        edits[label] = editors.edit(lm, mine, name, progress=True, paraphrases=tasks.paraphrases)
    shown = []
    for i, case in enumerate(some):
        queries = [(kind, query) for kind, queries in case.queries.items() for query in queries]
        prompts = [query.prompt for _, query in queries]
        by = {"unedited": Edit()} | {label: of[i] for label, of in edits.items() if i < len(of)}
        says = _go_on(lm, prompts, {label: edit for label, edit in by.items() if not edit.failed})
        shown.append(
            {
                "what": what,
                "subject": case.request.subject,
                "old": case.request.target,
                "new": case.request.foil,
                "questions": [
                    {"kind": KINDS[kind], "prompt": query.prompt, "due": ASKED[kind][1], "word": query.target}
                    for kind, query in queries
                ],
                "says": says,
                "failed": {label: edit.failed for label, edit in by.items() if edit.failed},
            }
        )
    return shown


def _go_on(lm: LM, prompts: Sequence[str], by: Mapping[str, Edit]) -> dict[str, list[str]]:
    """Return how the model goes on after each prompt under each edit, by the labels of the edits."""
    edits = [edit for edit in by.values() for _ in prompts]
    texts = [" ".join(text.split()) for text in criteria.generations(lm, [*prompts] * len(by), edits, LENGTH, None)]
    return {label: texts[i * len(prompts) : (i + 1) * len(prompts)] for i, label in enumerate(by)}


# ------------------------------------------------------------------------------------------------------- doses


def doses_of(lm: LM, group: Group, watched: Mapping[str, Query]) -> dict:
    """Return what a model says to the `watched` prompts with more and more of a group's neurons suppressed.

    At each number of neurons, in order of attribution: the most probable words of each prompt, and the probability of
    its answer and, of a minimal pair, of the wrong form."""
    sizes = [0, *doses.doses(lm)]
    order, asked = group.ranked(sizes[-1]), list(watched.values())
    forms = [[tokens.encode(lm, q, word).target[0] for word in _forms(q)] for q in asked]
    says = []
    for size in sizes:
        with interventions.suppress(lm, order[:size]) if size else torch.no_grad():
            p = predictions.log_probabilities(lm, asked).exp()
        says.append(
            [{"p": [_short(row[i]) for i in ids], "words": _words(lm, row)} for row, ids in zip(p, forms, strict=True)]
        )
    return {
        "sizes": sizes,
        "neurons": [f"{block}·{index}" for block, index in order[:WORDS]],
        "prompts": [{"what": what, "prompt": q.prompt, "forms": _forms(q)} for what, q in watched.items()],
        "says": says,
    }


def _forms(query: Query) -> list[str]:
    """Return the answer of a query and, of a minimal pair, the form that is wrong."""
    return [query.target, query.foil] if query.foil else [query.target]


def _words(lm: LM, row: torch.Tensor) -> list[tuple[str, float]]:
    best = row.topk(WORDS).indices.tolist()
    return [(lm.tokenizer.decode([i]).strip() or "␣", _short(row[i])) for i in best]


def _short(number: torch.Tensor | float) -> float:
    return float(f"{float(number):.3g}")


def all_doses(
    lm: LM, facts: Sequence[Group], conditions: Mapping[Condition, Group], asked: Sequence[Query]
) -> list[dict]:
    """Return the doses of all facts and conditions, each beside another fact, or condition, and one of the other kind.

    `asked` are the queries of the prompts that the groups name."""

    def first(group: Group) -> Query:
        return asked[(group.right or group.prompts)[0]]

    def shown(group: Group, name: str, watched: Mapping[str, Query]) -> dict:
        return {"task": chapter.spaced(group.task), "name": name, **doses_of(lm, group, watched)}

    found, kinds = [], list(conditions.values())
    for i, fact in enumerate(facts):
        beside = [facts[j] for j in groups.mates(facts, i) if facts[j].right] or [facts[groups.mates(facts, i)[0]]]
        watched = {
            doses.FACT: first(fact),
            doses.NEIGHBOUR: first(beside[i % len(beside)]),
            doses.PAIR: first(kinds[i % len(kinds)]),
        }
        found.append(shown(fact, first(fact).subject, watched))
    for i, condition in enumerate(kinds):
        other = next(some for some in kinds[i + 1 :] + kinds if some.task != condition.task)
        watched = {
            "a sentence of the condition": first(condition),
            doses.OTHER: first(other),
            doses.KNOWN: first(facts[i % len(facts)]),
        }
        found.append(shown(condition, condition.name, watched))
    return found


# ------------------------------------------------------------------------------------------------------ neurons


def neurons_of(lm: LM, named: Mapping[str, Group]) -> list[dict]:
    """Return each neuron that was found for a group: what it promotes, where in prose it is most active, and for which
    of the `named` groups it was found, with its place among them by mean attribution, from 1."""
    found_for: dict[Neuron, dict[str, int]] = {}
    for name, group in named.items():
        order = group.ranked(100)
        for neuron in group.neurons:
            found_for.setdefault(neuron, {})[name] = order.index(neuron) + 1 if neuron in order else 0
    places = neurons.contexts(lm, prose.passages(), list(found_for), PLACES, 8)
    order = sorted(found_for, key=lambda neuron: (-len(found_for[neuron]), neuron))
    return [
        {
            "neuron": f"{neuron.block}·{neuron.index}",
            "raises": neurons.promoted(lm, neuron, PROMOTED),
            "lowers": neurons.promoted(lm, neuron, PROMOTED, -1),
            "active": [(place.before, place.token, _short(place.activation)) for place in places[neuron]],
            "found": sorted(found_for[neuron].items(), key=lambda item: (item[1], item[0])),
        }
        for neuron in order
    ]


# ---------------------------------------------------------------------------------------------------- the record


def record(model: str = MODEL, seed: int = SEED) -> dict:
    """Return all that the playground shows of a causal model; ValueError for a masked one."""
    lm = kncore.load(model)
    if lm.spec.masked:
        raise ValueError(f"{lm.name} is a masked model and goes on with no text; choose a causal model")
    m = 2 * FACTS + 1
    relations = chapter.known_facts(lm, FACTS, seed)
    pairs = chapter.known_pairs(lm, 2 * m, seed)
    queries = [query for some in relations.values() for query in some.queries]
    queries += [query for some in pairs.values() for query in some.queries[:m]]
    found = attribute(lm, queries, progress=True)
    held, facts, conditions = groups.capture(lm, relations, pairs, m, found.scores)
    named = {f"{chapter.spaced(fact.task)}: {held.queries[fact.prompts[0]].subject}": fact for fact in facts}
    named |= {f"{chapter.spaced(task)}: {value}": group for (task, value), group in conditions.items()}
    scholars, _ = stimuli.scholars(lm, SCHOLARS, seed)
    return {
        "model": lm.name,
        "revision": lm.revision,
        "seed": seed,
        "code": code(),
        "edits": edits_of(lm, stimuli.capitals(lm, CAPITALS, seed), EDITORS | NEURONS, "capital")
        + edits_of(lm, scholars, EDITORS, "field of work"),
        "doses": all_doses(lm, facts, conditions, held.queries),
        "neurons": neurons_of(lm, named),
    }


def code() -> str:
    """Return the hash of the code that makes the record."""
    return fingerprint.code(record)


def main() -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--model", default=MODEL, help="a causal model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="which facts, new answers and sentences are drawn")
    chosen = parser.parse_args()
    try:
        made = record(chosen.model, chosen.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"playground: {error}\n")
    disk.write(chosen.out, json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    from knpaper import playground

    playground.main()
