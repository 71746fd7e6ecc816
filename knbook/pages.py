"""Tables that no chapter holds, made from the records by the templates in `templates/`: claims, models, the corpus.

The templates escape what they show, and show it in one line without control characters: records and names of models
come from anywhere.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from bs4 import BeautifulSoup
from docutils.utils.smartquotes import smartyPants
from markupsafe import Markup
from sphinx_design.icons import get_octicon

from knbook.checkout import COMPANION_MODELS, Chapter, chapters, is_comparison, slug, timing
from knbook.errors import UsageError
from kncore import rome, zoo
from knpaper import across, audit, claims, corpus, playground, rules, seeds, shapes, specifications, stored
from knpaper.figures import FACTS, GRAMMAR
from knpaper.records import EARLIER, column_of, effect, read_records
from knpaper.rules import SIDES, VERDICTS, WITHDRAWN, Claim
from knpaper.staleness import stale

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
MARKS = {"supported": "✓", "contradicted": "✕", "inconclusive": "~", "not run": "·"}
CLAIMS_PAGE = "book/claims"
ASKED = ("asked", "prompt", "should say", "before", "after")  # the table of questions to an edited model
TIMED = "qwen2.5-coder-0.5b"  # whose stored run began without stored scores


@dataclass(frozen=True)
class Book:
    """What the pages of a checkout are made from: chapters by number, records with `stale`, and the pages' names.

    Records are by claim and by model, "model, public data" where the data are not the project's own.
    """

    root: Path
    chapters: Mapping[str, Chapter]
    records: Mapping[tuple[str, str], Mapping]
    pages: frozenset[str]
    over_seeds: Mapping[tuple[str, str], seeds.Stability]

    @property
    def model(self) -> str:
        """The model of the stored notebooks, or "" where none has one."""
        return next((str(c.defaults["model"]) for c in self.chapters.values() if "model" in c.defaults), "")

    @property
    def models(self) -> list[str]:
        """The notebooks' own models, on whatever data, then all others with a record, the controlled ones last."""
        own = {str(chapter.defaults["model"]) for chapter in self.chapters.values() if "model" in chapter.defaults}
        rest = {name for _, name in self.judged} - own

        def order(name: str) -> tuple[bool, bool, str]:
            return name.partition(", ")[0] not in own, name.startswith("controlled-"), name

        return [*sorted(own), *sorted(rest, key=order)]

    @property
    def judged(self) -> Mapping[tuple[str, str], Mapping]:
        """The records without those of further training seeds, which say how far the first one's can be relied on."""
        return {key: record for key, record in self.records.items() if not _is_further(key[1])}

    def page(self, number: str, model: str | None = None) -> str:
        """Return the page of a chapter, or of its run on another model; "" where the book has none."""
        if number not in self.chapters:
            return ""
        chapter = self.chapters[number]
        own = model in (None, chapter.defaults.get("model")) or is_comparison(chapter)
        page = f"notebooks/{chapter.path.stem}" if own else f"book/runs/{slug(model)}/{chapter.path.stem}"
        return page if page in self.pages else ""

    @property
    def target(self) -> str:
        """The page that has an anchor for each claim, or "" where the book has none."""
        return CLAIMS_PAGE if CLAIMS_PAGE in self.pages else ""


def load(root: Path, names: Iterable[str] = ()) -> Book:
    """Return the book in a folder, with pages of these names; ValueError where a record or a notebook is none."""
    found, records = read_records(root / "results"), {}
    over_seeds, voids = seeds.stability(found), rules.void(found)
    for record in found:
        key = record["claim"], column_of(record)
        voided = {}
        if (record["claim"], record["model"], record["source"]) in voids:
            voided = {"verdict": "inconclusive", "side": "neither", "void": True}
        of_seeds = over_seeds[key].word if key in over_seeds else "stable"
        notes = {"over_seeds": "" if of_seeds == "stable" else of_seeds, "void": False}
        records[key] = {**EARLIER, **notes, **record, **voided, "stale": stale(record)}
    by_number = {chapter.number: chapter for chapter in chapters(root)}
    return Book(root, by_number, records, frozenset(names), over_seeds)


def _is_further(model: str) -> bool:
    """Return whether a model is a controlled one from a further training seed, e.g. controlled-gpt2-1."""
    return bool((match := seeds.NAME.fullmatch(model)) and match[2])


