"""Public data sets as queries: BLiMP, ParaRel, CounterFact and known_1000.

Every loader reads a local copy (`path=` the file, or a folder laid out as blimp/<paradigm>.jsonl,
pararel/data_all_allbags.json, counterfact/counterfact-train.json, known_1000/known_1000.json). Without a path it
fetches the file at the commit that data/public.toml names, checks its sha256 and keeps it under
$KNCORE_CACHE/public (or the platform's cache folder); what fails the check is not kept.

A file that is not what it should be raises ValueError with the file and the line or index.
"""

import io
import json
import os
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

import pooch

from kncore import disk
from kncore.grammar import DETERMINERS, plural
from kncore.resources import DATA
from kncore.tasks import MASK, Query, locate, unknown

PUNCTUATION = ".,;:!?"
NUMBER = {word: value for pair in DETERMINERS for word, value in zip(pair, ("singular", "plural"), strict=True)}
REFLEXIVE = {"himself": "masculine", "herself": "feminine", "itself": "neuter"}
# What the subjects of BLiMP's sentences start with, and what follows their noun.
BEFORE_NOUN = {"a", "an", "the", "this", "that", "these", "those", "some", "every", "all", "most", "many"}
AFTER_NOUN = {"of", "about", "that", "who", "which", "concerning", "by", "with", "on", "to"}


@dataclass(frozen=True)
class Source:
    """A pinned file: its place in a local folder and in the cache, its address, its sha256."""

    file: str
    url: str
    sha256: str


@dataclass(frozen=True)
class Case:
    """One counterfactual edit: the prompt to rewrite (target: the true object, foil: the new one), paraphrases of it,
    prompts about neighbours that must keep their answer, and the record it was read from."""

    case_id: int
    rewrite: Query
    paraphrases: tuple[Query, ...]
    neighbours: tuple[Query, ...]
    record: dict[str, Any]


def paradigms() -> list[str]:
    """The names of the 67 paradigms of BLiMP."""
    return list(_table()["blimp"]["sha256"])


def blimp(paradigm: str, path: str | Path | None = None, form: Literal["causal", "masked"] = "causal") -> list[Query]:
    """The minimal pairs of a BLiMP paradigm (Warstadt et al. 2020), one query each.

    Causal: the prompt is what both sentences begin with, target and foil are the words in which they differ, without
    punctuation. Masked: that word is masked in the good sentence. For agreement paradigms `value` is the number
    or gender, and `item` the noun as far as the order of words tells, in the singular where the file shows it;
    otherwise `item` counts pairs.

    A pair that differs in more than one word, or (causal) in the first word, cannot be asked for one word: it is left
    out with a warning. Raises ValueError for an unknown paradigm or form, a malformed file, or where nothing is left.
    """
    if paradigm not in paradigms():
        raise unknown("BLiMP paradigm", paradigm, paradigms())
    if form not in ("causal", "masked"):
        raise unknown("form", form, ("causal", "masked"))
    file = _find(_source("blimp", paradigm), path)
    fields = {"sentence_good": str, "sentence_bad": str, "UID": str, "pairID": str}
    rows = list(_lines(file, fields))
    pairs = []
    for where, row in rows:
        if row["UID"] != paradigm:
            raise ValueError(f"{where}: the paradigm is {row['UID']!r}, expected {paradigm!r}; pass the file of it")
        good, bad = row["sentence_good"].split(), row["sentence_bad"].split()
        differ = [i for i, (one, other) in enumerate(zip(good, bad, strict=False)) if one != other]
        if len(good) == len(bad) and len(differ) == 1 and (form == "masked" or differ[0] > 0):
            pairs.append((where, row, good, bad, differ[0]))
    if len(pairs) < len(rows):
        left_out = f"{len(rows) - len(pairs)} of {len(rows)} pairs of {paradigm} cannot be asked in the {form} form"
        if not pairs:
            raise ValueError(f"{file}: {left_out}: they differ in more than one word, or at the first")
        warnings.warn(f"{left_out} and are left out", stacklevel=2)

    readings = [_agreement(paradigm, good, bad, at) for _, _, good, bad, at in pairs]
    singulars = {plural(noun): noun for noun, value in readings if value == "singular"}
    queries = []
    for (where, row, good, bad, at), (noun, value) in zip(pairs, readings, strict=True):
        target, foil = good[at].rstrip(PUNCTUATION), bad[at].rstrip(PUNCTUATION)
        lemma = singulars.get(noun, noun) if value == "plural" else noun
        masked = [*good[:at], MASK + good[at][len(target) :], *good[at + 1 :]]
        queries.append(
            _query(
                where,
                prompt=" ".join(good[:at] if form == "causal" else masked),
                target=target,
                foil=foil,
                task=paradigm,
                item=f"{paradigm}:{lemma or row['pairID']}",
                value=value,
            )
        )
    return queries


