"""What chapters do with claims: declare them before anything is computed, and record each with its verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

import numpy as np

from kncore import products
from kncore.models import LM
from kncore.store import disk
from knpaper import resources
from knpaper.datasets import files
from knpaper.records import DECIDING, DECLARED, checksum, package_version, place_of, results_folder, says_the_same
from knpaper.rules import CLAIMS, VERDICTS, Claim
from knpaper.staleness import code
from knpaper.stats import Estimate, Sample, repeats
from knpaper.stored import visible

UNKNOWN = "not known: fewer than two units, or units that are all alike"


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

    @property
    def side(self) -> str:
        """`the thesis`, `the paper` or `neither`."""
        return self.claim.side(self.word)

    def __str__(self) -> str:
        return f"{self.word.capitalize()} on {self.model}: {self.claim.statement} {self.claim.metric}: {self.estimate}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        claim, estimate = self.claim, self.estimate
        details = {
            "null": claim.control,
            "unit": claim.unit,
            "n": f"{estimate.n} {claim.units}",
            "effect": f"{estimate.value:.2f}",
            "95 % interval": str(estimate).partition(" ")[2].rpartition(",")[0],
            "smallest effect that matters": f"{claim.border}" + (f", {claim.smallest}" if claim.smallest else ""),
            "power": power_in_words(claim, power(claim, estimate)) or (UNKNOWN if estimate.sample else ""),
            "speaks for": "nobody: it checks that the intervention took" if claim.check else self.side,
            "rule chosen": claim.when,
        }
        what, kind = ("Check", "check") if claim.check else ("Verdict", side_class(self.side))
        said = f"check {claim.word(self.word)}" if claim.check else self.word
        side = "" if claim.check else f'<span class="side">speaks for {self.side}</span> '
        explored = '<span class="explored">exploratory</span> ' if claim.exploratory else ""
        return (
            f'<div class="verdict {self.word} {kind} mathjax_ignore">'
            f"<strong>{said.capitalize()} on {_safe(self.model)}.</strong> {side}{explored}<br>{_safe(claim.statement)}"
            f"<br><em>{_safe(claim.metric)}</em>: <strong>{_safe(estimate)}</strong>"
            f"{definitions(details, what)}<small>Rule: {_safe(claim.rule)}.</small></div>"
        )


def side_class(side: str) -> str:
    """Return the class by which style sheets know a side: `for-thesis`, `for-paper` or `for-neither`."""
    return f"for-{side.removeprefix('the ')}"


def definitions(details: Mapping[str, str], label: str) -> str:
    """Return names and what is said of each as an HTML list with a label, without those of which nothing is said."""
    shown = (f"<div><dt>{name}</dt> <dd>{_safe(text)}</dd></div>" for name, text in details.items() if text)
    return f'<dl aria-label="{_safe(label)}">{"".join(shown)}</dl>'


def _safe(text: object) -> str:
    return escape(visible(str(text)))


def power(claim: Claim, estimate: Estimate, seed: int = 0) -> dict[str, list[float]]:
    """Return how often repeats of a study would be judged `supported` and `contradicted`, by what is true.

    Shares of 400 simulated repeats (`stats.repeats`), where the truth is the `null`, the `threshold` or what is
    `expected`. Empty where the units are not known, or the claim does not say what is true; and where all units are
    alike, for they tell nothing of how others would spread (a share apart, whose spread follows from its value).
    """
    sample = estimate.sample
    if sample is None or None in (claim.null, claim.expected):
        return {}
    if sample.kind != "share" and not any(map(np.ptp, sample.groups)):
        return {}
    found = {}
    for name in ("null", "threshold", "expected"):
        studies = repeats(sample, getattr(claim, name), seed=seed)
        verdicts = [claim.verdict(study._replace(n=min(study.n, estimate.n))) for study in studies]
        if verdicts:
            found[name] = [verdicts.count(word) / len(verdicts) for word in VERDICTS[:2]]
    return found


def power_in_words(claim: Claim, found: Mapping[str, Sequence[float]]) -> str:
    """Return a sentence on what `power` found; "" where it found nothing."""
    if not found:
        return ""
    return (
        f"{found['expected'][0]:.2f} to support it if the effect were {claim.expected:g}, {found['null'][1]:.2f} to "
        f"contradict it if it were {claim.null:g}; false alarms {found['null'][0]:.2f}"
    )


def record(
    claim_id: str, lm: LM, estimate: Estimate, *, seed: int, source: str, known: int | None = None, **parameters
) -> Verdict:
    """Write `<results>/<model>/<claim>.json` in one step and return the verdict.

    `known` lowers n to the number of units that the model knows: unknown ones are no evidence either way. `parameters`
    are kept as they are given. `date` is the day (UTC) on which these numbers were first recorded: a record that says
    the same on another date stays as it is. Raises KeyError for a claim that is not declared and ValueError for an
    estimate that is not a number, and for a model that was changed since it was loaded. Records of other data than the
    project's own have a folder of their own, `<results>/<model>@<source>`.
    """
    if lm.is_modified:
        raise ValueError(
            f"{lm.name} is not as it was loaded, and a record speaks of the loaded model: end the intervention, or "
            "load it anew"
        )
    if known is not None:
        estimate = estimate._replace(n=min(estimate.n, known))
    # Six digits are more than an estimate has: stored records then agree between machines.
    sample = estimate.sample and Sample(estimate.sample.kind, tuple(map(_rounded, estimate.sample.groups)))
    estimate = Estimate(*_rounded(estimate[:3]), int(estimate.n), sample)
    claim = CLAIMS[claim_id]
    fields = {
        "claim": claim.id,
        **{name: getattr(claim, name) for name in DECLARED},
        "verdict": claim.verdict(estimate),
        "side": claim.side(claim.verdict(estimate)),
        "power": power(claim, estimate),
        "units": {"kind": sample.kind, "values": [group.tolist() for group in sample.groups]} if sample else {},
        **{name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()},
        "model": lm.name,
        "revision": lm.revision,
        "family": lm.spec.family,
        "dtype": str(lm.dtype).removeprefix("torch."),
        **products.noted(lm),
        "source": files.named(source),
        "seed": seed,
        "parameters": parameters,
        "code": code(claim, lm.spec.family),
        "data": resources.noted(),
        "versions": {name: package_version(name) for name in ("kncore", *DECIDING, "numpy", "scipy")},
        "date": _today(),
    }
    fields["checksum"] = checksum(fields)
    target = results_folder() / place_of(fields)
    if says_the_same(target, fields):
        disk.touch(target)  # it belongs to this run all the same, which is stored together with it
    else:
        disk.write(target, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")
    return Verdict(claim, estimate, lm.name)


def _rounded(values: Iterable[float]) -> np.ndarray:
    return np.array([float(f"{value:.6g}") for value in values])


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def published(model: str) -> dict | None:
    """Return what the authors show for a model, or None: `neuron`, and `change` of words under its suppression."""
    return resources.toml("published.toml").get(model)
