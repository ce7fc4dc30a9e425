"""`pe-dpo export`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_dpo.cli import console

if TYPE_CHECKING:
    from pe_dpo.export.gguf_file import GgufFacts, Kind

KINDS = ("f32", "bf16", "f16", "q8_0", "q4_0")


def export(
    model: Annotated[
        Path,
        typer.Argument(help="A whole model on disk, as `pe-dpo merge` writes it; a run or adapter for --gguf-lora and --push."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new or empty folder; of --gguf-lora a file.")] = None,
    gguf: Annotated[str | None, typer.Option(help="Write a GGUF file: f16, bf16, q8_0, q4_0 or f32.")] = None,
    gguf_lora: Annotated[
        bool, typer.Option("--gguf-lora", help="Write a run's adapter as the GGUF file -o FILE, for llama.cpp's --lora.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Of a run or adapter: where its base lies now, if not where it was.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts or pairs; default: five short questions.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Read the file back and compare; needs 4 bytes of memory a parameter.")
    ] = True,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Write a base of fp8, MXFP4 or 4-bit codes, or .bin files, as plain safetensors; of a run, the base it had.",
        ),
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="Of a run: the adapter of its best evaluation (train.keep_best).")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Push the export, or without --gguf MODEL itself, to ORG/NAME; of a run its adapter.")
    ] = None,
) -> None:
    """Write a model as GGUF with an Ollama Modelfile and golden prompts, checked by reading it back; or push it."""
    if best:
        from pe_dpo.runs.files import best_folder

        model = best_folder(model)
    if plain:
        _export_plain(model, output, base, others=[gguf, prompts, push, gguf_lora or None])
        return
    if gguf_lora:
        _export_adapter(model, output, base, others=[gguf, prompts, push])
        return
    if base is not None:
        from pe_dpo.errors import UsageError

        raise UsageError("--base goes with --gguf-lora, or with --plain of a run")
    _check_request(model, output, gguf, prompts, push)

    console.start()
    folder = model
    if push is not None:
        from pe_dpo.export.push import check_access

        check_access(push)
    if gguf is not None and output is not None:
        from pe_dpo.export.gguf_folder import export_gguf

        kind: Kind = gguf  # type: ignore[assignment]  # checked
        written = export_gguf(model, output, kind=kind, prompts=prompts, is_checked=check, has_card=push is not None)
        folder = output
        _tell(output.absolute(), *written)
    if push is not None:
        from pe_dpo.export.push import push_folder

        console.say(push_folder(folder, push, private=True))


def _export_plain(model: Path, output: Path | None, base: str | None, *, others: list[object]) -> None:
    from pe_dpo.errors import UsageError

    is_tuned = _is_tuned(model)
    if output is None or any(other is not None for other in others) or (base is not None and not is_tuned):
        raise UsageError("--plain goes with -o FOLDER, of a run with --base, and with nothing else")
    console.start()
    if is_tuned:
        from pe_dpo.merging.base_folder import write_training_base
        from pe_dpo.merging.source import open_source

        with open_source(model, pairs=0, base=base) as source:
            dtype = str(write_training_base(source, output)).removeprefix("torch.")
        console.say(f"{output}: the base of {model} with the values that training computed with, in {dtype}")
        return
    from pe_dpo.export.plain_folder import export_plain

    codes = export_plain(str(model), output)
    console.say(f"{output}: {f'{codes} tensors of codes' if codes else 'its tensors'} written plainly, all others as they were")
    console.say(f"next: name it in a recipe: {{model: {{base: {output}}}}}")


def _export_adapter(run: Path, output: Path | None, base: str | None, *, others: list[object]) -> None:
    from pe_dpo.errors import UsageError

    if output is None or any(other is not None for other in others):
        raise UsageError("--gguf-lora goes with -o FILE and --base, and with nothing else")
    if not _is_tuned(run):
        raise UsageError(f"{run}: is no run and no adapter; name one of these")
    if output.suffix != ".gguf" or output.exists() or not output.absolute().parent.is_dir():
        raise UsageError(f"-o {output}: name a new file that ends in .gguf, in a folder that is there")
    if not (run / "base.json").is_file():
        package = shlex.join(["pe-dpo", "merge", str(run), "--onto", "adapter", "--quantize", "none", "-o", "PACKAGE"])
        raise UsageError(
            f"{run}: nothing there says how its base was loaded in training; say it with {package}, and export that"
        )
    console.start()
    from pe_dpo.export.gguf_adapter import write_gguf_adapter
    from pe_dpo.merging.base_folder import is_base_itself
    from pe_dpo.merging.source import open_source

    with open_source(run, pairs=0, base=base) as source:
        facts, dtype = source.facts, str(source.facts.dtype).removeprefix("torch.")
        if facts.quantize == "int8":
            raise UsageError(
                f"{run}: was trained on int8, which also rounds what flows through a layer; no GGUF file computes that; merge "
                "it with --onto original, and export the merged model"
            )
        is_coded = facts.quantize != "none" or facts.is_prequantized
        values = f"the values of its {facts.quantize} codes" if is_coded else f"its weights in {dtype}"
        folder = source.base_folder if is_base_itself(source) else output.with_name(f"{output.stem}-base")
        commands = {} if folder == source.base_folder else {
            "its base:": ["pe-dpo", "export", str(run), "--plain", "-o", str(folder), *(["--base", base] if base else [])]
        }  # fmt: skip
        ranks = write_gguf_adapter(
            source.adapter, source.base_folder, output, description=f"LoRA on {Path(facts.base).name}, on {values}"
        )
    console.say(f"{output}: LoRA as GGUF, {len(ranks)} matrices, rank {max(ranks)}, {output.stat().st_size / 1e6:.1f} MB")
    console.say(f"it belongs to {facts.base} as training had it: {values}")
    if is_coded:
        console.warn("on a GGUF file of the 16-bit base it is another model")
    kind = "f16" if is_coded else {"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32")
    gguf = output.with_name(f"{output.stem}-base-gguf")
    commands["its GGUF:"] = ["pe-dpo", "export", str(folder), "--gguf", kind, "-o", str(gguf)]
    commands["llama.cpp:"] = ["llama-server", "-m", str(gguf / f"{gguf.name}.gguf"), "--lora", str(output)]
    for what, command in commands.items():
        console.say(f"{what:13} {shlex.join(command)}")


def _is_tuned(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("run.json", "adapter_config.json"))


def _check_request(model: Path, output: Path | None, gguf: str | None, prompts: Path | None, push: str | None) -> None:
    from pe_dpo.errors import UsageError

    if not model.is_dir():
        raise UsageError(f"{model}: no such folder; name a model on disk")
    for name, what in (("run.json", "a run"), ("adapter_config.json", "an adapter")):
        if (model / name).is_file() and (push is None or gguf is not None):
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
    if push is not None and not (model / "README.md").is_file() and not (model / "run.json").is_file():
        raise UsageError(f"{model / 'README.md'}: is missing; a push needs a model card, and an export takes the model's")


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
    console.say(f"check there:  pe-dpo golden {quoted} http://127.0.0.1:8080")
