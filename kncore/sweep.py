"""Sweeps: attribution or edits over many prompts, in shards that run anywhere and are merged afterwards.

A sweep is a list of prompts, the same on every machine that is given the same arguments; shard k of n is the k-th of n
ranges of it. Each prompt has one record, a line of JSON, named by all that it depends on. Records are kept as they
come, so that a shard that was stopped goes on where it was; a shard's file appears when the shard is complete.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from kncore import attribution, cache, cases, criteria, editors, grammar, neurons, predictions, public, tasks, tokens
from kncore.cases import Case
from kncore.models import LM
from kncore.pipeline import RunError, UsageError, write
from kncore.tasks import Query

KINDS = ("attribution", "edits")
CODE = (*editors.CODE, "cases", "criteria")  # the modules whose text decides a record
BATCH = 32  # prompts between two writes
THRESHOLD = 0.2  # of a prompt's largest score: the neurons that its record lists


# ------------------------------------------------------------------------------------------- what is asked


def asked(
    lm: LM, kind: str, names: Sequence[str] = (), source: str = "own", n: int | None = None, seed: int = 0
) -> list[Query] | list[Case]:
    """The prompts of a sweep of attribution, or the cases of one of edits: at most `n` of each of `names`.

    `names` are relations and phenomena (default: those of the chapters); `source` is "own", "public" (ParaRel, BLiMP
    and CounterFact, fetched) or a folder with the public data. Raises UsageError or ValueError for an unknown name.
    """
    path = None if source == "public" else source
    form = "masked" if lm.spec.masked else "causal"
    out = []
    for name in names or _names(kind, source):
        if kind == "edits" and source != "own":
            some = cases.public_cases(name, path, seed=seed)
        elif kind == "edits":
            draw = {"field_of_work": cases.synonymy, "agreement": cases.agreement}.get(name)
            some = draw(seed=seed) if draw else cases.bijective(name, seed=seed)
        elif source != "own":
            some = _public(name, path, form)
        elif name in grammar.phenomena():
            some = grammar.minimal_pairs(name, seed=seed, form=form)
        else:
            some = tasks.facts(name, seed=seed)
        out += some[:n]
    return out


def _public(name: str, path: str | None, form: str) -> list[Query]:
    if re.fullmatch(r"P\d+", name):
        return public.pararel(name, path, form)
    if name not in public.paradigms():
        near = ", ".join(difflib.get_close_matches(name, public.paradigms(), 3)) or "determiner_noun_agreement_1"
        raise UsageError(f"{name!r} is neither a relation of ParaRel, e.g. P36, nor a paradigm of BLiMP, e.g. {near}")
    return public.blimp(name, path, form)


def _names(kind: str, source: str) -> Sequence[str]:
    if kind == "attribution":
        return [*predictions.relations(source), *predictions.phenomena(source)]
    if source != "own":
        return cases.PUBLIC
    return [*(name for name in tasks.relations() if tasks.describe(name).inverse), "field_of_work", "agreement"]


def read_queries(path: Path, kind: str) -> list[Query] | list[Case]:
    """Prompts of one's own, a line of JSON each with fields of `Query`; an edit's `foil` is the answer to install.

    Raises UsageError for a line that is none.
    """
    out = []
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = stream.readlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); expected lines of JSON") from error
    for number, line in enumerate(lines, 1):
        try:
            query = Query(**json.loads(line))
            if kind == "edits" and not (query.subject and query.foil):
                raise ValueError("an edit needs a subject and a foil, the answer to install")
        except (TypeError, ValueError, RecursionError) as error:
            known = ", ".join(field.name for field in fields(Query))
            raise UsageError(f"{path.name}, line {number}: {error}. Expected an object of text: {known}") from error
        out.append(
            Case(query, {"reliability": (replace(query, target=query.foil, foil=query.target),)})
            if kind == "edits"
            else query
        )
    return out


# ------------------------------------------------------------------------------------------- one shard


def sweep(
    lm: LM,
    kind: str,
    items: Sequence[Query] | Sequence[Case],
    settings: dict,
    out: Path,
    shard: tuple[int, int] = (1, 1),
    progress: bool = False,
) -> Path:
    """The file of one shard, complete: a record for each prompt of its range, in order.

    `settings` are options of `attribute`, or {"editor": name}. A prompt that the model cannot be asked has a record
    that says why in `failed`. What earlier, interrupted runs of this shard left is used. Raises UsageError for an
    unknown kind, no prompts, a shard that does not exist, and an editor that writes all requests together.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of sweep {kind!r}; choose {' or '.join(KINDS)}")
    if not 1 <= shard[0] <= shard[1]:
        raise UsageError(
            f"shard {shard[0]}/{shard[1]} does not exist; shards are 1/{shard[1]} to {shard[1]}/{shard[1]}"
        )
    if not items:
        raise UsageError("no prompts to sweep over")
    if settings.get("editor") == "memit":
        raise UsageError("memit writes all requests together, so its edits cannot be swept one by one")
    about = {"kind": kind, "model": lm.name, "revision": lm.revision, "dtype": str(lm.dtype).removeprefix("torch.")}
    about |= {"code": cache.code_version(CODE), "settings": settings}
    todo = {}
    for item in items:
        query = {k: v for k, v in asdict(item.request if kind == "edits" else item).items() if v}
        todo.setdefault(_hash(about, query, asdict(item) if kind == "edits" else None), (query, item))
    whole = {"sweep": _hash(list(todo)), "of": len(todo)}
    first, last = ((k * len(todo)) // shard[1] for k in (shard[0] - 1, shard[0]))
    mine = {one: (place, *todo[one]) for place, one in enumerate(todo, 1) if first < place <= last}

    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{kind}-{shard[0]}-of-{shard[1]}.jsonl"
    parts = list(out.glob(f".{target.name}.*.part"))
    found = {one["id"]: one for path in (target, *parts) for one in _records(path) if one and one["id"] in mine}
    left = [one for one in mine if one not in found]
    own = out / f".{target.name}.{os.uname().nodename}-{os.getpid()}.part"
    compute = {"attribution": _attributed, "edits": _edited}[kind]
    with own.open("a", encoding="utf-8") as stream, tqdm(total=len(left), disable=not progress, unit="prompt") as bar:
        for start in range(0, len(left), BATCH):
            batch = left[start : start + BATCH]
            for one, result in zip(batch, compute(lm, [mine[i][2] for i in batch], settings), strict=True):
                place, query, _ = mine[one]
                found[one] = {"id": one, **whole, "place": place, **about, "query": query, **result}
                stream.write(_line(found[one]))
            stream.flush()
            os.fsync(stream.fileno())
            bar.update(len(batch))
    write(target, "".join(_line({**found[one], **whole, "place": mine[one][0]}) for one in mine))
    for path in (*parts, own):
        path.unlink(missing_ok=True)
    return target


def _attributed(lm: LM, queries: Sequence[Query], settings: dict) -> list[dict]:
    failed = [_refused(lm, query) for query in queries]
    sound = [query for query, why in zip(queries, failed, strict=True) if not why]
    found = attribution.attribute(lm, sound, **settings) if sound else None
    out, at = [], iter(range(len(sound)))
    for why in failed:
        i = None if why else next(at)
        if i is None or not bool(torch.isfinite(found.scores[i]).all()):
            out.append({"failed": why or f"the scores are not finite in {lm.dtype}"})
            continue
        inside = neurons.coarse(found.scores[i : i + 1], THRESHOLD)[0].nonzero().tolist()
        listed = sorted(([*place, float(found.scores[i][*place])] for place in inside), key=lambda one: -one[2])
        out.append(
            {
                "probability": float(found.probability[i]),
                "rank": int(found.rank[i]),
                "gap": float(found.gap[i].max()),
                "nodes": int(found.nodes[i].sum()),
                "neurons": listed,
            }
        )
    return out


def _refused(lm: LM, query: Query) -> str:
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):  # a target that the model cannot write
            tokens.encode(lm, query)
    except (ValueError, UserWarning) as error:
        return str(error)
    return ""


