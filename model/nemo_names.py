"""NeMo's parameter names for ours. The tensors are the same, rows and columns in the same order:
only names differ."""

from model.config import RetroConfig


def nemo_name(name: str, config: RetroConfig) -> str:
    """The name a parameter of `model.retro.Retro` has in a NeMo RETRO checkpoint, without NeMo's
    prefix `model.`."""
    fixed = {
        "word_embeddings.weight": "encoder_embedding.word_embeddings.weight",
        "head.bias": "tokens_head.bias",
        "final_layernorm.weight": "post_decoder.model.final_layernorm.weight",
        "final_layernorm.bias": "post_decoder.model.final_layernorm.bias",
        "encoder.final_layernorm.weight": "encoder.model.final_layernorm.weight",
        "encoder.final_layernorm.bias": "encoder.model.final_layernorm.bias",
    }
    if name in fixed:
        return fixed[name]
    stack, _, rest = name.rpartition("layers.")
    number, half, inner = rest.split(".", 2)
    if stack == "encoder.":
        inner = inner.replace("cross_attention.", "inter_attention.")
        return f"encoder.model.layers.{number}.{inner}"
    layer, split = int(number), config.split_layer
    if layer < split or (layer == split and half == "attention_half"):
        return f"pre_decoder.model.layers.{layer}.{inner}"
    inner = inner.replace("cross_attention.", "inter_attention.cross_attention.")
    return f"post_decoder.model.layers.{layer - split}.{inner}"