def pararel(relation: str, path: str | Path | None = None, form: Literal["masked", "causal"] = "masked") -> list[Query]:
    """The prompts of a ParaRel relation ("P36") as Dai et al. (2022) use them, bag after bag, one query a pattern.

    Masked: the prompts as they are. Causal: only patterns in which nothing but punctuation follows the mask, cut
    before it (`joined` where no blank stands there). The file does not name the subject: it is what remains of a prompt
    when the words that this pattern has in common in all bags are taken away, where all patterns of the bag agree on
    it. `item` is then "P36:<subject>". Where they do not, `subject` and `template` are "" and `item` is "P36:<index of
    the bag>".

    Raises ValueError for an unknown relation or form, or a malformed file.
    """
    if form not in ("causal", "masked"):
        raise unknown("form", form, ("causal", "masked"))
    file = _find(_source("pararel"), path)
    data = _json(file, dict)
    if relation not in data:
        raise unknown("ParaRel relation", relation, data, f"Read from {file}.")
    bags = data[relation]
    if not isinstance(bags, list) or not bags:
        raise ValueError(f"{file}: {relation} must be a list of bags, it is {type(bags).__name__}")
    for i, bag in enumerate(bags):
        where = f"{file}, {relation}, bag {i}"
        if not isinstance(bag, list) or not bag or len(bag) != len(bags[0]):
            raise ValueError(f"{where}: expected {len(bags[0])} patterns, as in bag 0")
        for j, entry in enumerate(bag):
            if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry)):
                raise ValueError(f"{where}, pattern {j}: expected [prompt, answer, relation], found {str(entry)[:80]}")
            if entry[0].count(MASK) != 1:
                raise ValueError(f"{where}, pattern {j}: expected {MASK} once in the prompt, found {entry[0]!r}")

    frames = [_frame([bag[j][0] for bag in bags]) for j in range(len(bags[0]))]
    queries = []
    for i, bag in enumerate(bags):
        prompts = [entry[0] for entry in bag]
        found = {p[len(left) : len(p) - len(right)] for p, (left, right) in zip(prompts, frames, strict=True)}
        between = found.pop() if len(found) == 1 else ""
        subject = between.strip()
        for j, (prompt, answer, _) in enumerate(bag):
            left, right = frames[j]
            template = left + between.replace(subject, "{}", 1) + right if subject else ""
            joined = False
            if form == "causal":
                before, _, after = prompt.partition(MASK)
                if not before.strip() or after.strip(PUNCTUATION + " "):
                    continue
                prompt, template, joined = before, template.partition(MASK)[0], not before[-1].isspace()
            queries.append(
                _query(
                    f"{file}, {relation}, bag {i}, pattern {j}",
                    prompt=prompt.rstrip(),
                    target=answer,
                    subject=subject,
                    task=relation,
                    item=f"{relation}:{subject or i}",
                    template=template.rstrip(),
                    joined=joined,
                )
            )
    return queries


def counterfact(path: str | Path | None = None) -> list[Query]:
    """The rewrites of CounterFact (Meng et al. 2022): prompt, true object as target, new object as foil."""
    return [case.rewrite for case in counterfact_cases(path)]


def counterfact_cases(path: str | Path | None = None) -> list[Case]:
    """CounterFact with paraphrases and neighbours. Reads the flat form (one paraphrase and one neighbour a case, the
    one that is fetched) and the full form of the ROME authors; which one a file holds is seen from its first record.

    Raises ValueError for a malformed file.
    """
    file = _find(_source("counterfact"), path)
    data = _json(file, list)
    full = bool(data) and isinstance(data[0], dict) and "requested_rewrite" in data[0]
    fields = _FULL if full else _FLAT
    cases = []
    for i, record in enumerate(data):
        where = f"{file}, index {i}"
        _check(where, record, fields)
        cases.append((_full_case if full else _flat_case)(where, record))
    return cases


def known_1000(path: str | Path | None = None) -> list[Query]:
    """The 1,209 facts that GPT-2 XL knows, on which Meng et al. (2022) trace; task is the Wikidata relation.

    The prompt is the file's `prompt`, which can be longer than its filled template: what follows is added to the
    template. Where the file has no template that begins so, the subject is where `tasks.locate` finds it. Raises
    ValueError for a malformed file.
    """
    file = _find(_source("known_1000"), path)
    fields = {"subject": str, "attribute": str, "prompt": str, "relation_id": str}
    queries = []
    for i, record in enumerate(_json(file, list)):
        where = f"{file}, index {i}"
        _check(where, record, fields)
        prompt, subject = record["prompt"], record["subject"].strip()
        template = str(record.get("template", ""))
        filled = template.replace("{}", subject)
        fits = template.count("{}") == 1 and prompt.startswith(filled)
        queries.append(
            _query(
                where,
                prompt=prompt,
                target=record["attribute"],
                subject=subject,
                task=record["relation_id"],
                item=f"{record['relation_id']}:{subject}",
                template=template + prompt[len(filled) :] if fits else _template(prompt, subject),
            )
        )
    return queries


