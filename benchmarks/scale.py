"""What attribution of a whole data set costs on models that do not fit here: counted, and extrapolated from what does.

Prints a table in Markdown. Sizes of the models are those of their published configurations; no weights are loaded.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import transformers
from gpu import MODELS
from report import most_memory, parser, show, table, timed

import kncore
from kncore import arch, quadrature, tokens
from kncore.models import LM
from kncore.replay import Change, capture, replay
from kncore.tokens import Encoded
from knpaper import shapes, stats, tasks
from knpaper.shapes import Size

PARAREL = 253_448  # prompts of 27,738 facts, as filtered by Dai et al. 2022, section 4.1
BUDGET = 1024  # positions held at once, the default of kncore.attribute
TOGETHER = 5  # prompts in one call
STANDARD = "smollm2-135m"  # the model that is timed here
COLUMNS = (
    "model | TFLOP a prompt | all prompts, EFLOP | hours at 10 TFLOP/s | hours on this machine | "
    "weights, GiB in 32 / 16 bits | held besides, GiB"
).split(" | ")


def paid(nodes, blocks: int) -> torch.Tensor:
    """Nodes of the default quadrature that a pass is made for, by block: for the last of each, one of block 0 does."""
    out = torch.zeros(blocks, dtype=torch.double) + nodes - 1
    out[0] += 1
    return out


def work(size: Size, length: float, nodes, ends) -> float:
    """GFLOP of one prompt of `length` tokens: two for each weight of a linear layer that a position passes.

    After one pass of the prompt, one position passes the blocks from the change upwards, for each node and each end
    that is no node, and goes backward to the change for each node. `nodes` and `ends`: numbers, or tensors by block.
    """
    above = torch.arange(size.blocks).flip(0).double()
    forward = (nodes + ends) * ((above + 1) * size.block + size.head)
    backward = nodes * (above * size.block + size.projection + size.head)
    return 2e-9 * (size.blocks * length * size.block + size.head + float((forward + backward).sum()))


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
        lm = LM("", "", model.requires_grad_(False), SimpleNamespace(pad_token_id=0), arch.spec_for(config.model_type))
        captured = capture(lm, [Encoded(tuple(range(5, 5 + length)), length - 1, (7,))])
        values = captured.sites["neuron"][0].expand(rows, -1).clone().requires_grad_()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}  # held, or a freed address would be counted once for two tensors

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logits = replay(captured, [Change(0, torch.zeros(rows, dtype=torch.long), values)])
            logits.log_softmax(-1)[:, 7].exp().sum()
        found.append(sum(storage.nbytes() for where, storage in kept.items() if where not in weights) / rows)
    return found[1] - found[0], 2 * found[0] - found[1]


def standard(prompts: int) -> tuple[float, float, float, str]:
    """Of a prompt of the model here: tokens, nodes on a block and GFLOP per second; and these in words."""
    lm = kncore.load(STANDARD)
    queries = [q for name in ("capital", "official_language", "native_language") for q in tasks.facts(name)]
    queries = queries[:: max(1, len(queries) // prompts)][:prompts]
    kncore.attribute(lm, queries[:1], steps=2, store=False)
    seconds, nodes, before = [], [], most_memory()
    for i in range(0, len(queries), TOGETHER):
        took, found = timed(kncore.attribute, lm, queries[i : i + TOGETHER], store=False)
        seconds.append(took / len(found.nodes))
        nodes.append(found.nodes.double())
    each = float(torch.cat(nodes).mean())
    length = sum(len(tokens.encode(lm, query).ids) for query in queries) / len(queries)
    took, grown = stats.mean(seconds), most_memory() - before
    rate = work(shapes.size(lm.model.config), length, paid(each, len(lm.blocks)), 0) / took.value
    block, head = held(lm.model.config, round(length))
    first = TOGETHER * (len(quadrature.START) - 1)  # rows of each block in the first pass, which is the largest
    foretold = 2 * first * sum((k + 1) * block + head for k in range(len(lm.blocks)))
    words = (
        f"{len(queries)} facts on {lm.name} ({torch.get_num_threads()} thread(s), float32): {length:.1f} tokens,\n"
        f"{each:.1f} nodes a block; seconds a prompt {took} calls of {TOGETHER} prompts;\n{rate:.0f} GFLOP/s.\n"
        f"Check of the memory: counted as below, a pass of {TOGETHER} prompts keeps {foretold / 2**30:.2f} GiB; the "
        f"process grew by {grown:.2f} GiB"
    )
    return length, each, rate, words


def main() -> None:
    args = parser(__doc__, prompts=(60, "to time here")).parse_args()
    length, nodes, rate, words = standard(args.prompts)
    lines = []
    for name, config in MODELS.items():
        model = shapes.size(config)
        gflop = work(model, length, paid(nodes, model.blocks), 0)
        total = gflop * PARAREL
        block, head = held(config, round(length))
        # The most is held where all rows of a pass entered at the lowest blocks. A row weighs its prefix too.
        besides = BUDGET / (1 + round(length) // 16) * (model.blocks * block + head)
        flops = [f"{gflop / 1e3:.1f}", f"{total / 1e9:.2f}", f"{total / 1e4 / 3600:.0f}", f"{total / rate / 3600:,.0f}"]
        weights = f"{4 * model.whole / 2**30:.1f} / {2 * model.whole / 2**30:.1f}"
        lines.append([name, *flops, weights, f"{besides / 2**30:.1f}"])
    text = f"""\
Measured here: {words}.

{table(COLUMNS, lines)}
*All prompts*: the {PARAREL:,} of ParaRel. *Held besides* the weights: what the backward pass keeps in bfloat16 of the
{BUDGET} positions that the default `budget` allows; in float32 twice that.
"""
    show(text, args.out)


if __name__ == "__main__":
    main()
