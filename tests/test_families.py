"""Packed sequences give what the plain model gives, in every family; families that cannot be packed are padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import files

CONTEXT = 40
SMALL: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": CONTEXT, "pad_token_id": 0,
}  # fmt: skip
ROBERTA = SMALL | {"max_position_embeddings": CONTEXT + 2, "pad_token_id": 1}
GROUPED = SMALL | {"num_key_value_heads": 2}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", ROBERTA),
    "xlm-roberta": ("XLMRobertaConfig", ROBERTA),
    "camembert": ("CamembertConfig", ROBERTA),
    "electra": ("ElectraConfig", SMALL | {"embedding_size": 16}),
    "albert": ("AlbertConfig", SMALL | {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig", {"vocab_size": 200, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48,
                                        "max_position_embeddings": CONTEXT}),
    "modernbert": ("ModernBertConfig", SMALL | {"local_attention": 16, "global_attn_every_n_layers": 2}),
    "nomic-bert": ("NomicBertConfig", SMALL),
    "eurobert": ("EuroBertConfig", GROUPED),
    "gpt2": ("GPT2Config", {"vocab_size": 200, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT,
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
    "opt": ("OPTConfig", {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                          "ffn_dim": 48, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32}),
}  # fmt: skip
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("MPNetConfig", ROBERTA),
    "deberta-v2": ("DebertaV2Config", SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
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
LAYERS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's folder and its plain model, made once."""
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def make(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in made:
            kind, options = (PACKED | PADDED)[name]
            folder = save_model(tmp_path_factory.mktemp(name), getattr(transformers, kind)(**options))
            made[name] = (folder, transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval())
        return made[name]

    return make


def load(folder: Path, layers: list[int] = LAYERS, dtype: str = "float32", batch_tokens: int = 64) -> model.Model:
    files = model.find_model(str(folder), None, trust_remote_code=False, allow_pickle=False)
    loaded = model.Model(files, layers, dtype, "cpu", batch_tokens)
    loaded.prepare([documents(3, [n])[0] for n in (4, 9, CONTEXT)])
    return loaded


def documents(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 200, n).tolist() for n in lengths]


def plain_norms(plain: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        states = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return np.stack([torch.linalg.vector_norm(states[k][0].double(), dim=-1).numpy() for k in LAYERS])


def measure(loaded: model.Model, texts: list[list[int]], filler: int = 0) -> list[np.ndarray]:
    lengths = [len(t) for t in texts]
    ids = np.concatenate([*(np.array(t) for t in texts), np.full(filler, 7)])
    values = loaded.measure(ids, lengths)
    return np.split(values[:, : sum(lengths)], np.cumsum(lengths)[:-1], axis=1)


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_strengths_equal_the_plain_models(name: str, family: Any) -> None:
    folder, plain = family(name)
    loaded = load(folder)
    assert loaded.packed == (name in PACKED), loaded.why_padded
    texts = documents(1, [1, CONTEXT, 7, 7, 7, 30, 2, CONTEXT, 1])
    for text, got in zip(texts, measure(loaded, texts, filler=11 * loaded.packed), strict=True):
        np.testing.assert_allclose(got, plain_norms(plain, text), rtol=2e-5)


def test_every_family_that_is_taken_has_a_test_and_no_other_is() -> None:
    assert {getattr(transformers, kind).model_type for kind, _ in (PACKED | PADDED).values()} == files.TESTED


def test_a_family_without_a_test_is_tried_on_demand(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "ernie", transformers.ErnieConfig(**SMALL))
    asked = {"trust_remote_code": False, "allow_pickle": False}
    with pytest.raises(ModelError, match=r"family ernie, which has no test; --allow-untested tries it.* bert, "):
        model.find_model(str(folder), None, **asked)
    found = model.find_model(str(folder), None, **asked, allow_untested=True)
    loaded = model.Model(found, LAYERS, "float32", "cpu", 64)
    loaded.prepare([documents(3, [n])[0] for n in (4, 9)])


@pytest.mark.parametrize(
    ("name", "why"),
    [("mpnet", "does not go through transformers"), ("deberta-v2", "does not go through"), ("gemma2", "wants softcap")],
)
def test_a_padded_family_says_why(name: str, why: str, family: Any) -> None:
    loaded = load(family(name)[0])
    assert loaded.why_padded is not None
    assert why in loaded.why_padded


@pytest.mark.parametrize("name", ["bert", "albert", "mpnet", "qwen2-moe"])
def test_the_last_layer_is_checked_too(name: str, family: Any) -> None:
    folder, plain = family(name)
    loaded = load(folder, [4])
    assert loaded.packed == (name in PACKED)
    text = documents(1, [CONTEXT])[0]
    block = loaded._blocks[-1]
    seen = []
    raw = [m for m in plain.modules() if type(m) is type(block)][-1]
    handle = raw.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    plain_norms(plain, text)
    handle.remove()
    np.testing.assert_allclose(measure(loaded, [text])[0][0], seen[-1][0].norm(dim=-1).numpy(), rtol=2e-5)


def test_a_window_that_only_the_mask_knows_is_never_packed(family: Any) -> None:
    loaded = load(family("qwen2-moe")[0], [2])
    assert loaded.why_padded is not None
    assert "against the plain model differs" in loaded.why_padded or "sliding window" in loaded.why_padded


def test_rotary_frequencies_that_depend_on_the_longest_text_bound_the_window(tmp_path: Path) -> None:
    factors = [1.0] * 4
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors,
               "original_max_position_embeddings": 32}  # fmt: skip
    config = transformers.Phi3Config(**GROUPED | {"rope_parameters": scaling | {"rope_theta": 1e4},
                                                  "original_max_position_embeddings": 32})  # fmt: skip
    save_model(tmp_path, config)
    assert model.find_model(str(tmp_path), None, trust_remote_code=False, allow_pickle=False).context_tokens == 32


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_later_blocks_never_run(name: str, family: Any) -> None:
    loaded = load(family(name)[0], [2])
    ran = []
    for block in loaded._blocks:
        block.register_forward_pre_hook(lambda module, args: ran.append(module))
    measure(loaded, documents(1, [5, 9]))
    assert len(ran) == 2


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_half_precision_products_stay_near(name: str, family: Any) -> None:
    folder, plain = family(name)
    loaded = load(folder, dtype="bfloat16")
    texts = documents(2, [1, 30, 7, CONTEXT])
    for text, got in zip(texts, measure(loaded, texts), strict=True):
        expected = plain_norms(plain, text)
        np.testing.assert_allclose(got, expected, rtol=2e-2)
        np.testing.assert_allclose(got[0], expected[0], rtol=2e-5)  # embeddings are no product


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=12), filler=st.integers(0, 50), data=st.data())
def test_any_packing_gives_what_single_texts_give(lengths: list[int], filler: int, data: Any, family: Any) -> None:
    for name in ("bert", "mistral", "mpnet"):
        if name not in LOADED:
            LOADED[name] = load(family(name)[0])
        loaded = LOADED[name]
        texts = documents(len(lengths), lengths)
        order = data.draw(st.permutations(range(len(texts))))
        packed = measure(loaded, [texts[i] for i in order], filler * loaded.packed)
        for i, got in zip(order, packed, strict=True):
            np.testing.assert_allclose(got, measure(loaded, [texts[i]])[0], rtol=2e-5)


LOADED: dict[str, Any] = {}
