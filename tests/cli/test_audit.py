"""`pe-dpo audit`: the table, the JSON, the plots, and what it refuses."""

import json

import pytest


@pytest.fixture(scope="module")
def audited(pe_dpo, recipe_file, tmp_path_factory):
    """The audit of the tiny recipe, with plots, and their folder."""
    folder = tmp_path_factory.mktemp("plots") / "made"
    return pe_dpo("audit", recipe_file, "--plots", folder), folder


@pytest.mark.slow
def test_the_tables_tell_reference_loss_and_gamma(audited):
    done, _ = audited
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("read 33 rows: ")
    for words in (
        "π0: the base, adapters off, quantize none, float32; log-probs ",
        "What the reference prefers: 24 pairs to train on, 24 prompts",
        "right at equal length",
        "of the pairs are right by one of the two and not by the other",
        "What Δ0 (summed) tells of the labels",
        "What the loss makes of it, by κ = γ/β: β 0.1, Δ0 summed, times in 1/(2β²)",
        "recipe: 1x",
        "90% of the wrong pairs have flipped by",
        "γ from these data",
        "balance:0.5",
        "warning: 24 prompts are few",
    ):
        assert words in done.out


@pytest.mark.slow
def test_the_table_has_one_column_for_the_recipe_and_one_for_each_kappa(audited):
    (header,) = [line for line in audited[0].out.splitlines() if "recipe: 1x" in line]
    assert [cell.strip() for cell in header.split("┃")[2:-1]] == ["recipe: 1x", "κ = 0", "κ = 0.5", "κ = 1", "κ = 2"]
    (right,) = [line for line in audited[0].out.splitlines() if "gradient on pairs ranked right" in line]
    recipe, _, _, one, _ = (float(cell) for cell in right.split("│")[2:-1])
    assert recipe == one


def test_the_plots_are_drawn(audited):
    done, folder = audited
    names = {"audit-preference", "audit-length", "audit-weights", "audit-flips"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names}
    assert all(path.stat().st_size > 3000 for path in folder.iterdir())
    assert "4 plots as PNG in" in done.out


def test_json_is_all_that_is_printed(pe_dpo, recipe_file):
    done = pe_dpo("audit", recipe_file, "--json", "--gamma", "scale:1")
    found = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert (found["pairs"], found["asked_gamma"]) == (24, "scale:1")
    assert found["recipe"]["gamma"] == found["ways"][2]["calibration"]["gamma"] > 0
    assert [one["kappa"] for one in found["kappas"]] == [0, 0.5, 1, 2]


@pytest.mark.slow
def test_noise_has_a_table_of_its_own(pe_dpo, recipe_file):
    done = pe_dpo("audit", recipe_file, "--four-bit-noise")
    assert done.code == 0
    assert "η = Δ0 with nf4 − Δ0 in float32, on 24 pairs" in done.out
    assert "reliability 1 − Var(η)/Var(Δ0)" in done.out


def test_the_dials_turn_the_loss(pe_dpo, recipe_file):
    dials = ["--loss", "simpo", "--beta", 1, "--margin", 0.5, "--set", "loss.reduce=mean"]
    done = pe_dpo("audit", recipe_file, "--json", *dials)
    found = json.loads(done.out)
    assert (found["reduce"], found["beta"], found["recipe"]["gamma"]) == ("mean", 1.0, 0.0)


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["nowhere.yaml"], 2, "nowhere.yaml: no such file and no such recipe"),
    (["RECIPE", "--gamma", "balance"], 2, "write auto, balance:S with S the share"),
    (["RECIPE", "--gamma", "balance:0.0001"], 2, "loss.gamma: balance:0.0001: no gamma gives this share"),
    (["RECIPE", "--plots", "RECIPE"], 2, "is a file; name a folder"),
    (["RECIPE", "--set", "data.train=nowhere.jsonl"], 1, "nowhere.jsonl: there is no such file or folder"),
])  # fmt: skip
def test_what_cannot_be_is_one_message(pe_dpo, recipe_file, arguments, code, message):
    done = pe_dpo("audit", *(recipe_file if one == "RECIPE" else one for one in arguments))
    assert done.code == code
    assert done.err.startswith("error: ")
    assert message in done.err


def test_check_and_show_cope_with_a_gamma_that_is_still_to_be_found(pe_dpo, recipe_file):
    done = pe_dpo("check", recipe_file, "--gamma", "auto")
    assert (done.code, done.err) == (0, "")
    assert "loss: generalized DPO, beta 0.1, gamma auto (found from the data)," in done.out
    assert "reference: the base, adapters off" in done.out.splitlines()
    found = json.loads(pe_dpo("check", recipe_file, "--gamma", "balance:0.5", "--json").out)
    assert found["loss"]["kappa"] is None
    assert found["reference"]["run_in_training"] is True


def test_a_recipe_that_asks_for_one_is_shown(pe_dpo, recipe_file, tmp_path):
    path = tmp_path / "auto.yaml"
    path.write_text(recipe_file.read_text().replace("loss: {beta: 0.1}", "loss: {beta: 0.1, gamma: auto}"))
    done = pe_dpo("recipes", "show", path)
    assert (done.code, done.err) == (0, "")
    assert "z = 0.1·Δπ − γ·Δ0" in done.out


def test_fewer_rows_and_mixout_may_be_asked_for(pe_dpo, recipe_file):
    done = pe_dpo("audit", recipe_file, "--limit", 20, "--mixout", 0.5, "--json")
    assert done.code == 0 and json.loads(done.out)["pairs"] <= 20
    done = pe_dpo("audit", recipe_file, "--limit", 20, "--set", "data.limit=30")
    assert (
        done.code,
        done.err.startswith("error: --set data.limit=30 and --set data.limit=20: data.limit is given twice"),
    ) == (2, True)
