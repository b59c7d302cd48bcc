"""Plots: what is drawn from which runs, what a reader is told, what is left out and why, and whether it can be read."""

import math
from itertools import pairwise

import pytest
from synthetic_runs import MEBIBYTE, result, scores, write

from analysis import plots
from analysis.__main__ import main
from analysis.figures import SMALL, WIDTH, caption_of, plot_style, split, spread_out
from analysis.groups import groups_of
from analysis.results import load

PRUNED = {0.5: 0.70, 0.7: 0.60}
LORA = ["LoRA, with adapter", "LoRA, re-masked", "LoRA, zeros lost"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """LoRA, LoRS and SPP at two sparsities, two seeds, with the dense control; memory: LoRA < LoRS < SPP."""
    folder = tmp_path_factory.mktemp("sweep")
    for sparsity, pruned in PRUNED.items():
        for seed in range(2):
            shared = {"sparsity": sparsity, "seed": seed, "pruned": (pruned, 1.2)}
            states = ("adapter", "remasked", "dense")
            lora = result("lora", accuracy=pruned + 0.05, states=states, train_peak=90 * MEBIBYTE, **shared)
            lora["zeros"] |= {"after_merge": None, "lost": None, "gained": None}
            lora["variants"]["remasked"] |= {"eval": scores(pruned + 0.01, 0.9)}
            lora["variants"]["remasked"]["zeros"] |= {"after_merge": sparsity, "lost": 0, "gained": 0}
            lora["variants"]["dense"]["zeros"] |= {"after_merge": 0.0, "lost": 500, "gained": 0}
            write(folder, lora, result("lors", accuracy=pruned + 0.06 + 0.02 * seed, **shared))
            write(folder, result("spp", accuracy=pruned + 0.03, train_peak=200 * MEBIBYTE, **shared))
    write(folder, result("lors", pruner="none", sparsity=0.0, accuracy=0.82))
    return folder


@pytest.fixture(scope="module")
def efficiency(tmp_path_factory):
    """Two methods at two lengths and two ranks; the longer one does not fit SPP."""
    folder = tmp_path_factory.mktemp("efficiency")
    for method in ("lora", "spp"):
        for length in (512, 1024):
            for rank in (16, 32):
                config = {"train.sequence_length": length, "adapter.r": rank, "method.peft.r": rank}
                status = "oom" if (method, length) == ("spp", 1024) else "ok"
                cost = {"train_peak": (length + rank) * MEBIBYTE, "step_ms": (1.0, 0.1 * length, 999.0)}
                write(folder, result(method, mode="profile", status=status, config=config, **cost))
    return folder


def drawn(kind, folder):
    """Figures and reasons of one kind of plot, by name."""
    with plot_style():
        return dict(plots.KINDS[kind](groups_of(load([folder])), False))


def lines_in(axes):
    """x and y by label, error bars and reference lines aside."""
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    return {label: (list(line.get_xdata()), [round(y, 6) for y in line.get_ydata()]) for label, line in lines.items()}


def labels_of(axes):
    """Texts beside the lines, from top to bottom."""
    texts = sorted(axes.texts, key=lambda text: text.xyann[1], reverse=True)
    return [" ".join(text.get_text().split()) for text in texts]


def test_accuracy_by_sparsity_shows_means_every_end_of_lora_and_the_levels_to_compare_with(sweep):
    figure = drawn("accuracy_by_sparsity", sweep)["accuracy_by_sparsity_microworld_wanda"]
    (axes,) = figure.axes
    assert lines_in(axes) == {
        "pruned": ([0.5, 0.7], [70, 60]),
        "LoRA, with adapter": ([0.5, 0.7], [75, 65]),
        "LoRA, re-masked": ([0.5, 0.7], [71, 61]),
        "LoRA, zeros lost": ([0.5, 0.7], [75, 65]),
        "LoRS": ([0.5, 0.7], [77, 67]),
        "SPP": ([0.5, 0.7], [73, 63]),
    }
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert levels["dense"] == pytest.approx(80) and levels["dense, fine-tuned (LoRS)"] == pytest.approx(82)
    labels = labels_of(axes)
    assert labels[:3] == ["dense, fine-tuned (LoRS)", "dense", "LoRS"] and labels[-1] == "pruned" and not figure.legends
    assert caption_of(figure) == (
        "Average accuracy by sparsity: microworld, pruned by wanda",
        "Mean and standard deviation of 2 seeds. Accuracy: average of 7 tasks, chance 35.7 %.",
    )
    (figure,) = drawn("perplexity_by_sparsity", sweep).values()
    assert figure.axes[0].get_yscale() == "log" and "chance" not in caption_of(figure)[1]
    assert lines_in(figure.axes[0])["LoRS"][1] == pytest.approx([math.e, math.e], rel=1e-4)


def test_chance_is_a_line_where_the_scores_come_near_it(tmp_path):
    write(
        tmp_path,
        *(result("lors", accuracy=score, sparsity=x, pruned=(0.36, 2)) for x, score in ((0.5, 0.6), (0.8, 0.4))),
    )
    (figure,) = drawn("accuracy_by_sparsity", tmp_path).values()
    assert labels_of(figure.axes[0])[-1] == "chance"
    assert {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}["chance"] == pytest.approx(250 / 7)


def test_recovery_is_the_share_of_the_way_from_pruned_to_dense(sweep):
    figure = drawn("recovery", sweep)["recovery_microworld_wanda_0.5"]
    (axes,) = figure.axes
    names = [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()]
    assert names == [*LORA, "LoRS", "SPP"]
    shares = {name: x[0] for name, (x, _) in lines_in(axes).items()}
    assert shares == pytest.approx({**dict.fromkeys(LORA, 50), LORA[1]: 10, "LoRS": 70, "SPP": 30, "lors dense": 120})
    assert [text.get_text() for text in axes.texts] == ["pruned", "dense"]
    assert "0 is the pruned model (70.0 %), 100 the dense one (80.0 %)" in caption_of(figure)[1]


def test_distances_from_lora_are_paired_by_seed_and_better_is_right(sweep):
    figures = drawn("against_lora", sweep)
    figure = figures["accuracy_against_lora_microworld_wanda_0.5"]
    (axes,) = figure.axes
    points = {label: x for label, (x, _) in lines_in(axes).items()}
    assert points == {"LoRA, re-masked": [-4], "LoRA, zeros lost": [0], "LoRS": [2], "SPP": [-2]}
    bars = {container.get_label(): container.lines[2][0].get_segments()[0][:, 0] for container in axes.containers}
    (low, high) = bars["LoRS"]  # seeds at +1 and +3: a standard error of 1, and that of the items in addition
    assert high - low > 2 and (low + high) / 2 == pytest.approx(2)
    assert "Mean of 2 seeds" in caption_of(figure)[1]
    losses = figures["text_against_lora_microworld_wanda_0.5"].axes[0]
    assert "nats" in losses.get_xlabel()
    assert lines_in(losses)["LoRA, re-masked"][0][0] > 0  # its loss is the lower one
    assert "needs the scores" in figures["answers_against_lora_microworld_wanda_0.5"]


def test_of_one_seed_the_bar_is_the_error_over_the_items(tmp_path):
    for method, accuracy in (("lora", 0.70), ("lors", 0.75)):
        write(tmp_path, result(method, accuracy=accuracy, sparsity=0.5))
    figure = drawn("against_lora", tmp_path)["accuracy_against_lora_microworld_wanda_0.5"]
    (container,) = figure.axes[0].containers
    (low, high) = container.lines[2][0].get_segments()[0][:, 0]
    rows = load([tmp_path])
    rows = rows[rows.method.isin(["lora", "lors"])]
    assert (high - low) / 2 == pytest.approx(math.hypot(*rows.accuracy_stderr))
    assert "Mean of 1 seed." in caption_of(figure)[1]


def test_no_distance_between_runs_of_different_seeds(tmp_path):
    """Of several methods those that share a seed with LoRA are drawn."""
    write(tmp_path, result("lora", accuracy=0.7, sparsity=0.5, seed=0), result("lors", sparsity=0.5, seed=1))
    name = "accuracy_against_lora_microworld_wanda_0.5"
    assert "needs the scores of LoRA" in drawn("against_lora", tmp_path)[name]
    write(tmp_path, result("spp", accuracy=0.8, sparsity=0.5, seed=0))
    assert lines_in(drawn("against_lora", tmp_path)[name].axes[0])["SPP"][0] == [pytest.approx(10)]


def test_what_was_pruned_after_its_fine_tuning_is_no_dense_control(tmp_path):
    last = result("lors", accuracy=0.5, config={"prune.when": "after"})
    write(tmp_path, last, result("lors"), result("lors", pruner="none", sparsity=0.0, accuracy=0.82))
    (figure,) = drawn("recovery", tmp_path).values()
    assert lines_in(figure.axes[0])["lors dense"][0] == pytest.approx([110])


def test_of_other_methods_the_end_state_that_keeps_the_zeros_is_drawn(tmp_path):
    run = result("hira", states=("adapter", "remasked"))
    run["zeros"] |= {"after_merge": None, "lost": None, "gained": None}
    write(tmp_path, run)
    (figure,) = drawn("recovery", tmp_path).values()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["HiRA, re-masked"]


def test_no_recovery_where_pruning_cost_no_more_than_noise(tmp_path):
    write(tmp_path, *(result("lors", seed=seed, dense=(0.8, 1.0), pruned=(0.795, 1.0)) for seed in range(2)))
    (reason,) = drawn("recovery", tmp_path).values()
    assert reason.startswith("pruning cost 0.5 points, no more than noise")


def test_the_front_is_of_the_methods_that_keep_the_zeros(sweep):
    figure = drawn("pareto_memory", sweep)["pareto_memory_microworld_wanda_0.5"]
    (axes,) = figure.axes
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    points = list(zip(front.get_xdata(), front.get_ydata(), strict=True))
    assert points == [(90, pytest.approx(71)), (100, pytest.approx(77))], "not 75, of a LoRA that lost the zeros"
    assert lines_in(axes).keys() == {*LORA, "LoRS", "SPP"} == set(labels_of(axes))
    assert axes.get_xlabel() == "memory (MiB)" and "chance 35.7 %" in caption_of(figure)[1]
    (axes,) = drawn("pareto_time", sweep)["pareto_time_microworld_wanda_0.7"].axes
    assert axes.get_xlabel() == "step time (ms)" and lines_in(axes)["SPP"] == ([100], [63])


def test_cost_against_length_has_a_figure_for_each_rank_and_names_what_did_not_fit(efficiency):
    figures = drawn("cost_by_sequence_length", efficiency)
    assert sorted(figures) == [f"cost_by_sequence_length_profile_microworld_wanda_0.5_r_{rank}" for rank in (16, 32)]
    figure = figures["cost_by_sequence_length_profile_microworld_wanda_0.5_r_32"]
    memory, time = figure.axes
    assert lines_in(memory) == {"LoRA": ([512, 1024], [544, 1056]), "SPP": ([512], [544])}
    assert lines_in(time)["LoRA"] == ([512, 1024], [51.2, 102.4])
    title = "Cost by sequence length: profile, microworld, wanda, 0.5, r 32"
    assert caption_of(figure) == (title, "One seed. Out of memory: SPP at 1024.")
    figure = drawn("cost_by_rank", efficiency)["cost_by_r_profile_microworld_wanda_0.5_sequence_length_512"]
    memory, time = figure.axes
    assert lines_in(memory)["LoRA"] == ([16, 32], [528, 544])
    assert [text.get_text() for text in time.get_xticklabels()] == ["16", "32"]


def test_what_is_missing_is_said(efficiency, tmp_path, monkeypatch):
    write(tmp_path / "one", result("lors"))
    (reason,) = drawn("accuracy_by_sparsity", tmp_path).values()
    assert reason == "needs a method at two or more sparsities"
    assert drawn("cost_by_rank", tmp_path) == {"cost_by_r": "needs runs with two or more values of adapter.r"}
    write(tmp_path / "two", result("lors", sparsity=0.7), result("lors", config={"adapter.r": 32, "method.peft.r": 32}))
    (reason,) = drawn("accuracy_by_sparsity", tmp_path).values()
    assert reason == "more than one line for LoRS: name the folder of one sweep"
    with monkeypatch.context() as patch:
        patch.setattr(plots, "KINDS", {"recovery": plots.KINDS["recovery"]})
        assert plots.draw(load([efficiency]), tmp_path / "plots")[1] == ["recovery: no such runs"]
    write(tmp_path / "three", result("lors", sparsity=0.8, environment={"device": "another"}))
    with pytest.raises(ValueError, match=r"device: A CPU, another.*--mix"):
        drawn("accuracy_by_sparsity", tmp_path)


def test_two_lines_of_one_method_are_told_apart_by_name_and_dashes(tmp_path):
    for rank in (16, 32):
        for init in ("gradient", "kaiming"):
            config = {"adapter.r": rank, "method.peft.r": rank, "method.peft.init": init}
            write(tmp_path, result("lors", mode="profile", config=config))
    (figure,) = drawn("cost_by_rank", tmp_path).values()
    first, second = (container.lines[0] for container in figure.axes[0].containers)
    assert set(labels_of(figure.axes[0])) == {"LoRS (init gradient)", "LoRS (init kaiming)"}
    assert first.get_color() == second.get_color() and first._dash_pattern != second._dash_pattern


def test_files_are_one_column_wide_and_the_same_every_time(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "KINDS", {"accuracy_by_sparsity": plots.KINDS["accuracy_by_sparsity"]})
    assert main(["plots", str(sweep), "--output", str(tmp_path)]) == 0
    png, pdf = (tmp_path / "plots" / f"accuracy_by_sparsity_microworld_wanda.{end}" for end in ("png", "pdf"))
    assert capsys.readouterr().out == f"{png}\n{pdf}\n"
    assert int.from_bytes(png.read_bytes()[16:20], "big") == round(300 * WIDTH)
    first = pdf.read_bytes()
    plots.draw(load([sweep]), tmp_path / "plots")
    assert pdf.read_bytes() == first


@pytest.fixture(scope="module")
def budgets(tmp_path_factory):
    """Two methods with more steps, more data, and larger ranks of a fixed scale alpha / r; SPP has one rank."""
    folder = tmp_path_factory.mktemp("budgets")
    for method, plus in (("lora", 0.0), ("spp", 0.01)):
        for steps in (300, 600):
            add(folder, method, 0.6 + steps / 1e4 + plus, **{"train.steps": steps})
        for rows in (100, 400):
            add(folder, method, 0.6 + rows / 1e4 + plus, **{"data.limit": rows})
    for rank in (32, 64):
        for_memory = {"adapter.r": rank, "method.peft.r": rank, "adapter.alpha": rank}
        add(folder, "lora", 0.7, train_peak=(100 + rank) * MEBIBYTE, **for_memory)
    return folder


def add(folder, method, accuracy, train_peak=100 * MEBIBYTE, **config):
    states = ("adapter", "remasked", "dense") if method == "lora" else ("merged",)
    write(folder, result(method, accuracy=accuracy, train_peak=train_peak, states=states, config=config))


def test_accuracy_by_compute_data_and_memory_has_a_curve_for_what_was_varied_alone(budgets):
    lora = ("LoRA, with adapter", "LoRA, re-masked")
    figures = {kind: drawn(f"accuracy_by_{kind}", budgets) for kind in ("compute", "data", "memory")}
    (compute,), (data,), (memory,) = ([f for f in of.values() if not isinstance(f, str)] for of in figures.values())
    points = ([0.3, 0.6], [63, 66])
    assert lines_in(compute.axes[0]) == {**dict.fromkeys(lora, points), "SPP": (points[0], [64, 67])}
    points = ([100, 400], [61, 64])
    assert lines_in(data.axes[0]) == {**dict.fromkeys(lora, points), "SPP": (points[0], [62, 65])}
    points = ([100, 132, 164], [63, 70, 70])
    assert lines_in(memory.axes[0]) == dict.fromkeys(lora, points)
    assert memory.axes[0].get_xlabel() == "memory (MiB)" and compute.axes[0].get_xlabel() == "training (TFLOP)"


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """Rows that differ in several options have names as wide as the figure."""
    folder = tmp_path_factory.mktemp("long")
    for init in ("gradient", "kaiming"):
        for scaling in ("rank_stabilized", "alpha_over_r"):
            options = {"method.peft.init": init, "method.peft.scaling": scaling, "method.peft.long": init + scaling}
            write(folder, *(result("lors", seed=seed, config=options) for seed in range(2)), result("spp"))
    return folder


@pytest.mark.parametrize("kind", plots.KINDS)
def test_everything_is_readable_inside_of_the_figure_and_no_label_is_on_another(
    sweep, efficiency, budgets, long_names, kind
):
    from matplotlib.text import Text

    found = [
        f
        for folder in (sweep, efficiency, budgets, long_names)
        for f in drawn(kind, folder).values()
        if not isinstance(f, str)
    ]
    assert found
    for figure in (found[0], found[-1]):
        figure.draw_without_rendering()
        written = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert min(text.get_fontsize() for text in written) >= SMALL >= 7
        (width, height), box, slack = figure.get_size_inches(), figure.get_tightbbox(), 0.03  # inches
        assert width == WIDTH and box.x0 >= -slack and box.x1 <= width + slack
        assert box.y0 >= -slack and box.y1 <= height + slack
        for axes in figure.axes:
            assert axes.get_position().width * width > 1 and axes.get_position().height * height > 0.3
            boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
            if kind != "recovery":
                assert all(below.y1 <= above.y0 + 3 for below, above in pairwise(boxes))


def test_labels_move_as_little_as_they_must_and_many_lines_are_split_over_panels():
    assert spread_out([0.2, 0.9], [0.1, 0.1]) == pytest.approx([0.2, 0.9])
    assert spread_out([0.5, 0.5], [0.1, 0.3]) == pytest.approx([0.4, 0.6])
    assert spread_out([1.0, 0.99, 0.0], [0.2, 0.2, 0.2]) == pytest.approx([0.9, 0.7, 0.1])
    assert [len(part) for part in split(list(range(23)))] == [8, 8, 7]
    assert [item for part in split(list(range(17))) for item in part] == list(range(17))
