"""Small Hugging Face models with random weights, and a padded batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 99
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = {**_SIZES, "vocab_size": VOCABULARY}
_DECODER = {
    **_TEXT,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "max_position_embeddings": 64,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 4}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
_WINDOW = {"head_dim": 8, "sliding_window": 4}

# model class without "Model", how it reads its input, and what its config takes
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("Bert", "text", _TEXT),
    "RoBERTa": ("Roberta", "text", _TEXT),
    "ELECTRA": ("Electra", "text", {**_TEXT, "embedding_size": 16}),
    "ALBERT": ("Albert", "text", {**_TEXT, "embedding_size": 16}),
    "ModernBERT": (
        "ModernBert",
        "text",
        {
            **_TEXT,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "T5": ("T5", "pair", _T5),
    "mT5": ("MT5", "pair", _T5),
    "Marian": ("Marian", "pair", _PAIR),
    "BART": ("Bart", "pair", _PAIR),
    "mBART": ("MBart", "pair", _PAIR),
    "Pegasus": ("Pegasus", "pair", _PAIR),
    "M2M100": ("M2M100", "pair", _PAIR),
    "GPT-2": ("GPT2", "text", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "GPT-NeoX": ("GPTNeoX", "text", _TEXT),
    "OPT": (
        "OPT",
        "text",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "vocab_size": VOCABULARY,
            "word_embed_proj_dim": 32,
        },
    ),
    "Llama": ("Llama", "text", _DECODER),
    "Mistral": ("Mistral", "text", {**_DECODER, "sliding_window": 4}),
    "Mixtral": ("Mixtral", "text", {**_DECODER, "num_local_experts": 2}),
    "Gemma 2": (
        "Gemma2",
        "text",
        # a cap so low that scores of random weights feel it
        {**_DECODER, **_WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
    ),
    "Gemma 3": ("Gemma3Text", "text", {**_DECODER, **_WINDOW, "query_pre_attn_scalar": 8}),
    "Qwen 2": ("Qwen2", "text", _DECODER),
    "Qwen 3": ("Qwen3", "text", {**_DECODER, "head_dim": 8}),
    "Phi": ("Phi", "text", _DECODER),
    "OLMo 2": ("Olmo2", "text", _DECODER),
    "gpt-oss": (
        "GptOss",
        "text",
        {**_DECODER, **_WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "ViT": ("ViT", "image", _IMAGE),
    "CLIP": ("CLIPVision", "image", _IMAGE),
    "SigLIP": ("SiglipVision", "image", _IMAGE),
    "Whisper": (
        "Whisper",
        "sound",
        {**_PAIR, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32},
    ),
}
# These attend by code of their own in transformers 4; the interface came with version 5.
ONLY_FROM_5 = {"BERT", "RoBERTa", "ELECTRA", "ALBERT", "ModernBERT", "T5", "mT5"}
# And these in every version.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "DeBERTa": ("DebertaV2", _TEXT),
    "GPT-J": (
        "GPTJ",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": VOCABULARY},
    ),
}
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def build(model_class: str, config_class: str, options: dict[str, Any]) -> Any:
    """A model in eval mode that attends eagerly, its weights random and none of them zero."""
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def model_of(name: str) -> Any:
    stem, _, options = ARCHITECTURES[name]
    return build(f"{stem}Model", f"{stem}Config", options)


LENGTHS = torch.tensor([[11], [6], [3]])


def batch_of(kind: str, padding: str = "right") -> tuple[dict[str, Tensor], Tensor | None]:
    """The arguments of a call, and which tokens of the output are no padding."""
    torch.manual_seed(1)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}, None
    targets = torch.randint(3, VOCABULARY, (3, 7))
    if kind == "sound":
        return {"input_features": torch.randn(3, 8, 24), "decoder_input_ids": targets}, None
    real = torch.arange(11) < LENGTHS
    real = real.flip(1) if padding == "left" else real
    ids = torch.randint(3, VOCABULARY, (3, 11)).masked_fill(~real, 0)
    arguments = {"input_ids": ids, "attention_mask": real.long()}
    if kind == "pair":
        return {**arguments, "decoder_input_ids": targets}, None
    return arguments, real


def forward(arguments: dict[str, Tensor], real: Tensor | None) -> Callable[[Any], Tensor]:
    def call(model: Any) -> Tensor:
        states = model(**arguments).last_hidden_state
        return states if real is None else states[real]

    return call
