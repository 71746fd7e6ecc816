"""Quadratures on [0, 1]: the nodes and weights of the literature, and the rule that adapts to each path.

A node of a path gives the slope of P along the path and P itself. So every interval between two neighbouring nodes has
a completeness gap of its own, for nothing: what the rule integrates there, less the difference of P. The adaptive rule
starts with few nodes, integrates on each interval the polynomial through the nodes nearest to it, and puts a node into
the middle of the intervals with the largest gaps, until all gaps add up to no more than is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from kncore import checks

Rule = tuple[np.ndarray, np.ndarray]  # nodes in [0, 1], and their weights

# The five Gauss-Lobatto nodes, exact to degree 7: at 0, P is wanted anyway, and at 1 one pass serves all blocks.
START = (0.0, 0.17267316464601146, 0.5, 0.8273268353539885, 1.0)
NEAREST = 8
# Close to 0, P may rise and fall again between two nodes, where no gap shows it. So intervals of a path that is not
# smooth are no wider than this, or than this share of their distance from 0.
NARROW = 0.01
SHARE = 0.6
CANCEL = 2
SMALLEST = 1e-5
MOST = 256


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


def asked(quadrature: str | Sequence, steps: int | None) -> Rule | None:
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


def local(nodes: Float[np.ndarray, " node"]) -> Float[np.ndarray, "interval node"]:
    """Return weights that integrate, on each interval between nodes, the polynomial through those nearest to it.

    As many on either side, as far as there are; the integral of the whole path has the sum of the rows as weights.
    """
    n_nodes = len(nodes)
    most = min(NEAREST, n_nodes)
    first = np.clip(np.arange(n_nodes - 1) - (most // 2 - 1), 0, n_nodes - most)
    near = first[:, None] + np.arange(most)
    inner, share = rule("gauss", NEAREST // 2)  # exact for the degree of the polynomials
    x = nodes[near]
    widths = np.diff(nodes)
    at = nodes[:-1, None] + widths[:, None] * inner
    # Lagrange: what is 1 at node j and 0 at the others is the product over k != j of (at - x_k) / (x_j - x_k).
    own = np.eye(most, dtype=bool)
    above = np.where(own, 1, at[:, :, None, None] - x[:, None, None, :]).prod(-1)
    below = np.where(own, 1, x[:, :, None] - x[:, None, :]).prod(-1)
    out = np.zeros((n_nodes - 1, n_nodes))
    np.put_along_axis(out, near, widths[:, None] * np.einsum("iqj,q->ij", above, share) / below, 1)
    return out


def middles(
    nodes: Float[np.ndarray, " node"], gaps: Float[np.ndarray, " interval"], allowed: float
) -> Float[np.ndarray, " new"]:
    """Return the middles of the intervals with the largest gaps; the gaps of the others add up to at most `allowed`.

    While one polynomial runs through all nodes, errors of intervals cancel: CANCEL times as much is allowed, and all
    are split or none. On a path that needs more nodes, intervals that are wide for their distance from 0 are split
    too. Nothing is put into an interval that is too small, nor to a path that has the most nodes.
    """
    widths, order, few = np.diff(nodes), gaps.argsort(kind="stable"), len(nodes) <= NEAREST
    split = np.zeros(len(gaps), dtype=bool)
    split[order] = gaps[order].cumsum() > (CANCEL * allowed if few else allowed)
    if few:
        split[:] = split.any()
    elif split.any() or len(nodes) > 2 * len(START) - 1:
        split |= widths > np.maximum(NARROW, SHARE * nodes[:-1])
    split &= widths > SMALLEST
    return (nodes[:-1] + widths / 2)[split][: max(0, MOST - len(nodes))]
