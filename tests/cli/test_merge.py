"""`pe-dpo merge` on the tiny world: what it prints, what lies there afterwards, and that it serves in plain transformers."""

import json
import re

import pytest
import torch


@pytest.fixture(scope="module")
def quantized(pe_dpo, recipe_file, tmp_path_factory):
    """A run of two steps on the base in nf4."""
    folder = tmp_path_factory.mktemp("runs") / "nf4"
    done = pe_dpo("train", recipe_file, "-o", folder, "--set", "model.quantize=nf4")
    assert done.code == 0
    return folder


@pytest.fixture(scope="module")
def merged(pe_dpo, quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "merged"
    return folder, pe_dpo("merge", quantized, "-o", folder, "--pairs", 8)


@pytest.mark.slow
def test_merge_says_what_it_verified(merged):
    folder, done = merged
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "to be measured on 8 of 9 held-out pairs"
    assert re.fullmatch(r"takes \S+ MB in RAM as trained, \S+ MB in RAM to verify what was merged, \S+ MB on disk", lines[1])
    assert "of the update is in the files (per tensor" in lines[2] and "14 tensors" in lines[2]
    assert "KL(trained ‖ it), nats a position" in done.out and "per tensor" in done.out
    assert f"serves what was trained: {folder}" in lines


@pytest.mark.slow
def test_what_a_server_needs_lies_in_the_merged_folder(merged, tiny_base):
    folder, _ = merged
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json",
                     "README.md", "merge_report.json"}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    base = json.loads((tiny_base / "config.json").read_text())
    assert base["dtype"] == "float32" and "rope_scaling" not in base, "in the words of transformers 5"
    old = {"torch_dtype": "float32", "rope_theta": base["rope_parameters"]["rope_theta"], "rope_scaling": None}
    assert config == base | old
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (tiny_base / name).read_bytes()
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}
    card = (folder / "README.md").read_text()
    for words in ("−log σ(z)", "sha256 of the encoded pairs", "```yaml", "what training changed", "checked tensor by tensor"):
        assert words in card
    assert not [path for path in folder.parent.iterdir() if path != folder]


@pytest.mark.slow
def test_the_merged_model_answers_in_plain_transformers_as_the_trained_one(merged, quantized):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pe_dpo.model.adapter import load_adapter_for_evaluation
    from pe_dpo.model.base import inspect_base, load_base

    folder, _ = merged
    base = json.loads((quantized / "base.json").read_text())["id"]
    trained = load_adapter_for_evaluation(load_base(inspect_base(base, quantize="nf4")), quantized)
    served, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Number 3?"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(chat, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (served(ids).logits - trained(ids).logits).abs().max() < 1e-4
        answers = [one.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
                   for one in (served, trained)]  # fmt: skip
    assert torch.equal(*answers)


@pytest.mark.slow
def test_eval_of_the_merged_model_finds_what_eval_of_the_run_found(pe_dpo, merged, quantized, tiny_pairs):
    found = [
        json.loads(pe_dpo("eval", target, "--data", tiny_pairs / "test.jsonl", "--json").out)["metrics"]
        for target in (merged[0], quantized)
    ]
    assert found[0]["logps/chosen"] == pytest.approx(found[1]["logps/chosen"], abs=1e-4)


@pytest.mark.slow
def test_json_is_all_that_is_printed_when_it_is_asked_for(pe_dpo, quantized, tmp_path):
    done = pe_dpo("merge", quantized, "-o", tmp_path / "out", "--pairs", 4, "--json", "--dtype", "bf16")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert (found["dtype"], found["held_out_pairs"], found["faults"]) == ("bfloat16", 4, [])


