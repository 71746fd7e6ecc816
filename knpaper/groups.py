"""What is suppressed: facts and agreement conditions, with their neurons and the prompts that test them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kncore import ablation, neurons, tokens
from kncore.ablation import CapturedPrompts
from kncore.models import LM
from kncore.neurons import Neuron
from knpaper import chapter
from knpaper.stimuli import TEMPLATES, Selection

Condition = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Group:
    """A fact in its templates, or an agreement condition: its neurons and the held prompts that they are tested on.

    `task` is the relation or the phenomenon, `name` the fact's item or the condition's value. `scores` are those of
    the prompts that were searched, `neurons` the refined ones, `sizes` the mean activations, without their sign, over
    the tested `prompts`. `right` are those of the prompts that the model answers right before any edit; none where the
    answer is not one of the words that compete.
    """

    task: str
    name: str
    scores: Float[Tensor, "query block neuron"]
    neurons: list[Neuron]
    sizes: Float[Tensor, "block neuron"]
    prompts: list[int]
    right: list[int]
    is_whole: bool = True

    def ranked(self, count: int) -> list[Neuron]:
        """Return the `count` neurons with the highest mean attribution, the highest first."""
        return [neuron for neuron, _ in neurons.top(self.scores.mean(0), count)]

    def alike(self, draws: int, seed: int = 0) -> list[list[tuple[int, int]]]:
        """Return `draws` random sets of as many neurons of the same blocks that are as active."""
        return ablation.matched_controls(self.sizes, self.neurons, draws, seed)


def whole_answers(lm: LM, selection: Selection) -> list[str]:
    """Return the answers of a relation that are one token, which are those that compete.

    The first token of a longer one ("H" of Hanoi) may begin anything. Where a tokenizer splits nearly all, all answers
    are returned: they compete by their first tokens.
    """
    whole = [word for word in selection.candidates if len(tokens.encode(lm, selection.queries[0], word).target) == 1]
    usable = len(whole) > 1 and any(query.target in whole for query in selection.queries)
    return whole if usable else list(selection.candidates)


def capture(
    lm: LM,
    facts: Mapping[str, Selection],
    pairs: Mapping[Condition, Selection],
    searched: int,
    scores: Float[Tensor, "query block neuron"],
) -> tuple[CapturedPrompts, list[Group], dict[Condition, Group]]:
    """Capture the prompts of facts, and then each condition's pairs but the first `searched`.

    `scores` are those of all prompts of the facts, then of the first `searched` pairs of each condition. Returns the
    held prompts, the facts and the conditions. Raises ValueError where a relation has fewer than two facts.
    """
    if any(len(selection.queries) < 2 * TEMPLATES for selection in facts.values()):
        raise ValueError("a fact is compared with others of its relation, so each relation needs at least two facts")
    answers = {relation: whole_answers(lm, selection) for relation, selection in facts.items()}
    queries = [query for selection in facts.values() for query in selection.queries]
    words = [answers[relation] for relation, selection in facts.items() for _ in selection.queries]
    unseen = {condition: selection.queries[searched:] for condition, selection in pairs.items()}
    tests = [query for some in unseen.values() for query in some]
    held = join([ablation.capture_prompts(lm, queries, words), ablation.capture_prompts(lm, tests)])

    def group(task: str, name: str, rows: range, prompts: range, is_whole: bool = True) -> Group:
        fine = (held.logp[:, 0] > held.logp[:, 1:].amax(1)) & is_whole
        right = [p for p in prompts if fine[p]]
        sizes, mine = held.activations(prompts).abs().mean(0), scores[rows.start : rows.stop]
        return Group(task, name, mine, chapter.refined(mine), sizes, list(prompts), right, is_whole)

    fact_groups = []
    for at in range(0, len(queries), TEMPLATES):
        query, prompts = queries[at], range(at, at + TEMPLATES)
        is_whole = query.target in answers[query.task]
        fact_groups.append(group(query.task, query.item, prompts, prompts, is_whole))
    conditions, row, prompt = {}, len(queries), len(queries)
    for condition, selection in pairs.items():
        rows = range(row, row + len(selection.queries[:searched]))
        prompts = range(prompt, prompt + len(unseen[condition]))
        conditions[condition] = group(*condition, rows, prompts)
        row, prompt = rows.stop, prompts.stop
    return held, fact_groups, conditions


def join(parts: Sequence[CapturedPrompts]) -> CapturedPrompts:
    """Return the held prompts of several captures of one model as one, in their order."""
    width = max(held.words.shape[1] for held in parts)
    captures, rows = [], []
    for held in parts:
        rows += [(len(captures) + at, row) for at, row in held.rows]
        captures += held.captures

    def table(name: str, empty: float) -> Tensor:
        columns = [getattr(held, name) for held in parts]
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=empty) for x in columns])

    queries = [query for held in parts for query in held.queries]
    predicted = torch.cat([held.predicted for held in parts])
    words, logp = table("words", -1), table("logp", -torch.inf)
    return CapturedPrompts(parts[0].lm, queries, captures, rows, words, logp, predicted)


def mates(facts: Sequence[Group], i: int) -> list[int]:
    """Return the places of the other facts of the relation of the i-th fact."""
    return [j for j, other in enumerate(facts) if other.task == facts[i].task and j != i]


def describe(facts: Sequence[Group], conditions: Mapping[Condition, Group]) -> str:
    """Return in a sentence how many facts and conditions there are, with how many neurons and prompts."""
    parts = []
    kinds = ("facts", facts, "prompts"), ("agreement conditions", conditions.values(), "sentences")
    for what, groups, prompts in kinds:
        each = sum(len(group.neurons) for group in groups) / len(groups)
        tested = sum(len(group.prompts) for group in groups)
        parts.append(f"{len(groups)} {what} with {each:.1f} neurons each on average, tested on {tested} {prompts}")
    return "; ".join(parts) + "."
