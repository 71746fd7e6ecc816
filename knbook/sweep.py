"""Sweeps: attribution or edits over many prompts, in shards that run anywhere and are merged afterwards.

A sweep is a list of prompts, the same on every machine that is given the same arguments; shard k of n is the k-th of n
ranges of it. Each prompt has one record, a line of JSON, named by all that it depends on. Records are kept as they
come, so that a shard that was stopped goes on where it was; a shard's file appears when the shard is complete.
"""

from __future__ import annotations

import inspect
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from knbook import prompts, shards
from knbook.checkout import check_folder
from knbook.errors import RunError, UsageError, refused
from kncore import attribution, checks, covariance, editors, models, neurons, prose, quadrature, resources, rome
from kncore.models import LM
from kncore.query import MASK, Query
from kncore.store import fingerprint
from kncore.store.disk import write
from knpaper import criteria, tasks
from knpaper.cases import Case

SETTINGS = {"attribution": [*inspect.signature(attribution.attribute).parameters][2:], "edits": ["editor"]}
BATCH = 32  # prompts between two writes
THRESHOLD = 0.2  # of a prompt's largest score: the neurons that its record lists
NOT_FINITE = "the scores are not finite"


def sweep(
    lm: LM,
    kind: str,
    items: Sequence[Query] | Sequence[Case],
    settings: dict,
    out: Path,
    shard: tuple[int, int] = (1, 1),
    progress: bool = False,
) -> Path:
    """Return the file of one shard, complete: a record for each prompt of its range, in order.

    `settings` are options of `attribute`, or {"editor": name}. A prompt that cannot be asked, edited or measured has a
    record that says why in `failed`, and the others are what they are without it. What interrupted runs of this sweep
    left in `out` is used, whatever their number of shards. Of several processes on one shard each ends with its file.

    Raises UsageError for what is wrong with the arguments, and RunError, or the error that came, for what concerns the
    model and no single prompt: weights that are not numbers, memory that ran out, a disk that is full.
    """
    items = _checked(kind, items, settings, shard)
    with refused():
        common = _common(lm, kind, settings)
    named = _named(kind, items, common)
    whole = {"sweep": shards.digest(list(named)), "of": len(named)}
    first, last = ((k * len(named)) // shard[1] for k in (shard[0] - 1, shard[0]))
    mine, heads = {}, {}
    for number, (name, (query, item)) in enumerate(named.items(), 1):
        if first < number <= last:
            mine[name], heads[name] = item, {"id": name, **whole, "place": number, **common, "query": query}
    shards.check_folder(out)
    check_folder(out, make=True)
    target = out / f"{kind}-{whole['sweep']}-{shard[0]}-of-{shard[1]}.jsonl"
    part = out / f".{target.name}.{uuid.uuid4().hex}.part"

    def complete() -> dict[str, dict]:  # those of other numbers of shards, too: a merge must not find two of one prompt
        return shards.fitting([target, *sorted(out.glob(f"{kind}-{whole['sweep']}-*.jsonl"))], heads)

    found = shards.fitting(sorted(out.glob(f".{kind}-{whole['sweep']}-*.part")), heads) | complete()
    left = {name: item for name, item in mine.items() if name not in found}
    with tqdm(total=len(left), disable=not progress, unit="prompt") as bar:
        for results in _results(lm, kind, left, settings):
            if _common(lm, kind, settings) != common:
                raise RunError(f"{lm.name} was changed while the sweep ran; run it again, and leave the model alone")
            records = {name: {**heads[name], **result} for name, result in results.items()}
            shards.append(part, records.values())
            found |= records
            bar.update(len(results))
    found |= complete()
    _finish(target, "".join(shards.dumps(found[name]) for name in mine))
    return target


def _checked(kind: str, items: Sequence, settings: dict, shard: tuple[int, int]) -> list:
    """Return the items of a sweep; raise UsageError for a sweep that cannot be run on any model."""
    k, n = shard
    with refused():
        if kind not in SETTINGS:
            raise checks.unknown("kind of sweep", kind, SETTINGS)
        if not 1 <= k <= n:
            raise ValueError(f"shard {k}/{n} does not exist; shards are 1/{n} to {n}/{n}")
        items = checks.items(items, Case if kind == "edits" else Query, "prompts", least=1)
    check_settings(kind, settings)
    return items


def check_settings(kind: str, settings: dict) -> None:
    """Raise UsageError for settings that no prompt could be swept with."""
    if settings.get("editor") == "memit":
        raise UsageError("memit writes all requests together, so its edits cannot be swept one by one")
    if unknown := [name for name in settings if name not in SETTINGS[kind]]:
        raise UsageError(f"a sweep of {kind} has no setting {unknown[0]!r}; it has {', '.join(SETTINGS[kind])}")
    with refused():
        json.dumps(settings, allow_nan=False)
        if kind == "edits" and settings.get("editor", "rome") not in editors.EDITORS:
            raise checks.unknown("editor", settings["editor"], editors.EDITORS)
        if isinstance(rule := settings.get("quadrature", "gauss"), str):
            steps = settings.get("steps")
            quadrature.rule(rule, 20 if steps is None else steps)


def _common(lm: LM, kind: str, settings: dict) -> dict:
    """Return what the records of a sweep have in common, in JSON's own types: what decides them besides the prompt.

    Raises RunError for a model that was changed since it was loaded.
    """
    if lm.is_modified:
        raise RunError(f"{lm.name} is not as it was loaded: end interventions, or load it anew, and sweep it as it is")
    common = {"kind": kind, "model": lm.name, "revision": lm.revision, "dtype": str(lm.dtype).removeprefix("torch.")}
    functions = [attribution.attribute]
    if kind == "edits":
        functions = [editors.EDITORS[settings.get("editor", "rome")], criteria.measure]
        common["hyperparameters"] = asdict(rome.hparams_for(lm))
        common["text"] = resources.digest(repr(prose.passages()))  # of prefixes and of the covariance
    common["code"] = shards.digest(fingerprint.code(*functions), asdict(lm.spec))
    return json.loads(json.dumps(common | {"versions": fingerprint.versions(), "settings": settings}))


def _named(kind: str, items: Sequence, common: dict) -> dict[str, tuple[dict, Query | Case]]:
    """Return the query of each item as JSON, and the item, by the name of its record; each item once."""
    named = {}
    for item in items:
        query = {name: value for name, value in asdict(item.request if kind == "edits" else item).items() if value}
        task = query.get("task") if kind == "edits" else None  # an edit of neurons asks in the relation's own words
        relation = resources.digest(tasks.describe(task)) if task in tasks.relations() else ""
        name = shards.digest(common, query, asdict(item) if kind == "edits" else None, relation)
        named.setdefault(name, (query, item))
    return named


def _finish(target: Path, text: str) -> None:
    """Write the file of a shard, and remove what its interrupted runs left: all that they hold stands in the file."""
    try:
        if not target.is_file() or target.read_text(encoding="utf-8", errors="replace") != text:
            write(target, text)
    except FileNotFoundError:  # another process was faster, and has cleared away what stood beside the file
        if not target.is_file():
            raise
    for path in target.parent.glob(f".{target.name}.*.part"):
        path.unlink(missing_ok=True)


def _results(lm: LM, kind: str, items: Mapping[str, Query | Case], settings: dict) -> Iterator[dict[str, dict]]:
    """Yield what the records of items say beyond the question, some at a time.

    Batches are made of the items that the tokenizer and the context take: so the numbers of an item do not depend on
    what was refused beside it. Raises what does not concern one item alone.
    """
    reasons = {name: prompts.refusal(lm, item, settings.get("editor", "rome")) for name, item in items.items()}
    if any(reasons.values()):
        yield {name: _failure(kind, why) for name, why in reasons.items() if why}
    sound = [name for name, why in reasons.items() if not why]
    if sound and kind == "edits":
        _prepare(lm, settings)
    for start in range(0, len(sound), BATCH):
        batch = sound[start : start + BATCH]
        yield dict(zip(batch, _batch(lm, kind, [items[name] for name in batch], settings), strict=True))


def _prepare(lm: LM, settings: dict) -> None:
    """Compute what the edits of a sweep share; raise UsageError where that cannot be, for then there is no edit."""
    editor = settings.get("editor", "rome")
    if editor.startswith("rome") and editor != "rome-identity":
        chosen = rome.hparams_for(lm)
        with refused():
            moment = covariance.covariance(lm, chosen.block, chosen.covariance)
            covariance.solve(moment, torch.zeros(1, lm.n_neurons, device=lm.device))


def _batch(lm: LM, kind: str, items: Sequence, settings: dict) -> list[dict]:
    """Return the numbers of items, or, in `failed`, why there are none of one of them.

    Raises where the model is at fault and not an item.
    """
    compute = {"attribution": _attributed, "edits": _edited}[kind]
    outcomes = _outcomes(lm, compute, items, settings)
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    records = [_failure(kind, _words(found)) if isinstance(found, Exception) else found for found in outcomes]
    if errors or any(record.get("failed", "").startswith(NOT_FINITE) for record in records):
        _check_weights(lm)
        if all(record.get("failed") for record in records):
            _check_model(lm, kind, compute, settings, errors)
    return records


def _outcomes(lm: LM, compute: Callable, items: Sequence, settings: dict) -> list[dict | Exception]:
    """Return what `compute` gives for items, or the error of each: where a batch fails, its items are tried alone.

    Raises an error of the process or the machine, whatever the prompt.
    """
    try:
        return compute(lm, items, settings)
    except Exception as error:
        if models.ran_out(error) or isinstance(error, OSError | RunError | UsageError):
            raise
        if len(items) == 1:
            return [error]
    return [outcome for item in items for outcome in _outcomes(lm, compute, [item], settings)]


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _failure(kind: str, why: str) -> dict:
    return {"failed": why, "asked": []} if kind == "edits" else {"failed": why}


def _check_weights(lm: LM) -> None:
    """Raise RunError where a weight is not a finite number."""
    for name, parameter in lm.model.named_parameters():
        if parameter.is_meta or not parameter.numel():  # on disk
            continue
        if not all(math.isfinite(end) for end in parameter.aminmax()):
            raise RunError(
                f"the weights of {lm.name} are not numbers ({name} in {lm.dtype}): no prompt can be swept; get an "
                "intact copy of the model, or use a wider dtype"
            )


def _check_model(lm: LM, kind: str, compute: Callable, settings: dict, errors: Sequence[Exception]) -> None:
    """Raise where a plain question fares no better than a batch of which nothing came through."""
    mask = f" {MASK}." if lm.spec.masked else ""
    plain = Query(f"the cat saw the book in{mask}", "Paris", "book", "Madrid")
    item = Case(plain, {"reliability": (plain,)}) if kind == "edits" else plain
    settings = settings if kind == "edits" else {**settings, "store": False}
    (outcome,) = _outcomes(lm, compute, [item], settings)
    if isinstance(outcome, Exception):
        raise (errors or [outcome])[0]
    if outcome.get("failed", "").startswith(NOT_FINITE):
        raise RunError(f"{lm.name} gives no numbers in {lm.dtype}, whatever the prompt; use a wider dtype")


def _attributed(lm: LM, queries: Sequence[Query], settings: dict) -> list[dict]:
    found = attribution.attribute(lm, queries, **settings)
    records = []
    for scores, gap, nodes, probability, rank in zip(
        found.scores, found.gap, found.nodes, found.probability, found.rank, strict=True
    ):
        if not bool(torch.isfinite(torch.cat([scores.flatten(), gap.flatten(), probability.flatten()])).all()):
            records.append(_failure("attribution", f"{NOT_FINITE} in {lm.dtype}"))
            continue
        inside = neurons.coarse(scores[None], THRESHOLD)[0].nonzero().tolist()
        record = {"probability": float(probability), "rank": int(rank), "gap": float(gap.max())}
        record["nodes"] = int(nodes.sum())
        record["neurons"] = sorted(([*neuron, float(scores[*neuron])] for neuron in inside), key=lambda row: -row[2])
        records.append(record)
    return records


def _edited(lm: LM, some: Sequence[Case], settings: dict) -> list[dict]:
    edits = editors.edit(lm, [case.request for case in some], **settings, paraphrases=tasks.paraphrases)
    table = criteria.measure(lm, some, edits)
    rows = json.loads(table.drop(columns=["item"]).to_json(orient="records", double_precision=15))
    records = [{"failed": edit.failed, "asked": []} for edit in edits]
    for row in rows:
        record, why = records[row.pop("case")], row.pop("failed")
        record["failed"] = record["failed"] or why
        record["asked"].append(row)
    return records
