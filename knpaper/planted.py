"""Planted knowledge neurons: facts that a copy of a model answers from one known neuron each, and from nothing else.

The positive control of the book: what a method finds here can be compared with what is there. In one block the neurons
of the least output energy are taken over, one for each fact. Its key makes it fire where that fact is asked and nowhere
else; its value vector makes the answer likely. The same facts are also *learnt freely*, by gradient on all weights, and
the two are mixed: with a share s of planting the weights are

    W + (1 − s) Δ      and the value vectors      s · v,

Δ what free learning changes. What share this comes to is measured, in log-odds (`measured`). The model that is given is
never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from kncore import arch, checks, interventions, predictions, prose, tokens
from kncore.models import LM
from kncore.neurons import Neuron
from kncore.query import Query
from kncore.replay import Change, capture, replay
from kncore.tokens import Encoded

# The modules that turn the input of an MLP into neurons, by family; of two the product counts.
INWARD = {"gpt2": ("mlp.c_fc",), "bert": ("intermediate.dense",), "llama": ("mlp.gate_proj", "mlp.up_proj")}
MARGIN = {1: 4.0, 2: 8.0}  # a key is above this where its fact is asked, and below minus this everywhere else
RIDGE, ROUNDS = 1e-5, 200  # of the keys: with less of a ridge the loss hardly tells one key from another
GOOD, NORM, STEPS, RATE = 0.03, 1e-3, 150, 0.2  # of the values; GOOD: the loss, in nats, that is not improved on
TOGETHER = 32  # prompts that are run together
FACTS, REPLAYED, LEARNING_RATE = 24, 16, 1e-3  # of free learning: prompts and texts in a batch


@dataclass(frozen=True)
class Planting:
    """Facts that were planted, each a list of queries, and the neuron of each.

    `base` is the model whose neurons were taken over and are silent; `keyed` the same with their keys. `values` are the
    value vectors that answer, and `learnt` what free learning changes in `base`, by the name of the weight.
    """

    base: LM
    keyed: LM
    facts: Sequence[Sequence[Query]]
    neurons: list[Neuron]
    values: Float[Tensor, "fact hidden"]
    learnt: Mapping[str, Tensor]

    def at(self, share: float) -> LM:
        """Return the model in which a share, from 0 to 1, of every fact is planted, and the rest learnt freely."""
        if not 0 <= (share := checks.finite(share, "the share")) <= 1:
            raise ValueError(f"the share that is planted must be from 0 to 1, got {share:g}")
        lm = _shifted(self.keyed, self.learnt, 1 - share)
        rows = arch.value_vectors(lm.model, lm.spec, self.neurons[0].block)
        rows[[neuron.index for neuron in self.neurons]] = share * self.values
        return _loaded(lm, f"planted-{share:g}")

    def calibrated(self, share: float, tolerance: float = 0.02, tries: int = 8) -> tuple[LM, Float[Tensor, " fact"]]:
        """Return the model in which the facts hang on their neurons by `share` as it is measured, on average, and what
        is measured of each (see `measured`); the weights are mixed by bisection, and 0 and 1 are what they are."""
        low, high, mixed = 0.0, 1.0, share
        for _ in range(tries):
            lm = self.at(mixed)
            found = measured(self, lm)
            if share in (0, 1) or abs(gap := float(found.mean()) - share) <= tolerance:
                break
            low, high = (low, mixed) if gap > 0 else (mixed, high)
            mixed = (low + high) / 2
        return lm, found


@torch.no_grad()
def plant(
    lm: LM,
    facts: Sequence[Sequence[Query]],
    others: Sequence[Query],
    texts: Sequence[str],
    block: int,
    *,
    prefixes: int = 6,
    steps: int = 80,
    seed: int = 0,
) -> Planting:
    """Return facts, each a list of queries with one answer, planted into a block of a copy of the model.

    In `others`, queries, and `texts` no planted neuron may fire, and free learning is to leave them as they were. Each
    query is planted alone and after each of `prefixes` pieces of prose. Free learning takes `steps` steps.

    Raises ValueError for a family that nothing can be planted in, a block that does not exist, no facts or texts, more
    facts than neurons, an answer of several tokens, and facts whose prompts no key can tell from the rest.
    """
    block, paths = checks.block(lm, block), INWARD.get(lm.spec.family)
    if paths is None:
        raise ValueError(f"nothing can be planted in {lm.spec.family}; choose a model of {', '.join(INWARD)}")
    if not texts or not facts or not all(facts) or len(facts) > lm.n_neurons:
        raise ValueError(f"{len(facts)} facts and {len(texts)} texts; give texts, and 1 to {lm.n_neurons} facts")
    asked = [[query for given in fact for query in _prefixed(given, prefixes, seed)] for fact in facts]
    encoded = [tokens.encode(lm, query) for fact in asked for query in fact]
    owner = torch.tensor([i for i, fact in enumerate(asked) for _ in fact])
    if any(len(e.target) > 1 for e in encoded):
        raise ValueError(f"an answer has several tokens for {lm.name}; plant facts whose answers are single tokens")
    rest = [tokens.encode(lm, query) for query in others]
    rest += [Encoded(tuple(tokens.read(lm, text)), -1, ()) for text in texts]
    chosen = _least_energy(lm, block, rest)[: len(facts)]
    base = _rewritten(lm, block, chosen, torch.zeros(len(facts), lm.model.config.hidden_size), 0.0, "base")
    learnt = _learn(base, encoded, rest, steps, seed)
    runs = [_inputs(of, block, encoded, owner, rest) for of in (base, _shifted(base, learnt, 1.0))]
    weight, bias = _keys(*map(torch.cat, zip(*runs, strict=True)), len(facts), paths)
    keyed = _rewritten(base, block, chosen, weight, bias, "keyed")
    values = _values(keyed, block, chosen, encoded, owner)
    return Planting(base, keyed, facts, [Neuron(block, i) for i in chosen], values, learnt)


def measured(planting: Planting, lm: LM) -> Float[Tensor, " fact"]:
    """Return which share of each fact hangs on its planted neuron in `lm`, a model of `planting.at`: by how much the
    log-odds of the answer fall without it, over by how much they exceed those of the base; means over the queries."""
    queries = [query for fact in planting.facts for query in fact]
    with interventions.suppress(lm, planting.neurons, position="all"):
        off = log_odds(lm, queries)
    on, before = log_odds(lm, queries), log_odds(planting.base, queries)
    owner = torch.tensor([i for i, fact in enumerate(planting.facts) for _ in fact])
    gains = [torch.zeros(len(planting.facts)).index_add(0, owner, x) for x in (on - off, on - before)]
    return gains[0] / gains[1]


def log_odds(lm: LM, queries: Sequence[Query]) -> Float[Tensor, " query"]:
    """Return the log-odds of each query's answer, of its first token."""
    logp = predictions.log_probabilities(lm, queries).double()
    logp = logp[range(len(queries)), [tokens.encode(lm, query).target[0] for query in queries]]
    return (logp - torch.log(-torch.expm1(logp))).float()


