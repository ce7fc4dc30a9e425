"""A new LoRA over a frozen adapter: π0 is the base with the frozen one, π with both, and what is saved is the sum of both.

What is expected comes from plain PEFT with the adapters' own files, and from sums that are written down here.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import KillAt, Killed
from random_adapters import random_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from pe_dpo.audit.audit import audit
from pe_dpo.chat.side_by_side import open_side_by_side
from pe_dpo.data import EncodedPair
from pe_dpo.errors import ModelError, RecipeError, RunFolderError, UsageError
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.inference.policy import SavedPolicy, load_policy
from pe_dpo.merging.adapter_package import package_adapter
from pe_dpo.merging.merge import merge
from pe_dpo.merging.source import open_source
from pe_dpo.model.adapter import (
    adapter_parameters,
    as_reference,
    attach_adapter,
    lay_under,
    load_adapter_for_evaluation,
    scaled,
)
from pe_dpo.model.adapter import save_adapter as save_policy
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.fingerprint import reference_fingerprint
from pe_dpo.model.mixout import attach_mixout
from pe_dpo.report.run_report import report_run
from pe_dpo.runs.run import Run
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.train import train

IDS = torch.arange(3, 63).view(3, 20)
SETTINGS = ("adapter.targets=[q_proj, up_proj]", "adapter.rslora=true", "train.learning_rate=1.0e-2", "train.max_steps=3")


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Save a random adapter, and return its folder."""
    random_adapter(base, folder, **settings)
    return folder


