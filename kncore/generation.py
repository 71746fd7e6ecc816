"""Text that a model writes: prompts with the tokens that it puts after them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kncore import tokens
from kncore.models import LM
from kncore.store import state


@state.computes(grad=False)
def generate(
    lm: LM,
    prompts: Int[Tensor, "prompt token"],
    length: int,
    seed: int | None = 0,
    real: Bool[Tensor, "prompt token"] | None = None,
) -> Int[Tensor, "prompt token"]:
    """Return each prompt with tokens sampled after it, up to `length` tokens in all.

    They are sampled at temperature 1 from the whole distribution; with seed None it is the most probable token each
    time. `real` is False for what fills up shorter prompts on the left.

    Sampled on the CPU from a generator of its own: the global state of random numbers stays as it is. Raises ValueError
    for more tokens than the model can read, and where its probabilities are not numbers.
    """
    from transformers import DynamicCache

    filler = 0 if real is None else int((~real).sum(1).min())
    tokens.check_length(lm, length - filler, "a prompt with what is to follow it")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    past, ids = DynamicCache(), prompts
    unread, mask = ids, torch.ones_like(ids) if real is None else real.long()
    while ids.shape[1] < length:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -unread.shape[1] :]
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": past, "use_cache": True}
        hidden = lm.model.base_model(input_ids=unread, **options).last_hidden_state
        logits = lm.readout(hidden[:, -1], normed=True).float().cpu()
        probabilities = logits.softmax(-1)
        if bool(probabilities.isnan().any()):
            raise ValueError(f"the probabilities of {lm.name} are not numbers; use a wider dtype or check the weights")
        if generator is None:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(probabilities, 1, generator=generator)
        unread = chosen.to(lm.device)
        ids, mask = torch.cat([ids, unread], 1), torch.cat([mask, torch.ones_like(unread)], 1)
    return ids
