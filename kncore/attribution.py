"""Attribution: how much each neuron of each block contributes to the probability of a target (integrated gradients).

For neuron i of block l, with state a at the target position and P(γ) the probability of the target when that block's
neurons are set to γ·a,

    score_i = a_i · ∫₀¹ ∂P / ∂neuron_i dγ          (Dai et al. 2022, section 3.2; Niu et al. 2024, section 2)

so that the scores of a block add up to P(1) − P(0). How far they do not, on any part of the path, says how good the
quadrature was there; the adaptive rule splits the path where it was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kncore import arch, checks, tokens
from kncore.models import LM
from kncore.query import Query
from kncore.replay import Capture, Change, capture, expect_numbers, replay
from kncore.store import state
from kncore.store.results import Result, stored

Rule = tuple[np.ndarray, np.ndarray]  # nodes in [0, 1], and their weights

PANEL_NODES = 5
SPLIT = 4
DEPTH = 7
# Rounding noise of P, in units of the dtype's precision: at 100 a half precision would never split a path.
NOISE = {torch.float16: 16, torch.bfloat16: 16}


@dataclass(frozen=True)
class Attribution:
    """Scores of neurons for queries.

    `scores` as above, in units of P (or of log P where the whole target is attributed); `gap`, the completeness gap
    `|Σ scores − (P(1) − P(0))|`; `nodes`, how many gradients were taken; `probability` of the target's first token and
    its `rank` (0: it is the model's prediction).
    """

    scores: Float[Tensor, "query block neuron"]
    gap: Float[Tensor, "query block"]
    nodes: Int[Tensor, "query block"]
    probability: Float[Tensor, " query"]
    rank: Int[Tensor, " query"]


def rule(name: str, steps: int) -> Rule:
    """Return the nodes and the weights of a quadrature on [0, 1].

    "gauss" is Gauss-Legendre; "riemann" linspace(0, 1, steps) with weights 1/steps, as in the code of Niu et al.;
    "left" the left Riemann sum, i/steps, as in Dai et al.; "trapezoid" linspace(0, 1, steps) with halved ends.

    Raises ValueError for an unknown name, and steps that are no whole number or too few.
    """
    steps = checks.whole(steps, "steps")
    if steps < (2 if name == "trapezoid" else 1):
        raise ValueError(f"quadrature {name!r} needs more than {steps} steps")
    if name == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    if name == "riemann":
        return np.linspace(0, 1, steps), np.full(steps, 1 / steps)
    if name == "left":
        return np.arange(steps) / steps, np.full(steps, 1 / steps)
    if name == "trapezoid":
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps), weights
    raise ValueError(f"unknown quadrature {name!r}; known: gauss, riemann, left, trapezoid, or a pair (nodes, weights)")


@state.computes(grad=True)
def attribute(
    lm: LM,
    queries: Sequence[Query],
    *,
    site: str = "neuron",
    quadrature: str | tuple[Sequence[float], Sequence[float]] = "gauss",
    steps: int | None = None,
    tol: float = 3e-4,
    target: str = "first",
    budget: int = 1024,
    store: bool = True,
    progress: bool = False,
) -> Attribution:
    """Attribute the target's probability to the neurons of every block, at the position that predicts it.

    Args:
        quadrature: "gauss" without `steps` is adaptive: five Gauss-Legendre nodes on the path, and on each quarter of a
            part whose completeness gap exceeds `tol` times the Euclidean norm of the block's scores (plus the rounding
            noise of P). With `steps`, another name that `rule` knows, or a pair (nodes, weights), the nodes are fixed;
            `quadrature="riemann", steps=20, site="published"` gives the scores of the published code.
        target: "first" attributes the probability of the target's first token; "all" the log-probability of the whole
            target: the sum, over its tokens, of the attribution of log P(token | prompt, tokens before it).
        budget: how many positions are held at once; less memory, smaller batches, same scores.
        store: keep results on disk, keyed by all that they depend on, unless the model was changed after loading.

    Raises ValueError for an unknown site, quadrature or target mode, for nodes outside [0, 1], for queries the model
    cannot be asked, and where what it computes is no number; TypeError for what is no list of queries.
    """
    queries = checks.items(queries, Query, "queries", 1)
    if target not in ("first", "all"):
        raise ValueError(f"unknown target mode {target!r}: choose 'first' (token) or 'all' (tokens)")
    if site not in arch.NEURON_SITES:
        raise ValueError(f"cannot attribute to site {site!r}; choose {' or '.join(map(repr, arch.NEURON_SITES))}")
    tol, budget = checks.setting(tol, "tol", above=True), checks.whole(budget, "budget", 1)
    fixed = _fixed(quadrature, steps)
    encoded = [tokens.encode(lm, query) for query in queries]
    # One prompt per token that is attributed: the target's first, or all of them.
    groups = [[replace(e, target=e.target[:1])] if target == "first" else tokens.steps(lm, e) for e in encoded]
    prompts = sorted({prompt: None for group in groups for prompt in group}, key=lambda prompt: len(prompt.ids))
    nodes = [np.asarray(x).tolist() for x in fixed or (PANEL_NODES, SPLIT, DEPTH, tol)]
    shared = {"site": site, "target": target, "quadrature": nodes}

    def compute(part: list[int]) -> list[Result]:
        return _attributed(lm, [prompts[i] for i in part], site, target == "all", fixed, tol, budget)

    results = stored(
        lm,
        (_scores, capture),
        [{**shared, "query": [prompt.ids, prompt.position, prompt.target]} for prompt in prompts],
        compute,
        batch=max(1, budget // (len(lm.blocks) * (len(fixed[0]) if fixed else PANEL_NODES))),
        store=store,
        progress="attribute" if progress else "",
    )
    by_prompt = dict(zip(prompts, results, strict=True))
    return _summed([[by_prompt[prompt] for prompt in group] for group in groups])


def _attributed(
    lm: LM, batch: Sequence[tokens.Encoded], site: str, log: bool, fixed: Rule | None, tol: float, budget: int
) -> list[Result]:
    """Return the fields of an `Attribution` for each prompt of a batch, from one capture."""
    captured = capture(lm, batch, sites=(site,))
    wanted = torch.tensor([prompt.target[0] for prompt in batch], device=lm.device)
    path = _Path(captured, site, torch.stack(captured.sites[site], 1).float(), wanted, log, budget)
    results = _scores(path, fixed, tol)
    for prompt, result in zip(batch, results, strict=True):
        for name in ("scores", "gap", "probability"):
            expect_numbers(lm, result[name].reshape(1, -1), [prompt.ids], name)
    return results


def _summed(groups: Sequence[Sequence[Result]]) -> Attribution:
    """Return the attribution of each query: sums over the prompts of its tokens, and the first token's probability."""
    out = {f.name: torch.stack([group[0][f.name] for group in groups]) for f in fields(Attribution)}
    for query, group in enumerate(groups):
        for result in group[1:]:
            for name in ("scores", "gap", "nodes"):
                out[name][query] += result[name]
    return Attribution(**out)


