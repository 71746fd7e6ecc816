"""ROME checked against its equation, and variants of it that differ in one point: what they write and how far."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kncore import arch, rome, tokens
from kncore.editors import Edit
from kncore.interventions import Delta, edited
from kncore.models import LM
from kncore.predictions import log_probabilities
from kncore.query import Query
from kncore.replay import capture
from knpaper import cases, criteria, stats
from knpaper.cases import Case

Prompts = list[tuple[tokens.Encoded, int]]


def worked_example(
    W: Float[np.ndarray, "neuron hidden"],
    key: Float[np.ndarray, " neuron"],
    value: Float[np.ndarray, " hidden"],
    text: Float[np.ndarray, "token neuron"],
) -> list[dict[str, str]]:
    """Return the steps of the equation as rows of a table: storing `value` under `key`, without and with a covariance.

    The covariance is of the keys of a `text`. The last rows tell how far the first two tokens of the text are moved,
    and whether `rome.delta` gives the same change.
    """
    change = value - key @ W
    found = rome.Search(
        *(torch.tensor(x).float() for x in (key, key, key @ W, change)), steps=1, before=np.nan, probability=np.nan
    )
    columns = {}
    for name, C in {"none (the identity)": np.eye(len(key)), "of the text": text.T @ text / len(text)}.items():
        u = np.linalg.inv(C) @ key
        by_hand = np.outer(u, change) / (key @ u)
        ours = rome.delta(found, torch.tensor(C), block=0)
        first, second = text[:2] @ by_hand @ change / (change @ change)
        columns[name] = {
            "C": C,
            "v = Wᵀk": key @ W,
            "δ = v* − v": change,
            "u = C⁻¹k": u,
            "kᵀu": key @ u,
            "Δ = u δᵀ / kᵀu": by_hand,
            "(W + Δ)ᵀk": key @ (W + by_hand),
            "first token moves by δ times": first,
            "second token": second,
            "sum of the squares": first**2 + second**2,
            "rome.delta gives this Δ": np.allclose(ours.neurons.T @ ours.hidden, by_hand),
        }
    return [
        {"covariance": step, **{name: _written(column[step]) for name, column in columns.items()}}
        for step in columns["of the text"]
    ]


def _written(x) -> str:
    """Return a number, a vector or a matrix as text with at most six decimals, and a truth value as yes or no."""
    if isinstance(x, bool):
        return "yes" if x else "no"
    return f"[{', '.join(map(_written, x))}]" if np.ndim(x) else f"{np.round(x, 6) + 0.0:g}"


def check_edit(
    lm: LM, request: Query, found: rome.Search, moment: Float[Tensor, "neuron neuron"] | None, block: int
) -> dict[str, object]:
    """Return what an edit is, by name, and whether it is the equation's: "yes" for a difference below 1e-4.

    The equation is worked out in float64 from the key, the change δ and the covariance alone.
    """
    W, C, key, change = (
        x.detach().double().cpu().numpy()
        for x in (
            arch.value_vectors(lm.model, lm.spec, block),
            torch.eye(len(found.key)) if moment is None else moment,
            found.key,
            found.change,
        )
    )
    u = np.linalg.solve(C, key)
    closed = np.outer(u, change) / (key @ u)
    delta = rome.delta(found, moment, block, "bare")
    ours = (delta.neurons.T @ delta.hidden).cpu().numpy()
    at = tokens.span(lm, request)[1]
    with edited(lm, delta):
        sites = capture(lm, [tokens.encode(lm, request)], ("mlp",), [at], [at]).sites
    value, stored = (x.cpu().numpy() for x in (sites["mlp"][block][0], found.value + found.change))

    def small(difference, whole):
        return "yes" if np.abs(difference).max() < 1e-4 * np.abs(whole).max() else "no"

    return {
        f"{request.prompt} {request.foil}": f"{found.steps} steps, P = {found.probability:.2f}",
        "rank of Δ": np.linalg.matrix_rank(ours),
        "‖δ‖ / ‖v‖": f"{found.change.norm() / found.value.norm():.2f}",
        "‖Δ‖ / ‖W‖": f"{np.linalg.norm(closed) / np.linalg.norm(W):.4f}",
        "Δ is the closed form, in float64": small(ours - closed, closed),
        "Δᵀk = δ": small(key @ closed - change, change),
        "the edited model's MLP gives v* there": small(value - stored, stored),
    }


def keys(lm: LM, queries: Sequence[Query], block: int) -> Float[Tensor, "query neuron"]:
    """Return the key of each query: the neurons of a block at the last token of its subject, else of its prompt."""
    encoded = [tokens.encode(lm, query) for query in queries]
    at = [tokens.span(lm, query)[1] if query.subject else e.position for query, e in zip(queries, encoded, strict=True)]
    return capture(lm, encoded, ("neuron",), at, at).sites["neuron"][block].float()


def token_reaches(lm: LM, query: Query, delta: Delta) -> tuple[list[str], list[float]]:
    """Return the tokens of a prompt up to its answer, and the share of δ by which a change of rank one moves each."""
    encoded = tokens.encode(lm, query)
    positions = list(range(encoded.position + 1))
    captured = capture(lm, [encoded] * len(positions), ("neuron",), [0] * len(positions), positions)
    shares = captured.sites["neuron"][delta.block].float() @ delta.neurons[0]
    return [lm.tokenizer.decode([encoded.ids[i]]) for i in positions], shares.tolist()


def reach(edits: Sequence[Edit], others: Sequence[Float[Tensor, "key neuron"]], seed: int = 0) -> stats.Estimate:
    """Return the mean share of its δ by which an edit of rank one moves the values of `others`, further keys of each.

    Edits that failed are left out.
    """
    moved = [
        float((some @ edit.deltas[0].neurons[0]).abs().mean())
        for edit, some in zip(edits, others, strict=True)
        if not edit.failed
    ]
    return stats.mean(moved, seed=seed)


def ends(searches: Sequence[rome.Search], settings: rome.HParams) -> pd.DataFrame:
    """Return how each search ended: its `steps`, whether they were `all_steps` of the settings, whether the weight
    decay alone is above the published loss to stop at (`decayed`), and whether δ is `clamped`."""
    return pd.DataFrame(
        {
            "steps": found.steps,
            "all_steps": found.steps == settings.steps,
            "decayed": float(settings.decay * found.change.norm() / found.value.norm() ** 2) > settings.stop,
            "clamped": bool(found.change.norm() > 0.999 * settings.clamp * found.value.norm()),
        }
        for found in searches
    )


def without_space(lm: LM, request: Query, settings: rome.HParams, seed: int = 0) -> Prompts:
    """Return what `rome.prompts` does for a causal model, with the new answer encoded without the space before it."""
    target = tuple(lm.tokenizer(request.foil, add_special_tokens=False)["input_ids"])
    return [(replace(e, target=target), at) for e, at in rome.prompts(lm, request, settings, seed)]


def kl_at_the_subject(lm: LM, request: Query, settings: rome.HParams, seed: int = 0) -> Prompts:
    """Return what `rome.prompts` does, with the KL term read at the last token of the subject, as published."""
    *queries, (essence, at) = rome.prompts(lm, request, settings, seed)
    return [*queries, (replace(essence, position=at), at)]


def drift(lm: LM, request: Query, edit: Edit) -> float:
    """Return the divergence of what follows "{subject} is a" after an edit from what followed before it, in nats."""
    essence = rome.contexts(request, 0)[-1]
    before = log_probabilities(lm, [essence])[0].double()
    with edited(lm, *edit.deltas):
        after = log_probabilities(lm, [essence])[0].double()
    return float((after.exp() * (after - before)).sum())


def first_tokens(lm: LM, request: Query, settings: rome.HParams) -> tuple[int, int]:
    """Return the first token of a request's new answer with the space before it, and without."""
    return tuple(read(lm, request, settings)[0][0].target[0] for read in (rome.prompts, without_space))


