"""known_1000 (Meng et al. 2022): the facts that GPT-2 XL knows, for tracing."""

from __future__ import annotations

from pathlib import Path

from kncore.query import Query
from knpaper.datasets import files


def read(path: str | Path | None = None) -> list[Query]:
    """Return the 1,209 facts that GPT-2 XL knows, on which Meng et al. (2022) trace; task is the Wikidata relation.

    The prompt is the file's `prompt`, which can be longer than its filled template: what follows is added to the
    template. Where the file has no template that begins so, the subject is where `tasks.locate` finds it. Raises
    ValueError for a malformed file.
    """
    file = files.find(files.source("known_1000"), path)
    fields = {"subject": str, "attribute": str, "prompt": str, "relation_id": str}
    queries = []
    for i, record in enumerate(files.read_json(file, list)):
        where = f"{file}, index {i}"
        files.check_fields(where, record, fields)
        prompt, subject = record["prompt"], record["subject"].strip()
        template = str(record.get("template", ""))
        filled = template.replace("{}", subject)
        fits = template.count("{}") == 1 and prompt.startswith(filled)
        queries.append(
            files.query(
                where,
                prompt=prompt,
                target=record["attribute"],
                subject=subject,
                task=record["relation_id"],
                item=f"{record['relation_id']}:{subject}",
                template=template + prompt[len(filled) :] if fits else files.template(prompt, subject),
            )
        )
    return queries
