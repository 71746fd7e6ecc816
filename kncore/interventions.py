"""Interventions: context managers that change neurons or value vectors and leave the model as it was, bit for bit.

Nothing is written in place: hooks change a copy of the neurons' state as it passes, and weights are exchanged for new
ones and put back, also after an exception or an interrupt. Interventions nest: an inner one acts on what the outer ones
left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial, wraps

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kncore import arch, checks, tokens
from kncore.models import LM
from kncore.neurons import listed
from kncore.query import Query


def suppress(lm: LM, neurons: Sequence[tuple[int, int]], *, position: str = "target", site: str = "neuron"):
    """Return a context in which `neurons`, pairs (block, index), are zero.

    `position` is "target", where the target is predicted (the last token that is not padding of causal models, the
    first mask of masked ones), or "all"; `site` is "neuron", or "published" for where the published code of Niu et al.
    reads and scales them.

    Raises ValueError, before anything changes, for an empty list, a neuron that does not exist or comes twice, and an
    unknown position or site. At the target position the model must be run as a whole: RuntimeError inside `replay`.
    """
    return set_neurons(lm, neurons, 0.0, position=position, site=site)


def enhance(
    lm: LM, neurons: Sequence[tuple[int, int]], factor: float = 2.0, *, position: str = "target", site: str = "neuron"
):
    """Return a context in which `neurons` are multiplied by `factor`; other arguments and errors as in `suppress`."""
    factor = checks.finite(factor, "factor", lm.dtype)
    return _changed(lm, _columns(lm, neurons, position, site), lambda x, _: x * factor, position, site)


def set_neurons(
    lm: LM,
    neurons: Sequence[tuple[int, int]],
    values: float | Sequence[float],
    *,
    position: str = "target",
    site: str = "neuron",
):
    """Return a context in which `neurons` have `values`, one for all or one for each; otherwise as `suppress`.

    Raises ValueError for values that are no finite numbers of the model's dtype, and for one each of a set, which has
    no order.
    """
    order = listed(neurons, len(lm.blocks), lm.n_neurons, lm.name)
    columns = _columns(lm, order, position, site)
    if isinstance(values, Iterable) and getattr(values, "ndim", 1):
        if isinstance(neurons, Set):
            raise ValueError("neurons in a set have no order that values could follow; give both as lists")
        values = checks.finites(values, "values", lm.dtype)
        if len(values) != len(order):
            raise ValueError(f"{len(order)} neurons but {len(values)} values; give one for all or one for each")
    else:
        values = [checks.finite(values, "values", lm.dtype)] * len(order)
    wanted = dict(zip(order, values, strict=True))
    rows = {block: [wanted[block, index] for index in indices] for block, indices in columns.items()}

    def change(x: Tensor, block: int) -> Tensor:
        return torch.as_tensor(rows[block], dtype=x.dtype).to(x.device).expand_as(x)

    return _changed(lm, columns, change, position, site)


@dataclass(frozen=True)
class Delta:
    """A change of low rank to the value vectors of one block: value vector i grows by Σ_r neurons[r, i] · hidden[r].

    Raises ValueError for a block that is no whole number, and for anything but two finite matrices of one rank.
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
    """Return a context in which the value vectors are changed by all of `deltas`.

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
    """Return the value vectors of the blocks that deltas change, as they are then, after all checks."""
    if not deltas:
        raise ValueError("no delta to apply; give at least one")
    wide = torch.promote_types(lm.dtype, torch.float32)
    new: dict[int, Tensor] = {}
    for delta in deltas:
        block, old = delta.block, _vectors(lm, delta)
        if old.is_meta:
            raise ValueError(f"the weights of block {block} are on disk; load {lm.name} without a device map")
        change = delta.neurons.to(lm.device, wide).T @ delta.hidden.to(lm.device, wide)
        new[block] = new.get(block, old.to(wide)) + change
        if not bool(torch.isfinite(new[block].to(lm.dtype)).all()):
            raise ValueError(f"delta for block {block} makes value vectors that are not finite in {lm.dtype}")
    return new


def _vectors(lm: LM, delta: Delta) -> Float[Tensor, "neuron hidden"]:
    """Return the value vectors that a delta changes; raise ValueError unless it has their block and their widths."""
    vectors = arch.value_vectors(lm.model, lm.spec, checks.block(lm, delta.block))
    widths = delta.neurons.shape[1], delta.hidden.shape[1]
    if widths != tuple(vectors.shape):
        raise ValueError(f"delta for block {delta.block} has widths {widths}; expected {tuple(vectors.shape)}")
    return vectors


@contextlib.contextmanager
def edited_rows(lm: LM, deltas: Sequence[Sequence[Delta]]) -> Iterator[None]:
    """Return a context in which row r of every batch runs as in a model with the value vectors changed by `deltas[r]`.

    So one batch asks many edited models; no weight is touched. Raises ValueError for no rows, blocks and widths that
    are not the model's, deltas too large for its dtype and, inside, for a batch of another number of rows.
    """
    deltas = [checks.items(of_row, Delta, "the deltas of a row") for of_row in deltas]
    if not deltas:
        raise ValueError("no rows of deltas; give one list for each row of the batch")
    with lm.session.intervention() as undo:
        shapes = {delta.block: _vectors(lm, delta).shape for of_row in deltas for delta in of_row}
        for block, shape in sorted(shapes.items()):
            reads, writes = _factors(lm, shape, [[d for d in of_row if d.block == block] for of_row in deltas])
            if not bool(torch.isfinite(reads).all() & torch.isfinite(writes).all()):
                raise ValueError(f"a delta for block {block} is not finite in {lm.dtype}; make it smaller")

            def add(module, args, out, reads=reads, writes=writes):
                if len(out) != len(reads):
                    raise ValueError(f"a batch of {len(out)} rows, but deltas for {len(reads)}; give one list a row")
                return out + (args[0] @ reads.transpose(1, 2)) @ writes

            undo.callback(arch.projection(lm.model, lm.spec, block).register_forward_hook(add).remove)
        yield


def _factors(lm: LM, shape: torch.Size, deltas: Sequence[Sequence[Delta]]) -> list[Float[Tensor, "row rank width"]]:
    """Return the two factors of the changes of one block, a row for each list of deltas, filled up with zeros."""
    factors = []
    for name, width in zip(("neurons", "hidden"), shape, strict=True):
        none = torch.zeros(0, width, device=lm.device, dtype=lm.dtype)
        rows = [torch.cat([none, *(getattr(delta, name).to(none) for delta in of_row)]) for of_row in deltas]
        factors.append(nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return factors


def value_update(
    lm: LM, query: Query, new: str, neurons: Sequence[tuple[int, int]], scale: tuple[float, float] = (1.0, 8.0)
) -> list[Delta]:
    """Return the knowledge-neuron edit of Dai et al. 2022 (section 5.1), as deltas for `edited`.

    From the value vector of each neuron it takes `scale[0]` times the output embedding of the query's target and adds
    `scale[1]` times that of `new` (of their first tokens). This supposes neurons that are positive where it matters, as
    in BERT; those of gated MLPs (LLaMA) are often negative, and then it works the other way round. Raises ValueError as
    `suppress` does, and for a scale that is not two finite numbers.
    """
    scale = checks.finites(scale, "scale")
    if len(scale) != 2:
        raise ValueError(f"scale is two numbers, for the old target and for the new one; got {len(scale)}")
    old, wanted = (tokens.encode(lm, query, word).target[0] for word in (query.target, new))
    table = lm.model.get_output_embeddings().weight.detach().float()
    vector = scale[1] * table[wanted] - scale[0] * table[old]
    deltas = []
    for block, indices in _columns(lm, neurons, "all", "neuron").items():
        row = torch.zeros(1, lm.n_neurons, device=lm.device)
        row[0, indices] = 1
        deltas.append(Delta(block, row, vector[None]))
    return deltas


def _columns(lm: LM, neurons: Iterable, position: str, site: str) -> dict[int, list[int]]:
    """Return the indices of the neurons by block, in rising order."""
    if position not in ("target", "all"):
        raise ValueError(f"unknown position {position!r}; choose 'target' or 'all'")
    if site not in arch.NEURON_SITES or site not in lm.spec.sites:
        known = ", ".join(name for name in arch.NEURON_SITES if name in lm.spec.sites)
        raise ValueError(f"neurons cannot be changed at site {site!r}; {lm.spec.family} has {known}")
    columns: dict[int, list[int]] = {}
    for block, index in sorted(listed(neurons, len(lm.blocks), lm.n_neurons, lm.name)):
        columns.setdefault(block, []).append(index)
    return columns


@contextlib.contextmanager
def _changed(
    lm: LM, columns: dict[int, list[int]], change: Callable[[Tensor, int], Tensor], position: str, site: str
) -> Iterator[None]:
    """Return a context with hooks that pass `columns` of the site's state through `change`, block by block."""
    where: list[Int[Tensor, " query"]] = []  # the target positions, while the model runs

    def see(x: Tensor, block: int) -> Tensor:
        columns_here = torch.tensor(columns[block], device=x.device)
        if position == "all":
            return x.index_copy(-1, columns_here, change(x[..., columns_here], block))
        if not where:
            raise RuntimeError(
                "an intervention at the target position knows that position only while the whole model runs; "
                "use position='all' around attribution and replay"
            )
        at = torch.arange(len(x), device=x.device)[:, None], where[-1].to(x.device)[:, None], columns_here
        return x.index_put(at, change(x[at], block))

    with lm.session.intervention() as undo:
        if position == "target":
            _locate(lm, where, undo)
        for block in columns:
            undo.enter_context(arch.at_site(lm.blocks[block], lm.spec.sites[site], partial(see, block=block)))
        yield


def _locate(lm: LM, where: list[Int[Tensor, " query"]], undo: contextlib.ExitStack) -> None:
    """Let `where` end with the target positions while the whole model runs, and only then, until `undo` closes.

    Hooks would not do: PyTorch calls none after a KeyboardInterrupt.
    """
    base = lm.model.base_model
    inner = base.forward

    @wraps(inner)
    def forward(*args, **kwargs):
        where.append(target_position(lm, *args, **kwargs))
        try:
            return inner(*args, **kwargs)
        finally:
            where.pop()

    if "forward" in vars(base):
        undo.callback(setattr, base, "forward", inner)
    else:
        undo.callback(delattr, base, "forward")
    base.forward = forward


def target_position(lm: LM, input_ids=None, attention_mask=None, **_) -> Int[Tensor, " query"]:
    """Return where a batch predicts its targets: at the last token attended to, or the first mask of a masked model."""
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
