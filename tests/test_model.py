"""The model's promises: layers equal Hugging Face's, later blocks never run, unsafe or broken models are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import save_model

from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.signals import Strength
from afn_ray.thresholds import round_strengths
from afn_ray.tokens import TextEncoder


def find(folder: Path | str, **options: bool) -> model.ModelFiles:
    return model.find_model(str(folder), None, **({"trust_remote_code": False, "allow_pickle": False} | options))


def load(folder: Path, layers: list[int], dtype: str = "float32") -> tuple[model.Model, TextEncoder]:
    files = find(folder)
    encoder = TextEncoder(*model.load_tokenizer(files))
    loaded = model.Model(files, layers, dtype, "cpu", 256)
    probes = encoder.encode(["Hello there, you.", "In the beginning was the word, they say."])
    ids = [probes.token_ids[a:b].tolist() for a, b in zip(probes.bounds, probes.bounds[1:], strict=False)]
    loaded.prepare(ids, Strength.measure)
    return loaded, encoder


def reference_norms(folder: Path, ids: list[int]) -> list[np.ndarray]:
    """Norms of plain Hugging Face ``hidden_states`` for one unpadded text, in fp32."""
    plain = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [torch.linalg.vector_norm(s[0].double(), dim=-1).numpy() for s in states]


def test_every_layer_of_minilm_equals_hidden_states_of_single_unpadded_texts(minilm: Path, verses: list[str]) -> None:
    loaded, encoder = load(minilm, list(range(7)))
    texts = [verses[i] for i in (0, 7, 1000, 20000, 31000)]
    encoded = encoder.encode(texts)
    rows = [encoded.token_ids[a:b].tolist() for a, b in zip(encoded.bounds, encoded.bounds[1:], strict=False)]
    longest = max(map(len, rows))
    ids = np.array([r + [0] * (longest - len(r)) for r in rows])
    mask = np.array([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    got = round_strengths(loaded.measure(ids, mask, Strength.measure))  # one padded batch, as recorded
    for i, row in enumerate(rows):
        for layer, expected in enumerate(reference_norms(minilm, row)):
            np.testing.assert_allclose(got[layer, i, : len(row)], expected, rtol=2e-5)


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt", "tiny_llama"])
def test_layers_of_other_architectures_equal_hidden_states(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    loaded, encoder = load(folder, [0, 1, 2, 3])
    ids = encoder.encode(["And God said, Let there be light: and there was light."]).token_ids.tolist()
    got = loaded.measure(np.array([ids]), np.ones((1, len(ids)), np.int64), Strength.measure)
    expected = reference_norms(folder, ids)
    final_norm = kind != "tiny_bert"  # then the last entry of hidden_states is no block's output
    for layer in range(3 if final_norm else 4):
        np.testing.assert_allclose(got[layer, 0], expected[layer], rtol=2e-5)
    assert loaded.causal == final_norm


def test_blocks_after_the_last_layer_never_run(minilm: Path) -> None:
    loaded, encoder = load(minilm, [2, 4])
    ran = []
    for at, block in enumerate(loaded._model.encoder.layer):
        block.register_forward_pre_hook(lambda module, args, at=at: ran.append(at))
    ids = np.array([encoder.encode(["Let there be light"]).token_ids])
    loaded.measure(ids, np.ones_like(ids), Strength.measure)
    assert ran == [0, 1, 2, 3]


def test_shared_layers_are_counted_by_pass(tmp_path: Path, minilm: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=30522, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    save_model(tmp_path, config)
    shutil.copy(minilm / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    loaded, encoder = load(tmp_path, [0, 1, 3])
    ids = encoder.encode(["And there was light."]).token_ids.tolist()
    got = loaded.measure(np.array([ids]), np.ones((1, len(ids)), np.int64), Strength.measure)
    expected = reference_norms(tmp_path, ids)
    for at, layer in enumerate((0, 1, 3)):
        np.testing.assert_allclose(got[at, 0], expected[layer], rtol=2e-5)


def test_bfloat16_is_near_float32_and_its_norm_is_accumulated_in_float32(minilm: Path, verses: list[str]) -> None:
    full, encoder = load(minilm, [4])
    half, _ = load(minilm, [4], "bfloat16")
    ids = np.array([encoder.encode([verses[0]]).token_ids])
    a, b = (m.measure(ids, np.ones_like(ids), Strength.measure) for m in (full, half))
    np.testing.assert_allclose(b, a, rtol=3e-2)
    assert not np.array_equal(a, b)
    wide = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    wide[0, :4000] = 0.01
    assert Strength.measure(wide).item() == pytest.approx(wide.double().norm().item(), rel=1e-6)


def test_linear_layers_are_prepacked_and_agree(minilm: Path) -> None:
    loaded, _ = load(minilm, [4])
    packed = loaded._model.encoder.layer[0].intermediate.dense
    assert isinstance(packed, model._PackedLinear)
    plain = transformers.AutoModel.from_pretrained(minilm).encoder.layer[0].intermediate.dense
    x = torch.randn(7, 384)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-4, atol=1e-4)


def test_self_check_refuses_a_hook_that_reads_the_wrong_place(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.Model._after_block

    def wrong(self: Any, module: Any, args: Any, output: Any) -> None:
        right(self, module, args, (output[0] if isinstance(output, tuple) else output) * 1.001)

    monkeypatch.setattr(model.Model, "_after_block", wrong)
    with pytest.raises(ModelError, match=r"self-check failed: layer 2 hooked.* tolerance 1e-04"):
        load(tiny_bert, [2])


def test_self_check_refuses_padding_that_changes_strengths(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.Model._forward

    def maskless(self: Any, ids: Any, mask: Any) -> None:
        right(self, ids, np.ones_like(mask))

    monkeypatch.setattr(model.Model, "_forward", maskless)
    with pytest.raises(ModelError, match="one padded batch against single texts"):
        load(tiny_bert, [2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "expected a folder with config.json"),
        ("no-such-model-anywhere", "no such folder here, and the hub did not give it"),
        ("bad name!", "the hub did not give it"),
    ],
)
def test_unknown_models_say_what_was_tried(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find(name)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        find(tmp_path)


def test_pickled_weights_need_a_flag_and_load_with_it(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "pickled")
    weights = transformers.AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle can run code as it loads.*--allow-pickle"):
        find(folder)
    files = find(folder, allow_pickle=True)
    assert "pytorch_model.bin" in files.identity
    assert model.Model(files, [1], "float32", "cpu", 256)


def test_remote_code_needs_a_flag(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "code.MysteryConfig", "AutoModel": "code.Mystery"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match="--trust-remote-code runs it"):
        find(folder)


def test_missing_weights_are_refused_and_not_random(tmp_path: Path, tiny_bert: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_bert, tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in its files and would be random: encoder\.layer\.1"):
        model.Model(find(folder), [1], "float32", "cpu", 256)


def test_damaged_weights_are_an_error_that_names_the_model(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "damaged")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"damaged.* cannot be loaded"):
        model.Model(find(folder), [1], "float32", "cpu", 256)


def test_encoder_decoders_are_refused(tmp_path: Path, byte_bpe: Path) -> None:
    transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        find(tmp_path)


def test_positions_that_roberta_cannot_use_are_not_offered(tmp_path: Path) -> None:
    transformers.RobertaConfig(max_position_embeddings=514, num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find(tmp_path).context_tokens == 512


def test_identity_is_of_content_and_not_of_place(tmp_path: Path, tiny_bert: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    assert find(copy).identity == find(tiny_bert).identity
    (copy / "README.md").write_text("hello")
    assert find(copy).identity == find(tiny_bert).identity
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert find(copy).identity != find(tiny_bert).identity


def test_cuda_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.choose_device("auto") == "cpu"
    with pytest.raises(ModelError, match="torch sees no GPU here"):
        model.choose_device("cuda")


def write_gguf(path: Path, folder: Path) -> None:
    """The Llama and byte-level BPE of ``folder`` as one GGUF file, as llama.cpp writes it."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for name, value in load_file(folder / "model.safetensors").items():
        parts = name.removesuffix(".weight").split(".")
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        part = ".".join(parts[2:]) if block else parts[0]
        if part in heads:  # llama.cpp keeps rotary pairs side by side
            value = value.reshape(heads[part], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{block}{names[part]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama)
    files = find(path)
    assert (files.depth, files.hidden_size, files.context_tokens, files.gguf) == (3, 32, 48, "tiny.gguf")
    loaded, encoder = load(path, [0, 1, 2])
    ids = encoder.encode(["And there was light."]).token_ids.tolist()
    assert (
        ids == TextEncoder(*model.load_tokenizer(find(tiny_llama))).encode(["And there was light."]).token_ids.tolist()
    )
    got = loaded.measure(np.array([ids]), np.ones((1, len(ids)), np.int64), Strength.measure)
    expected = reference_norms(tiny_llama, ids)
    for layer in range(3):
        np.testing.assert_allclose(got[layer, 0], expected[layer], rtol=2e-5)


def test_a_damaged_gguf_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be loaded"):
        find(tmp_path / "broken.gguf")
