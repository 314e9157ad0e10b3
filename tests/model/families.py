"""Small configs of every tested family, for models with random weights that need no download.

``test_families`` and ``infra/gpu/check.py`` use them. This module imports no package, so that a
machine without the tests' requirements can read it.
"""

from __future__ import annotations

from typing import Any

CONTEXT = 40
SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
ROBERTA = SMALL | {"max_position_embeddings": CONTEXT + 2, "pad_token_id": 1}
GROUPED = SMALL | {"num_key_value_heads": 2}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", ROBERTA),
    "xlm-roberta": ("XLMRobertaConfig", ROBERTA),
    "camembert": ("CamembertConfig", ROBERTA),
    "electra": ("ElectraConfig", SMALL | {"embedding_size": 16}),
    "albert": ("AlbertConfig", SMALL | {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig",
                   {"vocab_size": 200, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48,
                                        "max_position_embeddings": CONTEXT}),
    "modernbert": ("ModernBertConfig",
                   SMALL | {"local_attention": 16, "global_attn_every_n_layers": 2}),
    "nomic-bert": ("NomicBertConfig", SMALL),
    "eurobert": ("EuroBertConfig", GROUPED),
    "gpt2": ("GPT2Config", {"vocab_size": 200, "n_embd": 32, "n_layer": 4, "n_head": 4,
                            "n_positions": CONTEXT,
                            "bos_token_id": 0, "eos_token_id": 0}),
    "gpt-neox": ("GPTNeoXConfig", SMALL),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 12, "head_dim": 8}),
    "phi": ("PhiConfig", SMALL),
    "phi3": ("Phi3Config", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 12}),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "minicpm3": ("MiniCPM3Config",
                 SMALL | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12,
                                            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
                                            "v_head_dim": 6}),
    "opt": ("OPTConfig", {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4,
                          "num_attention_heads": 4,
                          "ffn_dim": 48, "max_position_embeddings": CONTEXT,
                          "word_embed_proj_dim": 32}),
}  # fmt: skip
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("MPNetConfig", ROBERTA),
    "deberta-v2": (
        "DebertaV2Config",
        SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        GROUPED
        | {
            "use_sliding_window": True,
            "sliding_window": 30,
            "num_experts": 4,
            "max_window_layers": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": 12}),
}
DEBERTA_V3 = PADDED["deberta-v2"][1] | {
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deberta-v3": ("DebertaV2Config", DEBERTA_V3),
    "gemma3-with-images": ("Gemma3Config", {
        "text_config": PACKED["gemma3"][1], "mm_tokens_per_image": 4, "image_token_index": 199,
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                          "num_attention_heads": 2,
                          "image_size": 28, "patch_size": 14},
    }),
}  # fmt: skip
"""Other shapes of these families, and the one in which Gemma 3 of 4 B and more comes."""
FAMILIES = PACKED | PADDED | VARIANTS
