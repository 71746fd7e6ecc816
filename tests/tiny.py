"""Tiny models of every family with random weights, and a tokenizer of whole words."""

from __future__ import annotations

import copy

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kncore.arch import spec_for
from kncore.models import LM

WORDS = "the a capital of is in France Spain Paris Madrid these this books book cat cats red Anna saw . ,".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = len(SPECIAL) + len(WORDS)

_SHAPE = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24)
_ROTARY = dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)

CONFIGS = {
    "bert": transformers.BertConfig(**_SHAPE, max_position_embeddings=64, pad_token_id=0),
    "roberta": transformers.RobertaConfig(**_SHAPE, max_position_embeddings=64, pad_token_id=0),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=3, n_head=4, n_inner=24, n_positions=64, bos_token_id=2, eos_token_id=3
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**_SHAPE, max_position_embeddings=64, rotary_pct=0.5),
    "llama": transformers.LlamaConfig(**_SHAPE, **_ROTARY, head_dim=4),
    "qwen2": transformers.Qwen2Config(
        **_SHAPE, **_ROTARY, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "mistral": transformers.MistralConfig(**_SHAPE, **_ROTARY, head_dim=4, sliding_window=3),
}
FAMILIES = sorted(CONFIGS)
CAUSAL = [family for family in FAMILIES if not spec_for(family).masked]


def tokenizer(masked: bool) -> transformers.PreTrainedTokenizerFast:
    """Whole words by white space; a masked model's adds [CLS] and [SEP]."""
    table = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if masked:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


def model(family: str, seed: int = 0, scale: float = 8.0):
    """A model with weights larger than at initialisation, so that its predictions are far from uniform."""
    torch.manual_seed(seed)
    auto = transformers.AutoModelForMaskedLM if spec_for(family).masked else transformers.AutoModelForCausalLM
    built = auto.from_config(copy.deepcopy(CONFIGS[family]))  # saving a model writes its dtype into its configuration
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval().requires_grad_(False)


def lm(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> LM:
    """A tiny model as `kncore.load` would give it."""
    spec = spec_for(family)
    built = model(family, seed).to(dtype)
    return LM(f"tiny-{family}", f"seed{seed}", built, tokenizer(spec.masked), spec)
