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
from dgrad.testing import check_estimator, check_latent, small_logits
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Trainer
from dgrad.vae.likelihoods import likelihood

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
LINKED = ["chain.py", "spanning_tree.py"]
"""Examples that the guide does not show: it links to them."""


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
    assert sorted([*shown, *LINKED]) == EXAMPLES
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
    section = GUIDE.split("## What an estimator says of itself")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
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


def test_the_latent_keeps_its_contract(bits: LatentLayer) -> None:
    check_latent(bits)
    for spec in ("bits:0", "bits:", "bits:x", "bits"):
        with pytest.raises(dgrad.InputError, match=r"cannot read .*; expected bits:COUNT with whole"):
            dgrad.latent(spec)
    with pytest.raises(dgrad.InputError, match="too many to list"):
        dgrad.latent("bits:20").enumerate(like=torch.zeros(()))


STRUCTURES = {
    "subset:3of6": ("rloo", "direct-rb"),
    "chain:3x2": ("gumbel-softmax", "direct-rb"),
    "tree:4": ("straight-through", "direct-rb"),
}


def _plugin_of(spec: str) -> str:
    name = spec.split(":")[0]
    return f"examples/{'spanning_tree' if name == 'tree' else name}.py"


@pytest.fixture(params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> LatentLayer:
    load_plugin(_plugin_of(request.param))
    return dgrad.latent(request.param)


def test_structures_keep_their_contract(structure: LatentLayer) -> None:
    check_latent(structure)


def test_structures_take_forbidden_coordinates_and_masks(structure: LatentLayer) -> None:
    """Forbidden are codes with the first coordinate. Of two sites of the second example one is padding."""
    logits = small_logits(structure, batch=2)
    first = torch.zeros(structure.shape, dtype=torch.bool)
    first.view(-1)[0] = True
    support = structure.enumerate(like=logits)
    support = support[(support * first).flatten(1).sum(-1) == 0]
    log_q = (logits.flatten(1) @ support.flatten(1).T).log_softmax(-1)
    limited = dgrad.restricted(structure, allowed=~first)
    torch.testing.assert_close(limited.mean(logits).flatten(1), log_q.exp() @ support.flatten(1))
    torch.testing.assert_close(limited.kl(logits), (log_q.exp() * (log_q + math.log(len(support)))).sum(-1))
    assert (limited.sample(logits, 50, generator=Generator().manual_seed(0)) * first == 0).all()
    sequence = torch.stack([logits, logits.flip(0)], 1).requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    estimator, padded = dgrad.estimator("rloo"), dgrad.restricted(structure, mask=mask)
    loss = estimator(structure, sequence, lambda codes: codes.flatten(2).sum(-1).square(), mask=mask).loss
    (gradient,) = torch.autograd.grad((loss + padded.kl(sequence)).sum(), sequence)
    assert (gradient[1, 1] == 0).all()
    assert (gradient[mask] != 0).flatten(1).any(-1).all()
    torch.testing.assert_close(padded.kl(sequence)[1], structure.kl(sequence[1])[0])


@pytest.mark.parametrize("spec", ["subset:0of3", "subset:3of3", "subset:3", "chain:1x2", "chain:2", "tree:2", "tree:x"])
def test_structures_refuse_bad_specs(spec: str) -> None:
    load_plugin(_plugin_of(spec))
    with pytest.raises(dgrad.InputError, match=r"cannot read .*; expected \w+:|subset:3of3 is no subset"):
        dgrad.latent(spec)


def test_structures_are_short() -> None:
    for name in ("subset", "chain", "spanning_tree"):
        assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 70, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rloo", "straight-through"])
def test_estimators_conform_with(structure: LatentLayer, name: str) -> None:
    """The first is right in the mean on every loss, the second on linear ones: its mean is differentiated."""
    check_estimator(dgrad.estimator(name), structure)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "name"), [(spec, name) for spec, names in STRUCTURES.items() for name in names])
def test_structures_train_with(spec: str, name: str, train: Callable[..., Run]) -> None:
    run = train(estimator=name, latent=spec, epochs=4, plugins=(_plugin_of(spec),))
    first, *_, last = run.metrics()
    assert last["valid_bound"] < first["valid_bound"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "direct-joint", "reinforce", "rloo", "gumbel-softmax", "direct-rb"])
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
