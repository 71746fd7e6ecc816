"""Effects of neuron edits on what the model says: many edits of many prompts, replayed from captured states.

An edit multiplies a few neurons at the target position by a factor (0 suppresses them). Prompts are captured once
and held; a trial is one held prompt under one edit: one row, which enters at the lowest edited block. The numbers are
those of `interventions.suppress` and `enhance` around a run of the whole model.
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

from kncore import arch, checks, state, tokens
from kncore.models import LM
from kncore.neurons import listed
from kncore.replay import Capture, Change, capture, replay
from kncore.tasks import Query


class Trial(NamedTuple):
    """One held prompt, by its place, with `neurons`, pairs (block, index), multiplied by `factor`.

    `label` says in the table of `measure` what the trial is for.
    """

    prompt: int
    neurons: Sequence[tuple[int, int]]
    factor: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Held:
    """Captured prompts, and the token ids of the words whose probability is read, the target's first.

    `logp` and `said` are the log-probabilities of those words (−inf where a prompt has fewer than others) and the most
    probable token of the whole vocabulary, before any edit. `place` finds a prompt: which capture, which row of it.
    """

    lm: LM
    queries: Sequence[Query]
    captures: Sequence[Capture]
    place: Sequence[tuple[int, int]]
    words: Int[Tensor, "prompt word"]
    logp: Float[Tensor, "prompt word"]
    said: Int[Tensor, " prompt"]

    def activations(self, prompts: Sequence[int]) -> Float[Tensor, "prompt block neuron"]:
        """The neurons of held prompts at the target position. Raises ValueError for a prompt that is not held."""
        where = [self.place[checks.whole(prompt, "a held prompt", 0, len(self.place) - 1)] for prompt in prompts]
        if not where:
            raise ValueError("no prompts given; name at least one of those that are held")
        return torch.stack(
            [torch.stack([state[row] for state in self.captures[c].sites["neuron"]]) for c, row in where]
        )


@state.computes(grad=False)
def hold(lm: LM, queries: Sequence[Query], words: Sequence[Sequence[str]] | None = None, batch: int = 48) -> Held:
    """Capture prompts for `read` and `measure`.

    `words` are those that compete with the target, per query: by default its foil, if it has one. They count by their
    first token; those that begin with the target's own are left out. Raises ValueError for no queries, and for queries
    the model cannot be asked or answers with what is no number; TypeError for what is no list of queries or words.
    """
    queries, batch = checks.items(queries, Query, "queries"), checks.whole(batch, "batch", 1)
    if not queries:
        raise ValueError("no queries to hold; give at least one")
    if words is not None:
        words = [checks.items(some, str, "the words of a query") for some in words]
        if len(words) != len(queries):
            raise ValueError(f"{len(queries)} queries but {len(words)} lists of words")
    encoded = [tokens.encode(lm, query) for query in queries]
    rivals = words if words is not None else [[query.foil] if query.foil else [] for query in queries]
    known: dict[tuple, list[int]] = {}
    read = []
    for query, some in zip(queries, rivals, strict=True):
        key = (tokens.ending(query), *some)
        if key not in known:
            known[key] = [tokens.encode(lm, query, word).target[0] for word in some]
        read.append(list(dict.fromkeys([tokens.encode(lm, query).target[0], *known[key]])))
    table = torch.full((len(read), max(map(len, read))), -1)
    for row, some in zip(table, read, strict=True):
        row[: len(some)] = torch.tensor(some)

    prompts = sorted({(e.ids, e.position): e for e in encoded}.values(), key=lambda e: len(e.ids))
    captures, rows = [], {}
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        rows |= {(e.ids, e.position): (len(captures), row) for row, e in enumerate(part)}
        captures.append(capture(lm, part))
    place = [rows[e.ids, e.position] for e in encoded]
    logp, said = torch.empty(table.shape), torch.empty(len(table), dtype=torch.long)
    for source, captured in enumerate(captures):
        here = [i for i, (c, _) in enumerate(place) if c == source]
        logp[here], said[here] = _seen(captured.logits, torch.tensor([place[i][1] for i in here]), table[here])
    return Held(lm, list(queries), captures, place, table, logp, said)


def _seen(
    logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " trial"], words: Int[Tensor, "trial word"]
) -> tuple[Float[Tensor, "trial word"], Int[Tensor, " trial"]]:
    """Log-probabilities of each trial's words, and the most probable token, read off its row of the logits."""
    rows = rows.to(logits.device)
    logp = logits.log_softmax(-1)[rows[:, None], words.clamp_min(0).to(logits.device)].cpu()
    return logp.masked_fill(words < 0, -torch.inf), logits.argmax(-1)[rows].cpu()