def peft(base: Path, *adapters: Path, quantize: str = "none", shares: Sequence[float] = (1, 1)) -> Any:
    """Plain PEFT with several adapters on one base, each with a share of its scaling."""
    from peft import PeftModel

    model: Any = load_base(inspect_base(str(base), quantize=quantize, dtype="float32"))
    for number, folder in enumerate(adapters):
        if number:
            model.load_adapter(folder, adapter_name=f"a{number}")
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name="a0")
        for module in model.modules():
            if hasattr(module, "lora_A") and f"a{number}" in module.scaling:
                module.scaling[f"a{number}"] *= shares[number]
    if adapters:
        model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def answer_logprobs(model: Any, pairs: Sequence[EncodedPair]) -> Tensor:
    """Log-probs of chosen and rejected answers, (B, 2), one answer at a time; with gradients where something is trainable."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            ids, first = torch.tensor([[*pair.prompt_ids, *answer]]), len(pair.prompt_ids)
            all_of_them = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            found.append(all_of_them[first - 1 : -1].gather(-1, ids[0, first:, None]).sum())
    return torch.stack(found).view(-1, 2)


@pytest.fixture(scope="session")
def sft(made_once: Callable[..., Path], tiny_base: Path) -> Path:
    """With two ranks, scaled by alpha / √rank, on some of the layers, with dropout."""
    settings: dict[str, Any] = {"use_rslora": True, "r": 3, "rank_pattern": {"down_proj": 2}, "lora_dropout": 0.3}
    return made_once("sft-to-train-over", lambda folder: make_adapter(tiny_base, folder, **settings))


@pytest.fixture(scope="module")
def runs(sft: Path, tiny_recipe: Callable, made_once: Callable[..., Path]) -> Path:
    """Runs over the adapter: "none" on the base in float32, and "nf4" on that in 4 bits."""

    def fill(root: Path) -> None:
        for quantize in ("none", "nf4"):
            settings = (*SETTINGS, f"model.quantize={quantize}", "train.save_every=2")
            train(tiny_recipe(root / quantize, f"adapter.over={sft}", *settings))

    return made_once("runs-over", fill)


@pytest.fixture
def stirred(tiny_base: Path, sft: Path) -> Any:
    """A model that trains over the adapter, its B moved as training would."""
    model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=6, dropout=0.2, targets=["q_proj", "up_proj"])
    model = lay_under(model, sft)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


# ---------------------------------------------------------------------------------------------------- policy and reference


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_before_training_both_are_the_base_with_the_adapter(
    quantize: str, sft: Path, tiny_base: Path, make_recipe: Callable
) -> None:
    recipe = make_recipe(f"adapter.over={sft}", f"model.quantize={quantize}", "adapter.dropout=0.5")
    model = load_policy(recipe, device="cpu").model.train()
    policy = logits(model)
    with as_reference(model) as frozen:
        reference = logits(frozen)
    assert torch.equal(policy, reference)
    wanted = peft(tiny_base, sft, quantize=quantize)
    assert (logits(wanted) - reference).abs().max() < 1e-5
    assert (logits(peft(tiny_base, quantize=quantize)) - reference).abs().max() > 0.1
    pairs = prepare_run(recipe).data.held_out
    with as_reference(model) as frozen, torch.no_grad():
        torch.testing.assert_close(answer_logprobs(frozen, pairs), answer_logprobs(wanted, pairs), rtol=1e-6, atol=1e-4)


def test_only_the_new_adapter_is_trained_and_dropout_is_its_own(stirred: Any) -> None:
    names = [name for name, parameter in stirred.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2 and all(".default." in name for name in names)
    rates = {name: {getattr(one, "p", 0.0) for one in rate} for name, rate in _dropouts(stirred).items()}
    assert rates == {"default": {0.2}, "reference": {0.0}}
    with as_reference(stirred):
        pass
    assert [name for name, parameter in stirred.named_parameters() if parameter.requires_grad] == names


def _dropouts(model: Any) -> dict[str, list[Any]]:
    layers = [module for module in model.modules() if hasattr(module, "lora_dropout")]
    return {name: [one.lora_dropout[name] for one in layers if name in one.lora_dropout] for name in ("default", "reference")}


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_dpo_with_the_adapter_as_the_reference(
    sft: Path, tiny_base: Path, tmp_path: Path, make_trainer: Callable
) -> None:
    trainer = make_trainer(f"adapter.over={sft}", fresh=True)
    for parameter in adapter_parameters(trainer.model):
        parameter.data.normal_(0, 0.1)
    save_policy(trainer.model, tmp_path / "saved")
    pairs = trainer.train_dataset[:6]
    _, out = trainer.forward_pairs(trainer.model.eval(), pairs)
    out.loss.sum().backward()

    with torch.no_grad():
        reference = answer_logprobs(peft(tiny_base, sft), pairs)
    model = peft(tiny_base, sft, tmp_path / "saved" / "trained")
    theirs = {name: one.requires_grad_() for name, one in model.named_parameters() if ".a1." in name}
    shift = (answer_logprobs(model, pairs) - reference) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    wanted = torch.log1p(torch.exp(-0.1 * shift))
    wanted.sum().backward()
    torch.testing.assert_close(out.loss.double(), wanted, rtol=1e-5, atol=1e-5)
    assert shift.abs().min() > 1e-2, "a shift that is nothing shows nothing"
    ours = {name: one.grad for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert len(ours) == len(theirs) == 28
    for name, gradient in ours.items():
        expected = theirs[name.replace(".default.", ".a1.")].grad
        assert gradient is not None and expected is not None
        assert (gradient - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_a_scaled_policy_keeps_the_whole_adapter_under_it(
    scale: float, stirred: Any, sft: Path, tiny_base: Path, tmp_path: Path
) -> None:
    save_policy(stirred, tmp_path)
    with scaled(stirred, scale):
        found = logits(stirred)
    wanted = peft(tiny_base, sft, tmp_path / "trained", shares=(1, scale))
    assert (found - logits(wanted)).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["column", "element"])
def test_mixout_pulls_toward_the_base_with_the_adapter(form: Any, tiny_base: Path, sft: Path) -> None:
    """At p = 1 the sampled model is the reference, which has the frozen adapter once and not twice."""
    model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=6, targets=["q_proj", "up_proj"])
    model = lay_under(model, sft)
    for parameter in adapter_parameters(model):
        parameter.data.normal_(0, 0.1)
    with as_reference(model) as frozen:
        reference = logits(frozen.eval())
    attach_mixout(model, 1.0, seed=0, form=form)
    assert torch.equal(logits(model.train()), reference)
    assert not torch.equal(logits(model.eval()), reference)


def test_another_adapter_under_it_is_another_reference(tiny_base: Path, sft: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sft, tmp_path / "other"))
    weights = load_file(sft / "adapter_model.safetensors")
    save_file(
        {name: one * 1.01 for name, one in weights.items()}, other / "adapter_model.safetensors", metadata={"format": "pt"}
    )

    def of(folder: Path | None) -> str:
        model = attach_adapter(load_base(inspect_base(str(tiny_base))), rank=4, alpha=6)
        return reference_fingerprint(lay_under(model, folder) if folder else model)

    assert len({of(None), of(sft), of(other)}) == 3


@pytest.mark.slow
def test_stored_log_probs_of_the_bare_base_are_not_taken_for_those_of_the_reference(
    sft: Path, tiny_base: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    store = f"reference.store={tmp_path / 'store.sqlite'}"
    bare = audit(make_recipe(store))
    recipe = make_recipe(store, f"adapter.over={sft}")
    found = audit(recipe)
    with torch.no_grad():
        wanted = answer_logprobs(peft(tiny_base, sft), prepare_run(recipe).data.train)
    torch.testing.assert_close(torch.from_numpy(found.preference), wanted[:, 0] - wanted[:, 1], rtol=1e-6, atol=1e-4)
    assert abs(found.preference - bare.preference).max() > 0.1
    assert found.reference["is"] == f"the base with the adapter {sft}"


# ------------------------------------------------------------------------------------------------------------ what is saved


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_is_in_plain_peft_what_it_was_in_training(quantize: str, runs: Path, tiny_base: Path, sft: Path) -> None:
    run = runs / quantize
    wanted = logits(peft(tiny_base, sft, run / "trained", quantize=quantize))
    assert (logits(peft(tiny_base, run, quantize=quantize)) - wanted).abs().max() < 1e-5
    again = load_policy(run, device="cpu")
    assert (logits(again.model) - wanted).abs().max() < 1e-5
    with again.reference() as frozen:
        reference = logits(frozen)
    assert (reference - logits(peft(tiny_base, sft, quantize=quantize))).abs().max() < 1e-5
    assert (reference - wanted).abs().max() > 1e-3


@pytest.mark.slow
def test_evaluated_again_a_run_has_the_numbers_of_its_training_to_the_bit(runs: Path) -> None:
    found = evaluate(runs / "nf4")
    table = Run(runs / "nf4").pairs()
    assert table is not None
    for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
        assert getattr(found.scored, name).tolist() == getattr(table, name).tolist(), name


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_merged_it_is_one_model_and_packaged_one_adapter(
    quantize: str, runs: Path, tiny_base: Path, sft: Path, tmp_path: Path
) -> None:
    run = runs / quantize
    wanted = logits(peft(tiny_base, sft, run / "trained", quantize=quantize))
    done = merge(run, tmp_path / "merged", dtype="fp32", pairs=6)
    assert done.faults == [] and done.describe() == "serves what was trained"
    assert done.report["held_out"]["shift_kept"] == pytest.approx(1, abs=1e-3)
    assert (logits(peft(tmp_path / "merged")) - wanted).abs().max() < 1e-5
    with open_source(run, pairs=6) as source:
        _, held_out = package_adapter(source, tmp_path / "package")
    assert held_out is not None and held_out.shift_kept == pytest.approx(1, abs=1e-3)
    assert (logits(peft(tiny_base, tmp_path / "package", quantize=quantize)) - wanted).abs().max() < 1e-5
    saved = (run / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "package" / "adapter_model.safetensors").read_bytes() == saved


@pytest.mark.slow
def test_a_sum_that_is_not_what_was_trained_is_not_served(runs: Path, tmp_path: Path) -> None:
    """The proof is held against the two adapters of training, not against their sum."""
    from pe_dpo.errors import MergeRefused

    run = Path(shutil.copytree(runs / "none", tmp_path / "run"))
    weights = load_file(run / "adapter_model.safetensors")
    weights |= {name: one * 1.5 for name, one in weights.items() if "lora_B" in name}
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is not what training wrote"):
        merge(run, tmp_path / "out", pairs=6)
    record = json.loads((run / "run.json").read_text())
    del record["hashes"]["adapter"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(MergeRefused, match="was not written"):
        merge(run, tmp_path / "out", pairs=6)


@pytest.mark.slow
def test_merged_at_a_scale_it_is_between_the_adapter_under_it_and_the_whole(
    runs: Path, tiny_base: Path, sft: Path, tmp_path: Path
) -> None:
    run = runs / "none"
    done = merge(run, tmp_path / "half", scale=0.3, dtype="fp32", pairs=6)
    assert done.faults == []
    wanted = logits(peft(tiny_base, sft, run / "trained", shares=(1, 0.3)))
    assert (logits(peft(tmp_path / "half")) - wanted).abs().max() < 1e-5


def test_the_trained_half_alone_is_not_taken_for_the_policy(stirred: Any, tmp_path: Path, tiny_base: Path) -> None:
    save_policy(stirred, tmp_path / "run")
    half = tmp_path / "run" / "trained"
    with pytest.raises(
        ModelError, match=r"was trained over the adapter in .*, and without that it is another model; name .*run"
    ):
        SavedPolicy(half, base=str(tiny_base))
    with pytest.raises(ModelError, match="without that it is another model"):
        lay_under(attach_adapter(load_base(inspect_base(str(tiny_base))), rank=2, alpha=2), half)
    shutil.copytree(half, tmp_path / "runs" / "trained")  # a run that is called so is another matter, whatever lies beside it
    shutil.copytree(half, tmp_path / "runs" / "reference")
    assert SavedPolicy(tmp_path / "runs" / "trained", base=str(tiny_base)).kind == "adapter"
    shutil.rmtree(tmp_path / "run" / "reference")
    with pytest.raises(ModelError, match="reference: is missing, the adapter over which"):
        load_adapter_for_evaluation(load_base(inspect_base(str(tiny_base))), tmp_path / "run")


@pytest.mark.slow
def test_chat_card_and_report_name_the_reference(
    runs: Path, tiny_base: Path, sft: Path, logged: list[str], tmp_path: Path
) -> None:
    side = open_side_by_side(runs / "none")
    with side.speaking_as("base"):
        assert (logits(side.policy.model) - logits(peft(tiny_base, sft))).abs().max() < 1e-5
    assert logged[-1] == f"base: {tiny_base} with the adapter that training was over; tuned: {runs / 'none'}"
    record = json.loads((runs / "none" / "run.json").read_text())
    assert record["reference_card"]["is"] == f"the base with the adapter {sft}"
    card = (runs / "none" / "README.md").read_text()
    assert f"It is the sum of two: `{sft.name}`, which stayed frozen and is the reference" in card
    lines = card.partition("```python\n")[2].partition("```")[0].replace("'.'", repr(str(runs / "none")))
    loaded: dict[str, Any] = {}
    exec(lines.replace(repr(tiny_base.name), repr(str(tiny_base))), loaded)
    assert (logits(loaded["model"]) - logits(load_policy(runs / "none").model)).abs().max() < 1e-5
    rows = json.dumps([str(one) for one in report_run(runs / "none").sections], ensure_ascii=False)
    assert f"over the frozen adapter {sft}, which π0 has" in rows


# --------------------------------------------------------------------------------------------------------- killed, resumed


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_straight_run_and_another_adapter_is_refused(
    runs: Path, sft: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    under = Path(shutil.copytree(sft, tmp_path / "under"))
    recipe = make_recipe(f"adapter.over={under}", *SETTINGS, "train.save_every=2")
    with pytest.raises(Killed):
        train(recipe, callbacks=[KillAt(2)])

    weights = load_file(under / "adapter_model.safetensors")
    save_file(
        {name: one * 1.01 for name, one in weights.items()}, under / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(RunFolderError, match=r"other inputs.*\n  over:"):
        train(recipe, resume=True)

    shutil.copy(sft / "adapter_model.safetensors", under)
    moved = under.rename(tmp_path / "moved")  # the same weights in another folder are the same adapter
    with pytest.raises(ModelError, match=r"under: no adapter_config\.json there"):
        train(recipe, resume=True)
    folder = train(make_recipe(f"adapter.over={moved}", *SETTINGS, "train.save_every=2"), resume=True).folder
    for part in ("", "trained", "reference"):
        ours, straight = (load_file(one / part / "adapter_model.safetensors") for one in (folder, runs / "none"))
        assert ours.keys() == straight.keys() and all(torch.equal(ours[name], straight[name]) for name in ours), part
    assert Run(folder).info.after == Run(runs / "none").info.after


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("adapter.start=b", "adapter.reference=base"),
            "adapter.over: a stays frozen under a new adapter, start goes on",
        ),
        (("adapter.reference=adapter",), "adapter.reference: over says it already: the base with that frozen adapter"),
        (("adapter.reference=base",), "adapter.reference: over says it already"),
    ],
)
def test_a_recipe_that_says_it_twice_is_refused(make_recipe: Callable, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe("adapter.over=a", *settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "is a DoRA adapter; .*; write it into its base first .*, and take BASE as model.base"),
        ({"modules_to_save": ["lm_head"]}, r"trains whole modules \(lm_head\); .*; write it into its base first"),
        ({"bias": "lora_only"}, "has bias=lora_only, which stays on .*; write it into its base first"),
        ({"target_modules": ["nowhere"]}, "does not load onto this base"),
    ],
)
def test_an_adapter_that_cannot_lie_under_another_is_refused_before_the_base_is_read(
    config: dict[str, Any], message: str, sft: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(sft, tmp_path / "other"))
    says = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(says | config))
    with pytest.raises(ModelError, match=message):
        prepare_run(make_recipe(f"adapter.over={other}"))


def test_an_adapter_of_a_base_of_another_size_is_refused_before_the_base_is_read(
    make_recipe: Callable, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "small")
    other = make_adapter(tmp_path / "small", tmp_path / "other")
    with pytest.raises(ModelError, match="other: does not load onto this base"):
        prepare_run(make_recipe(f"adapter.over={other}"))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft's own, of its own pattern
def test_experts_that_are_no_modules_cannot_be_trained_over_an_adapter(tmp_path: Path) -> None:
    """Their sum with what lies under them is no adapter that plain PEFT loads."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, **shape))
    base.save_pretrained(tmp_path / "base")
    under = make_adapter(tmp_path / "base", tmp_path / "under", target_modules=["q_proj"])
    model = attach_adapter(base, rank=2, alpha=4, targets=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ModelError, match=r"adapter\.over: the new adapter would be on .*gate_up_proj.* too, experts"):
        lay_under(model, under)


