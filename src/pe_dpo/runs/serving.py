"""How what lies in a folder is served by vLLM, llama.cpp and transformers: the commands, and why these and not others.

Nothing is loaded and nothing is started: a run, an adapter, a merged model and an export say in JSON what they are.
"""

import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.errors import ModelError, UsageError
from pe_dpo.hub import is_local
from pe_dpo.quantizations import is_four_bit
from pe_dpo.runs.files import BASE_FILE, BEST, RUN_FILE, read_object
from pe_dpo.runs.loading import loading_lines
from pe_dpo.runs.records import MADE, check_record, read_base

WEIGHTS_FILE, MERGE_FILE = "adapter_model.safetensors", "merge_report.json"
NOT = "not these: they answer as another model, without an error"
KINDS = {"run": "a run", "adapter": "a packaged adapter", "model": "a whole model", "gguf": "a GGUF export"}


class Step(NamedTuple):
    """Something to be pasted on the way to a server, or to be left alone."""

    engine: str
    """vLLM, llama.cpp, transformers, or `NOT`."""
    why: str
    lines: list[str]
    """Of a shell, or of Python; none where there is no way."""


def describe_folder(folder: Path) -> str:
    """Return in a line what lies in a folder that can be served.

    Raises:
        UsageError, RunFolderError: nothing of ours does, or a file of it cannot be read.
    """
    kind = _kind(folder)
    if kind in ("run", "adapter"):
        base = _base_of(folder)
        return f"{folder}: {KINDS[kind]} on {base['id']} ({base['quantize']}, {base['dtype']})"
    verdict = read_object(folder / MERGE_FILE).get("verdict")
    return f"{folder}: {KINDS[kind]}" + (f" ({verdict})" if verdict else "")


def steps_to_serve(target: Path, made: Sequence[Path] = ()) -> list[Step]:
    """Return how a run, a packaged adapter, a merged model or an export is served.

    Args:
        target: what is to be served.
        made: what was made of it already: a merged model, a packaged adapter, an export.

    Raises:
        UsageError: a folder is none of these, one kind is there twice, or was made of another adapter.
        RunFolderError: a file of them cannot be read.
    """
    there = {_kind(target): target}
    for folder in made:
        kind = _kind(folder)
        if kind in there:
            raise UsageError(f"{folder}: is {KINDS[kind]}, as {there[kind]} is; name one of them")
        there[kind] = folder
    if "run" in there:
        _check_made_of(there)
    holder = there.get("run", there.get("adapter"))
    steps = list(_of_model(there)) if holder is None else list(_of_adapter(holder, there))
    order = ("vLLM", "llama.cpp", "transformers", NOT)
    return sorted(steps, key=lambda step: order.index(step.engine))


def model_commands(folder: str) -> list[str]:
    """Return the commands that serve a whole model, as people paste them: in vLLM, and in transformers."""
    return [shlex.join(["vllm", "serve", folder]), shlex.join(["transformers", "serve", folder])]


def _of_model(there: Mapping[str, Path]) -> Iterator[Step]:
    """How a whole model is served, that lies there or is still to be merged."""
    model = str(there.get("model", "TUNED"))
    if there.keys() != {"gguf"}:
        vllm, transformers = model_commands(model)
        verdict = read_object(there["model"] / MERGE_FILE).get("verdict") if "model" in there else None
        why = "A whole model: no adapter, and no codes to be made again." + (f" Of its merge: {verdict}." if verdict else "")
        yield Step("vLLM", why, [vllm])
        yield Step("transformers", "The whole model, behind an API like OpenAI's.", [transformers])
    if "gguf" in there:
        file = str(min(there["gguf"].glob("*.gguf")))
        why = "The second command, once the server runs, tells whether it answers as the model."
        if not (there["gguf"] / MERGE_FILE).is_file():
            why = f"Nothing there tells of which adapter it was made ({MERGE_FILE}), or whether of one at all. {why}"
        asked = shlex.join(["pe-dpo", "golden", str(there["gguf"]), "http://127.0.0.1:8080"])
        yield Step("llama.cpp", why, [shlex.join(["llama-server", "-m", file]), asked])
    else:
        why = "From the whole model. q8_0 rounds its weights once more, and export says what that changes; f16 hardly does."
        export = shlex.join(["pe-dpo", "export", model, "-o", "GGUF", "--gguf", "q8_0"])
        yield Step("llama.cpp", why, [export, "llama-server -m GGUF/GGUF.gguf"])


def _of_adapter(holder: Path, there: Mapping[str, Path]) -> Iterator[Step]:
    """How an adapter is served: merged, and on its base as in training."""
    base = _base_of(holder)
    place = "BASE" if base.get("is_local") or (is_local(base["id"]) and not Path(base["id"]).is_dir()) else base["id"]
    note = f"BASE is where the base of training, {Path(base['id']).name}, lies now. " if place == "BASE" else ""
    if "model" not in there:
        yield _merge(base, holder, note)
    yield from _of_model({kind: folder for kind, folder in there.items() if kind in ("model", "gguf")} or {"run": holder})
    yield from _unmerged_in_vllm(holder, there, place)
    if base["quantize"] != "int8":
        why = "Or not merged: the adapter as a file, and the commands of the base file that it belongs to, which export prints."
        name, is_best = _named(holder)
        export = ["pe-dpo", "export", name, *(["--best"] if is_best else []), "--gguf-lora", "-o", "LORA.gguf",
                  *(["--base", "BASE"] if place == "BASE" else [])]  # fmt: skip
        yield Step("llama.cpp", why, [shlex.join(export)])
    try:
        lines = loading_lines(base, place=place, folder=str(holder))
    except ModelError as error:
        yield Step("transformers", f"Not without the merge: {error}.", [])
    else:
        yield Step("transformers", f"{note}Not merged: the adapter on its base as in training, exactly.", lines)
    if base["quantize"] != "none" and not base.get("prequantized"):
        why = f"They load the base without its {base['quantize']} codes. So does a server that is given base and adapter alone."
        loaders = ("pipeline('text-generation', {!r})", "AutoPeftModelForCausalLM.from_pretrained({!r})")
        yield Step(NOT, why, [f"#     {loader.format(str(holder))}" for loader in loaders])
        yield Step(
            NOT, "A LoRA file for llama.cpp over a GGUF file of the 16-bit base, whose weights are others than in training.", []
        )


