"""What a resumed run checks, as a table: an input that changed is refused with what differs, said, or does not matter.

`docs/reliability.md` has the same rows.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import KillAt, Killed
from random_adapters import random_adapter
from safetensors.torch import load_file, save_file

from pe_dpo.errors import RunFolderError, UsageError
from pe_dpo.recipe import Recipe, recipe_from_yaml, recipe_to_yaml
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.model_card import model_card
from pe_dpo.runs.overrides import override_keys
from pe_dpo.runs.run import Run
from pe_dpo.training import origins
from pe_dpo.training.train import train

ADAPTER = "adapter_model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_text(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def edit_row(path: Path, number: int, **changes: Any) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})
    path.write_text("\n".join(lines) + "\n")


def scale_tensor(path: Path, name: str) -> None:
    weights = load_file(path)
    weights[name] = weights[name] * 1.01
    save_file(weights, path, metadata={"format": "pt"})


class World:
    """A run with its own copy of base, pairs and adapter, which a test may change."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.pairs, self.sft = root, root / "base", root / "pairs", root / "sft"
        self.run = Run(root / "run")

    def recipe(self, *overrides: str) -> Recipe:
        """The recipe of the run, with another setting or none."""
        return recipe_from_yaml((self.root / "recipe.yaml").read_text(), "test", [f"output={self.root / 'run'}", *overrides])

    def resume(self, *overrides: str, **options: Any) -> Path:
        return train(self.recipe(*overrides), resume=True, **options).folder


