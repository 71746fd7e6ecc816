"""Sphinx extension of the book, so that plain `jupyter-book build .` makes the whole site from the stored notebooks.

It adds the runs on other models to the contents, roles for the numbers of records (`value`, `share`, `effect`,
`verdict`), the directives `book-table`, `modules` and `figures`, interactive figures and the figures of other models
below those of a chapter, and to each page where it comes from and how to cite it. Files to download are written beside
the pages.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import pkgutil
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.utils import new_document
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.errors import ConfigError, ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.osutil import relative_uri
from sphinx.writers.html5 import HTML5Translator
from sphinx_external_toc.parsing import MalformedError, parse_toc_data

from knbook import pages, provenance
from knbook.checkout import COMPANION_MODELS, slug
from knbook.errors import UsageError
from kncore.store.disk import write
from kncore.zoo import SHIPPED
from knpaper import claims, looking
from knpaper.figures import plain
from knpaper.records import effect

RUNS = "book/runs"
FORMS = {
    "value": lambda record: f"{record['value']:.2f}",
    "share": lambda record: f"{100 * record['value']:.0f} %",
    "effect": effect,
    "verdict": lambda record: claims.CLAIMS[record["claim"]].word(record["verdict"]),
}
PX = {"pt": 4 / 3, "px": 1, "": 1}
SIG_LINES = {"<dl>": '<span class="sig-lines">', "</dl>": "</span>", "<dd>": "<span>", "</dd>": "</span>"}
logger = logging.getLogger(__name__)


def contents(root: Path) -> dict:
    """Return what _toc.yml says; UsageError where it is no table of contents."""
    path = root / "_toc.yml"
    try:
        toc = yaml.safe_load(path.read_text(encoding="utf-8"))
        parse_toc_data(toc)
    except (OSError, ValueError, yaml.YAMLError, MalformedError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read ({why}); restore it (git checkout -- _toc.yml)") from error
    return toc


def pages_of(toc: dict) -> list[str]:
    """Return the names of the pages in a table of contents, without their endings."""
    return [re.sub(r"\.(md|ipynb)$", "", name) for name in parse_toc_data(toc)]


def with_runs(toc: dict, root: Path) -> dict:
    """Return a table of contents with the runs on other models as a part of their own."""
    chapters = []
    for folder in run_folders(root):
        names = sorted(path.stem for path in folder.glob("*.ipynb"))
        sections = [{"file": f"{RUNS}/{folder.name}/{name}"} for name in names]
        chapters.append({"file": f"{RUNS}/{folder.name}/index", "sections": sections})
    part = {"caption": "The same on other models", "chapters": chapters}
    return {**toc, "parts": [*toc.get("parts", []), part]} if chapters else toc


def run_folders(root: Path) -> list[Path]:
    """Return the folders with runs on other models."""
    return sorted({path.parent for path in (root / RUNS).glob("*/*.ipynb")})


def model_card(model: str) -> str:
    """Return the page of a model that the chapters were run on: its card, where one comes with the package."""
    title, text = f"# {plain(model)}", "The chapters of this book, run on this model."
    if model not in COMPANION_MODELS:
        text += " The run is stored: `make book` shows it and does not repeat it."
    card = SHIPPED / model / "README.md"
    if not card.is_file():
        return f"{title}\n\n{text}\n"
    title, _, rest = card.read_text(encoding="utf-8").partition("\n")
    return f"{title}\n\n{text} Its card:\n{rest}"


def prepare(app: Sphinx, config: Config) -> None:
    """Read what the book is made of; write the whole table of contents, and a page for each other model."""
    root = Path(app.srcdir)
    try:
        toc = with_runs(contents(root), root)
        for folder in run_folders(root):
            page, text = folder / "index.md", model_card(folder.name)
            if not page.is_file() or page.read_text(encoding="utf-8") != text:
                write(page, text)
        path = write(Path(app.doctreedir) / "toc.yml", yaml.safe_dump(toc, sort_keys=False))
        app.book = pages.load(root, pages_of(toc))
        app.book_info = provenance.book_info(root)
        provenance.check_notes(root / "results")
    except (UsageError, ValueError) as error:
        raise ConfigError(str(error)) from error
    config.external_toc_path = str(path)
    # With another state every page is read anew.
    files = [path for top in ("notebooks", "book/runs", "results") for path in (root / top).rglob("*")]
    state = [(str(path), path.stat().st_mtime_ns) for path in sorted(files) if path.is_file()]
    config.book_state = hashlib.sha256(repr([state, app.book_info, app.outdir]).encode()).hexdigest()


class RecordRole(SphinxRole):
    """A number of the record of a claim, on the model of the page or, as in `claim@model`, on another one."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        claim, _, model = self.text.partition("@")
        if claim not in claims.CLAIMS:
            logger.warning("no claim is called %r", claim, location=self.get_location())
        parts = self.env.docname.split("/")
        own = parts[2] if self.env.docname.startswith(f"{RUNS}/") else self.env.app.book.model
        wanted = slug(model or own)
        records = self.env.app.book.records
        record = next((records[key] for key in records if key[0] == claim and slug(key[1]) == wanted), None)
        if record is None:
            return [nodes.inline("", "not run", classes=["not-run"])], []
        text = FORMS[self.name](record)
        classes = [record["verdict"], claims.side_class(record["side"])]
        return [nodes.inline("", text, classes=classes) if self.name == "verdict" else nodes.Text(text)], []


