"""Editors: functions that are asked to write new answers into a model, under one interface.

A request is a `Query` with its subject, whose `target` is the present answer and whose `foil` is the new one. An editor
gives an `Edit` for each request: deltas for `edited`, or a text to put before prompts. It changes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from tqdm.auto import tqdm

from kncore import attribution, cache, editing, finetune, interventions, memit, neurons, rome, tasks, tokens
from kncore.covariance import covariance
from kncore.interventions import Delta
from kncore.models import LM
from kncore.replay import capture
from kncore.tasks import MASK, Query

BATCH = 16  # requests between two writes to the store


@dataclass(frozen=True)
class Edit:
    """What an editor gives: `deltas`, or a `context` to put before every prompt, or why it `failed`, in words."""

    deltas: tuple[Delta, ...] = ()
    context: str = ""
    failed: str = ""


def edit(lm: LM, requests: Iterable[Query], editor: str = "rome", progress: bool = False) -> list[Edit]:
    """An edit for each request by a named editor, with its settings for this model.

    Each is computed as if alone, but for "memit", which writes all requests together: one and the same edit for all.
    What was computed is stored, and found again after an interrupt. Inside `edited`, edits are those of the edited
    model. Raises ValueError for an unknown editor, no requests, one without a new answer, and what the editor raises;
    TypeError for a request that is no Query.
    """
    if not isinstance(editor, str) or editor not in EDITORS:
        raise tasks.unknown("editor", editor, EDITORS)
    return EDITORS[editor](lm, requests, progress=progress)


def written(*deltas: Delta) -> Edit:
    """The edit of some deltas; one that failed where they would change nothing."""
    if not any(bool(delta.neurons.any() & delta.hidden.any()) for delta in deltas):
        return Edit(failed="the change of the weights is zero; there is nothing to write")
    return Edit(deltas)


def rome_edits(
    lm: LM, requests: Iterable[Query], settings: rome.Hyper | None = None, progress: bool = False
) -> list[Edit]:
    """ROME (Meng et al. 2022), by default with the model's own hyperparameters: one key in both places."""
    settings = settings or rome.hyper(lm)
    requests = editing.requests(requests)
    moment = covariance(lm, settings.block, settings.covariance)

    def write(found: rome.Search) -> Edit:
        try:
            return written(rome.delta(found, moment, settings.block, settings.key))
        except ValueError as error:
            return Edit(failed=str(error))

    return [write(found) for found in _searched(lm, requests, settings, progress)]


def rome_published(lm: LM, requests: Iterable[Query], progress: bool = False) -> list[Edit]:
    """ROME with the mix of two keys of the published code (see `rome.delta`); the covariance as in the settings."""
    return rome_edits(lm, requests, replace(rome.hyper(lm), key="published"), progress)


def rome_identity(lm: LM, requests: Iterable[Query], progress: bool = False) -> list[Edit]:
    """ROME as the published code of Niu et al. ran it: C = 1, and the mix of two keys, for it took over the published
    implementation. "rome-published" differs in the covariance alone, "rome" in the key as well."""
    return rome_edits(lm, requests, replace(rome.hyper(lm), covariance="identity", key="published"), progress)


def fine_tuning(
    lm: LM, requests: Iterable[Query], settings: finetune.Hyper | None = None, progress: bool = False
) -> list[Edit]:
    """FT-L (Meng et al. 2022) at ROME's block."""
    settings = settings or finetune.Hyper(rome.hyper(lm).block)

    def make(some):
        found = finetune.finetune(lm, some, settings)
        return [Edit(failed=one) if isinstance(one, str) else written(one) for one in found]

    def read(request):
        return [asdict(finetune.prompt(lm, request)), tokens.encode(lm, request).target]

    return _stored(lm, requests, {"settings": asdict(settings)}, finetune.finetune, make, read, progress)


def neuron_edits(lm: LM, requests: Iterable[Query], scale: float = 0.1, progress: bool = False) -> list[Edit]:
    """The value update of Dai et al. 2022 on the fact's knowledge neurons: old answer out, eight times the new one in,
    both times `scale` (1 as published).

    The neurons are the refined ones of the relation's templates, or of the request alone where its relation is unknown.
    Those that are negative where the answer is due are updated with the opposite sign: as published, the update
    supposes positive neurons. It knows the first token of an answer only. Raises ValueError for a scale that is no
    finite number above 0.
    """
    scale = editing.number(scale, "scale", above=True)

    def make(some):
        return [_neuron_edit(lm, request, scale) for request in some]

    def read(request):
        both = [tokens.encode(lm, request, word) for word in (request.target, request.foil)]
        return [
            asdict(encoded) for encoded in (*both, *(tokens.encode(lm, query) for query in neuron_queries(request)))
        ]

    return _stored(lm, requests, {"scale": scale}, _neuron_edit, make, read, progress)


