"""Sweeps: attribution or edits over many prompts, in shards that run anywhere and are merged afterwards.

A sweep is a list of prompts, the same on every machine that is given the same arguments; shard k of n is the k-th of n
ranges of it. Each prompt has one record, a line of JSON, named by all that it depends on. Records are kept as they
come, so that a shard that was stopped goes on where it was; a shard's file appears when the shard is complete. It is
named by the sweep, `attribution-<sweep>-1-of-8.jsonl`: sweeps of other prompts, models, settings or code stand side by
side in one folder, and none touches the files of another.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
import os
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from kncore import (
    attribution,
    cache,
    cases,
    covariance,
    criteria,
    editors,
    fingerprint,
    grammar,
    models,
    neurons,
    predictions,
    public,
    resources,
    rome,
    tasks,
    tokens,
    words,
)
from kncore.cases import Case
from kncore.models import LM
from kncore.pipeline import RunError, UsageError, make_folder, write
from kncore.tasks import Query

SETTINGS = {"attribution": [*inspect.signature(attribution.attribute).parameters][2:], "edits": ["editor"]}
KINDS = tuple(SETTINGS)
BATCH = 32  # prompts between two writes
THRESHOLD = 0.2  # of a prompt's largest score: the neurons that its record lists
NOT_FINITE = "the scores are not finite"
NAME = re.compile(rf"({'|'.join(KINDS)})-([0-9a-f]{{16}}-)?[0-9]+-of-([0-9]+)\.jsonl")  # earlier: without the sweep
TRACKED = (".ci", ".git", "benchmarks", "book", "kncore", "notebooks", "results", "tests", "training", "workflow")


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

    Blank lines are skipped. Raises UsageError for a line that is no prompt, by its number, and for a file without one.
    """
    out = []
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = stream.readlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); expected lines of JSON") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            query = _query(line)
            if kind == "edits" and not (query.subject and query.foil):
                raise ValueError("an edit needs a subject and a foil, the answer to install")
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{path.name}, line {number}: {error}. Expected an object with prompt and target, and as needed "
                f"{', '.join(field.name for field in fields(Query)[2:])}"
            ) from error
        out.append(
            Case(query, {"reliability": (replace(query, target=query.foil, foil=query.target),)})
            if kind == "edits"
            else query
        )
    if not out:
        raise UsageError(f"{path} holds no prompts; expected lines of JSON, each an object with prompt and target")
    return out