class BookTable(SphinxDirective):
    """One of the tables in `pages.TABLES`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = directives.choice(self.arguments[0], tuple(pages.TABLES))
        link = functools.partial(self.env.app.builder.get_relative_uri, self.env.docname)
        return [_html(pages.table(name, self.env.app.book, link))]


class Modules(SphinxDirective):
    """The reference of all modules of a package, of those that are named, or of the others: with all that is public."""

    required_arguments = 1
    has_content = True
    option_spec = {"without": directives.flag}

    def run(self) -> list[nodes.Node]:
        package, named, lines = self.arguments[0], " ".join(self.content).split(), []
        for name in modules(importlib.import_module(package)):
            if not named or (name.removeprefix(f"{package}.") in named) != ("without" in self.options):
                lines += [f"### {name}", "", "```{eval-rst}", f".. automodule:: {name}", "   :members:", "```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def modules(package: ModuleType) -> list[str]:
    """Return the full names of a package's modules, in alphabetical order."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return sorted(module.name for module in found if not module.name.rpartition(".")[2].startswith("_"))


class figure_list(nodes.Element):  # noqa: N801 (nodes are named so)
    """The place of the list of all figures, which is known when all pages are read."""


class Figures(SphinxDirective):
    """A list of the figures of all pages but those of runs on other models, which have the same ones."""

    def run(self) -> list[nodes.Node]:
        return [figure_list()]


def _html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


class NameFigures(SphinxTransform):
    """Name each figure that has no name by the first words of its caption, so that a link to it lasts."""

    default_priority = 200  # before Sphinx names them by numbers

    def apply(self, **_: object) -> None:
        for caption in self.document.findall(nodes.caption):
            figure = caption.parent
            if isinstance(figure, nodes.figure) and not figure["ids"]:
                words = " ".join(["fig", *caption.astext().split()[:6]])
                figure["names"].append(nodes.fully_normalize_name(words))
                self.document.note_implicit_target(figure, figure)


class RunPage(SphinxTransform):
    """In a run on another model, leave labels to the chapter and let links lead where they lead there."""

    default_priority = 840  # before Sphinx takes down the labels and pictures of a page

    def apply(self, **_: object) -> None:
        if not self.env.docname.startswith(f"{RUNS}/"):
            return
        here, there = Path(self.env.doc2path(self.env.docname)).parent, Path(self.env.srcdir) / "notebooks"
        self.document.nametypes = dict.fromkeys(self.document.nametypes, False)
        for link in self.document.findall(addnodes.pending_xref):
            path, _, anchor = link["reftarget"].partition("#")
            page = self.env.path2doc(os.path.normpath(there / path))
            if link.get("reftype") == "myst" and link.get("refdomain") is None and page in self.env.found_docs:
                link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", page, anchor or None
        for image in self.document.findall(nodes.image):
            if not (here / image["uri"]).exists() and (there / image["uri"]).exists():
                image["uri"] = Path(os.path.relpath(there / image["uri"], here)).as_posix()