def neuron_queries(request: Query) -> list[Query]:
    """What a neuron edit reads beside the request: all templates of its relation; the request alone where that is
    unknown, or a template does not fit the subject."""
    if request.task not in tasks.relations() or request.masked:
        return [request]
    relation = tasks.describe(request.task)
    return [tasks.ask(relation, (request.subject, request.target), text) for text in relation.templates]


def _neuron_edit(lm: LM, request: Query, scale: float) -> Edit:
    if editing.alike(lm, request):
        return Edit(failed="the present answer and the new one begin with the same token, and only that is written")
    new = tokens.encode(lm, request, request.foil)
    if int(capture(lm, [new], ()).logits[0].argmax()) == new.target[0]:
        return Edit(failed="the model gives the new answer already; there is nothing to write")
    asked = neuron_queries(request)
    scores = attribution.attribute(lm, asked).scores
    if not bool(scores.isfinite().all() & scores.any()):
        return Edit(failed="the scores of the neurons are zero, or not finite: no neuron bears on the answer")
    chosen = neurons.find_neurons(scores).neurons or [neurons.top(scores.mean(0), 1)[0][0]]
    states = capture(lm, [tokens.encode(lm, query) for query in asked]).sites["neuron"]
    deltas = interventions.value_update(lm, request, request.foil, chosen, (scale, 8 * scale))
    signs = [states[delta.block].mean(0).sign().to(delta.neurons) for delta in deltas]
    return written(*(replace(d, neurons=d.neurons * sign) for d, sign in zip(deltas, signs, strict=True)))


def in_context(lm: LM, requests: Iterable[Query], progress: bool = False) -> list[Edit]:
    """The new fact stated before the prompt; no weight changes."""
    requests = editing.requests(requests)
    stated = [r.prompt if r.masked else f"{r.prompt}{'' if r.joined else ' '}{MASK}." for r in requests]
    return [Edit(context=f"{text.replace(MASK, r.foil)} ") for text, r in zip(stated, requests, strict=True)]


def memit_edits(
    lm: LM, requests: Iterable[Query], settings: memit.Hyper | None = None, progress: bool = False
) -> list[Edit]:
    """MEMIT (Meng et al. 2023): all requests at once, over the three blocks up to ROME's."""
    base = rome.hyper(lm)
    settings = settings or memit.Hyper(max(0, base.block - 2), base.block)
    memit.check(lm, settings)
    requests = editing.requests(requests)
    found = _searched(lm, requests, replace(base, block=settings.last), progress)
    usable = [i for i, one in enumerate(found) if not one.failed]
    if not usable:
        return [Edit(failed=one.failed) for one in found]
    moments = [covariance(lm, block, base.covariance) for block in range(settings.first, settings.last + 1)]
    asked = [rome.contexts(requests[i], base.prefixes)[:-1] for i in usable]
    changes = torch.stack([found[i].change for i in usable])
    try:
        whole = written(*memit.memit(lm, asked, changes, moments, settings))
    except ValueError as error:
        whole = Edit(failed=str(error))
    return [Edit(failed=one.failed) if one.failed else whole for one in found]


EDITORS: dict[str, Callable[..., list[Edit]]] = {
    "rome": rome_edits,
    "rome-published": rome_published,
    "rome-identity": rome_identity,
    "memit": memit_edits,
    "fine-tuning": fine_tuning,
    "neurons": neuron_edits,
    "context": in_context,
}


def _searched(lm: LM, requests: Sequence[Query], settings: rome.Hyper, progress: bool) -> list[rome.Search]:
    """Searches of v*, which depend neither on the covariance nor on the key, from the store where they are there."""

    def make(some):
        return rome.search(lm, some, settings)

    def read(request):
        prompts = [[asdict(encoded), position] for encoded, position in rome.prompts(lm, request, settings)]
        return [*prompts, tokens.encode(lm, request).target]

    deciding = {name: value for name, value in asdict(settings).items() if name not in ("covariance", "key")}
    return _stored(lm, requests, {"settings": deciding}, rome.search, make, read, progress)


def _stored(
    lm: LM,
    requests: Iterable[Query],
    settings: dict,
    function: Callable,
    make: Callable,
    read: Callable,
    progress: bool,
) -> list:
    """What `make` gives for each of some requests, from the store where it is there; written batch by batch.

    `function` is the code that decides it, with `settings`; `read` gives all token ids that are read for a request.
    """
    requests = editing.requests(requests)
    kept = cache.store(lm, function)
    names = [kept.name({**settings, "read": read(request)}) for request in requests] if kept else []
    found = [_load(kept.read(name), lm.device) for name in names] if kept else [None] * len(requests)
    todo = [i for i, one in enumerate(found) if one is None]
    with tqdm(total=len(todo), desc="edit", unit="request", leave=False, disable=not progress) as bar:
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            for i, one in zip(part, make([requests[i] for i in part]), strict=True):
                found[i] = one
            if kept:
                kept.write({names[i]: _dump(found[i]) for i in part})
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
