"""Verdicts on the claims of papers: each of the four, for scores and for costs, and what counts as a pair."""

import pytest
import yaml
from synthetic_runs import MEBIBYTE, result, write

from analysis import claims
from analysis.__main__ import main
from analysis.claim_file import Claim, read_claims
from analysis.claims import REPRODUCED, UNCLEAR, UNTESTABLE, WRONG
from analysis.evidence import prepared
from analysis.results import load

NAMED = {"id": "c", "paper": "P", "place": "abstract", "statement": "S"}
KAIMING = {"method.peft.init": "kaiming"}


def claim(metric="accuracy", relation="at least", left=None, right=None, **changes):
    left, right = left or {"method": "lors"}, {"method": "spp"} if right is None else right
    return Claim(**NAMED, metric=metric, relation=relation, left=left, right=right, **changes)


def judged(folder, of_claim, *results):
    write(folder, *results)
    return claims.judge(of_claim, prepared(load([folder])))


def seeds(method, *accuracies, **changes):
    return [result(method, seed=seed, accuracy=accuracy, **changes) for seed, accuracy in enumerate(accuracies)]


HIGH, LOW, NEAR = (0.80, 0.81, 0.80), (0.70, 0.70, 0.71), (0.70, 0.72, 0.71)


@pytest.mark.parametrize(
    ("ours", "theirs", "changes", "verdict"),
    [
        (HIGH, LOW, {}, REPRODUCED),
        (LOW, HIGH, {}, WRONG),
        (NEAR, LOW, {}, UNCLEAR),
        ((0.80,), (0.70,), {}, UNCLEAR),
        (LOW, NEAR, {"tolerance": 5.0}, REPRODUCED),
        (LOW, NEAR, {"tolerance": 5.0, "relation": "equal"}, REPRODUCED),
        (HIGH, LOW, {"tolerance": 2.0, "relation": "equal"}, WRONG),
        (HIGH, LOW, {"tolerance": 10.0, "relation": "equal"}, UNCLEAR),
    ],
)
def test_scores_are_judged_beyond_seeds_and_items(tmp_path, ours, theirs, changes, verdict):
    found = judged(tmp_path, claim(**changes), *seeds("lors", *ours), *seeds("spp", *theirs))
    assert found.verdict == verdict and found.models == ["microworld"]
    (pair,) = found.evidence
    assert len(pair.keys) == len(ours) + len(theirs) and f"(n {len(ours)}) against" in pair.measured
    assert ("one seed" in pair.measured) == (len(ours) == 1)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [((80.0, 82.0, 84.0), REPRODUCED), ((110.0, 115.0, 120.0), WRONG), ((90.0, 97.0, 104.0), UNCLEAR)],
)
def test_step_times_are_judged_by_their_ranges(tmp_path, ours, verdict):
    runs = result("lors", step_ms=ours), result("spp", step_ms=(95.0, 100.0, 105.0))
    found = judged(tmp_path, claim("step_ms", "at most"), *runs)
    assert found.verdict == verdict
    assert f"{ours[1]:.1f} ms against 100.0 ms: {ours[1] / 100:.3g} times" in found.evidence[0].measured


def test_costs_know_factor_and_tolerance(tmp_path):
    runs = result("lors", train_peak=103 * MEBIBYTE), result("spp", train_peak=100 * MEBIBYTE)
    of = {"metric": "train_peak"}
    assert judged(tmp_path, claim(**of, relation="at most"), *runs).verdict == WRONG
    assert judged(tmp_path, claim(**of, relation="at most", tolerance=0.05)).verdict == REPRODUCED
    assert judged(tmp_path, claim(**of, relation="at least", factor=1.02)).verdict == REPRODUCED
    assert judged(tmp_path, claim(**of, relation="equal", tolerance=0.02)).verdict == WRONG
    assert judged(tmp_path, claim(**of, relation="equal", tolerance=0.05)).verdict == REPRODUCED


def test_one_lost_zero_refutes_that_all_are_kept(tmp_path):
    kept = claim("zeros_kept", "at least", right=1.0)
    assert judged(tmp_path, kept, result("lors")).verdict == REPRODUCED
    assert judged(tmp_path, kept, result("lors", seed=1, lost=1)).verdict == WRONG


def test_what_was_not_run_is_not_testable_and_named(tmp_path):
    found = judged(tmp_path, claim(), *seeds("lors", 0.8, 0.8))
    assert (found.verdict, found.reason) == (UNTESTABLE, "no finished run of spp with accuracy")
    found = judged(tmp_path, claim(scope={"label": ["2:4"]}), *seeds("spp", 0.7, 0.7))
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
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_no_pair(tmp_path, apart):
    found = judged(tmp_path, claim(), *seeds("lors", 0.8, 0.8), *seeds("spp", 0.7, 0.7, **apart))
    assert found.verdict == UNTESTABLE and "not on the same model" in found.reason