@pytest.fixture(scope="module")
def killed(tiny_base: Path, tiny_pairs: Path, tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Killed after its first step: from an SFT adapter that is the reference too, with dropout, β and weights for pairs."""
    world = World(tmp_path_factory.mktemp("origins"))
    shutil.copytree(tiny_base, world.base)
    world.pairs.mkdir()
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (tiny_pairs / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "margin": 0.5, "b": 0.1 + at / 100, "w": 1.0}) for at, row in enumerate(rows)]
        (world.pairs / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    random_adapter(world.base, world.sft)
    settings = (
        *(f"model.base={world.base}", f"data.train={world.pairs}", "data.columns={beta: b, weight: w}"),
        *("adapter.rank=16", "adapter.alpha=32", f"adapter.start={world.sft}", "adapter.reference=adapter"),
        *("adapter.dropout=0.1", "train.save_every=1"),
    )
    recipe = tiny_recipe(world.root / "run", *settings)
    (world.root / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    with pytest.raises(Killed):
        train(recipe, callbacks=[KillAt(1)])
    return world


@pytest.fixture
def world(killed: World) -> Any:
    """The killed run; base, pairs, adapter and the run's folder are afterwards what they were."""
    kept = shutil.copytree(killed.root, killed.root.with_name(f"{killed.root.name}-kept"))
    yield killed
    shutil.rmtree(killed.root)
    Path(kept).rename(killed.root)


REFUSED: dict[str, tuple[Callable[[World], object], str]] = {
    "weights of the base": (
        lambda at: scale_tensor(at.base / "model.safetensors", "model.norm.weight"),
        r"base: 1 of 21 tensors differs, first model\.norm\.weight",
    ),
    "dtype and quantization": (
        lambda at: edit_loaded(at, dtype="bfloat16", quantize="nf4"),
        r"base: quantize nf4 → none, dtype bfloat16 → float32",
    ),
    "configuration of the base": (
        lambda at: edit_json(at.base / "config.json", rms_norm_eps=1e-5),
        r"config: rms_norm_eps 1e-06 → 1e-05",
    ),
    "generation config": (
        lambda at: edit_json(at.base / "generation_config.json", eos_token_id=[256, 258]),
        r"end_tokens: \[256\] → \[256, 258\]",
    ),
    "chat template": (
        lambda at: edit_text(at.base / "chat_template.jinja", "{% endfor %}", "{% endfor %}{# #}"),
        r"template: line 3: .*endfor %}\{% if .* → .*endfor %}\{# #\}",
    ),
    "tokenizer, a token added": (
        lambda at: add_token(at.base / "tokenizer.json", "<tool>"),
        r"tokenizer: added tokens: 1 added \(<tool>\)",
    ),
    "tokenizer, normalizer": (
        lambda at: edit_text(at.base / "tokenizer.json", '"normalizer": null', '"normalizer": {"type": "NFC"}'),
        r"tokenizer: normalizer \w+ → \w+",
    ),
    "data, a corrected row": (
        lambda at: edit_row(at.pairs / "train.jsonl", 17, chosen="It is not"),
        r"data: 1 of 24 pairs differs, first train\.jsonl:17 \(another chosen\)",
    ),
    "data, a row gone": (
        lambda at: edit_text(
            at.pairs / "train.jsonl", (at.pairs / "train.jsonl").read_text().splitlines(keepends=True)[-1], ""
        ),
        r"data: 1 gone \(train\.jsonl:24\)",
    ),
    "data, another order": (
        lambda at: edit_text(at.pairs / "train.jsonl", *swapped(at.pairs / "train.jsonl")),
        r"data: 2 of 24 pairs differ, first train\.jsonl:1 \(another prompt, another chosen, another rejected, beta 0\.1 → ",
    ),
    "held-out rows": (
        lambda at: edit_row(at.pairs / "test.jsonl", 2, rejected="No"),
        r"held_out: 1 of 9 pairs differs, first test\.jsonl:2 \(another rejected\)",
    ),
    "margin of a pair": (
        lambda at: edit_row(at.pairs / "train.jsonl", 3, margin=2),
        r"data: 1 of 24 pairs differs, first train\.jsonl:3 \(margin 0\.5 → 2\)",
    ),
    "β and weight of a pair": (
        lambda at: edit_row(at.pairs / "train.jsonl", 3, b=0.5, w=2.0),
        r"data: .* train\.jsonl:3 \(beta 0\.12 → 0\.5, weight 1 → 2\)",
    ),
    "adapter to start from, weights": (
        lambda at: scale_tensor(at.sft / ADAPTER, next(iter(load_file(at.sft / ADAPTER)))),
        r"start: weights \(sha256\) \w+ → \w+",
    ),
    "adapter to start from, configuration": (
        lambda at: edit_json(at.sft / "adapter_config.json", lora_alpha=24),
        r"start: lora_alpha 12 → 24",
    ),
    "number of processes, where dropout draws": (
        lambda at: edit_machine(at, processes=2),
        r"processes: 2 → 1, and what dropout or mixout draws depends on it \(`override` machine goes on\)",
    ),
    "kind of device, where dropout draws": (lambda at: edit_machine(at, device="cuda"), "device: cuda → cpu, and what dropout"),
}
"""Input: how it changes, and what is said."""


def add_token(path: Path, content: str) -> None:
    tokens = json.loads(path.read_text())["added_tokens"]
    edit_json(path, added_tokens=[*tokens, {**tokens[-1], "id": tokens[-1]["id"] + 1, "content": content}])


def swapped(path: Path) -> tuple[str, str]:
    first, second, *_ = path.read_text().splitlines(keepends=True)
    return first + second, second + first


def edit_loaded(at: World, **loaded: str) -> None:
    """As if the base had been loaded otherwise when the run began."""
    hashes = read_object(at.run.folder / RUN_FILE)["hashes"]
    edit_json(at.run.folder / RUN_FILE, hashes={**hashes, "base": "0" * 64})
    edit_json(at.run.folder / "base.json", **loaded)


def edit_machine(at: World, **changes: Any) -> None:
    path = at.run.folder / "inputs.json"
    edit_json(path, machine={**json.loads(path.read_text())["machine"], **changes})


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.slow
def test_an_input_that_changed_is_refused_with_what_differs(world: World, name: str) -> None:
    change, said = REFUSED[name]
    change(world)
    with pytest.raises(RunFolderError) as found:
        world.resume()
    head, *lines, end = str(found.value).splitlines()
    assert head == f"{world.run.folder}: the run started with other inputs:"
    assert len(lines) == 1 and re.search(f"^  {said}", lines[0]), lines
    key = {"data": "data.train", "held_out": "data.eval"}.get(lines[0].split(":")[0].strip())
    meant = f", name what you mean to change with `override` ({key})" if key else ""
    assert end == f"restore them{meant}, or start anew with another `output`"


SAID = {
    "threads": ("machine", 8, "threads: 8 → 1"),
    "processor": ("machine", "AVX9", "processor: AVX9 → "),
    "torch": ("versions", "2.0.0", "torch: 2.0.0 → 2."),
    "transformers": ("versions", "5.0.0", "transformers: 5.0.0 → "),
    "peft": ("versions", "0.1", "peft: 0.1 → "),
    "bitsandbytes": ("versions", "0.1", "bitsandbytes: 0.1 → "),
    "accelerate": ("versions", "0.1", "accelerate: 0.1 → "),
}
"""Input: where it is recorded, what the record says, and what is said; none of them stops a run."""


@pytest.mark.slow
def test_what_moves_the_last_digits_is_said_and_what_does_not_matter_changes_no_bit(world: World, warned: list[str]) -> None:
    """All at once: the records are of another machine, sampling and file times are other ones; the numbers are the same."""
    straight = train(world.recipe(f"output={world.root / 'straight'}")).folder
    inputs = read_object(world.run.folder / "inputs.json")
    for name, (part, value, _) in SAID.items():
        inputs[part][name] = value
    del inputs["config"]["rms_norm_eps"]  # a key that another version of transformers did not know
    inputs["tokenizer"]["model"] = "other"  # written otherwise by another version of tokenizers
    (world.run.folder / "inputs.json").write_text(json.dumps(inputs))
    edit_json(world.base / "generation_config.json", temperature=0.3, top_p=0.5, do_sample=True)
    (world.pairs / "train.jsonl").touch()
    often = ("train.save_every=2", "train.save_minutes=0", "train.keep_checkpoints=1", "train.log_every=1")
    folder = world.resume(*often)

    (one,) = read_object(folder / RUN_FILE)["resumed"]
    assert one["step"] == 1 and len(one["changed"]) == len(SAID)
    assert all(any(line.startswith(said) for line in one["changed"]) for *_, said in SAID.values())
    assert [line for line in warned if "otherwise than when the run began: threads: 8 → 1; " in line]
    assert "Resumed at step 1, computed otherwise than before (threads: 8 → 1" in (folder / "README.md").read_text()
    left, right = load_file(folder / ADAPTER), load_file(straight / ADAPTER)
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert Run(folder).info.after == Run(straight).info.after


@pytest.mark.slow
def test_what_a_person_means_to_change_is_changed_and_recorded(world: World, warned: list[str]) -> None:
    """Three steps in all instead of six, half the learning rate, and a corrected row; killed once more on the way."""
    edit_row(world.pairs / "train.jsonl", 17, chosen="It is not")
    settings = ("train.learning_rate=5.0e-4", "train.epochs=1", "adapter.dropout=0")
    with pytest.raises(
        RunFolderError, match=r"train.epochs: 2.0 → 1.0(.|\n)*with `override` \(adapter.dropout, train.epochs, tr"
    ):
        world.resume(*settings)
    keys = ["lr", "train.epochs", "adapter.dropout", "data.train"]
    with pytest.raises(Killed):
        world.resume(*settings, override=keys, callbacks=[KillAt(2)])
    folder = world.resume(*settings, override=keys[:1])  # what was changed once is the run's recipe now

    info = Run(folder).info
    assert [(entry["step"], entry["key"], entry["from"], entry["to"]) for entry in info.overrides[:3]] == [
        (1, "adapter.dropout", 0.1, 0.0),
        (1, "train.epochs", 2.0, 1.0),
        (1, "train.learning_rate", 0.001, 0.0005),
    ]
    assert info.overrides[3]["words"] == "1 of 24 pairs differs, first train.jsonl:17 (another chosen)"
    assert len(info.overrides) == 4 and info.is_finished
    rates = {line["step"]: line["learning_rate"] for line in Run(folder).metrics if "learning_rate" in line}
    assert rates == pytest.approx({1: 1e-3, 2: 5e-4 * 2 / 3, 3: 5e-4 / 3})
    assert Run(folder).recipe.train.learning_rate == 5e-4
    line = "train.learning_rate: 0.001 → 0.0005, from step 1 on"
    assert any(line in said for said in warned) and line in (folder / "README.md").read_text()
    assert info.hashes.data == Run(folder).inputs["data"] != info.overrides[3]["from"]


@pytest.mark.slow
def test_another_learning_rate_leaves_the_averages_of_adam_where_they_are(world: World) -> None:
    """What the optimizer knows of the gradients stays; only what the recipe says of it changes."""
    seen = []

    class Look(KillAt):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            seen.append(optimizer.state_dict())
            raise Killed

    for override in ([], ["lr", "train.weight_decay"]):
        with pytest.raises(Killed):
            settings = ["train.learning_rate=5.0e-4", "train.weight_decay=0.25"] if override else []
            world.resume(*settings, override=override, callbacks=[Look(9)])
    plain, changed = seen
    assert (plain["param_groups"][0]["lr"], changed["param_groups"][0]["lr"]) == pytest.approx((1e-3 * 5 / 6, 5e-4 * 5 / 6))
    assert [state["param_groups"][0]["weight_decay"] for state in seen] == [0, 0.25]
    for key, moments in plain["state"].items():
        assert all(torch.equal(value, changed["state"][key][name]) for name, value in moments.items())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rank", "adapters of another shape"),
        ("train.optimizer", "state in the checkpoint is that of the other"),
        ("model.quantize", "belongs to the weights"),
        ("adapter.over", "the reference would be another"),
        ("seed", "some pairs would come twice"),
        ("data.template", "prompts of two forms"),
        ("train.lerning_rate", "did you mean train.learning_rate"),
    ],
)
def test_what_would_make_nonsense_of_a_checkpoint_cannot_be_overridden(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"`override` {name}: .*{said}"):
        override_keys([name])


