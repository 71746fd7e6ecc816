"""The claims of the book: each declared once with the rule of its verdict, recorded per model, shown from the records.

A rule speaks about the interval of one number, the metric, and is fixed here before the number is known. A record is
sealed by a checksum and names the code that made it: one that was edited, or that other code made, is stale.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from kncore import arch, disk, fingerprint, models, resources, stored, tasks
from kncore.models import LM
from kncore.resources import DATA
from kncore.stats import Estimate
from kncore.stored import visible

VERDICTS = ("supported", "contradicted", "inconclusive")
DECIDING = ("torch", "transformers")  # the packages whose version decides a number
EARLIER = {"family": next(iter(arch.SPECS)), "data": {}}  # what records of earlier versions lack: they are stale


@dataclass(frozen=True)
class Claim:
    """A claim and its rule.

    `kind` "above": supported if the whole interval lies above `threshold`, contradicted if it lies below. "within":
    supported if the whole interval lies within ±`threshold` of zero, contradicted if it lies outside on one side.
    Otherwise, and with fewer than `min_n` independent units, inconclusive.
    """

    id: str
    chapter: str
    statement: str
    section: str
    metric: str
    kind: str
    threshold: float
    min_n: int

    @property
    def rule(self) -> str:
        """The rule in words."""
        if self.kind == "above":
            yes, no = f"above {self.threshold:g}", f"below {self.threshold:g}"
        else:
            yes, no = f"within ±{self.threshold:g}", f"outside ±{self.threshold:g}, on one side"
        return (
            f"supported if the whole 95 % interval lies {yes}, contradicted if it lies {no}, "
            f"otherwise (or with n < {self.min_n}) inconclusive"
        )

    def verdict(self, estimate: Estimate) -> str:
        """`supported`, `contradicted` or `inconclusive`. Raises ValueError for an estimate that is not a number."""
        value, low, high, n = estimate
        if any(map(math.isnan, estimate)) or math.isinf(value) or low == math.inf or high == -math.inf:
            raise ValueError(f"claim {self.id!r}: the estimate {tuple(estimate)} is not a number with its interval")
        if n < self.min_n:
            return "inconclusive"
        t = self.threshold
        yes, no = (low > t, high < t) if self.kind == "above" else (low > -t and high < t, low > t or high < -t)
        return "supported" if yes else "contradicted" if no else "inconclusive"


CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        Claim(
            "fact-has-neurons",
            "01",
            "The paraphrases of a fact share two to five neurons.",
            "2",
            "share of known facts whose search ends with 2 to 5 neurons, at p ≥ 0.5",
            "above",
            0.5,
            30,
        ),
        Claim(
            "fact-owns-neuron",
            "01",
            "The leading neuron of a fact is that fact's own.",
            "2",
            "share of known facts whose leading neuron leads no other fact of its relation",
            "above",
            0.5,
            30,
        ),
        Claim(
            "grammar-has-neurons",
            "02",
            "Sentences that share an agreement condition share two to five neurons, as the paraphrases of a fact do.",
            "3",
            "share of groups of sentences whose search ends with 2 to 5 neurons, at p ≥ 0.5",
            "above",
            0.5,
            30,
        ),
        Claim(
            "number-separates",
            "02",
            "Attribution tells the two values of a condition (singular, plural) apart.",
            "3",
            "R₁² of sentences of one number minus R₁² of sentences of mixed number, same phenomenon",
            "above",
            0.0,
            30,
        ),
        Claim(
            "equally-similar",
            "03",
            "Sentences with one agreement condition are as alike in attribution as the paraphrases of a fact.",
            "3",
            "R₁² of facts minus R₁² of agreement conditions",
            "within",
            0.1,
            30,
        ),
        Claim(
            "equally-few",
            "03",
            "Facts and agreement need about the same number of neurons.",
            "3",
            "mean size of the coarse set, facts over agreement, in doublings (log₂)",
            "within",
            1.0,
            30,
        ),
        Claim(
            "same-blocks",
            "03",
            "The neurons of facts and of agreement lie in the same blocks.",
            "3",
            "mean depth of the refined neurons of facts minus that of agreement, as a share of the model's depth",
            "within",
            0.1,
            30,
        ),
        Claim(
            "follows-the-fact",
            "03",
            "Attribution follows the fact rather than the template it is asked in.",
            "5",
            "R₁² of one fact in several templates minus R₁² of several facts in one template",
            "above",
            0.0,
            30,
        ),
        Claim(
            "edit-moves-fact",
            "04",
            "Suppressing a fact's neurons makes its answer less probable, far more than suppressing others like them.",
            "3",
            "loss of log P(answer) minus the loss with random neurons of the same blocks and activation, in nats",
            "above",
            0.5,
            30,
        ),
        Claim(
            "edit-spares-answer",
            "04",
            "Suppressing a fact's neurons leaves the right answer the best of its relation.",
            "3",
            "share of prompts with the right answer best before the edit that have it best after, of whole words",
            "above",
            0.75,
            30,
        ),
        Claim(
            "category-not-fact",
            "04",
            "A fact's neurons say that an answer of this kind comes next, not which one.",
            "3",
            "nats lost by all whole-word answers of the relation together minus nats lost by the right one among them",
            "above",
            0.0,
            30,
        ),
        Claim(
            "fact-alone",
            "04",
            "The neurons of a fact serve that fact and not its neighbours.",
            "2",
            "share of the loss that is the fact's own: 1 − loss of the relation's other facts / loss of the fact",
            "above",
            0.5,
            30,
        ),
        Claim(
            "edit-spares-agreement",
            "04",
            "Suppressing the neurons of an agreement condition seldom overturns the preference within a minimal pair.",
            "3",
            "share of unseen pairs with the good member preferred before the edit that prefer it after, per lemma",
            "above",
            0.75,
            30,
        ),
        Claim(
            "number-moves",
            "04",
            "Suppressing the neurons of a number moves words of that number down against those of the other.",
            "3",
            "loss of log-odds of the number's words against the other's, minus the loss with random neurons, in nats",
            "above",
            0.0,
            30,
        ),
        Claim(
            "fact-falls-alone",
            "04",
            "Some number of neurons silences a fact and leaves an unrelated one standing.",
            "2",
            "share of facts whose answer falls at a dose at which an unrelated fact still has its answer",
            "above",
            0.5,
            30,
        ),
        Claim(
            "follows-words",
            "05",
            "The effect of an edit follows how often the words go together.",
            "3",
            "slope of the loss on determiner-noun association, given frequency and irregularity (standardised)",
            "above",
            0.0,
            30,
        ),
        Claim(
            "reaches-invented",
            "05",
            "The edit reaches nouns that were never seen, as a rule would.",
            "3",
            "loss of agreement after invented nouns minus that after real ones, as a share of the latter",
            "within",
            0.25,
            30,
        ),
        Claim(
            "fact-early-site",
            "06",
            "A fact is recalled by the MLPs of the lower half, at the last token of its subject, not by attention.",
            "4",
            "share of the answer's log-odds that restored MLPs bring back there, minus the share of restored attention",
            "above",
            0.0,
            30,
        ),
        Claim(
            "agreement-early-site",
            "06",
            "Agreement has that early site too: MLPs of the lower half, at the last token of the subject.",
            "4",
            "share of the log-odds that restored MLPs bring back there, minus the share of restored attention",
            "above",
            0.0,
            30,
        ),
        Claim(
            "same-site",
            "06",
            "Facts and agreement have the early site to the same extent.",
            "4",
            "share that MLPs minus attention bring back at the early site, of facts minus that of agreement",
            "within",
            0.1,
            30,
        ),
        Claim(
            "late-site",
            "06",
            "The answer of a fact arrives by attention, in the upper half, at the last token.",
            "4",
            "share of the log-odds that restored attention brings back there, minus the share of restored MLPs",
            "above",
            0.0,
            30,
        ),
        Claim(
            "rome-rewrites",
            "07",
            "After a rank-one edit of one matrix the model gives the new answer.",
            "4",
            "share of edits after which the edited prompt is continued by the whole new answer",
            "above",
            0.9,
            30,
        ),
        Claim(
            "rome-generalises",
            "07",
            "The new answer is given to paraphrases of the edited prompt as well.",
            "4",
            "share of paraphrases that are continued by the whole new answer, per edit",
            "above",
            0.5,
            30,
        ),
        Claim(
            "rome-spares",
            "07",
            "Other subjects of the relation keep their answers.",
            "4",
            "share of neighbours with the right answer before the edit that give it after, per edit",
            "above",
            0.9,
            30,
        ),
        Claim(
            "covariance-spares",
            "07",
            "The covariance of keys, left out in the published runs, spares the neighbours.",
            "4",
            "share of neighbours that keep their answers with the covariance minus the share without, per edit",
            "above",
            0.0,
            30,
        ),
        Claim(
            "rome-rewrites-agreement",
            "07",
            "The same edit rewrites agreement: a plural determiner takes a singular noun, or the other way round.",
            "4",
            "share of edits after which the new form is preferred in the edited prompt",
            "above",
            0.9,
            30,
        ),
        Claim(
            "agreement-edit-is-a-rule",
            "07",
            "An edit of one determiner carries over to the other determiner of its number, as a rule would.",
            "4",
            "change of log-odds after the other determiner, as a share of that after the edited one, other nouns",
            "above",
            0.5,
            30,
        ),
        Claim(
            "symmetry-follows",
            "08",
            "After a ROME edit the model knows the new fact from the other side too.",
            "4",
            "share of reversed questions that are continued by the new answer, per edit",
            "above",
            0.5,
            30,
        ),
        Claim(
            "synonymy-follows",
            "08",
            "After a ROME edit of a field of work the occupation follows.",
            "4",
            "share of occupation prompts that prefer the occupation of the new field to that of the old, per edit",
            "above",
            0.5,
            30,
        ),
        Claim(
            "context-beats-weights",
            "08",
            "Told the new fact in its prompt, the model answers the reversed question where the edited model does not.",
            "4",
            "reversed questions answered with the new fact in the prompt, minus those after ROME, as shares per edit",
            "above",
            0.0,
            30,
        ),
        Claim(
            "old-predicts-new",
            "08",
            "Item by item, success on the old criteria predicts success on the new ones.",
            "4",
            "rank correlation of the margins of paraphrases and of reversed questions over ROME edits",
            "above",
            0.3,
            30,
        ),
        Claim(
            "count-moves",
            "09",
            "The effect of suppressing the neurons of number follows how often determiner and noun went together.",
            "4",
            "loss of log-odds, in nats per doubling of the pair's count in training, given other occurrences",
            "above",
            0.0,
            30,
        ),
        Claim(
            "rule-reaches",
            "09",
            "The neurons of number serve pairs that never occurred as they serve those that did.",
            "4",
            "mean loss of log-odds of held-out pairs over that of pairs in the training text",
            "above",
            0.5,
            30,
        ),
        Claim(
            "reverse-inferred",
            "09",
            "A fact that was only ever stated from one side can be asked from the other.",
            "4",
            "share of reversed questions about one-way facts that are answered, before any edit",
            "above",
            0.5,
            30,
        ),
        Claim(
            "two-way-symmetry-follows",
            "09",
            "Where a model learnt its facts from both sides, an edit of one side changes the other.",
            "4",
            "share of reversed questions continued by the new answer after fine-tuning one matrix, per two-way fact",
            "above",
            0.5,
            30,
        ),
        Claim(
            "two-way-symmetry-rome",
            "09",
            "Where a model learnt its facts from both sides, a ROME edit of one side changes the other.",
            "4",
            "share of reversed questions continued by the new answer, per two-way fact whose ROME edit took",
            "above",
            0.5,
            30,
        ),
        Claim(
            "synonym-inferred",
            "09",
            "Told a worker's field, a model infers the occupation that always went with that field.",
            "4",
            "share of questions for an occupation that was never stated, answered before any edit, per worker",
            "above",
            0.5,
            30,
        ),
        Claim(
            "linked-synonymy-follows",
            "09",
            "Where a model learnt which occupation belongs to a field, it follows an edit of the field.",
            "4",
            "share of occupation prompts continued by the new one after fine-tuning one matrix, per linked worker",
            "above",
            0.5,
            30,
        ),
        Claim(
            "linked-synonymy-rome",
            "09",
            "Where a model learnt which occupation belongs to a field, it follows a ROME edit of the field.",
            "4",
            "share of occupation prompts continued by the new one, per linked worker whose ROME edit took",
            "above",
            0.5,
            30,
        ),
    )
}


def results_folder() -> Path:
    """Where records go: `$KNCORE_RESULTS`, else `results` in the first folder upwards with a `_toc.yml`, else here."""
    if os.environ.get("KNCORE_RESULTS"):
        return Path(os.environ["KNCORE_RESULTS"])
    here = Path.cwd()
    return next((f / "results" for f in (here, *here.parents) if (f / "_toc.yml").is_file()), here / "results")


def find_notebook(chapter: str) -> Path | None:
    """The notebook of a chapter in the first folder upwards that has it, else in the checkout this package is in."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if found := sorted((folder / "notebooks").glob(f"{chapter}-*.ipynb")):
            return found[0]
    return None


