"""Constrained fine-tuning (FT-L): the baseline of Meng et al. 2022, appendix C, on the value vectors of one block.

Gradient descent on the negative log-likelihood of the new answer, with every weight kept within a limit of where it
was. Requests share batches, each row with weights of its own; the blocks below the edited one run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kncore import arch, checks, editing, tokens
from kncore.interventions import Delta
from kncore.models import LM
from kncore.query import Query
from kncore.replay import Change, capture, states
from kncore.store import state


@dataclass(frozen=True)
class HParams(editing.Settings):
    """`block` is changed, by at most `steps` steps of Adam with rate `lr`, no weight by more than `limit`, until the
    negative log-likelihood of the answer is below `stop` (nats per token).

    Raises ValueError for a setting out of its range; of `block`, only `finetune` can tell.
    """

    block: int
    steps: int = 25
    lr: float = 2e-3
    limit: float = 1e-2
    stop: float = 0.05


def prompt(lm: LM, request: Query) -> tokens.Encoded:
    """Return all that fine-tuning reads of a request: its token ids, with the new answer as their target; of a causal
    model the answer's tokens but the last stand after the prompt."""
    encoded = tokens.encode(lm, request, request.foil)
    return encoded if lm.spec.masked else replace(encoded, ids=encoded.ids + encoded.target[:-1])


@state.computes(grad=True)
def finetune(lm: LM, requests: Iterable[Query], settings: HParams) -> list[Delta | str]:
    """Return the change for each request as if alone, of full rank; or why there is none, in words.

    A request's `foil` is the answer to install. Raises ValueError for a block that does not exist, no requests, and a
    request without a new answer; TypeError for one that is no Query.
    """
    checks.block(lm, settings.block)
    requests = editing.requests(requests)
    batch = [(prompt(lm, request), editing.same(lm, request)) for request in requests]
    return editing.together(lambda some: _finetune(lm, *zip(*some, strict=True), settings), batch)


def _finetune(lm: LM, encoded: Sequence[tokens.Encoded], same: Sequence[str], settings: HParams) -> list[Delta | str]:
    """Return as `finetune`, of what `prompt` and `editing.same` give for each request."""
    captured = capture(lm, encoded, sites=(), start=[0] * len(encoded))
    rows = torch.arange(len(encoded), device=lm.device)
    # Rows enter at the edited block with what they had there: nothing is changed but the weights.
    enter = Change(settings.block, rows, captured.inputs[settings.block][:, 0], "residual", torch.zeros_like(rows))
    shape = arch.value_vectors(lm.model, lm.spec, settings.block).shape
    change = torch.zeros(len(encoded), *shape, device=lm.device, requires_grad=True)
    answers = [(row, e.position, e.target) for row, e in enumerate(encoded)]

    def add(module, args, out):
        return out + args[0] @ change.to(out.dtype)

    def evaluate(active: Int[Tensor, " active"], *_) -> tuple[Float[Tensor, " active"], ...]:
        with arch.projection(lm.model, lm.spec, settings.block).register_forward_hook(add):
            out = states(captured, [enter])
        losses, says = editing.likelihood(lm, out, answers, rows)
        return losses[active], losses[active], says[active]

    def bound(active: Int[Tensor, " active"]) -> Bool[Tensor, " active"]:
        change.clamp_(-settings.limit, settings.limit)
        return change[active].isfinite().flatten(1).all(1)

    searched = rows[[not nothing for nothing in same]]
    found, steps, _, losses = editing.descend(change, searched, settings, evaluate, bound)
    hidden, site = torch.eye(shape[1], device=lm.device), f"the value vectors of block {settings.block}"
    return [
        nothing
        or editing.verdict(of_request, loss, step, "fine-tuning", site)
        or Delta(settings.block, of_request.T.contiguous(), hidden)
        for nothing, of_request, step, loss in zip(same, found, steps.tolist(), losses, strict=True)
    ]