def _query(line: str) -> Query:
    """The query of a line of JSON. Raises TypeError or ValueError where it is none."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
        if twice:
            raise ValueError(f"{twice[0]!r:.80} stands there twice; leave one of them out")
        return dict(pairs)

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:40]} is no finite number")
        return float(text)

    def whole(text: str) -> int | float:
        return int(text) if len(text) < 100 else number(text)

    try:
        row = json.loads(line, object_pairs_hook=once, parse_constant=number, parse_float=number, parse_int=whole)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg}, at letter {error.pos + 1})") from error
    if not isinstance(row, dict):
        raise TypeError(f"it holds {json.dumps(row):.60}, no object")
    known = [field.name for field in fields(Query)]
    if strange := [name for name in row if name not in known]:
        near = difflib.get_close_matches(strange[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"a prompt has no {', '.join(f'{name!r:.80}' for name in strange[:5])}{hint}")
    if absent := [name for name in known[:2] if name not in row]:
        raise ValueError(f"there is no {' and no '.join(absent)}")
    return Query(**row)


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

    `settings` are options of `attribute`, or {"editor": name}. A prompt that cannot be asked, edited or measured has a
    record that says why in `failed`, and the others are what they are without it. What earlier, interrupted runs of
    this sweep left in `out` is used, in whatever number of shards they ran. Several processes may work on one shard:
    each ends with its file, that of the first.

    Raises UsageError for an unknown kind or setting, no prompts, a shard that does not exist, an editor that writes all
    requests together, and a folder that is not for sweeps; and, as RunError or as it came, what concerns the model and
    no single prompt: weights that are not numbers, memory that ran out, a disk that is full.
    """
    items = list(items)
    if kind not in KINDS:
        raise UsageError(f"unknown kind of sweep {kind!r}; choose {' or '.join(KINDS)}")
    if not 1 <= shard[0] <= shard[1]:
        raise UsageError(
            f"shard {shard[0]}/{shard[1]} does not exist; shards are 1/{shard[1]} to {shard[1]}/{shard[1]}"
        )
    if not items:
        raise UsageError("no prompts to sweep over")
    wanted = Case if kind == "edits" else Query
    if wrong := [item for item in items if not isinstance(item, wanted)]:
        raise UsageError(f"a sweep of {kind} takes a {wanted.__name__} for each prompt, got {type(wrong[0]).__name__}")
    check_settings(kind, settings)
    about = _about(lm, kind, settings)
    todo = {}
    for item in items:
        query = {k: v for k, v in asdict(item.request if kind == "edits" else item).items() if v}
        task = query.get("task") if kind == "edits" else None  # an edit of neurons asks in the relation's own words
        relation = resources.digest(tasks.describe(task)) if task in tasks.relations() else ""
        name = _hash(about, query, asdict(item) if kind == "edits" else None, relation)
        todo.setdefault(name, (query, item))
    whole = {"sweep": _hash(list(todo)), "of": len(todo)}
    first, last = ((k * len(todo)) // shard[1] for k in (shard[0] - 1, shard[0]))
    heads, mine = {}, {}
    for place, (name, (query, item)) in enumerate(todo.items(), 1):
        if first < place <= last:
            heads[name], mine[name] = {"id": name, **whole, "place": place, **about, "query": query}, item

    check_folder(out)
    make_folder(out)
    target = out / f"{kind}-{whole['sweep']}-{shard[0]}-of-{shard[1]}.jsonl"
    part = out / f".{target.name}.{uuid.uuid4().hex}.part"

    def shown() -> dict[str, dict]:  # files of other numbers of shards, too: a merge must not find two of one prompt
        others = sorted(out.glob(f"{kind}-{whole['sweep']}-*.jsonl"))
        return _fitting([target, *others], heads)

    found = _fitting(sorted(out.glob(f".{kind}-{whole['sweep']}-*.part")), heads) | shown()
    left = [name for name in mine if name not in found]
    with tqdm(total=len(left), disable=not progress, unit="prompt") as bar:
        for results in _results(lm, kind, {name: mine[name] for name in left}, settings):
            if _about(lm, kind, settings) != about:
                raise RunError(f"{lm.name} was changed while the sweep ran; run it again, and leave the model alone")
            lines = {name: {**heads[name], **result} for name, result in results.items()}
            _append(part, "".join(map(_line, lines.values())))
            found |= lines
            bar.update(len(results))
    found |= shown()
    text = "".join(_line(found[name]) for name in mine)
    if not target.is_file() or target.read_text(encoding="utf-8", errors="replace") != text:
        try:
            write(target, text)
        except FileNotFoundError:  # another process was faster, and has cleared away what stood beside the file
            if not target.is_file():
                raise
    for path in out.glob(f".{target.name}.*.part"):  # all that they hold, or will hold, stands in the file
        path.unlink(missing_ok=True)
    return target


def check_settings(kind: str, settings: dict) -> None:
    """Raises UsageError for settings that no prompt could be swept with."""
    if settings.get("editor") == "memit":
        raise UsageError("memit writes all requests together, so its edits cannot be swept one by one")
    if strange := [name for name in settings if name not in SETTINGS[kind]]:
        raise UsageError(f"a sweep of {kind} has no setting {strange[0]!r}; it has {', '.join(SETTINGS[kind])}")
    try:
        json.dumps(settings, allow_nan=False)
        if kind == "edits" and settings.get("editor", "rome") not in editors.EDITORS:
            raise tasks.unknown("editor", settings["editor"], editors.EDITORS)
        if isinstance(rule := settings.get("quadrature", "gauss"), str):
            steps = settings.get("steps")
            attribution.rule(rule, 20 if steps is None else steps)
    except (TypeError, ValueError) as error:
        raise UsageError(f"settings of a sweep: {error}") from error


def check_folder(out: Path) -> None:
    """Raises UsageError where records of sweeps would land among what a checkout tracks, or what a cache may remove."""
    place = Path(os.path.realpath(out))
    for folder in (place, *place.parents):
        inside = place.relative_to(folder).parts
        if inside and inside[0] in TRACKED and (folder / "_toc.yml").is_file() and (folder / "notebooks").is_dir():
            raise UsageError(
                f"{str(out)!r} is in {inside[0]}/ of a checkout, which is tracked; give a folder of its own"
            )
    taken = [cache.scores_folder(), *(models.cache_folder() / kind for kind in ("models", "public", "offload"))]
    taken += [Path(one)] if (one := os.environ.get("KNCORE_RESULTS")) else []
    for folder in map(os.path.realpath, taken):
        if place.is_relative_to(folder):
            raise UsageError(f"{str(out)!r} is in {folder}, which is for other things; give a folder of its own")


def _about(lm: LM, kind: str, settings: dict) -> dict:
    """All that the records of a sweep have in common, in JSON's own types: what decides them besides the prompt.

    Raises RunError for a model that was changed since it was loaded.
    """
    if lm.touched:
        raise RunError(f"{lm.name} is not as it was loaded: end interventions, or load it anew, and sweep it as it is")
    about = {"kind": kind, "model": lm.name, "revision": lm.revision, "dtype": str(lm.dtype).removeprefix("torch.")}
    functions = [attribution.attribute]
    if kind == "edits":
        functions = [editors.EDITORS[settings.get("editor", "rome")], criteria.measure]
        about["hyperparameters"] = asdict(rome.hyper(lm))
        about["text"] = resources.digest(repr(words.passages()))  # of prefixes and of the covariance
    code = fingerprint.digest(fingerprint.code(*functions), asdict(lm.spec))[:16]
    about |= {"code": code, "versions": fingerprint.versions(), "settings": settings}
    return json.loads(json.dumps(about))


def _results(lm: LM, kind: str, items: dict[str, Query] | dict[str, Case], settings: dict) -> Iterator[dict[str, dict]]:
    """What the records of items say beyond the question, some at a time.

    Batches are made of the items that the tokenizer and the context take: so the numbers of an item do not depend on
    what was refused beside it. Raises what does not concern one item alone.
    """
    compute = {"attribution": _attributed, "edits": _edited}[kind]
    refused: dict[str, dict] = {}
    sound: list[str] = []
    last, prepared = next(reversed(items), None), kind != "edits"
    for name, item in items.items():
        if why := _refusal(lm, item, settings):
            refused[name] = _failure(kind, why)
        else:
            sound.append(name)
        if len(sound) < BATCH and name != last:
            continue
        if sound and not prepared:
            _prepare(lm, settings)
            prepared = True
        found = _tried(lm, kind, compute, [items[name] for name in sound], settings) if sound else []
        yield refused | dict(zip(sound, found, strict=True))
        refused, sound = {}, []


def _tried(lm: LM, kind: str, compute: Callable, items: Sequence, settings: dict) -> list[dict]:
    """What `compute` gives for items, or, in `failed`, why it gives nothing for one of them.

    Raises where the model is at fault and not an item.
    """
    try:
        found = compute(lm, items, settings)
    except Exception as error:
        if _general(error):
            raise
        found = [_alone(lm, compute, item, settings) for item in items] if len(items) > 1 else [error]
    errors = [one for one in found if isinstance(one, Exception)]
    out = [_failure(kind, _words(one)) if isinstance(one, Exception) else one for one in found]
    if errors or any(one.get("failed", "").startswith(NOT_FINITE) for one in out):
        _check_weights(lm)
        if all(one.get("failed") for one in out):
            _check_model(lm, kind, compute, settings, errors)
    return out


def _alone(lm: LM, compute: Callable, item: Query | Case, settings: dict) -> dict | Exception:
    try:
        return compute(lm, [item], settings)[0]
    except Exception as error:
        if _general(error):
            raise
        return error


def _general(error: Exception) -> bool:
    """Whether an error concerns the process or the machine, whatever the prompt."""
    return models.ran_out(error) or isinstance(error, OSError | RunError | UsageError)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _failure(kind: str, why: str) -> dict:
    return {"failed": why, "asked": []} if kind == "edits" else {"failed": why}


def _check_weights(lm: LM) -> None:
    """Raises RunError where a weight is not a finite number."""
    for name, parameter in lm.model.named_parameters():
        if parameter.is_meta or not parameter.numel():  # on disk
            continue
        if not all(math.isfinite(end) for end in parameter.aminmax()):
            raise RunError(
                f"the weights of {lm.name} are not numbers ({name} in {lm.dtype}): no prompt can be swept; get an "
                "intact copy of the model, or use a wider dtype"
            )


def _check_model(lm: LM, kind: str, compute: Callable, settings: dict, errors: Sequence[Exception]) -> None:
    """Raises where a plain question fares no better than a batch of which nothing came through."""
    mask = f" {tasks.MASK}." if lm.spec.masked else ""
    plain = Query(f"the cat saw the book in{mask}", "Paris", "book", "Madrid")
    item = Case(plain, {"reliability": (plain,)}) if kind == "edits" else plain
    try:
        (found,) = compute(lm, [item], settings if kind == "edits" else {**settings, "store": False})
    except Exception as error:
        raise (errors or [error])[0] from None
    if found.get("failed", "").startswith(NOT_FINITE):
        raise RunError(f"{lm.name} gives no numbers in {lm.dtype}, whatever the prompt; use a wider dtype")


def _prepare(lm: LM, settings: dict) -> None:
    """Compute what the edits of a sweep share. Raises ValueError where there is none: then there is no edit at all."""
    editor = settings.get("editor", "rome")
    if editor.startswith("rome") and editor != "rome-identity":
        chosen = rome.hyper(lm)
        moment = covariance.covariance(lm, chosen.block, chosen.covariance)
        covariance.solve(moment, torch.zeros(1, lm.n_neurons, device=lm.device))


def _attributed(lm: LM, queries: Sequence[Query], settings: dict) -> list[dict]:
    found = attribution.attribute(lm, queries, **settings)
    out = []
    for scores, gap, nodes, probability, rank in zip(
        found.scores, found.gap, found.nodes, found.probability, found.rank, strict=True
    ):
        if not bool(torch.isfinite(torch.cat([scores.flatten(), gap.flatten(), probability.flatten()])).all()):
            out.append(_failure("attribution", f"{NOT_FINITE} in {lm.dtype}"))
            continue
        inside = neurons.coarse(scores[None], THRESHOLD)[0].nonzero().tolist()
        listed = sorted(([*place, float(scores[*place])] for place in inside), key=lambda one: -one[2])
        out.append(
            {
                "probability": float(probability),
                "rank": int(rank),
                "gap": float(gap.max()),
                "nodes": int(nodes.sum()),
                "neurons": listed,
            }
        )
    return out


def _edited(lm: LM, some: Sequence[Case], settings: dict) -> list[dict]:
    edits = editors.edit(lm, [case.request for case in some], **settings)
    table = criteria.measure(lm, some, edits)
    rows = json.loads(table.drop(columns=["item"]).to_json(orient="records", double_precision=15))
    out = [{"failed": edit.failed, "asked": []} for edit in edits]
    for row in rows:
        record, why = out[row.pop("case")], row.pop("failed")
        record["failed"] = record["failed"] or why
        record["asked"].append(row)
    return out


def _refusal(lm: LM, item: Query | Case, settings: dict) -> str:
    """Why the tokenizer or the context refuses an item; "" where they do not."""
    try:
        with warnings.catch_warnings():  # of a word that the model cannot write
            warnings.filterwarnings("error", message=".* is not in the vocabulary of ", category=UserWarning)
            if isinstance(item, Query):
                tokens.encode(lm, item)
            else:
                _encode(lm, item, settings.get("editor", "rome"))
    except (ValueError, UserWarning) as error:
        return str(error)
    return ""


def _encode(lm: LM, case: Case, editor: str) -> None:
    """Encode all that is asked to make an edit and to judge it. Raises ValueError where something of it cannot be."""
    request = case.request
    context = editors.in_context(lm, [request])[0].context if editor == "context" else ""
    asked = [query for some in case.asked.values() for query in some]
    for query in (request, *asked):
        for word in filter(None, (query.target, query.foil)):
            tokens.encode(lm, query, word)
    for query in asked if context else ():
        for word in filter(None, (query.target, query.foil)):
            try:
                tokens.encode(lm, replace(query, prompt=context + query.prompt), word)
            except ValueError as error:
                raise ValueError(f"with the new fact stated before it: {error}") from error
    if editor.startswith("rome"):
        for query in rome.contexts(request, rome.hyper(lm).prefixes):
            try:
                tokens.encode(lm, query, query.foil)
                tokens.span(lm, query, query.foil)
            except ValueError as error:
                raise ValueError(f"ROME cannot ask it after a piece of prose, or what it is about: {error}") from error


# ------------------------------------------------------------------------------------------- records and merging


def _hash(*told) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _line(record: dict) -> str:
    body = {name: value for name, value in record.items() if name != "checksum"}
    return json.dumps({**body, "checksum": _hash(body)}) + "\n"


def _append(part: Path, text: str) -> None:
    try:
        with part.open("ab") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(part)) from error  # what a write raises names no file


