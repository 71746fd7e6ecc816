"""All tokenisation: from a query to token ids, target ids and the position that predicts each target token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kncore.models import LM
from kncore.tasks import MASK, Query, subject_start


@dataclass(frozen=True)
class Encoded:
    """One query as token ids.

    `ids` are the tokens of the prompt (a masked prompt holds one mask per target token), `position` the index of the
    token whose state predicts the first target token, `target` the ids of the target.
    """

    ids: tuple[int, ...]
    position: int
    target: tuple[int, ...]


def expect(query: Query) -> None:
    """Raises TypeError where something else is given for a query."""
    if not isinstance(query, Query):
        given = f"{type(query).__name__} {str(query)[:40]!r}"
        raise TypeError(f"expected a Query, got {given}; make one of prompt and target")


def encode(lm: LM, query: Query, target: str | None = None) -> Encoded:
    """Token ids of a query, or of the same prompt with another `target` (a foil, a candidate).

    Causal models: the prompt keeps the special tokens that the tokenizer puts before it (BOS) and not those that it
    puts after it (EOS); the target is what the text `prompt + " " + target` adds, so it carries its leading space and
    no BOS. Masked models: `[MASK]` becomes one mask token per target token; a prompt without it gets " [MASK]."
    appended. A `joined` query has no space in these places; where the prompt has [MASK], it is as it stands there.

    Raises ValueError where the prompt has no tokens, begins with the special token that the tokenizer puts there or
    ends with the end of a text, or is longer than the model's context; where the target is empty, has white space
    around it or holds special tokens; where prompt and target share a token; and where a causal model is asked about a
    mask with text after it. A target outside the vocabulary is warned of: it is asked as the unknown token.
    """
    expect(query)
    word = query.target if target is None else target
    if not isinstance(word, str):
        raise TypeError(f"a target must be text, got {type(word).__name__} {word!r:.80}")
    if not word.strip() or word != word.strip():
        raise ValueError(f"the target {word!r} is empty or has white space around it; give a word without")
    ids, position, wanted, *_ = (_masked if lm.spec.masked else _causal)(lm, query, word)
    if not wanted:
        raise ValueError(f"target {word!r} has no tokens for {lm.name}; give a word that it can write")
    unknown = lm.tokenizer.unk_token_id
    if word == lm.tokenizer.unk_token or _special(lm, [token for token in wanted if token != unknown]):
        raise ValueError(f"the target {word!r} holds special tokens of {lm.name}, which are no words; give a word")
    if unknown in wanted:
        warnings.warn(
            f"{word!r} is not in the vocabulary of {lm.name}: asked is {lm.tokenizer.unk_token}, any unknown word",
            stacklevel=2,
        )
    length = len(ids) + (0 if lm.spec.masked else len(wanted) - 1)
    check_length(lm, length, f"prompt {query.prompt[:40]!r}… with its target")
    return Encoded(tuple(ids), position, tuple(wanted))


def longest(lm: LM) -> int | None:
    """How many tokens the model can read at once; None where no limit is known."""
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if limit is not None and lm.spec.family == "roberta":
        limit -= lm.model.config.pad_token_id + 1  # its positions are counted from there
    return limit


def check_length(lm: LM, n_tokens: int, what: str) -> None:
    """Raises ValueError where `what` has more tokens than the model can read at once."""
    limit = longest(lm)
    if limit is not None and n_tokens > limit:
        raise ValueError(f"{what} has {n_tokens} tokens, the context of {lm.name} is {limit}; shorten it")


def read(lm: LM, text: str) -> list[int]:
    """Token ids of a text as the model reads it: what the tokenizer puts after the text (EOS) is cut for causal models,
    which would go on after the end of a text.

    Raises TypeError for what is no text, and ValueError for a text that begins or ends with the special token that the
    tokenizer itself puts there: the model would read two.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected text, got {type(text).__name__} {text!r:.80}")
    found = lm.tokenizer(text)
    ids, eos = found["input_ids"], lm.tokenizer.eos_token_id
    own = [i for i, part in enumerate(found.sequence_ids(0)) if part is not None]
    if not own:
        return [token for token in ids if lm.spec.masked or token != eos or token == lm.tokenizer.bos_token_id]
    added = {"begins": ids[: own[0]], "ends": ids[own[-1] + 1 :] if lm.spec.masked else []}
    for verb, some in added.items():
        for token in set(some) & {ids[i] for i in own}:
            word = lm.tokenizer.convert_ids_to_tokens(token)
            if (text.lstrip().startswith if verb == "begins" else text.rstrip().endswith)(word):
                raise ValueError(
                    f"{text[:40]!r} {verb} with {word}, which the tokenizer of {lm.name} itself puts there; "
                    "leave it out"
                )
    return ids if lm.spec.masked else ids[: own[-1] + 1]


def read_prompt(lm: LM, prompt: str) -> list[int]:
    """Token ids of a prompt that a causal model is to go on with, read as `read` does.

    Raises ValueError also for a prompt without tokens, and for one that ends with the end of a text (EOS).
    """
    ids, end = read(lm, prompt), lm.tokenizer.eos_token_id
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens for {lm.name}; give a longer one")
    if len(ids) > 1 and ids[-1] == end != lm.tokenizer.bos_token_id:
        raise ValueError(
            f"prompt {prompt!r} ends with {lm.tokenizer.eos_token}, the end of a text for {lm.name}; leave it out"
        )
    return ids


def _special(lm: LM, ids: list[int]) -> bool:
    return lm.tokenizer.decode(ids) != lm.tokenizer.decode(ids, skip_special_tokens=True)


