"""The reference's log-probs: equal to what π0 gives, never stale, never computed without need."""

import json
import shutil
import signal
import struct
import time

import pytest
import torch
import warm_process
from safetensors.torch import load_file, save_file

from pe_dpo.errors import StoreUnavailable
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.inference import reference as reference_module
from pe_dpo.inference.policy import load_policy
from pe_dpo.inference.reference import Reference, open_reference
from pe_dpo.inference.reference_store import ReferenceStore
from pe_dpo.inference.scorer import choose_scorer
from pe_dpo.model.adapter import as_reference
from pe_dpo.recipe import recipe_to_yaml
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.train import train


def reference_maker(tiny_recipe, output, store):
    """Builds the reference of a recipe over one store; returns it with the training pairs."""

    def make(*overrides, recipe=None, caching="auto", path=None):
        recipe = recipe or tiny_recipe(output, *overrides)
        data = prepare_run(recipe).data
        policy = load_policy(recipe, device="cpu")
        scorer = choose_scorer(policy.model, data.train, token_budget=500)
        reference = open_reference(policy, scorer, caching=caching, path=str(path or store))
        return reference, data.train

    return make


@pytest.fixture
def make_reference(tiny_recipe, tmp_path):
    return reference_maker(tiny_recipe, tmp_path / "run", tmp_path / "store.sqlite")


def fill(make_reference, *overrides):
    """Run all training pairs through a reference and write them down."""
    reference, pairs = make_reference(*overrides)
    logprobs = reference.logprobs(pairs)
    reference.flush()
    return logprobs, pairs


@pytest.fixture(scope="module")
def filled_once(tiny_recipe, tmp_path_factory):
    """A store with all training pairs of the tiny world in it, their log-probs, and the pairs."""
    folder = tmp_path_factory.mktemp("filled")
    return folder / "store.sqlite", *fill(reference_maker(tiny_recipe, folder / "run", folder / "store.sqlite"))


@pytest.fixture
def filled(filled_once, tmp_path):
    """The log-probs and the pairs that are in a copy of that store, which this test's references find."""
    store, logprobs, pairs = filled_once
    shutil.copy(store, tmp_path / "store.sqlite")
    return logprobs, pairs


def computed_again(make_reference, *overrides, **options):
    """How many of the training pairs another run has to compute."""
    reference, pairs = make_reference(*overrides, **options)
    reference.logprobs(pairs)
    return reference.computed


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("model.quantize=nf4",), ("model.dtype=bfloat16",)])
def test_stored_log_probs_are_those_of_the_base_to_the_bit(make_reference, settings):
    computed, pairs = fill(make_reference, *settings)
    reference, _ = make_reference(*settings)
    stored = reference.logprobs(pairs[::-1])
    assert reference.computed == 0
    with as_reference(reference.policy.model) as frozen:
        now = [reference.scorer.logprobs(frozen, [pair]) for pair in pairs]
    for side in ("chosen", "rejected", "chosen_lengths", "rejected_lengths"):
        assert getattr(stored, side).flip(0).tolist() == getattr(computed, side).tolist()
        assert getattr(computed, side).tolist() == [getattr(one, side).item() for one in now]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [
            "loss.beta=0.3",
            "loss.gamma=0.5x",
            "train.learning_rate=1",
            "train.seed=7",
            "train.pairs_per_step=3",
            "train.epochs=3",
        ],
        ["loss.preset=rso", "adapter.rank=2", "adapter.init=gaussian", "adapter.dropout=0.2"],
        ["loss.preset=simpo", "adapter.targets=[q_proj]", "train.tokens_per_microbatch=100"],
    ],
    ids=["loss and steps", "another adapter", "fewer layers"],
)
def test_what_does_not_move_the_reference_never_misses(filled, make_reference, changes):
    assert computed_again(make_reference, *changes) == 0


