"""What editors share: settings, requests, a descent on losses, and batches in which each request counts as if alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kncore import checks, tokens
from kncore.models import LM
from kncore.query import Query

SETTINGS: dict[str, Callable] = {
    **dict.fromkeys(("block", "first", "last"), checks.whole),  # whether there is such a block, only a model can tell
    **dict.fromkeys(("decay", "kl", "stop"), checks.setting),
    **dict.fromkeys(("clamp", "limit"), partial(checks.setting, above=True, endless=True)),
    "steps": partial(checks.whole, low=1),
    "lr": partial(checks.setting, above=True, most=1e30),  # beyond it steps of Adam are no numbers
    "weight": partial(checks.setting, above=True),
    "prefixes": partial(checks.whole, low=0),  # how many there are, `rome.contexts` can tell
    "covariance": lambda x, what: str(x),
}


class Settings:
    """Hyperparameters of an editor, held as plain numbers. Raises ValueError for one that `SETTINGS` refuses."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in SETTINGS:
                object.__setattr__(self, field.name, SETTINGS[field.name](getattr(self, field.name), field.name))


def requests(given: Iterable[Query]) -> list[Query]:
    """Return requests from any iterable as a list.

    Raises ValueError for none and for one without a new answer, TypeError for what is no Query.
    """
    queries = checks.items(given, Query, "requests", 1)
    for query in queries:
        if not query.foil:
            raise ValueError(f"the request {query.prompt!r} has no new answer; give it as the foil")
    return queries


def same(lm: LM, request: Query) -> str:
    """Return that the present and the new answer are the same tokens, where they are; or ""."""
    old, new = (tokens.encode(lm, request, word).target for word in (request.target, request.foil))
    return f"the new answer and the present one are the same tokens for {lm.name}" if old == new else ""


def together(make: Callable[[Sequence], list], batch: Sequence) -> list:
    """Return what `make` gives for a batch of requests.

    Where it raises ValueError for one of them, return what it gives for each alone, and the error's text for that one.
    """
    try:
        return make(batch)
    except ValueError as error:
        return [str(error)] if len(batch) == 1 else [result for item in batch for result in together(make, [item])]


def likelihood(
    lm: LM,
    out: Float[Tensor, "row token hidden"],
    answers: Sequence[tuple[int, int, Sequence[int]]],
    owner: Int[Tensor, " row"],
) -> tuple[Float[Tensor, " request"], Bool[Tensor, " request"]]:
    """Return the negative log-likelihood of each request's answer, in nats per token, the mean over its prompts; and
    whether every token of it is the most probable one after the first prompt.

    `out` holds rows, of the requests 0, 1, … that `owner` names in order; `answers` are rows, positions that predict
    the first token, and tokens, as many for all prompts of a request.
    """
    wanted = [(row, at + k, token) for row, at, answer in answers for k, token in enumerate(answer)]
    row, position, token = torch.tensor(wanted, device=lm.device).T
    request, first = owner[row], torch.searchsorted(owner, owner[row])  # the first row of the request
    logits = lm.readout(out[row, position]).float()
    logp = logits.log_softmax(-1)[range(len(token)), token]
    none = torch.zeros(int(owner[-1]) + 1, device=lm.device)
    losses = none.index_add(0, request, -logp) / none.index_add(0, request, torch.ones_like(logp))
    missed = (logits.argmax(-1) != token) & (row == first)
    return losses, none.index_add(0, request, missed.float()) == 0


def descend(
    change: Float[Tensor, "request ..."],
    active: Int[Tensor, " active"],
    settings: Settings,
    evaluate: Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]],
    bound: Callable[[Tensor], Tensor],
    move: Callable[[Tensor, Tensor, int], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the changes that are found for the active requests, the steps taken, and the losses before and after.

    Steps are those of Adam, or of `move`, which is given requests, their losses and the number of the step, and may
    count on losses of a part of the prompts: `evaluate` is told of which requests they must be `whole`, namely before
    the first step, after one at which the loss was low, and after the last; with Adam always. A search ends where a
    whole loss is below `settings.stop`, or where the model says the answer before any step. Of the active requests
    `evaluate` gives, at a step, their losses, what is minimised, and whether the answer is said; `bound` keeps `change`
    within its bounds, and tells which requests it is still numbers for.
    """
    optimiser = None if move else torch.optim.Adam([change], lr=settings.lr)
    best, steps = torch.zeros_like(change), torch.zeros(len(change), dtype=torch.long)
    before = loss = torch.full((len(change),), torch.nan, device=change.device)
    whole = torch.ones_like(active, dtype=torch.bool)
    for step in range(settings.steps + 1):
        if not len(active):
            break
        losses, total, says = evaluate(active, step, whole)
        with torch.no_grad():
            best[active], loss[active], steps[active.cpu()] = change[active], losses, step
        low = losses < settings.stop
        unfinished = torch.isfinite(losses) & ~(low & whole)
        if step == 0:
            before, unfinished = loss.clone(), unfinished & ~says
        if step == settings.steps or not bool(unfinished.any()):
            break
        change.grad = None
        total[unfinished].sum().backward()
        if move:
            move(active[unfinished], losses.detach()[unfinished], step)
        else:
            optimiser.step()
        with torch.no_grad():
            sound = bound(active)
        lost = active[unfinished & ~sound]
        loss[lost], steps[lost.cpu()] = torch.nan, step + 1
        left = unfinished & sound
        active, whole = active[left], (low | (not move) | (step + 1 == settings.steps))[left]
    return best, steps, before, loss


def verdict(change: Tensor, loss: Tensor, steps: int, method: str, site: str, length: str = "rate") -> str:
    """Return why a change that a `method` found after some steps is not to be used, with the loss there; or "". What
    the length of its steps goes by is called `length`."""
    if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(change).all()):
        if not steps:
            return "the probability of the new answer is not a number before any change; check the model's weights"
        return f"{method} diverged after {steps} steps; use a smaller {length}"
    if not steps:
        return "the model gives the new answer already; there is nothing to write"
    return "" if bool(change.any()) else f"the answer does not depend on {site}: none is changed"