def test_overriding_is_for_a_run_that_goes_on(make_recipe: Callable) -> None:
    with pytest.raises(UsageError, match="`override` is for a run that goes on"):
        train(make_recipe(), override=["lr"])


def test_held_out_rows_that_are_gone_do_not_bring_trained_ones_there(world: World, tiny_recipe: Callable) -> None:
    """With a share in the place of a file of its own, pairs would be held out that were trained on."""
    with pytest.raises(
        RunFolderError, match=r"held_out: train\.jsonl:\d+, .* would be held out now, and the run has trained on that pr"
    ):
        world.resume("data.eval=0.2", override=["data.train", "data.eval"])


def test_numbers_at_step_0_tell_what_no_record_knows() -> None:
    then = {"eval_logps/chosen": -100.0, "eval_logps/rejected": -120.0, "eval_loss": 0.7}
    assert origins.compare_step_zero(then, then) is None
    words = origins.compare_step_zero(then, {**then, "eval_logps/rejected": -120.01})
    assert words == "eval_logps/rejected of the pairs that are measured along the way was -120 at step 0 and is -120.01"
    with pytest.raises(RunFolderError, match=r"was -100 at step 0 and is -110 from the same weights"):
        origins.compare_step_zero(then, {**then, "eval_logps/chosen": -110.0})
    assert origins.compare_step_zero({}, then) is None


def test_a_card_names_no_place_of_this_machine(make_recipe: Callable) -> None:
    change = {"step": 3, "key": "data.train", "from": "/home/me/a.jsonl", "to": "/home/me/b.jsonl"}
    history = Run("nowhere").info.model_copy(update={"overrides": [change]}).describe_history()
    card = model_card(make_recipe(), {"id": "me/base", "quantize": "none", "dtype": "float32"}, {}, {}, history=history)
    assert "data.train: another place, from step 3 on" in card and "/home/me" not in card
