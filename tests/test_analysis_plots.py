"""Plots: what is drawn from which runs, what is left out and why, and whether a print can be read."""

import json
import math

import pytest
from synthetic_runs import MEBIBYTE, result, scores, write

from analysis import cost_plots, plots, quality_plots
from analysis.__main__ import main
from analysis.figures import LINES_PER_PANEL, SMALL, WIDTH, look, split
from analysis.groups import groups_of
from analysis.results import load

PRUNED = {0.5: 0.70, 0.7: 0.60}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """LoRA, LoRS and SPP at two sparsities, two seeds, with the dense control; SPP takes the most memory."""
    folder = tmp_path_factory.mktemp("sweep")
    for sparsity, pruned in PRUNED.items():
        for seed in range(2):
            shared = {"sparsity": sparsity, "seed": seed, "pruned": (pruned, 1.2)}
            lora = result("lora", accuracy=pruned + 0.05, states=("adapter", "remasked"), **shared)
            lora["zeros"] |= {"after_merge": None, "lost": None, "gained": None}
            lora["variants"]["remasked"] |= {"eval": scores(pruned + 0.01, 1.0)}
            lora["variants"]["remasked"]["zeros"] |= {"after_merge": sparsity, "lost": 0, "gained": 0}
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
    with look():
        return dict(kind(groups_of(load([folder])), False))


def lines_in(axes):
    """x and y by label, error bars and reference lines aside."""
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    return {label: (list(line.get_xdata()), [round(y, 6) for y in line.get_ydata()]) for label, line in lines.items()}


def test_accuracy_by_sparsity_shows_means_and_the_end_state_that_keeps_the_zeros(sweep):
    figure = drawn(quality_plots.accuracy_by_sparsity, sweep)["accuracy_by_sparsity_microworld_wanda"]
    (axes,) = figure.axes
    assert lines_in(axes) == {
        "pruned": ([0.5, 0.7], [70, 60]),
        "LoRA, re-masked": ([0.5, 0.7], [71, 61]),
        "LoRS": ([0.5, 0.7], [77, 67]),
        "SPP": ([0.5, 0.7], [73, 63]),
    }
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert levels["dense"] == pytest.approx(80) and levels["dense, fine-tuned (LoRS)"] == pytest.approx(82)
    assert figure.legends[0].get_texts()[0].get_text() == "dense"


def test_perplexity_by_sparsity_has_round_numbers_on_its_axis(sweep):
    figure = drawn(quality_plots.perplexity_by_sparsity, sweep)["perplexity_by_sparsity_microworld_wanda"]
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert lines_in(axes)["LoRS"][1] == pytest.approx([math.e, math.e], rel=1e-4)


def test_recovery_is_the_share_of_the_way_from_pruned_to_dense(sweep):
    plots_ = drawn(quality_plots.recovery, sweep)
    (axes,) = plots_["recovery_microworld_wanda_0.5"].axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["LoRA, re-masked", "LoRS", "SPP"]
    shares = [round(container.lines[0].get_xdata()[0], 6) for container in axes.containers]
    assert shares == pytest.approx([10, 70, 30])
    control = next(line for line in axes.lines if line.get_label() == "dense, same fine-tuning")
    assert control.get_xdata()[0] == pytest.approx(120) and control.get_ydata()[0] == names.index("LoRS")


def test_no_recovery_where_pruning_cost_no_more_than_noise(tmp_path):
    write(tmp_path, *(result("lors", seed=seed, dense=(0.8, 1.0), pruned=(0.795, 1.0)) for seed in range(2)))
    (reason,) = drawn(quality_plots.recovery, tmp_path).values()
    assert reason.startswith("pruning cost 0.5 points, no more than noise")


