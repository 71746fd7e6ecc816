"""The engine: capture a model's states once, then replay only what a change can reach.

Every method here asks what comes out if a few states change at block l. Nothing below block l changes, so it is never
run again. In a causal model nothing before the changed position changes either, so a row is the part of the sequence
from `start` on, attending to the captured keys and values of what comes before. Rows that entered at different blocks
travel up together as one batch, through the model's own blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kncore import arch, checks, state
from kncore.models import LM
from kncore.tokens import Encoded, pad


@dataclass(frozen=True)
class Capture:
    """States of one forward pass over a padded batch of prompts.

    `start` is the first position that rows carry, per prompt. `inputs[l]` is what enters block l at the positions that
    rows carry; `sites[name][l]` the state of a site at the target position, or where `at` said; `target` the target
    position, counted from `start`; `keys`, `values` those of the tokens before `start`; `mask` the additive attention
    mask of a row over (prefix, row), one per sliding window; `rotary` the rotary embeddings at the row's positions.
    """

    lm: LM
    inputs: list[Float[Tensor, "query row hidden"]]
    sites: dict[str, list[Float[Tensor, "query width"]]]
    logits: Float[Tensor, "query vocab"]
    start: Int[Tensor, " query"]
    target: Int[Tensor, " query"]
    keys: list[Float[Tensor, "query head prefix width"]]
    values: list[Float[Tensor, "query head prefix width"]]
    mask: dict[int | None, Float[Tensor, "query 1 row key"] | None]
    rotary: tuple[Float[Tensor, "query row width"], Float[Tensor, "query row width"]] | None

    @property
    def row_cost(self) -> int:
        """Weight of one row against the row budget: its positions, and a sixteenth of the prefix it attends to."""
        prefix = self.keys[0].shape[2] if self.keys else 0
        return self.inputs[0].shape[1] + prefix // 16


@dataclass(frozen=True)
class Change:
    """Rows that leave the captured run at one site of one block.

    Row r continues prompt `prompts[r]`; at token `position[r]` of it (by default where it predicts its target) the
    site's state becomes `values[r]`.
    """

    block: int
    prompts: Int[Tensor, " row"]
    values: Float[Tensor, "row width"]
    site: str = "neuron"
    position: Int[Tensor, " row"] | None = None


@state.computes()
def capture(
    lm: LM,
    batch: Sequence[Encoded],
    sites: Iterable[str] = ("neuron",),
    start: Sequence[int] | None = None,
    at: Sequence[int] | None = None,
) -> Capture:
    """Run the model once over a batch of encoded prompts and keep what replay needs.

    `start` is the first position that a row carries, per prompt (default: the target position for causal models; a
    masked model attends both ways, so its rows always carry the whole sequence). `at` is the position whose states are
    kept, per prompt (default: the target position).

    Raises ValueError for no prompts, a position that a prompt does not have, an unknown site, and where the model's
    predictions are not numbers.
    """
    from transformers import DynamicCache

    batch = list(batch)
    if not batch:
        raise ValueError("no prompts to capture; give at least one")
    for e in batch:
        checks.whole(e.position, "the position that predicts the target", 0, len(e.ids) - 1)
    sites = {name: _site(lm, name) for name in sites}
    ids, lengths = pad(lm, batch)
    target = torch.tensor([e.position for e in batch], device=lm.device)
    if lm.spec.masked:
        first = torch.zeros_like(target)
    else:
        first = target if start is None else _positions(lm, batch, start, "start")
        if bool((first > target).any()):
            raise ValueError("a row must start at or before the position that predicts the target")
    seen = target if at is None else _positions(lm, batch, at, "at")
    if bool((seen >= lengths).any()):
        raise ValueError(f"at is a position of each prompt, below {lengths.tolist()}; got {seen.tolist()}")
    width = int((lengths - first).max())
    here = (first[:, None] + torch.arange(width, device=lm.device)).clamp_max(ids.shape[1] - 1)
    rows = torch.arange(len(batch), device=lm.device)

    inputs: list[Tensor] = []
    rotary: list = []
    kept: dict[str, list[Tensor]] = {name: [] for name in sites}

    def keep_input(block, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        inputs.append(x.to(lm.device)[rows[:, None], here])
        rotary.append(kwargs.get("position_embeddings"))

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for block in lm.blocks:
            hooks.callback(block.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            for name, site in sites.items():
                hooks.enter_context(
                    arch.at_site(block, site, lambda x, n=name: kept[n].append(x.to(lm.device)[rows, seen]))
                )
        past = None if lm.spec.masked else DynamicCache()
        real = (torch.arange(ids.shape[1], device=lm.device) < lengths[:, None]).long()
        options = {} if past is None else {"past_key_values": past, "use_cache": True}
        states = lm.model.base_model(input_ids=ids, attention_mask=real, **options).last_hidden_state.to(lm.device)
        logits = lm.readout(states[rows, target], normed=True).float()
    expect_numbers(lm, logits, [e.ids for e in batch], "predictions")

    prefix = 0 if lm.spec.masked else int(first.max())
    layers = [] if past is None else past.layers
    windows = {_window(block) for block in lm.blocks}
    return Capture(
        lm,
        inputs,
        kept,
        logits,
        first,
        target - first,
        [layer.keys[:, :, :prefix] for layer in layers],
        [layer.values[:, :, :prefix] for layer in layers],
        {w: _mask(lm, first, lengths, prefix, width, w) for w in windows},
        None if rotary[0] is None else tuple(_at(r.to(lm.device), here) for r in rotary[0]),
    )


def expect_numbers(lm: LM, found: Tensor, ids: Sequence[Sequence[int]], what: str) -> None:
    """Raises ValueError unless what was computed for prompts, a row for each, is finite."""
    bad = (~torch.isfinite(found).flatten(1).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"the {what} of {lm.name} for {lm.tokenizer.decode(ids[bad[0]])[:40]!r} are not numbers; check its weights "
            f"and what was changed in it, or load it in a wider dtype than {lm.dtype}"
        )


def _positions(lm: LM, batch: Sequence[Encoded], given: Iterable[int], what: str) -> Int[Tensor, " query"]:
    found = [checks.whole(x, what, 0) for x in given]
    if len(found) != len(batch):
        raise ValueError(f"{what} is one position for each of {len(batch)} prompts, got {len(found)}")
    return torch.tensor(found, device=lm.device)


@state.computes()
def replay(captured: Capture, changes: Sequence[Change]) -> Float[Tensor, "row vocab"]:
    """Logits at the target position after each change; rows in the order of `changes`, which must rise in block.

    Differentiable with respect to the changes' values. Equal to a full forward pass with a hook that makes the same
    change, to the precision of the dtype. Raises ValueError for changes out of order, of the wrong width or not finite,
    of a prompt that was not captured, or at a position that rows do not carry.
    """
    changes = _checked(captured, changes)
    rows = _states(captured, changes)
    target = captured.target[torch.cat([change.prompts for change in changes])]
    return captured.lm.readout(rows[torch.arange(len(rows), device=rows.device), target]).float()


@state.computes()
def states(captured: Capture, changes: Sequence[Change]) -> Float[Tensor, "row token hidden"]:
    """As `replay`, but what leaves the last block at every position that rows carry, from `captured.start` on."""
    return _states(captured, _checked(captured, changes))


def _states(captured: Capture, changes: list[Change]) -> Float[Tensor, "row token hidden"]:
    lm, todo = captured.lm, list(changes)
    rows, prompts = None, None
    for depth in range(todo[0].block, len(lm.blocks)):
        block = lm.blocks[depth]
        with contextlib.ExitStack() as hooks:
            while todo and todo[0].block == depth:
                change = todo.pop(0)
                new = captured.inputs[depth][change.prompts]
                offset = 0 if rows is None else len(rows)
                rows = new if rows is None else torch.cat([rows, new])
                prompts = change.prompts if prompts is None else torch.cat([prompts, change.prompts])
                position = _place(captured, change)
                write = partial(_write, offset=offset, position=position, values=change.values)
                hooks.enter_context(arch.at_site(block, _site(lm, change.site), write))
            rows = _run(captured, block, rows, prompts)
    return rows


def passes(captured: Capture, changes: Sequence[Change], budget: int) -> Iterator[list[Change]]:
    """Split changes into lists whose rows fit a budget (in positions held at once), keeping the order by block."""
    budget = checks.whole(budget, "budget", 1)
    room = max(1, budget // captured.row_cost)
    batch, free = [], room
    for change in changes:
        done = 0
        while done < len(change.prompts):
            take = min(free, len(change.prompts) - done)
            part = slice(done, done + take)
            at = None if change.position is None else change.position[part]
            batch.append(Change(change.block, change.prompts[part], change.values[part], change.site, at))
            done, free = done + take, free - take
            if free == 0:
                yield batch
                batch, free = [], room
    if batch:
        yield batch


class _Prefix:
    """Read-only cache with the interface that Hugging Face attention calls: captured keys and values, row by row."""

    def __init__(self, captured: Capture, prompts: Tensor):
        self.captured, self.prompts = captured, prompts

    def update(self, key, value, layer_idx, *args, **kwargs):
        before = (x[layer_idx][self.prompts.to(key.device)] for x in (self.captured.keys, self.captured.values))
        return tuple(torch.cat([old, new], 2) for old, new in zip(before, (key, value), strict=True))

    def get_seq_length(self, *args):
        return self.captured.keys[0].shape[2]


def _run(captured: Capture, block: nn.Module, rows: Tensor, prompts: Tensor) -> Tensor:
    mask = captured.mask[_window(block)]
    kwargs = {"attention_mask": None if mask is None else mask[prompts]}
    if captured.keys:
        kwargs[captured.lm.spec.cache] = _Prefix(captured, prompts)
    if captured.rotary is not None:
        kwargs["position_embeddings"] = tuple(r[prompts] for r in captured.rotary)
    out = block(rows, **kwargs)
    return (out[0] if isinstance(out, tuple) else out).to(rows.device)


def _mask(lm: LM, first, lengths, prefix: int, width: int, window: int | None) -> Tensor | None:
    """Additive mask `[query, 1, row, prefix + row]`; None where every key is visible to every row."""
    key = torch.cat([torch.arange(prefix, device=lm.device).expand(len(first), -1),
                     first[:, None] + torch.arange(width, device=lm.device)], 1)  # fmt: skip
    own = torch.arange(prefix + width, device=lm.device) >= prefix
    visible = torch.where(own, key < lengths[:, None], key < first[:, None])[:, None]
    if not lm.spec.masked:
        query = (first[:, None] + torch.arange(width, device=lm.device))[:, :, None]
        visible = visible & (key[:, None] <= query)
        if window is not None:
            visible = visible & (key[:, None] > query - window)
        # A row padded on the right must see something, or its softmax is not a number and spoils the gradients.
        visible = visible | (key[:, None] == query) & own
    else:
        visible = visible.expand(-1, width, -1)
    if bool(visible.all()):
        return None
    return torch.zeros(visible.shape, dtype=lm.dtype, device=lm.device).masked_fill_(
        ~visible, torch.finfo(lm.dtype).min
    )[:, None]


def _window(block: nn.Module) -> int | None:
    attention = getattr(block, "self_attn", None)
    layer = getattr(attention, "sliding_window", None)
    if layer is None and attention is not None and getattr(attention.config, "model_type", "") == "mistral":
        layer = attention.config.sliding_window
    return layer


def _at(x: Tensor, here: Tensor) -> Tensor:
    """Rotary embeddings `[1 or query, token, width]` at the positions `here` `[query, row]`."""
    x = x.expand(len(here), -1, -1)
    return x[torch.arange(len(here), device=x.device)[:, None], here]


def _site(lm: LM, name: str) -> arch.Site:
    if name not in lm.spec.sites:
        raise ValueError(f"unknown site {name!r}; {lm.spec.family} has {', '.join(lm.spec.sites)}")
    return lm.spec.sites[name]


def _checked(captured: Capture, changes: Iterable[Change]) -> list[Change]:
    """The changes with tensors on the model's device, after all checks."""
    lm, n_prompts = captured.lm, len(captured.start)
    found = []
    for change in checks.items(changes, Change, "changes"):
        block = checks.whole(change.block, "the block of a change")
        prompts = _whole_numbers(lm, change.prompts, f"block {block}: prompts")
        if bool(((prompts < 0) | (prompts >= n_prompts)).any()):
            raise ValueError(f"block {block}: prompts that are not captured; those are 0 to {n_prompts - 1}")
        values = checks.tensor(change.values, "row width", f"block {block}: values").to(lm.device)
        if values.dtype != lm.dtype and not bool(torch.isfinite(values.to(lm.dtype)).all()):
            raise ValueError(f"block {block}: values are not finite in {lm.dtype}; load {lm.name} in a wider one")
        if len(prompts) != len(values):
            raise ValueError(f"block {block}: {len(prompts)} rows but {len(values)} values")
        _site(lm, change.site)
        width = lm.n_neurons if change.site in ("neuron", "authors") else captured.inputs[0].shape[-1]
        if values.shape[1] != width:
            raise ValueError(f"site {change.site!r} has width {width}, got {values.shape[1]}")
        position = change.position
        if position is not None:
            position = _whole_numbers(lm, position, f"block {block}: positions")
            if len(position) != len(prompts):
                raise ValueError(f"block {block}: {len(prompts)} rows but {len(position)} positions")
        found.append(Change(block, prompts, values, change.site, position))
    if not found:
        raise ValueError("nothing to replay: no changes given")
    blocks = [change.block for change in found]
    if blocks != sorted(blocks) or blocks[0] < 0 or blocks[-1] >= len(captured.inputs):
        raise ValueError(f"changes must rise in block within 0..{len(captured.inputs) - 1}, got {blocks}")
    for change in found:
        place, width = _place(captured, change), captured.inputs[0].shape[1]
        if bool(((place < 0) | (place >= width)).any()):
            raise ValueError(f"block {change.block}: a change at a position that rows do not carry; capture from there")
    return found


def _whole_numbers(lm: LM, given, what: str) -> Int[Tensor, " row"]:
    """Whole numbers, as a tensor on the model's device."""
    found = given if isinstance(given, Tensor) else torch.as_tensor(given)
    if found.dim() != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{what} are whole numbers, one a row; got {found.dtype} of shape {tuple(found.shape)}")
    return found.to(lm.device, torch.long)


def _place(captured: Capture, change: Change) -> Int[Tensor, " row"]:
    """Where a change lies within its rows."""
    if change.position is None:
        return captured.target[change.prompts]
    return change.position - captured.start[change.prompts]


def _write(x: Tensor, offset: int, position: Tensor, values: Tensor) -> Tensor:
    """`x` with rows `offset:offset+len(values)` at `position` set to `values`, out of place."""
    changed = x[offset : offset + len(values)]
    at = torch.arange(len(values), device=x.device), position.to(x.device)
    changed = changed.index_put(at, values.to(x.device, x.dtype))
    return torch.cat([x[:offset], changed, x[offset + len(values) :]])
