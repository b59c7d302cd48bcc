"""Verdicts on the claims of papers: each of the four, for scores and for costs, and what counts as a pair."""

import pytest
import yaml
from synthetic_runs import MEBIBYTE, result, write

from analysis import claims
from analysis.claim_file import Claim, read_claims
from analysis.claims import REPRODUCED, UNCLEAR, UNTESTABLE, WRONG
from analysis.evidence import prepared
from analysis.results import load

NAMED = {"id": "c", "paper": "P", "place": "abstract", "statement": "S"}


def claim(metric="accuracy", relation="at least", left=None, right=None, **changes):
    left, right = left or {"method": "lors"}, {"method": "spp"} if right is None else right
    return Claim(**NAMED, metric=metric, relation=relation, left=left, right=right, **changes)


def judged(folder, of_claim, *results):
    write(folder, *results)
    return claims.judge(of_claim, prepared(load([folder])))


def seeds(method, accuracies, **changes):
    return [result(method, seed=seed, accuracy=accuracy, **changes) for seed, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((0.80, 0.81, 0.80), (0.70, 0.70, 0.71), REPRODUCED),
        ((0.70, 0.70, 0.71), (0.80, 0.81, 0.80), WRONG),
        ((0.70, 0.72, 0.71), (0.71, 0.70, 0.71), UNCLEAR),
        ((0.80,), (0.70,), UNCLEAR),
    ],
)
def test_scores_are_judged_beyond_seeds_and_items(tmp_path, ours, theirs, verdict):
    found = judged(tmp_path, claim(), *seeds("lors", ours), *seeds("spp", theirs))
    assert found.verdict == verdict and found.models == ["microworld"]
    (pair,) = found.evidence
    assert len(pair.keys) == len(ours) + len(theirs)
    assert f"(n {len(ours)}) against" in pair.measured
    assert ("one seed" in pair.measured) == (len(ours) == 1)


def test_tolerance_turns_not_distinguishable_into_reproduced(tmp_path):
    runs = [*seeds("lors", (0.700, 0.701, 0.702)), *seeds("spp", (0.702, 0.701, 0.701))]
    assert judged(tmp_path, claim(), *runs).verdict == UNCLEAR
    assert judged(tmp_path, claim(tolerance=5.0), *runs).verdict == REPRODUCED
    assert judged(tmp_path, claim(relation="equal", tolerance=5.0), *runs).verdict == REPRODUCED


def test_equal_fails_only_where_the_difference_is_beyond_the_tolerance(tmp_path):
    runs = [*seeds("lors", (0.80, 0.81, 0.80)), *seeds("spp", (0.70, 0.70, 0.71))]
    assert judged(tmp_path, claim(relation="equal", tolerance=2.0), *runs).verdict == WRONG
    assert judged(tmp_path, claim(relation="equal", tolerance=10.0), *runs).verdict == UNCLEAR


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((80.0, 82.0, 84.0), (95.0, 100.0, 105.0), REPRODUCED),
        ((110.0, 115.0, 120.0), (95.0, 100.0, 105.0), WRONG),
        ((90.0, 97.0, 104.0), (95.0, 100.0, 105.0), UNCLEAR),
    ],
)
def test_step_times_are_judged_by_their_ranges(tmp_path, ours, theirs, verdict):
    runs = result("lors", step_ms=ours), result("spp", step_ms=theirs)
    found = judged(tmp_path, claim("step_ms", "at most"), *runs)
    assert found.verdict == verdict
    assert f"{ours[1]:.1f} ms against 100.0 ms: {ours[1] / 100:.3g} times" in found.evidence[0].measured


def test_costs_know_factor_and_tolerance(tmp_path):
    runs = result("lors", train_peak=103 * MEBIBYTE), result("spp", train_peak=100 * MEBIBYTE)
    of = {"metric": "train_peak"}
    assert judged(tmp_path, claim(**of, relation="at most"), *runs).verdict == WRONG
    assert judged(tmp_path, claim(**of, relation="at most", tolerance=0.05), *runs).verdict == REPRODUCED
    assert judged(tmp_path, claim(**of, relation="at least", factor=1.02), *runs).verdict == REPRODUCED
    assert judged(tmp_path, claim(**of, relation="equal", tolerance=0.02), *runs).verdict == WRONG
    assert judged(tmp_path, claim(**of, relation="equal", tolerance=0.05), *runs).verdict == REPRODUCED


def test_one_lost_zero_refutes_that_all_are_kept(tmp_path):
    kept = claim("zeros_kept", "at least", right=1.0)
    assert judged(tmp_path, kept, result("lors")).verdict == REPRODUCED
    assert judged(tmp_path, kept, result("lors", seed=1, lost=1)).verdict == WRONG


def test_what_was_not_run_is_not_testable_and_named(tmp_path):
    found = judged(tmp_path, claim(), *seeds("lors", (0.8, 0.8)))
    assert (found.verdict, found.reason) == (UNTESTABLE, "no finished run of spp with accuracy")
    found = judged(tmp_path, claim(scope={"label": ["2:4"]}), *seeds("spp", (0.7, 0.7)))
    assert found.reason == "no finished run of lors or spp with accuracy at 2:4"
    never = Claim(**NAMED, not_testable="the suite has no such task")
    assert judged(tmp_path, never).reason == "the suite has no such task"