def test_loss_curves_are_the_mean_over_the_seeds(tmp_path):
    for seed in range(2):
        content = result("lors", seed=seed)
        write(tmp_path, content)
        losses = [seed + 1 / step for step in range(1, 11)]
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
        (tmp_path / content["key"] / "steps.jsonl").write_text("\n".join(lines))
    (figure,) = drawn(quality_plots.loss_curves, tmp_path).values()
    x, y = lines_in(figure.axes[0])["LoRS"]
    assert x == list(range(1, 11)) and y == pytest.approx([0.5 + 1 / step for step in x])


def test_the_front_of_memory_and_accuracy(sweep):
    (axes,) = drawn(cost_plots.pareto_memory, sweep)["pareto_memory_microworld_wanda_0.5"].axes
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(100, pytest.approx(77))]
    assert lines_in(axes).keys() == {"LoRA, re-masked", "LoRS", "SPP"}
    assert axes.get_xlabel() == "memory (MiB)"


@pytest.mark.parametrize("kind", [cost_plots.pareto_time, cost_plots.pareto_trainable])
def test_other_fronts_have_their_own_axis(sweep, kind):
    (axes,) = drawn(kind, sweep)[f"{kind.__name__}_microworld_wanda_0.7"].axes
    labels = {"pareto_time": "step time (ms)", "pareto_trainable": "trained parameters"}
    assert axes.get_xlabel() == labels[kind.__name__]


def test_cost_against_length_one_figure_for_each_rank_and_a_cross_where_it_did_not_fit(efficiency):
    figures = drawn(cost_plots.cost_by_sequence_length, efficiency)
    assert sorted(figures) == [f"cost_by_sequence_length_profile_microworld_wanda_0.5_r_{rank}" for rank in (16, 32)]
    memory, time = figures["cost_by_sequence_length_profile_microworld_wanda_0.5_r_32"].axes
    assert lines_in(memory) == {"LoRA": ([512, 1024], [544, 1056]), "SPP": ([512], [544])}
    assert lines_in(time)["LoRA"] == ([512, 1024], [51.2, 102.4])
    crosses = [line.get_xdata()[0] for line in memory.lines if line.get_marker() == "x"]
    assert crosses == [1024] and [text.get_text() for text in memory.texts] == ["OOM"]


def test_cost_against_rank_one_figure_for_each_length(efficiency):
    figures = drawn(cost_plots.cost_by_rank, efficiency)
    memory, _ = figures["cost_by_r_profile_microworld_wanda_0.5_sequence_length_512"].axes
    assert lines_in(memory)["LoRA"] == ([16, 32], [528, 544])
    assert [text.get_text() for text in memory.figure.axes[-1].get_xticklabels()] == ["16", "32"]


def test_what_is_missing_is_said(efficiency, tmp_path):
    write(tmp_path / "one", result("lors"))
    (reason,) = drawn(quality_plots.accuracy_by_sparsity, tmp_path).values()
    assert reason == "needs a method at two or more sparsities"
    assert drawn(cost_plots.cost_by_rank, tmp_path) == {"cost_by_r": "needs runs with two or more values of adapter.r"}
    write(tmp_path / "two", result("lors", sparsity=0.7), result("lors", config={"adapter.r": 32, "method.peft.r": 32}))
    (reason,) = drawn(quality_plots.accuracy_by_sparsity, tmp_path).values()
    assert reason == "more than one line for LoRS: name the folder of one sweep"
    _, missing = plots.draw(load([efficiency]), tmp_path / "plots")
    assert "recovery: no such runs" in missing


def test_two_lines_of_one_method_are_told_apart_by_their_dashes_alone(tmp_path):
    write(tmp_path, result("lors"), result("lors", config={"method.peft.init": "kaiming"}))
    (figure,) = drawn(quality_plots.loss_curves, tmp_path).values()
    first, second = (container.lines[0] for container in figure.axes[0].containers)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["LoRS (init gradient)", "LoRS (init kaiming)"]
    assert first.get_color() == second.get_color() and first.get_marker() == second.get_marker()
    assert first._dash_pattern != second._dash_pattern


