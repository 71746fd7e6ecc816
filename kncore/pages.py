"""What the book says that no chapter says: claims, provenance, models and the corpus, as Markdown tables."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from kncore import reference
from kncore.pipeline import BESIDE, UsageError, chapters, compares, slug, write

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"


def generate(staging: Path) -> None:
    """Write what the pages of book/ include from book/generated/."""
    folder = staging / "book" / "generated"
    write(folder / "claims.md", claims_table(staging / "results", beside=False))
    write(folder / "matrix.md", claims_matrix(staging))
    write(folder / "provenance.md", provenance(staging / "results"))
    write(folder / "hub.md", not_run(staging / "results"))
    write(folder / "corpus.md", corpus_table())
    write(folder / "trained.md", trained())
    write(folder / "api.md", reference.page())


def claims_table(results: Path, beside: bool = True) -> str:
    """The claims and their verdicts as a Markdown table, made from the records below `results`.

    Without `beside`, the models of `BESIDE` are left out wherever another model has a record of the claim.
    """
    from kncore import claims

    frame = claims.table(results)
    if not beside:
        frame = frame[
            ~frame.model.isin(BESIDE) | frame.groupby("claim").model.transform(lambda m: m.isin(BESIDE).all())
        ]
    rows = [[str(column) for column in frame.columns], ["---"] * len(frame.columns)]
    rows += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def claims_matrix(staging: Path) -> str:
    """All declared claims × the notebooks' own model and all others with a record, as Markdown for a page in book/.

    A cell holds the verdict, linked to the page of the chapter on that model where the book has one, the effect with
    its interval, n, and what makes the record stale.
    """
    from kncore import claims

    records = {(told["claim"], told["model"]): told for told in claims.read(staging / "results")}
    found = {chapter.number: chapter for chapter in chapters(staging)}
    contents = yaml.safe_load((staging / "_toc.yml").read_text(encoding="utf-8"))
    pages = {page for part in contents["parts"] for page in files(part["chapters"])}
    own = {str(chapter.defaults["model"]) for chapter in found.values() if "model" in chapter.defaults}
    models = [*sorted(own), *sorted({model for _, model in records} - own)]

    def linked(word: str, number: str, model: str | None = None) -> str:
        if number not in found:
            return word
        name, default = found[number].path.stem, found[number].defaults.get("model")
        here = model in (None, default) or compares(found[number])
        page = f"notebooks/{name}" if here else f"book/runs/{slug(model)}/{name}"
        return f"[{word}]({Path(os.path.relpath(page, 'book')).as_posix()}.ipynb)" if page in pages else word

    def cell(claim: claims.Claim, model: str) -> list[str]:
        told = records.get((claim.id, model))
        if told is None:
            return ["[not run]{.not-run}"]
        verdict, reasons = told["verdict"], claims.stale(told)
        said = [f"[{linked(verdict, claim.chapter, model)}]{{.{verdict}{' .outdated' * bool(reasons)}}}"]
        said += [f"[{_text(claims.effect(told))}]{{.effect}}", f"n = {told['n']}"]
        return said + [f"[stale: {_text('; '.join(reasons))}]{{.stale}}"] * bool(reasons)

    rows = [["Claim", *map(_code, models)]]
    for claim in claims.CLAIMS.values():
        chapter = linked(f"Chapter {claim.chapter}", claim.chapter)
        told = [_text(claim.statement), f"[{chapter}, {_code(claim.id)}: {_text(claim.metric)}]{{.metric}}"]
        rows.append([told, *(cell(claim, model) for model in models)])
    return _list_table(rows, "matrix", stub=True)


def not_run(results: Path) -> str:
    """The hub models of the registry that have no record, as Markdown: each with the command that runs the chapters."""
    from kncore import claims, models

    ran = {told["model"] for told in claims.read(results)}
    rows = [["Model", "Revision", "Not run here; this runs it"]]
    for name, entry in models.REGISTRY.items():
        if isinstance(entry, models.Hub) and name not in ran:
            command = f"python -m kncore run --model {name}"
            rows.append([_code(name), _code(entry.revision[:8]), _code(command)])
    return _list_table(rows, "hub") if rows[1:] else "All have been run.\n"


@functools.cache
def corpus_table() -> str:
    """What the controlled corpus holds, counted, as Markdown."""
    from kncore import corpus

    words = [corpus.split(text) for text, _ in corpus.sentences()]
    pairs, world = corpus.pairs(), corpus.world()
    groups = [(f"capitals, {group}", told) for group, told in world.capital.items()]
    groups += [(f"fields, {group}", told) for group, told in world.field.items()]
    rows = [["Of", "How many"], ["sentences", len(words)], ["words and marks", sum(map(len, words))]]
    rows += [["different ones", len({word for some in words for word in some})]]
    rows += [["pairs of demonstrative and noun", len(pairs)], ["occurrences of them", sum(p.count for p in pairs)]]
    rows += [["pairs held out, of real nouns", sum(p.held_out for p in pairs if p.kind != "invented")]]
    rows += [[f"invented facts: {name.replace('_', ' ')}", len(told.pairs)] for name, told in groups]
    rows += [["times that each of them is stated from a side", corpus.TIMES]]
    return _list_table([[name, n if isinstance(n, str) else f"{n:,}"] for name, n in rows], "corpus")


def trained() -> str:
    """What the controlled models know, asked after training, as Markdown: the share right of each training seed.

    Below the table stands how many shares of the further seeds lie in the 95 % interval of the first one's.
    """
    import pandas as pd

    from kncore import models

    tables = {
        kind: [
            pd.read_csv(models.SHIPPED / name / "evaluation.tsv", sep="\t").set_index("what")
            for name in models.replicas(kind)
        ]
        for kind in BESIDE
        if kind.startswith("controlled-")
    }
    asked = list(dict.fromkeys(what for some in tables.values() for what in some[0].index))
    rows = [["Asked", *map(_code, tables)]]
    for what in asked:
        rows.append([_text(what)])
        for some in tables.values():
            rows[-1].append(", ".join(f"{table.share[what]:.2f}" for table in some if what in table.index))
    further = [
        first.low[what] <= table.share[what] <= first.high[what]
        for first, *others in tables.values()
        for table in others
        for what in table.index
    ]
    said = f"Of {len(further)} shares of further seeds, {sum(further)} lie in the 95 % interval of the first seed's.\n"
    return _list_table(rows, "trained") + ("\n" + said) * bool(further)


def provenance(results: Path) -> str:
    """What each record was made from, as Markdown: one row per record."""
    from kncore import claims

    rows = [["Claim", "Model", "Revision", "Source", "Seed", "n", "Code", "kncore", "Date"]]
    for told in claims.read(results):
        kncore = told.get("versions", {}).get("kncore", "")
        short = (str(told.get(name, ""))[:8] for name in ("revision", "code"))
        revision, code = (_code(text) if text else "" for text in short)
        plain = (told.get("source", ""), told.get("seed", ""), told["n"])
        rows.append([_code(told["claim"]), _code(told["model"]), revision, *map(_text, plain), code])
        rows[-1] += [_text(kncore), _text(told.get("date", "not recorded"))]
    return _list_table(rows, "provenance") if rows[1:] else "No claim has a record yet.\n"


def _list_table(rows: Sequence[Sequence[str | Sequence[str]]], kind: str, stub: bool = False, heads: int = 1) -> str:
    lines = [
        "```{list-table}",
        f":header-rows: {heads}",
        f":class: {kind}",
        *([":stub-columns: 1"] if stub else []),
        "",
    ]
    for row in rows:
        for bullet, cell in zip(["* -", *["  -"] * (len(row) - 1)], row, strict=True):
            first, *rest = [cell] if isinstance(cell, str) else cell
            lines += [f"{bullet} {first}".rstrip(), *(line for text in rest for line in ("", f"    {text}"))]
    return "\n".join([*lines, "```"]) + "\n"


def readme(root: Path) -> str:
    """README.md with the table between its markers made anew from results/."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{path} must hold {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{claims_table(root / 'results', beside=False)}{END}{rest.split(END)[1]}"


def _cell(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _text(value: object) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(value).split()))


def _code(value: str) -> str:
    fence = "`" * (max(map(len, re.findall("`+", value)), default=0) + 1)
    return f"{fence} {' '.join(value.split())} {fence}"


def files(entries: Sequence[Mapping]) -> Iterator[str]:
    """The pages of a part of the contents, with those below them."""
    for entry in entries:
        yield entry["file"]
        yield from files(entry.get("sections", ()))