def _one_line(value: object) -> object:
    return value if isinstance(value, Markup) else stored.visible(" ".join(str(value).split()))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("knbook"),
        autoescape=jinja2.select_autoescape(["html"]),
        finalize=_one_line,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"octicon": get_octicon, "effect": effect, "classes": classes, "said": said}
    environment.globals |= {"power": power}
    environment.filters["typeset"] = functools.partial(smartyPants, attr="qDe")  # marks and dashes as Sphinx sets them
    return environment


def fill(template: str, **values: object) -> str:
    """Return what a template makes of values."""
    return _environment().get_template(template).render(values)


def table(name: str, book: Book, link: Callable[[str], str] = str) -> str:
    """Return one of `TABLES` as HTML; `link` gives the address of a page."""
    return fill(f"{name}.html", link=link, **TABLES[name](book))


def classes(claim: Claim, record: Mapping | None) -> str:
    """Return the classes of a mark: verdict, side, and whether it is exploratory, unstable over seeds or outdated."""
    if record is None:
        return "not-run"
    kind = "check" if claim.check else claims.side_class(record["side"])
    unstable = record["over_seeds"] == "unstable over seeds"
    notes = {"explored": record["exploratory"], "unstable": unstable, "outdated": record["stale"]}
    return " ".join([record["verdict"], kind, *(name for name, holds in notes.items() if holds)])


def said(claim: Claim, record: Mapping | None) -> str:
    """Return what a mark says in words: verdict, side and notes, then the claim with its effect and n."""
    if record is None:
        return f"not run: {claim.statement}"
    words = [f"check {claim.word(record['verdict'])}"] if claim.check else [record["verdict"]]
    words += [] if claim.check else [f"speaks for {record['side']}"]
    notes = {"void, its check failed": record["void"], "exploratory": record["exploratory"]}
    notes |= {record["over_seeds"]: record["over_seeds"]}
    words += [name for name, holds in (notes | {"stale": record["stale"]}).items() if holds]
    return f"{', '.join(words)}: {claim.statement} {effect(record)}, n = {record['n']} {claim.units}"


def power(record: Mapping) -> str:
    """Return how often a repeat supports what is expected, contradicts the null, and is a false alarm; or a dash."""
    found = record["power"]
    if not {"expected", "null"} <= set(found):
        return "–"
    return " · ".join(f"{share:.2f}" for share in (found["expected"][0], found["null"][1], found["null"][0]))


def findings(book: Book) -> dict:
    """Return the claims that speak most widely for either side: each with its verdict, on how many models of how many,
    whether all of these are controlled ones, and on how many of them training seeds do not confirm it."""
    rows, widely = across.across(across.own(book.judged)), {}
    for side in SIDES[:2]:
        found = across.evidence(rows, side)
        widely[side] = [
            (
                row.claim,
                verdict,
                len(here),
                len(row.records),
                all(model.startswith("controlled-") for model in here),
                sum(bool(row.records[model]["over_seeds"]) for model in here),
            )
            for row, verdict, here in found
        ]
    return {"widely": widely}


def counts(book: Book) -> dict:
    """Return how many verdicts speak for either side, how sure they are, and how many claims flip between models."""
    rows = across.across(across.own(book.judged))
    return {
        "counts": across.tally(book.judged) | audit.multiplicity(list(book.judged.values())),
        "flips": sum(row.flips for row in rows),
        "compared": sum(len(row.decided) > 1 for row in rows),
        "pretrained": across.pretrained(rows),
    }


def one_edit(book: Book) -> dict:
    """Return what the model says before and after an edit, from the output of the chapter that follows one through.

    A row for the first question of each kind: the prompt, what it should say, and the most probable answer with its
    probability before and after. No rows where that chapter or its table is not there.
    """
    rows: dict[str, dict] = {}
    cells = nbformat.read(book.chapters["00"].path, 4).cells if "00" in book.chapters else []
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    tables = [BeautifulSoup(out.get("data", {}).get("text/html", ""), "html.parser").table for out in outputs]
    for table in tables:
        heads, *lines = (
            [[cell.get_text() for cell in line.select("th, td")] for line in table.select("tr")] if table else [[]]
        )
        if set(ASKED) <= set(heads):
            for line in lines:
                row = dict(zip(heads, line, strict=True))
                rows.setdefault(
                    row["asked"], {**row, **{when: row[when].split(", ")[0] for when in ("before", "after")}}
                )
            break
    return {"rows": list(rows.values())}


