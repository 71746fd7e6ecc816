"""Constrained fine-tuning (FT-L): the baseline of Meng et al. 2022, appendix C, on the value vectors of one block.

Gradient descent on the negative log-likelihood of the new answer, with every weight kept within a limit of where it
was. Requests share batches, each row with weights of its own; the blocks below the edited one run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kncore import arch, checks, editing, state, tokens
from kncore.interventions import Delta
from kncore.models import LM
from kncore.replay import Change, capture, states
from kncore.tasks import Query


@dataclass(frozen=True)
class Hyper:
    """`block` is changed, by at most `steps` steps of Adam with rate `lr`, no weight by more than `limit`, until the
    negative log-likelihood of the answer is below `stop` (nats per token).

    Raises ValueError for a setting out of its range; of `block`, only `finetune` can tell.
    """

    block: int
    steps: int = 25
    lr: float = 2e-3
    limit: float = 1e-2
    stop: float = 0.05

    def __post_init__(self) -> None:
        plain = {
            "block": checks.whole(self.block, "block"),
            "steps": checks.whole(self.steps, "steps", 1),
            "lr": editing.rate(self.lr),
            "limit": editing.number(self.limit, "limit", above=True, endless=True),
            "stop": editing.number(self.stop, "stop"),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


def prompt(lm: LM, request: Query) -> tokens.Encoded:
    """All that fine-tuning reads of a request: its token ids, with the new answer as their target; of a causal model
    the answer's tokens but the last stand after the prompt."""
    encoded = tokens.encode(lm, request, request.foil)
    return encoded if lm.spec.masked else replace(encoded, ids=encoded.ids + encoded.target[:-1])


@state.computes(grad=True)
def finetune(lm: LM, requests: Iterable[Query], settings: Hyper) -> list[Delta | str]:
    """The change for each request as if alone, of full rank; or why there is none, in words.

    A request's `foil` is the answer to install. Raises ValueError for a block that does not exist, no requests, and a
    request without a new answer; TypeError for one that is no Query.
    """
    editing.block(lm, settings.block)
    requests = editing.requests(requests)
    same = [editing.alike(lm, request) == "all" for request in requests]
    encoded = [prompt(lm, request) for request in requests]
    return editing.together(lambda some: _finetune(lm, some, settings), list(zip(encoded, same, strict=True)))


def _finetune(lm: LM, some: Sequence[tuple[tokens.Encoded, bool]], settings: Hyper) -> list[Delta | str]:
    """`some`: what `prompt` gives for each request, and whether its new answer has the tokens of the old one."""
    encoded, same = zip(*some, strict=True)
    captured = capture(lm, encoded, sites=(), start=[0] * len(encoded))
    rows = torch.arange(len(encoded), device=lm.device)
    # Rows enter at the edited block with what they had there: nothing is changed but the weights.
    enter = Change(settings.block, rows, captured.inputs[settings.block][:, 0], "residual", torch.zeros_like(rows))
    shape = arch.value_vectors(lm.model, lm.spec, settings.block).shape
    change = torch.zeros(len(encoded), *shape, device=lm.device, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=settings.lr)
    row = torch.tensor([r for r, e in enumerate(encoded) for _ in e.target], device=lm.device)
    at = torch.tensor([e.position + k for e in encoded for k in range(len(e.target))], device=lm.device)
    wanted = torch.tensor([token for e in encoded for token in e.target], device=lm.device)
    weight = torch.tensor([1 / len(e.target) for e in encoded for _ in e.target], device=lm.device)
    best = torch.zeros_like(change)
    steps, last = torch.zeros(len(encoded), dtype=torch.long), torch.full((len(encoded),), float("nan"))
    active = ~torch.tensor(same)
    for step in range(settings.steps + 1):
        with _added(lm, settings.block, change):
            out = states(captured, [enter])
        logits = lm.readout(out[row, at]).float()
        logp = logits.log_softmax(-1)[range(len(wanted)), wanted]
        losses = torch.zeros(len(encoded), device=lm.device).index_add(0, row, -logp * weight)
        with torch.no_grad():
            best[active], steps[active], last[active] = change[active], step, losses[active].cpu()
        active = active & torch.isfinite(losses).cpu() & (losses >= settings.stop).cpu()
        if step == 0:  # of what the model says already, nothing is to be written
            missed = row[logits.argmax(-1) != wanted].cpu()
            active = active & torch.isin(torch.arange(len(encoded)), missed)
        if step == settings.steps or not bool(active.any()):
            break
        optimiser.zero_grad()
        losses[active].sum().backward()
        optimiser.step()
        with torch.no_grad():
            change.clamp_(-settings.limit, settings.limit)
    hidden = torch.eye(shape[1], device=lm.device)
    out = []
    for one, step, loss, nothing in zip(best.detach(), steps, last, same, strict=True):
        if nothing:
            out.append(f"the new answer and the present one are the same tokens for {lm.name}")
        elif not step and not bool(torch.isfinite(loss)):
            out.append("the probability of the new answer is not a number before any change; check the model's weights")
        elif not bool(torch.isfinite(loss)) or not bool(one.isfinite().all()):
            out.append(f"fine-tuning diverged after {int(step)} steps; use a smaller rate")
        elif not step:
            out.append("the model gives the new answer already; there is nothing to write")
        elif not bool(one.any()):
            out.append(f"the answer does not depend on the value vectors of block {settings.block}: none has changed")
        else:
            out.append(Delta(settings.block, one.T.contiguous(), hidden))
    return out


class _added:
    """Row r of the batch runs with its own change of the value vectors; gradients reach it."""

    def __init__(self, lm: LM, block: int, change: Float[Tensor, "row neuron hidden"]):
        self.module, self.change = arch.projection(lm.model, lm.spec, block), change

    def __enter__(self):
        self.hook = self.module.register_forward_hook(lambda _, args, out: out + args[0] @ self.change.to(out.dtype))

    def __exit__(self, *_):
        self.hook.remove()