def test_tuned_learning_rates_may_differ_and_swept_ones_are_paired(tmp_path):
    low, high = ({"config": {"train.learning_rate": rate}} for rate in (1e-4, 4e-3))
    tuned = [*seeds("lors", 0.8, 0.8, 0.8, **low), *seeds("spp", 0.7, 0.7, 0.7, **high)]
    assert len(judged(tmp_path, claim(), *tuned).evidence) == 1
    search = [*seeds("lors", 0.6, **high), *seeds("spp", 0.9, **low)]  # one seed; those with most count
    assert len(judged(tmp_path, claim(), *search).evidence) == 1
    swept = [*seeds("lors", 0.8, 0.8, 0.8, **high), *seeds("spp", 0.9, 0.9, 0.9, **low)]
    found = judged(tmp_path, claim(), *swept)
    assert sorted(pair.state for pair in found.evidence) == ["fails", "holds"] and found.verdict == WRONG


def test_a_rate_found_for_a_method_is_compared_with_all_options_of_the_other_at_the_same_rank(tmp_path):
    ours = seeds("lors", 0.8, 0.8, 0.8, config={"train.learning_rate": 1e-2})
    theirs = [run for config in (KAIMING, {}) for run in seeds("spp", 0.7, 0.7, 0.7, config=config)]
    theirs += seeds("spp", 0.7, 0.7, 0.7, config={"adapter.r": 32})
    assert len(judged(tmp_path, claim(), *ours, *theirs).evidence) == 2


def test_an_option_sets_two_variants_of_a_method_apart_and_a_seed_taken_from_the_run_does_not(tmp_path):
    of = claim(left={"method": "lors", "method.peft.init": "gradient"}, right={"method": "lors", **KAIMING})
    runs = [*seeds("lors", 0.8, 0.8, 0.8), *seeds("lors", 0.7, 0.7, 0.7, config=KAIMING)]
    assert judged(tmp_path, of, *runs).verdict == REPRODUCED
    own = [result("xgblora", seed=seed, accuracy=0.9, config={"method.peft.seed": seed}) for seed in range(3)]
    found = judged(tmp_path, claim(left={"method": "xgblora"}, right={"method": "lors", **KAIMING}), *own)
    assert found.verdict == REPRODUCED and len(found.evidence) == 1


def test_a_result_that_says_which_zeros_it_had_is_paired_with_an_older_one_that_does_not(tmp_path):
    older, newer = seeds("lors", 0.8, 0.8, 0.8), seeds("spp", 0.7, 0.7, 0.7, support="a" * 64)
    assert judged(tmp_path, claim(), *older, *newer).verdict == REPRODUCED


def test_end_states_are_told_apart_and_the_first_is_the_headline(tmp_path):
    run = result("lora", states=("adapter", "dense"), lost=900)
    dense = claim("zeros_kept", "at most", {"method": "lora", "end_state": "dense"}, 0.99)
    assert judged(tmp_path, dense, run).evidence
    assert len(judged(tmp_path, claim("step_ms", "at most", {"method": "lora"}, 200.0)).evidence) == 1


def test_controls_are_compared_without_seeds_and_across_pruners(tmp_path):
    runs = [result("none", pruner=name, accuracy=score) for name, score in (("wanda", 0.75), ("magnitude", 0.6))]
    wanda, magnitude = ({"method": "pruned", "pruner": name} for name in ("wanda", "magnitude"))
    found = judged(tmp_path / "a", claim(left=wanda, right=magnitude), *runs)
    assert found.verdict == REPRODUCED and "(no seed)" in found.evidence[0].measured
    dense = claim(left=wanda, right={"method": "dense"}, scope={"label": ["0.5"]}, tolerance=9.0)
    assert judged(tmp_path / "a", dense).verdict == REPRODUCED
    tuned = judged(tmp_path / "b", claim(right={"method": "pruned"}), *seeds("lors", 0.8, 0.8, pruned=(0.75, 1.2)))
    assert tuned.verdict == REPRODUCED and len(tuned.evidence) == 1


@pytest.mark.parametrize("recorded", [True, False])
def test_held_out_losses_are_paired_over_the_windows_where_these_are_recorded(tmp_path, recorded):
    """Wanda is 0.01 nats better in every window; over 100 windows that scatter by 0.1 the mean has an error of 0.01."""
    runs = [result("none", pruner=name, loss=loss) for name, loss in (("wanda", 1.00), ("magnitude", 1.01))]
    for run in runs if recorded else []:
        of_text = run["eval"]["perplexity"]
        of_text["losses"] = [of_text["loss"] + 0.1 * (-1) ** i + 0.001 * (i % 3 - 1) for i in range(99)]
    wanda, magnitude = ({"method": "pruned", "pruner": name} for name in ("wanda", "magnitude"))
    found = judged(tmp_path, claim("heldout_loss", "at most", wanda, magnitude), *runs)
    assert found.verdict == (REPRODUCED if recorded else UNCLEAR)


