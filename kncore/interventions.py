"""Interventions: context managers that change neurons or value vectors and leave the model as it was, bit for bit.

Nothing is written in place. Neurons are changed by hooks, which act on a copy of the state as it passes; weights are
exchanged for new ones and the old ones put back. Both happen also after an exception or an interrupt. Interventions
nest: an inner one acts on what the outer ones left.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kncore import arch, checks, tokens
from kncore.models import LM
from kncore.neurons import Neuron, listed
from kncore.tasks import Query

SITES = ("neuron", "authors")


def suppress(lm: LM, neurons: Sequence[tuple[int, int]], *, position: str = "target", site: str = "neuron"):
    """Context in which `neurons`, pairs (block, index), are zero.

    position: "target", where the target is predicted (the last token that is not padding of causal models, the first
        mask of masked ones), or "all".
    site: "neuron", or "authors" for where the published code of Niu et al. reads and scales them.

    Raises ValueError, before anything changes, for an empty list, a neuron that does not exist or comes twice, and an
    unknown position or site. At the target position the model must be run as a whole: RuntimeError inside `replay`.
    """
    return set_neurons(lm, neurons, 0.0, position=position, site=site)


def enhance(
    lm: LM, neurons: Sequence[tuple[int, int]], factor: float = 2.0, *, position: str = "target", site: str = "neuron"
):
    """Context in which `neurons` are multiplied by `factor`; the other arguments and errors as in `suppress`."""
    factor = checks.finite(factor, "factor", lm.dtype)
    columns = {block: [i for _, i in group] for block, group in _blocks(lm, neurons, position, site)}
    return _changed(lm, columns, {block: lambda x: x * factor for block in columns}, position, site)


def set_neurons(
    lm: LM,
    neurons: Sequence[tuple[int, int]],
    values: float | Sequence[float],
    *,
    position: str = "target",
    site: str = "neuron",
):
    """Context in which `neurons` have `values`, one for all or one for each; otherwise as `suppress`.

    Raises ValueError for values that are no finite numbers of the model's dtype, and for one each of a set, which has
    no order.
    """
    unordered = isinstance(neurons, Set)
    neurons = listed(neurons, len(lm.blocks), lm.n_neurons, lm.name)
    groups = _blocks(lm, neurons, position, site)
    if isinstance(values, Iterable) and getattr(values, "ndim", 1):
        if unordered:
            raise ValueError("neurons in a set have no order that values could follow; give both as lists")
        values = checks.finites(values, "values", lm.dtype)
        if len(values) != len(neurons):
            raise ValueError(f"{len(neurons)} neurons but {len(values)} values; give one for all or one for each")
    else:
        values = [checks.finite(values, "values", lm.dtype)] * len(neurons)
    wanted = dict(zip(neurons, values, strict=True))
    columns = {block: [i for _, i in group] for block, group in groups}
    rows = {block: [wanted[block, i] for i in group] for block, group in columns.items()}
    changes = {block: lambda x, row=row: torch.as_tensor(row, dtype=x.dtype).to(x.device).expand_as(x)
               for block, row in rows.items()}  # fmt: skip
    return _changed(lm, columns, changes, position, site)


@dataclass(frozen=True)
class Delta:
    """A change of low rank to the value vectors of one block: value vector i grows by Σ_r neurons[r, i] · hidden[r].

    Raises ValueError for a block that is no whole number, and for anything but two matrices of one rank of finite
    numbers.
    """

    block: int
    neurons: Float[Tensor, "rank neuron"]
    hidden: Float[Tensor, "rank hidden"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", checks.whole(self.block, "the block of a delta"))
        for name in ("neurons", "hidden"):
            what = f"{name} of a delta for block {self.block}"
            object.__setattr__(self, name, checks.tensor(getattr(self, name), f"rank {name}", what))
        if len(self.neurons) != len(self.hidden):
            raise ValueError(
                f"delta for block {self.block} has ranks {len(self.neurons)} and {len(self.hidden)}; expected one rank"
            )


@contextlib.contextmanager
def edited(lm: LM, *deltas: Delta) -> Iterator[None]:
    """Context in which the value vectors are changed by all of `deltas`.

    Raises ValueError, before anything changes, for no delta, a block that does not exist, another shape than the
    model's, and numbers that are not finite.
    """
    with lm.session.intervention() as undo:
        for block, vectors in _rewritten(lm, deltas).items():
            module, vectors = arch.projection(lm.model, lm.spec, block), vectors.to(lm.dtype)
            weight = vectors.T.contiguous() if isinstance(module, nn.Linear) else vectors
            undo.callback(setattr, module, "weight", module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
        yield


def _rewritten(lm: LM, deltas: Sequence[Delta]) -> dict[int, Float[Tensor, "neuron hidden"]]:
    """The value vectors of the blocks that deltas change, as they are after it, after all checks."""
    if not deltas:
        raise ValueError("no delta to apply; give at least one")
    wide = torch.promote_types(lm.dtype, torch.float32)
    new: dict[int, Tensor] = {}
    for delta in deltas:
        if not 0 <= delta.block < len(lm.blocks):
            raise ValueError(f"block {delta.block} does not exist; {lm.name} has blocks 0 to {len(lm.blocks) - 1}")
        old = arch.value_vectors(lm.model, lm.spec, delta.block)
        shapes = tuple(delta.neurons.shape), tuple(delta.hidden.shape)
        rank = len(delta.neurons)
        if old.is_meta:
            raise ValueError(f"the weights of block {delta.block} are on disk; load {lm.name} without a device map")
        if shapes != ((rank, old.shape[0]), (rank, old.shape[1])):
            raise ValueError(
                f"delta for block {delta.block} has shapes {shapes}; expected (rank, {old.shape[0]}) and "
                f"(rank, {old.shape[1]})"
            )
        change = delta.neurons.to(lm.device, wide).T @ delta.hidden.to(lm.device, wide)
        new[delta.block] = new.get(delta.block, old.to(wide)) + change
        if not bool(torch.isfinite(new[delta.block].to(lm.dtype)).all()):
            raise ValueError(f"delta for block {delta.block} makes value vectors that are not finite in {lm.dtype}")
    return new


@contextlib.contextmanager
def edited_rows(lm: LM, deltas: Sequence[Sequence[Delta]]) -> Iterator[None]:
    """Context in which row r of every batch is run as by a model with the value vectors changed by `deltas[r]`.

    So one batch asks many edited models; no weight is touched. A batch of another number of rows raises ValueError, as
    do no rows at all, blocks and shapes that are not the model's, and deltas too large for its dtype.
    """
    deltas = [checks.items(some, Delta, "the deltas of a row") for some in deltas]
    if not deltas:
        raise ValueError("no rows of deltas; give one list for each row of the batch")
    blocks = sorted({delta.block for some in deltas for delta in some})
    with lm.session.intervention() as undo:
        for block in blocks:
            if not 0 <= block < len(lm.blocks):
                raise ValueError(f"block {block} does not exist; {lm.name} has blocks 0 to {len(lm.blocks) - 1}")
            here = [[delta for delta in some if delta.block == block] for some in deltas]
            rank = max(sum(len(delta.neurons) for delta in some) for some in here)
            shape = arch.value_vectors(lm.model, lm.spec, block).shape
            reads, writes = (torch.zeros(len(deltas), rank, width, device=lm.device, dtype=lm.dtype) for width in shape)
            for row, some in enumerate(here):
                if some:
                    neurons, hidden = torch.cat([d.neurons for d in some]), torch.cat([d.hidden for d in some])
                    if neurons.shape[1:] != shape[:1] or hidden.shape[1:] != shape[1:]:
                        raise ValueError(
                            f"delta for block {block} has widths {(neurons.shape[1], hidden.shape[1])}; expected "
                            f"{tuple(shape)}"
                        )
                    reads[row, : len(neurons)], writes[row, : len(hidden)] = neurons, hidden
            if not bool(torch.isfinite(reads).all() & torch.isfinite(writes).all()):
                raise ValueError(f"a delta for block {block} is not finite in {lm.dtype}; make it smaller")

            def add(module, args, out, reads=reads, writes=writes):
                if len(out) != len(reads):
                    raise ValueError(f"a batch of {len(out)} rows, but deltas for {len(reads)}; give one list a row")
                return out + (args[0] @ reads.transpose(1, 2)) @ writes

            undo.callback(arch.projection(lm.model, lm.spec, block).register_forward_hook(add).remove)
        yield


def value_update(
    lm: LM, query: Query, new: str, neurons: Sequence[tuple[int, int]], scale: tuple[float, float] = (1.0, 8.0)
) -> list[Delta]:
    """The knowledge-neuron edit of Dai et al. 2022 (section 5.1), as deltas for `edited`.

    From the value vector of each neuron it takes `scale[0]` times the output embedding of the query's target and adds
    `scale[1]` times that of `new` (of their first tokens). This supposes that the neurons are positive where it
    matters, as in BERT; those of gated MLPs (LLaMA) are often negative, and then the update works the other way round.
    Raises ValueError as `suppress` does, and for a scale that is not two finite numbers.
    """
    scale = checks.finites(scale, "scale")
    if len(scale) != 2:
        raise ValueError(f"scale is two numbers, for the old target and for the new one; got {len(scale)}")
    old, wanted = (tokens.encode(lm, query, word).target[0] for word in (query.target, new))
    table = lm.model.get_output_embeddings().weight.detach().float()
    vector = scale[1] * table[wanted] - scale[0] * table[old]
    deltas = []
    for block, group in _blocks(lm, neurons, "all", "neuron"):
        row = torch.zeros(1, lm.n_neurons, device=lm.device)
        row[0, [i for _, i in group]] = 1
        deltas.append(Delta(block, row, vector[None]))
    return deltas


def _blocks(lm: LM, neurons, position: str, site: str) -> list[tuple[int, list[Neuron]]]:
    """The neurons by block, after all checks."""
    if position not in ("target", "all"):
        raise ValueError(f"unknown position {position!r}; choose 'target' or 'all'")
    if site not in SITES or site not in lm.spec.sites:
        known = ", ".join(name for name in SITES if name in lm.spec.sites)
        raise ValueError(f"neurons cannot be changed at site {site!r}; {lm.spec.family} has {known}")
    neurons = listed(neurons, len(lm.blocks), lm.n_neurons, lm.name)
    return [(block, list(group)) for block, group in groupby(sorted(neurons), key=lambda neuron: neuron.block)]


@contextlib.contextmanager
def _changed(
    lm: LM, columns: dict[int, list[int]], changes: dict[int, Callable[[Tensor], Tensor]], position: str, site: str
) -> Iterator[None]:
    """Hooks that pass `columns` of the site's state through `changes`, block by block, out of place."""
    where: list[Int[Tensor, " query"]] = []  # the target positions, while the model runs

    def change(x: Tensor, block: int) -> Tensor:
        columns_here = torch.tensor(columns[block], device=x.device)
        if position == "all":
            return x.index_copy(-1, columns_here, changes[block](x[..., columns_here]))
        if not where:
            raise RuntimeError(
                "an intervention at the target position knows that position only while the whole model runs; "
                "use position='all' around attribution and replay"
            )
        at = torch.arange(len(x), device=x.device)[:, None], where[-1].to(x.device)[:, None], columns_here
        return x.index_put(at, changes[block](x[at]))

    with lm.session.intervention() as undo:
        if position == "target":
            undo.enter_context(_located(lm, where))
        for block in columns:
            undo.enter_context(arch.at_site(lm.blocks[block], lm.spec.sites[site], lambda x, b=block: change(x, b)))
        yield


