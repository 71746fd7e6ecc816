"""Editors: functions that are asked to write new answers into a model, under one interface.

A request is a `Query` with its subject, whose `target` is the present answer and whose `foil` is the new one. An editor
gives an `Edit` for each request: deltas for `edited`, or a text to put before prompts. It changes nothing itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from kncore import attribution, checks, editing, finetune, interventions, memit, neurons, rome, tokens
from kncore.covariance import Moment, covariance, factor
from kncore.interventions import Delta
from kncore.models import LM
from kncore.query import MASK, Query
from kncore.replay import capture
from kncore.store.results import Result, stored

BATCH = 16  # requests between two writes to the store
STATES = ("key", "mean_key", "value", "change")  # of a search

Paraphrases = Callable[[Query], Sequence[Query]] | None  # other ways to ask what a request asks


@dataclass(frozen=True)
class Edit:
    """What an editor gives: `deltas`, or a `context` to put before every prompt, or why it `failed`, in words."""

    deltas: tuple[Delta, ...] = ()
    context: str = ""
    failed: str = ""


def edit(
    lm: LM, requests: Iterable[Query], editor: str = "rome", progress: bool = False, paraphrases: Paraphrases = None
) -> list[Edit]:
    """Return an edit for each request by a named editor, with its settings for this model.

    Each is computed as if alone, but for "memit", which writes all requests together: one and the same edit for all.
    What was computed is stored, and found again after an interrupt. `paraphrases` gives what "neurons" attributes
    besides the request, such as `knpaper.tasks.paraphrases`. Raises ValueError for an unknown editor, no requests, one
    without a new answer, and what the editor raises; TypeError for a request that is no Query.
    """
    if not isinstance(editor, str) or editor not in EDITORS:
        raise checks.unknown("editor", editor, EDITORS)
    extra = {"paraphrases": paraphrases} if editor == "neurons" else {}
    return EDITORS[editor](lm, requests, progress=progress, **extra)


def written(*deltas: Delta) -> Edit:
    """Return the edit of some deltas; one that failed where they would change nothing."""
    if not any(bool(delta.neurons.any() & delta.hidden.any()) for delta in deltas):
        return Edit(failed="the change of the weights is zero; there is nothing to write")
    return Edit(deltas)


def rome_edits(
    lm: LM, requests: Iterable[Query], settings: rome.HParams | None = None, progress: bool = False
) -> list[Edit]:
    """Return the edits of ROME (Meng et al. 2022), by default with the model's own hyperparameters."""
    settings = settings or rome.hparams_for(lm)
    requests = editing.requests(requests)
    moment = covariance(lm, settings.block, settings.covariance)
    return write_searches(_searched(lm, requests, settings, progress), moment, settings.block, settings.key)


def write_searches(
    searches: Iterable[rome.Search], moment: Moment, block: int, key: str = rome.HParams.key
) -> list[Edit]:
    """Return the edits that store what ROME's searches found, with a covariance of keys (None: the identity).

    An edit says why it failed where the search failed or nothing can be stored: see `rome.delta`.
    """
    with contextlib.suppress(ValueError):  # where it cannot be factored, each edit says why
        moment = moment if moment is None else factor(moment)
    return [_attempt(rome.delta, found, moment, block, key) for found in searches]


def _attempt(make: Callable[..., Delta | list[Delta]], *arguments) -> Edit:
    try:
        made = make(*arguments)
    except ValueError as error:
        return Edit(failed=str(error))
    return written(made) if isinstance(made, Delta) else written(*made)


def rome_published(lm: LM, requests: Iterable[Query], progress: bool = False) -> list[Edit]:
    """Return the edits of ROME with the mix of two keys of the published code (see `rome.delta`). The search is that of
    "rome", shared with it, so that they differ in the key alone; `rome_edits` runs the published one if it is set."""
    return rome_edits(lm, requests, replace(rome.hparams_for(lm), key="published"), progress)