def add_footer(app: Sphinx, document: nodes.document) -> None:
    """Add to a page how to cite it and, to a notebook, where its numbers come from."""
    if app.builder.format != "html":
        return
    page = app.env.docname
    title = next(iter(document.findall(nodes.title)), nodes.Text("")).astext()
    end = next((node for node in reversed(document.children) if isinstance(node, nodes.section)), document)
    if app.env.doc2path(page).endswith(".ipynb") and posixpath.basename(page)[:2] in app.book.chapters:
        heading = "Where this page comes from"
        section = nodes.section("", nodes.title("", heading), names=[nodes.fully_normalize_name(heading)])
        section += _html(pages.fill("origin.html", **provenance.origin(app.book, app.book_info, page)))
        document.note_implicit_target(section, section)
        end += section
        end = section
    own = provenance.bibtex(app.book_info, page, re.sub(r"^\d+ · ", "", title))
    entries = filter(None, [own, provenance.paper(Path(app.srcdir) / "book" / "references.bib")])
    highlight = functools.partial(app.builder.highlighter.highlight_block, lang="bibtex")
    end += _html(pages.fill("cite.html", entries=list(entries), highlight=highlight))


def name_model(app: Sphinx, document: nodes.document, page: str) -> None:
    """Let the heading of a run on another model name the model, and its title, which a search and a browser show."""
    folder, name = posixpath.split(page)
    heading = next(iter(document.findall(nodes.title)), None)
    if folder.startswith(f"{RUNS}/") and name != "index" and heading is not None:
        heading += nodes.inline("", f" · {posixpath.basename(folder)}", classes=["model"])
        app.env.longtitles[page] = nodes.title("", heading.astext())


def write_terms(app: Sphinx, env: BuildEnvironment) -> None:
    """Write the definitions of the glossary as a script, by the anchor of each term, for hints at links to them."""
    terms = {}
    for page in {page for _, _, kind, page, *_ in env.get_domain("std").get_objects() if kind == "term"}:
        for item in env.get_doctree(page).findall(nodes.definition_list_item):
            definition = item[-1]
            for citation in list(definition.findall(lambda n: getattr(n, "attributes", {}).get("refdomain") == "cite")):
                citation.parent.remove(citation)
            text = " ".join(definition.astext().replace("\\,", "").split())
            terms |= {anchor: re.sub(r" (?=[.,;:])", "", text) for term in item[:-1] for anchor in term["ids"]}
    script = f"const TERMS = {json.dumps(terms, ensure_ascii=False, indent=1)};\n"
    write(Path(app.outdir) / "_static" / "terms.js", script)


def add_figures(app: Sphinx, document: nodes.document, page: str) -> None:
    """Below the figures of a notebook put what lets a reader look into them, and those of a chapter on other models.

    The curves of a chapter are joined with those of its runs: the same figure has the same place among the
    specifications of both. Two pictures are of the same figure if their captions are the same.
    """
    path = Path(app.env.doc2path(page))
    if path.suffix != ".ipynb" or app.builder.name != "html":
        return
    runs = sorted(Path(app.srcdir, RUNS).glob(f"*/{path.name}")) if page.startswith("notebooks/") else []
    runs = [run for run in runs if app.env.path2doc(run) in app.env.found_docs]
    others = [[spec for _, _, spec in specifications(run)] for run in runs]
    below: dict[int, list[nodes.Node]] = {}
    for number, (cell, figure, spec) in enumerate(specifications(path)):
        joined = looking.combine(spec, [specs[number] for specs in others if len(specs) > number])
        below.setdefault(cell, []).append(_html(look(joined, figure)))
    pictures = {run.parent.name: captioned(app.env.get_doctree(app.env.path2doc(run))) for run in runs}
    for cell in list(code_cells(document)):
        after = below.get(cell["cell_index"], [])
        if tabs := [*_tabs(app, page, cell, pictures)]:
            after.append(_html(pages.fill("beside.html", tabs=tabs, name=f"beside-{cell['cell_index']}")))
        cell.parent[cell.parent.index(cell) + 1 : cell.parent.index(cell) + 1] = after


def list_figures(app: Sphinx, document: nodes.document, page: str) -> None:
    """Put the list of all figures in its place: by page, each with its number and the first sentence of its caption."""
    for place in list(document.findall(figure_list)):
        by_page = nodes.definition_list(classes=["figures"])
        for name in pages_of(contents(Path(app.srcdir))):
            address = app.builder.get_relative_uri(page, name)
            captions = app.env.get_doctree(name).findall(nodes.caption)
            if items := [_listed(app, address, name, c) for c in captions if isinstance(c.parent, nodes.figure)]:
                link = nodes.reference("", app.env.titles[name].astext(), internal=True, refuri=address)
                figures = nodes.definition("", nodes.bullet_list("", *items))
                by_page += nodes.definition_list_item("", nodes.term("", "", link), figures)
        place.replace_self(by_page)


