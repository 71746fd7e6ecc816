"""The engine: capture a model's states once, then replay only what a change can reach.

Nothing below the block of a change is run again and, in a causal model, nothing before its position: a row is the part
of the sequence from `start` on, attending to the captured keys and values of what comes before. Rows that enter at
different blocks travel up together as one batch, through the model's own blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kncore import arch, checks
from kncore.models import LM
from kncore.store import state
from kncore.tokens import Encoded, pad, real_tokens


@dataclass(frozen=True)
class Capture:
    """States of one forward pass over a padded batch of prompts.

    `inputs[l]` is what enters block l at the positions that rows carry, from `start` on; `sites[name][l]` the state of
    a site at the target position, or where `at` said; `target` the target position, counted from `start`; `keys`,
    `values` those of all tokens, of which rows attend to the first `prefix`, those before `start`; `mask` the additive
    attention mask of a row over (prefix, row), one per sliding window; `rotary` the rotary embeddings at the row's
    positions.
    """

    lm: LM
    inputs: list[Float[Tensor, "query row hidden"]]
    sites: dict[str, list[Float[Tensor, "query width"]]]
    logits: Float[Tensor, "query vocab"]
    start: Int[Tensor, " query"]
    target: Int[Tensor, " query"]
    prefix: int
    keys: list[Float[Tensor, "query head token width"]]
    values: list[Float[Tensor, "query head token width"]]
    mask: dict[int | None, Float[Tensor, "query 1 row key"] | None]
    rotary: tuple[Float[Tensor, "query row width"], Float[Tensor, "query row width"]] | None

    def parts(self, rows: Sequence, budget: int) -> Iterator[Sequence]:
        """Yield rows in parts that fit a budget of positions: each row's own, and a sixteenth of its prefix."""
        room = max(1, budget // (self.inputs[0].shape[1] + self.prefix // 16))
        for i in range(0, len(rows), room):
            yield rows[i : i + room]


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


class _Stop(Exception):
    """All is recorded; nothing above it need run."""


@torch.no_grad()
def record(
    lm: LM,
    ids: Int[Tensor, "query token"],
    lengths: Int[Tensor, " query"],
    places: Iterable[tuple[int, str]],
    *,
    read: Callable[[Tensor], Tensor] = lambda states: states,
    whole: bool = False,
    **options: object,
) -> tuple[dict[tuple[int, str], Tensor], Float[Tensor, "query token hidden"] | None]:
    """Return the states of `places`, pairs (block, site), in one run over padded prompts; each as `read` gives it.

    Without `read` that is `[query, token, width]`. The second value is what leaves the model's last norm if the model
    is run as a `whole`; otherwise nothing above the highest place is run, and it is None.
    """
    places = list(dict.fromkeys(places))
    states: dict[tuple[int, str], Tensor] = {}

    def see(x: Tensor, place: tuple[int, str]) -> None:
        states[place] = read(x)
        if not whole and len(states) == len(places):
            raise _Stop

    with contextlib.ExitStack() as hooks:
        for block, site in places:
            hooks.enter_context(arch.at_site(lm.blocks[block], _site(lm, site), partial(see, place=(block, site))))
        try:
            out = lm.model.base_model(input_ids=ids, attention_mask=real_tokens(ids, lengths).long(), **options)
        except _Stop:
            return states, None
    return states, out.last_hidden_state


@state.computes()
def capture(
    lm: LM,
    batch: Sequence[Encoded],
    sites: Iterable[str] = ("neuron",),
    start: Sequence[int] | None = None,
    at: Sequence[int] | None = None,
) -> Capture:
    """Run the model once over a batch of encoded prompts and return what replay needs.

    `start` is the first position that a row carries, per prompt (default: the target position; a masked model attends
    both ways, so its rows always carry the whole sequence); `at` the one whose states are kept (default: the target
    position). Raises ValueError for no prompts, a position that a prompt does not have, an unknown site, and where the
    model's predictions are not numbers.
    """
    from transformers import DynamicCache

    batch, sites = list(batch), list(sites)
    if not batch:
        raise ValueError("no prompts to capture; give at least one")
    own, last = [e.position for e in batch], [len(e.ids) - 1 for e in batch]
    target = _positions(lm, own, last, "the position that predicts the target")
    first = own if start is None else start
    what = "the start of a row, at or before the position that predicts the target,"
    first = torch.zeros_like(target) if lm.spec.masked else _positions(lm, first, own, what)
    kept = _positions(lm, own if at is None else at, last, "at, a position of its prompt,")
    ids, lengths = pad(lm, batch)
    width, prefix = int((lengths - first).max()), int(first.max())
    rows = torch.arange(len(batch), device=lm.device)
    carried = rows[:, None], (first[:, None] + torch.arange(width, device=lm.device)).clamp_max(ids.shape[1] - 1)
    options = {} if lm.spec.masked else {"past_key_values": DynamicCache(), "use_cache": True}
    places = [(block, site) for block in range(len(lm.blocks)) for site in sites]
    with torch.no_grad(), _entering(lm, carried) as (inputs, rotary):
        states, hidden = record(
            lm, ids, lengths, places, read=lambda x: x.to(lm.device)[rows, kept], whole=True, **options
        )
        logits = lm.readout(hidden.to(lm.device)[rows, target], normed=True).float()
    expect_numbers(lm, logits, [e.ids for e in batch], "predictions")
    layers = options["past_key_values"].layers if options else []
    return Capture(
        lm,
        inputs,
        {site: [states[block, site] for block in range(len(lm.blocks))] for site in sites},
        logits,
        first,
        target - first,
        prefix,
        [layer.keys for layer in layers],
        [layer.values for layer in layers],
        {w: _mask(lm, first, lengths, prefix, width, w) for w in {_window(block) for block in lm.blocks}},
        rotary[0] and tuple(r.to(lm.device).expand(len(batch), -1, -1)[carried] for r in rotary[0]),
    )


@contextlib.contextmanager
def _entering(lm: LM, carried: tuple[Tensor, Tensor]) -> Iterator[tuple[list[Tensor], list]]:
    """Return a context that fills two lists, block by block: what enters where rows carry it, and rotary embeddings."""
    inputs, rotary = [], []

    def keep(block, args, kwargs):
        inputs.append((args[0] if args else kwargs["hidden_states"]).to(lm.device)[carried])
        rotary.append(kwargs.get("position_embeddings"))

    with contextlib.ExitStack() as hooks:
        for block in lm.blocks:
            hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield inputs, rotary


def _positions(lm: LM, given: Iterable[int], most: Sequence[int], what: str) -> Int[Tensor, " query"]:
    given = list(given)
    if len(given) != len(most):
        raise ValueError(f"{what} is one for each of {len(most)} prompts, got {len(given)}")
    return torch.tensor([checks.whole(x, what, 0, end) for x, end in zip(given, most, strict=True)], device=lm.device)


def expect_numbers(lm: LM, results: Tensor, ids: Sequence[Sequence[int]], what: str) -> None:
    """Raise ValueError unless the results for prompts, a row for each, are finite."""
    bad = (~torch.isfinite(results).flatten(1).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"the {what} of {lm.name} for {lm.tokenizer.decode(ids[bad[0]])[:40]!r} are not numbers; check its weights "
            f"and what was changed in it, or load it in a wider dtype than {lm.dtype}"
        )


@state.computes()
def replay(captured: Capture, changes: Sequence[Change]) -> Float[Tensor, "row vocab"]:
    """Return the logits at the target position after each change, in the order of `changes`, which rise in block.

    Differentiable with respect to their values; equal to a full forward pass with a hook that makes the same change, to
    the precision of the dtype. Raises ValueError for changes out of order, of the wrong width or not finite, of a
    prompt that was not captured, or at a position that rows do not carry.
    """
    changes = _checked(captured, changes)
    rows = _states(captured, changes)
    target = captured.target[torch.cat([change.prompts for change in changes])]
    return captured.lm.readout(rows[torch.arange(len(rows), device=rows.device), target]).float()


def later(captured: Capture, start: int) -> Capture:
    """Return a capture whose rows begin at a later token, the same for all prompts; of a masked model, as it is.

    Raises ValueError where the prompts' rows begin at different tokens, or behind `start` or the target.
    """
    if captured.lm.spec.masked:
        return captured
    by = start - captured.start.min().item()
    if not bool((captured.start == captured.start[0]).all()) or not 0 <= by <= int(captured.target.min()):
        raise ValueError(f"rows that begin at {captured.start.tolist()} cannot all begin at {start}")
    return replace(
        captured,
        inputs=[x[:, by:] for x in captured.inputs],
        start=captured.start + by,
        target=captured.target - by,
        prefix=captured.prefix + by,
        mask={window: None if mask is None else mask[:, :, by:] for window, mask in captured.mask.items()},
        rotary=captured.rotary and tuple(x[:, by:] for x in captured.rotary),
    )


@state.computes()
def states(captured: Capture, changes: Sequence[Change]) -> Float[Tensor, "row token hidden"]:
    """Return, as `replay`, what leaves the last block, at every position that rows carry from `captured.start` on."""
    return _states(captured, _checked(captured, changes))


def _states(captured: Capture, changes: list[Change]) -> Float[Tensor, "row token hidden"]:
    lm, rows, prompts = captured.lm, captured.inputs[0][:0], captured.start[:0]
    for depth in range(changes[0].block, len(lm.blocks)):
        block, mask = lm.blocks[depth], captured.mask[_window(lm.blocks[depth])]
        with contextlib.ExitStack() as hooks:
            for change in changes:
                if change.block == depth:
                    write = partial(_write, first=len(rows), position=change.position, values=change.values)
                    hooks.enter_context(arch.at_site(block, _site(lm, change.site), write))
                    rows = torch.cat([rows, captured.inputs[depth][change.prompts]])
                    prompts = torch.cat([prompts, change.prompts])
            kwargs = {"attention_mask": None if mask is None else mask[prompts]}
            if captured.keys:
                kwargs[lm.spec.cache] = _Prefix(captured, prompts)
            if captured.rotary is not None:
                kwargs["position_embeddings"] = tuple(r[prompts] for r in captured.rotary)
            out = block(rows, **kwargs)
        rows = (out[0] if isinstance(out, tuple) else out).to(rows.device)
    return rows


def _write(x: Tensor, first: int, position: Tensor, values: Tensor) -> Tensor:
    """Return `x` with the rows from `first` on set to `values` at their positions, out of place."""
    rows = torch.arange(first, first + len(values), device=x.device)
    return x.index_put((rows, position.to(x.device)), values.to(x.device, x.dtype))


class _Prefix:
    """Read-only cache with the interface that Hugging Face attention calls: captured keys and values, row by row."""

    def __init__(self, captured: Capture, prompts: Tensor):
        self.captured, self.prompts = captured, prompts

    def update(self, key, value, layer_idx, *args, **kwargs):
        known = (x[layer_idx][:, :, : self.captured.prefix] for x in (self.captured.keys, self.captured.values))
        rows = self.prompts.to(key.device)
        return tuple(torch.cat([old[rows], new], 2) for old, new in zip(known, (key, value), strict=True))

    def get_seq_length(self, *args):
        return self.captured.prefix


def _mask(lm: LM, first, lengths, prefix: int, width: int, window: int | None) -> Tensor | None:
    """Return an additive mask `[query, 1, row, prefix + row]`; None where every key is visible to every row."""
    rows = first[:, None] + torch.arange(width, device=lm.device)
    key = torch.cat([torch.arange(prefix, device=lm.device).expand(len(first), -1), rows], 1)
    own = torch.arange(prefix + width, device=lm.device) >= prefix
    visible = torch.where(own, key < lengths[:, None], key < first[:, None])[:, None]
    if lm.spec.masked:
        visible = visible.expand(-1, width, -1)
    else:
        query = rows[:, :, None]
        visible = visible & (key[:, None] <= query)
        if window is not None:
            visible = visible & (key[:, None] > query - window)
        # A row padded on the right must see something, or its softmax is not a number and spoils the gradients.
        visible = visible | (key[:, None] == query) & own
    if bool(visible.all()):
        return None
    hidden = torch.zeros(visible.shape, dtype=lm.dtype, device=lm.device)
    return hidden.masked_fill_(~visible, torch.finfo(lm.dtype).min)[:, None]


def _window(block: nn.Module) -> int | None:
    attention = getattr(block, "self_attn", None)
    layer = getattr(attention, "sliding_window", None)
    if layer is None and attention is not None and getattr(attention.config, "model_type", "") == "mistral":
        layer = attention.config.sliding_window
    return layer


def _site(lm: LM, name: str) -> arch.Site:
    if name not in lm.spec.sites:
        raise ValueError(f"unknown site {name!r}; {lm.spec.family} has {', '.join(lm.spec.sites)}")
    return lm.spec.sites[name]


def _checked(captured: Capture, changes: Iterable[Change]) -> list[Change]:
    """Return changes with tensors on the model's device, and with positions within their rows."""
    changes = [_checked_change(captured, change) for change in checks.items(changes, Change, "changes", 1)]
    blocks = [change.block for change in changes]
    if blocks != sorted(blocks) or blocks[0] < 0 or blocks[-1] >= len(captured.inputs):
        raise ValueError(f"changes must rise in block within 0..{len(captured.inputs) - 1}, got {blocks}")
    return changes


def _checked_change(captured: Capture, change: Change) -> Change:
    lm, n_prompts, (_, n_positions, hidden) = captured.lm, len(captured.start), captured.inputs[0].shape
    block = checks.whole(change.block, "the block of a change")
    prompts = _whole_numbers(lm, change.prompts, "prompts")
    if bool(((prompts < 0) | (prompts >= n_prompts)).any()):
        raise ValueError(f"block {block}: prompts that are not captured; those are 0 to {n_prompts - 1}")
    values = checks.tensor(change.values, "row width", f"block {block}: values").to(lm.device)
    if values.dtype != lm.dtype and not bool(torch.isfinite(values.to(lm.dtype)).all()):
        raise ValueError(f"block {block}: values are not finite in {lm.dtype}; load {lm.name} in a wider one")
    _site(lm, change.site)
    width = lm.n_neurons if change.site in arch.NEURON_SITES else hidden
    if values.shape[1] != width:
        raise ValueError(f"site {change.site!r} has width {width}, got {values.shape[1]}")
    at = change.position
    at = captured.start[prompts] + captured.target[prompts] if at is None else _whole_numbers(lm, at, "positions")
    for what, rows in (("values", values), ("positions", at)):
        if len(rows) != len(prompts):
            raise ValueError(f"block {block}: {len(prompts)} rows but {len(rows)} {what}")
    position = at - captured.start[prompts]
    if bool(((position < 0) | (position >= n_positions)).any()):
        raise ValueError(f"block {block}: a change at a position that rows do not carry; capture from there")
    return Change(block, prompts, values, change.site, position)


def _whole_numbers(lm: LM, given, what: str) -> Int[Tensor, " row"]:
    rows = given if isinstance(given, Tensor) else torch.as_tensor(given)
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(
            f"{what} of a change are whole numbers, one a row; got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    return rows.to(lm.device, torch.long)