def test_a_run_does_not_empty_the_folder_of_the_adapter_that_it_is_over(
    make_recipe: Callable, sft: Path, tmp_path: Path
) -> None:
    under = shutil.copytree(sft, tmp_path / "run" / "sft")
    with pytest.raises(RunFolderError, match=r"adapter\.over lies in the output folder"):
        train(make_recipe(f"adapter.over={under}"))


def test_another_chat_template_beside_the_adapter_is_pointed_at(
    sft: Path, tiny_base: Path, make_recipe: Callable, tmp_path: Path, warned: list[str]
) -> None:
    under = Path(shutil.copytree(sft, tmp_path / "under"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base / name, under)
    prepare_run(make_recipe(f"adapter.over={under}"))
    assert warned == []
    (under / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    prepare_run(make_recipe(f"adapter.over={under}"))
    assert len(warned) == 1 and warned[0].startswith(
        f"warning: {under}: has a chat template beside it, and the pairs are rendered with"
    )


@pytest.mark.slow
def test_a_run_has_its_adapter_in_it_already(runs: Path, sft: Path) -> None:
    with (
        pytest.raises(UsageError, match="that it starts from or is over, so that is in it already"),
        open_source(runs / "none", sft=sft, pairs=0),
    ):
        pass


# ---------------------------------------------------------------------------------------------------------- transposed layers


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_on_transposed_layers_the_sum_is_both_too(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    base.save_pretrained(tmp_path / "base")
    under = make_adapter(tmp_path / "base", tmp_path / "under", target_modules=["c_attn", "c_fc"])
    model = lay_under(attach_adapter(base, rank=2, alpha=4, targets=["c_attn", "attn.c_proj"]), under).eval()
    for parameter in adapter_parameters(model):
        parameter.data.normal_(0, 0.1)
    save_policy(model, tmp_path / "run")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    found = logits(PeftModel.from_pretrained(again, tmp_path / "run").eval())
    assert (found - logits(model)).abs().max() < 1e-5
    with as_reference(model) as frozen:
        assert (found - logits(frozen)).abs().max() > 1e-2