def _merge(base: Mapping[str, Any], holder: Path, note: str) -> Step:
    """The step that makes a whole model of an adapter."""
    why = "Base and update in one, rounded once, and verified to be what was trained."
    if is_four_bit(base["quantize"]):
        why = "What the 4-bit codes stand for and the update in one, rounded once, and verified to be what was trained."
    if base["quantize"] == "int8":
        why = "Nothing can be merged into int8 codes. On the base's own weights it is near what was trained: merge says how."
    name, is_best = _named(holder)
    command = ["pe-dpo", "merge", name, *(["--best"] if is_best else []), "-o", "TUNED",
               *(["--onto", "original"] if base["quantize"] == "int8" else []),
               *(["--base", "BASE"] if note else [])]  # fmt: skip
    return Step("vLLM", f"{note}{why}", [shlex.join(command)])


def _named(holder: Path) -> tuple[str, bool]:
    """How a command names what holds the adapter, and whether it is a run's best: that by its run, which has held-out pairs."""
    is_best = holder.name == BEST and (holder.parent / RUN_FILE).is_file()
    return str(holder.parent if is_best else holder), is_best


def _unmerged_in_vllm(holder: Path, there: Mapping[str, Path], place: str) -> Iterator[Step]:
    """How vLLM serves the adapter on its base, which packaging finds out."""
    if "adapter" not in there:
        name, is_best = _named(holder)
        package = shlex.join(["pe-dpo", "merge", name, *(["--best"] if is_best else []), "-o", "ADAPTER", "--onto", "adapter",
                              *(["--base", "BASE"] if place == "BASE" else [])])  # fmt: skip
        serve = shlex.join(["pe-dpo", "serve", name, "ADAPTER", *(["--best"] if is_best else [])])
        why = "Or not merged, for several adapters on one base: packaging finds out whether vLLM loads it as it was trained."
        yield Step("vLLM", why, [package, serve])
        return
    packaged = there["adapter"]
    record = _base_of(packaged)
    words = {record["id"]: place, "FOLDER": str(packaged), "tuned=FOLDER": f"tuned={packaged}"}
    for serving in record.get("serving", ()):
        if serving["command"] is None:
            yield Step("vLLM", f"Not without the merge: {serving['remark']}.", [])
        else:
            command = shlex.join(words.get(word, word) for word in shlex.split(serving["command"]))
            why = f"Or not merged, for several adapters on one base. {serving['remark']}"
            yield Step("vLLM", why.rstrip(), [command])


def _kind(folder: Path) -> str:
    """What lies in a folder, as one of `KINDS`."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name a run, a packaged adapter, a merged model or an export")
    if (folder / RUN_FILE).is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            again = shlex.join(["pe-dpo", "train", str(folder / "recipe.yaml"), "--resume"])
            raise UsageError(f"{folder}: this run has no adapter yet; finish it with: {again}")
        return "run"
    if (folder / WEIGHTS_FILE).is_file():
        if not (folder / BASE_FILE).is_file():
            merge = shlex.join(["pe-dpo", "merge", str(folder), "-o", "TUNED", "--quantize", "nf4"])
            raise UsageError(
                f"{folder}: no base.json there says how its base was loaded in training, and that decides what is served; "
                f"merge it, and say it there ({merge})"
            )
        return "adapter"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "model"
    if any(folder.glob("*.gguf")):
        return "gguf"
    raise UsageError(f"{folder}: is neither a run, a packaged adapter, a merged model nor an export; name one of them")


def _base_of(folder: Path) -> dict[str, Any]:
    """What base.json says, which every packaged adapter has, and every run but the first ones."""
    base = read_base(folder)
    missing = [key for key in ("id", "quantize", "dtype") if key not in base]
    if missing:
        raise UsageError(f"{folder / BASE_FILE}: says nothing of {missing[0]}; take another copy of {folder}")
    return base


def _check_made_of(there: Mapping[str, Path]) -> None:
    """Check that what was made of a run was made of its adapter, by hash; of an export only if it says so.

    Raises:
        UsageError: it was not.
    """
    path = there["run"] / RUN_FILE
    info = read_object(path)
    check_record(MADE, info, path, remedy="restore the file, or move its folder away")
    recorded = (info.get("hashes") or {}).get("adapter", {})
    trained = {value for name, value in recorded.items() if name.endswith(WEIGHTS_FILE)}
    of = dict[str, set[str]]()
    for kind in ("model", "gguf"):
        if kind in there and (kind == "model" or (there[kind] / MERGE_FILE).is_file()):
            report = read_object(there[kind] / MERGE_FILE)
            of[kind] = {str(report.get(key, "")) for key in ("adapter_sha256", "from_adapter_sha256")}
    if "adapter" in there and _base_of(there["adapter"]).get("scale", 1) == 1:
        of["adapter"] = {hashlib.sha256((there["adapter"] / WEIGHTS_FILE).read_bytes()).hexdigest()}
    for kind, made in of.items():
        if trained and not made & trained:
            raise UsageError(f"{there[kind]}: was made of another adapter than that of {there['run']} (sha256); name its own")
