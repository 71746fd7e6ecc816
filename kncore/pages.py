"""What the book says that no chapter says: claims, provenance, models and the corpus, as Markdown tables."""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import nbformat
import yaml

from kncore import reference, stored
from kncore.pipeline import BESIDE, UsageError, chapters, compares, slug, write

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
MARKS = {"supported": "✓", "contradicted": "✕", "inconclusive": "~", "not run": "·"}
# The landing page's sentence on the default model: what each verdict of a claim says in words.
FINDINGS = {
    "grammar-has-neurons": {
        "supported": "grammar has its neurons too",
        "contradicted": "grammar has no such neurons",
        "inconclusive": "whether grammar has such neurons stays open",
    },
    "fact-alone": {
        "supported": "those of a fact serve that fact alone",
        "contradicted": "those of a fact serve its neighbours as well",
        "inconclusive": "whether those of a fact serve it alone stays open",
    },
    "edit-spares-answer": {
        "supported": "without them the right answer stays the best of its kind",
        "contradicted": "without them another answer of its kind wins",
        "inconclusive": "whether the right answer stays the best of its kind without them is open",
    },
    "symmetry-follows": {
        "supported": "a rewritten fact is found from its other side",
        "contradicted": "a rewritten fact is not found from its other side",
        "inconclusive": "whether a rewritten fact is found from its other side stays open",
    },
}
_ROLE = re.compile(r"\{(value|share|effect|verdict)\}`([\w-]+)(?:@([\w./-]+))?`")
_TERM = re.compile(r"^(?P<name>\S.*)\n(?P<told>(?:(?: +.*)?\n)+)", re.MULTILINE)


def generate(staging: Path) -> None:
    """Write what the pages of book/ include from book/generated/."""
    folder = staging / "book" / "generated"
    write(folder / "findings.md", findings(staging))
    write(folder / "marks.md", marks(staging))
    write(folder / "filter.md", claims_filter(staging))
    write(folder / "matrix.md", claims_matrix(staging))
    write(folder / "provenance.md", provenance(staging / "results"))
    write(folder / "hub.md", not_run(staging / "results"))
    write(folder / "corpus.md", corpus_table())
    write(folder / "trained.md", trained())
    write(folder / "api.md", reference.page())
    write(staging / "book" / "assets" / "terms.js", terms(staging / "book" / "glossary.md"))
    fill(staging)


def fill(staging: Path) -> None:
    """Put the records' numbers where the prose of notebooks and pages asks for them, for the model of each.

    A role names a claim: {value}`id` is the estimate, {share}`id` the same in per cent, {effect}`id` with its interval,
    {verdict}`id` the verdict; id@model asks for another model than the notebook's. Raises UsageError for a claim that
    is not declared.
    """
    from kncore import claims

    records = {(told["claim"], slug(told["model"])): told for told in claims.read(staging / "results")}
    default = slug(own_model(staging))

    def filled(text: str, model: str, where: Path) -> str:
        def told(match: re.Match) -> str:
            form, claim, other = match.groups()
            if claim not in claims.CLAIMS:
                raise UsageError(f"{where.name} asks for {match[0]}, but no claim is called {claim!r}")
            record = records.get((claim, slug(other) if other else model))
            if record is None:
                return "[not run]{.not-run}"
            return {
                "value": f"{record['value']:.2f}",
                "share": f"{100 * record['value']:.0f} %",
                "effect": claims.effect(record),
                "verdict": f"[{record['verdict']}]{{.{record['verdict']}}}",
            }[form]

        return _ROLE.sub(told, text)

    for path in [*staging.glob("notebooks/*.ipynb"), *staging.glob("book/runs/*/*.ipynb")]:
        model = default if path.parent.name == "notebooks" else path.parent.name
        nb = nbformat.read(path, as_version=4)
        before = [cell.source for cell in nb.cells]
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = filled(cell.source, model, path)
        if before != [cell.source for cell in nb.cells]:
            write(path, stored.dumps(nb))
    for path in staging.glob("book/*.md"):
        text = path.read_text(encoding="utf-8")
        if _ROLE.search(text):
            write(path, filled(text, default, path))


def own_model(root: Path) -> str:
    """The model of the stored notebooks, or "" where none has one."""
    models = (str(chapter.defaults["model"]) for chapter in chapters(root) if "model" in chapter.defaults)
    return next(models, "")