def test_one_failing_cell_refutes_and_more_pairs_need_a_clearer_failure(tmp_path):
    """d = -4 points, standard error 1.1 from three seeds and items: p = 0.042, enough for one pair, not for more."""
    for sparsity in (0.5, 0.6, 0.7):
        pairs = [
            *seeds("lors", 0.656, 0.67, 0.684, sparsity=sparsity),
            *seeds("spp", 0.71, 0.71, 0.71, sparsity=sparsity),
        ]
        refuted = judged(tmp_path, claim(), *pairs)
        assert refuted.verdict == (WRONG if sparsity == 0.5 else UNCLEAR)
        assert judged(tmp_path, claim(left={"method": "spp"}, right={"method": "lors"})).verdict == REPRODUCED
    clear = [*seeds("lors", 0.5, 0.5, 0.5, sparsity=0.8), *seeds("spp", 0.7, 0.7, 0.7, sparsity=0.8)]
    found = judged(tmp_path, claim(), *clear)
    assert found.verdict == WRONG and found.reason == "fails in 1, open in 3 of 4"


def test_the_claims_file_is_whole_and_covers_every_paper():
    known = read_claims()
    papers = " ".join(claim.paper for claim in known)
    names = "LoRS SPP SQFT Wanda SparseGPT Flat-LoRA GeLoRA GeoLoRA LoRA-Mini LoRA-RITE MoRA RM-LoRA SHERL SoRA XGBLoRA"
    names += " PERP OWL"
    assert all(f"{name} (arXiv" in papers for name in names.split())
    by_id = {claim.id: claim.comparison for claim in known}
    assert by_id["lora-mini-size"] == "lora_mini[keep_zeros=false].trainable ≤ 0.05 × lora.trainable"
    assert by_id["sora-accuracy"] == "sora[adapter, keep_zeros=false].accuracy ≥ lora[adapter].accuracy"
    assert by_id["ours-mask"] == "lors[init=kaiming, gradient=exact].accuracy ≥ lors[init=kaiming].accuracy"
    assert by_id["lors-memory-lora"] == "lors.train_peak ≤ lora.train_peak, within 2 %"


def test_lors_as_published_has_no_mask_in_its_gradients_however_a_result_says_that(tmp_path):
    """A result that is older than ``gradient`` has none of it, and ``exact_gradient`` says the same of older ones."""
    straight, exact = "method.peft.gradient", "method.peft.exact_gradient"
    runs = [
        *seeds("lors", *LOW),
        *seeds("lors", *LOW, sparsity=0.7, config={straight: "straight_through"}),
        *seeds("lors", *HIGH, config={straight: "exact"}),
        *seeds("lors", *HIGH, config={exact: True}),
        *seeds("spp", *HIGH),
        *seeds("spp", *HIGH, sparsity=0.7),
    ]
    write(tmp_path, *runs)
    found = {finding.claim.id: finding for finding in claims.judge_all(load([tmp_path]))}["lors-accuracy-spp"]
    assert found.verdict == WRONG and found.reason == "fails in 2 of 2"
    assert {key for pair in found.evidence for key in pair.keys} == {run["key"] for run in [*runs[:6], *runs[12:]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "claim c: colour: Extra inputs are not permitted"),
        ({"relation": "above"}, "claim c: relation: Input should be 'at least', 'at most' or 'equal'"),
        ({"metric": "speed"}, "claim c: metric: Input should be 'accuracy', .*"),
        ({"scope": {"seed": ["1"]}}, r"claim c: scope seed .*: Input should be 'label' or 'pruner'"),
        ({"not_testable": "no"}, "claim c: : Value error, either metric, left, relation and right, or not_testable"),
        ({"left": None}, "claim c: : Value error, either metric, left, relation and right, or not_testable"),
    ],
)
def test_a_bad_claim_is_one_clear_line(tmp_path, changes, message):
    good = NAMED | {"metric": "accuracy", "left": {"method": "a"}, "relation": "at least", "right": {"method": "b"}}
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump({"claims": [good | changes]}))
    with pytest.raises(ValueError, match=message):
        read_claims(file)


def test_the_command_says_what_the_verdict_is_about(tmp_path, capsys):
    write(tmp_path, *seeds("lors", 0.8, 0.8, 0.81), *seeds("spp", 0.7, 0.7, 0.7))
    profile = {"mode": "profile", "pruner": "random"}  # random zeros bear on the claims about time
    write(tmp_path, result("lors", step_ms=(80.0, 82.0, 84.0), **profile), result("spp_gc", **profile))
    assert main(["claims", str(tmp_path)]) == 0
    text = (tmp_path / "claims.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "Verdicts are on what was run here (microworld), not on the models of the papers." in text
    assert "conditional on one pruned checkpoint and on learning rates from one search seed" in text
    assert "## lors-accuracy-spp: reproduced" in text and "the paper used llama2_7b, llama2_13b, llama3_8b" in text
    assert "## lors-time-spp-gc: reproduced" in text
    reason = "no finished run of sqft with accuracy pruned by magnitude or wanda or sparsegpt"
    assert f"**not testable here** | {reason}" in text