@pytest.mark.slow
@pytest.mark.parametrize("change", ["model.quantize=nf4", "model.dtype=bfloat16"])
def test_another_arithmetic_is_another_reference(filled, make_reference, change):
    _, pairs = filled
    assert computed_again(make_reference, change) == len(pairs)


def with_another_base(make_recipe, tiny_base, folder, change):
    copy = shutil.copytree(tiny_base, folder / "base")
    change(copy)
    return make_recipe(f"model.base={copy}", output="other")


@pytest.mark.slow
def test_one_changed_weight_is_another_reference(filled, make_reference, make_recipe, tiny_base, tmp_path):
    _, pairs = filled

    def nudge(base):
        weights = load_file(base / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
        save_file(weights, base / "model.safetensors", {"format": "pt"})

    recipe = with_another_base(make_recipe, tiny_base, tmp_path, nudge)
    assert computed_again(make_reference, recipe=recipe) == len(pairs)


def test_a_base_that_was_only_copied_is_the_same_reference(filled, make_reference, make_recipe, tiny_base, tmp_path):
    recipe = with_another_base(make_recipe, tiny_base, tmp_path, lambda base: None)
    assert computed_again(make_reference, recipe=recipe) == 0


def test_a_rotary_base_that_was_edited_in_the_configuration_is_another_reference(
    filled, make_reference, make_recipe, tiny_base, tmp_path
):
    _, pairs = filled

    def edit(base):
        config = json.loads((base / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 500.0
        (base / "config.json").write_text(json.dumps(config))

    recipe = with_another_base(make_recipe, tiny_base, tmp_path, edit)
    assert computed_again(make_reference, recipe=recipe) == len(pairs)


@pytest.mark.slow
def test_a_changed_template_misses_and_a_changed_row_misses_alone(
    filled, make_reference, make_recipe, tiny_base, tiny_pairs, tmp_path
):
    _, pairs = filled
    assert computed_again(make_reference, "data.template=plain") == len(pairs)
    lines = (tiny_pairs / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps({**row, "rejected": row["rejected"] + " indeed"})
    (tmp_path / "changed.jsonl").write_text("\n".join(lines) + "\n")
    assert computed_again(make_reference, f"data.train={tmp_path / 'changed.jsonl'}", "data.eval=0.0") == 1


def test_a_truncation_that_cuts_a_prompt_misses_what_it_cut(filled, make_reference):
    _, pairs = filled
    length = sorted(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)[-3]
    cut = computed_again(make_reference, f"data.max_length={length}", "data.overlong=truncate_prompt")
    longer = [p for p in pairs if len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) > length]
    assert cut == len(longer) > 0


def test_pairs_with_their_labels_swapped_are_not_scored_again(filled, make_reference):
    """The store holds answers, not pairs."""
    from dataclasses import replace

    logprobs, pairs = filled
    reference, _ = make_reference()
    swapped = reference.logprobs([replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs])
    assert reference.computed == 0
    assert swapped.chosen.tolist() == logprobs.rejected.tolist()


@pytest.mark.slow
def test_a_frozen_adapter_is_part_of_the_reference(filled, make_reference, make_recipe, tmp_path):
    _, pairs = filled
    start = train(make_recipe("train.max_steps=2", output="sft")).folder
    settings = (f"adapter.start={start}", "adapter.rank=16", "adapter.alpha=32")
    assert computed_again(make_reference, *settings, "adapter.reference=adapter") == len(pairs)
    assert computed_again(make_reference, *settings, "adapter.reference=base") == 0


def test_a_base_whose_remembered_hash_is_stale_is_found_out_by_scoring_again(
    filled, make_reference, monkeypatch, warned: list[str]
):
    """The worst case: other weights behind a file of the same name, size and times."""
    lines = warned
    reference, pairs = make_reference()
    with torch.no_grad():
        reference.policy.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.5)
    why = reference.recheck(pairs)
    assert why.startswith("train.jsonl:")
    reference.forget(why)
    assert len(lines) == 1
    assert lines[0].startswith("warning: the stored reference was not this one (train.jsonl:")
    before = reference.computed
    fresh = reference.logprobs(pairs)
    assert reference.computed - before == len(pairs)
    with as_reference(reference.policy.model) as frozen:
        assert fresh.chosen.tolist() == reference.scorer.logprobs(frozen, pairs).chosen.tolist()


def test_a_sound_store_is_not_thrown_away(filled, make_reference, warned: list[str]):
    lines = warned
    reference, pairs = make_reference()
    assert reference.recheck(pairs) is None
    assert (lines, reference.computed) == ([], 4)


def poison(path, nats, *, share=1.0):
    """Move stored log-probs by so many nats, with right checksums, as another library version might have left them."""
    import sqlite3

    from pe_dpo.inference import reference_store as store

    with sqlite3.connect(path) as connection:
        connection.text_factory = bytes
        ids = dict(connection.execute("SELECT id, name FROM reference").fetchall())
        rows = connection.execute("SELECT reference, key, value FROM answer").fetchall()
        for number, (reference, key, value) in enumerate(rows):
            if number < share * len(rows):
                name = ids[reference] if isinstance(ids[reference], str) else ids[reference].decode()
                logprob, tokens = struct.unpack("<dq", value[:16])
                moved = store._with_checksum(struct.pack("<dq", logprob + nats, tokens), name.encode(), key)
                connection.execute("UPDATE answer SET value = ? WHERE reference = ? AND key = ?", (moved, reference, key))


@pytest.mark.slow
@pytest.mark.parametrize(("gamma", "dtype"), [("1x", "float32"), ("0", "bfloat16")])
def test_a_store_that_is_off_by_little_is_found_before_training(make_recipe, gamma, dtype, tmp_path, warned: list[str]):
    """At γ = 0 nothing but the held-out pairs is stored, and they are looked at all the same."""
    store = tmp_path / "store.sqlite"
    settings = (f"reference.store={store}", f"loss.gamma={gamma}", "loss.margin=1", f"model.dtype={dtype}", "train.max_steps=2")
    clean = train(make_recipe(*settings, output="clean"))
    poison(store, 0.01)
    lines = warned
    again = train(make_recipe(*settings, output="again"))
    assert any("the stored reference was not this one" in line for line in lines)
    assert again.before == clean.before
    assert again.after == clean.after


@pytest.mark.slow
def test_eval_throws_a_store_away_that_is_not_of_this_reference(make_recipe, tmp_path, warned: list[str]):
    store = tmp_path / "store.sqlite"
    run = train(make_recipe(f"reference.store={store}", "train.max_steps=1")).folder
    clean = evaluate(run)
    poison(store, 0.5)
    lines = warned
    again = evaluate(run)
    assert any("the stored reference was not this one" in line for line in lines)
    assert again.scored.reference_chosen.tolist() == clean.scored.reference_chosen.tolist()


@pytest.mark.slow
def test_one_wrong_held_out_pair_among_right_ones_is_found(make_recipe, tmp_path):
    store = tmp_path / "store.sqlite"
    settings = (f"reference.store={store}", "loss.gamma=0", "loss.margin=1", "train.max_steps=1")
    clean = train(make_recipe(*settings, output="clean"))
    poison(store, 0.5, share=0.05)
    again = train(make_recipe(*settings, output="again"))
    assert again.before == clean.before


@pytest.mark.slow
def test_at_gamma_zero_no_training_pair_is_run_through_the_reference_for_a_check_either(make_recipe, monkeypatch, tmp_path):
    store = f"reference.store={tmp_path / 'store.sqlite'}"
    train(make_recipe(store, "train.max_steps=1", output="filled"))
    asked = []
    compute = Reference._compute
    monkeypatch.setattr(Reference, "_compute", lambda self, pairs: asked.extend(pairs) or compute(self, pairs))
    train(make_recipe(store, "loss.gamma=0", "loss.margin=1", "train.max_steps=1", "reference.policy=skip", output="skip"))
    assert {pair.where.split(":")[0] for pair in asked} == {"test.jsonl"}


def test_a_store_that_cannot_forget_is_given_up_and_the_run_goes_on(filled, make_reference, monkeypatch, warned: list[str]):
    lines = warned
    reference, pairs = make_reference()

    def full(self, *rest):
        raise StoreUnavailable("disk is full")

    monkeypatch.setattr(ReferenceStore, "forget", full)
    reference.forget("for a test")
    reference.logprobs(pairs)
    assert reference.computed == len(pairs)
    assert lines[0] == "warning: going on without the reference store: disk is full"


@pytest.mark.slow
def test_a_log_prob_that_is_not_finite_is_not_stored_and_its_row_is_named_by_the_step(make_recipe, monkeypatch, tmp_path):
    compute = Reference._compute

    def broken(self, pairs):
        scored = compute(self, pairs)
        scored.chosen[[pair.where == "train.jsonl:5" for pair in pairs]] = float("nan")
        return scored

    monkeypatch.setattr(Reference, "_compute", broken)
    record = read_object(train(make_recipe("train.epochs=1", f"reference.store={tmp_path / 'store.sqlite'}")).folder / RUN_FILE)
    assert record["bad_pairs"] == {"train.jsonl:5": "log-prob of its chosen answer under π0 is nan"}
    assert len(record["skipped_steps"]) == 1


@pytest.mark.slow
def test_where_log_probs_depend_on_company_the_reference_is_scored_in_the_policys(make_reference):
    """int8: outliers are those of the batch."""
    reference, pairs = make_reference("model.quantize=int8")
    reference.logprobs(pairs[:4])
    reference.logprobs(pairs[:4])
    assert reference.computed == 8


@pytest.mark.slow
def test_a_run_goes_on_without_a_store_that_cannot_be_and_says_so(make_reference, tmp_path, warned: list[str]):
    (tmp_path / "file").write_text("")
    lines = warned
    reference, pairs = make_reference(path=tmp_path / "file" / "store.sqlite")
    assert [line.split(":")[0] for line in lines] == ["warning"]
    assert "going on without the reference store" in lines[0]
    reference.logprobs(pairs)
    reference.logprobs(pairs)
    assert reference.computed == len(pairs)
    with pytest.raises(StoreUnavailable):
        make_reference(path=tmp_path / "file" / "store.sqlite", caching="store")


def test_a_store_that_fails_under_way_costs_nothing_but_itself(make_reference, monkeypatch, warned: list[str]):
    lines = warned
    reference, pairs = make_reference()

    def full(self, *rest):
        raise StoreUnavailable("disk is full")

    monkeypatch.setattr(ReferenceStore, "put", full)
    wanted = reference.logprobs(pairs)
    reference.flush()
    assert lines == ["warning: going on without the reference store: disk is full"]
    assert reference.logprobs(pairs).chosen.tolist() == wanted.chosen.tolist()


def test_a_damaged_store_is_rebuilt_and_the_numbers_are_the_same(filled, make_reference, tmp_path, warned: list[str]):
    wanted, pairs = filled
    path = tmp_path / "store.sqlite"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"x" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    lines = warned
    reference, _ = make_reference()
    assert reference.logprobs(pairs).chosen.tolist() == wanted.chosen.tolist()
    assert reference.computed > 0
    assert any("damaged" in line for line in lines)


@pytest.mark.slow
def test_a_run_of_two_epochs_scores_each_training_pair_once(make_recipe, monkeypatch):
    asked = []
    compute = Reference._compute
    monkeypatch.setattr(Reference, "_compute", lambda self, pairs: asked.extend(pairs) or compute(self, pairs))
    train(make_recipe(f"reference.store={make_recipe().output}.sqlite"))
    assert len(asked) == 24 + 9
    assert len({pair.where for pair in asked}) == 33


@pytest.mark.slow
def test_a_second_run_takes_all_from_the_store_and_is_the_first_to_the_bit(make_recipe, monkeypatch):
    store = f"reference.store={make_recipe().output}.sqlite"
    first = train(make_recipe(store, "train.max_steps=2", output="one"))
    calls = []
    compute = Reference._compute
    monkeypatch.setattr(Reference, "_compute", lambda self, pairs: calls.append(len(pairs)) or compute(self, pairs))
    second = train(make_recipe(store, "train.max_steps=2", output="two"))
    assert calls == [reference_module.RECHECKED]
    left, right = (load_file(run.folder / "adapter_model.safetensors") for run in (first, second))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_every_policy_trains_the_same_adapter(make_recipe):
    runs = [
        train(
            make_recipe(
                f"reference.policy={policy}",
                f"reference.store={make_recipe().output}-{policy}",
                "train.max_steps=2",
                output=policy,
            )
        )
        for policy in ("auto", "store", "step")
    ]
    adapters = [load_file(run.folder / "adapter_model.safetensors") for run in runs]
    for other in adapters[1:]:
        assert all(torch.equal(other[name], adapters[0][name]) for name in other)


PASS = """
import sys, time
from pathlib import Path
from pe_dpo.inference import reference as module
from pe_dpo.inference.reference import open_reference
from pe_dpo.inference.scorer import choose_scorer
from pe_dpo.recipe import load_recipe
from pe_dpo.inference.policy import load_policy
from pe_dpo.progress import progress, showing
from pe_dpo.training.preparation import prepare_run
module.SECONDS_BETWEEN_WRITES = 0.0
recipe = load_recipe(sys.argv[1])
data = prepare_run(recipe).data
policy = load_policy(recipe, device="cpu")
scorer = choose_scorer(policy.model, data.train, token_budget=1)
reference = open_reference(policy, scorer, caching="store", path=sys.argv[2])
def slowly(what, done, total):
    print(done, flush=True)
    time.sleep(0.05)
with showing(slowly), progress("scoring"):
    reference.logprobs(data.train)
reference.flush()
print("computed", reference.computed, flush=True)
"""


@pytest.mark.slow
def test_a_pass_that_was_killed_goes_on_where_it_stopped(make_recipe, make_reference, tmp_path):
    """SIGKILL once some pairs are written: the next pass computes the others alone, and all numbers are right."""
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(make_recipe()))
    store = tmp_path / "store.sqlite"
    process = warm_process.start(PASS, "recipe.yaml", store, folder=tmp_path)
    log = warm_process.log(process, tmp_path)
    while process.exitcode is None and not (log.exists() and "7" in log.read_text().splitlines()):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    reference, pairs = make_reference(path=store)
    logprobs = reference.logprobs(pairs)
    assert 0 < reference.computed <= 24 - 6
    with as_reference(reference.policy.model) as frozen:
        assert logprobs.chosen.tolist() == reference.scorer.logprobs(frozen, pairs).chosen.tolist()


@pytest.mark.slow
def test_two_runs_fill_one_store_at_once(make_recipe, make_reference, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(make_recipe()))
    store = tmp_path / "store.sqlite"
    both = [warm_process.start(PASS, "recipe.yaml", store, folder=tmp_path) for _ in range(2)]
    for process in both:
        process.join(timeout=120)
    said = [warm_process.log(process, tmp_path).read_text() for process in both]
    assert [process.exitcode for process in both] == [0, 0], said
    assert computed_again(make_reference, path=store) == 0


@pytest.mark.slow
def test_the_run_writes_down_which_way_its_pairs_went_and_what_the_reference_cost(make_recipe):
    result = train(make_recipe(f"reference.store={make_recipe().output}.sqlite", "train.max_steps=1"))
    record = read_object(result.folder / RUN_FILE)
    assert record["scoring"] == {"path": "segments", "tokens_per_forward": 512, "reference_pairs_computed": 8 + 9}
    assert len(Run(result.folder).metrics) >= 2
