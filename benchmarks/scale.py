"""What attribution of a whole data set costs on models that do not fit here: counted, and extrapolated from what does.

    python benchmarks/scale.py [--prompts N] [--out FILE]

Prints a table in Markdown. Sizes of the models are those of their published configurations; no weights are loaded.
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import kncore
from kncore import arch, attribution, stats, tokens
from kncore.models import LM
from kncore.pipeline import write
from kncore.replay import Change, capture, replay
from kncore.tokens import Encoded

PARAREL = 253_448  # prompts of 27,738 facts, as filtered by Dai et al. 2022, section 4.1
BUDGET = 1024  # positions held at once, the default of kncore.attribute
MODELS = {
    "GPT-2 XL": transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "LLaMA-2-7B": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
}
TOGETHER = 5  # prompts in one call
STANDARD = "smollm2-135m"  # the model that is timed here


class Size(NamedTuple):
    """Weights of all parts together, of the linear layers of a block, of its output projection, and of the head."""

    whole: int
    block: int
    projection: int
    head: int
    blocks: int


def size(config: transformers.PretrainedConfig) -> Size:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    spec = arch.spec_for(config.model_type)
    blocks = arch.module_at(model, spec.blocks, "blocks")
    linear = [module.weight.numel() for module in blocks[0].modules() if isinstance(module, nn.Linear | Conv1D)]
    values = arch.value_vectors(model, spec, 0)
    whole = sum(p.numel() for p in model.parameters())
    return Size(whole, sum(linear), values.numel(), values.shape[1] * config.vocab_size, len(blocks))


def work(size: Size, length: float, nodes: float, ends: float) -> float:
    """GFLOP of one prompt of `length` tokens with so many nodes and ends of panels on each block (the cost page has
    the equation)."""
    count = size.blocks * (length * size.block) + size.head
    for block in range(size.blocks):
        above = size.blocks - 1 - block
        count += (nodes + ends) * ((above + 1) * size.block + size.head)
        count += nodes * (above * size.block + size.projection + size.head)
    return 2e-9 * count


def held(config: transformers.PretrainedConfig, length: int, rows: int = 8) -> tuple[float, float]:
    """Bytes that the backward pass keeps for a row: in each block, and in the head. Counted in bfloat16 on models of
    one and of two blocks of the full width, with random weights."""
    found = []
    for blocks in (1, 2):
        small = copy.deepcopy(config)
        small.num_hidden_layers = blocks
        torch.manual_seed(0)
        with torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16).eval()
        lm = LM("", "", model.requires_grad_(False), _Padding(), arch.spec_for(config.model_type))
        captured = capture(lm, [Encoded(tuple(range(5, 5 + length)), length - 1, (7,))])
        values = captured.sites["neuron"][0].expand(rows, -1).clone().requires_grad_()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}
        alive = []  # a freed address would be counted once for two tensors

        def keep(x, weights=weights, kept=kept, alive=alive):
            where = x.untyped_storage().data_ptr()
            if where not in weights:
                kept[where] = x.untyped_storage().nbytes()
                alive.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logits = replay(captured, [Change(0, torch.zeros(rows, dtype=torch.long), values)])
            logits.log_softmax(-1)[:, 7].exp().sum()
        found.append(sum(kept.values()) / rows)
    return found[1] - found[0], 2 * found[0] - found[1]


class _Padding:
    pad_token_id = 0


class Standard(NamedTuple):
    """What the model here takes for a prompt: tokens, nodes and ends of panels on a block, and GFLOP per second."""

    length: float
    nodes: float
    ends: float
    rate: float


def standard(prompts: int) -> tuple[Standard, str]:
    lm = kncore.load(STANDARD)
    queries = [q for name in ("capital", "official_language", "native_language") for q in kncore.facts(name)]
    queries = queries[:: max(1, len(queries) // prompts)][:prompts]
    kncore.attribute(lm, queries[:1], steps=2, store=False)
    seconds, nodes = [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(0, len(queries), TOGETHER):
        start = time.perf_counter()
        found = kncore.attribute(lm, queries[i : i + TOGETHER], store=False)
        seconds.append((time.perf_counter() - start) / len(found.nodes))
        nodes.append(found.nodes.double())
    each = torch.cat(nodes).mean()
    # A path has one end that is computed, at 0, and three more for each four panels that it is split into.
    ends = 1 + (each / attribution.PANEL_NODES - 1) / attribution.SPLIT * (attribution.SPLIT - 1)
    length = sum(len(tokens.encode(lm, query).ids) for query in queries) / len(queries)
    gflop = work(size(lm.model.config), length, float(each), float(ends))
    took = stats.mean(seconds)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 if sys.platform == "darwin" else 2**-10)
    block, head = held(lm.model.config, round(length))
    first = TOGETHER * attribution.PANEL_NODES  # rows of each block in the first pass, which is the largest
    foretold = 2 * first * sum((k + 1) * block + head for k in range(len(lm.blocks)))
    told = (
        f"{len(queries)} facts on {lm.name} ({torch.get_num_threads()} thread(s), float32): {length:.1f} tokens,\n"
        f"{each:.1f} nodes a block; seconds a prompt {took} calls of {TOGETHER} prompts;\n"
        f"{gflop / took.value:.0f} GFLOP/s.\n"
        f"Check of the memory: counted as below, a pass of {TOGETHER} prompts keeps {foretold / 2**30:.2f} GiB; the "
        f"process grew by {more / 2**30:.2f} GiB"
    )
    return Standard(length, float(each), float(ends), gflop / took.value), told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60, help="to time here")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    args = parser.parse_args()
    here, told = standard(args.prompts)
    lines = [
        "| model | TFLOP a prompt | all prompts, EFLOP | hours at 10 TFLOP/s | hours on this machine "
        "| weights, GiB in 32 / 16 bits | held besides, GiB |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, config in MODELS.items():
        one = size(config)
        gflop = work(one, here.length, here.nodes, here.ends)
        block, head = held(config, round(here.length))
        # The most is held where all rows of a pass entered at the lowest blocks. A row weighs its prefix too.
        rows = BUDGET / (1 + round(here.length) // 16)
        besides = rows * (one.blocks * block + head) / 2**30
        total = gflop * PARAREL
        lines.append(
            f"| {name} | {gflop / 1e3:.1f} | {total / 1e9:.2f} | {total / 1e4 / 3600:.0f} "
            f"| {total / here.rate / 3600:,.0f} | {4 * one.whole / 2**30:.1f} / {2 * one.whole / 2**30:.1f} "
            f"| {besides:.1f} |"
        )
    text = f"""\
Measured here: {told}.

{chr(10).join(lines)}

*All prompts*: the {PARAREL:,} of ParaRel. *Held besides* the weights: what the backward pass keeps in bfloat16 of the
{BUDGET} positions that the default `budget` allows; in float32 twice that.
"""
    print(text)
    if args.out:
        write(args.out, text)


if __name__ == "__main__":
    main()