@pytest.mark.slow
def test_compare_shows_all_ways_to_serve_and_leaves_nothing(pe_dpo, quantized, tmp_path):
    done = pe_dpo("merge", quantized, "--compare", "--pairs", 3, "--json")
    assert (done.code, done.err) == (0, "")
    rows = {row["name"]: row for row in json.loads(done.out)["compared"]}
    assert list(rows) == ["reference", "adapter", "onto dequantized", "onto original"]
    assert rows["reference"]["relative_kl"] == 1 and rows["adapter"]["relative_kl"] == 0
    assert rows["onto dequantized"]["relative_kl"] < 1e-3 < rows["onto original"]["relative_kl"]
    table = pe_dpo("merge", quantized, "--compare", "--pairs", 3).out
    assert "3 held-out pairs (95 % Wilson intervals; nats)" in table and "onto dequantized" in table


@pytest.mark.slow
def test_onto_the_original_says_what_that_changes(pe_dpo, quantized, tmp_path):
    done = pe_dpo("merge", quantized, "-o", tmp_path / "out", "--onto", "original", "--pairs", 3)
    assert done.code == 0
    assert "warning: onto the original weights: their quantization error was part of training" in done.out
    assert "warning: against the trained adapter on the quantized base: relative KL" in done.out


@pytest.mark.slow
def test_a_scaled_merge_says_so_from_the_first_line_to_the_verdict(pe_dpo, quantized, tmp_path):
    done = pe_dpo("merge", quantized, "-o", tmp_path / "out", "--scale", 0.5, "--pairs", 3)
    assert (done.code, done.err) == (0, "")
    lines, words = done.out.splitlines(), "scaled toward the reference by a = 0.5"
    assert lines[1] == f"{words}: what is served is not what was trained, but a = 0.5 times as far from the reference"
    assert "KL(scaled ‖ it), nats a position" in done.out and "… of what the scaled update changed" in done.out
    assert f"serves the update, {words}: on purpose not what was trained: {tmp_path / 'out'}" in lines
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["scale"] == 0.5


@pytest.mark.slow
def test_a_scaled_adapter_is_compared_and_packaged_with_proof(pe_dpo, quantized, tmp_path):
    arguments = ("merge", quantized, "-o", tmp_path / "out", "--onto", "adapter", "--scale", 0.5, "--compare", "--pairs", 3)
    found = json.loads(pe_dpo(*arguments, "--json").out)
    assert found["scale"] == 0.5 and [row["relative_kl"] for row in found["compared"][:2]] == [1, 0]
    assert found["held_out"]["shift_kept"] == pytest.approx(1, abs=1e-3)
    table = pe_dpo("merge", quantized, "--scale", 1.5, "--compare", "--pairs", 3).out
    assert "3 held-out pairs, scaled away from the reference by a = 1.5 (95 % Wilson" in table
    assert "warning: a = 1.5 goes beyond what was trained (extrapolation)" in table


def test_onto_adapter_writes_no_model_and_says_how_to_serve_it(pe_dpo, quantized, tmp_path):
    done = pe_dpo("merge", quantized, "-o", tmp_path / "out", "--onto", "adapter")
    assert (done.code, done.err) == (0, "")
    assert "`pip install vllm-bnb-plugin`" in done.out.replace("\n# ", " ")
    assert "--dtype bfloat16 --quantization bitsandbytes --enable-lora --max-lora-rank 16 --lora-modules tuned=" in done.out
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "base.json").read_text())["quantize"] == "nf4"


