"""`dgrad diagnose` and the core behind it: bias told from noise, references, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_with_output
from PIL import Image
from torch import Tensor

import dgrad
import dgrad.experiments.diagnosis
from dgrad.config import configure
from dgrad.errors import InputError
from dgrad.experiments.diagnosis import Diagnosis, choose_images, diagnose, random_start
from dgrad.experiments.variants import read_variants
from dgrad.training.run_directory import Run
from dgrad.vae.reconstruction import DecoderEvaluation


def _diagnose(latent: str, estimators: str, *values: str, draws: int = 400, images: int = 20) -> Diagnosis:
    model, split = random_start(configure({"latent": latent, "device": "cpu"}))
    return diagnose(model, choose_images(split, images, 0), read_variants(estimators, values), draws=draws)


@pytest.mark.slow
def test_unbiased_estimators_are_within_noise_and_exact_has_none() -> None:
    diagnosis = _diagnose("2x4", "exact,rloo,leg,reinforce", images=100)
    rows = {row.label: row for row in diagnosis.rows}
    assert (diagnosis.reference, diagnosis.reference_draws, diagnosis.reference_standard_error) == ("exact", 1, 0.0)
    assert all(row.within_noise for row in rows.values())
    # but for float32's last digit, which depends on how many examples a vectorised softmax takes at once
    assert (rows["exact"].bias, rows["exact"].deviation) == pytest.approx((0, 0), abs=1e-7)
    assert rows["exact"].cosine_of_mean == pytest.approx(1)
    rloo = rows["rloo"]
    assert rloo.noise_floor is not None and rloo.bias is not None and rloo.deviation is not None
    # 600 free coordinates: a relative deviation of sqrt((pi / 2 - 1) / 600) = 3 % and, as those of a row move together,
    # not above 4 %: five of them
    assert rloo.bias == pytest.approx(rloo.noise_floor, rel=0.2), "what is seen of an unbiased one is its noise"
    # Of a normal error with the standard deviation s / sqrt(D), the mean absolute value is sqrt(2 / pi) of that.
    assert rloo.bias == pytest.approx(0.8 * rloo.deviation / 400**0.5, rel=0.2)
    assert rows["leg"].deviation < rloo.deviation < (rows["reinforce"].deviation or 0)  # type: ignore[operator]
    assert [rows[name].evaluations for name in ("exact", "rloo", "leg", "reinforce")] == [16, 4, 7, 1]
    assert (rloo.warm_up, rows["reinforce"].warm_up) == (0, 200), "a moving average is learned first"


@pytest.mark.slow
def test_the_bias_of_direct_grows_with_epsilon_and_its_deviation_falls() -> None:
    small, large = _diagnose("1x10", "direct", "direct.epsilon=100,3", draws=1000).rows
    assert (small.label, large.label) == ("direct epsilon=3", "direct epsilon=100")
    assert small.within_noise is large.within_noise is False
    assert small.bias_corrected < large.bias_corrected  # type: ignore[operator]
    assert small.deviation > large.deviation  # type: ignore[operator]


def test_rare_draws_are_not_taken_for_a_bias() -> None:
    """At a small epsilon most coordinates never see a gradient; a floor of normal noise would call that a bias."""
    (row,) = _diagnose("1x10", "direct", "direct.epsilon=0.003", draws=100, images=50).rows
    assert row.within_noise


@pytest.mark.slow
def test_the_figures_are_those_of_a_plain_loop() -> None:
    model, split = random_start(configure({"latent": "2x3", "device": "cpu"}))
    images = choose_images(split, 3, 0)
    (row,) = diagnose(model, images, read_variants("straight-through"), draws=300).rows
    layer, generator, estimator = model.layer, torch.Generator().manual_seed(1), dgrad.estimator("straight-through")
    logits = model.encoder(images).detach().requires_grad_()
    exact = dgrad.estimator("exact")(layer, logits, model.reconstruction(images)).loss.sum()
    (truth,) = torch.autograd.grad(exact, logits)
    draws = []
    for _ in range(300):
        loss = estimator(layer, logits, model.reconstruction(images), generator=generator).loss.sum()
        draws.append(torch.autograd.grad(loss, logits)[0])
    gradients = torch.stack(draws)
    assert row.deviation == pytest.approx(float(gradients.std(0).mean()), rel=0.1)
    assert row.bias == pytest.approx(float((gradients.mean(0) - truth).abs().mean()), rel=0.1)
    cosines = torch.nn.functional.cosine_similarity(gradients.flatten(1), truth.flatten(), dim=-1)
    assert row.cosine_of_draw == pytest.approx(float(cosines.mean()), abs=0.05)


@pytest.mark.slow
def test_a_large_support_is_measured_against_leg() -> None:
    diagnosis = _diagnose("20x10", "exact,rloo,leg", draws=60, images=10)
    exact, *others = diagnosis.rows
    assert (diagnosis.reference, diagnosis.reference_draws) == ("leg", 240)
    assert diagnosis.reference_standard_error > 0
    assert exact.problem is not None and "20x10 has 1e+20" in exact.problem
    assert not exact.supported
    assert all(row.within_noise for row in others), "leg is measured with other noise than the reference"


@pytest.mark.slow
def test_a_small_memory_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _diagnose("2x3", "exact,leg", draws=20, images=5).rows
    monkeypatch.setattr("dgrad.experiments.diagnosis.NUMBERS_AT_ONCE", 16 * 70)  # two images at once
    parts = _diagnose("2x3", "exact,leg", draws=20, images=5).rows
    assert parts[0].bias == pytest.approx(whole[0].bias, abs=1e-6)
    assert parts[1].deviation == pytest.approx(whole[1].deviation, rel=0.3)


@pytest.mark.slow
def test_estimators_that_draw_the_same_codes_share_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    swept, sweep = [], DecoderEvaluation.sweep

    def counted(self: DecoderEvaluation) -> Tensor:
        swept.append(1)
        return sweep(self)

    monkeypatch.setattr(DecoderEvaluation, "sweep", counted)
    monkeypatch.setattr(dgrad.experiments.diagnosis, "TIMED_CALLS", 1)
    monkeypatch.setattr(dgrad.experiments.diagnosis, "TIMED_SECONDS", 0.0)
    alone, together = {}, {}
    counts = []
    for estimators in (["direct"], ["direct-rb"], ["leg"], ["direct", "direct-rb", "leg"]):
        swept.clear()
        values = [f"{name}.epsilon=0.1,1" for name in estimators if name != "leg"]
        values += [f"{name}.difference=forward,backward" for name in estimators if name != "leg"]
        rows = _diagnose("2x4", ",".join(estimators), *values).rows
        counts.append(len(swept) - 3 * len(rows))  # each is timed three times, for which nothing is kept
        (alone if len(estimators) == 1 else together).update({row.label: (row.bias, row.deviation) for row in rows})
    assert len(together) == 9
    assert together == alone
    assert counts[0] > 0
    assert counts[3] == counts[0] == counts[1] == counts[2]


def test_an_estimator_that_fails_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgrad_plugins.estimators import ESTIMATORS

    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(ESTIMATORS["rloo"], "estimate", fail)
    failed, fine = _diagnose("1x3", "rloo,leg", draws=10).rows
    assert (failed.problem, failed.supported, failed.bias) == ("no such kernel", True, None)
    assert fine.problem is None


# The command


def _command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_with_output(capsys, "diagnose", *arguments)


SMALL = ["--latent", "1x4", "--images", 10, "--draws", 20, "--device", "cpu"]


@pytest.mark.slow
def test_the_command_at_a_random_start(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--set", "direct.epsilon=1,0.1", "--set", "gumbel-softmax.temperature=0.5,1"]
    code, out, err = _command(capsys, *SMALL, *values, "--out", "a/b")
    assert code == 0
    assert "direct epsilon=0.1" in out
    assert "at a random start (seed 0); 10 validation images of digits" in out
    assert "measuring rloo" in err
    written = json.loads(Path("a/b/diagnosis.json").read_text())
    labels = [row["label"] for row in written["rows"]]
    assert labels == [
        "direct epsilon=0.1",
        "direct epsilon=1",
        "gumbel-softmax temperature=0.5",
        "gumbel-softmax temperature=1",
        "rloo",
    ]
    with Image.open("a/b/diagnosis.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
    code, out, err = _command(capsys, *SMALL, *values, "--out", "a/b", "--json", "--quiet")
    again = json.loads(out)
    assert (code, err) == (0, "")
    for row in [*again["rows"], *written["rows"]]:
        del row["seconds"]
    assert again == written, "the same seed gives the same figures"


@pytest.mark.slow
def test_the_command_at_a_run(capsys: pytest.CaptureFixture[str], train: Callable[..., Run]) -> None:
    run = train(latent="3x4")
    code, out, _ = _command(capsys, run.path, "--images", 5, "--draws", 10, "--estimators", "rloo,exact", "--quiet")
    assert code == 0
    assert "weights of epoch 2 (best)" in out
    assert {"diagnosis.json", "diagnosis.png"} <= {path.name for path in run.path.iterdir()}
    assert json.loads((run.path / "diagnosis.json").read_text())["latent"] == "3x4"
    code, _, err = _command(capsys, run.path, "--latent", "2x2", "--model", "mlp")
    assert code == 2
    assert "leave out --latent, --model" in err


@pytest.mark.slow
def test_a_pair_that_cannot_be_costs_its_row_and_names_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--latent", "20x10", "--images", 2, "--draws", 2, "--device", "cpu", "--quiet"]
    code, out, _ = _command(capsys, *options, "--estimators", "exact,rloo")
    assert code == 0
    assert "exact: not measured: exact evaluates every code" in out


REFUSED = [
    (["--estimators", "rlo"], "did you mean 'rloo'"),
    (["--estimators", ","], "--estimators expects names"),
    (["--set", "epsilon=1"], "write ESTIMATOR.epsilon to give it to one estimator alone"),
    (["--set", "direct.epsilon=1,,2"], "--set expects NAME=VALUE or ESTIMATOR.NAME=VALUE"),
    (["--set", "direct.epsilon"], "--set expects NAME=VALUE or ESTIMATOR.NAME=VALUE"),
    (["--set", "leg.samples=2"], "unknown estimator in --set 'leg'"),
    (["--set", "direct.epsilom=2"], "did you mean 'epsilon'"),
    (["--set", "direct.epsilon=0,1"], "direct: epsilon must stay above 0"),
    (["--set", "direct.epsilon=1", "--set", "direct.epsilon=2"], "is given twice"),
    (["--set", "direct.epsilon=geometric:1:0.1"], "moves over a run"),
    (["--latent", "20x10", "--estimators", "exact"], "none of the estimators works with latent 20x10"),
    (["--latent", "20by10"], "cannot read '20by10'"),
    (["--dataset", "mnits"], "did you mean 'mnist'"),
    (["nowhere"], "no run at nowhere"),
    (["--draws", "1"], "--draws"),
    (["--out", "file"], "is a file; expected a directory"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    Path("file").write_text("x")
    rest = ["--images", 2, "--draws", 2] if options[0] != "--draws" else []
    code, out, err = _command(capsys, "--quiet", *rest, *options)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert (out, err.count("\n")) == ("", 1)
    assert [path.name for path in Path().iterdir()] == ["file"], "nothing is left behind"


def test_the_core_refuses_a_single_draw() -> None:
    with pytest.raises(InputError, match="at least 2"):
        _diagnose("1x2", "rloo", draws=1)
