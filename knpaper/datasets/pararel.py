"""ParaRel as Dai et al. (2022) use it: facts in many patterns."""

from __future__ import annotations

import functools
from os.path import commonprefix
from pathlib import Path
from typing import Literal

from kncore.checks import unknown
from kncore.query import MASK, Query
from knpaper.datasets import files
from knpaper.datasets.files import PUNCTUATION


@functools.lru_cache(maxsize=1)
def _data(file: Path, changed: int) -> dict:
    """Return what the file holds, which was last `changed` then: reading takes a second, and relations are many."""
    return files.read_json(file, dict)


def relations(path: str | Path | None = None) -> list[str]:
    """Return the names of the relations that a file of ParaRel holds; `path` and errors as in `read`."""
    file = files.find(files.source("pararel"), path)
    return list(_data(file, file.stat().st_mtime_ns))


def read(relation: str, path: str | Path | None = None, form: Literal["masked", "causal"] = "masked") -> list[Query]:
    """Return the prompts of a ParaRel relation ("P36") as Dai et al. (2022) use them, bag after bag, one query a
    pattern.

    Masked: the prompts as they are. Causal: only patterns in which nothing but punctuation follows the mask, cut
    before it (`joined` where no blank stands there). The file does not name the subject: it is what remains of a prompt
    when the words that this pattern has in common in all bags are taken away, where all patterns of the bag agree on
    it. `item` is then "P36:<subject>". Where they do not, `subject` and `template` are "" and `item` is "P36:<index of
    the bag>".

    Raises ValueError for an unknown relation or form, or a malformed file.
    """
    if form not in ("causal", "masked"):
        raise unknown("form", form, ("causal", "masked"))
    file = files.find(files.source("pararel"), path)
    data = _data(file, file.stat().st_mtime_ns)
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
                files.query(
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


def _frame(prompts: list[str]) -> tuple[str, str]:
    """Return what all prompts of one pattern have before and after the subject, cut at whole words."""
    left = commonprefix(prompts)
    right = commonprefix([prompt[len(left) :][::-1] for prompt in prompts])[::-1]
    while left and left[-1].isalnum():
        left = left[:-1]
    while right and right[0].isalnum():
        right = right[1:]
    return left, right
