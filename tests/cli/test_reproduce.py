"""`dgrad reproduce`: recipes that expand, tables beside the paper's, pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import run_with_output, train_in_turn
from PIL import Image

from dgrad.experiments.grid import expand
from dgrad_cli.commands.reproduce import PLOTS, Recipe, recipes, table


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_expand_and_their_paper_figures_belong_to_runs(name: str) -> None:
    recipe = recipes()[name]
    experiments = expand(recipe.sweep, Path("out"))
    assert recipe.paper.keys() <= {each.label for each in experiments}
    assert recipe.plot["kind"] in PLOTS
    assert not [each.why_unsupported for each in experiments if each.why_unsupported]
    assert {each.config.dataset for each in experiments} == {recipe.needs}


def test_every_recipe_is_in_the_docs_and_their_links_lead_somewhere() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "reproducing.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == list(dict.fromkeys([*_tables_first(), *recipes()]))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (docs / target).exists(), target
    for command in re.findall(r"^dgrad reproduce (\S+)(.*)$", text, re.MULTILINE):
        assert command[0] in recipes()
        assert command[1] == " --dataset digits --quick", "what test_figures_are_drawn runs"


def _tables_first() -> list[str]:
    return ["bounds", "product-space", "few-labels"]


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_with_output(capsys, "reproduce", "--json")
    assert code == 0
    assert {"bounds", "figure1", "product-space"} <= {each["name"] for each in json.loads(out)}
    code, out, _ = run_with_output(capsys, "reproduce")
    assert code == 0
    assert "celeba" in out
    code, _, err = run_with_output(capsys, "reproduce", "bonds")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean 'bounds'" in err


@pytest.mark.slow
def test_one_on_other_images(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgrad_cli.commands.sweep.run_here", train_in_turn)
    options = ["reproduce", "bounds", "--quick", "--dataset", "digits", "--device", "cpu", "--out", "out"]
    code, out, err = run_with_output(capsys, *options, "--dry-run")
    assert code == 0, err
    assert "3 runs: 3 to do" in out
    assert not Path("out").exists()
    code, out, err = run_with_output(capsys, *options)
    assert code == 0, err
    assert "bounds.json, bounds.md, bounds.png in out" in out
    text = Path("out/bounds.md").read_text()
    assert "| direct-rb 20x2 | 1 |" in text
    assert "103.62" not in text, "the paper's figures are of other images"
    with Image.open("out/bounds.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
    written = json.loads(Path("out/bounds.json").read_text())
    assert written["combinations"][0]["figures"]["test_bound"]["values"]
    for row in written["runs"]:
        assert row["metrics"][-1]["epoch"] == 1, "a run's evaluations, for curves of one's own"
        assert row["metrics"][-1]["valid_bound"] == row["summary"]["best"]["valid_bound"]


@pytest.mark.slow
def test_a_dry_run_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    for name in ("bounds", "figure4", "figure6"):
        code, out, err = run_with_output(capsys, "reproduce", name, "--data-root", "empty", "--dry-run")
        assert (code, err) == (0, "")
        assert "to do" in out
    assert not list(Path("empty").iterdir())
    code, out, err = run_with_output(capsys, "reproduce", "bounds", "--dataset", "mnits", "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "did you mean 'mnist'" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["figure1", "figure2", "figure3", "figure5", "figure7"])
def test_figures_are_drawn(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgrad_cli.commands.sweep.run_here", train_in_turn)
    options = ["--quick", "--dataset", "digits", "--device", "cpu", "--quiet", "--out", "out"]
    code, _, err = run_with_output(capsys, "reproduce", name, *options)
    assert code == 0, err
    with Image.open(f"out/{name}.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
        width = picture.width
    results = json.loads(Path(f"out/{name}.json").read_text())
    assert {row["state"] for row in results["runs"]} == {"finished"}
    if name == "figure5":
        assert width > 2 * 10 * 56, "two grids of ten columns each"
    if name in ("figure2", "figure3"):
        plot = recipes()[name].plot
        steps = json.loads(Path(f"out/{name}-steps.json").read_text())["steps"]
        assert steps.keys() == plot["latents"].keys() <= {one["label"] for one in results["combinations"]}
        for row in steps.values():
            assert list(map(int, row)) == plot["quick"]["sizes"]
            assert min(row.values()) > 0


def test_the_table_has_the_papers_figures_beside_ours() -> None:
    from dgrad.experiments.results import Combination, Results

    accuracy = {"mean": 0.9615, "standard_deviation": 0.001, "values": [0.961, 0.962]}
    one = Combination("plain labels=50", {"labels": 50}, 2, 2, True, {"accuracy": accuracy}, "nats", None)
    text = table(recipes()["few-labels"], Results([one], []))
    assert "| plain labels=50 | 2 | 96.15 ± 0.10 % | 96.10 %, 96.20 % | 95.51 % | 91.78 % |" in text


def test_a_race_shows_each_line_by_epoch_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgrad.pictures import plots as pictures

    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    runs = [
        [{"epoch": 1, "seconds": 2.0, "valid_bound": 9.0}, {"epoch": 2, "seconds": 4.0, "valid_bound": 5.0}],
        [{"epoch": 1, "seconds": 4.0, "valid_bound": 7.0}, {"epoch": 2, "seconds": 6.0, "valid_bound": 6.0}],
    ]
    lines = {"one": runs, "other": runs[:1]}
    pictures.save_race(tmp_path / "a.png", lines, "nats", {"other": {5: 0.002, 10: 0.004}}, "bits")
    by_epoch, by_time, by_size = drawn[0].axes
    assert [list(line.get_xdata()) for line in by_epoch.lines] == [[1, 2], [1, 2]]
    assert [list(line.get_xdata()) for line in by_time.lines] == [[3, 5], [2, 4]], "the mean over seeds"
    assert [list(line.get_ydata()) for line in by_time.lines] == [[8, 5.5], [9, 5]]
    (line,) = by_size.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([5, 10], [2, 4]), "milliseconds"
    assert line.get_color() == by_epoch.lines[1].get_color()


def test_a_heat_map_is_of_the_recipes_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgrad.experiments.results import Combination, Results
    from dgrad.pictures import plots as pictures

    recipe = recipes()["epsilon-and-rate"]
    experiments = expand(recipe.sweep, tmp_path)
    combinations = [
        Combination(
            each.label, json.loads(each.config.to_json()), 1, 1, False, {"test_bound": {"mean": float(i)}}, "nats", None
        )
        for i, each in enumerate(experiments)
    ]
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save_heat_map", lambda *arguments: drawn.append(arguments))
    PLOTS["heat map"](recipe, experiments, Results(combinations[::-1], []), tmp_path)
    ((path, values, x, y, name),) = drawn
    assert (path, x, y, name) == (tmp_path / "epsilon-and-rate.png", "lr", "epsilon", "test bound, nats")
    assert len(values) == 25
    first = experiments[0].config
    assert next(iter(values.items())) == ((first.lr, first.set["epsilon"]), 0.0)


def test_a_heat_map_frames_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgrad.pictures import plots as pictures

    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    values = {("0.01", "1"): 3.0, ("0.02", "1"): 2.0, ("0.01", "5"): 9.0}
    pictures.save_heat_map(tmp_path / "a.png", values, "lr", "epsilon", "nats")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[3.0, 2.0], [9.0, None]]
    assert {text.get_text(): text.get_position() for text in axes.texts} == {
        "3.0": (0, 0),
        "2.0": (1, 0),
        "9.0": (0, 1),
    }
    (frame,) = axes.patches
    assert frame.get_xy() == pytest.approx((0.52, -0.48))


def test_points_over_a_setting(tmp_path: Path) -> None:
    from dgrad.pictures.plots import save_points

    recipe: Recipe = recipes()["few-labels"]
    paper = {"paper, direct": {"50": recipe.paper["plain labels=50"]["direct"]}}
    save_points(
        tmp_path / "a.png", ["50", "100"], {"ours": {"50": (0.9, 0.1), "100": (0.95, 0.0)}}, paper, "labels", "accuracy"
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10


def test_a_row_for_each_combination(tmp_path: Path) -> None:
    from dgrad.pictures.plots import save_rows

    sizes = []
    for rows in ({"a": (90.0, 0.1)}, {"a": (90.0, 0.1), "b": (95.0, 0.0), "c": (91.0, 0.0)}):
        save_rows(tmp_path / "rows.png", rows, "test bound, nats")
        with Image.open(tmp_path / "rows.png") as picture:
            sizes.append(picture.height)
            assert len(set(picture.convert("L").tobytes())) > 10
    assert sizes[1] > sizes[0]