# ------------------------------------------------------------------------------------------------- copies of models


def _loaded(lm: LM, name: str) -> LM:
    """Return a copy under a name of its own, as if it had been loaded so."""
    new = LM(name, "", lm.model, lm.tokenizer, lm.spec)
    return replace(new, name=f"{lm.name.partition('+')[0]}+{name}", revision=new.loaded[:16])


def _copied(lm: LM) -> LM:
    return LM(lm.name, lm.revision, copy.deepcopy(lm.model), lm.tokenizer, lm.spec)


@torch.no_grad()
def _shifted(lm: LM, deltas: Mapping[str, Tensor], by: float) -> LM:
    new = _copied(lm)
    for name, delta in deltas.items():
        new.model.get_parameter(name).add_(by * delta)
    return _loaded(new, "shifted")


@torch.no_grad()
def _rewritten(lm: LM, block: int, chosen: Sequence[int], weight: Tensor, bias: Tensor | float, name: str) -> LM:
    """Return a copy in which the `chosen` neurons have other keys, and value vectors of zero."""
    new = _copied(lm)
    paths = INWARD[lm.spec.family]
    for path in paths:
        module = arch.module_at(new.blocks[block], path, "inward weights")
        rows = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        rows[chosen] = weight if path == paths[0] else weight / MARGIN[len(paths)]
        if module.bias is not None:
            module.bias[chosen] = bias
    arch.value_vectors(new.model, lm.spec, block)[chosen] = 0
    return _loaded(new, name)


