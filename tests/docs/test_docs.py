"""What docs/writing-a-plugin.md shows is what is there, and it runs: its files, its hooks, its commands."""

from __future__ import annotations

import csv
import inspect
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_dgrad
from torch import Generator

import dgrad
from dgrad import hookspecs
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import FunctionObjective
from dgrad.data import Dataset, unit
from dgrad.registry import build, load_plugin, registry
from dgrad.testing import check_estimator, small_logits
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Trainer
from dgrad.vae.likelihoods import likelihood

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def _at_the_root_without_plugins(_no_user_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths in the guide start at the project's root; what a test loads is forgotten."""
    monkeypatch.chdir(ROOT)
    yield
    for plugin in registry().plugins[1:]:
        registry().remove(plugin.module)
        sys.modules.pop(plugin.name, None)


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def _commands() -> list[list[str]]:
    lines = "\n".join(_blocks("sh")).splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("dgrad ")]


def test_every_example_stands_in_the_guide_as_it_is() -> None:
    shown = dict(re.findall(r"\[`examples/(\w+\.py)`\]\([^)]*\):\n\n```python\n(.*?)```", GUIDE, re.DOTALL))
    assert sorted(shown) == EXAMPLES
    for name, text in shown.items():
        assert text == (ROOT / "examples" / name).read_text(encoding="utf-8"), name


def test_every_hook_stands_in_the_guide_with_its_exact_signature() -> None:
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("dgrad_")}
    assert len(hooks) == 10
    guide = re.sub(r"\s", "", GUIDE)  # the formatter breaks long signatures
    for name, hook in hooks.items():
        signature = str(inspect.signature(hook)).replace("'", "")
        assert re.sub(r"\s", "", f'def {name}{signature}:"""{inspect.getdoc(hook)}"""') in guide


def test_every_trait_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)
    assert rows == [field.name for field in fields(dgrad.Traits)]
    for field in fields(dgrad.Limit):
        assert f"{field.name}=" in GUIDE


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", GUIDE, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        path, _, anchor = target.partition("#")
        assert (ROOT / "docs" / path).exists(), target
        assert path or anchor in headings, target


def test_every_option_of_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = _commands()
    assert len(commands) >= 10
    for command in commands:
        words = [part for part in command[:2] if part in ("plugins", "check", "new")] or command[:1]
        assert run_dgrad(*words, "--help") == 0
        shown = capsys.readouterr().out
        for option in (part for part in command if part.startswith("--")):
            assert option in shown, f"{option} of {command}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in _commands() if command[0] == "train"], ids=" ".join)
def test_every_training_command_trains(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "weighted-rloo" in command:
        monkeypatch.syspath_prepend(ROOT / "examples" / "plugin" / "src")
        command = [*command, "--plugin", "dgrad_weighted_rloo"]
    assert run_dgrad(*command, "--epochs", 1, "--quiet", "--out", tmp_path / "run") == 0
    assert capsys.readouterr().out.startswith("test bound")
    assert run_dgrad("evaluate", tmp_path / "run") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [command for command in _commands() if command[0] in ("plugins", "datasets") and "--plugin" in command],
    ids=" ".join,
)
def test_every_other_command_with_a_plugin_succeeds(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_dgrad(*command) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_checks_from_python() -> None:
    (block,) = [block for block in _blocks("python") if "check_estimator(" in block]
    exec(block, {})


@pytest.mark.parametrize("name", ["slope", "learned-baseline"])
def test_the_other_estimators_conform(name: str) -> None:
    load_plugin(f"examples/{name.replace('-', '_')}.py")
    check_estimator(dgrad.estimator(name), dgrad.latent("2x3"))


def test_a_learned_baseline_asks_for_the_layer() -> None:
    load_plugin("examples/learned_baseline.py")
    layer = dgrad.latent("2x3")
    with pytest.raises(dgrad.InputError, match=r"set_layer\(layer\) before the optimizer"):
        dgrad.estimator("learned-baseline")(layer, torch.zeros(1, 2, 3), lambda codes: codes.sum((-2, -1)))


# The latent


@pytest.fixture
def bits() -> LatentLayer:
    load_plugin("examples/latent.py")
    return dgrad.latent("bits:3")


def test_the_latent_agrees_with_enumeration_and_torch(bits: LatentLayer) -> None:
    logits = small_logits(bits, batch=4)
    support = bits.enumerate(like=logits)
    assert support.shape == (bits.support_size, 3) == (8, 3)
    assert len(support.unique(dim=0)) == 8
    log_q = bits.log_prob(logits, support.unsqueeze(1))  # [8, 4]
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(bits.entropy(logits), -(log_q.exp() * log_q).sum(0))
    torch.testing.assert_close(bits.mean(logits), log_q.exp().T @ support)
    torch.testing.assert_close(bits.kl(logits), math.log(8) - bits.entropy(logits))
    other = bits.distribution(logits)
    torch.testing.assert_close(log_q, other.log_prob(support.unsqueeze(1)))
    torch.testing.assert_close(bits.entropy(logits), other.entropy())
    codes = bits.sample(logits, 2, generator=Generator().manual_seed(0))
    flipped = torch.eye(3, dtype=torch.float64)
    changes = [
        logits * ((codes - each).abs() - codes) for each in flipped
    ]  # <logits, z with one bit flipped> - <logits, z>
    torch.testing.assert_close(
        bits.linear_sweep(logits, codes), torch.stack([change.sum(-1) for change in changes], -1)
    )


def test_the_latent_samples_its_distribution(bits: LatentLayer) -> None:
    logits, draws = small_logits(bits), 20_000
    codes = bits.sample(logits, draws, generator=Generator().manual_seed(0)).squeeze(1)
    support = bits.enumerate(like=logits)
    frequencies = (codes.unsqueeze(1) == support).all(-1).double().mean(0)
    expected = bits.log_prob(logits, support.unsqueeze(1)).exp().squeeze(1)
    assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_the_latent_keeps_the_rest_of_its_contract(bits: LatentLayer) -> None:
    logits = small_logits(bits, batch=2).float()
    assert dgrad.latent(str(bits)) == bits
    assert bits.noise(torch.zeros(100, 3), 100).isfinite().all()
    assert bits.noise(logits.bfloat16()).dtype == torch.float32
    codes = bits.argmax(logits)
    assert torch.equal(bits.codes(bits.indices(codes)), codes)
    torch.testing.assert_close(bits.relax(logits, 1e-4), codes)
    extreme = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    (bits.kl(extreme) + bits.entropy(extreme)).sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()
    for spec in ("bits:0", "bits:", "bits:x", "bits"):
        with pytest.raises(dgrad.InputError, match="as a number of bits"):
            dgrad.latent(spec)
    with pytest.raises(dgrad.InputError, match="too many to list"):
        dgrad.latent("bits:20").enumerate(like=logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "direct-joint", "reinforce", "rloo", "gumbel-softmax"])
