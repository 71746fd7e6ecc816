"""What editors are given, requests and settings, as they need it; or one line that says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from kncore import checks, tokens
from kncore.models import LM
from kncore.tasks import Query


def rate(x) -> float:
    """The rate of Adam as Python's float. Raises ValueError unless it is above 0, and such that a step is a number."""
    if number(x, "lr", above=True) > 1e30:
        raise ValueError(f"lr must be a rate that leaves numbers, at most 1e30, got {x!r:.80}")
    return float(x)


def number(x, what: str, *, above: bool = False, endless: bool = False) -> float:
    """A setting as Python's float. Raises ValueError unless it is a number of at least 0 (`above`: more than 0), finite
    unless it may be `endless`."""
    if endless and isinstance(x, float) and x == math.inf:
        return math.inf
    found = math.nan if isinstance(x, bool) else checks.finite(x, what, torch.float32)
    if not (found > 0 if above else found >= 0):
        raise ValueError(f"{what} must be a number {'above 0' if above else 'of at least 0'}, got {x!r:.80}")
    return found


def block(lm: LM, x) -> int:
    """The number of a block as Python's int. Raises ValueError for one that does not exist."""
    found = checks.whole(x, "block")
    if not 0 <= found < len(lm.blocks):
        raise ValueError(f"block {found} does not exist; {lm.name} has blocks 0 to {len(lm.blocks) - 1}")
    return found


def requests(some: Iterable[Query]) -> list[Query]:
    """Requests from any iterable, as a list.

    Raises ValueError for none and for one without a new answer, TypeError for what is no Query.
    """
    some = checks.items(some, Query, "requests")
    if not some:
        raise ValueError("no requests to edit; give at least one")
    for request in some:
        if not request.foil:
            raise ValueError(f"the request {request.prompt!r} has no new answer; give it as the foil")
    return some


def alike(lm: LM, request: Query) -> str:
    """What the tokens of the present and the new answer have in common: "all", the "first", or ""."""
    old, new = (tokens.encode(lm, request, word).target for word in (request.target, request.foil))
    return "all" if old == new else "first" if old[0] == new[0] else ""


def together(make: Callable[[Sequence], list], some: Sequence) -> list:
    """What `make` gives for requests together; where it raises ValueError for one of them, what it gives for each
    alone, and the error's text for that one."""
    try:
        return make(some)
    except ValueError as error:
        return [str(error)] if len(some) == 1 else [found for one in some for found in together(make, [one])]