def measure(lm: LM, drawn: Sequence[Case], variants: Mapping[str, Sequence[Edit]]) -> pd.DataFrame:
    """Return the table of `criteria.measure` for the same cases under each variant, with its name as `variant`."""
    edits = [edit for some in variants.values() for edit in some]
    table = criteria.measure(lm, list(drawn) * len(variants), edits)
    names = np.repeat(list(variants), len(drawn))
    return table.assign(variant=names[table["case"]], case=table["case"] % len(drawn))


def variant_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per variant of `measure`: the success by criterion, and the new answer's probability per token."""
    rows = []
    for name, part in table.groupby("variant", sort=False):
        row = {"": name}
        for found in criteria.summary(part).itertuples():
            shown = f"{found.after:.2f} [{found.low:.2f}, {found.high:.2f}], n = {found.cases}"
            failed = f"no edit, {found.failed} of {part['case'].nunique()}"
            nothing = failed if found.failed else "no such answer was right"
            row[found.criterion] = shown if found.cases else nothing
        new = part[(part["criterion"] == "reliability") & (part["failed"] == "")]
        row["P of the new answer"] = f"{np.exp(new['logp_after']).mean():.2f}" if len(new) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def differences(table: pd.DataFrame, bases: Mapping[str, str], seed: int = 0) -> dict[str, dict[str, stats.Estimate]]:
    """Return by how much the success of each variant and criterion differs from that of its base, request by request.

    `table` is of `measure`, `bases` maps variants to what they are compared with. One request alone is left out.
    """
    success = criteria.success(table).astype("Float64")
    by_case = success.groupby([table["variant"], table["criterion"], table["case"]]).mean()
    found: dict[str, dict[str, stats.Estimate]] = {}
    for name, base in bases.items():
        for criterion in table["criterion"].unique():
            pair = pd.concat([by_case[base, criterion], by_case[name, criterion]], axis=1).dropna().to_numpy(float)
            if len(pair) > 1:
                found.setdefault(name, {})[criterion] = stats.paired(*pair.T, seed=seed).difference
    return found


