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
        Path, typer.Argument(help="A whole model on disk, as `pe-dpo merge` writes it; a base for --plain; a run to --push.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new or empty folder for the export.")] = None,
    gguf: Annotated[str | None, typer.Option(help="Write a GGUF file: f16, bf16, q8_0, q4_0 or f32.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts or pairs; default: five short questions.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Read the file back and compare; needs 4 bytes of memory a parameter.")
    ] = True,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Write a base of fp8, MXFP4 or 4-bit codes, or .bin files, as plain safetensors."),
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Push the export, or without --gguf MODEL itself, to ORG/NAME; of a run its adapter.")
    ] = None,
) -> None:
    """Write a model as GGUF with an Ollama Modelfile and golden prompts, checked by reading it back; or push it."""
    if plain:
        _export_plain(str(model), output, others=[gguf, prompts, push])
        return
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


def _export_plain(base: str, output: Path | None, *, others: list[object]) -> None:
    from pe_dpo.errors import UsageError

    if output is None or any(other is not None for other in others):
        raise UsageError("--plain goes with -o FOLDER, and with nothing else")
    console.start()
    from pe_dpo.export.plain_folder import export_plain

    codes = export_plain(base, output)
    console.say(f"{output}: {f'{codes} tensors of codes' if codes else 'its tensors'} written plainly, all others as they were")
    console.say(f"next: name it in a recipe: {{model: {{base: {output}}}}}")


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
    console.say(
        "check there:  for each line of golden_prompts.jsonl, /tokenize of `rendered` must give `prompt_ids` (with add_special"
    )
    console.say(
        "              where there is no chat template), and /completion of these, at temperature 0, `text` up to a small lead"
    )