def fetch(source: Source) -> Path:
    """The cached copy of a pinned file, downloaded where it is not there yet.

    Raises ConnectionError where it cannot be had and ValueError where it is not the pinned file; both leave no file
    behind.
    """
    cached = Path(os.environ.get("KNCORE_CACHE") or pooch.os_cache("kncore")) / "public" / source.file
    remedy = (
        f"Pass path=... of a local copy, or fetch {source.url} on a machine with access and copy it to {cached} "
        f"(sha256 {source.sha256})."
    )
    if cached.is_file() and disk.digest(cached) != source.sha256:
        disk.warn(f"{cached} is damaged (its checksum is another); it is fetched anew")
    try:
        try:
            return _retrieve(source, cached)
        except OSError as error:
            if not disk.full(error):
                raise
            return _retrieve(source, disk.elsewhere(cached.parent, error) / cached.name)
    except OSError as error:
        raise ConnectionError(f"could not fetch {source.file} from {source.url}: {error}. {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{source.url} is not the pinned {source.file}: {error}. {remedy}") from error


def _retrieve(source: Source, place: Path) -> Path:
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60)
    known = f"sha256:{source.sha256}"
    return Path(
        pooch.retrieve(source.url, known_hash=known, fname=place.name, path=place.parent, downloader=downloader)
    )


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((DATA / "public.toml").read_text(encoding="utf-8"))


def _source(name: str, paradigm: str = "") -> Source:
    entry = _table()[name]
    path, file = (entry[key].format(paradigm=paradigm) for key in ("path", "file"))
    url = _table()["address"].format(repository=entry["repository"], commit=entry["commit"], path=path)
    return Source(file, url, entry["sha256"][paradigm] if paradigm else entry["sha256"])


def _find(source: Source, path: str | Path | None) -> Path:
    if path is None:
        return fetch(source)
    path = Path(path)
    places = [path / source.file, path / Path(source.file).name] if path.is_dir() else [path]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no such file: {' or '.join(map(str, places))}. Pass the file or the folder it lies in.")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}); get an intact copy") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is no JSONDecodeError
        line = getattr(error, "lineno", "?")
        raise ValueError(f"{where.format(line=line)}: not JSON ({error}); get an intact copy") from error


def _json(file: Path, kind: type) -> Any:
    data = _parse(_text(file), str(file).replace("{", "{{").replace("}", "}}") + ", line {line}")
    if not isinstance(data, kind):
        raise ValueError(f"{file}: expected a JSON {kind.__name__}, found {type(data).__name__}")
    return data


def _lines(file: Path, fields: dict[str, type]) -> Iterator[tuple[str, dict]]:
    empty = True
    for number, line in enumerate(io.StringIO(_text(file)), 1):  # other ends of lines may stand within a text
        where = f"{file}, line {number}"
        row = _parse(line, where.replace("{", "{{").replace("}", "}}"))
        _check(where, row, fields)
        empty = False
        yield where, row
    if empty:
        raise ValueError(f"{file}: the file is empty; get an intact copy")