def test_the_latent_trains_with(name: str, train: Callable[..., Run]) -> None:
    run = train(estimator=name, latent="bits:6", epochs=4, plugins=("examples/latent.py",))
    first, *_, last = run.metrics()
    assert last["valid_bound"] < first["valid_bound"]


@pytest.mark.slow
def test_the_latent_exports(train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(latent="bits:6", plugins=("examples/latent.py",))
    assert run_dgrad("export", run.path, "--out", tmp_path / "model") == 0


# The data set, the model, the code loss, the events


def test_the_data_set_is_what_it_says() -> None:
    load_plugin("examples/dataset.py")
    dataset: Dataset = dgrad.datasets()["bars-and-stripes"](Path())
    splits = (dataset.train, dataset.valid, dataset.test)
    assert [len(split) for split in splits] == [408, 50, 50]
    images = torch.cat([split.images for split in splits])[:, 0]
    labels = torch.cat([split.labels for split in splits if split.labels is not None])
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    columns_are_constant = (images == images[:, :1]).all((1, 2))
    assert torch.equal(columns_are_constant, labels == 0)


def test_the_model_sweeps_right_and_refuses_what_it_cannot() -> None:
    load_plugin("examples/model.py")
    layer = dgrad.latent("2x3")
    arguments = (layer, (1, 8, 12), likelihood("bernoulli"))
    model: Any = build("models", "small-conv", torch.nn.Module, *arguments, ())
    images = torch.rand(5, 1, 8, 12)
    logits = model.encoder(images)
    assert logits.shape == (5, 2, 3)
    codes = layer.sample(logits, 2)
    objective = model.reconstruction(images)
    torch.testing.assert_close(objective.sweep(codes), FunctionObjective(objective).sweep(codes))
    for shape, hidden, message in (((1, 6, 8), (), "multiples of 4"), ((1, 8, 8), (3,), "two convolutions")):
        with pytest.raises(dgrad.InputError, match=message):
            build("models", "small-conv", torch.nn.Module, layer, shape, likelihood("bernoulli"), hidden)


@pytest.mark.slow
def test_the_model_exports(train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(model="small-conv", epochs=1, plugins=("examples/model.py",))
    assert run_dgrad("export", run.path, "--out", tmp_path / "model") == 0


@pytest.mark.slow
def test_the_code_loss_teaches_the_first_variable_the_class(train: Callable[..., Run]) -> None:
    run = train(latent="4x10", epochs=20, plugins=("examples/code_loss.py",))
    model, _ = load_model(run, "last")
    test = Build(run.config).evaluation_data.test
    with torch.no_grad():
        classes = model.encoder(unit(test.images))[:, 0].argmax(-1)
    assert (classes == test.labels).double().mean() > 0.5


@pytest.mark.slow
def test_the_recipe_for_few_labels_helps(train: Callable[..., Run]) -> None:
    settings = {"estimator": "direct", "latent": "1x10", "labels": 30, "epochs": 20}
    alone = train("alone", **settings)
    helped = train("helped", **settings, plugins=("examples/few_labels.py",))
    assert helped.summary()["accuracy"] > alone.summary()["accuracy"] + 0.03
    assert len(Trainer(helped.config).batches.labelled.index) == 648


def test_the_events_are_written_down(train: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = train(epochs=3, plugins=("examples/events.py",))
    with (run.path / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["valid_bound"]) for row in rows] == [line["valid_bound"] for line in run.metrics()]
    output = capsys.readouterr()
    assert output.out == ""
    assert "best validation bound" in output.err