def _listed(app: Sphinx, address: str, page: str, caption: nodes.caption) -> nodes.list_item:
    """Return an item for the figure that a caption is of; what the caption refers to is put in first."""
    figure = caption.parent["ids"][0]
    own = new_document(page)
    own += caption.deepcopy()
    if any(own.findall(addnodes.pending_xref)):
        app.env.resolve_references(own, page, app.builder)
    sentence = re.split(r"(?<=[.?!])\s", own.astext(), maxsplit=1)[0]
    number = ".".join(map(str, app.env.toc_fignumbers[page]["figure"][figure]))
    link = nodes.reference("", app.config.numfig_format["figure"] % number, internal=True, refuri=f"{address}#{figure}")
    return nodes.list_item("", nodes.paragraph("", "", link, nodes.Text(f" {sentence}")))


def specifications(path: Path) -> list[tuple[int, int, looking.Spec]]:
    """Return the specifications of interactive figures, each with its cell and the number of its picture there."""
    text = path.read_text(encoding="utf-8")
    found = []
    for index, cell in enumerate(json.loads(text)["cells"] if looking.MIME in text else []):
        drawn = [output["data"] for output in cell.get("outputs", []) if "image/svg+xml" in output.get("data", {})]
        found += [(index, number, data[looking.MIME]) for number, data in enumerate(drawn) if looking.MIME in data]
    return found