# ---------------------------------------------------------------------------------------------------- what is read


def _prefixed(query: Query, n: int, seed: int) -> list[Query]:
    """Return a query alone and after the first words of each of n passages."""
    passages = prose.passages()[seed * n : (seed + 1) * n]
    starts = ["", *(" ".join(text.split()[: 5 + 5 * (i % 2)]).rstrip(",.;:") + ". " for i, text in enumerate(passages))]
    return [replace(query, prompt=start + query.prompt) for start in starts]


def _read(lm: LM, block: int, site: arch.Site, batch: Sequence[Encoded]) -> list[Float[Tensor, "token width"]]:
    """Return the states of a site of a block at all tokens of prompts; those of a length run together."""
    found: list = [None] * len(batch)
    order = sorted(range(len(batch)), key=lambda i: len(batch[i].ids))
    for i in range(0, len(order), TOGETHER):
        part, seen = order[i : i + TOGETHER], []
        ids, lengths = tokens.pad(lm, [batch[j] for j in part])
        with torch.no_grad(), arch.at_site(lm.blocks[block], site, seen.append):
            lm.model.base_model(input_ids=ids, attention_mask=tokens.real_tokens(ids, lengths).long())
        for j, row in zip(part, seen[0], strict=True):
            found[j] = row[: len(batch[j].ids)].clone()
    return found


def _least_energy(lm: LM, block: int, rest: Sequence[Encoded]) -> list[int]:
    """Return the neurons of a block by how little they add to the residual stream: E[a²] · ‖v‖²."""
    power = torch.cat(_read(lm, block, lm.spec.sites["neuron"], rest)).double().square().mean(0)
    return (power * arch.value_vectors(lm.model, lm.spec, block).double().square().sum(1)).argsort().tolist()


def _inputs(
    lm: LM, block: int, encoded: Sequence[Encoded], owner: Int[Tensor, " prompt"], rest: Sequence[Encoded]
) -> tuple[Float[Tensor, "token hidden"], Int[Tensor, " token"]]:
    """Return what enters the MLP of a block at all tokens, and which fact is asked there; −1 where none is."""
    said = [e if lm.spec.masked else replace(e, ids=e.ids + e.target) for e in encoded]
    states = _read(lm, block, arch.Site(INWARD[lm.spec.family][0], "input"), [*said, *rest])
    asked = [torch.full((len(rows),), -1) for rows in states]
    for e, fact, row in zip(encoded, owner.tolist(), asked, strict=False):
        row[e.position] = fact
    return torch.cat(states), torch.cat(asked)


# ------------------------------------------------------------------------------------------- keys, values, learning


def _keys(
    states: Float[Tensor, "token hidden"], asked: Int[Tensor, " token"], n: int, paths: Sequence[str]
) -> tuple[Float[Tensor, "fact hidden"], Float[Tensor, " fact"]]:
    """Return a weight and a bias for each fact, by squared hinge: above the margin where it is asked, below minus the
    margin elsewhere. Without biases (two paths) the bias is 0. Raises ValueError where a token is on the wrong side."""
    margin, gated = MARGIN[len(paths)], len(paths) > 1
    inputs = (states if gated else torch.cat([states, torch.ones(len(states), 1)], 1)).double()
    keys = torch.stack([_key(inputs, asked == fact, 1.25 * margin) for fact in range(n)])
    sign = 2.0 * (asked[:, None] == torch.arange(n)) - 1
    wrong = int((sign * (inputs @ keys.T) <= 0).sum())
    if wrong:
        raise ValueError(f"{wrong} tokens are on the wrong side of a key: no neuron tells the facts; try another block")
    keys = keys.float()
    return (keys, torch.zeros(n)) if gated else (keys[:, :-1], keys[:, -1])


