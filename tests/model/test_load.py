"""Only the blocks that run are loaded, in the dtype of their files, and nothing changes by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import linear
from afn_ray.model.lend import Lender, copy_out
from afn_ray.model.load import load_blocks, load_weights
from afn_ray.model.mapped import MappedFiles
from conftest import find_model, save_model
from families import CONTEXT, FAMILIES, SMALL
from test_families import DEPTH, documents

PROBES = [documents(3, [n])[0] for n in (4, 9, CONTEXT)]
TEXTS = documents(1, [1, CONTEXT, 7, 7, 30, 2])
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's model, made once."""

    @cache
    def make(name: str) -> Path:
        kind, options = FAMILIES[name]
        return save_model(tmp_path_factory.mktemp(name), getattr(transformers, kind)(**options))

    return make


def store_in(dtype: str, made: Path, folder: Path, rounded: str = "float32") -> Path:
    """The model in ``made``, stored in ``dtype`` in ``folder``.

    ``rounded``: its weights have been in that dtype before.
    """
    shutil.copytree(made, folder)
    file = folder / "model.safetensors"
    weights = {
        k: v.to(getattr(torch, rounded)).to(getattr(torch, dtype))
        for k, v in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def load(folder: Path, layers: list[int], dtype: str = "float32") -> model.Model:
    loaded = model.Model(find_model(folder), layers, dtype, "cpu", 64)
    model.prepare(loaded, PROBES)
    return loaded


def measure(loaded: model.Model) -> np.ndarray:
    return loaded.measure(np.concatenate(TEXTS), [len(text) for text in TEXTS])


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_do_not_run_are_not_loaded(name: str, folder: Callable[[str], Path]) -> None:
    files = find_model(folder(name))
    whole = load_weights(files)
    loaded = load_blocks(files, 2)
    got, expected = loaded.module.config.to_dict(), whole.config.to_dict()
    assert got | {"_name_or_path": ""} == expected | {"_name_or_path": ""}  # the depth, too
    assert type(loaded.module).__name__ == type(whole).__name__
    weights = dict(whole.named_parameters())
    for key, weight in loaded.module.named_parameters():
        assert "pooler" in key or torch.equal(weight, weights[key]), key
    if name == "albert":
        assert len(loaded.blocks) == 1 and loaded.depth == DEPTH
    else:
        assert len(loaded.blocks) == 2 == loaded.depth
    assert not [key for key, _ in loaded.module.named_parameters() if "vision" in key]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *((name, "bfloat16") for name in FAMILIES),
        *((name, "float16") for name in ("bert", "gpt2", "qwen2-moe", "gemma3-with-images")),
    ],
)
def test_weights_kept_in_half_precision_give_the_bits_of_float32(
    name: str, stored: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The bits are equal in the plain reference, and measured in float32 and in bfloat16.

    A file that changes after loading changes none of them.
    """
    half, wide = (
        store_in(dtype, folder(name), tmp_path / dtype, stored) for dtype in (stored, "float32")
    )
    files = find_model(half)
    plain = transformers.AutoModel.from_pretrained(files.folder, dtype=torch.float32).eval()
    narrow = model.Model(files, [0, 1, 3], "float32", "cpu", 64)
    assert {w.dtype for b in narrow.blocks for w in b.parameters()} == {HALF[stored]}
    outside = {id(w) for b in narrow.blocks for w in b.parameters()}
    assert {w.dtype for w in narrow.module.parameters() if id(w) not in outside} == {torch.float32}
    _, states = narrow.run_plain(TEXTS[1])
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([TEXTS[1]]), output_hidden_states=True)
    assert states is not None
    for got, state in zip(states[:3], expected.hidden_states, strict=False):
        assert torch.equal(got, state)
    model.prepare(narrow, PROBES)
    kept = [narrow, load(half, [0, 1, 3], "bfloat16")]
    others = [load(wide, [0, 1, 3], dtype) for dtype in ("float32", "bfloat16")]
    for one, other in zip(kept, others, strict=True):
        np.testing.assert_array_equal(measure(one), measure(other))
    assert_own_their_weights([*kept, *others], tmp_path)


def edit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any
) -> model.ModelFiles:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return find_model(folder)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT of four blocks as it comes with the head of its training: all names have a prefix."""
    torch.manual_seed(0)
    whole = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    whole.save_pretrained(tmp_path / "bert")
    assert "bert.encoder.layer.3.output.dense.bias" in whole.state_dict()
    return tmp_path / "bert"


AT = "bert.encoder.layer"


def test_weights_of_blocks_that_do_not_run_may_be_anything(bert: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[f"{AT}.3.output.dense.weight"]
        weights[f"{AT}.2.output.dense.bias"] = torch.rand(7)

    expected = measure(load(bert, [1]))
    files = edit(bert, change)
    np.testing.assert_array_equal(measure(load(bert, [1])), expected)
    with pytest.raises(ModelError, match=r"output\.dense\.bias is \(7,\), expected \(32,\)"):
        load_blocks(files, 3)
    with pytest.raises(ModelError, match=r"2\.output\.dense\.bias"):
        load_weights(files)


@pytest.mark.parametrize(
    ("depth", "why"),
    [
        (
            3,
            r"hold 16 tensors that BertModel does not have .*"
            r"layer\.3\..*config\.json says 3 blocks",
        ),
        (6, r"its files lack 32 weights, .*encoder\.layer\.4\..*config\.json says 6 blocks"),
    ],
)
@pytest.mark.parametrize("num_blocks", [1, 2, 6])
def test_a_config_with_another_number_of_blocks_is_refused(
    num_blocks: int, depth: int, why: str, bert: Path
) -> None:
    files = edit(bert, lambda weights: None, num_hidden_layers=depth)
    with pytest.raises(ModelError, match=why):
        load_blocks(files, num_blocks)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_a_config_with_nothing_to_measure_is_refused(key: str, bert: Path) -> None:
    with pytest.raises(ModelError, match=f"config.json says {key} = 0; expected 1 or more"):
        edit(bert, lambda weights: None, **{key: 0})


def test_other_weights_that_would_be_left_out_are_refused(bert: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["bert.encoder.extra.3.weight"] = torch.rand(3)

    with pytest.raises(ModelError, match=r"hold 1 tensor that BertModel .*encoder\.extra\.3"):
        load_blocks(edit(bert, change), 1)


def test_a_model_that_does_not_run_without_its_last_blocks_is_refused(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = transformers.models.bert.modeling_bert.BertEncoder
    right = encoder.forward

    def by_number(self: Any, *args: Any, **options: Any) -> Any:
        assert [self.layer[i] for i in range(self.config.num_hidden_layers)]
        return right(self, *args, **options)

    monkeypatch.setattr(encoder, "forward", by_number)
    with pytest.raises(ModelError, match="does not run with 2 of its 4 blocks: IndexError: "):
        load(bert, [1])


def test_pickled_weights_are_loaded_up_to_the_same_block(bert: Path) -> None:
    expected = measure(load(bert, [1]))
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    pickled = model.Model(find_model(bert, allow_pickle=True), [1], "float32", "cpu", 64)
    assert len(pickled.blocks) == 2
    model.prepare(pickled, PROBES)
    np.testing.assert_array_equal(measure(pickled), expected)
    assert_own_their_weights([pickled], bert)  # torch maps such files, too


# --- mapped files
# ----------------------------------------------------------------------------------------


def test_mapped_tensors_are_those_of_the_files(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
    weights = {str(t): (torch.rand(3, 50) * 9).to(t) for t in dtypes}
    weights |= {"empty": torch.empty(0, 4), "one": torch.tensor(3.5)}
    weights["narrow"] = torch.rand(9).to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"other": torch.rand(5)}, tmp_path / "b.safetensors")
    mapped = MappedFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert mapped.tensors.keys() == {*weights, "other"} and mapped.half is None
    for name, expected in weights.items():
        got = mapped.tensors[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(got.to(torch.float64), expected.to(torch.float64))


def test_after_a_header_of_any_length_tensors_are_aligned(tmp_path: Path) -> None:
    """Some programs do not pad it, and so the tensors in the file begin at odd addresses."""
    file = tmp_path / "a.safetensors"
    data = np.arange(5, dtype=np.float32).tobytes()
    for spaces in range(5):
        entry = {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}
        header = json.dumps({"w": entry}).encode() + b" " * spaces
        file.write_bytes(len(header).to_bytes(8, "little") + header + data)
        got = MappedFiles([file]).tensors["w"]
        assert got.tolist() == [0, 1, 2, 3, 4]
        assert got.data_ptr() % got.itemsize == 0


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_that_changes_after_loading_changes_no_value(
    dtype: str, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN, which copies the weights of products as it reorders them, is not used here."""
    monkeypatch.setattr(linear, "_can_prepack", lambda dtype: False)
    files = store_in(dtype, bert, bert.with_name(dtype))
    assert_own_their_weights([load(files, [0, 1, 3], dtype)], files)


def assert_own_their_weights(models: Sequence[model.Model], folder: Path) -> None:
    expected = [measure(loaded) for loaded in models]
    model.free_memory()
    for file in (*folder.rglob("*.safetensors"), *folder.rglob("*.bin")):
        assert not is_mapped(file)
        with file.open("r+b") as overwritten:  # in place: a new file would leave the old pages
            overwritten.write(bytes(file.stat().st_size))
    for loaded, values in zip(models, expected, strict=True):
        np.testing.assert_array_equal(measure(loaded), values)


def test_a_model_is_in_its_file_until_it_is_built(bert: Path) -> None:
    loaded = model.Model(find_model(bert), [1], "float32", "cpu", 64)
    assert is_mapped(bert / "model.safetensors")
    model.prepare(loaded, PROBES)
    assert_own_their_weights([loaded], bert)


def test_tied_weights_stay_one_when_they_are_copied(tmp_path: Path) -> None:
    save_file({"w": torch.rand(3, 3)}, tmp_path / "a.safetensors")
    files = MappedFiles([tmp_path / "a.safetensors"])
    both = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    both[0].weight = both[1].weight = torch.nn.Parameter(files.tensors["w"], requires_grad=False)
    expected = files.tensors["w"].clone()
    copy_out(both, files)
    files.close()
    assert not is_mapped(tmp_path / "a.safetensors")
    assert both[0].weight is both[1].weight and torch.equal(both[0].weight, expected)


@pytest.mark.parametrize(
    ("dtypes", "half"),
    [
        ([torch.bfloat16, torch.bfloat16, torch.int64], torch.bfloat16),
        ([torch.float16, torch.float16], torch.float16),
        ([torch.float16, torch.bfloat16], None),
        ([torch.float16, torch.float32], None),
        ([torch.float32, torch.float32], None),
        ([torch.int64], None),
    ],
)
def test_files_are_in_half_precision_if_all_their_weights_are_in_one(
    dtypes: list[torch.dtype], half: torch.dtype | None, tmp_path: Path
) -> None:
    save_file({str(i): torch.ones(3, dtype=t) for i, t in enumerate(dtypes)}, tmp_path / "a")
    assert MappedFiles([tmp_path / "a"]).half == half


def resident(file: Path) -> int:
    """Bytes of ``file`` in the memory of this process."""
    text = Path("/proc/self/smaps").read_text()
    at = text.find(str(file))
    return 0 if at < 0 else 1024 * int(text[text.index("\nRss:", at) :].split()[1])


def test_released_pages_leave_memory_and_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.rand(1 << 20), "b": torch.rand(1 << 20)}, file)
    mapped = MappedFiles([file])
    assert resident(file) < 1 << 20
    sums = {name: float(t.sum()) for name, t in mapped.tensors.items()}
    assert resident(file) >= 8 << 20
    copy = mapped.tensors["b"].clone()
    mapped.release([mapped.tensors["a"], copy, torch.rand(5000)])
    assert 4 << 20 <= resident(file) < 5 << 20
    assert float(copy.sum()) == sums["b"]  # a copy stays as it is
    assert {name: float(t.sum()) for name, t in mapped.tensors.items()} == sums


# --- lending
# ---------------------------------------------------------------------------------------------


def test_one_block_at_a_time_has_its_weights_in_float32() -> None:
    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)]
    own = [w.data.clone().bfloat16() for block in blocks for w in block.parameters()]
    for block in blocks:
        block.requires_grad_(False).bfloat16()
    seen: list[list[torch.dtype]] = []

    def dtypes() -> list[torch.dtype]:
        return [next(block.parameters()).dtype for block in blocks]

    def look(*args: object) -> None:
        seen.append(dtypes())

    for block in blocks:
        block[1].register_forward_pre_hook(look)
    lender = Lender(blocks, torch.device("cpu"), MappedFiles([]))
    x = torch.rand(2, 4)
    with torch.inference_mode():
        for block in (*blocks, blocks[0]):
            x = block(x)
    assert x.dtype == torch.float32
    half, full = torch.bfloat16, torch.float32
    expected = [[full if i == at else half for i in range(3)] for at in (0, 1, 2, 0)]
    assert seen == expected
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        blocks[1](torch.rand(2, 5))  # it keeps its weights for now
    blocks[2](x)
    assert dtypes() == [half] * 3
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        blocks[1](torch.rand(2, 5))
    lender.close()
    weights = [w for block in blocks for w in block.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, own, strict=True))
    with pytest.raises(RuntimeError, match="dtype"):
        blocks[0](x)  # nothing is lent any more