def marks(book: Book) -> dict:
    """Return the claims in small: a row a chapter, under each model a mark for each claim; the checks at the end."""
    rows = []
    for number in dict.fromkeys(claim.chapter for claim in claims.CLAIMS.values()):
        title = _title(book.chapters[number].path) if number in book.chapters else f"Chapter {number}"
        here = [claim for claim in claims.CLAIMS.values() if claim.chapter == number and not claim.check]
        rows += [{"title": title, "page": book.page(number), "claims": here}] if here else []
    if checks := [claim for claim in claims.CLAIMS.values() if claim.check]:
        rows.append({"title": "Checks that an intervention took", "page": "", "claims": checks})
    return {"chapters": rows, "models": book.models, "records": _records(book), "target": book.target}


def matrix(book: Book, check: bool = False) -> dict:
    """Return all declared claims, or all checks of a manipulation, with their records by model."""
    chosen = [claim for claim in claims.CLAIMS.values() if claim.check == check]
    return {"claims": chosen, "models": book.models, "records": _records(book), "page": book.page}


def withdrawn(book: Book) -> dict:
    """Return the claims that were withdrawn, by id, and which claims are there in their place."""
    return {"withdrawn": WITHDRAWN, "target": book.target}


def models_compared(book: Book) -> dict:
    """Return which claims hold on which models, which flip, and what the models on either side have in common."""
    rows = across.across(across.own(book.judged))
    decided = [row for row in rows if len(row.decided) > 1]
    surviving = {id(record) for record in audit.surviving(list(book.judged.values()))}
    strict = {key: record for key, record in book.judged.items() if id(record) in surviving}
    return {
        "rows": rows,
        "decided": decided,
        "same": {side: [row for row in decided if _side(row) == side] for side in SIDES},
        "flips": [row for row in rows if row.flips],
        "strictly": sum(row.flips for row in across.across(across.own(strict))),
        "pairs": across.pairs(rows),
        "alone": across.alone(rows),
        "kinds": {kind: across.split_by(rows, kind) for kind in across.KINDS},
        "leaning": across.leaning(rows),
        "chapters": Counter(row.claim.chapter for row in rows if row.flips).most_common(),
        "pretrained": across.pretrained(rows),
        "target": book.target,
    }


def _side(row: across.Across) -> str:
    """Return for whom a claim speaks whose decided verdicts are all the same; "" for one that flips."""
    return row.claim.side(row.verdict) if row.verdict else ""


def by_agreement(book: Book) -> dict:
    """Return claims × models, on whatever data, from the claims on which the models agree to those that flip; public
    data count for neither."""
    rows = across.across(across.own(book.judged))
    return {"rows": rows, "models": book.models, "records": _records(book), "target": book.target}


def agreement(book: Book) -> dict:
    """Return the claims with a record of the default model on the project's own data and on public ones, drawn beside
    each other, and how many verdicts are the same and how many opposite."""
    rows = []
    for claim in claims.CLAIMS.values():
        pair = [book.records.get((claim.id, f"{book.model}{data}")) for data in ("", ", public data")]
        if None not in pair:
            rows.append({"claim": claim, "page": book.page(claim.chapter), **_beside(claim, *pair)})
    verdicts = [{row["own"]["verdict"], row["public"]["verdict"]} for row in rows]
    same = sum(len(pair) == 1 for pair in verdicts)
    return {"rows": rows, "same": same, "opposite": sum(pair == {*VERDICTS[:2]} for pair in verdicts)}


def by_seed(book: Book) -> dict:
    """Return by claim, in their order, what the training seeds of each model say."""
    rows = {claim: [] for claim in claims.CLAIMS}
    for (claim, model), found in book.over_seeds.items():
        rows[claim].append((model, found, claims.CLAIMS[claim].word(book.records[claim, model]["verdict"])))
    return {"rows": [(claims.CLAIMS[claim], of_models) for claim, of_models in rows.items() if of_models]}


