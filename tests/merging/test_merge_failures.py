"""What a merge refuses, and what is left when it is refused, killed or out of room: nothing, or all of it.

On a run that was trained here on nf4, its own files and its own command line.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import warm_process
from safetensors.torch import load_file, save_file

from pe_dpo.cli import main
from pe_dpo.errors import DiskError, MergeRefused, ModelError, PeDpoError, RunFolderError, UsageError
from pe_dpo.merging import training_base as training_base_module
from pe_dpo.merging import unmerged as unmerged_module
from pe_dpo.merging import write as write_module
from pe_dpo.merging.merge import merge
from pe_dpo.merging.merged_tensor import stochastically_rounded
from pe_dpo.merging.plan import Plan
from pe_dpo.merging.source import open_source
from pe_dpo.merging.training_base import TrainingBase
from pe_dpo.merging.write import write_tensors
from pe_dpo.model import base as base_module
from pe_dpo.model.adapter_config import write_adapter_config
from pe_dpo.model.adapter_files import AdapterFiles, Change
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.quantization import four_bit_layers
from pe_dpo.model.tensor_files import TensorInfo, TensorWriter
from pe_dpo.training.train import train

LAYER = "model.layers.1.mlp.up_proj"
"""One of the fourteen quantized layers."""
KEY = f"base_model.model.{LAYER}"
BOTH_WAYS = pytest.mark.parametrize("pairs", [0, 9])
"""Tensors only, and with the nine held-out pairs: what is wrong must be found either way."""


def train_tiny(tiny_recipe: Callable, folder: Path, *settings: str) -> Path:
    """A run of six steps on a base in a folder of its own beside the run."""
    recipe = tiny_recipe(folder / "run", "train.learning_rate=3.0e-3", *settings)
    return train(recipe).folder


@pytest.fixture(scope="module")
def nf4_run(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tiny_recipe, tmp_path_factory.mktemp("nf4"), "model.quantize=nf4")


@pytest.fixture(scope="module")
def merged(nf4_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is right: the run merged and verified on its nine held-out pairs."""
    return merge(nf4_run, tmp_path_factory.mktemp("merged") / "out").folder


@pytest.fixture
def run(nf4_run: Path, tmp_path: Path) -> Path:
    """A copy of the run to do harm to."""
    return Path(shutil.copytree(nf4_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))


@pytest.fixture
def foreign(run: Path, tiny_pairs: Path) -> tuple[Path, dict[str, Any]]:
    """The same adapter as PEFT alone would have left it, and what must be said of it."""
    for name in ("base.json", "run.json", "recipe.yaml"):
        (run / name).unlink()
    return run, {"quantize": "nf4", "data": str(tiny_pairs / "test.jsonl")}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the base to do harm to."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to merge to, in an empty folder of its own."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@contextmanager