@pytest.mark.parametrize("onto", ["dequantized", "adapter"])
def test_no_path_of_this_machine_stands_in_what_is_written(pe_dpo, quantized, tiny_base, tiny_pairs, tmp_path, onto):
    """In no file, of no input and no output; what must be named instead is said."""
    out = tmp_path / "out"
    unverified = [] if onto == "adapter" else ["--pairs", 0]
    assert pe_dpo("merge", quantized, "-o", out, "--onto", onto, *unverified).code == 0
    places = [str(place.parent).encode() for place in (quantized, tiny_base, tiny_pairs, out)]
    assert [path.name for path in out.iterdir() if any(place in path.read_bytes() for place in places)] == []
    card = (out / "README.md").read_text()
    assert f"The base was a folder, `{tiny_base.name}`." in card and "base_model:" not in card
    if onto == "adapter":
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] is None
        record = json.loads((out / "base.json").read_text())
        assert (record["id"], record["is_local"]) == (tiny_base.name, True)
        done = pe_dpo("merge", out, "-o", tmp_path / "again", "--pairs", 0)
        assert done.code == 2 and "does not say which base it belongs to; name it with --base" in done.err
        assert pe_dpo("merge", out, "-o", tmp_path / "again", "--pairs", 0, "--base", tiny_base).code == 0


def test_a_licence_of_the_base_travels_along(pe_dpo, quantized, tiny_base, tmp_path):
    import shutil

    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "LICENSE.txt").write_text("Do good.")
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A base\n")
    done = pe_dpo("merge", quantized, "-o", tmp_path / "out", "--pairs", 0, "--base", base)
    assert done.code == 0
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Do good."
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text().split("---\n")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "-o", "OUT"], 2, "nowhere: no such folder; name a run or an adapter on disk"),
        (["RUN"], 2, "name the folder of the merged model with -o, or ask for --compare"),
        (["RUN", "--compare", "--pairs", "0"], 2, "--compare needs pairs to compare on; leave --pairs out, or name a number"),
        (["RUN", "-o", "OUT", "--onto", "moon"], 2, "--onto moon: write dequantized, original, adapter"),
        (["RUN", "-o", "OUT", "--dtype", "int4"], 2, "--dtype int4: write auto, bf16, fp16, fp32"),
        (["RUN", "-o", "OUT", "--rounding", "up"], 2, "--rounding up: write auto, nearest, stochastic"),
        (["RUN", "-o", "RUN"], 2, "is not empty; choose another -o"),
        (["BASE", "-o", "OUT"], 2, "is a whole model; name the run or the adapter to merge"),
        (["RUN", "-o", "OUT/deeper/still"], 2, "make it first"),
        (["RUN", "-o", "OUT", "--scale", "0"], 2, "--scale 0: is the reference itself, with nothing of what was trained"),
        (["RUN", "-o", "OUT", "--scale", "-1"], 2, "--scale -1.0: write a number above 0; 1 is what was trained"),
        (["RUN", "-o", "OUT", "--scale", "nan"], 2, "--scale nan: write a number above 0"),
        (["RUN", "-o", "OUT", "--onto", "adapter", "--dtype", "bf16"], 2, "--onto adapter merges nothing; leave --dtype out"),
    ],
)
def test_what_cannot_be_merged_is_one_message(pe_dpo, quantized, tiny_base, tmp_path, arguments, code, words):
    places = {"RUN": str(quantized), "BASE": str(tiny_base), "OUT": str(tmp_path / "out")}
    done = pe_dpo("merge", *(places.get(word, word.replace("OUT/", f"{tmp_path}/out/")) for word in arguments))
    assert (done.code, done.err.count("error: ")) == (code, 1)
    assert words in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_adapter_from_elsewhere_must_say_how_its_base_was_loaded(pe_dpo, quantized, tiny_base, tiny_pairs, tmp_path):
    import shutil

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(quantized / name, foreign)
    done = pe_dpo("merge", foreign, "-o", tmp_path / "out")
    assert done.code == 2 and "say it with --quantize nf4" in done.err
    done = pe_dpo("merge", foreign, "-o", tmp_path / "out", "--quantize", "nf4")
    assert done.code == 2 and "name some with --data, or --pairs 0" in done.err
    done = pe_dpo("merge", foreign, "-o", tmp_path / "out", "--quantize", "nf4", "--data", tiny_pairs / "test.jsonl")
    assert done.code == 0
    assert "warning: no base.json beside the adapter" in done.out
    assert (tmp_path / "out" / "tokenizer.json").is_file()