def _check(where: str, record: Any, fields: dict[str, type]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for name, kind in fields.items():
        if name not in record:
            raise ValueError(f"{where}: the field {name!r} is missing; found {', '.join(map(str, record))}")
        if not isinstance(record[name], kind):
            found = type(record[name]).__name__
            raise ValueError(f"{where}: the field {name!r} must be {kind.__name__}, it is {found}")


def _query(where: str, **fields: str) -> Query:
    try:
        return Query(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _template(prompt: str, subject: str) -> str:
    """The prompt with {} in place of the subject; "" where it does not occur or is empty."""
    start = locate(prompt, subject) if subject else -1
    return "" if start < 0 else f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"


def _frame(prompts: list[str]) -> tuple[str, str]:
    """What all prompts of one pattern have before and after the subject, cut at whole words."""
    left = commonprefix(prompts)
    right = commonprefix([prompt[len(left) :][::-1] for prompt in prompts])[::-1]
    while left and left[-1].isalnum():
        left = left[:-1]
    while right and right[0].isalnum():
        right = right[1:]
    return left, right


def _agreement(paradigm: str, good: list[str], bad: list[str], at: int) -> tuple[str, str]:
    """The noun that decides the agreement in the good sentence (in the singular where the pair shows it) and the
    condition; two empty strings where the paradigm is not about agreement."""
    target, foil = good[at].rstrip(PUNCTUATION), bad[at].rstrip(PUNCTUATION)
    if paradigm.startswith("determiner_noun_agreement"):
        if target.lower() in NUMBER:
            return good[-1].rstrip(PUNCTUATION), NUMBER[target.lower()]
        value = next((NUMBER[word.lower()] for word in good[at - 1 :: -1] if word.lower() in NUMBER), "")
        return (foil if value == "plural" else target), value
    start = 3 if good[:3] == ["A", "lot", "of"] else int(good[0].lower() in BEFORE_NOUN)
    if paradigm.startswith("anaphor"):
        value = REFLEXIVE.get(target, "")
        if paradigm == "anaphor_number_agreement":
            value = "singular" if value else "plural"
        return _lower_plural(good, start, value), value
    if paradigm.endswith(("subject_verb_agreement_1", "relational_noun", "relative_clause")):
        subject = good[start:at]
        end = next((i for i, word in enumerate(subject) if i and word.lower() in AFTER_NOUN), len(subject))
        value = _verb_number(target)
        return _lower_plural(good, start + end - 1, value), value
    if paradigm.endswith("subject_verb_agreement_2"):
        value = _verb_number(good[at + 1].rstrip(PUNCTUATION))
        return (foil if value == "plural" else target), value
    return "", ""


def _lower_plural(words: list[str], at: int, value: str) -> str:
    """The word there; a plural that starts a sentence is no name, so its capital goes."""
    return words[at].lower() if at == 0 and value == "plural" else words[at]


def _verb_number(verb: str) -> str:
    ending = verb.removesuffix("n't")
    return "singular" if ending.endswith("s") and not ending.endswith("ss") else "plural"


_FLAT = {
    "case_id": int,
    "prompt": str,
    "target_new": str,
    "subject": str,
    "ground_truth": str,
    "rephrase_prompt": str,
    "locality_prompt": str,
    "locality_ground_truth": str,
}
_FULL = {"case_id": int, "requested_rewrite": dict, "paraphrase_prompts": list, "neighborhood_prompts": list}
_REWRITE = {"prompt": str, "relation_id": str, "subject": str, "target_new": dict, "target_true": dict}


def _flat_case(where: str, record: dict) -> Case:
    subject, true, new = record["subject"].strip(), record["ground_truth"], record["target_new"]
    neighbour = record["locality_prompt"], record["locality_ground_truth"]
    if not subject or subject not in record["prompt"]:
        raise ValueError(f"{where}: the subject {subject!r} does not occur in the prompt {record['prompt']!r}")
    template = _template(record["prompt"], subject)
    return _case(where, record, "counterfact", template, subject, true, new, [record["rephrase_prompt"]], [neighbour])


def _full_case(where: str, record: dict) -> Case:
    rewrite = record["requested_rewrite"]
    _check(f"{where}, requested_rewrite", rewrite, _REWRITE)
    for name in ("target_new", "target_true"):
        _check(f"{where}, requested_rewrite, {name}", rewrite[name], {"str": str})
    if rewrite["prompt"].count("{}") != 1:
        raise ValueError(f"{where}: expected {{}} once in the prompt, found {rewrite['prompt']!r}")
    true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
    neighbours = [(prompt, true) for prompt in record["neighborhood_prompts"]]
    task, subject = rewrite["relation_id"], rewrite["subject"].strip()
    if not subject:
        raise ValueError(f"{where}: the subject is empty; get an intact copy")
    template = rewrite["prompt"].replace("{}", rewrite["subject"].replace(subject, "{}", 1))
    return _case(where, record, task, template, subject, true, new, record["paraphrase_prompts"], neighbours)


def _case(
    where: str,
    record: dict,
    task: str,
    template: str,
    subject: str,
    true: str,
    new: str,
    paraphrases: list[str],
    neighbours: list[tuple[str, str]],
) -> Case:
    def ask(prompt: str, target: str, subject: str = "", template: str = "") -> Query:
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: expected a prompt, found {type(prompt).__name__}")
        prompt = prompt.rstrip()
        template = (template or _template(prompt, subject)).rstrip()
        return _query(
            where,
            prompt=prompt,
            target=target,
            subject=subject if template else "",
            foil="" if new == target and not subject else new,
            task=task,
            item=f"counterfact:{record['case_id']}",
            template=template,
        )

    return Case(
        case_id=record["case_id"],
        rewrite=ask(template.replace("{}", subject), true, subject, template),
        paraphrases=tuple(ask(prompt, true, subject) for prompt in paraphrases),
        neighbours=tuple(ask(prompt, target) for prompt, target in neighbours),
        record=record,
    )