def look(spec: looking.Spec, figure: int) -> str:
    """Return HTML that the book's script reads: a specification, and the number of its picture in the cell above."""
    # In ASCII, since what reads the page takes some other characters for line ends.
    text = json.dumps(spec, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return pages.fill("look.html", spec=spec, figure=figure, json=text)


def code_cells(document: nodes.document) -> Iterator[nodes.container]:
    """Yield the code cells of a notebook's page."""
    return document.findall(lambda n: isinstance(n, nodes.container) and n.get("nb_element") == "cell_code")


def captioned(document: nodes.document) -> dict[str, str]:
    """Return the files of the pictures on a notebook's page, by their captions."""
    cells = code_cells(document)
    return {_figure(cell).get("caption"): image["uri"] for cell in cells for image in cell.findall(nodes.image)}


def _figure(cell: nodes.container, what: str = "figure") -> dict:
    return cell["cell_metadata"].get("mystnb", {}).get(what, {})


def _tabs(app: Sphinx, page: str, cell: nodes.container, pictures: dict[str, dict[str, str]]) -> Iterator[dict]:
    caption, order = _figure(cell).get("caption"), {name: i for i, name in enumerate(COMPANION_MODELS)}
    for model in sorted(pictures, key=lambda name: (order.get(name, len(order)), name)):
        if caption and caption in pictures[model]:
            uri = pictures[model][caption]
            file = f"{app.builder.imagedir}/{app.env.images[uri][1]}"
            yield {
                "model": model,
                "picture": relative_uri(app.builder.get_target_uri(page), file),
                "size": svg_size(Path(app.srcdir) / uri),
                "alt": " ".join(_figure(cell, "image").get("alt", caption).split()),
                "page": app.builder.get_relative_uri(page, f"{RUNS}/{model}/{posixpath.basename(page)}"),
            }


@functools.cache
def svg_size(picture: Path) -> tuple[int, int]:
    """Return width and height of an SVG picture in pixels; ExtensionError where it does not say them in pt or px."""
    head = next(ElementTree.iterparse(picture, events=["start"]))[1]
    sizes = [re.fullmatch(r"([\d.]+)(pt|px|)", head.get(name, "")) for name in ("width", "height")]
    if None in sizes:
        raise ExtensionError(f'{picture} has no width="…" and height="…" in pt or px on its <svg>: give it both')
    return tuple(round(float(size[1]) * PX[size[2]]) for size in sizes)


class Translator(HTML5Translator):
    """Sphinx's HTML with what it leaves out.

    The size of every SVG picture, so that a browser keeps its place free and fetches it when a reader comes near; the
    role that entries of a list of references have today; no header cell without a header; no list of definitions
    without a term, which is how Sphinx parts the lines of a signature, and no element around each of its words.
    """

    def starttag(self, node: nodes.Node, tagname: str, *args: object, **attributes: object) -> str:
        if tagname == "img" and str(node["uri"]).endswith(".svg"):
            width, height = svg_size(Path(self.builder.srcdir, next(iter(node["candidates"].values()))))
            later = {"loading": "lazy"} if self.builder.name == "html" else {}  # and not in the book to print
            attributes = {"width": width, "height": height} | later | attributes
        if attributes.get("role") == "doc-biblioentry":
            attributes["role"] = "listitem"
        return super().starttag(node, tagname, *args, **attributes)

    def visit_raw(self, node: nodes.raw) -> None:
        text = node.astext().replace("<th></th>", "<td></td>")
        changed = node.get("format") == "html" and text != node.astext()
        super().visit_raw(nodes.raw("", text, **node.attributes) if changed else node)

    def visit_desc_signature(self, node: addnodes.desc_signature) -> None:
        super().visit_desc_signature(node)
        self.protect_literal_text -= 1  # a signature may be broken anywhere: book.css

    def depart_desc_signature(self, node: addnodes.desc_signature) -> None:
        self.protect_literal_text += 1
        super().depart_desc_signature(node)

    def depart_desc_parameterlist(self, node: addnodes.desc_parameterlist) -> None:
        super().depart_desc_parameterlist(node)
        if node.get("multi_line_parameter_list"):
            start = max(index for index, part in enumerate(self.body) if part.strip() == "<dl>")
            self.body[start:] = [SIG_LINES.get(part.strip(), part) for part in self.body[start:]]


def name_toggles(app: Sphinx, page: str, template: str, context: dict, document: nodes.document | None) -> None:
    """Give a name to every toggle of the contents."""
    generate = context.get("generate_toctree_html")  # of the theme

    def named(*args: object, **kwargs: object) -> object:
        soup = generate(*args, **kwargs)
        for toggle in soup.select("details > summary"):
            toggle["aria-label"] = f"Chapters: {toggle.find_previous('a').get_text()}"
        return soup

    context["generate_toctree_html"] = named


def write_downloads(app: Sphinx, error: Exception | None) -> None:
    """Write beside the pages what readers can download."""
    if error is None and app.builder.name == "html":
        provenance.write_downloads(app.book, app.book_info, Path(app.outdir))
        write(Path(app.outdir) / "llms.txt", list_of_pages(app))
        write_playground(app)


def write_playground(app: Sphinx) -> None:
    """Write the record of the playground as scripts: pages that are opened from disk may read no other files."""
    if record := pages.recorded(app.book)["record"]:
        doses = {"doses": record.pop("doses")}
        for name, head, some in (("data", "const PLAYGROUND = {};\n", record), ("doses", "", doses)):
            data = json.dumps(some, ensure_ascii=False, separators=(",", ":"))
            target = Path(app.outdir) / "_static" / f"playground-{name}.js"
            write(target, f"{head}Object.assign(PLAYGROUND, {data});\n")


def list_of_pages(app: Sphinx) -> str:
    """Return a list of all pages by part of the book, in the form of llms.txt, for programs that read the site."""
    root = Path(app.srcdir)
    toc = with_runs(contents(root), root)
    parts = {"Start": [toc["root"]]}
    for part in toc.get("parts", []):
        parts[part.get("caption", "Pages")] = pages_of({**toc, "parts": [part]})[1:]
    lines = [f"# {app.config.html_title}", "", "> Every number was computed by the notebook of its page.", ""]
    if (Path(app.outdir) / "records" / "all.json").is_file():
        lines += ["All verdicts with effect, interval, rule and origin: [records/all.json](records/all.json)", ""]
    for caption, names in parts.items():
        lines += [f"## {caption}", ""]
        lines += [f"- [{app.env.titles[name].astext()}]({name}.html)" for name in names if name in app.env.titles] + [
            ""
        ]
    return "\n".join(lines)


def skip_member(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out fields of named tuples that say nothing but their number."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict:
    """Connect all this; Sphinx calls it."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_config_value("book_state", "", "env")
    app.connect("config-inited", prepare, priority=400)  # before the table of contents is read
    for form in FORMS:
        app.add_role(form, RecordRole())
    app.add_directive("book-table", BookTable)
    app.add_directive("modules", Modules)
    app.add_directive("figures", Figures)
    app.add_transform(NameFigures)
    app.add_transform(RunPage)
    app.connect("doctree-read", add_footer, priority=400)  # before the headings of a page are collected
    app.connect("env-updated", write_terms)
    app.connect("doctree-resolved", add_figures)
    app.connect("doctree-resolved", list_figures)
    app.connect("doctree-resolved", name_model)
    app.connect("html-page-context", name_toggles, priority=900)  # after the theme
    app.connect("build-finished", write_downloads)
    app.connect("autodoc-skip-member", skip_member)
    for builder in ("html", "singlehtml"):
        app.set_translator(builder, Translator)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
