"""Ablations: what a model says after edits of neurons, many edits of many prompts, replayed from captured states.

An edit multiplies a few neurons at the target position by a factor (0 suppresses them). An ablation is one captured
prompt under one edit: one row, which enters at the lowest edited block. The numbers are those of `suppress` and
`enhance` of `kncore.interventions` around a run of the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kncore import arch, checks, tokens
from kncore.models import LM
from kncore.neurons import listed
from kncore.query import Query
from kncore.replay import Capture, Change, capture, replay
from kncore.store import state


class Ablation(NamedTuple):
    """One captured prompt, by its index, with `neurons`, pairs (block, index), multiplied by `factor`.

    `label` says in the table of `measure` what the ablation is for.
    """

    prompt: int
    neurons: Sequence[tuple[int, int]]
    factor: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class CapturedPrompts:
    """Captured prompts, and the token ids of the `words` whose probability is read, the target's first.

    `logp` are their log-probabilities (−inf where a prompt has fewer than others) and `predicted` the most probable
    token of all, before any edit. `rows` finds a prompt: which capture, which row of it.
    """

    lm: LM
    queries: Sequence[Query]
    captures: Sequence[Capture]
    rows: Sequence[tuple[int, int]]
    words: Int[Tensor, "prompt word"]
    logp: Float[Tensor, "prompt word"]
    predicted: Int[Tensor, " prompt"]

    def activations(self, prompts: Sequence[int]) -> Float[Tensor, "prompt block neuron"]:
        """Return the neurons of prompts at the target position. Raises ValueError for one that is not captured."""
        rows = [self.rows[checks.whole(prompt, "a captured prompt", 0, len(self.rows) - 1)] for prompt in prompts]
        if not rows:
            raise ValueError("no prompts given; name at least one of those that are captured")
        return torch.stack([torch.stack([x[row] for x in self.captures[c].sites["neuron"]]) for c, row in rows])


@state.computes(grad=False)
def capture_prompts(
    lm: LM, queries: Sequence[Query], words: Sequence[Sequence[str]] | None = None, batch: int = 48
) -> CapturedPrompts:
    """Return prompts captured for `read` and `measure`.

    `words` are those that compete with the target, per query: by default its foil, if it has one. They count by their
    first token; those that begin with the target's own are left out. Raises ValueError for no queries, and for queries
    the model cannot be asked or answers with what is no number; TypeError for what is no list of queries or words.
    """
    queries, batch = checks.items(queries, Query, "queries", 1), checks.whole(batch, "batch", 1)
    encoded = [tokens.encode(lm, query) for query in queries]
    table = _first_tokens(lm, queries, encoded, words)
    prompts = sorted({(e.ids, e.position): e for e in encoded}.values(), key=lambda e: len(e.ids))
    captures, row_of = [], {}
    logp, predicted = torch.empty(table.shape), torch.empty(len(table), dtype=torch.long)
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        captured, row = capture(lm, part), {(e.ids, e.position): row for row, e in enumerate(part)}
        members = [j for j, e in enumerate(encoded) if (e.ids, e.position) in row]
        own_rows = [row[encoded[j].ids, encoded[j].position] for j in members]
        logp[members], predicted[members] = _log_probabilities(captured.logits, own_rows, table[members])
        row_of |= {j: (len(captures), own) for j, own in zip(members, own_rows, strict=True)}
        captures.append(captured)
    rows = [row_of[j] for j in range(len(encoded))]
    return CapturedPrompts(lm, queries, captures, rows, table, logp, predicted)


def _first_tokens(
    lm: LM, queries: list[Query], encoded: list[tokens.Encoded], words: Sequence[Sequence[str]] | None
) -> Int[Tensor, "prompt word"]:
    """Return the first tokens of each query's target and of the words that compete with it, filled up with -1."""
    if words is None:
        words = [[query.foil] if query.foil else [] for query in queries]
    words = [checks.items(words_of_query, str, "the words of a query") for words_of_query in words]
    if len(words) != len(queries):
        raise ValueError(f"{len(queries)} queries but {len(words)} lists of words")
    known: dict[tuple, list[int]] = {}  # words are tokenised once for all queries that end alike
    table = []
    for query, e, words_of_query in zip(queries, encoded, words, strict=True):
        key = (tokens.ending(query), *words_of_query)
        if key not in known:
            known[key] = [tokens.encode(lm, query, word).target[0] for word in words_of_query]
        table.append(torch.tensor(list(dict.fromkeys([e.target[0], *known[key]]))))
    return torch.nn.utils.rnn.pad_sequence(table, batch_first=True, padding_value=-1)


def _log_probabilities(
    logits: Float[Tensor, "row vocab"], rows: Sequence[int], words: Int[Tensor, "ablation word"]
) -> tuple[Float[Tensor, "ablation word"], Int[Tensor, " ablation"]]:
    """Return the log-probabilities of words (−inf for filler) and the most probable token, at rows of the logits."""
    rows = torch.tensor(rows, device=logits.device)
    logp = logits.log_softmax(-1)[rows[:, None], words.clamp_min(0).to(logits.device)].cpu()
    return logp.masked_fill(words < 0, -torch.inf), logits.argmax(-1)[rows].cpu()