def refused(out: Path, error: type[PeDpoError], *said: str | Path) -> Iterator[None]:
    """The block raises this error, which says all of this; nothing is left where the model was to appear."""
    with pytest.raises(error) as caught:
        yield
    missing = [str(part) for part in said if str(part) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert list(out.parent.iterdir()) == []


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def rewrite_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def flip(file: Path, name: str, *, byte: int, bit: int) -> None:
    """Flip a bit of one byte of a tensor's data, in place."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[name]["data_offsets"][0] + byte] ^= 1 << bit
    file.write_bytes(content)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str]:
    """Exit code of `pe-dpo merge`, and what it said of errors."""
    monkeypatch.setattr(sys, "argv", ["pe-dpo", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().err


# The adapter


@pytest.mark.slow
@BOTH_WAYS
def test_a_layer_dropped_from_the_adapter_is_refused_by_name(run: Path, out: Path, pairs: int) -> None:
    rewrite(run / "adapter_model.safetensors", lambda it: [it.pop(f"{KEY}.lora_{part}.weight") for part in "AB"])
    with refused(out, ModelError, f"{run}: 2 tensors of the adapter are missing", f"{KEY}.lora_A.weight", "another copy"):
        merge(run, out, pairs=pairs)


@BOTH_WAYS
@pytest.mark.parametrize("part", "AB")
@pytest.mark.slow
def test_half_an_update_is_refused_by_name(run: Path, out: Path, pairs: int, part: str) -> None:
    rewrite(run / "adapter_model.safetensors", lambda it: it.pop(f"{KEY}.lora_{part}.weight"))
    with refused(out, ModelError, f"{run}: 1 tensors of the adapter are missing", f"{KEY}.lora_{part}.weight", "another copy"):
        merge(run, out, pairs=pairs)


@pytest.mark.parametrize(
    "names",
    [
        ["junk"],
        ["base_model.model.junk.weight"],
        [
            "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight",
            "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight",
        ],
        [f"{KEY}.lora_A.default.weight"],
        [f"{KEY}.lora_C.weight"],
        ["base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"],
        ["base_model.model.model.norm.weight"],
    ],
    ids=["no name", "no module", "no layer", "an adapter's name in it", "no part", "a layer not trained", "a norm not trained"],
)
def test_a_tensor_too_many_is_refused_by_name(foreign: tuple[Path, dict[str, Any]], out: Path, names: list[str]) -> None:
    """Each fits the shapes of the base; PEFT ignores all of them as it loads, so that they were in no training's π."""
    folder, known = foreign
    shapes = {"lm_head.lora_A": (4, 64), "lm_head.lora_B": (320, 4), "norm": (64,)}
    shape = {name: next((size for part, size in shapes.items() if part in name), (4, 64)) for name in names}
    rewrite(folder / "adapter_model.safetensors", lambda it: it.update({name: torch.ones(shape[name]) for name in names}))
    with refused(out, ModelError, names[0]):
        merge(folder, out, pairs=0, **{**known, "quantize": "none"})


@BOTH_WAYS
@pytest.mark.parametrize("bit", [0, 6])
def test_a_flipped_bit_in_the_adapter_is_refused(run: Path, out: Path, pairs: int, bit: int) -> None:
    file = run / "adapter_model.safetensors"
    flip(file, f"{KEY}.lora_B.weight", byte=3, bit=bit)
    with refused(out, ModelError, f"{file}: is not what training wrote (sha256); take another copy of the run"):
        merge(run, out, pairs=pairs)


@BOTH_WAYS
def test_an_adapter_whose_rank_is_not_that_of_its_configuration_is_refused(
    foreign: tuple[Path, dict[str, Any]], out: Path, pairs: int
) -> None:
    """r = 4 and alpha = 8 in the file: with r = 8 written beside them every update would be halved."""
    folder, known = foreign
    rewrite_json(folder / "adapter_config.json", r=8)
    with refused(out, ModelError, folder):
        merge(folder, out, pairs=pairs, **known)


@BOTH_WAYS
def test_an_adapter_of_a_wider_base_is_refused(foreign: tuple[Path, dict[str, Any]], base: Path, out: Path, pairs: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder, known = foreign
    config = LlamaConfig.from_pretrained(base, hidden_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    with refused(out, ModelError, folder):
        merge(folder, out, pairs=pairs, base=str(base), **known)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_an_adapter_file_that_is_cut_or_gone_is_refused(run: Path, out: Path, damage: str) -> None:
    file = run / "adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(content[:-100])
    with refused(out, PeDpoError, run):
        merge(run, out, pairs=0)


# The base


@BOTH_WAYS
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_another_base_of_the_same_shapes_is_refused(run: Path, base: Path, out: Path, pairs: int, onto: Any) -> None:
    rewrite(base / "model.safetensors", lambda it: it.update({name: tensor + 0.01 for name, tensor in it.items()}))
    with refused(out, ModelError, base, "sha256", "restore the base"):
        merge(run, out, pairs=pairs, base=str(base), onto=onto)


@pytest.mark.slow
@BOTH_WAYS
@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize(
    ("tensor", "byte", "bit"),
    [
        (f"{LAYER}.weight", 3, 5),
        ("model.embed_tokens.weight", 3, 0),
        ("model.embed_tokens.weight", 0, 0),
        ("model.norm.weight", 0, 0),
    ],
    ids=["exponent of a 4-bit one", "exponent of a plain one", "last bit of the embedding", "last bit of a norm"],
)
def test_one_flipped_bit_in_the_base_is_refused(
    run: Path, base: Path, out: Path, pairs: int, onto: Any, tensor: str, byte: int, bit: int
) -> None:
    """Named is the tensor, or where only bytes can tell, the file."""
    flip(base / "model.safetensors", tensor, byte=byte, bit=bit)
    where = tensor if onto == "dequantized" else base / "model.safetensors"
    with refused(out, ModelError, where, "sha256", "restore the base"):
        merge(run, out, pairs=pairs, base=str(base), onto=onto)


@pytest.mark.slow
def test_a_last_bit_that_no_code_depends_on_is_refused_onto_the_original_and_is_nothing_onto_the_codes(
    run: Path, base: Path, merged: Path, out: Path
) -> None:
    """The 4-bit codes are the same, so what was trained is the same, and so is every byte of the merged model."""
    flip(base / "model.safetensors", f"{LAYER}.weight", byte=0, bit=0)
    with refused(out, ModelError, base / "model.safetensors", "is not the file of training (sha256)", "name it with `base`"):
        merge(run, out, pairs=0, base=str(base), onto="original")
    result = merge(run, out, pairs=0, base=str(base))
    assert (result.folder / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


@pytest.mark.slow
@BOTH_WAYS
@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("change", [{"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}])
def test_a_base_whose_configuration_computes_something_else_is_refused(
    run: Path, base: Path, out: Path, pairs: int, onto: Any, change: dict[str, Any]
) -> None:
    """The same weights with another norm or another rotation are another model."""
    rewrite_json(base / "config.json", **change)
    with refused(out, ModelError, "config.json"):
        merge(run, out, pairs=pairs, base=str(base), onto=onto)


@pytest.mark.slow
@BOTH_WAYS
def test_the_same_base_in_other_shards_is_the_same_base(run: Path, base: Path, merged: Path, out: Path, pairs: int) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="150KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    assert len(list(base.glob("*.safetensors"))) > 2
    shutil.copy(merged / "config.json", base / "config.json")
    tensors = load_file(merge(run, out, pairs=pairs, base=str(base)).folder / "model.safetensors")
    wanted = load_file(merged / "model.safetensors")
    assert all(torch.equal(tensors[name], wanted[name]) for name in {*tensors, *wanted})


@pytest.mark.slow
@BOTH_WAYS
@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("damage", ["a shard gone", "a shard cut", "the file cut", "the header cut", "the file gone"])
def test_a_base_that_is_not_whole_is_refused_by_file(
    run: Path, base: Path, out: Path, pairs: int, onto: Any, damage: str
) -> None:
    from transformers import AutoModelForCausalLM

    file = base / "model.safetensors"
    if "shard" in damage:
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="150KB")
        file.unlink(missing_ok=True)
        file = sorted(base.glob("*.safetensors"))[1]
    content = file.read_bytes()
    if "gone" in damage:
        file.unlink()
    else:
        file.write_bytes(content[: 30 if "header" in damage else -30])
    with refused(out, ModelError, base, file.name):
        merge(run, out, pairs=pairs, base=str(base), onto=onto)


@pytest.mark.slow
@BOTH_WAYS
@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("tensor", ["model.norm.weight", f"{LAYER}.weight"])
def test_a_base_that_lacks_a_tensor_is_refused_by_name(
    run: Path, base: Path, out: Path, pairs: int, onto: Any, tensor: str
) -> None:
    """Also the one that no update is for, and that only a server would miss."""
    rewrite(base / "model.safetensors", lambda it: it.pop(tensor))
    said = [tensor] if onto == "dequantized" else []
    with refused(out, ModelError, *said):
        merge(run, out, pairs=pairs, base=str(base), onto=onto)


def test_a_base_that_lacks_a_tensor_is_refused_for_a_foreign_adapter_too(
    foreign: tuple[Path, dict[str, Any]], base: Path, out: Path
) -> None:
    folder, known = foreign
    rewrite(base / "model.safetensors", lambda it: it.pop("model.norm.weight"))
    with refused(out, ModelError, "model.norm.weight"):
        merge(folder, out, pairs=0, base=str(base), **{**known, "quantize": "none"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: json.dumps({**json.loads(text), "tensors": []}),
        lambda text: json.dumps({**json.loads(text), "dtype": "float99"}),
        lambda text: json.dumps({**json.loads(text), "quantize": "nf5"}),
    ],
    ids=["empty", "cut", "a list", "null", "nothing in it", "tensors a list", "no dtype", "no quantization"],
)
@BOTH_WAYS
def test_a_damaged_base_json_is_refused_by_name(run: Path, out: Path, pairs: int, damage: Callable[[str], str]) -> None:
    file = run / "base.json"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    with refused(out, ModelError, file):
        merge(run, out, pairs=pairs)


@pytest.mark.slow
@BOTH_WAYS
@pytest.mark.parametrize(
    "change",
    [
        lambda it: it["tensors"].clear(),
        lambda it: it["tensors"].pop(f"{LAYER}.weight"),
        lambda it: it["tensors"].update({f"{LAYER}.weight": "0" * 64}),
        lambda it: it.update(quantize="nf4-single"),
        lambda it: it.update(quantize="none"),
        lambda it: it.update(dtype="bfloat16"),
    ],
    ids=["no hashes", "a hash gone", "a hash changed", "another quantization", "no quantization", "dtype"],
)
def test_a_base_json_that_says_something_else_is_refused(
    run: Path, out: Path, pairs: int, change: Callable[[dict[str, Any]], Any]
) -> None:
    record = json.loads((run / "base.json").read_text(encoding="utf-8"))
    change(record)
    (run / "base.json").write_text(json.dumps(record), encoding="utf-8")
    with refused(out, ModelError):
        merge(run, out, pairs=pairs)


@pytest.mark.slow
def test_which_layers_were_quantized_is_read_from_the_loaded_base_where_it_is_loaded(
    run: Path, merged: Path, out: Path
) -> None:
    """Tensors only, the record decides; a layer that is gone from it is refused there, by its hash."""
    record = json.loads((run / "base.json").read_text(encoding="utf-8"))
    record["quantized_layers"].remove(LAYER)
    (run / "base.json").write_text(json.dumps(record), encoding="utf-8")
    with refused(out, ModelError, f"{LAYER}.weight is not what the adapter was trained on"):
        merge(run, out, pairs=0)
    merge(run, out)
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_a_run_without_base_json_says_what_is_missing(run: Path, out: Path) -> None:
    (run / "base.json").unlink()
    with refused(out, UsageError, run, "say it with `quantize`"):
        merge(run, out)


# Tokenizer and chat template


@BOTH_WAYS
def test_a_changed_chat_template_is_refused(run: Path, out: Path, pairs: int) -> None:
    file = run / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("<|im_end|>\n", "<|im_end|>"), encoding="utf-8")
    with refused(
        out, ModelError, f"{run}: its chat template is not the one of training (sha256); restore the files of the run"
    ):
        merge(run, out, pairs=pairs)


@BOTH_WAYS
def test_a_changed_vocabulary_is_refused(run: Path, out: Path, pairs: int) -> None:
    content = json.loads((run / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (run / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with refused(out, ModelError, f"{run}: its tokenizer is not the one of training (sha256); restore the files of the run"):
        merge(run, out, pairs=pairs)


def test_another_end_token_is_refused(run: Path, out: Path) -> None:
    """A server stops there."""
    rewrite_json(run / "tokenizer_config.json", eos_token="<|pad|>")
    with refused(out, ModelError, run, "tokenizer"):
        merge(run, out, pairs=0)


# Faults of the merge itself


class DamagingWriter(TensorWriter):
    """Hands one other byte to the disk than it was handed."""

    def _append(self, data: Any) -> None:
        super()._append(data)
        if len(data) > 10_000:
            self._open[1].seek(-5, os.SEEK_END)
            self._open[1].write(b"!")
            self._open[1].seek(0, os.SEEK_END)


@BOTH_WAYS
@pytest.mark.slow
def test_a_byte_that_does_not_read_back_from_disk_is_refused(
    nf4_run: Path, out: Path, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "TensorWriter", DamagingWriter)
    with refused(out, ModelError, "model.safetensors: does not read back from disk as it was written; look at the disk"):
        merge(nf4_run, out, pairs=pairs)


def change_updates(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Let the merge do something else to LAYER than what the adapter says, given W and W + ΔW."""
    updated = AdapterFiles.updated

    def wrong(self: AdapterFiles, which: Change, weight: torch.Tensor) -> torch.Tensor:
        right = updated(self, which, weight)
        return change(weight, right) if which.a and which.a.startswith(KEY) else right

    monkeypatch.setattr(AdapterFiles, "updated", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "change"),
    [
        (9, lambda old, new: old),
        (0, lambda old, new: old),
        (0, lambda old, new: 2 * new - old),
        (0, lambda old, new: 2 * old - new),
        (0, lambda old, new: new.roll(1, 0)),
    ],
    ids=["left out, with pairs", "left out", "added twice", "subtracted", "in other rows"],
)
def test_one_tensor_whose_update_is_not_the_adapters_is_refused_by_name(
    nf4_run: Path, out: Path, pairs: int, change: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_updates(monkeypatch, change)
    with refused(out, MergeRefused, f"{out}: was not written", f"{LAYER}.weight: ", "of its update kept"):
        merge(nf4_run, out, pairs=pairs)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scaling_that_is_wrong_everywhere_is_refused_by_what_the_model_does(
    nf4_run: Path, out: Path, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update and its own check go wrong together; the trained model on the pairs does not."""
    scaling = AdapterFiles._scaling
    monkeypatch.setattr(AdapterFiles, "_scaling", lambda self, module: factor * scaling(self, module))
    with refused(out, MergeRefused, f"{out}: was not written", "KL(trained ‖ merged)", "of the preference shift kept"):
        merge(nf4_run, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [lambda right: right.roll(1), lambda right: right.flip(0), lambda right: 2 * right],
    ids=["codes shifted by one", "rows upside down", "scales twice too large"],
)
def test_a_wrong_quantization_round_trip_of_one_tensor_is_refused(
    nf4_run: Path, out: Path, wrong: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes are right and only what they are read as is wrong, so that no hash can tell; the pairs can."""
    right, seen = training_base_module.dequantized, []

    def dequantized(parameter: Any) -> torch.Tensor:
        seen.append(right(parameter))
        return wrong(seen[-1]) if len(seen) == 3 else seen[-1]

    monkeypatch.setattr(training_base_module, "dequantized", dequantized)
    with refused(out, MergeRefused, f"{out}: was not written", "KL(trained ‖ merged)"):
        merge(nf4_run, out)
    assert len(seen) == 14


@pytest.mark.slow
def test_force_writes_what_failed_with_the_faults_in_report_and_card(
    nf4_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    scaling = AdapterFiles._scaling
    monkeypatch.setattr(AdapterFiles, "_scaling", lambda self, module: 2 * scaling(self, module))
    code, said = command(capsys, monkeypatch, nf4_run, "-o", out, "--pairs", 9, "--force")
    assert code == 0, said
    report = json.loads((out / "merge_report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "written by force" and report["faults"]
    assert report["held_out"]["shift_kept"] > 1.1
    card = (out / "README.md").read_text(encoding="utf-8")
    assert all(fault in card for fault in report["faults"])
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32


@pytest.mark.slow
def test_a_weight_beyond_the_range_of_fp16_is_refused_by_name(
    tiny_recipe: Callable, base: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unused row of the embedding holds 70000; the largest number of fp16 is 65504."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][300] = 70_000.0

    rewrite(base / "model.safetensors", enlarge)
    run = train_tiny(tiny_recipe, tmp_path / "large", f"model.base={base}", "model.quantize=nf4", "train.max_steps=1")
    with refused(
        out, ModelError, "model.embed_tokens.weight: would not be finite in torch.float16", "write `dtype` bf16 or fp32"
    ):
        merge(run, out, pairs=0, dtype="fp16")
    merge(run, out, pairs=0, dtype="bf16")


@pytest.mark.slow
def test_an_int8_run_onto_its_codes_is_refused_with_the_reason(tiny_recipe: Callable, tmp_path: Path, out: Path) -> None:
    run = train_tiny(tiny_recipe, tmp_path / "int8", "model.quantize=int8", "train.max_steps=1")
    with refused(out, ModelError, "int8 also rounds what flows through a layer", "`onto` original", "`onto` adapter"):
        merge(run, out)
    assert merge(run, out, onto="original", pairs=0).report["base"]["quantize_in_training"] == "int8"


# The command line


@pytest.mark.parametrize(
    ("option", "known"),
    [
        (("--onto", "dequantised"), "dequantized, original, adapter"),
        (("--dtype", "float16"), "auto, bf16, fp16, fp32"),
        (("--rounding", "up"), "auto, nearest, stochastic"),
        (("--quantize", "4bit"), "nf4, nf4-single, fp4, fp4-single, int8, none"),
        (("--pairs", "-1"), "--pairs"),
    ],
)
def test_an_unknown_value_exits_2_and_names_the_known_ones(
    nf4_run: Path,
    out: Path,
    option: tuple[str, str],
    known: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, said = command(capsys, monkeypatch, nf4_run, "-o", out, *option)
    assert (code, list(out.parent.iterdir())) == (2, [])
    assert option[0] in said and known in said


def test_a_foreign_adapter_without_its_quantization_exits_2(
    foreign: tuple[Path, dict[str, Any]], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = command(capsys, monkeypatch, foreign[0], "-o", out, "--data", foreign[1]["data"])
    assert (code, list(out.parent.iterdir())) == (2, [])
    assert "say it with --quantize nf4, nf4-single (without double quantization), int8 or none" in said


def test_a_foreign_adapter_without_pairs_exits_2(
    foreign: tuple[Path, dict[str, Any]], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = command(capsys, monkeypatch, foreign[0], "-o", out, "--quantize", "nf4")
    assert (code, list(out.parent.iterdir())) == (2, [])
    assert "name some with --data, or --pairs 0" in said


@pytest.mark.parametrize("taken", ["full", "file", "no parent"])
@pytest.mark.parametrize("onto", ["dequantized", "adapter"])
def test_a_place_that_is_taken_exits_2_and_stays_as_it_is(
    nf4_run: Path, out: Path, taken: str, onto: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if taken == "full":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    elif taken == "file":
        out.write_text("years of work")
    else:
        out = out.parent / "none" / "out"
    before = sorted(path for path in out.parent.rglob("*"))
    code, said = command(capsys, monkeypatch, nf4_run, "-o", out, "--onto", onto)
    assert code == 2
    assert {"full": "is not empty", "file": "is a file", "no parent": "make it first"}[taken] in said
    assert sorted(path for path in out.parent.rglob("*")) == before


@pytest.mark.parametrize("harm", ["adapter", "base", "template"])
def test_what_is_refused_exits_1_with_one_error_and_no_traceback(
    run: Path, base: Path, out: Path, harm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if harm == "adapter":
        flip(run / "adapter_model.safetensors", f"{KEY}.lora_A.weight", byte=0, bit=0)
    elif harm == "base":
        flip(base / "model.safetensors", f"{LAYER}.weight", byte=3, bit=5)
    else:
        (run / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    code, said = command(capsys, monkeypatch, run, "-o", out, "--base", base)
    assert (code, list(out.parent.iterdir())) == (1, [])
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said


@pytest.mark.slow
def test_two_merges_into_one_place_at_a_time_are_refused(
    nf4_run: Path, out: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first writes; the first does not notice."""
    write, refusals = write_module.write_tensors, []

    def second_comes(*args: Any, **settings: Any) -> Any:
        with pytest.raises(RunFolderError, match="another run is writing there") as caught:
            merge(nf4_run, out, pairs=0)
        refusals.append(caught.value.exit_code)
        return write(*args, **settings)

    monkeypatch.setattr(write_module, "write_tensors", second_comes)
    merge(nf4_run, out, pairs=0)
    assert refusals == [2]
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# Disks that are full


def test_a_merge_that_cannot_fit_is_refused_before_anything_is_written(
    nf4_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """115,008 float32 weights need 460,032 bytes."""
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=460_031))
    with refused(out, DiskError, f"{out}: the merged model takes 0.5 MB, and 0.5 MB are free there"):
        merge(nf4_run, out, pairs=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=460_032))
    merge(nf4_run, out, pairs=0)


class FullDisk:
    """A file on a disk with room for some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 3000, 200_000])
def test_a_disk_that_fills_up_while_weights_are_written_leaves_nothing_and_the_next_merge_succeeds(
    nf4_run: Path, out: Path, merged: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writer(TensorWriter):
        def _append(self, data: Any) -> None:
            if not isinstance(self._open[1], FullDisk):
                self._open = self._open[0], FullDisk(self._open[1], room)
            super()._append(data)

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "TensorWriter", Writer)
        with refused(out, DiskError, f"{out}: the disk is full (", "nothing was left there"):
            merge(nf4_run, out, pairs=0)
    merge(nf4_run, out, pairs=0)
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", ".merge_report.json.partial", "README.md"])
def test_a_disk_that_fills_up_beside_the_weights_leaves_nothing(
    nf4_run: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real error of the system, in whatever library writes the file: a link to a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    write = write_module.write_tensors

    def then_full(plan: Plan, writer: TensorWriter, base: TrainingBase) -> Any:
        (writer.folder / name).symlink_to("/dev/full")
        return write(plan, writer, base)

    monkeypatch.setattr(write_module, "write_tensors", then_full)
    with refused(out, DiskError, "the disk is full (", "nothing was left there"):
        merge(nf4_run, out, pairs=0)


MERGE = """
import json, os, resource, sys
from pathlib import Path
from pe_dpo.merging.merge import merge

def peak_kilobytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)

run, out, pairs, most_bytes, tiny_run = json.loads(sys.argv[1])
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars would meet the limit first
if tiny_run:
    merge(tiny_run, out + "-warm", pairs=0)
before, limits = peak_kilobytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
if most_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
said, code = "", 0
try:
    merge(run, out, pairs=pairs, allow_base_mismatch=bool(tiny_run))
except Exception as error:
    code, said = getattr(error, "exit_code", 70), f"{type(error).__name__}: {error}"
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
print(json.dumps({"said": said, "peak_bytes": 1024 * (peak_kilobytes() - before)}), flush=True)
sys.exit(code)
"""
"""Merges in a process of its own, which can be killed and measured; its peak counts from what a merge of a tiny run takes."""


class Ended(NamedTuple):
    """How a merge in a process of its own ended."""

    code: int
    said: str
    peak_bytes: int


def start_merge(
    run: Path, out: Path, folder: Path, *, pairs: int, most_bytes: int = 0, tiny_run: Path | None = None
) -> BaseProcess:
    """Begin a merge in a process of its own, which leaves what it has to say in a folder."""
    return warm_process.start(MERGE, json.dumps([str(run), str(out), pairs, most_bytes, str(tiny_run or "")]), folder=folder)


def merge_apart(run: Path, out: Path, folder: Path, **settings: Any) -> Ended:
    """Merge in a process of its own, and return how it ended."""
    process = start_merge(run, out, folder, **settings)
    process.join()
    lines = warm_process.log(process, folder).read_text().splitlines()
    assert process.exitcode is not None and lines, process.exitcode
    return Ended(process.exitcode, **json.loads(lines[-1]))


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_one_error_and_leaves_nothing(
    nf4_run: Path, out: Path, merged: Path, tmp_path: Path
) -> None:
    """The system's own EFBIG. The weights have 462,176 bytes with their header."""
    for most_bytes in (100, 5_000, 462_000):
        ended = merge_apart(nf4_run, out, tmp_path, pairs=0, most_bytes=most_bytes)
        remedy = "raise the limit (ulimit -f), or choose another disk"
        assert ended[:2] == (1, f"DiskError: {out}: a file may not become so large; {remedy}; nothing was left there")
        assert list(out.parent.iterdir()) == []
    assert merge_apart(nf4_run, out, tmp_path, pairs=0).code == 0
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


# The same bits, whatever happened before


@pytest.mark.slow
def test_two_merges_are_the_same_byte_for_byte(nf4_run: Path, merged: Path, tmp_path: Path) -> None:
    again = merge(nf4_run, tmp_path / "out").folder
    assert files_of(again) == files_of(merged)


@pytest.mark.slow
def test_the_seed_decides_every_bit_of_stochastic_rounding(nf4_run: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        done = merge(nf4_run, tmp_path / name, pairs=0, dtype="bf16", rounding="stochastic", seed=seed)
        return load_file(done.folder / "model.safetensors")

    first, again, other = weights("first", 3), weights("again", 3), weights("other", 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if "proj" in name}
    assert first[f"{LAYER}.weight"].dtype == torch.bfloat16


def has_repacking() -> bool:
    from bitsandbytes.nn import Linear4bit

    return bool(getattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu", False))


@pytest.mark.slow
def test_an_evaluation_on_the_cpu_does_not_change_the_merge(
    nf4_run: Path, tiny_base: Path, merged: Path, tmp_path: Path
) -> None:
    """A forward in eval mode without gradients is what makes bitsandbytes repack weights in place."""
    model = load_base(inspect_base(str(tiny_base), quantize="nf4", dtype="float32"))
    layers = len(list(four_bit_layers(model)))
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8)[None])
    again = merge(nf4_run, tmp_path / "out").folder
    assert layers == 14
    assert files_of(again) == files_of(merged)


@pytest.mark.slow
def test_a_base_that_was_repacked_is_refused_by_layer(nf4_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the guard off, on a CPU that repacks; on another one the mark that repacking leaves is set by hand."""
    load, repacks = unmerged_module.load_base, has_repacking()

    def load_packed(facts: Any, **settings: Any) -> Any:
        model = load(facts, **settings)
        if not repacks:
            next(layer for _, layer in four_bit_layers(model)).weight.quant_state.packing_format_for_cpu = True
        return model

    monkeypatch.setattr(base_module, "keep_weights_unpacked", lambda model: None)
    monkeypatch.setattr(unmerged_module, "load_base", load_packed)
    with refused(out, ModelError, "layers.0.", "were repacked for the CPU's inference kernel", "load the base again"):
        merge(nf4_run, out)


# Stochastic rounding


AWKWARD = [0.0, -0.0, 1.0, -1.0, 1.001, -0.3, 3.14159, 1e-3, 255.3, -40_000.7, 65_503.9, 1e-5, -3e-7, 6e-8, 2e-8, -1e-8, 1e-9]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_over_seeds_of_stochastic_rounding_is_the_value_itself(dtype: torch.dtype) -> None:
    """Values of all sizes, subnormal ones of fp16 and of bf16, zeros, and the ends; within 5 standard errors.

    The neighbours come from numpy's float32 and integers, not from torch's rounding.
    """
    generator = np.random.default_rng(0)
    largest = float(torch.finfo(dtype).max)
    tiny = [1e-39, -3e-40] if dtype == torch.bfloat16 else []
    values = torch.tensor([*AWKWARD, *tiny, largest, -largest, *generator.normal(size=40), *(1e-6 * generator.normal(size=20))])
    values = values.float()
    draws = 4000
    seeded = torch.Generator().manual_seed(0)
    rounded = torch.stack([stochastically_rounded(values, dtype, seeded) for _ in range(draws)])
    assert rounded.dtype == dtype and bool(rounded.isfinite().all())
    low, high = rounded.double().amin(0), rounded.double().amax(0)
    assert bool((low <= values.double()).all()) and bool((values.double() <= high).all() | (low == high).any())
    assert bool(torch.stack([(column.unique().numel() <= 2) * torch.tensor(1) for column in rounded.float().T]).all())
    gap = high - low
    error = (rounded.double().mean(0) - values.double()).abs()
    share = torch.where(gap > 0, (values.double() - low) / gap.clamp_min(1e-300), torch.zeros_like(gap))
    standard_error = gap * (share * (1 - share)).clamp_min(1 / draws).sqrt() / draws**0.5
    exactly = values.to(dtype).double() == values.double()
    assert bool((error[exactly] == 0).all())
    one_sided = (gap == 0) & ~exactly  # a chance so small that none of the draws took it
    assert bool((error[one_sided] <= 5 * values.double().abs()[one_sided] / draws + 1e-7 * values.abs()[one_sided]).all())
    assert bool((error[gap > 0] <= 5 * standard_error[gap > 0]).all())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_stochastic_rounding_goes_to_one_of_the_two_neighbours(dtype: torch.dtype, bits: int) -> None:
    """Between 1 and 2 the grid has steps of 2 to the power of 1 − bits."""
    step = 2.0 ** (1 - bits)
    values = 1 + torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 0.999
    for sign in (1, -1):
        rounded = stochastically_rounded(sign * values, dtype, torch.Generator().manual_seed(1)).double() * sign
        below = torch.floor(values.double() / step) * step
        assert bool(((rounded == below) | (rounded == below + step)).all())
        assert abs(float((rounded - values.double()).mean())) < 5 * step / 2 / 100


def test_stochastic_rounding_to_float32_is_none() -> None:
    values = torch.randn(100)
    assert torch.equal(stochastically_rounded(values, torch.float32, torch.Generator()), values)


# Memory


def make_large(folder: Path, tiny_base: Path, *, width: int, layers: int, adapted: int = 0, holes_but_for: str = "") -> Path:
    """A base in several bfloat16 shards of random values, and an adapter for so many of its layers, whose folder is returned.

    Or, but for the one layer named, all zeros that take no room on disk, and an adapter for that layer.
    """
    base, adapter = folder / "base", folder / "adapter"
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").unlink()
    rewrite_json(
        base / "config.json", hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, dtype="bfloat16"
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (320, width), "lm_head.weight": (320, width)}
    linear = {}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        heads = {"q_proj": width, "k_proj": width // 2, "v_proj": width // 2, "o_proj": width}
        own = {f"{name}.self_attn.{part}": (rows, width) for part, rows in heads.items()}
        own |= {f"{name}.mlp.{part}_proj": (4 * width, width) for part in ("gate", "up")}
        own[f"{name}.mlp.down_proj"] = (width, 4 * width)
        shapes |= {f"{name}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
        shapes |= {f"{name}.weight": shape for name, shape in own.items()}
        if layer < adapted or holes_but_for in own:
            linear |= own
    shapes["model.norm.weight"] = (width,)
    facts = [TensorInfo(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    if holes_but_for:
        linear = {holes_but_for: linear[holes_but_for]}
        write_holes(base, facts)
    else:
        pool = torch.randn(4 * width * width, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
        writer = TensorWriter(base, facts, shard_bytes=20 * 10**6)
        for name, shape in shapes.items():
            writer.write(name, pool[: int(np.prod(shape))].reshape(shape))
        writer.close()
    adapter.mkdir()
    write_adapter_config(
        adapter, base=str(base), r=4, lora_alpha=8, target_modules=sorted(linear), lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    tensors = {}
    for name, (rows, columns) in linear.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 1e-3 * torch.randn(rows, 4)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


def write_holes(folder: Path, tensors: list[TensorInfo], shard_bytes: int = 4 * 10**9) -> None:
    """Shards of zeros that take no room on disk: headers, and files made long without writing."""
    from pe_dpo.model.tensor_files import _header

    shards = TensorWriter(folder, tensors, shard_bytes=shard_bytes)._shards
    where = {}
    for number, members in enumerate(shards):
        file = folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        file.write_bytes(_header(members))
        os.truncate(file, file.stat().st_size + sum(facts.bytes for facts in members))
        where |= {facts.name: file.name for facts in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")


def leave_record(adapter: Path, base: Path) -> None:
    """Write base.json beside an adapter as training on nf4 does, with all its layers quantized; without hashes."""
    from pe_dpo.model.base import load_tokenizer
    from pe_dpo.model.provenance import template_fingerprint, tokenizer_fingerprint

    tokenizer = load_tokenizer(str(base))
    layers = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    record = {
        "id": str(base), "revision": None, "quantize": "nf4", "dtype": "bfloat16", "device": "cpu", "tensors": {},
        "files": {}, "config": "", "quantized_layers": layers, "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": template_fingerprint(tokenizer),
    }  # fmt: skip
    (adapter / "base.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of a process from /proc")
def test_the_memory_of_a_merge_is_that_of_its_largest_tensor(nf4_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """A model of 90 times its largest tensor: 190 MB of bfloat16, and 2.1 MB. Of 24 layers six are quantized and adapted.

    Stochastic rounding holds about 12 float32 copies of one tensor, so 25 times its bfloat16; bitsandbytes' quantization on the
    CPU compares each number with all 16 codes at once, which is 32 times.
    """
    width = 512
    adapter = make_large(tmp_path, tiny_base, width=width, layers=24, adapted=6)
    leave_record(adapter, tmp_path / "base")
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    largest = 2 * width * 4 * width
    ended = merge_apart(adapter, tmp_path / "out", tmp_path, pairs=0, tiny_run=nf4_run)
    assert ended.code == 0, ended.said
    assert size > 80 * largest
    assert 2 * largest < ended.peak_bytes < 45 * largest, (ended.peak_bytes, largest, size)


class Discard:
    """Stands in for the writer: counts bytes, and looks how much memory is taken each time."""

    def __init__(self) -> None:
        self.bytes, self.most_resident = 0, 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.bytes += tensor.nbytes
        self.most_resident = max(self.most_resident, resident_bytes())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory of this process from /proc")
def test_a_model_of_tens_of_gigabytes_is_planned_whole_and_streams(tiny_base: Path, tmp_path: Path) -> None:
    """24 GB of zeros in seven shards that take no room on disk. All of it is planned; its last 0.25 GB stream through.

    The rest is left out for its time alone: reading zeros and looking whether they are finite takes seconds per GB on one core.
    Tensors are so large that malloc gives back at once what is made of them.
    """
    layer = "model.layers.9.self_attn.k_proj"
    adapter = make_large(tmp_path, tiny_base, width=3072, layers=86, holes_but_for=layer)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 7
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "base").iterdir()) < 10**6
    with open_source(adapter, base=str(tmp_path / "base"), quantize="none", pairs=0) as source:
        plan = Plan(source, dtype="bf16", rounding="nearest")
    # A layer has q, o: 3072², k, v: half of it, three of 4 · 3072² and two norms; outside embedding, head, norm.
    assert sum(tensor.facts.bytes for tensor in plan.tensors) == 2 * (86 * (15 * 3072**2 + 2 * 3072) + 2 * 320 * 3072 + 3072)
    [changed] = [tensor for tensor in plan.tensors if tensor.change]
    assert changed.facts.name == f"{layer}.weight"
    streamed, writer = [changed], Discard()
    for tensor in reversed(plan.tensors):
        if sum(one.facts.bytes for one in streamed) < 0.25e9:
            streamed.append(tensor)
    plan.tensors = streamed
    before = resident_bytes()
    [report] = write_tensors(plan, writer, TrainingBase(source, (), {}, torch.device("cpu")))
    largest = 2 * 4 * 3072**2
    assert writer.bytes > 0.25e9
    assert writer.most_resident - before < 3 * largest
    assert report.name == changed.facts.name and report.kept == pytest.approx(1, abs=0.01)
