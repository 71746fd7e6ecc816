"""Editors: functions that are asked to write new answers into a model, under one interface.

A request is a `Query` with its subject, whose `target` is the present answer and whose `foil` is the new one. An editor
gives an `Edit` for each request: deltas for `edited`, or a text to put before prompts. It changes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from tqdm.auto import tqdm

from kncore import attribution, cache, finetune, interventions, memit, neurons, rome, tasks, tokens
from kncore.covariance import covariance
from kncore.interventions import Delta
from kncore.models import LM
from kncore.replay import capture
from kncore.tasks import MASK, Query

CODE = (
    *("arch", "attribution", "covariance", "editors", "finetune", "interventions", "memit", "neurons", "replay"),
    *("rome", "tokens"),
)
BATCH = 16  # requests between two writes to the store


@dataclass(frozen=True)
class Edit:
    """What an editor gives: `deltas`, or a `context` to put before every prompt, or why it `failed`, in words."""

    deltas: tuple[Delta, ...] = ()
    context: str = ""
    failed: str = ""


def edit(lm: LM, requests: Sequence[Query], editor: str = "rome", progress: bool = False) -> list[Edit]:
    """An edit for each request by a named editor, with its settings for this model.

    Each is computed as if alone, but for "memit", which writes all requests together: one and the same edit for all.
    What was computed is stored, and found again after an interrupt. Inside `edited`, edits are those of the edited
    model. Raises ValueError for an unknown editor, no requests, and what the editor raises.
    """
    if editor not in EDITORS:
        raise tasks.unknown("editor", editor, EDITORS)
    if not requests:
        raise ValueError("no requests to edit; give at least one")
    return EDITORS[editor](lm, requests, progress=progress)


def rome_edits(
    lm: LM, requests: Sequence[Query], settings: rome.Hyper | None = None, progress: bool = False
) -> list[Edit]:
    """ROME (Meng et al. 2022); by default with the model's own hyperparameters."""
    settings = settings or rome.hyper(lm)
    moment = covariance(lm, settings.block, settings.covariance)

    def write(found: rome.Search) -> Edit:
        try:
            return Edit(failed=found.failed) if found.failed else Edit((rome.delta(found, moment, settings.block),))
        except ValueError as error:
            return Edit(failed=str(error))

    return [write(found) for found in _searched(lm, requests, settings, progress)]


def rome_identity(lm: LM, requests: Sequence[Query], progress: bool = False) -> list[Edit]:
    """ROME with C = 1, as the published code of Niu et al. ran it."""
    return rome_edits(lm, requests, replace(rome.hyper(lm), covariance="identity"), progress)


def fine_tuning(
    lm: LM, requests: Sequence[Query], settings: finetune.Hyper | None = None, progress: bool = False
) -> list[Edit]:
    """FT-L (Meng et al. 2022) at ROME's block."""
    settings = settings or finetune.Hyper(rome.hyper(lm).block)

    def make(some):
        found = finetune.finetune(lm, some, settings)
        return [Edit(failed=one) if isinstance(one, str) else Edit((one,)) for one in found]

    return _stored(lm, requests, ["fine-tuning", asdict(settings)], make, progress)


def neuron_edits(lm: LM, requests: Sequence[Query], scale: float = 0.1, progress: bool = False) -> list[Edit]:
    """The value update of Dai et al. 2022 on the fact's knowledge neurons: old answer out, eight times the new one in,
    both times `scale` (1 as published).

    The neurons are the refined ones of the relation's templates, or of the request alone where its relation is unknown.
    Those that are negative where the answer is due are updated with the opposite sign: as published, the update
    supposes positive neurons.
    """

    def make(some):
        return [_neuron_edit(lm, request, scale) for request in some]

    return _stored(lm, requests, ["neurons", scale], make, progress)


def _neuron_edit(lm: LM, request: Query, scale: float) -> Edit:
    asked = [request]
    if request.task in tasks.relations() and not request.masked:
        relation = tasks.describe(request.task)
        asked = [tasks.ask(relation, (request.subject, request.target), text) for text in relation.templates]
    scores = attribution.attribute(lm, asked).scores
    chosen = neurons.find_neurons(scores).neurons or [neurons.top(scores.mean(0), 1)[0][0]]
    states = capture(lm, [tokens.encode(lm, query) for query in asked]).sites["neuron"]
    deltas = interventions.value_update(lm, request, request.foil, chosen, (scale, 8 * scale))
    signs = [states[delta.block].mean(0).sign().to(delta.neurons) for delta in deltas]
    return Edit(tuple(replace(d, neurons=d.neurons * sign) for d, sign in zip(deltas, signs, strict=True)))


