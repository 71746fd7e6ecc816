"""CounterFact (Meng et al. 2022): facts to rewrite, with paraphrases and neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kncore.query import Query
from knpaper.datasets import files

_TEXTS = "prompt target_new subject ground_truth rephrase_prompt locality_prompt locality_ground_truth".split()
_FLAT = {"case_id": int, **dict.fromkeys(_TEXTS, str)}
_FULL = {"case_id": int, "requested_rewrite": dict, "paraphrase_prompts": list, "neighborhood_prompts": list}
_REWRITE = {"prompt": str, "relation_id": str, "subject": str, "target_new": dict, "target_true": dict}


@dataclass(frozen=True)
class Rewrite:
    """One counterfactual edit: the prompt to rewrite (target: the true object, foil: the new one), paraphrases of it,
    and prompts about neighbours that must keep their answer."""

    case_id: int
    rewrite: Query
    paraphrases: tuple[Query, ...]
    neighbours: tuple[Query, ...]


def read(path: str | Path | None = None) -> list[Rewrite]:
    """CounterFact with paraphrases and neighbours. Reads the flat form (one paraphrase and one neighbour a case, the
    one that is fetched) and the full form of the ROME authors; which one a file holds is seen from its first record.

    Raises ValueError for a malformed file.
    """
    file = files.find(files.source("counterfact"), path)
    data = files.read_json(file, list)
    full = bool(data) and isinstance(data[0], dict) and "requested_rewrite" in data[0]
    fields = _FULL if full else _FLAT
    cases = []
    for i, record in enumerate(data):
        where = f"{file}, index {i}"
        files.check_fields(where, record, fields)
        cases.append((_full_case if full else _flat_case)(where, record))
    return cases


def _flat_case(where: str, record: dict) -> Rewrite:
    subject, true, new = record["subject"].strip(), record["ground_truth"], record["target_new"]
    neighbour = record["locality_prompt"], record["locality_ground_truth"]
    if not subject or subject not in record["prompt"]:
        raise ValueError(f"{where}: the subject {subject!r} does not occur in the prompt {record['prompt']!r}")
    template = files.template(record["prompt"], subject)
    return _case(where, record, "counterfact", template, subject, true, new, [record["rephrase_prompt"]], [neighbour])


def _full_case(where: str, record: dict) -> Rewrite:
    rewrite = record["requested_rewrite"]
    files.check_fields(f"{where}, requested_rewrite", rewrite, _REWRITE)
    for name in ("target_new", "target_true"):
        files.check_fields(f"{where}, requested_rewrite, {name}", rewrite[name], {"str": str})
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
) -> Rewrite:
    def ask(prompt: str, target: str, subject: str = "", template: str = "") -> Query:
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: expected a prompt, found {type(prompt).__name__}")
        prompt = prompt.rstrip()
        template = (template or files.template(prompt, subject)).rstrip()
        return files.query(
            where,
            prompt=prompt,
            target=target,
            subject=subject if template else "",
            foil="" if new == target and not subject else new,
            task=task,
            item=f"counterfact:{record['case_id']}",
            template=template,
        )

    return Rewrite(
        case_id=record["case_id"],
        rewrite=ask(template.replace("{}", subject), true, subject, template),
        paraphrases=tuple(ask(prompt, true, subject) for prompt in paraphrases),
        neighbours=tuple(ask(prompt, target) for prompt, target in neighbours),
    )