def findings(staging: Path) -> str:
    """What the book found on its default model, in a sentence that follows the records, and the count of verdicts."""
    from kncore import claims

    model = own_model(staging)
    words = {told["claim"]: told["verdict"] for told in claims.read(staging / "results") if told["model"] == model}
    said = [phrases[words[claim]] for claim, phrases in FINDINGS.items() if claim in words]
    if not said:
        return "No claim has a record yet.\n"
    counts = [f"{list(words.values()).count(verdict)} {verdict}" for verdict in claims.VERDICTS]
    return (
        f"On {_code(model)} {'; '.join(said)}. Of {len(words)} claims, each with its rule set before its numbers: "
        f"{', '.join(counts)}.\n"
    )


def marks(staging: Path) -> str:
    """The claims in small: a row a chapter, and under each model a mark for each claim of the chapter, as HTML.

    A mark says its claim, verdict and effect in words too, to a pointer that rests on it and to a screen reader.
    """
    from kncore import claims

    records = {(told["claim"], told["model"]): told for told in claims.read(staging / "results")}
    found, shown = {chapter.number: chapter for chapter in chapters(staging)}, _contents(staging)
    own = own_model(staging)
    models = [own, *sorted({model for _, model in records} - {own})]

    def mark(claim: claims.Claim, model: str) -> str:
        told = records.get((claim.id, model))
        verdict = told["verdict"] if told else "not run"
        old = " outdated" * bool(told and claims.stale(told))
        words = f"{verdict}{', stale' if old else ''}: {claim.statement}"
        more = f" {claims.effect(told)}, n = {told['n']}" if told else ""
        return (
            f'<span class="told {verdict.replace(" ", "-")}{old}" role="img" aria-label="{_html(words)}" '
            f'title="{_html(words + more)}"></span>'
        )

    lines = ["```{raw} html", '<div class="pst-scrollable-table-container"><table class="table marks">']
    heads = "".join(f'<th scope="col"><code>{_html(model)}</code></th>' for model in models)
    lines.append(f'<thead><tr><th scope="col">Chapter</th>{heads}</tr></thead><tbody>')
    for number in dict.fromkeys(claim.chapter for claim in claims.CLAIMS.values()):
        mine = [claim for claim in claims.CLAIMS.values() if claim.chapter == number]
        name = _html(_title(found[number].path)) if number in found else f"Chapter {number}"
        page = f"notebooks/{found[number].path.stem}" if number in found else ""
        head = f'<a href="../{quote(page)}.html">{name}</a>' if page in shown else name
        cells = "".join(f"<td>{''.join(mark(claim, model) for claim in mine)}</td>" for model in models)
        lines.append(f'<tr><th scope="row">{head}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>", "```"]) + "\n"


def terms(glossary: Path) -> str:
    """The glossary's definitions as a script, by the anchor of each term, for the hints at links to terms."""
    text = glossary.read_text(encoding="utf-8") if glossary.is_file() else ""
    told = {}
    for block in re.findall(r"^```\{glossary\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for entry in _TERM.finditer(block):
            plain = re.sub(r"\s*\{cite:?\w*\}`[^`]*`", "", entry["told"])
            plain = re.sub(r"\{\w+\}`([^`<]+?)(?: <[^`]*>)?`", r"\1", plain)
            anchor = "term-" + re.sub(r"[^a-zA-Z0-9._]+", "-", entry["name"].strip())
            told[anchor] = " ".join(re.sub(r"[*$]|\\,", "", plain).split())
    return f"const TERMS = {json.dumps(told, ensure_ascii=False, indent=1)};\n"


def claims_table(root: Path) -> str:
    """The claims in a Markdown table for the readme: a row a chapter, with its first claim and a mark for each one.

    Effects and verdicts are those of the chapter's own model or, where a chapter compares models, of each of them.
    """
    from kncore import claims

    records = claims.read(root / "results")
    rows = [["chapter", "its first claim", "effect [95 % interval]", "all its claims"], ["---"] * 4]
    for chapter in chapters(root):
        mine = [claim for claim in claims.CLAIMS.values() if claim.chapter == chapter.number]
        names = str(chapter.defaults.get("models", chapter.defaults.get("model"))).split(",")
        told = {(r["claim"], r["model"]): r for r in records if r["model"] in names}
        if not mine:
            continue

        def row(some: Sequence, told: Mapping = told) -> list[str]:
            got = [told.get(place) for place in some]
            stale = ["(stale)"] * any(r and claims.stale(r) for r in got)
            return ["".join(MARKS[r["verdict"] if r else "not run"] for r in got), *stale]

        first = [told.get((mine[0].id, name)) for name in names]
        effects = [f"{claims.effect(r)}, {r['verdict']}" for r in first if r] or ["not run"]
        signs = [" ".join(row([(claim.id, name) for claim in mine])) for name in names]
        title = f"[{_title(chapter.path)}](notebooks/{link(chapter.path.name)})"
        rows.append([title, mine[0].statement, "<br>".join(effects), "<br>".join(signs)])
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows) + "\n"


def claims_matrix(staging: Path) -> str:
    """All declared claims × the notebooks' own model and all others with a record, as Markdown for a page in book/.

    A cell holds the verdict, linked to the page of the chapter on that model where the book has one, the effect with
    its interval, n, and what makes the record stale.
    """
    from kncore import claims

    records = {(told["claim"], told["model"]): told for told in claims.read(staging / "results")}
    found = {chapter.number: chapter for chapter in chapters(staging)}
    models, pages = _columns(staging), _contents(staging)

    def linked(word: str, number: str, model: str | None = None) -> str:
        if number not in found:
            return word
        name, default = found[number].path.stem, found[number].defaults.get("model")
        here = model in (None, default) or compares(found[number])
        page = f"notebooks/{name}" if here else f"book/runs/{slug(model)}/{name}"
        return f"[{word}]({link(os.path.relpath(page, 'book'))}.ipynb)" if page in pages else word

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


def claims_filter(staging: Path) -> str:
    """The form that narrows the matrix of claims, as HTML; a page without scripts does not show it."""
    from kncore import claims

    used = {claim.chapter for claim in claims.CLAIMS.values()}
    numbered = {c.number: c.path.stem.replace("-", " ") for c in chapters(staging) if c.number in used}
    choices = {
        "verdict": {word.replace(" ", "-"): word for word in ("supported", "contradicted", "inconclusive", "not run")},
        "chapter": numbered,
        "model": {model: model for model in _columns(staging)},
    }
    fields = ['<label>Text <input type="search" name="text" placeholder="fact, margin …"></label>']
    for name, options in choices.items():
        every = "".join(
            f'<option value="{_html(value)}">{_html(shown)}</option>' for value, shown in {"": "all", **options}.items()
        )
        fields.append(f'<label>{name.capitalize()} <select name="{name}">{every}</select></label>')
    fields += ['<button type="reset">All claims</button>', '<output id="claims-shown" aria-live="polite"></output>']
    lines = ['<form id="claims-filter" aria-label="Filter the claims">', *fields, "</form>"]
    return "\n".join(["```{raw} html", *lines, "```"]) + "\n"


def _columns(staging: Path) -> list[str]:
    """The models of the matrix: the notebooks' own, then all others with a record."""
    from kncore import claims

    own = {str(chapter.defaults["model"]) for chapter in chapters(staging) if "model" in chapter.defaults}
    return [*sorted(own), *sorted({told["model"] for told in claims.read(staging / "results")} - own)]


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
        kncore = told["versions"]["kncore"]
        short = (told[name][:8] for name in ("revision", "code"))
        revision, code = (_code(text) if text else "" for text in short)
        plain = (told["source"], told["seed"], told["n"])
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
    return f"{before}{BEGIN}\n{claims_table(root)}{END}{rest.split(END)[1]}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _contents(staging: Path) -> set[str]:
    """The pages of the book, without their endings."""
    contents = yaml.safe_load((staging / "_toc.yml").read_text(encoding="utf-8"))
    return set(files(contents))


def _title(notebook: Path) -> str:
    """The first heading of a notebook, or its name."""
    first = nbformat.read(notebook, as_version=4).cells[0].source
    return next((line[2:].strip() for line in first.splitlines() if line.startswith("# ")), notebook.stem)


def _line(value: object) -> str:
    """A value as one line without control characters."""
    return stored.visible(" ".join(str(value).split()))


def _text(value: object) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", _line(value))


def _code(value: object) -> str:
    """The same in the type of code."""
    line = _line(value)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}"


def _html(value: object) -> str:
    """Text that HTML shows as it is, in an element or in an attribute; a line end would leave the raw block."""
    return html.escape(_line(value))


def link(path: Path | str) -> str:
    """A path as the target of a link in Markdown."""
    return quote(Path(path).as_posix(), safe="/@+=,~")


def files(contents: Mapping) -> Iterator[str]:
    """The pages that _toc.yml names, the first page first, each before those below it."""
    yield contents["root"]
    below = [entry for part in reversed(contents["parts"]) for entry in reversed(part["chapters"])]
    while below:
        entry = below.pop()
        yield entry["file"]
        below += reversed(entry.get("sections", ()))