def ending(query: Query) -> tuple[bool, str, str]:
    """What of a query decides how words are tokenised as its target: whether they are joined to what is before them,
    the last word there, and the letter after them."""
    before, mask, after = query.prompt.partition(MASK)
    return not before[-1:].isspace() if mask else query.joined, "".join(before.split()[-1:]), after[:1]


def _causal(lm: LM, query: Query, word: str) -> tuple[list[int], int, list[int]]:
    prompt, joined = _before(lm, query)
    ids = read_prompt(lm, prompt)
    joint = read(lm, f"{prompt}{'' if joined else ' '}{word}")
    if joint[: len(ids)] != ids:
        raise ValueError(
            f"the tokens of {prompt!r} change when {word!r} follows: the end of the prompt is no token boundary for "
            f"{lm.name}. End the prompt with a whole word{', and do not join the target to it' if joined else ''}."
        )
    return ids, len(ids) - 1, joint[len(ids) :]


def _before(lm: LM, query: Query) -> tuple[str, bool]:
    """What a causal model reads of a prompt, and whether the target is joined to it."""
    before, mask, after = query.prompt.partition(MASK)
    if not mask:
        return before, query.joined
    if after.strip(" .。") or not before.strip():
        raise ValueError(
            f"{lm.name} reads from left to right and cannot be asked {query.prompt!r}: the mask must come last. "
            "Use the causal form of the task, or a masked model."
        )
    return before.rstrip(), not before[-1].isspace()


def _masked(lm: LM, query: Query, word: str) -> tuple[list[int], int, list[int], str]:
    before, mark, after = query.prompt.partition(MASK)
    if not mark:
        before, after = before if query.joined else f"{before} ", "."
    spaced = " " if before.endswith(" ") else ""
    wanted = lm.tokenizer(spaced + word, add_special_tokens=False)["input_ids"]
    inside = before and not before[-1].isspace() or after[:1].isalnum()
    if inside:
        whole, wanted = _filled(lm, before, word, after)
    text = before + lm.tokenizer.mask_token * len(wanted) + after
    ids = read(lm, text)
    mask = lm.tokenizer.mask_token_id
    if ids.count(mask) != len(wanted):
        raise ValueError(f"prompt {query.prompt!r} holds mask tokens of its own; mark the one place with {MASK}")
    position = ids.index(mask) if wanted else 0
    if inside and [*ids[:position], *wanted, *ids[position + len(wanted) :]] != whole:
        raise ValueError(
            f"the tokens around the mask of {query.prompt!r} change when {word!r} is in its place: it is no token of "
            f"its own for {lm.name}. Mark the place of a whole word."
        )
    return ids, position, wanted, text


def _filled(lm: LM, before: str, word: str, after: str) -> tuple[list[int], list[int]]:
    """Token ids of a sentence, and of the word in it."""
    found = lm.tokenizer(before + word + after, return_offsets_mapping=True)
    return found["input_ids"], [found["input_ids"][i] for i in _inside(found, len(before), len(before + word))]


def _inside(found, start: int, end: int) -> list[int]:
    """Positions of the tokens that hold letters of a part of a text, given its tokens with their offsets."""
    return [i for i, (low, high) in enumerate(found["offset_mapping"]) if low < end and high > start and low < high]


def span(lm: LM, query: Query, target: str | None = None) -> tuple[int, int]:
    """Positions of the first and the last token of a query's subject among the ids of `encode`.

    The subject is where `tasks.subject_start` finds it in the prompt. Raises ValueError for a query without a subject
    or with a template that does not give its prompt, and for a subject without tokens or after the mask of a causal
    model.
    """
    prompt, start = query.prompt, subject_start(query)
    end = start + len(query.subject)
    if lm.spec.masked:
        text = _masked(lm, query, query.target if target is None else target)[3]
        if MASK in prompt and start > prompt.index(MASK):
            start, end = (at - len(prompt) + len(text) for at in (start, end))
    else:
        text, _ = _before(lm, query)
        if end > len(text):
            raise ValueError(
                f"the subject {query.subject!r} of {prompt!r} stands after the mask, and {lm.name} reads only what is "
                "before it; give a part of that"
            )
    found = _inside(lm.tokenizer(text, return_offsets_mapping=True), start, end)
    if not found:
        raise ValueError(f"the subject {query.subject!r} of {prompt!r} has no tokens for {lm.name}; give another part")
    return found[0], found[-1]


def steps(lm: LM, encoded: Encoded) -> list[Encoded]:
    """One query per target token: token k is predicted with the target's first k tokens in place."""
    out = []
    for k, token in enumerate(encoded.target):
        if lm.spec.masked:
            ids = list(encoded.ids)
            ids[encoded.position : encoded.position + k] = encoded.target[:k]
        else:
            ids = [*encoded.ids, *encoded.target[:k]]
        out.append(Encoded(tuple(ids), encoded.position + k, (token,)))
    return out


def pad(lm: LM, batch: Sequence[Encoded]) -> tuple[Int[Tensor, "query token"], Int[Tensor, " query"]]:
    """Right-padded token ids and the lengths, on the model's device."""
    lengths = torch.tensor([len(e.ids) for e in batch], device=lm.device)
    filler = lm.tokenizer.pad_token_id
    filler = 0 if filler is None else filler
    ids = torch.full((len(batch), int(lengths.max())), filler, device=lm.device)
    for row, encoded in zip(ids, batch, strict=True):
        row[: len(encoded.ids)] = torch.tensor(encoded.ids, device=lm.device)
    return ids, lengths