def _fixed(quadrature: str | Sequence, steps: int | None) -> Rule | None:
    """Return the nodes and weights that were asked for; None where the rule is to adapt."""
    if not isinstance(quadrature, str):
        if steps is not None:
            raise ValueError("steps belong to a quadrature that has a name; the nodes given say how many there are")
        if not isinstance(quadrature, Sequence | np.ndarray | Tensor) or len(quadrature) != 2:
            raise ValueError(f"a quadrature is a name or a pair (nodes, weights), got {quadrature!r:.80}")
        nodes, weights = (checks.reals(x, what) for x, what in zip(quadrature, ("nodes", "weights"), strict=True))
        if len(nodes) != len(weights):
            raise ValueError(f"nodes and weights must be two lists of one length, got {len(nodes)} and {len(weights)}")
        if not ((nodes >= 0) & (nodes <= 1)).all() or not np.isfinite(weights).all():
            raise ValueError("nodes must be from 0 to 1, the ends of the path, and weights finite numbers")
        return nodes, weights
    if quadrature == "gauss" and steps is None:
        return None
    return rule(quadrature, 20 if steps is None else steps)


Point = tuple[int, int, float]  # block, query, γ


@dataclass(frozen=True)
class _Path:
    """P, or log P, as a function of γ, for every block and query of one capture."""

    captured: Capture
    site: str
    states: Float[Tensor, "query block width"]
    wanted: Int[Tensor, " query"]
    log: bool
    budget: int

    def measure(
        self, logits: Float[Tensor, "row vocab"], queries: Int[Tensor, " row"], log: bool
    ) -> Float[Tensor, " row"]:
        logp = logits.log_softmax(-1).gather(1, self.wanted[queries][:, None])[:, 0]
        return logp if log else logp.exp()

    def after(self, changes: Sequence[Change], log: bool) -> Float[Tensor, " row"]:
        logits = replay(self.captured, changes)
        return self.measure(logits, torch.cat([change.prompts for change in changes]), log)

    def values(self, points: Sequence[Point]) -> list[float]:
        """Return P at points that rise in block."""
        with torch.no_grad():
            passes = [self.after(changes, self.log).tolist() for changes in self._changes(points)]
        return [value for values in passes for value in values]

    def slopes(self, points: Sequence[Point]) -> Float[Tensor, "point width"]:
        """Return the gradient of P with respect to the site's state, at points that rise in block."""
        out = []
        # The gradient of a small P is below what float16 can hold; that of log P is not, and dP = P · d(log P).
        narrow = self.captured.lm.dtype == torch.float16 and not self.log
        for changes in self._changes(points):
            states = [change.values.requires_grad_() for change in changes]
            p = self.after(changes, self.log or narrow)
            slopes = torch.cat(torch.autograd.grad(p.sum(), states)).float()
            out.append(slopes * p.detach().exp()[:, None] if narrow else slopes)
        return torch.cat(out)

    def _changes(self, points: Sequence[Point]) -> Iterator[list[Change]]:
        """Yield what is changed at points, in lists that fit the budget."""
        device, dtype = self.states.device, self.captured.lm.dtype
        for part in self.captured.parts(points, self.budget):
            changes = []
            for block, group in groupby(part, key=lambda point: point[0]):
                _, queries, gammas = zip(*group, strict=True)
                rows = torch.tensor(queries, device=device)
                values = torch.tensor(gammas, device=device)[:, None] * self.states[rows, block]
                changes.append(Change(block, rows, values.to(dtype), self.site))
            yield changes