def kl_table(
    lm: LM, requests: Sequence[Query], ways: Mapping[str, tuple[Sequence[rome.Search], Sequence[Edit]]]
) -> pd.DataFrame:
    """Return one row per way to read the KL term, with its searches and their edits: means over the requests whose
    search did not fail. The directions of δ are compared with those of the first way."""
    reference = next(iter(ways.values()))[0]
    rows = []
    for name, (searches, edits) in ways.items():
        fine = [i for i, found in enumerate(searches) if not found.failed]
        cosines = [float(torch.cosine_similarity(searches[i].change, reference[i].change, 0)) for i in fine]
        rows.append(
            {
                "the term is read": name,
                "n": len(fine),
                "drift, nats": f"{np.mean([drift(lm, requests[i], edits[i]) for i in fine]):.2f}",
                "P": f"{np.mean([searches[i].probability for i in fine]):.2f}",
                "cosine of δ to that of the first row": f"{np.mean(cosines):.2f}",
            }
        )
    return pd.DataFrame(rows)


def reworded(case: Case, template: str) -> Case:
    """Return a case whose request is asked in another template; paraphrases and neighbours stay as they are."""

    def move(query: Query) -> Query:
        return replace(query, prompt=template.replace("{}", query.subject), template=template)

    return Case(move(case.request), {**case.queries, "reliability": tuple(map(move, case.queries["reliability"]))})


def key_row(
    searches: Sequence[rome.Search],
    moment: Float[Tensor, "neuron neuron"] | None,
    edits: Mapping[str, Sequence[Edit]],
) -> dict[str, object]:
    """Return a row of a table on the two keys of some requests: how far they agree (see `rome.alike`), and the size of
    the change under each key by its label, as medians over the requests."""
    sound = [found for found in searches if not found.failed]
    cosine, share = np.median([rome.alike(found, moment) for found in sound], axis=0)
    row = {
        "n": len(sound),
        "P, searched": f"{np.mean([found.probability for found in sound]):.2f}",
        "cosine of the keys": f"{cosine:.2f}",
        "kᵀu, bare / mean": f"{share:.2f}",
    }
    for label, some in edits.items():
        deltas = [edit.deltas[0] for edit in some if not edit.failed]
        row[f"‖Δ‖, {label}"] = f"{np.median([d.neurons.norm() * d.hidden.norm() for d in deltas]):.1f}"
    return row


def fields_from_a_set(hash_seed: int) -> list[str]:
    """Return the new field of each scholar as the published code pairs them: the one before the old in a list made of a
    set, in a process whose hash seed is `hash_seed`."""
    program = "import json, sys; print(json.dumps(list(set(json.load(sys.stdin)))))"
    fields = list(cases.scholars().values())
    order = _in_a_process(program, hash_seed, fields)
    before = {field: order[i - 1] for i, field in enumerate(order)}
    return [before[field] for field in fields]


def fields_from_a_seed(seed: int, hash_seed: int | None = None) -> list[str]:
    """Return the new fields that `cases.synonymy` draws, in this process or in one whose hash seed is `hash_seed`."""
    if hash_seed is None:
        return [case.request.foil for case in cases.synonymy(seed=seed)]
    program = (
        "import json, sys; from knpaper.rome_variants import fields_from_a_seed as draw; "
        "print(json.dumps(draw(json.load(sys.stdin))))"
    )
    return _in_a_process(program, hash_seed, seed)


def _in_a_process(program: str, hash_seed: int, data: object) -> list:
    """Return the JSON that a Python program prints, given data as JSON, in a process with a hash seed."""
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)