def rome_identity(lm: LM, requests: Iterable[Query], progress: bool = False) -> list[Edit]:
    """Return the edits of ROME as the published code of Niu et al. ran it: C = 1, and the mix of two keys, for it took
    over the published implementation. "rome-published" differs in the covariance alone, "rome" in the key as well; they
    share the search."""
    return rome_edits(lm, requests, replace(rome.hparams_for(lm), covariance="identity", key="published"), progress)


def fine_tuning(
    lm: LM, requests: Iterable[Query], settings: finetune.HParams | None = None, progress: bool = False
) -> list[Edit]:
    """Return the edits of FT-L (Meng et al. 2022), by default at ROME's block."""
    settings = settings or finetune.HParams(rome.hparams_for(lm).block)

    def make(batch: list[Query]) -> list[Edit]:
        found = finetune.finetune(lm, batch, settings)
        return [Edit(failed=delta) if isinstance(delta, str) else written(delta) for delta in found]

    def reads(request: Query) -> list:
        return [asdict(finetune.prompt(lm, request)), tokens.encode(lm, request).target]

    return _stored(lm, requests, {"settings": asdict(settings)}, finetune.finetune, make, reads, progress)


def neuron_edits(
    lm: LM, requests: Iterable[Query], scale: float = 0.1, paraphrases: Paraphrases = None, progress: bool = False
) -> list[Edit]:
    """Return the value updates of Dai et al. 2022 on the fact's knowledge neurons: old answer out, eight times the new
    one in, both times `scale` (1 as published).

    The neurons are the refined ones of the `paraphrases` of the request, or of the request alone where there are none.
    Those that are negative where the answer is due are updated with the opposite sign: as published, the update
    supposes positive neurons. It knows the first token of an answer only. Raises ValueError for a scale that is no
    finite number above 0.
    """
    scale = checks.setting(scale, "scale", above=True)

    def prompts(request: Query) -> list[Query]:
        return list(paraphrases(request) if paraphrases else ()) or [request]

    def make(batch: list[Query]) -> list[Edit]:
        return [_neuron_edit(lm, request, prompts(request), scale) for request in batch]

    def reads(request: Query) -> list:
        both = [tokens.encode(lm, request, word) for word in (request.target, request.foil)]
        return [asdict(encoded) for encoded in (*both, *(tokens.encode(lm, query) for query in prompts(request)))]

    return _stored(lm, requests, {"scale": scale}, _neuron_edit, make, reads, progress)


def _neuron_edit(lm: LM, request: Query, prompts: Sequence[Query], scale: float) -> Edit:
    old, new = (tokens.encode(lm, request, word) for word in (request.target, request.foil))
    if old.target[0] == new.target[0]:
        return Edit(failed="the present answer and the new one begin with the same token, and only that is written")
    if int(capture(lm, [new], ()).logits[0].argmax()) == new.target[0]:
        return Edit(failed="the model gives the new answer already; there is nothing to write")
    scores = attribution.attribute(lm, prompts).scores
    if not bool(scores.isfinite().all() & scores.any()):
        return Edit(failed="the scores of the neurons are zero, or not finite: no neuron bears on the answer")
    chosen = neurons.find_neurons(scores).neurons or [neurons.top(scores.mean(0), 1)[0][0]]
    states = capture(lm, [tokens.encode(lm, query) for query in prompts]).sites["neuron"]
    deltas = interventions.value_update(lm, request, request.foil, chosen, (scale, 8 * scale))
    signs = [states[delta.block].mean(0).sign().to(delta.neurons) for delta in deltas]
    return written(*(replace(d, neurons=d.neurons * sign) for d, sign in zip(deltas, signs, strict=True)))


def in_context(lm: LM, requests: Iterable[Query], progress: bool = False) -> list[Edit]:
    """Return edits that state the new fact before the prompt; no weight changes."""
    requests = editing.requests(requests)
    stated = [r.prompt if r.masked else f"{r.prompt}{'' if r.joined else ' '}{MASK}." for r in requests]
    return [Edit(context=f"{text.replace(MASK, r.foil)} ") for text, r in zip(stated, requests, strict=True)]


