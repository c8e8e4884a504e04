"""`dgrad reproduce`: recipes that expand, tables beside the paper's, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dgrad.experiments import expand
from dgrad_cli.main import main
from dgrad_cli.reproducing import PLOTS, Recipe, recipes, table


def _command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, output.out, output.err


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_expand_and_their_paper_figures_belong_to_runs(name: str) -> None:
    recipe = recipes()[name]
    experiments = expand(recipe.sweep, Path("out"))
    assert recipe.paper.keys() <= {each.label for each in experiments}
    assert recipe.plot["kind"] in PLOTS
    assert not [each.limitation for each in experiments if each.limitation]
    assert {each.config.dataset for each in experiments} == {recipe.needs}


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _command(capsys, "reproduce", "--json")
    assert code == 0
    assert {"bounds", "figure1", "product-space"} <= {each["name"] for each in json.loads(out)}
    code, out, _ = _command(capsys, "reproduce")
    assert code == 0
    assert "celeba" in out
    code, _, err = _command(capsys, "reproduce", "bonds")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean 'bounds'" in err


def test_one_on_other_images(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["reproduce", "bounds", "--quick", "--dataset", "digits", "--device", "cpu", "--jobs", 2, "--out", "out"]
    code, out, err = _command(capsys, *options, "--dry-run")
    assert code == 0, err
    assert "3 runs: 3 to do" in out
    assert not Path("out").exists()
    code, out, err = _command(capsys, *options)
    assert code == 0, err
    assert "bounds.json, bounds.md, bounds.png in out" in out
    text = Path("out/bounds.md").read_text()
    assert "| direct-rb 20x2 | 1 |" in text
    assert "103.62" not in text, "the paper's figures are of other images"
    with Image.open("out/bounds.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
    assert json.loads(Path("out/bounds.json").read_text())["combinations"][0]["figures"]["test_bound"]["values"]


def test_the_table_has_the_papers_figures_beside_ours() -> None:
    from dgrad.experiments import Combination, Results

    accuracy = {"mean": 0.9615, "standard_deviation": 0.001, "values": [0.961, 0.962]}
    one = Combination("plain labels=50", {"labels": 50}, 2, 2, True, {"accuracy": accuracy}, "nats", None)
    text = table(recipes()["few-labels"], Results([one], []))
    assert "| plain labels=50 | 2 | 96.15 ± 0.10 % | 96.10 %, 96.20 % | 95.51 % | 91.78 % |" in text


def test_points_over_a_setting(tmp_path: Path) -> None:
    from dgrad.pictures import save_points

    recipe: Recipe = recipes()["few-labels"]
    paper = {"paper, direct": {"50": recipe.paper["plain labels=50"]["direct"]}}
    save_points(
        tmp_path / "a.png", ["50", "100"], {"ours": {"50": (0.9, 0.1), "100": (0.95, 0.0)}}, paper, "labels", "accuracy"
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
