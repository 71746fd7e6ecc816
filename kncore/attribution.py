"""Attribution: how much each neuron of each block contributes to the probability of a target (integrated gradients).

For neuron i of block l, with state a at the target position and P(γ) the probability of the target when that block's
neurons are set to γ·a,

    score_i = a_i · ∫₀¹ ∂P / ∂neuron_i dγ          (Dai et al. 2022, section 3.2; Niu et al. 2024, section 2)

so that the scores of a block add up to P(1) − P(0). This completeness says, on any part of the path, how good the
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
from tqdm.auto import tqdm

from kncore import cache, checks, state, tokens
from kncore.models import LM
from kncore.replay import Capture, Change, capture, expect_numbers, passes, replay
from kncore.tasks import Query

PANEL_NODES = 5
SPLIT = 4
DEPTH = 7
# Rounding noise of P, in units of the dtype's precision: at 100 a half precision would never split a path.
NOISE = {torch.float16: 16, torch.bfloat16: 16}


@dataclass(frozen=True)
class Attribution:
    """Scores of neurons for queries.

    `scores` as above, in units of P (or of log P where the whole target is attributed); `gap`, the completeness gap
    |Σ scores − (P(1) − P(0))|; `nodes`, how many gradients were taken; `probability` of the target's first token and
    its `rank` (0: it is the model's prediction).
    """

    scores: Float[Tensor, "query block neuron"]
    gap: Float[Tensor, "query block"]
    nodes: Int[Tensor, "query block"]
    probability: Float[Tensor, " query"]
    rank: Int[Tensor, " query"]


def rule(name: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a quadrature on [0, 1].

    Raises ValueError for an unknown name, and steps that are no whole number or too few.

    `gauss`: Gauss-Legendre. `riemann`: linspace(0, 1, steps) with weight 1/steps, as in the code of Niu et al. `left`:
    i/steps, as in Dai et al. `trapezoid`: linspace(0, 1, steps) with halved ends.
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

    quadrature: "gauss" without `steps` is adaptive: five Gauss-Legendre nodes on the path, and on each quarter of a
        part whose completeness gap exceeds `tol` times the Euclidean norm of the block's scores (plus the rounding
        noise of P). With `steps`, another name of `rule`, or a pair (nodes, weights), the nodes are fixed;
        `quadrature="riemann", steps=20, site="authors"` gives the scores of the published code.
    target: "first" attributes the probability of the target's first token; "all" the log-probability of the whole
        target: the sum, over its tokens, of the attribution of log P(token | prompt, tokens before it).
    budget: how many positions are held at once; less memory, smaller batches, same scores.
    store: keep results on disk, keyed by all that they depend on. A model that was changed after loading is neither
        looked up nor stored.

    Raises ValueError for an unknown site, quadrature or target mode, for nodes outside [0, 1], for queries the model
    cannot be asked, and where what it computes is no number; TypeError for what is no list of queries.
    """
    queries = checks.items(queries, Query, "queries")
    if not queries:
        raise ValueError("no queries to attribute; give at least one")
    if target not in ("first", "all"):
        raise ValueError(f"unknown target mode {target!r}: choose 'first' (token) or 'all' (tokens)")
    if site not in ("neuron", "authors"):
        raise ValueError(f"cannot attribute to site {site!r}; choose 'neuron' or 'authors'")
    tol, budget = checks.finite(tol, "tol"), checks.whole(budget, "budget", 1)
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol:g}")
    fixed = _fixed(quadrature, steps)
    encoded = [tokens.encode(lm, query) for query in queries]
    if target == "first":
        parts = [[replace(e, target=e.target[:1])] for e in encoded]
    else:
        parts = [tokens.steps(lm, e) for e in encoded]
    done: dict[tokens.Encoded, dict[str, Tensor] | None] = {part: None for group in parts for part in group}

    how = fixed or (PANEL_NODES, SPLIT, DEPTH, tol)
    settings = {"site": site, "target": target, "quadrature": [np.asarray(x).tolist() for x in how]}
    kept = cache.store(lm, _scores, capture) if store else None
    names = {}
    if kept:
        names = {part: kept.name({**settings, "query": [part.ids, part.position, part.target]}) for part in done}
        done.update({part: kept.read(name) for part, name in names.items()})

    todo = sorted((part for part, found in done.items() if found is None), key=lambda part: len(part.ids))
    at_once = max(1, budget // (len(lm.blocks) * (len(fixed[0]) if fixed else PANEL_NODES)))
    with tqdm(total=len(todo), desc="attribute", unit="prompt", leave=False, disable=not progress) as bar:
        for i in range(0, len(todo), at_once):
            batch = todo[i : i + at_once]
            captured = capture(lm, batch, sites=(site,))
            wanted = torch.tensor([part.target[0] for part in batch], device=lm.device)
            states = torch.stack(captured.sites[site], 1).float()
            path = _Path(captured, site, states, wanted, target == "all", budget)
            results = dict(zip(batch, _scores(path, fixed, tol), strict=True))
            for part, result in results.items():
                for name in ("scores", "gap", "probability"):
                    expect_numbers(lm, result[name].reshape(1, -1), [part.ids], name)
            done |= results
            if kept:
                kept.write({names[part]: result for part, result in results.items()})
            bar.update(len(batch))

    out = {f.name: torch.stack([done[group[0]][f.name] for group in parts]) for f in fields(Attribution)}
    for query, group in enumerate(parts):
        for part in group[1:]:
            for name in ("scores", "gap", "nodes"):
                out[name][query] += done[part][name]
    return Attribution(**out)


def _fixed(quadrature, steps: int | None) -> tuple[np.ndarray, np.ndarray] | None:
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


class _Point(NamedTuple):
    block: int
    query: int
    gamma: float


@dataclass(frozen=True)
class _Path:
    """P as a function of γ, for every block and query of one capture."""

    captured: Capture
    site: str
    states: Float[Tensor, "query block width"]
    wanted: Int[Tensor, " query"]
    log: bool
    budget: int

    def measure(self, logits: Float[Tensor, "row vocab"], queries: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        p = self.log_measure(logits, queries)
        return p if self.log else p.exp()

    def log_measure(self, logits: Float[Tensor, "row vocab"], queries: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        return logits.log_softmax(-1).gather(1, self.wanted[queries][:, None])[:, 0]

    def values(self, points: Sequence[_Point]) -> list[float]:
        """P at points that rise in block."""
        measured = []
        with torch.no_grad():
            for changes in passes(self.captured, self._changes(points), self.budget):
                measured += self.measure(replay(self.captured, changes), _prompts(changes)).tolist()
        return measured

    def slopes(self, points: Sequence[_Point]) -> Float[Tensor, "point width"]:
        """Gradient of P with respect to the site's state, at points that rise in block."""
        out = []
        # The gradient of a small P is below what float16 can hold; that of log P is not, and dP = P · d(log P).
        narrow = self.captured.lm.dtype == torch.float16 and not self.log
        for changes in passes(self.captured, self._changes(points), self.budget):
            changes = [replace(change, values=change.values.detach().requires_grad_()) for change in changes]
            measure = self.log_measure if narrow else self.measure
            p = measure(replay(self.captured, changes), _prompts(changes))
            slopes = torch.cat(torch.autograd.grad(p.sum(), [change.values for change in changes])).float()
            out.append(slopes * p.detach().exp()[:, None] if narrow else slopes)
        return torch.cat(out)

    def _changes(self, points: Sequence[_Point]) -> Iterator[Change]:
        device, dtype = self.states.device, self.captured.lm.dtype
        for block, group in groupby(points, key=lambda point: point.block):
            _, queries, gammas = zip(*group, strict=True)
            rows = torch.tensor(queries, device=device)
            values = torch.tensor(gammas, device=device)[:, None] * self.states[rows, block]
            yield Change(block, rows, values.to(dtype), self.site)


def _prompts(changes: Sequence[Change]) -> Int[Tensor, " row"]:
    return torch.cat([change.prompts for change in changes])


class _Part(NamedTuple):
    """A part [a, b] of one path, with P at its ends."""

    block: int
    query: int
    a: float
    b: float
    p_a: float
    p_b: float


class _Panel(NamedTuple):
    """A part that has been integrated; its gap is the completeness gap of this part alone."""

    part: _Part
    scores: Float[Tensor, " width"]
    gap: float


def _integrate(path: _Path, parts: list[_Part], nodes: np.ndarray, weights: np.ndarray) -> list[_Panel]:
    points = [_Point(part.block, part.query, part.a + (part.b - part.a) * node) for part in parts for node in nodes]
    slopes = path.slopes(points).view(len(parts), len(nodes), -1)
    integrals = torch.einsum("pnw,n->pw", slopes, torch.tensor(weights, dtype=slopes.dtype, device=slopes.device))
    panels = []
    for part, integral in zip(parts, integrals, strict=True):
        scores = (part.b - part.a) * integral * path.states[part.query, part.block]
        panels.append(_Panel(part, scores, abs(float(scores.sum()) - (part.p_b - part.p_a))))
    return panels


def _split(path: _Path, parts: list[_Part]) -> list[_Part]:
    edges = {part: [part.a + i / SPLIT * (part.b - part.a) for i in range(1, SPLIT)] for part in parts}
    values = iter(path.values([_Point(part.block, part.query, edge) for part in parts for edge in edges[part]]))
    out = []
    for part in parts:
        ends = [(part.a, part.p_a), *((edge, next(values)) for edge in edges[part]), (part.b, part.p_b)]
        for (a, p_a), (b, p_b) in pairwise(ends):
            out.append(_Part(part.block, part.query, a, b, p_a, p_b))
    return out


def _scores(path: _Path, fixed: tuple[np.ndarray, np.ndarray] | None, tol: float) -> list[dict[str, Tensor]]:
    """Results for each query of one capture: panels of the paths, split until each is complete."""
    n_queries, n_blocks, _ = path.states.shape
    nodes, weights = fixed or rule("gauss", PANEL_NODES)
    noise = NOISE.get(path.captured.lm.dtype, 100) * torch.finfo(path.captured.lm.dtype).eps
    starts = [_Point(block, query, 0.0) for block in range(n_blocks) for query in range(n_queries)]
    p_zero = path.values(starts)
    p_one = path.measure(path.captured.logits, torch.arange(n_queries, device=path.states.device)).tolist()
    parts = [_Part(*start[:2], 0.0, 1.0, p, p_one[start.query]) for start, p in zip(starts, p_zero, strict=True)]

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
        bad = [
            panel
            for panel in panels
            if panel.gap > tol * norms[panel.part.query][panel.part.block] + noise * max(map(abs, panel.part[-2:]))
        ]
        if not bad:
            break
        for part, share, _ in bad:
            scores[part.query, part.block] -= share
        parts = _split(path, [panel.part for panel in bad])

    change = torch.tensor(p_one)[:, None] - torch.tensor(p_zero).view(n_blocks, n_queries).T
    logits = path.captured.logits
    wanted = logits.gather(1, path.wanted[:, None])
    out = {
        "scores": scores,
        "gap": (scores.sum(-1).cpu() - change).abs(),
        "nodes": spent,
        "probability": logits.softmax(-1).gather(1, path.wanted[:, None])[:, 0],
        "rank": (logits > wanted).sum(-1),
    }
    return [{name: value[query].cpu() for name, value in out.items()} for query in range(n_queries)]