def code(claim: Claim, family: str, notebook: Path | None = None) -> str:
    """Hash of the code that decides a record: of its notebook's cells up to the one that records it, with all that they
    reach in this package but figures and claims, and of where the model's family has its parts.

    Without a notebook, the cells are those that ran in this kernel, or else those of the chapter's notebook.
    """
    cells = None if notebook else _ran()
    if cells is None:
        found = notebook or find_notebook(claim.chapter)
        cells = _cells(found, found.stat().st_mtime_ns, claim.id) if found else ()
    return fingerprint.digest(fingerprint.code_of(cells), asdict(arch.SPECS[family]))[:16]


def _ran() -> tuple[str, ...] | None:
    """The cells that have run in this kernel, each once, but for parameters that papermill put in; None outside one."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return None
    cells = tuple(dict.fromkeys(cell for cell in shell.user_ns["In"] if not cell.startswith("# Parameters")))
    return cells if any(cells) else None  # matplotlib makes a shell of its own where there is no notebook


@functools.lru_cache(maxsize=256)
def _cells(notebook: Path, changed: int, claim_id: str) -> tuple[str, ...]:
    """The code cells of a notebook as it was last `changed`, up to the first that records the claim."""
    cells = [cell.source for cell in stored.read(notebook).cells if cell.cell_type == "code"]
    records = re.compile(rf"""claims\.record\(\s*(["']{re.escape(claim_id)}["']|[^"'\s])""")
    last = next((i for i, cell in enumerate(cells) if records.search(cell)), len(cells) - 1)
    return tuple(cells[: last + 1])


def package_version(name: str = "kncore") -> str:
    """The installed version of a package without its local part, e.g. 2.13.0 for 2.13.0+cpu."""
    return version(name).partition("+")[0]


@dataclass(frozen=True)
class Verdict:
    """A claim with its estimate and verdict; a box in a notebook, a sentence in a terminal."""

    claim: Claim
    estimate: Estimate
    model: str

    @property
    def word(self) -> str:
        """`supported`, `contradicted` or `inconclusive`."""
        return self.claim.verdict(self.estimate)

    def __str__(self) -> str:
        return f"{self.word.capitalize()} on {self.model}: {self.claim.statement} {self.claim.metric}: {self.estimate}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        verdict = self.word
        told = (self.model, self.claim.statement, self.claim.metric, str(self.estimate), self.claim.rule)
        model, statement, metric, estimate, rule = (escape(visible(text)) for text in told)
        return (
            f'<div class="verdict {verdict} mathjax_ignore"><strong>{verdict.capitalize()} on {model}.</strong> '
            f"{statement}<br>"
            f"<em>{metric}</em>: <strong>{estimate}</strong><br><small>Rule: {rule}.</small></div>"
        )


def record(
    claim_id: str, lm: LM, estimate: Estimate, *, seed: int, source: str, known: int | None = None, **parameters
) -> Verdict:
    """Write `<results>/<model>/<claim>.json` in one step and return the verdict.

    `known` lowers n to the number of units that the model knows: unknown ones are no evidence either way. `parameters`
    are kept as they are given. `date` is the day (UTC) on which these numbers were first recorded: a record that says
    the same on another date stays as it is. Raises KeyError for a claim that is not declared and ValueError for an
    estimate that is not a number, and for a model that was changed since it was loaded.
    """
    if lm.touched:
        raise ValueError(
            f"{lm.name} is not as it was loaded, and a record speaks of the loaded model: end the intervention, or "
            "load it anew"
        )
    if known is not None:
        estimate = estimate._replace(n=min(estimate.n, known))
    # Six digits are more than an estimate has: stored records then agree between machines.
    estimate = Estimate(*(float(f"{value:.6g}") for value in estimate[:3]), int(estimate.n))
    claim = CLAIMS[claim_id]
    told = {
        "claim": claim.id,
        "chapter": claim.chapter,
        "statement": claim.statement,
        "metric": claim.metric,
        "rule": claim.rule,
        "verdict": claim.verdict(estimate),
        **{name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()},
        "model": lm.name,
        "revision": lm.revision,
        "family": lm.spec.family,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "source": source,
        "seed": seed,
        "parameters": parameters,
        "code": code(claim, lm.spec.family),
        "data": resources.noted(),
        "versions": {name: package_version(name) for name in ("kncore", *DECIDING, "numpy", "scipy")},
        "date": _today(),
    }
    told["checksum"] = checksum(told)
    target = results_folder() / _place(told)
    if _stands(target, told):
        disk.touch(target)  # it belongs to this run all the same, which is stored together with it
        return Verdict(claim, estimate, lm.name)
    disk.write(target, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return Verdict(claim, estimate, lm.name)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _place(told: Mapping) -> Path:
    return Path(told["model"].replace("/", "--"), f"{told['claim']}.json")


def checksum(told: Mapping) -> str:
    """Hash of a record: of all its fields but `checksum`, as JSON with sorted keys."""
    fields = {name: value for name, value in told.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _stands(path: Path, told: Mapping) -> bool:
    """True if the file is a record as it was written and says the same as `told` on whatever date."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        return old["checksum"] == checksum(old) and checksum({**old, "date": ""}) == checksum({**told, "date": ""})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def keep_dates(results: Path, earlier: Path) -> None:
    """Put the records below `earlier` in the place of those below `results` that say the same on another date."""
    for path in results.glob("*/*.json"):
        old = earlier / path.relative_to(results)
        if _stands(old, json.loads(path.read_text(encoding="utf-8"))):
            shutil.copyfile(old, path)


def stale(told: Mapping) -> list[str]:
    """Why a record no longer stands, in plain words; empty for a record that this code would write again.

    Of a record that was edited nothing else is believed, and so nothing else is compared.
    """
    if "checksum" not in told:
        return ["it has no checksum"]
    if told["checksum"] != checksum(told):
        return ["edited after it was recorded"]
    if not EARLIER.keys() <= told.keys():
        return ["recorded by an earlier kncore, which did not say what data it read"]
    claim, notebook = CLAIMS[told["claim"]], find_notebook(told["chapter"])
    found = {
        "the code has changed since": told["code"] != code(claim, told["family"], notebook),
        "the statement has changed since": told["statement"] != claim.statement,
        "the rule has changed since": told["rule"] != claim.rule,
        "the metric has changed since": told["metric"] != claim.metric,
        f"the claim is of chapter {claim.chapter} now": told["chapter"] != claim.chapter,
        "the rule now gives another verdict": told["verdict"] != claim.verdict(_estimate(told)),
    }
    for name in ("kncore", *DECIDING):
        recorded, now = told["versions"].get(name), package_version(name)
        found[f"recorded with {name} {recorded}, this is {now}"] = recorded != now
    for name, recorded, now in _settings(told, notebook):
        found[f"recorded with {name} {recorded}, it is {now} now"] = recorded != now
    for name, recorded in told["data"].items():
        found[f"the data of {name} have changed since"] = recorded != _data(name)
    return [reason for reason, holds in found.items() if holds]


def _settings(told: Mapping, notebook: Path | None) -> Iterator[tuple[str, object, object]]:
    """What a record was made with, and what a run of its chapter would be made with now: (name, recorded, now)."""
    if told["model"] in models.REGISTRY:
        yield "revision", told["revision"], models.identity(told["model"])[1]
    yield "dtype", told["dtype"], str(models.place("cpu")[1]).removeprefix("torch.")
    recorded = {"seed": told["seed"], "source": told["source"], **told["parameters"]}
    defaults = _defaults(notebook, notebook.stat().st_mtime_ns) if notebook else {}
    for name in (recorded.keys() & defaults.keys()) - {"n"}:  # a claim may be recorded of fewer units than its chapter
        yield f"{name} =", recorded[name], defaults[name]


@functools.lru_cache(maxsize=64)
def _defaults(notebook: Path, changed: int) -> dict[str, object]:
    """The parameters of a notebook, as it was last `changed`."""
    return stored.parameters(stored.read(notebook))


@functools.cache
def _data(name: str) -> str:
    """Hash of a part of the package's data as it is now, see `resources`; "" where there is none."""
    try:
        relation = name.removeprefix("relation ")
        return resources.digest(tasks.describe(relation) if relation != name else (DATA / name).read_text("utf-8"))
    except (OSError, ValueError):
        return ""


def _estimate(told: Mapping) -> Estimate:
    low, high = (end if told[name] is None else told[name] for name, end in (("low", -math.inf), ("high", math.inf)))
    return Estimate(told["value"], low, high, told["n"])


def _check(record: Mapping) -> None:
    """Raises KeyError, TypeError or ValueError where a field of a record is missing, or not as `record` writes it.

    A checksum says that a record was not changed, and not who wrote it: pages show no field that was not checked here.
    """
    if not isinstance(record, dict):
        raise TypeError("it is no mapping")
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # refuses infinity and halves of characters
    record = {**EARLIER, **record}
    texts = "claim chapter statement metric rule verdict model revision family dtype source code".split()
    numbers, others = "value low high n seed".split(), ["parameters", "data", "versions"]
    if missing := [name for name in (*texts, *numbers, *others) if name not in record]:
        raise KeyError(f"no {', '.join(missing)}")
    for name in (*texts, *({"date", "checksum"} & record.keys())):
        if not isinstance(record[name], str):
            raise TypeError(f"its {name} is {record[name]!r:.80}, and text is expected")
    for name in numbers:
        value, whole = record[name], name in ("n", "seed")
        finite = type(value) in ((int,) if whole else (int, float)) and abs(value) < 1e300
        if not finite and not (value is None and name in ("low", "high")):
            raise TypeError(f"its {name} is {value!r:.80}, and a {'whole ' * whole}number is expected")
    if not all(isinstance(record[name], dict) for name in others):
        raise TypeError("its parameters, data and versions are not names with values")
    if not all(isinstance(version, str) for version in (record["versions"]["kncore"], *record["versions"].values())):
        raise TypeError("its versions are not names with texts")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in record["data"]):
        raise ValueError(f"its data {list(record['data'])!r:.80} are not those of the package")
    if not re.fullmatch(r"\d\d", record["chapter"], re.ASCII) or record["family"] not in arch.SPECS:
        raise ValueError(f"its chapter is {record['chapter']!r:.80}, its family {record['family']!r:.80}")
    CLAIMS[record["claim"]].verdict(_estimate(record))
    VERDICTS.index(record["verdict"])