def _fitting(paths: Iterable[Path], heads: dict[str, dict]) -> dict[str, dict]:
    """The sound records in files that are what `heads` say, the first of each name."""
    found: dict[str, dict] = {}
    for record in (record for path in paths for record in _records(path) if record):
        head = heads.get(record["id"])
        if head and all(record.get(name) == value for name, value in head.items()):
            found.setdefault(record["id"], record)
    return found


def _records(path: Path) -> Iterable[dict | None]:
    """The records of a file; None for a line that is torn, was changed, or is no record."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # another process has just finished its shard
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
            body = {name: value for name, value in record.items() if name != "checksum"}
            sound = record["checksum"] == _hash(body) and isinstance(record["query"]["prompt"], str)
            sound &= all(isinstance(record[name], str) for name in ("id", "sweep", "kind"))
            sound &= all(type(record[name]) is int for name in ("place", "of")) and 1 <= record["place"] <= record["of"]
            yield record if sound else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            yield None


def load_records(paths: Sequence[Path]) -> list[dict]:
    """The records of a whole sweep from the files of its shards (or folders of them), each once, in order.

    Of a folder only the files that are named as shards are read. Raises UsageError for files without records and for
    shards of different sweeps, which it names; RunError for damaged lines, two records of one prompt that differ, and
    prompts without a record, which it names.
    """
    files = [file for path in paths for file in (_shards(path) if path.is_dir() else [path])]
    absent = [str(file) for file in files if not file.is_file()]
    if absent or not files:
        raise UsageError(
            f"no records in {', '.join(absent or map(str, paths))}; expected the .jsonl files of a sweep, such as "
            "attribution-0123456789abcdef-1-of-8.jsonl"
        )
    read = [(record, file) for file in dict.fromkeys(files) for record in _whole(file)]
    if not read:
        raise UsageError(f"no records in {', '.join(map(str, files))}: the files are empty; run their shards again")
    sweeps: dict[str, list[tuple[dict, Path]]] = {}
    for record, file in read:
        sweeps.setdefault(record["sweep"], []).append((record, file))
    if len(sweeps) > 1:
        raise UsageError(_several(list(sweeps.values())))
    found: dict[str, tuple[dict, Path]] = {}
    for record, file in read:
        before, where = found.setdefault(record["id"], (record, file))
        if before != record:
            raise RunError(
                f"{where} and {file} differ on {record['query']['prompt']!r} (record {record['id']}); they come "
                "from other batches or another machine: keep one of the two files"
            )
    records = sorted((record for record, _ in found.values()), key=lambda record: record["place"])
    whole = records[0]["of"]
    missing = sorted(set(range(1, whole + 1)) - {record["place"] for record in records})
    if missing:
        counts = {int(m[3]) for file in files if (m := NAME.fullmatch(file.name))}
        again = {-(-place * n // whole): n for n in sorted(counts)[:1] for place in missing}
        remedy = f"; run shard {', '.join(f'{k}/{n}' for k, n in sorted(again.items()))} again" if again else ""
        raise RunError(f"{len(missing)} of {whole} records are missing: {_ranges(missing)}{remedy}")
    return records


def _shards(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.jsonl")) if NAME.fullmatch(path.name)]


def _whole(file: Path) -> list[dict]:
    """The records of a file. Raises RunError for a line that is none."""
    out = []
    for number, record in enumerate(_records(file), 1):
        if record is None:
            shard = "damaged; delete the file and run its shard again"
            other = "no record of a sweep, or damaged; give the .jsonl files that `sweep` wrote"
            raise RunError(f"{file}, line {number}: {shard if NAME.fullmatch(file.name) else other}")
        out.append(record)
    return out


def _several(sweeps: Sequence[Sequence[tuple[dict, Path]]]) -> str:
    """That records belong to different sweeps, in what these differ, and how the files of each are named."""
    heads = [some[0][0] for some in sweeps]
    apart = ("id", "sweep", "of", "place", "query", "checksum", "failed", "asked", "probability", "rank", "gap")
    names = [name for name in heads[0] if name not in (*apart, "nodes", "neurons")]
    differ = [name for name in names if any(head.get(name) != heads[0][name] for head in heads)]
    shown = []
    for some in sweeps[:5]:
        head, files = some[0][0], list(dict.fromkeys(file for _, file in some))
        start = f"{head['kind']}-{head['sweep']}-"
        together = len({file.parent for file in files}) == 1 and all(file.name.startswith(start) for file in files)
        which = str(files[0].parent / f"{start}*.jsonl") if together else " ".join(map(str, files[:3]))
        told = "; ".join(f"{name} {json.dumps(head.get(name)):.60}" for name in differ)
        shown.append(
            f"{which} ({len({record['id'] for record, _ in some})} of {head['of']} records{told and '; '}{told})"
        )
    more = f" and {len(sweeps) - 5} more" if len(sweeps) > 5 else ""
    return (
        f"the records belong to different sweeps, of other {', '.join(differ) or 'prompts'}: name the files of one, "
        f"{' or '.join(shown)}{more}"
    )


def merge(paths: Sequence[Path], out: Path) -> Path:
    """Write the records of a whole sweep to one file; errors as in `load_records`, and then nothing is written."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the file to write")
    check_folder(out.parent)
    records = load_records(paths)
    if NAME.fullmatch(out.name) and out.is_file():
        raise UsageError(f"{out} is the file of a shard, which a merge does not replace; give another name")
    return write(out, "".join(map(_line, records)))


def _ranges(places: Sequence[int]) -> str:
    """13, 14, 15, 20 as "13–15, 20"."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1][1:] = [place]
        else:
            runs.append([place])
    return ", ".join("–".join(map(str, run)) for run in runs)