def _edited(lm: LM, some: Sequence[Case], settings: dict) -> list[dict]:
    failed = [next(filter(None, (_refused(lm, q) for qs in case.asked.values() for q in qs)), "") for case in some]
    sound = [case for case, why in zip(some, failed, strict=True) if not why]
    edits = editors.edit(lm, [case.request for case in sound], **settings) if sound else []
    table = criteria.measure(lm, sound, edits)
    rows = json.loads(table.drop(columns=["item", "failed"]).to_json(orient="records", double_precision=15))
    asked: dict[int, list[dict]] = {}
    for row in rows:
        asked.setdefault(row.pop("case"), []).append(row)
    at = iter(range(len(sound)))
    reasons = [why or edits[next(at)].failed for why in failed]
    at = iter(range(len(sound)))
    return [
        {"failed": text, "asked": [] if why else asked[next(at)]} for text, why in zip(reasons, failed, strict=True)
    ]


# ------------------------------------------------------------------------------------------- records and merging


def _hash(*told) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _line(record: dict) -> str:
    body = {name: value for name, value in record.items() if name != "checksum"}
    return json.dumps({**body, "checksum": _hash(body)}) + "\n"


def _records(path: Path) -> Iterable[dict | None]:
    """The records of a file; None for a line that is torn or was changed."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            body = {name: value for name, value in record.items() if name != "checksum"}
            yield record if record["checksum"] == _hash(body) else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            yield None


def load_records(paths: Sequence[Path]) -> list[dict]:
    """The records of a whole sweep from the files of its shards (or folders of them), each once, in order.

    Raises UsageError for files without records and for shards of different sweeps; RunError for damaged lines, two
    records of one prompt that differ, and prompts without a record, which it names.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    absent = [str(file) for file in files if not file.is_file()]
    if absent or not files:
        raise UsageError(f"no records in {', '.join(absent or map(str, paths))}; expected the .jsonl files of a sweep")
    found: dict[str, tuple[dict, Path]] = {}
    sweeps: dict[str, Path] = {}
    for file in files:
        for number, record in enumerate(_records(file), 1):
            if record is None:
                raise RunError(f"{file}, line {number}: damaged; delete the file and run its shard again")
            before, where = found.setdefault(record["id"], (record, file))
            if before != record:
                raise RunError(
                    f"{where} and {file} differ on {record['query']['prompt']!r} (record {record['id']}); they come "
                    "from other batches or another machine: keep one of the two files"
                )
            sweeps.setdefault(record["sweep"], file)
    if len(sweeps) > 1:
        names = ", ".join(map(str, sweeps.values()))
        raise UsageError(f"{names} belong to different sweeps: other prompts, model, precision, settings or code")
    records = sorted((record for record, _ in found.values()), key=lambda record: record["place"])
    whole = records[0]["of"] if records else 0
    missing = sorted(set(range(1, whole + 1)) - {record["place"] for record in records})
    if missing or not records:
        counts = {int(m[1]) for file in files if (m := re.search(r"-of-(\d+)\.jsonl$", file.name))}
        again = {-(-place * n // whole): n for n in counts if len(counts) == 1 for place in missing}
        remedy = f"; run shard {', '.join(f'{k}/{n}' for k, n in sorted(again.items()))} again" if again else ""
        raise RunError(f"{len(missing)} of {whole} records are missing: {_ranges(missing) or 'all'}{remedy}")
    return records


def merge(paths: Sequence[Path], out: Path) -> Path:
    """Write the records of a whole sweep to one file; errors as in `load_records`, and then nothing is written."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the file to write")
    return write(out, "".join(map(_line, load_records(paths))))


def _ranges(places: Sequence[int]) -> str:
    """13, 14, 15, 20 as "13–15, 20"."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1][1:] = [place]
        else:
            runs.append([place])
    return ", ".join("–".join(map(str, run)) for run in runs)