@state.computes(grad=False)
def read(
    prompts: CapturedPrompts, ablations: Sequence[Ablation], budget: int = 512
) -> tuple[Float[Tensor, "ablation word"], Int[Tensor, " ablation"]]:
    """Return the log-probabilities of the prompts' words and the most probable token, after each ablation.

    `budget`: how many positions are held at once. Raises ValueError for an ablation without neurons or with one twice,
    a prompt or neuron that does not exist, a factor that is no finite number of the model's dtype, and an edit after
    which the probabilities are not numbers.
    """
    budget, ablations = checks.whole(budget, "budget", 1), _checked(prompts, ablations)
    logp = torch.empty(len(ablations), prompts.words.shape[1])
    predicted = torch.empty(len(ablations), dtype=torch.long)
    same: dict[tuple, list[int]] = {}  # ablations that differ only in what is read: one row for all of them
    for i, ablation in enumerate(ablations):
        source, row = prompts.rows[ablation.prompt]
        same.setdefault((source, int(ablation.neurons[0, 0]), row, id(ablation.neurons), ablation.factor), []).append(i)
    for source, keys in groupby(sorted(same, key=lambda key: key[:2]), key=lambda key: key[0]):
        captured, rows = prompts.captures[source], [same[key] for key in keys]
        for part in captured.parts(rows, budget):
            firsts = [ablations[members[0]] for members in part]
            logits = _replayed(prompts, captured, firsts)
            _expect_numbers(prompts, logits, firsts)
            row_of = {i: row for row, members in enumerate(part) for i in members}
            members, words = list(row_of), prompts.words[[ablations[i].prompt for i in row_of]]
            logp[members], predicted[members] = _log_probabilities(logits, list(row_of.values()), words)
    return logp, predicted


def _expect_numbers(
    prompts: CapturedPrompts, values: Float[Tensor, "ablation width"], ablations: Sequence[Ablation]
) -> None:
    bad = (~torch.isfinite(values).all(1)).nonzero()[:, 0].tolist()
    if bad:
        ablation = ablations[bad[0]]
        raise ValueError(
            f"after an edit by factor {ablation.factor:g} the probabilities for "
            f"{prompts.queries[ablation.prompt].prompt!r} are not numbers; use a smaller factor or a wider dtype"
        )


def _checked(prompts: CapturedPrompts, ablations: Iterable[Ablation]) -> list[Ablation]:
    """Return ablations with Python's numbers, and neurons as a tensor that rises in block: one for each set given."""
    lm, checked, sets = prompts.lm, [], {}
    for ablation in checks.items(ablations, Ablation, "ablations"):
        prompt = checks.whole(ablation.prompt, "the prompt of an ablation", 0, len(prompts.queries) - 1)
        factor = checks.finite(ablation.factor, f"the factor of an ablation of prompt {prompt}", lm.dtype)
        if id(ablation.neurons) not in sets:
            try:
                neurons = listed(ablation.neurons, len(lm.blocks), lm.n_neurons, lm.name)
            except ValueError as error:
                raise ValueError(f"ablation of prompt {prompt}: {error}") from None
            sets[id(ablation.neurons)] = torch.tensor(sorted(neurons, key=lambda neuron: neuron.block))
        checked.append(ablation._replace(prompt=prompt, neurons=sets[id(ablation.neurons)], factor=factor))
    return checked


@torch.no_grad()
def _replayed(prompts: CapturedPrompts, captured: Capture, ablations: list[Ablation]) -> Float[Tensor, "row vocab"]:
    """Return the logits of one batch of rows; ablations rise in the lowest block of their neurons."""
    lm = prompts.lm
    captured_rows = torch.tensor([prompts.rows[ablation.prompt][1] for ablation in ablations], device=lm.device)
    entries = [int(ablation.neurons[0, 0]) for ablation in ablations]
    counts = torch.tensor([len(ablation.neurons) for ablation in ablations])
    row = torch.arange(len(ablations)).repeat_interleave(counts).to(lm.device)
    factor = torch.tensor([a.factor for a in ablations]).repeat_interleave(counts).to(lm.device, lm.dtype)
    block, index = torch.cat([ablation.neurons for ablation in ablations]).to(lm.device).T
    position = captured.target[captured_rows]

    def scale(x: Tensor, chosen: Tensor) -> Tensor:
        at = row[chosen], position[row[chosen]], index[chosen]
        return x.index_put(at, x[at] * factor[chosen])

    changes = []
    entering = torch.tensor(entries, device=lm.device)[row] == block
    for depth, group in groupby(range(len(ablations)), key=lambda i: entries[i]):
        members = list(group)
        values = captured.sites["neuron"][depth][captured_rows[members]]
        chosen = entering & (block == depth)
        at = row[chosen] - members[0], index[chosen]
        values = values.index_put(at, values[at] * factor[chosen])
        _expect_numbers(prompts, values, [ablations[i] for i in members])
        changes.append(Change(depth, captured_rows[members], values))
    with contextlib.ExitStack() as hooks:
        for depth in block[~entering].unique().tolist():
            change = partial(scale, chosen=~entering & (block == depth))
            hooks.enter_context(arch.at_site(lm.blocks[depth], lm.spec.sites["neuron"], change))
        return replay(captured, changes)