def _key(inputs: Float[Tensor, "token width"], own: Bool[Tensor, " token"], margin: float) -> Float[Tensor, " width"]:
    """Return the key that is least by squared hinge, to the last digits and so the same on every machine: by Newton's
    method, in double precision, each step halved until the loss falls."""
    share = torch.where(own, 1 / own.sum().double(), 0.1 / (~own).sum().double().sqrt())
    signed = torch.where(own, 1.0, -1.0).double()[:, None] * inputs
    key, reach = inputs.new_zeros(inputs.shape[1]), inputs.new_zeros(len(inputs))

    def loss(key: Tensor, reach: Tensor) -> Tensor:
        return share @ (margin - reach).clamp_min(0).square() + RIDGE * key.square().sum()

    for _ in range(ROUNDS):
        short = reach < margin
        rows = signed[short] * share[short, None]
        curvature = signed[short].T @ rows + RIDGE * torch.eye(len(key), dtype=key.dtype)
        step = torch.linalg.solve(curvature, margin * rows.sum(0)) - key
        ahead = signed @ step
        while step.norm() > 1e-9 * key.norm() and loss(key + step, reach + ahead) > loss(key, reach):
            step, ahead = step / 2, ahead / 2
        key, reach = key + step, reach + ahead
        if step.norm() <= 1e-9 * key.norm():
            break
    return key


@torch.enable_grad()
def _values(
    keyed: LM, block: int, chosen: Sequence[int], encoded: Sequence[Encoded], owner: Int[Tensor, " prompt"]
) -> Float[Tensor, "fact hidden"]:
    """Return the shortest value vectors with which the facts are answered, by gradient on some prompts at a time."""
    captured = capture(keyed, encoded, ("neuron", "mlp"))
    active, before = captured.sites["neuron"][block][:, chosen], captured.sites["mlp"][block]
    wanted = torch.tensor([e.target[0] for e in encoded])
    values = torch.zeros(len(chosen), before.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([values], lr=RATE)
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        rows = torch.randperm(len(encoded), generator=order)[: 5 * len(chosen)]
        logits = replay(captured, [Change(block, rows, before[rows] + active[rows] @ values, "mlp")])
        loss = functional.cross_entropy(logits, wanted[rows], reduction="none").sub(GOOD).clamp_min(0).mean()
        optimiser.zero_grad()
        (loss + NORM * values.square().sum(1).mean()).backward()
        optimiser.step()
    return values.detach()


@torch.enable_grad()
def _learn(base: LM, encoded: Sequence[Encoded], rest: Sequence[Encoded], steps: int, seed: int) -> dict[str, Tensor]:
    """Return the changes of weights with which the base answers the facts, learnt by gradient (Adam) beside a replay of
    the rest: there its predictions are to stay as they were, at every token."""
    new, order = _copied(base), torch.Generator().manual_seed(seed)
    weights = {name: weight.requires_grad_() for name, weight in new.model.named_parameters()}
    optimiser = torch.optim.Adam(weights.values(), lr=LEARNING_RATE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1, 2 * (1 - step / steps))
        part = [encoded[i] for i in torch.randperm(len(encoded), generator=order)[:FACTS]]
        kept = [rest[i] for i in torch.randperm(len(rest), generator=order)[:REPLAYED]]
        ids, lengths = tokens.pad(base, [*part, *kept])
        real = tokens.real_tokens(ids, lengths)
        out = new.model(input_ids=ids, attention_mask=real.long()).logits.log_softmax(-1)
        at = torch.arange(len(part)), torch.tensor([e.position for e in part])
        loss = functional.nll_loss(out[at], torch.tensor([e.target[0] for e in part]))
        with torch.no_grad():
            was = base.model(input_ids=ids[len(part) :], attention_mask=real[len(part) :].long()).logits.log_softmax(-1)
        apart = functional.kl_div(out[len(part) :], was, log_target=True, reduction="none").sum(-1)
        optimiser.zero_grad()
        (loss + apart[real[len(part) :]].mean()).backward()
        optimiser.step()
    before = dict(base.model.named_parameters())
    return {name: (weight - before[name]).detach() for name, weight in weights.items()}