@contextlib.contextmanager
def _located(lm: LM, where: list[Int[Tensor, " query"]]) -> Iterator[None]:
    """Context in which `where` ends with the target positions while the whole model runs, and only then.

    Hooks would not do: PyTorch calls none after a KeyboardInterrupt.
    """
    base = lm.model.base_model
    inner, own = base.forward, "forward" in vars(base)

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        where.append(target_position(lm, *args, **kwargs))
        try:
            return inner(*args, **kwargs)
        finally:
            where.pop()

    base.forward = forward
    try:
        yield
    finally:
        if own:
            base.forward = inner
        else:
            del base.forward


def target_position(lm: LM, input_ids=None, attention_mask=None, **_) -> Int[Tensor, " query"]:
    """Where a batch predicts its targets: the last token that is attended to, or the first mask of a masked model."""
    if input_ids is None:
        raise ValueError("the target position is found in input_ids; call the model with them, or use position='all'")
    if lm.spec.masked:
        masks = input_ids == lm.tokenizer.mask_token_id
        if not bool(masks.any(1).all()):
            raise ValueError("a prompt has no mask token, so no target position; use position='all'")
        return masks.int().argmax(1)
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
    here = attention_mask[:, -input_ids.shape[1] :]
    return (here * torch.arange(here.shape[1], device=here.device)).argmax(1)