def localisation(book: Book) -> dict:
    """Return chapter 3's tables of how local relations and conditions are, of own and of public data."""
    found = {}
    for label, folder in (("own data", book.model), ("public data", f"{book.model}@public")):
        path = book.root / "results" / folder / "localisation.tsv"
        if path.is_file():
            found[label] = pd.read_csv(path, sep="\t").to_dict("records")
    return {"tables": found}


def multiverse(book: Book) -> dict:
    """Return for each claim of the multiverse its curve, and how many specifications agree with the book's verdict."""
    path = book.root / "results" / "multiverse.tsv"
    rows = specifications.read(path) if path.is_file() else pd.DataFrame(columns=["claim"])
    rows = rows[rows.claim.isin(list(claims.CLAIMS))]
    counts = specifications.agreement(rows) if len(rows) else []
    found = []
    for claim, part in rows.groupby("claim", sort=False):
        voids = {model for (name, model), record in book.records.items() if name == claim and record["void"]}
        mine = [{**count, "void": count["model"] in voids} for count in counts if count["claim"] == claim]
        found.append(
            {"claim": claims.CLAIMS[claim], "curve": specifications.curve(part, claims.CLAIMS[claim]), "counts": mine}
        )
    return {"claims": found, "total": len(rows), "page": book.page}


def _beside(claim: Claim, own: Mapping, public: Mapping) -> dict:
    """Return two records of a claim and their places in pixels on one axis that holds both and the rule's border.

    An end that the data do not bound goes to the end of the axis.
    """
    borders = [claim.threshold] if claim.kind == "above" else [-claim.threshold, claim.threshold]
    shown = [x for r in (own, public) for x in (r["low"], r["value"], r["high"]) if x is not None] + borders
    first, last = min(shown), max(shown)

    def at(x: float | None, end: float) -> str:
        return f"{8 + 204 * ((end if x is None else x) - first) / (last - first or 1):.1f}"

    bars = []
    for record, name, y in ((own, "own data", 12), (public, "public data", 30)):
        ends = {"low": at(record["low"], first), "value": at(record["value"], 0), "high": at(record["high"], last)}
        colour = FACTS if record is own else GRAMMAR
        bars.append({**ends, "y": y, "colour": colour, "title": f"{name}: {effect(record)}, n = {record['n']}"})
    ends = [f"{x:.2g}" for x in (first, last)]
    return {"own": own, "public": public, "bars": bars, "borders": [at(x, 0) for x in borders], "ends": ends}


def _records(book: Book) -> dict:
    """Return the records by claim and model, None where there is none."""
    return {(claim, model): book.judged.get((claim, model)) for claim in claims.CLAIMS for model in book.models}


def choices(book: Book) -> dict:
    """Return the choices of the form that narrows the matrix; a page without scripts does not show it."""
    used = {claim.chapter for claim in claims.CLAIMS.values()}
    return {
        "choices": {
            "verdict": {verdict.replace(" ", "-"): verdict for verdict in MARKS},
            "speaks for": {claims.side_class(side): side for side in SIDES},
            "chapter": {n: c.path.stem.replace("-", " ") for n, c in book.chapters.items() if n in used},
            "model": {model: model for model in book.models},
        }
    }


def hub_models(book: Book) -> dict:
    """Return the hub models of the registry: what each needs, and how many of its claims have a record here.

    `hours` of one core are those of the run on `TIMED`, whose scores were not stored before, times the ratio of the
    weights that a position passes, times that of the blocks: attribution, which most of the time goes into, replaces
    the neurons of each block in its turn. None where that run is not in the checkout.
    """
    spent = [timing(path)["seconds"] for path in (book.root / "results" / TIMED).glob("*.toml")]
    timed = shapes.size(shapes.config(TIMED))
    rows = []
    for name in shapes.known():
        if isinstance(entry := zoo.REGISTRY[name], zoo.Hub):
            size = shapes.size(shapes.config(name))
            ratio = size.passed / timed.passed * size.blocks / timed.blocks
            rows.append({
                "name": name,
                "revision": entry.revision,
                "size": size,
                "rome": rome.HPARAMS.get(name),
                "hours": sum(spent) / 3600 * ratio if spent else None,
                "records": sum(model == name for _, model in book.records),
            })  # fmt: skip
    return {"rows": rows}


