"""`pe-dpo serve`: the commands it prints for a run, for what was made of it, and for others; it loads and starts nothing."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from pe_dpo.inference.policy import load_policy

IDS = torch.arange(1, 100).view(1, -1)


@pytest.fixture(scope="module")
def said():
    """The last lines of the commands that made what is served."""
    return {}


@pytest.fixture(scope="module")
def run(pe_dpo, recipe_file, said, tmp_path_factory):
    folder = tmp_path_factory.mktemp("it's mine") / "nf4"
    done = pe_dpo("train", recipe_file, "-o", folder, "--set", "model.quantize=nf4", "--set", "train.max_steps=1")
    said["train"] = done.out.splitlines()[-3:]
    return folder


@pytest.fixture(scope="module")
def merged(pe_dpo, run, said, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tuned"
    said["merge"] = pe_dpo("merge", run, "-o", folder, "--pairs", 0).out.splitlines()[-1]
    return folder


@pytest.fixture(scope="module")
def package(pe_dpo, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "package"
    assert pe_dpo("merge", run, "-o", folder, "--onto", "adapter").code == 0
    return folder


def parts(out):
    """What is printed under each heading: the commands as a shell reads them, other lines, and the reasons as one text."""
    found, name = {}, ""
    for line in out.splitlines():
        if line.startswith("# ") and not line.startswith("#   "):
            name = line.removeprefix("# ")
            found[name] = {"commands": [], "lines": [], "why": ""}
        elif line.startswith("#   "):
            found[name]["why"] += line.removeprefix("#   ") + " "
        elif line.startswith(("pe-dpo ", "vllm ", "llama-server ", "transformers ")):
            found[name]["commands"].append(shlex.split(line))
        else:
            found[name]["lines"].append(line)
    return found


NOT = "not these: they answer as another model, without an error"


@pytest.mark.slow
def test_a_run_is_merged_first_and_its_adapter_loaded_as_in_training(pe_dpo, run, tiny_base):
    done = pe_dpo("serve", run, columns=80)
    assert (done.code, done.err) == (0, "")
    found = parts(done.out)
    assert list(found) == [f"{run}: a run on {tiny_base} (nf4, float32)", "vLLM", "llama.cpp", "transformers", NOT]
    assert found["vLLM"]["commands"] == [
        ["pe-dpo", "merge", str(run), "-o", "TUNED"],
        ["vllm", "serve", "TUNED"],
        ["pe-dpo", "merge", str(run), "-o", "ADAPTER", "--onto", "adapter"],
        ["pe-dpo", "serve", str(run), "ADAPTER"],
    ]
    assert found["llama.cpp"]["commands"] == [
        ["pe-dpo", "export", "TUNED", "-o", "GGUF", "--gguf", "q8_0"],
        ["llama-server", "-m", "GGUF/GGUF.gguf"],
        ["pe-dpo", "export", str(run), "--gguf-lora", "-o", "LORA.gguf"],
    ]
    assert found["transformers"]["commands"] == [["transformers", "serve", "TUNED"]]
    loaded = {}
    exec("\n".join(found["transformers"]["lines"]), loaded)
    with torch.no_grad():
        assert (loaded["model"](IDS).logits - load_policy(run).model(IDS).logits).abs().max() < 1e-5
    assert "They load the base without its nf4 codes." in found[NOT]["why"]
    assert "A LoRA file for llama.cpp over a GGUF file of the 16-bit base" in found[NOT]["why"]
    assert f"  pipeline('text-generation', {str(run)!r})" in found[NOT]["why"]
    prose = [line for line in done.out.splitlines() if line.startswith("#   ") and str(run) not in line]
    assert prose and max(map(len, prose)) <= 80


def test_what_was_made_of_a_run_takes_its_place_in_the_commands(pe_dpo, run, merged, package, tmp_path):
    gguf = tmp_path / "a gguf"
    gguf.mkdir()
    (gguf / "tuned.gguf").write_bytes(b"GGUF")
    found = parts(pe_dpo("serve", run, gguf, merged, package).out)
    unknown = "Nothing there tells of which adapter it was made (merge_report.json), or whether of one at all."
    assert unknown in found["llama.cpp"]["why"]
    shutil.copy(merged / "merge_report.json", gguf)  # as an export does
    assert unknown not in pe_dpo("serve", run, gguf).out.replace("\n#   ", " ")
    adapters = found["vLLM"]["commands"].pop()
    assert found["vLLM"]["commands"] == [["vllm", "serve", str(merged)]]
    assert "Of its merge: has the update in its files; not verified on pairs." in found["vLLM"]["why"]
    assert adapters[:5] == ["vllm", "serve", json.loads((run / "base.json").read_text())["id"], "--tokenizer", str(package)]
    assert adapters[-2:] == ["--lora-modules", f"tuned={package}"] and "bitsandbytes" in adapters
    assert found["llama.cpp"]["commands"][0] == ["llama-server", "-m", str(gguf / "tuned.gguf")]
    assert found["transformers"]["commands"] == [["transformers", "serve", str(merged)]]


def test_a_merged_model_and_an_export_need_no_adapter(pe_dpo, merged, tmp_path):
    found = parts(pe_dpo("serve", merged).out)
    assert next(iter(found)).startswith(f"{merged}: a whole model (has the update in its files")
    assert found["vLLM"]["commands"] == [["vllm", "serve", str(merged)]]
    assert found["llama.cpp"]["commands"][0] == ["pe-dpo", "export", str(merged), "-o", "GGUF", "--gguf", "q8_0"]
    assert NOT not in found and "lines" in found["transformers"] and found["transformers"]["lines"] == []
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    found = parts(pe_dpo("serve", tmp_path).out)
    assert list(found)[1:] == ["llama.cpp"]


def test_a_package_whose_base_was_a_folder_says_that_it_must_be_named(pe_dpo, package, tiny_base):
    found = parts(pe_dpo("serve", package).out)
    assert ["pe-dpo", "merge", str(package), "-o", "TUNED", "--base", "BASE"] in found["vLLM"]["commands"]
    assert found["vLLM"]["commands"][-1][:3] == ["vllm", "serve", "BASE"]
    assert f"BASE is where the base of training, {tiny_base.name}, lies now." in found["transformers"]["why"]
    assert "    'BASE'," in found["transformers"]["lines"]


def of_kind(run, folder, **base):
    """A copy of a run whose base.json says something else."""
    shutil.copytree(run, folder)
    record = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(record | base))
    return folder


def test_int8_is_merged_onto_other_weights_which_is_said(pe_dpo, run, tmp_path):
    folder = of_kind(run, tmp_path / "run", quantize="int8")
    found = parts(pe_dpo("serve", folder).out)
    assert found["vLLM"]["commands"][0] == ["pe-dpo", "merge", str(folder), "-o", "TUNED", "--onto", "original"]
    assert "Nothing can be merged into int8 codes." in found["vLLM"]["why"]


def test_without_quantization_nothing_is_quietly_another_model(pe_dpo, run, tmp_path):
    assert NOT not in parts(pe_dpo("serve", of_kind(run, tmp_path / "run", quantize="none")).out)


def test_experts_in_four_bits_are_served_merged_alone(pe_dpo, run, tmp_path):
    folder = of_kind(run, tmp_path / "run", quantized_layers=["model.layers.0.mlp.experts.up_proj"])
    found = parts(pe_dpo("serve", folder).out)
    assert "Not without the merge: experts were trained on in 4 bits" in found["transformers"]["why"]
    assert found["transformers"]["commands"] == [["transformers", "serve", "TUNED"]]


def test_what_a_server_refuses_is_said_with_its_reason(pe_dpo, package, tmp_path):
    remark = "vLLM cannot serve this adapter: it takes ranks up to 512"
    folder = of_kind(package, tmp_path / "package", serving=[{"engine": "vllm", "command": None, "remark": remark}])
    found = parts(pe_dpo("serve", folder).out)
    assert f"Not without the merge: {remark}." in found["vLLM"]["why"]
    assert not [words for words in found["vLLM"]["commands"] if "--lora-modules" in words]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such folder; name a run, a packaged adapter, a merged model or an export"),
        (["EMPTY"], "is neither a run, a packaged adapter, a merged model nor an export"),
        (["RUN", "RUN"], "is a run, as "),
        (["OTHER", "MERGED"], "was made of another adapter than that of "),
        (["OTHER", "EXPORT"], "was made of another adapter than that of "),
        (["OTHER", "PACKAGE"], "was made of another adapter than that of "),
        (["UNFINISHED"], "this run has no adapter yet; finish it with: pe-dpo train "),
        (["FOREIGN"], "no base.json there says how its base was loaded in training"),
    ],
)
def test_what_cannot_be_served_is_one_message(pe_dpo, run, merged, package, tmp_path, arguments, words):
    for name in ("empty", "other", "unfinished", "foreign", "export"):
        (tmp_path / name).mkdir()
    (tmp_path / "export" / "x.gguf").write_bytes(b"GGUF")
    shutil.copy(merged / "merge_report.json", tmp_path / "export")
    other = {"hashes": {"adapter": {"adapter_model.safetensors": "0" * 64}}}
    for name, content in {"other": other, "unfinished": {}}.items():
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    for name in ("other", "foreign"):
        shutil.copy(run / "adapter_model.safetensors", tmp_path / name)
    places = {"RUN": run, "MERGED": merged, "PACKAGE": package}
    done = pe_dpo("serve", *(places.get(word, tmp_path / word.lower() if word.isupper() else word) for word in arguments))
    assert (done.code, done.err.count("error: ")) == (2, 1)
    assert words in done.err


@pytest.mark.slow
def test_it_reads_json_and_imports_no_heavy_library(run):
    program = (
        f"import sys\nfrom pe_dpo.cli import main\nsys.argv = ['pe-dpo', 'serve', {str(run)!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_training_and_merging_end_with_it(said, run, merged):
    assert said["train"] == [
        "it belongs to the base in nf4: from the folder alone, pipeline and",
        "AutoPeftModelForCausalLM load another model without an error",
        f"how it is loaded and served: pe-dpo serve {shlex.quote(str(run))}",
    ]
    assert said["merge"] == f"all ways, and why: pe-dpo serve {merged}"
