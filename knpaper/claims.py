"""What chapters do with claims: declare them before anything is computed, and record each with its verdict."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from kncore import products
from kncore.models import LM
from kncore.store import disk
from knpaper import resources
from knpaper.records import DECIDING, checksum, package_version, place_of, results_folder, says_the_same
from knpaper.rules import CLAIMS, Claim
from knpaper.staleness import code
from knpaper.stats import Estimate
from knpaper.stored import visible


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
        fields = (self.model, self.claim.statement, self.claim.metric, str(self.estimate), self.claim.rule)
        model, statement, metric, estimate, rule = (escape(visible(text)) for text in fields)
        return (
            f'<div class="verdict {verdict} mathjax_ignore"><strong>{verdict.capitalize()} on {model}.</strong> '
            f"{statement}<br><em>{metric}</em>: <strong>{estimate}</strong><br><small>Rule: {rule}.</small></div>"
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
    if lm.is_modified:
        raise ValueError(
            f"{lm.name} is not as it was loaded, and a record speaks of the loaded model: end the intervention, or "
            "load it anew"
        )
    if known is not None:
        estimate = estimate._replace(n=min(estimate.n, known))
    # Six digits are more than an estimate has: stored records then agree between machines.
    estimate = Estimate(*(float(f"{value:.6g}") for value in estimate[:3]), int(estimate.n))
    claim = CLAIMS[claim_id]
    fields = {
        "claim": claim.id,
        **{name: getattr(claim, name) for name in ("chapter", "statement", "metric", "rule")},
        "verdict": claim.verdict(estimate),
        **{name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()},
        "model": lm.name,
        "revision": lm.revision,
        "family": lm.spec.family,
        "dtype": str(lm.dtype).removeprefix("torch."),
        **products.noted(lm),
        "source": source,
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


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def published(model: str) -> dict | None:
    """Return what the authors show for a model, or None: `neuron`, and `change` of words under its suppression."""
    return resources.toml("published.toml").get(model)