class _Part(NamedTuple):
    """A part [a, b] of one path, with P at its ends."""

    block: int
    query: int
    a: float
    b: float
    p_a: float
    p_b: float


def _integrate(
    path: _Path, parts: list[_Part], nodes: np.ndarray, weights: np.ndarray
) -> list[tuple[_Part, Float[Tensor, " width"], float]]:
    """Return each part with its integral, as scores, and the completeness gap of this part alone."""
    points = [(part.block, part.query, part.a + (part.b - part.a) * node) for part in parts for node in nodes]
    slopes = path.slopes(points).view(len(parts), len(nodes), -1)
    integrals = torch.einsum("pnw,n->pw", slopes, torch.tensor(weights, dtype=slopes.dtype, device=slopes.device))
    panels = []
    for part, integral in zip(parts, integrals, strict=True):
        scores = (part.b - part.a) * integral * path.states[part.query, part.block]
        panels.append((part, scores, abs(float(scores.sum()) - (part.p_b - part.p_a))))
    return panels


def _split(path: _Path, parts: list[_Part]) -> list[_Part]:
    edges = {part: [part.a + i / SPLIT * (part.b - part.a) for i in range(1, SPLIT)] for part in parts}
    values = iter(path.values([(part.block, part.query, edge) for part in parts for edge in edges[part]]))
    out = []
    for part in parts:
        ends = [(part.a, part.p_a), *((edge, next(values)) for edge in edges[part]), (part.b, part.p_b)]
        for (a, p_a), (b, p_b) in pairwise(ends):
            out.append(_Part(part.block, part.query, a, b, p_a, p_b))
    return out


def _scores(path: _Path, fixed: Rule | None, tol: float) -> list[Result]:
    """Return the results for each query of one capture: panels of the paths, split until each is complete."""
    n_queries, n_blocks, _ = path.states.shape
    nodes, weights = fixed or rule("gauss", PANEL_NODES)
    noise = NOISE.get(path.captured.lm.dtype, 100) * torch.finfo(path.captured.lm.dtype).eps
    paths = [(block, query) for block in range(n_blocks) for query in range(n_queries)]
    p_zero = path.values([(*each, 0.0) for each in paths])
    every = torch.arange(n_queries, device=path.states.device)
    p_one = path.measure(path.captured.logits, every, path.log).tolist()
    parts = [_Part(*each, 0.0, 1.0, p, p_one[each[1]]) for each, p in zip(paths, p_zero, strict=True)]

    scores = torch.zeros_like(path.states)
    spent = torch.zeros(n_queries, n_blocks, dtype=torch.long)
    for depth in range(DEPTH):
        panels = _integrate(path, parts, nodes, weights)
        for part, share, _ in panels:
            scores[part.query, part.block] += share
            spent[part.query, part.block] += len(nodes)
        if fixed or depth == DEPTH - 1:
            break
        norms = scores.norm(dim=-1).tolist()
        incomplete = [
            (part, share)
            for part, share, gap in panels
            if gap > tol * norms[part.query][part.block] + noise * max(map(abs, part[-2:]))
        ]
        if not incomplete:
            break
        for part, share in incomplete:
            scores[part.query, part.block] -= share
        parts = _split(path, [part for part, _ in incomplete])

    logits = path.captured.logits
    wanted = path.wanted[:, None]
    change = torch.tensor(p_one)[:, None] - torch.tensor(p_zero).view(n_blocks, n_queries).T
    fields_of_queries = {
        "scores": scores,
        "gap": (scores.sum(-1).cpu() - change).abs(),
        "nodes": spent,
        "probability": logits.softmax(-1).gather(1, wanted)[:, 0],
        "rank": (logits > logits.gather(1, wanted)).sum(-1),
    }
    return [{name: value[query].cpu() for name, value in fields_of_queries.items()} for query in range(n_queries)]
