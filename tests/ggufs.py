"""Tiny models written as GGUF files, as llama.cpp's converter lays them out."""

import gguf

WORDS = ["<|endoftext|>", "a", "b", "Ġ", "Ġa", "ab", "Ġab"]
MERGES = ["a b", "Ġ a", "Ġ ab"]
ROTARY = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def halves_interleaved(weight, heads):
    """Rows of a query or key projection as GGUF files of LLaMA keep them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def rotary_tensors(model):
    """The weights of a LLaMA or a Qwen2 under the names of GGUF."""
    config, found = model.config, {"token_embd.weight": model.model.embed_tokens.weight}
    found |= {"output_norm.weight": model.model.norm.weight, "output.weight": model.lm_head.weight}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i, block in enumerate(model.model.layers):
        for ours, theirs in ROTARY.items():
            for kind, value in block.get_submodule(ours).named_parameters():
                turned = theirs in heads and kind == "weight" and config.model_type == "llama"
                found[f"blk.{i}.{theirs}.{kind}"] = halves_interleaved(value, heads[theirs]) if turned else value
    return found


def gpt2_tensors(model):
    """The weights of a GPT-2 under the names of GGUF: those of its matrices have a row for each output."""
    inner, found = model.transformer, {}
    found |= {"token_embd.weight": inner.wte.weight, "position_embd.weight": inner.wpe.weight}
    found |= {f"output_norm.{kind}": value for kind, value in inner.ln_f.named_parameters()}
    found |= {"output.weight": model.lm_head.weight}
    for i, block in enumerate(inner.h):
        for ours, theirs in GPT2.items():
            for kind, value in block.get_submodule(ours).named_parameters():
                found[f"blk.{i}.{theirs}.{kind}"] = value.T if value.dim() == 2 else value
    return found


def settings(config):
    """What GGUF says of a model beside its weights."""
    family = config.model_type
    found = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings}
    found |= {"embedding_length": config.hidden_size, "attention.head_count": config.num_attention_heads}
    if family == "gpt2":
        found |= {"feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        found |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
        }
        found |= {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}
        found |= {"rope.freq_base": float(config.rope_parameters["rope_theta"]), "vocab_size": config.vocab_size}
        found |= {"rope.dimension_count": config.hidden_size // config.num_attention_heads}
    found = {f"{family}.{name}": value for name, value in found.items()}
    return found | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*(f"<{i}>" for i in range(config.vocab_size - len(WORDS))), *WORDS],
        "tokenizer.ggml.token_type": [int(gguf.TokenType.NORMAL)] * config.vocab_size,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(path, model, says=(), holds=()):
    """Write a model into a file; `says` changes or adds settings (None: takes one away), `holds` weights."""
    tensors = gpt2_tensors(model) if model.config.model_type == "gpt2" else rotary_tensors(model)
    writer = gguf.GGUFWriter(path, model.config.model_type)
    for name, value in (settings(model.config) | dict(says)).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, value in (tensors | dict(holds)).items():
        if value is not None:
            writer.add_tensor(name, value.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