@functools.cache
def _corpus_counts() -> dict[str, int]:
    words = [corpus.split(text) for text, _ in corpus.sentences()]
    pairs, world = corpus.pairs(), corpus.world()
    groups = [(f"capitals, {group}", facts) for group, facts in world.capital.items()]
    groups += [(f"fields, {group}", facts) for group, facts in world.field.items()]
    return {
        "sentences": len(words),
        "words and marks": sum(map(len, words)),
        "different ones": len({word for sentence in words for word in sentence}),
        "pairs of demonstrative and noun": len(pairs),
        "occurrences of them": sum(pair.count for pair in pairs),
        "pairs held out, of real nouns": sum(pair.held_out for pair in pairs if pair.kind != "invented"),
        **{f"invented facts: {name.replace('_', ' ')}": len(facts.pairs) for name, facts in groups},
        "times that each of them is stated from a side": corpus.TIMES,
    }


def trained(book: Book) -> dict:
    """Return what the controlled models know, asked after training: the share right of each training seed.

    `further` says of each share of the further seeds whether it lies in the 95 % interval of the first one's.
    """
    models = [name for name in COMPANION_MODELS if name.startswith("controlled-")]
    rows: dict[str, list[str]] = {}
    further = []
    for column, model in enumerate(models):
        paths = [zoo.SHIPPED / name / "evaluation.tsv" for name in zoo.replicas(model)]
        first, *others = (pd.read_csv(path, sep="\t", index_col="what") for path in paths)
        for what in first.index:
            shares = [f"{seed.share[what]:.2f}" for seed in (first, *others) if what in seed.index]
            rows.setdefault(what, [""] * len(models))[column] = ", ".join(shares)
        for seed in others:
            further += [first.low[what] <= seed.share[what] <= first.high[what] for what in seed.index]
    return {"models": models, "rows": rows, "further": further}


def recorded(book: Book) -> dict:
    """Return the record of the playground; None where it was not made."""
    path = book.root / "results" / playground.FILE
    return {"record": json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None}


TABLES: dict[str, Callable[[Book], dict]] = {
    "findings": findings,
    "counts": counts,
    "one-edit": one_edit,
    "marks": marks,
    "filter": choices,
    "matrix": matrix,
    "checks": functools.partial(matrix, check=True),
    "withdrawn": withdrawn,
    "multiplicity": counts,
    "across": models_compared,
    "by-model": by_agreement,
    "seeds": by_seed,
    "agreement": agreement,
    "localisation": localisation,
    "multiverse": multiverse,
    "provenance": lambda book: {"records": list(book.records.values())},
    "hub": hub_models,
    "corpus": lambda book: {"counts": _corpus_counts()},
    "trained": trained,
    "playground": recorded,
}


def claims_table(root: Path) -> str:
    """Return the claims that are no checks in a Markdown table: a row a chapter, with its first claim and all marks.

    Effects and verdicts are those of the chapter's own model or, of a comparison, of each of its models.
    """
    book, rows = load(root), []
    for chapter in book.chapters.values():
        here = [c for c in claims.CLAIMS.values() if c.chapter == chapter.number and not c.check]
        names = str(chapter.defaults.get("models", chapter.defaults.get("model"))).split(",")
        if not here:
            continue
        effects, signs = [], []
        for name in names:
            found = [book.records.get((claim.id, name)) for claim in here]
            effects += [f"{effect(found[0])}, {found[0]['verdict']}"] if found[0] else []
            signs.append("".join(MARKS[record["verdict"] if record else "not run"] for record in found))
            signs[-1] += " (stale)" * any(record and record["stale"] for record in found)
        shown = {"title": _title(chapter.path), "file": chapter.path.name, "claim": here[0].statement}
        rows.append({**shown, "effects": effects or ["not run"], "marks": signs})
    return fill("readme.md", rows=rows)


def readme(root: Path) -> str:
    """Return README.md with the table between its markers made anew from results/."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{path} must hold {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{claims_table(root)}{END}{rest.split(END)[1]}"


def _title(notebook: Path) -> str:
    """Return the first heading of a notebook, or its name."""
    first = nbformat.read(notebook, as_version=4).cells[0].source
    return next((line[2:].strip() for line in first.splitlines() if line.startswith("# ")), notebook.stem)