def read(results: Path) -> list[Mapping]:
    """All records below a folder, in the order of `CLAIMS`; ValueError names a file that is not one."""
    found = []
    for path in sorted(results.glob("*/*.json")):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            _check(told)
            place = list(CLAIMS).index(told["claim"]), told["model"]
            if path != results / _place(told):
                raise ValueError(f"its place is {_place(told).as_posix()}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a record of a declared claim ({type(error).__name__}: {error}); make it anew with "
                "`make notebooks`, or delete it"
            ) from error
        found.append((place, told))
    return [told for _, told in sorted(found, key=lambda row: row[0])]


def table(results: Path) -> pd.DataFrame:
    """The claims with their verdicts, one row per claim and model; claims without a record say `not run`.

    The verdict of a stale record is followed by `(stale)`.
    """
    records = read(Path(results))
    rows = []
    for claim in CLAIMS.values():
        for told in [r for r in records if r["claim"] == claim.id] or [None]:
            rows.append(
                {
                    "chapter": claim.chapter,
                    "claim": claim.statement,
                    "model": "" if told is None else told["model"],
                    "effect [95 % interval]": "" if told is None else effect(told),
                    "n": "" if told is None else told["n"],
                    "verdict": "not run" if told is None else told["verdict"] + " (stale)" * bool(stale(told)),
                }
            )
    return pd.DataFrame(rows)


def effect(told: Mapping) -> str:
    """The estimate of a record with its interval, as text; `?` stands for an end that is not finite."""
    low, high = ("?" if told[end] is None else f"{told[end]:.2f}" for end in ("low", "high"))
    return f"{told['value']:.2f} [{low}, {high}]"


def declare(*claim_ids: str) -> pd.DataFrame:
    """What a chapter shows of its claims before it computes anything: statement, metric and rule."""
    told = [(CLAIMS[i].statement, CLAIMS[i].metric, CLAIMS[i].rule) for i in claim_ids]
    return pd.DataFrame(told, columns=["claim", "metric", "rule"])


def published(model: str) -> dict | None:
    """What the authors' notebook shows for a model: `neuron`, and `change` of words under its suppression; or None."""
    told = tomllib.loads((DATA / "published.toml").read_text(encoding="utf-8"))
    return told.get(model)
