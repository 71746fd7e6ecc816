"""Attribution side by side: seconds, work and error of kncore, of its peers and of the equation written naively.

Prints Markdown tables and, with `--out`, writes them to the file that the book includes. The implementations take turns
in one process, on the same prompts; attribution scores are neither looked up nor stored.
"""

from __future__ import annotations

import importlib
import platform
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import naive
import report
import scale
import torch
import transformers
from jaxtyping import Float
from report import timed
from torch import Tensor

import kncore
from kncore import arch, quadrature, tokens
from kncore.models import LM
from kncore.query import Query
from kncore.replay import Change, capture, replay
from knpaper import grammar, tasks

RULES = {  # options of kncore.attribute, by the name that the tables give to the scores
    "20 Riemann": {"quadrature": "riemann", "steps": 20},
    "20 Riemann, published site": {"quadrature": "riemann", "steps": 20, "site": "published"},
    "20 Gauss-Legendre": {"steps": 20},
    "96 Gauss-Legendre": {"steps": 96},
    "default": {},
}
RIEMANN, PUBLISHED, GAUSS, FLAT, DEFAULT = RULES
FIRST = {  # the prompt that every implementation is timed on, by its length in tokens
    5: Query("The sisters of the boy", "are"),
    8: Query("The city of Rome is the capital of", "Italy"),
    12: Query("The nation of South Korea has its capital in the city of", "Seoul"),
}


@dataclass(frozen=True, eq=False)
class Method:
    """One row of a table. Methods with the same `scores` compute one quantity at one set of nodes."""

    name: str
    scores: str
    lm: LM
    run: Callable[[list[Query]], Tensor | kncore.Attribution]  # a tensor: scores of the first query
    prompts: int = 1  # at once
    turns: int = 1
    extra: int = 1  # passes of the model per block, besides those at the nodes


class Result(NamedTuple):
    seconds: float  # per prompt
    gflop: float  # per prompt
    scores: Float[Tensor, "block neuron"]  # of the first prompt


def ours(lm: LM, scores: str, prompts: int = 1, turns: int = 1) -> Method:
    return Method("kncore", scores, lm, partial(kncore.attribute, lm, store=False, **RULES[scores]), prompts, turns)


def captum(lm: LM) -> Method:
    from captum.attr import LayerIntegratedGradients

    def block_scores(block, encoded):
        # captum's path runs from the layer's state for a baseline *input* to its state for the input. With this switch
        # as the input, the baseline silences the neurons at the target position and no others.
        site, switch = lm.spec.sites["neuron"], []

        def silence(state):
            at = torch.ones(len(state), len(encoded.ids), 1)
            at[:, encoded.position] = switch[-1]
            return state * at

        def probability(on, ids):
            switch.append(on)
            return lm.model(ids).logits[:, encoded.position].softmax(-1)[:, encoded.target[0]]

        integrated = LayerIntegratedGradients(probability, arch.module_at(block, site.path, "neuron site"))
        options = {"additional_forward_args": torch.tensor([encoded.ids]), "attribute_to_layer_input": True}
        with arch.at_site(block, site, silence):
            scores = integrated.attribute(torch.ones(1, 1), torch.zeros(1, 1), n_steps=20, **options)
        return scores[0, encoded.position].detach()

    def run(queries):
        return torch.stack([block_scores(block, tokens.encode(lm, queries[0])) for block in lm.blocks])

    return Method("captum", GAUSS, lm, run, extra=2)


def package(name: str, lm: LM, module: str) -> Method:
    """The class `KnowledgeNeurons`, of the package of that name or of the published code, which grew out of it."""
    peer = importlib.import_module(module).KnowledgeNeurons(lm.model, lm.tokenizer, lm.spec.family, device=lm.device)

    def run(queries):
        return peer.get_scores(queries[0].prompt, f" {queries[0].target}", steps=20, batch_size=20, pbar=False)

    return Method(name, PUBLISHED, lm, run)