def in_context(lm: LM, requests: Sequence[Query], progress: bool = False) -> list[Edit]:
    """The new fact stated before the prompt; no weight changes."""
    _check(requests)
    return [
        Edit(context=f"{r.prompt.replace(MASK, r.foil)} " if r.masked else f"{r.prompt} {r.foil}. ") for r in requests
    ]


def memit_edits(
    lm: LM, requests: Sequence[Query], settings: memit.Hyper | None = None, progress: bool = False
) -> list[Edit]:
    """MEMIT (Meng et al. 2023): all requests at once, over the three blocks up to ROME's."""
    base = rome.hyper(lm)
    settings = settings or memit.Hyper(max(0, base.block - 2), base.block)
    memit.check(lm, settings)
    found = _searched(lm, requests, replace(base, block=settings.last), progress)
    usable = [i for i, one in enumerate(found) if not one.failed]
    if not usable:
        return [Edit(failed=one.failed) for one in found]
    moments = [covariance(lm, block, base.covariance) for block in range(settings.first, settings.last + 1)]
    asked = [rome.contexts(requests[i], base.prefixes)[:-1] for i in usable]
    changes = torch.stack([found[i].change for i in usable])
    try:
        whole = Edit(tuple(memit.memit(lm, asked, changes, moments, settings)))
    except ValueError as error:
        whole = Edit(failed=str(error))
    return [Edit(failed=one.failed) if one.failed else whole for one in found]


EDITORS: dict[str, Callable[..., list[Edit]]] = {
    "rome": rome_edits,
    "rome-identity": rome_identity,
    "memit": memit_edits,
    "fine-tuning": fine_tuning,
    "neurons": neuron_edits,
    "context": in_context,
}


def _searched(lm: LM, requests: Sequence[Query], settings: rome.Hyper, progress: bool) -> list[rome.Search]:
    """Searches of v*, which do not depend on the covariance, from the store where they are there."""
    told = ["rome", {**asdict(settings), "covariance": ""}]

    def make(some):
        return rome.search(lm, some, settings)

    return _stored(lm, requests, told, make, progress)


def _check(requests: Sequence[Query]) -> None:
    for request in requests:
        tokens.expect(request)
        if not request.foil:
            raise ValueError(f"the request {request.prompt!r} has no new answer; give it as the foil")


def _stored(lm: LM, requests: Sequence[Query], told: list, make: Callable, progress: bool) -> list:
    """What `make` gives for each request, from the store where it is there; written batch by batch."""
    _check(requests)
    folder = None if lm.touched else cache.scores_folder()
    keys = [cache.name(lm, {"edit": told, "request": list(asdict(request).values())}, CODE) for request in requests]
    found = [_load(cache.read(folder, key), lm.device) if folder else None for key in keys]
    todo = [i for i, one in enumerate(found) if one is None]
    with tqdm(total=len(todo), desc="edit", unit="request", leave=False, disable=not progress) as bar:
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            for i, one in zip(part, make([requests[i] for i in part]), strict=True):
                found[i] = one
                if folder:
                    cache.write(folder, keys[i], _dump(one))
            bar.update(len(part))
    return found


def _dump(one: Edit | rome.Search) -> dict[str, torch.Tensor]:
    failed = torch.tensor(list(one.failed.encode()), dtype=torch.uint8)
    if isinstance(one, rome.Search):
        numbers = torch.tensor([one.steps, one.before, one.probability], dtype=torch.float64)
        states = {name: getattr(one, name) for name in ("key", "mean_key", "value", "change")}
        return {"failed": failed, "numbers": numbers, **states}
    out = {"failed": failed, "blocks": torch.tensor([delta.block for delta in one.deltas], dtype=torch.long)}
    for i, delta in enumerate(one.deltas):
        out |= {f"neurons{i}": delta.neurons, f"hidden{i}": delta.hidden.clone()}
    return out


def _load(stored: dict[str, torch.Tensor] | None, device: torch.device) -> Edit | rome.Search | None:
    if stored is None:
        return None
    stored = {name: value.to(device) for name, value in stored.items()}
    failed = bytes(stored["failed"].tolist()).decode()
    if "numbers" in stored:
        steps, before, probability = stored["numbers"].tolist()
        states = [stored[name] for name in ("key", "mean_key", "value", "change")]
        return rome.Search(*states, int(steps), before, probability, failed)
    blocks = enumerate(stored["blocks"].tolist())
    return Edit(tuple(Delta(block, stored[f"neurons{i}"], stored[f"hidden{i}"]) for i, block in blocks), failed=failed)