def measure(prompts: CapturedPrompts, ablations: Sequence[Ablation]) -> pd.DataFrame:
    """Return one row per ablation: its label and prompt, what the prompt asks, and before and after the edit:

    `logp`, log-probability of the target; `margin`, its log-odds against the best of the other words (infinite where
    there are none); `mass`, the log-probability of all words together; `prefers`, whether the target is the best of
    them; `says`, whether it is the most probable token of all. `loss`, `loss_margin` and `loss_mass` are before minus
    after, in nats; `changed`, whether the most probable token is another one.
    """
    ablations = checks.items(ablations, Ablation, "ablations")
    logp, predicted = read(prompts, ablations)
    indices = np.array([int(ablation.prompt) for ablation in ablations], dtype=int)
    columns: dict[str, object] = {"label": [ablation.label for ablation in ablations], "prompt": indices}
    for name in ("task", "item", "value", "template"):
        columns[name] = np.array([getattr(query, name) for query in prompts.queries], dtype=object)[indices]
    readings = ("before", prompts.logp[indices], prompts.predicted[indices]), ("after", logp, predicted)
    for when, logps, best in readings:
        rivals = logps[:, 1:].amax(1) if logps.shape[1] > 1 else torch.full_like(logps[:, 0], -torch.inf)
        columns[f"logp_{when}"] = logps[:, 0].double().numpy()
        columns[f"margin_{when}"] = (logps[:, 0] - rivals).double().numpy()
        columns[f"mass_{when}"] = logps.double().logsumexp(1).numpy()
        columns[f"prefers_{when}"] = (logps[:, 0] > rivals).numpy()
        columns[f"says_{when}"] = (best == prompts.words[indices, 0]).numpy()
    table = pd.DataFrame(columns)
    for name in ("logp", "margin", "mass"):
        table["loss" if name == "logp" else f"loss_{name}"] = table[f"{name}_before"] - table[f"{name}_after"]
    table["changed"] = (predicted != prompts.predicted[indices]).numpy()
    return table


def matched_controls(
    sizes: Float[Tensor, "block neuron"], neurons: Sequence[tuple[int, int]], draws: int, seed: int = 0, pool: int = 20
) -> list[list[tuple[int, int]]]:
    """Return random sets to compare an edit with: for each neuron one of its block, as active as it.

    `sizes` are mean activations without their sign; each draw replaces every neuron by one of the `pool` of its block
    whose size is nearest, none of them in `neurons` or twice in a draw. Raises ValueError where a block has too few,
    for a neuron that does not exist or comes twice, for sizes that are no sizes, and draws or a pool below 1.
    """
    sizes = _sizes(sizes)
    edited = [tuple(neuron) for neuron in listed(neurons, *sizes.shape, "the table of sizes")]
    draws, pool = checks.whole(draws, "draws", 1), checks.whole(pool, "pool", 1)
    rng = np.random.default_rng(checks.whole(seed, "seed", 0))
    taken, nearest = set(edited), []
    for block, index in edited:
        order = (sizes[block] - sizes[block, index]).abs().argsort().tolist()
        nearest.append([(block, i) for i in order if (block, i) not in taken][: pool + len(edited)])
    sets = []
    for _ in range(draws):
        chosen: dict[tuple[int, int], None] = {}
        for (block, _), candidates in zip(edited, nearest, strict=True):
            free = list(islice((neuron for neuron in candidates if neuron not in chosen), pool))
            if not free:
                raise ValueError(f"block {block} has no neurons left to draw from; give fewer of its neurons")
            chosen[free[rng.integers(len(free))]] = None
        sets.append(list(chosen))
    return sets


def most_active(sizes: Float[Tensor, "block neuron"], k: int) -> list[tuple[int, int]]:
    """Return the k neurons of the largest mean activation without its sign; all of them where there are fewer.

    Raises ValueError for sizes that are no sizes, and for a k below 1.
    """
    sizes, k = _sizes(sizes), checks.whole(k, "k", 1)
    return [tuple(divmod(i, sizes.shape[1])) for i in sizes.flatten().topk(min(k, sizes.numel())).indices.tolist()]


def _sizes(sizes) -> Float[Tensor, "block neuron"]:
    sizes = checks.tensor(sizes, "block neuron", "sizes")
    if bool((sizes < 0).any()):
        raise ValueError("sizes are below 0 somewhere; give the activations without their sign (their `abs`)")
    return sizes
