"""`pe-dpo export`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pe_dpo.cli import console

if TYPE_CHECKING:
    from pe_dpo.export.gguf_file import GgufFacts
    from pe_dpo.export.golden import GoldenPrompt

KINDS = ("f32", "bf16", "f16", "q8_0", "q4_0")

LOSSLESS = 1e-6
"""Mean KL, in nats, that rounding of float32 sums in another order may leave; measured: 0."""


def export(
    model: Annotated[Path, typer.Argument(help="A whole model on disk, as `pe-dpo merge` writes it.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new or empty folder for the export.")] = None,
    gguf: Annotated[str | None, typer.Option(help="Write a GGUF file: f16, bf16, q8_0, q4_0 or f32.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts or pairs; default: five short questions.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Read the file back and compare; needs 4 bytes of memory a parameter.")
    ] = True,
    push: Annotated[str | None, typer.Option(help="Push the export, or without --gguf MODEL itself, to ORG/NAME.")] = None,
) -> None:
    """Write a model as GGUF with an Ollama Modelfile and golden prompts, checked by reading it back; or push it."""
    _check_request(model, output, gguf, prompts, push)

    console.start()
    folder = model
    if push is not None:
        from pe_dpo.export.push import check_access

        check_access(push)
    if gguf is not None and output is not None:
        _export(model, output, gguf, prompts, is_checked=check, has_card=push is not None)
        folder = output
    if push is not None:
        from pe_dpo.export.push import push_folder

        console.say(push_folder(folder, push, private=True))


def _check_request(model: Path, output: Path | None, gguf: str | None, prompts: Path | None, push: str | None) -> None:
    from pe_dpo.errors import UsageError

    if not model.is_dir():
        raise UsageError(f"{model}: no such folder; name a model on disk")
    for name, what in (("run.json", "a run"), ("adapter_config.json", "an adapter")):
        if (model / name).is_file():
            raise UsageError(
                f"{model}: is {what}, not a whole model; merge it first: pe-dpo merge {shlex.quote(str(model))} -o MODEL"
            )
    if gguf is None and push is None:
        raise UsageError("nothing to do: write --gguf f16 -o FOLDER, or --push ORG/NAME")
    if gguf is not None and gguf not in KINDS:
        raise UsageError(f"--gguf {gguf}: write one of {', '.join(KINDS)}")
    if (gguf is None) != (output is None):
        raise UsageError("--gguf and -o FOLDER go together: the one says what to write, the other where")
    if prompts is not None and not prompts.is_file():
        raise UsageError(f"--prompts {prompts}: no such file")
    if push is not None and not (model / "README.md").is_file():
        raise UsageError(f"{model / 'README.md'}: is missing; a push needs a model card, and an export takes the model's")


def _export(model: Path, output: Path, kind: str, prompts: Path | None, *, is_checked: bool, has_card: bool) -> None:
    """Write everything into a hidden folder beside the wanted one, check it there, and give it its name."""
    import shutil

    from transformers import AutoTokenizer

    from pe_dpo.errors import UsageError
    from pe_dpo.export.gguf_file import write_gguf
    from pe_dpo.export.golden import load_golden, token_ids
    from pe_dpo.export.ollama import modelfile
    from pe_dpo.runs.staging import staged

    with staged(output) as folder:
        gguf_file = folder / f"{output.absolute().name}.gguf"
        facts = write_gguf(model, gguf_file, kind=kind)  # type: ignore[arg-type]  # checked
        remarks = list(facts.remarks)
        try:
            (folder / "Modelfile").write_text(modelfile(model, gguf_file.name), encoding="utf-8")
        except UsageError as error:  # a Modelfile without TEMPLATE would be worse than none: Ollama would guess one
            remarks.append(f"no Modelfile: {error}")
        verdict = _check(model, facts, prompts, is_checked=is_checked)
        # Transformers, reading the tokenizer back, does not know all that llama.cpp does.
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file.name, trust_remote_code=False)
        golden = load_golden(folder / "golden_prompts.jsonl")
        other = sum(token_ids(tokenizer, one.rendered) != one.prompt_ids for one in golden)
        if other:
            remarks.append(
                f"transformers reads other token ids for {other} golden prompts; compare with the server's /tokenize"
            )
        if has_card:
            shutil.copyfile(model / "README.md", folder / "README.md")
    _tell(output.absolute(), facts, verdict, remarks)


def _check(model: Path, facts: "GgufFacts", prompts: Path | None, *, is_checked: bool) -> str:
    """Write golden prompts, read the GGUF file back, compare, and return the verdict as a sentence.

    In float32, in which a lossless file must be equal; the model is let go before its copy is loaded, so that memory holds one
    of them. Without the check the golden prompts come from the model in bfloat16.
    """
    from pe_dpo.export.gguf_file import load_gguf
    from pe_dpo.export.golden import QUESTIONS, answer_log_probs, golden_prompts, read_prompts, save_golden
    from pe_dpo.inference.policy import Policy
    from pe_dpo.model.base import answer_end_tokens, inspect_base, load_base, load_tokenizer

    tokenizer = load_tokenizer(str(model))
    facts_of_model = inspect_base(str(model), quantize="none", dtype="float32" if is_checked else "bfloat16")
    original = load_base(facts_of_model).eval()
    policy = Policy(original, tokenizer, facts_of_model, answer_end_tokens(tokenizer, str(model)))
    texts = QUESTIONS if prompts is None else read_prompts(prompts)
    golden = golden_prompts(policy, texts)
    save_golden(golden, facts.path.parent / "golden_prompts.jsonl")
    if not is_checked:
        return f"not read back; {len(golden)} golden prompts of the model in bfloat16"
    wanted = list(answer_log_probs(original, golden))
    del original, policy
    return _compare(load_gguf(facts.path, model), tokenizer, facts, golden, wanted)


def _compare(copy: Any, tokenizer: Any, facts: "GgufFacts", golden: "list[GoldenPrompt]", wanted: list[Any]) -> str:
    """Compare the copy with the model; a lossless one must be equal, a 16-bit one but for near-ties, others are measured."""
    from pe_dpo.errors import ModelError
    from pe_dpo.export.golden import NEAR_TIE, check_golden, mean_divergence

    divergence = mean_divergence(copy, wanted, golden)
    file = facts.path.parent / "golden_prompts.jsonl"
    compared, near_ties, differences = check_golden(copy, tokenizer, file, near_tie=0.0 if facts.is_lossless else NEAR_TIE)
    measured = f"read back: mean KL {divergence:.2g} nats on {len(golden)} golden prompts"
    if facts.kind in ("q8_0", "q4_0"):
        return f"{measured}, {len(golden) - len(differences) - near_ties} answers the same"
    if differences or (facts.is_lossless and divergence > LOSSLESS):
        raise ModelError(f"the GGUF file is not the model; {measured}; {'; '.join(differences)}; nothing was written")
    return f"{measured}, {compared} tokens the same" + (f", {near_ties} answers left at a near-tie" if near_ties else "")


def _tell(output: Path, facts: "GgufFacts", verdict: str, remarks: list[str]) -> None:
    quoted, quoted_name = shlex.quote(str(output)), shlex.quote(output.name.lower())
    files = ", ".join(sorted(file.name for file in output.iterdir()))
    console.say(f"{output}: {files} ({facts.kind}, {facts.tensors} tensors, {facts.bytes / 1e6:.1f} MB)")
    console.say(verdict)
    for remark in remarks:
        console.warn(remark)
    if (output / "Modelfile").is_file():
        console.say(f"Ollama:       cd {quoted} && ollama create {quoted_name} -f Modelfile && ollama run {quoted_name}")
    console.say(f"llama.cpp:    llama-server -m {shlex.quote(str(output / facts.path.name))}")
    console.say(
        "check there:  for each line of golden_prompts.jsonl, /tokenize of `rendered` must give `prompt_ids` (with add_special"
    )
    console.say(
        "              where there is no chat template), and /completion of these, at temperature 0, `text` up to a small lead"
    )