def test_lines_whose_end_states_tell_them_apart_are_not_told_apart_again(tmp_path):
    lost = result("sora", accuracy=0.72, states=("adapter", "remasked"), config={"method.peft.keep_zeros": False})
    lost["zeros"] |= {"after_merge": None, "lost": None, "gained": None}
    lost["variants"]["remasked"] |= {"eval": scores(0.68, 1.0)}
    lost["variants"]["remasked"]["zeros"] |= {"after_merge": 0.5, "lost": 0, "gained": 0}
    write(tmp_path, lost, result("sora", accuracy=0.71, config={"method.peft.keep_zeros": True}))
    (figure,) = drawn(cost_plots.pareto_memory, tmp_path).values()
    assert set(lines_in(figure.axes[0])) == {"SoRA, re-masked", "SoRA"}
    (figure,) = drawn(quality_plots.loss_curves, tmp_path).values()
    assert set(lines_in(figure.axes[0])) == {"SoRA (keep zeros no)", "SoRA (keep zeros yes)"}


def test_machines_are_not_mixed_over_sparsities(tmp_path):
    write(tmp_path, result("lors"), result("lors", sparsity=0.7, environment={"device": "another"}))
    with pytest.raises(ValueError, match=r"device: A CPU, another.*--mix"):
        drawn(quality_plots.accuracy_by_sparsity, tmp_path)


def test_files_fit_a_column_with_readable_letters_and_are_the_same_every_time(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "KINDS", (quality_plots.accuracy_by_sparsity,))
    assert main(["plots", str(sweep), "--output", str(tmp_path)]) == 0
    png, pdf = (tmp_path / "plots" / f"accuracy_by_sparsity_microworld_wanda.{end}" for end in ("png", "pdf"))
    assert capsys.readouterr().out == f"{png}\n{pdf}\n"
    assert int.from_bytes(png.read_bytes()[16:20], "big") == round(300 * WIDTH)
    first = pdf.read_bytes()
    plots.draw(load([sweep]), tmp_path / "plots")
    assert pdf.read_bytes() == first


@pytest.mark.parametrize("kind", plots.KINDS, ids=lambda kind: kind.__name__)
def test_no_letter_is_too_small_and_nothing_is_cut_off(sweep, efficiency, kind):
    from matplotlib.text import Text

    figures = [f for folder in (sweep, efficiency) for f in drawn(kind, folder).values() if not isinstance(f, str)]
    assert figures
    figure = figures[0]
    figure.draw_without_rendering()
    written = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in written) >= SMALL >= 7
    drawn_in, slack = figure.get_tightbbox(), 0.01  # inches
    width, height = figure.get_size_inches()
    assert width == WIDTH and drawn_in.x0 >= -slack and drawn_in.x1 <= width + slack
    assert drawn_in.y0 >= -slack and drawn_in.y1 <= height + slack


@pytest.mark.parametrize("kind", plots.KINDS[2:7], ids=lambda kind: kind.__name__)
def test_long_names_leave_room_for_the_axes(tmp_path, kind):
    """Rows that differ in several options have names as wide as the figure."""
    for init in ("gradient", "kaiming"):
        for scaling in ("rank_stabilized", "alpha_over_r"):
            options = {
                "method.peft.init": init,
                "method.peft.scaling": scaling,
                "method.peft.long": f"{init}_{scaling}",
            }
            write(tmp_path, *(result("lors", seed=seed, config=options) for seed in range(2)))
    (figure,) = drawn(kind, tmp_path).values()
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        box = axes.get_position()
        assert box.width * width > 1 and box.height * height > 0.3
    extent = figure.get_tightbbox()
    assert extent.x0 >= -0.01 and extent.x1 <= width + 0.01


def test_many_lines_are_split_over_panels():
    assert [len(part) for part in split(list(range(23)))] == [8, 8, 7]
    assert [len(part) for part in split(list(range(LINES_PER_PANEL)))] == [LINES_PER_PANEL]
    assert [item for part in split(list(range(17))) for item in part] == list(range(17))
