"""Weights on disk, tensor by tensor: what we write others read bit for bit, and what is damaged is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pe_dpo.errors import ModelError
from pe_dpo.model.tensor_files import DTYPES, TensorFiles, TensorInfo, TensorWriter

EVERY_KIND = {
    **{f"of.{name}": torch.tensor([[0, 1, 2], [3, 1, 0]]).to(dtype) for name, dtype in DTYPES.items()},
    "number": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
    "odd": torch.arange(3, dtype=torch.uint8),
    "special": torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1e-45]),
    "seen the other way": torch.arange(6.0).reshape(2, 3).T,
}


def facts_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings: int) -> TensorWriter:
    writer = TensorWriter(folder, facts_of(tensors), **settings)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    return writer


def bits(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    """Shape, dtype and bytes; NaN is equal to itself here."""
    return tuple(tensor.shape), tensor.dtype, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(tensor) for name, tensor in wanted.items()}


def test_every_dtype_and_shape_comes_back_bit_for_bit_through_safetensors_own_reader(tmp_path: Path) -> None:
    write(tmp_path, EVERY_KIND)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), EVERY_KIND)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_what_safetensors_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in EVERY_KIND.items()}
    save_file(whole, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert_same({facts.name: files.read(facts.name) for facts in files}, whole)
    assert sorted(files) == sorted(facts_of(whole))
    assert "number" in files and "none" not in files


def test_the_bytes_of_a_tensor_are_its_elements_times_their_size() -> None:
    assert TensorInfo("a", (2, 3), torch.bfloat16).bytes == 12
    assert TensorInfo("number", (), torch.float64).bytes == 8
    assert TensorInfo("empty", (0, 7), torch.float32).bytes == 0


def test_no_shard_is_larger_than_asked_and_the_index_says_where_each_tensor_lies(tmp_path: Path) -> None:
    """40, 40, 40, 200 and 4 bytes in shards of 100: two, one, the large one alone, the last."""
    sizes = {"a": 10, "b": 10, "c": 10, "large": 50, "last": 1}
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    writer = write(tmp_path, tensors, shard_bytes=100)
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    where = dict(zip(sizes, (names[0], names[0], names[1], names[2], names[3]), strict=True))
    assert index == {"metadata": {"total_size": 324}, "weight_map": where}
    assert sorted(writer.hashes) == names
    for file in names:
        assert sorted(load_file(tmp_path / file)) == sorted(name for name, place in where.items() if place == file)
    files = TensorFiles(tmp_path)
    assert_same({facts.name: files.read(facts.name) for facts in files}, tensors)
    assert files.file_of["large"] == tmp_path / names[2]


def test_a_sharded_model_loads_in_transformers(tmp_path: Path, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny_base / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    write(tmp_path, tensors, shard_bytes=150_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    import hashlib

    writer = write(tmp_path, {"a": torch.arange(9.0), "b": torch.arange(5)}, shard_bytes=40)
    assert len(writer.hashes) == 2
    for name, value in writer.hashes.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == value


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.zeros(2, 3)), ("a", torch.zeros(3, 2)), ("a", torch.zeros(2, 3, dtype=torch.float16)), ("c", torch.zeros(6))],
    ids=["order", "shape", "dtype", "name"],
)
def test_what_was_not_announced_is_not_written(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    writer = TensorWriter(tmp_path, facts_of({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match=f"{name} .* is written where .*'a'.* was announced"):
        writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_too_many_or_too_few_is_our_mistake(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, facts_of({"a": torch.zeros(1), "b": torch.zeros(1)}))
    writer.write("a", torch.zeros(1))
    with pytest.raises(ValueError, match="b was announced and not written"):
        writer.close()
    writer = TensorWriter(tmp_path, facts_of({"a": torch.zeros(1)}))
    writer.write("a", torch.zeros(1))
    with pytest.raises(ValueError, match="was announced"):
        writer.write("b", torch.zeros(1))
    writer.close()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with model.safetensors of two tensors."""
    save_file({"a": torch.arange(40.0), "b": torch.arange(50.0)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:60],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content.replace(b'"F32"', b'"F99"', 1),
        lambda content: content.replace(b"[40]", b"[41]", 1),
        lambda content: content.replace(b"{", b"[", 1),
        lambda content: (2**62).to_bytes(8, "little") + content[8:],
    ],
    ids=["empty", "no header", "half a header", "a byte short", "a byte long", "dtype", "shape", "no JSON", "endless header"],
)
def test_a_damaged_file_is_refused_by_name(saved: Path, damage) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read \(.*\); fetch the model again"):
        TensorFiles(saved)


def test_a_dtype_that_torch_has_and_we_do_not_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"eight": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: eight has dtype F8_E4M3, which this version does not know"):
        list(TensorFiles(tmp_path))


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(9), "b": torch.zeros(9)}, shard_bytes=40)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: cannot be read .*fetch the model again"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    "index", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": null}']
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    write(tmp_path, {"a": torch.zeros(9), "b": torch.zeros(9)}, shard_bytes=40)
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: is no index of shards .*fetch the model again"):
        TensorFiles(tmp_path)


def test_a_tensor_that_the_index_promises_and_no_shard_has_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(9), "b": torch.zeros(9)}, shard_bytes=40)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="lost"):
        TensorFiles(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor an index of shards there; only safetensors are read"):
        TensorFiles(tmp_path)


def test_a_file_that_was_cut_after_it_was_opened_is_an_error_and_no_crash(saved: Path) -> None:
    files = TensorFiles(saved)
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"model\.safetensors: b cannot be read"):
        files.read("b")


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="looks into /proc")
def test_a_tensor_that_went_out_of_use_leaves_no_mapped_file_and_no_handle(saved: Path) -> None:
    def held() -> list[str]:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        handles = [str(path.resolve()) for path in Path("/proc/self/fd").iterdir()]
        return [line for line in (*maps, *handles) if str(saved) in line]

    files = TensorFiles(saved)
    assert list(files) and held() == []
    tensor = files.read("a")
    assert tensor.sum() == 780  # 0 + … + 39
    del tensor
    assert held() == []


def test_the_writers_files_are_closed_when_they_are_finished(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, facts_of({"a": torch.zeros(9), "b": torch.zeros(9)}), shard_bytes=40)
    for name in ("a", "b"):
        writer.write(name, torch.zeros(9))
    writer.close()
    held = [path.resolve() for path in Path("/proc/self/fd").iterdir()] if Path("/proc/self/fd").is_dir() else []
    assert not [path for path in held if tmp_path in path.parents]