def memit_edits(
    lm: LM, requests: Iterable[Query], settings: memit.HParams | None = None, progress: bool = False
) -> list[Edit]:
    """Return the edit of MEMIT (Meng et al. 2023), once for each request: all are written together, by default over the
    three blocks up to ROME's."""
    base = rome.hparams_for(lm)
    settings = settings or memit.HParams(max(0, base.block - 2), base.block)
    memit.check(lm, settings)
    requests = editing.requests(requests)
    found = _searched(lm, requests, replace(base, block=settings.last), progress)
    usable = [i for i, search in enumerate(found) if not search.failed]
    if not usable:
        return [Edit(failed=search.failed) for search in found]
    moments = [covariance(lm, block, base.covariance) for block in range(settings.first, settings.last + 1)]
    prompts = [rome.contexts(requests[i], base.prefixes)[:-1] for i in usable]
    changes = torch.stack([found[i].change for i in usable])
    together = _attempt(memit.memit, lm, prompts, changes, moments, settings)
    return [Edit(failed=search.failed) if search.failed else together for search in found]


EDITORS: dict[str, Callable[..., list[Edit]]] = {
    "rome": rome_edits,
    "rome-published": rome_published,
    "rome-identity": rome_identity,
    "memit": memit_edits,
    "fine-tuning": fine_tuning,
    "neurons": neuron_edits,
    "context": in_context,
}


def _searched(lm: LM, requests: Sequence[Query], settings: rome.HParams, progress: bool) -> list[rome.Search]:
    """Return searches of v*, which depend neither on the covariance nor on the key, from the store if there."""

    def make(batch: list[Query]) -> list[rome.Search]:
        return rome.search(lm, batch, settings)

    def reads(request: Query) -> list:
        prompts = [[asdict(encoded), position] for encoded, position in rome.prompts(lm, request, settings)]
        return [*prompts, tokens.encode(lm, request).target]

    deciding = {name: value for name, value in asdict(settings).items() if name not in ("covariance", "key")}
    return _stored(lm, requests, {"settings": deciding}, rome.search, make, reads, progress)


def _stored(
    lm: LM,
    requests: Iterable[Query],
    settings: dict,
    function: Callable,
    make: Callable[[list[Query]], list],
    reads: Callable[[Query], list],
    progress: bool,
) -> list:
    """Return what `make` gives for each of some requests, from the store if there.

    `function` is the code that decides it, with `settings`; `reads` gives all token ids that are read for a request.
    """
    requests = editing.requests(requests)
    results = stored(
        lm,
        (function,),
        [{**settings, "read": reads(request)} for request in requests],
        lambda part: [_pack(result) for result in make([requests[i] for i in part])],
        batch=BATCH,
        progress="edit" if progress else "",
    )
    return [_unpack(result, lm.device) for result in results]


def _pack(result: Edit | rome.Search) -> Result:
    failed = torch.tensor(list(result.failed.encode()), dtype=torch.uint8)
    if isinstance(result, rome.Search):
        numbers = torch.tensor([result.steps, result.before, result.probability], dtype=torch.float64)
        return {"failed": failed, "numbers": numbers, **{name: getattr(result, name) for name in STATES}}
    out = {"failed": failed, "blocks": torch.tensor([delta.block for delta in result.deltas], dtype=torch.long)}
    for i, delta in enumerate(result.deltas):
        out |= {f"neurons{i}": delta.neurons, f"hidden{i}": delta.hidden.clone()}
    return out


def _unpack(result: Result, device: torch.device) -> Edit | rome.Search:
    result = {name: value.to(device) for name, value in result.items()}
    failed = bytes(result["failed"].tolist()).decode()
    if "numbers" in result:
        steps, before, probability = result["numbers"].tolist()
        return rome.Search(*(result[name] for name in STATES), int(steps), before, probability, failed)
    blocks = enumerate(result["blocks"].tolist())
    return Edit(tuple(Delta(block, result[f"neurons{i}"], result[f"hidden{i}"]) for i, block in blocks), failed=failed)