@pytest.mark.parametrize(
    "apart",
    [
        {"sparsity": 0.7},
        {"pruner": "sparsegpt"},
        {"model": "llama2_7b"},
        {"config": {"train.steps": 100}},
        {"config": {"data.name": "slimpajama"}},
        {"environment": {"device": "another"}},
        {"environment": {"torch": "2.11.0"}},
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_no_pair(tmp_path, apart):
    found = judged(tmp_path, claim(), *seeds("lors", (0.8, 0.8)), *seeds("spp", (0.7, 0.7), **apart))
    assert found.verdict == UNTESTABLE and "not on the same model" in found.reason


def test_tuned_learning_rates_may_differ_and_swept_ones_are_paired(tmp_path):
    low, high = ({"config": {"train.learning_rate": rate}} for rate in (1e-4, 4e-3))
    tuned = [*seeds("lors", (0.8, 0.8, 0.8), **low), *seeds("spp", (0.7, 0.7, 0.7), **high)]
    assert len(judged(tmp_path / "tuned", claim(), *tuned).evidence) == 1
    search = [*seeds("lors", (0.6,), **high), *seeds("spp", (0.9,), **low)]
    assert len(judged(tmp_path / "tuned", claim(), *search).evidence) == 1
    swept = [*seeds("lors", (0.8, 0.8, 0.8), **high), *seeds("spp", (0.9, 0.9, 0.9), **low)]
    found = judged(tmp_path / "tuned", claim(), *swept)
    assert sorted(pair.state for pair in found.evidence) == ["fails", "holds"]
    assert found.verdict == WRONG


def test_a_rate_found_for_a_method_is_compared_with_all_options_of_the_other(tmp_path):
    ours = seeds("lors", (0.8, 0.8, 0.8), config={"train.learning_rate": 1e-2})
    options = [{"method.peft.init": "kaiming"}, {"method.peft.init": "gradient"}]
    theirs = [run for config in options for run in seeds("spp", (0.7, 0.7, 0.7), config=config)]
    assert len(judged(tmp_path, claim(), *ours, *theirs).evidence) == 2
    wider = seeds("spp", (0.7, 0.7, 0.7), config={"adapter.r": 32})
    assert len(judged(tmp_path, claim(), *wider).evidence) == 2


def test_an_option_sets_two_variants_of_a_method_apart(tmp_path):
    of = claim(
        left={"method": "lors", "method.peft.init": "gradient"}, right={"method": "lors", "method.peft.init": "kaiming"}
    )
    kaiming = {"config": {"method.peft.init": "kaiming"}}
    runs = [*seeds("lors", (0.8, 0.8, 0.8)), *seeds("lors", (0.7, 0.7, 0.7), **kaiming)]
    assert judged(tmp_path, of, *runs).verdict == REPRODUCED


def test_a_seed_that_a_method_takes_from_the_run_is_no_variant(tmp_path):
    own = [result("xgblora", seed=seed, accuracy=0.8, config={"method.peft.seed": seed}) for seed in range(3)]
    found = judged(tmp_path, claim(left={"method": "xgblora"}), *own, *seeds("spp", (0.7, 0.7, 0.7)))
    assert found.verdict == REPRODUCED and len(found.evidence) == 1


def test_end_states_are_told_apart_and_the_first_is_the_headline(tmp_path):
    run = result("lora", states=("adapter", "dense"), lost=900)
    assert judged(
        tmp_path, claim("zeros_kept", "at most", {"method": "lora", "end_state": "dense"}, 0.99), run
    ).evidence
    assert len(judged(tmp_path, claim("step_ms", "at most", {"method": "lora"}, 200.0), run).evidence) == 1


def test_controls_are_compared_without_seeds_and_across_pruners(tmp_path):
    runs = [result("none", pruner=name, accuracy=score) for name, score in (("wanda", 0.75), ("magnitude", 0.6))]
    wanda, magnitude = ({"method": "pruned", "pruner": name} for name in ("wanda", "magnitude"))
    found = judged(tmp_path, claim(left=wanda, right=magnitude), *runs)
    assert found.verdict == REPRODUCED and "(no seed)" in found.evidence[0].measured
    dense = judged(
        tmp_path, claim(left=wanda, right={"method": "dense"}, scope={"label": ["0.5"]}, tolerance=9.0), *runs
    )
    assert dense.verdict == REPRODUCED
    tuned = judged(
        tmp_path / "tuned", claim(right={"method": "pruned"}), *seeds("lors", (0.8, 0.8), pruned=(0.75, 1.2))
    )
    assert tuned.verdict == REPRODUCED and len(tuned.evidence) == 1


@pytest.mark.parametrize("recorded", [True, False])
def test_held_out_losses_are_paired_over_the_windows_where_these_are_recorded(tmp_path, recorded):
    """Wanda is 0.01 nats better in every window; over 100 windows that scatter by 0.1 the mean has an error of 0.01."""
    runs = [result("none", pruner=name, loss=loss) for name, loss in (("wanda", 1.00), ("magnitude", 1.01))]
    for run in runs:
        of_text = run["eval"]["perplexity"]
        if recorded:
            of_text["losses"] = [of_text["loss"] + 0.1 * (-1) ** i + 0.001 * (i % 3 - 1) for i in range(99)]
    wanda, magnitude = ({"method": "pruned", "pruner": name} for name in ("wanda", "magnitude"))
    found = judged(tmp_path, claim("heldout_loss", "at most", wanda, magnitude), *runs)
    assert found.verdict == (REPRODUCED if recorded else UNCLEAR)


def test_one_failing_cell_is_enough_to_refute(tmp_path):
    good = [*seeds("lors", (0.8, 0.8)), *seeds("spp", (0.7, 0.7))]
    bad = [*seeds("lors", (0.5, 0.5), sparsity=0.7), *seeds("spp", (0.7, 0.7), sparsity=0.7)]
    found = judged(tmp_path, claim(), *good, *bad)
    assert found.verdict == WRONG and found.reason == "holds in 1, fails in 1 of 2"


def test_more_pairs_need_a_clearer_failure_and_no_clearer_success(tmp_path):
    """d = -4 points, standard error 1.1 from three seeds and items: p = 0.042, enough for one pair, not for more."""
    noisy, calm = (0.656, 0.67, 0.684), (0.71, 0.71, 0.71)
    for sparsity in (0.5, 0.6, 0.7):
        pairs = [*seeds("lors", noisy, sparsity=sparsity), *seeds("spp", calm, sparsity=sparsity)]
        refuted = judged(tmp_path / "refuted", claim(), *pairs)
        shown = judged(tmp_path / "shown", claim(left={"method": "spp"}, right={"method": "lors"}), *pairs)
        assert refuted.verdict == (WRONG if sparsity == 0.5 else UNCLEAR)
        assert shown.verdict == REPRODUCED


def test_the_claims_file_is_whole_and_covers_every_paper():
    known = read_claims()
    papers = " ".join(claim.paper for claim in known)
    names = "LoRS SPP SQFT Wanda SparseGPT Flat-LoRA GeLoRA GeoLoRA LoRA-Mini LoRA-RITE MoRA RM-LoRA SHERL SoRA XGBLoRA"
    assert all(f"{name} (arXiv" in papers for name in names.split())
    assert all(claim.comparison != "-" or claim.not_testable for claim in known)
    by_id = {claim.id: claim.comparison for claim in known}
    assert by_id["lora-mini-size"] == "lora_mini[keep_zeros=false].trainable ≤ 0.05 × lora.trainable"
    assert by_id["sora-accuracy"] == "sora[adapter, keep_zeros=false].accuracy ≥ lora[adapter].accuracy"
    assert by_id["lors-memory-lora"] == "lors.train_peak ≤ lora.train_peak, within 2 %"


def test_times_of_profiles_with_random_zeros_bear_on_the_claims_about_time(tmp_path):
    of = next(claim for claim in read_claims() if claim.id == "lors-time-spp-gc")
    profile = {"mode": "profile", "pruner": "random"}
    runs = result("lors", step_ms=(80.0, 82.0, 84.0), **profile), result("spp_gc", **profile)
    assert judged(tmp_path, of, *runs).verdict == REPRODUCED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "claim c: unknown key colour"),
        ({"relation": "above"}, "claim c: relation=above: one of at least, at most, equal"),
        ({"metric": "speed"}, "claim c: metric=speed: one of accuracy"),
        ({"scope": {"seed": [1]}}, "claim c: scope has seed; known: label, pruner"),
        ({"not_testable": "no"}, "claim c: not_testable, yet with a comparison"),
    ],
)
def test_a_bad_claim_is_one_clear_line(tmp_path, changes, message):
    good = NAMED | {"metric": "accuracy", "left": {"method": "a"}, "relation": "at least", "right": {"method": "b"}}
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump({"claims": [good | changes]}))
    with pytest.raises(ValueError, match=message):
        read_claims(file)


def test_report_says_what_the_verdict_is_about(tmp_path, capsys):
    from analysis.__main__ import main

    write(tmp_path, *seeds("lors", (0.8, 0.8, 0.81)), *seeds("spp", (0.7, 0.7, 0.7)))
    assert main(["claims", str(tmp_path)]) == 0
    text = (tmp_path / "claims.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "Verdicts are on what was run here (microworld), not on the models of the papers." in text
    assert "conditional on one pruned checkpoint and on learning rates from one search seed" in text
    assert "## lors-accuracy-spp: reproduced" in text and "the paper used llama2_7b, llama2_13b, llama3_8b" in text
    assert (
        "**not testable here** | no finished run of sqft with accuracy pruned by magnitude or wanda or sparsegpt"
        in text
    )