@state.computes(grad=False)
def read(
    held: Held, trials: Sequence[Trial], budget: int = 512
) -> tuple[Float[Tensor, "trial word"], Int[Tensor, " trial"]]:
    """Log-probabilities of the held words and the most probable token, after the edit of each trial.

    `budget`: how many positions are held at once. Raises ValueError for a trial without neurons or with one twice, a
    prompt or neuron that does not exist, a factor that is no finite number of the model's dtype, and an edit after
    which the probabilities are not numbers.
    """
    budget = checks.whole(budget, "budget", 1)
    trials = _checked(held, trials)
    sets = _sets(held, trials)
    logp = torch.empty(len(trials), held.words.shape[1])
    said = torch.empty(len(trials), dtype=torch.long)

    same: dict[tuple, list[int]] = {}  # trials that differ only in what is read: one row for all of them
    for i, trial in enumerate(trials):
        source, row = held.place[trial.prompt]
        lowest = int(sets[id(trial.neurons)][0, 0])
        same.setdefault((source, lowest, row, id(trial.neurons), trial.factor), []).append(i)
    for source, keys in groupby(sorted(same, key=lambda key: key[:2]), key=lambda key: key[0]):
        captured, members = held.captures[source], list(keys)
        room = max(1, budget // captured.row_cost)
        for start in range(0, len(members), room):
            part = [same[key] for key in members[start : start + room]]
            first = [trials[group[0]] for group in part]
            logits = _replayed(held, captured, first, [sets[id(trial.neurons)] for trial in first])
            _expect_numbers(held, logits, first)
            here = [i for group in part for i in group]
            rows = torch.arange(len(part)).repeat_interleave(torch.tensor([len(group) for group in part]))
            logp[here], said[here] = _seen(logits, rows, held.words[[trials[i].prompt for i in here]])
    return logp, said


def _expect_numbers(held: Held, found: Float[Tensor, "trial width"], trials: Sequence[Trial]) -> None:
    bad = (~torch.isfinite(found).all(1)).nonzero()[:, 0].tolist()
    if bad:
        trial, prompt = trials[bad[0]], held.queries[trials[bad[0]].prompt].prompt
        raise ValueError(
            f"after an edit by factor {trial.factor:g} the probabilities for {prompt!r} are not numbers; use a smaller "
            "factor or a wider dtype"
        )


def _checked(held: Held, trials: Iterable[Trial]) -> list[Trial]:
    """The trials with Python's numbers."""
    found = []
    for trial in checks.items(trials, Trial, "trials"):
        prompt = checks.whole(trial.prompt, "the prompt of a trial")
        if not 0 <= prompt < len(held.queries):
            raise ValueError(f"trial of prompt {prompt}; held are 0 to {len(held.queries) - 1}")
        factor = checks.finite(trial.factor, f"the factor of a trial of prompt {prompt}", held.lm.dtype)
        found.append(trial._replace(prompt=prompt, factor=factor))
    return found


def _sets(held: Held, trials: Sequence[Trial]) -> dict[int, Int[Tensor, "neuron 2"]]:
    """Each set of neurons once, as a tensor that rises in block."""
    sets: dict[int, Tensor] = {}
    for trial in trials:
        if id(trial.neurons) in sets:
            continue
        try:
            given = listed(trial.neurons, len(held.lm.blocks), held.lm.n_neurons, held.lm.name)
        except ValueError as error:
            raise ValueError(f"trial of prompt {trial.prompt}: {error}") from None
        sets[id(trial.neurons)] = torch.tensor(sorted(given, key=lambda neuron: neuron.block))
    return sets


@torch.no_grad()
def _replayed(held: Held, captured: Capture, trials: list[Trial], sets: list[Tensor]) -> Float[Tensor, "row vocab"]:
    """Logits of one batch of rows; trials rise in the lowest block of their sets."""
    device = held.lm.device
    prompts = torch.tensor([held.place[trial.prompt][1] for trial in trials], device=device)
    entries = [int(some[0, 0]) for some in sets]
    counts = torch.tensor([len(some) for some in sets])
    row = torch.arange(len(sets)).repeat_interleave(counts).to(device)
    factor = torch.tensor([trial.factor for trial in trials]).repeat_interleave(counts).to(device, held.lm.dtype)
    block, index = torch.cat(sets).to(device).T
    position = captured.target[prompts]

    def scale(x: Tensor, chosen: Tensor) -> Tensor:
        at = row[chosen], position[row[chosen]], index[chosen]
        return x.index_put(at, x[at] * factor[chosen])

    changes = []
    first = torch.tensor(entries, device=device)[row] == block
    for depth, group in groupby(range(len(trials)), key=lambda i: entries[i]):
        members = list(group)
        start = members[0]
        values = captured.sites["neuron"][depth][prompts[members]]
        chosen = first & (block == depth)
        at = row[chosen] - start, index[chosen]
        values = values.index_put(at, values[at] * factor[chosen])
        _expect_numbers(held, values, [trials[i] for i in members])
        changes.append(Change(depth, prompts[members], values))
    with contextlib.ExitStack() as hooks:
        for depth in block[~first].unique().tolist():
            change = partial(scale, chosen=~first & (block == depth))
            hooks.enter_context(arch.at_site(held.lm.blocks[depth], held.lm.spec.sites["neuron"], change))
        return replay(captured, changes)


def measure(held: Held, trials: Sequence[Trial]) -> pd.DataFrame:
    """One row per trial: its label and prompt, what the prompt asks, and before and after the edit:

    `logp`, log-probability of the target; `margin`, its log-odds against the best of the other held words (infinite
    where there are none); `mass`, the log-probability of all held words together; `prefers`, whether the target is the
    best of them; `says`, whether it is the most probable token of all.

    `loss`, `loss_margin` and `loss_mass` are before minus after, in nats; `changed`, whether the most probable token is
    another one.
    """
    trials = _checked(held, trials)
    places = np.array([trial.prompt for trial in trials], dtype=int)
    logp, said = read(held, trials)
    columns: dict[str, object] = {"label": [trial.label for trial in trials], "prompt": places}
    for name in ("task", "item", "value", "template"):
        columns[name] = np.array([getattr(query, name) for query in held.queries], dtype=object)[places]
    for when, found, best in (("before", held.logp[places], held.said[places]), ("after", logp, said)):
        rivals = found[:, 1:].amax(1) if found.shape[1] > 1 else torch.full_like(found[:, 0], -torch.inf)
        columns[f"logp_{when}"] = found[:, 0].double().numpy()
        columns[f"margin_{when}"] = (found[:, 0] - rivals).double().numpy()
        columns[f"mass_{when}"] = found.double().logsumexp(1).numpy()
        columns[f"prefers_{when}"] = (found[:, 0] > rivals).numpy()
        columns[f"says_{when}"] = (best == held.words[places, 0]).numpy()
    table = pd.DataFrame(columns)
    for name in ("logp", "margin", "mass"):
        table["loss" if name == "logp" else f"loss_{name}"] = table[f"{name}_before"] - table[f"{name}_after"]
    table["changed"] = (said != held.said[places]).numpy()
    return table


def look_alikes(
    sizes: Float[Tensor, "block neuron"], neurons: Sequence[tuple[int, int]], draws: int, seed: int = 0, pool: int = 20
) -> list[list[tuple[int, int]]]:
    """Random sets to compare an edit with: for each neuron one of its block, as active as it.

    `sizes` are mean activations without their sign; each draw replaces every neuron by one of the `pool` of its block
    whose size is nearest, none of them in `neurons` or twice in a draw. Raises ValueError where a block has too few,
    for a neuron that does not exist or comes twice, for sizes that are no sizes, and draws or a pool below 1.
    """
    sizes = _sizes(sizes)
    given = [tuple(neuron) for neuron in listed(neurons, *sizes.shape, "the table of sizes")]
    draws, pool = checks.whole(draws, "draws", 1), checks.whole(pool, "pool", 1)
    rng = np.random.default_rng(checks.whole(seed, "seed", 0))
    taken = set(given)
    near = []
    for block, index in given:
        order = (sizes[block] - sizes[block, index]).abs().argsort().tolist()
        near.append([(block, i) for i in order if (block, i) not in taken][: pool + len(taken)])
    sets = []
    for _ in range(draws):
        chosen: dict[tuple[int, int], None] = {}
        for (block, _), candidates in zip(given, near, strict=True):
            free = list(islice((neuron for neuron in candidates if neuron not in chosen), pool))
            if not free:
                raise ValueError(f"block {block} has no neurons left to draw from; give fewer of its neurons")
            chosen[free[rng.integers(len(free))]] = None
        sets.append(list(chosen))
    return sets


def most_active(sizes: Float[Tensor, "block neuron"], k: int) -> list[tuple[int, int]]:
    """The k neurons of the largest mean activation without its sign, wherever they are; all where there are fewer.

    Raises ValueError for sizes that are no sizes, and for a k below 1.
    """
    sizes, k = _sizes(sizes), checks.whole(k, "k", 1)
    return [tuple(divmod(i, sizes.shape[1])) for i in sizes.flatten().topk(min(k, sizes.numel())).indices.tolist()]


def _sizes(sizes) -> Float[Tensor, "block neuron"]:
    sizes = checks.tensor(sizes, "block neuron", "sizes")
    if bool((sizes < 0).any()):
        raise ValueError("sizes are below 0 somewhere; give the activations without their sign (their `abs`)")
    return sizes