def published(lm: LM, path: Path | None) -> Method:
    if path is None:
        raise ImportError("give a checkout of github.com/frankniujc/kn_thesis with --authors PATH")
    # Attribution uses nothing of these modules, and what they import is not wanted here.
    unused = {"kn_code.rome": "apply_rome_to_model", "kn_code.rome_hparams": "ROMEHyperParams"}
    for module, name in {**unused, "datasets": "load_dataset"}.items():
        sys.modules.setdefault(module, types.ModuleType(module)).__dict__.setdefault(name, None)
    sys.path.insert(0, str(path))
    at = subprocess.run(["git", "-C", path, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    return package(f"published code {at}".strip(), lm, "kn_code.knowledge_neurons")


def random_gpt2(like: LM) -> LM:
    """A GPT-2 of the size of another model, with random weights and the other's tokenizer."""
    size = like.model.config
    config = transformers.GPT2Config(
        vocab_size=size.vocab_size, n_embd=size.hidden_size, n_inner=size.intermediate_size, n_layer=len(like.blocks),
        n_head=size.num_attention_heads, n_positions=64, initializer_range=0.05, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    return LM("gpt2-random", "seed 0", model, like.tokenizer, arch.spec_for("gpt2"))


def work(method: Method, length: int, nodes: Float[Tensor, " block"] | None) -> float:
    """GFLOP per prompt: two for each weight of a linear layer that a position passes forward, two backward.

    Naive and the peers, which have no `nodes`, pass all blocks at all positions for each of 20, and go backward to the
    change; kncore does what `scale.work` counts.
    """
    size = scale.size(method.lm.model.config)
    if nodes is not None:
        adapted = method.scores == DEFAULT
        return scale.work(size, length, scale.paid(nodes, size.blocks) if adapted else nodes, 0 if adapted else 1)
    forward = (20 + method.extra) * (size.blocks * size.block + size.head)
    backward = [20 * (above * size.block + size.projection + size.head) for above in range(size.blocks)]
    return 2e-9 * length * float(size.blocks * forward + sum(backward))


def peak() -> float:
    """GFLOP per second of a matrix product of 2048³, best of eight."""
    a, b = torch.randn(2, 2048, 2048)
    return 2e-9 * 2048**3 / min(timed(torch.mm, a, b)[0] for _ in range(8))


def prompts_of(lm: LM, length: int, n: int) -> list[Query]:
    """`n` of the project's own queries with `length` tokens and a target of one token."""
    pool = [query for relation in tasks.relations() for query in tasks.facts(relation)]
    pool += [query for phenomenon in grammar.phenomena() for query in grammar.minimal_pairs(phenomenon)]
    random.Random(0).shuffle(pool)
    found = {}
    for query in [FIRST.get(length, pool[0]), *pool]:
        encoded = tokens.encode(lm, query)
        if (len(encoded.ids), len(encoded.target)) == (length, 1):
            found.setdefault(query.prompt, query)
        if len(found) == n:
            return list(found.values())
    raise SystemExit(f"the project's own data have {len(found)} prompts of {length} tokens, {n} are asked for")


def measure(methods: Sequence[Method], queries: list[Query], length: int) -> dict[Method, Result]:
    """The methods take turns; seconds are those of the best turn."""
    out: dict[Method, Result] = {}
    for turn in range(max(method.turns for method in methods)):
        for method in (m for m in methods if turn < m.turns):
            batch = queries[: method.prompts]
            seconds, result = timed(method.run, batch)
            seconds = min([seconds / len(batch), *([out[method].seconds] if turn else [])])
            whole = isinstance(result, Tensor)
            scores, nodes = (result, None) if whole else (result.scores[0], result.nodes.double().mean(0))
            out[method] = Result(seconds, work(method, length, nodes), scores.detach())
            print(f"{method.name}, {method.scores}, {len(batch)} at once: {seconds:.3g} s a prompt", file=sys.stderr)
    return out


def reference(lm: LM, query: Query, blocks: Sequence[int], per_panel: int) -> Float[Tensor, "block neuron"]:
    """Scores by Gauss-Legendre nodes on fixed panels: 133 on block 0, the narrowest next to zero, 8 on the others."""
    encoded = tokens.encode(lm, query)
    captured = capture(lm, [encoded])
    x, w = map(torch.tensor, quadrature.rule("gauss", per_panel))
    fine, coarse = {i / 128 for i in range(129)} | {4.0**-k for k in range(4, 9)}, {i / 8 for i in range(9)}
    out = []
    for block in blocks:
        state = captured.sites["neuron"][block]
        edges = torch.tensor(sorted(coarse if block else fine), dtype=torch.double)
        nodes, shares = (edges[:-1, None] + edges.diff()[:, None] * x).flatten(), (edges.diff()[:, None] * w).flatten()
        total = torch.zeros_like(state[0], dtype=torch.double)
        for part, share in zip(nodes.split(64), shares.split(64), strict=True):
            values = (part[:, None].float() * state).requires_grad_()
            logits = replay(captured, [Change(block, torch.zeros(len(part), dtype=torch.long), values)])
            (slopes,) = torch.autograd.grad(logits.softmax(-1)[:, encoded.target[0]].sum(), values)
            total += share @ slopes.double()
        out.append((total * state[0]).float())
    return torch.stack(out)


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest score."""
    return float((a - b).abs().max() / b.abs().max())


def distance(a: Tensor, b: Tensor) -> str:
    """Relative Euclidean distance of the scores of block 0 / of the worst of the other blocks."""
    blocks = (a - b).double().norm(dim=1) / b.double().norm(dim=1)
    return f"{blocks[0]:.1e} / {blocks[1:].max():.1e}" if blocks.any() else "–"


def errors(lm: LM, query: Query) -> tuple[list[list[str]], float, Tensor]:
    """Rows of the table of errors, how far the reference moves with fewer nodes, and the scores of `GAUSS`."""
    truth = reference(lm, query, range(len(lm.blocks)), 8)
    moved = (reference(lm, query, [0], 6)[0] - truth[0]).norm() / truth[0].norm()
    found = {s: kncore.attribute(lm, [query], store=False, **RULES[s]) for s in (RIEMANN, GAUSS, FLAT, DEFAULT)}
    rows = []
    for name, result in found.items():
        nodes = f"{result.nodes[0, 0]} / {result.nodes[0, 1:].max()}"
        both = [distance(result.scores[0], scores) for scores in (truth, found[FLAT].scores[0])]
        rows.append([f"{query.prompt} → {query.target}", name, nodes, *both])
    return rows, float(moved), found[GAUSS].scores[0]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = report.table(header, rows, left=2)
    return re.sub(r"(?<=\de)-(?=\d)", "\u2011", text)  # a hyphen at which no browser breaks a line


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def arguments():
    parser = report.parser(
        __doc__,
        model=("smollm2-135m", "a LLaMA-type model, as for kncore.load"),
        lengths=([5, 8, 12], "prompt lengths in tokens"),
        threads=([2, 1], "the first is used at all lengths"),
        batch=(8, "prompts at once in the batched rows"),
        repeats=(3, "turns of kncore with one prompt; the others have one"),
    )
    parser.add_argument("--blocks", type=int, help="keep only the lowest blocks of the model")
    parser.add_argument("--authors", type=Path, help="a checkout of github.com/frankniujc/kn_thesis")
    parser.add_argument("--quick", action="store_true", help="smoke test: 2 blocks, 5 tokens, 1 thread, 1 turn")
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.lengths, args.threads, args.batch, args.repeats = 2, [5], [1], 2, 1
    return args


def loaded(args, **options) -> LM:
    """The model, cut to the lowest blocks where that is wanted."""
    lm = kncore.load(args.model, **options)
    if args.blocks:
        del lm.blocks[args.blocks :]
        lm.model.config.num_hidden_layers = len(lm.blocks)
    return lm


def rounding(lm: LM, exact: LM, query: Query, steps: int = 4) -> str:
    """How far naive and kncore are from the scores of the same model in float64, in words: whose rounding it is."""
    found = []
    for site in ("neuron", "published"):
        options = {"quadrature": "riemann", "steps": steps, "site": site, "store": False}
        truth, got = (kncore.attribute(model, [query], **options).scores[0] for model in (exact, lm))
        plain = naive.attribution(lm, tokens.encode(lm, query), *quadrature.rule("riemann", steps), site)
        found.append(f"{largest(plain, truth):.0e} for naive and {largest(got, truth):.0e} for kncore")
    return (
        f"Rounding, with {steps} Riemann nodes on “{query.prompt}”: the largest distance from the same\n"
        f"scores in float64 is {found[0]}, at the published site\n{found[1]}."
    )


def lineup(args, lm: LM, gpt2: LM) -> tuple[list[Method], list[list[str]]]:
    """The methods, and a row for each peer that cannot be run."""
    rule, absent = quadrature.rule("riemann", 20), []
    methods = [
        Method("naive", RIEMANN, lm, lambda queries: naive.attribution(lm, tokens.encode(lm, queries[0]), *rule))
    ]

    def peer(name: str, build: Callable, *arguments) -> None:
        try:
            methods.append(build(*arguments))
        except ImportError as error:
            absent.append([name, f"not run: {error}"])

    peer("captum", captum, lm)
    peer("published code", published, lm, args.authors)
    methods.extend(ours(lm, scores, turns=args.repeats) for scores in (PUBLISHED, RIEMANN, DEFAULT))
    methods.extend(ours(lm, scores, args.batch) for scores in (RIEMANN, DEFAULT))
    peer("knowledge-neurons", package, "knowledge-neurons", gpt2, "knowledge_neurons")
    return [*methods, ours(gpt2, PUBLISHED, turns=args.repeats)], absent


class Findings(NamedTuple):
    results: dict[tuple[int, int], dict[Method, Result]]  # by threads and prompt length
    peaks: dict[int, float]  # GFLOP per second, by threads
    off: dict[Method, float]  # largest difference to kncore with one prompt
    errors: list[list[str]]
    moved: float


def compare(args, lm: LM, gpt2: LM, methods: Sequence[Method]) -> Findings:
    """Time the methods in each setting: all of them with the first number of threads, a few with the others."""
    first = args.threads[0]
    few = [m for m in methods if m.lm is lm and m.name in ("naive", "kncore") and m.prompts == 1]
    settings = [(first, length) for length in sorted(args.lengths)] + [(n, min(args.lengths)) for n in args.threads[1:]]
    results, peaks, off, wrong, moved = {}, {}, {}, [], 0.0
    for threads, length in settings:
        torch.set_num_threads(threads)
        peaks[threads] = max(peak(), peaks.get(threads, 0.0))
        queries = prompts_of(lm, length, args.batch)
        for model in (lm, gpt2):  # warm up
            kncore.attribute(model, queries[:1], quadrature="riemann", steps=4, store=False)
        found = results[threads, length] = measure(methods if threads == first else few, queries, length)
        if threads == first:
            lines, change, gauss = errors(lm, queries[0])
            wrong, moved = wrong + lines, max(change, moved)
            truth = {(m.lm.name, m.scores): found[m].scores for m in methods if m.name == "kncore" and m.prompts == 1}
            truth[lm.name, GAUSS] = gauss
            for method, (_, _, scores) in found.items():
                wanted = truth[method.lm.name, method.scores]
                if scores is not wanted:
                    off[method] = max(largest(scores, wanted), off.get(method, 0.0))
    torch.set_num_threads(first)
    return Findings(results, peaks, off, wrong, moved)


def cells(methods: Sequence[Method], found: Findings) -> tuple[dict[bool, list[list[str]]], list[list[str]]]:
    """Rows of the tables of seconds (of the model: True; of the GPT-2 with random weights: False), and of work."""
    seconds, work = {True: [], False: []}, []
    for method in methods:
        base, own = next(m for m in methods if m.lm is method.lm), method.lm is methods[0].lm
        start = [method.scores, str(method.prompts)]
        times, shares = [method.name, *start], [method.name + ("" if own else " (GPT-2)"), *start]
        for (threads, _), results in found.results.items():
            got, slow = results.get(method), results.get(base)
            ratio = f" ({slow.seconds / got.seconds:.3g}×)" if got and method is not base else ""
            times.append(f"{got.seconds:.3g}{ratio}" if got else "–")
            shares.append(f"{got.gflop:.0f} ({got.gflop / got.seconds / found.peaks[threads]:.0%})" if got else "–")
        seconds[own].append([*times, f"{found.off[method]:.0e}" if method in found.off else "–"])
        work.append(shares)
    return seconds, work


def main() -> None:
    args = arguments()
    lm = loaded(args)
    gpt2 = random_gpt2(lm)
    methods, absent = lineup(args, lm, gpt2)
    found = compare(args, lm, gpt2, methods)
    rounded = rounding(lm, loaded(args, dtype=torch.float64), prompts_of(lm, min(args.lengths), 1)[0])
    seconds, work = cells(methods, found)
    names = {n: f"{n} thread{'s' if n > 1 else ''}" for n in args.threads}
    settings = [f"{length} tokens, {names[threads]}" for threads, length in found.results]
    columns = ["implementation", "scores", "prompts", *settings]
    absent = [[*row, *["–"] * (len(columns) - 1)] for row in absent]
    peaks = ", ".join(f"{found.peaks[n]:.0f} GFLOP/s with {names[n]}" for n in args.threads)
    text = f"""\
{machine()}, torch {torch.__version__}, transformers {transformers.__version__}, float32. Peak (product of 2048³):
{peaks}. Model: {lm.name}, revision {lm.revision},
{len(lm.blocks)} blocks. kncore with one prompt: best of {args.repeats}; all else: one run. Peak memory of the process:
{report.most_memory():.1f} GiB.

**Seconds per prompt**, and in brackets how many times faster than the first row. *Difference*: the largest difference
to kncore with one prompt, at the same nodes and site, as a share of the largest score.

{table([*columns, "difference"], [*seconds[True], *absent])}
On a GPT-2 of the same size with random weights:

{table([*columns, "difference"], seconds[False])}
{rounded}

**Work**: GFLOP per prompt, and in brackets the share of the peak.

{table(columns, work)}
**Error of the quadrature**: relative Euclidean distance of a block's scores from those of two other rules, on block 0 /
on the worst other block. *Panels*: 8 Gauss-Legendre nodes on each of 133 fixed panels on block 0, of 8 panels on the
others; with 6 nodes a panel, the scores of block 0 move by at most {found.moved:.0e}. *Flat*: 96 nodes on the whole
path.

{table(["prompt", "scores", "nodes", "from panels", "from flat"], found.errors)}"""
    report.show(text, args.out)


if __name__ == "__main__":
    main()
