"""Few labels: which are kept, what is made of them in a step, and that nothing else is seen of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import StopAt, run_dgrad
from torch import Generator, Tensor

import dgrad
from dgrad.config import configure, read_config
from dgrad.core.objectives import FunctionObjective
from dgrad.data import Batch, Dataset, Split, binarize, choose_labelled, unit
from dgrad.data.labelled import LARGEST_SHIFT, LabelledImages, random_affine
from dgrad.errors import InputError
from dgrad.training.build import Build
from dgrad.training.checkpoint import load_checkpoint, save_checkpoint
from dgrad.training.labels import LabelObjective, ObservedObjective, known_codes
from dgrad.training.listener import Progress
from dgrad.training.run_directory import Run
from dgrad.training.seeds import Seeds
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Interrupted, Trainer, resume
from dgrad.vae.evaluation import evaluate_accuracies
from dgrad_cli.main import main

SETTINGS = {"model": "linear", "latent": "1x10", "labels": 50, "labelled-batch": 20, "epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return dgrad.datasets()["digits"](Path())


# Which labels


def test_the_choice_is_balanced_and_the_seeds_alone(digits: Dataset) -> None:
    labels = digits.train.labels
    assert labels is not None
    for count in (10, 57, 100, len(labels)):
        index = choose_labelled(labels, count, seed=3)
        assert len(index.unique()) == len(index) == count
        assert torch.equal(index, index.sort().values)
        if count <= 100:
            each = labels[index].bincount(minlength=10)
            assert each.max() - each.min() == (count % 10 > 0)
    first = choose_labelled(labels, 100, seed=3)
    assert torch.equal(first, choose_labelled(labels, 100, seed=3))
    assert not torch.equal(first, choose_labelled(labels, 100, seed=4))
    chosen = [
        Trainer(configure({**SETTINGS, "estimator": name, "batch-size": size})).batches.labelled.index
        for name, size in (("direct", 100), ("rloo", 30))
    ]
    assert torch.equal(*chosen)
    assert torch.equal(chosen[0], choose_labelled(labels, 50, seed=0))


def test_a_class_that_runs_out_leaves_its_place_to_the_others() -> None:
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] * 50)
    assert labels[choose_labelled(labels, 22, seed=0)].bincount().tolist() == [10, 2, 10]


# What a draw is


def test_a_batch_has_its_labels_hidden_and_labelled_images_behind_it(digits: Dataset) -> None:
    trainer = Trainer(configure({**SETTINGS, "estimator": "rloo", "batch-size": 30}))
    train = binarize(digits, "threshold", seed=0).train
    chosen = set(choose_labelled(digits.train.labels, 50, seed=0).tolist())
    seen: set[int] = set()
    for _ in range(3 * trainer.batches.steps_per_epoch):
        batch = next(trainer.batches)
        labels, index = batch.labels[-20:], batch.index[-20:]
        assert (batch.labels[:-20] == -1).all()
        assert torch.equal(labels, digits.train.labels[index])
        assert torch.equal(batch.images, unit(train.images[batch.index]))
        seen |= set(index.tolist())
    assert seen == chosen, "2640 draws leave one of 50 out with a probability below 1e-20"


@pytest.mark.parametrize(
    ("mode", "binary"), [("threshold", True), ("static", True), ("dynamic", True), ("none", False)]
)
def test_augmented_images_are_near_the_originals_and_binarised_like_them(mode: str, binary: bool) -> None:
    trainer = Trainer(configure({**SETTINGS, "estimator": "rloo", "binarize": mode, "augment": True}))
    grey = Build(trainer.config).dataset.train
    batch = next(trainer.batches)
    images, originals = batch.images[-20:], unit(grey.images[batch.index[-20:]])
    assert bool(((images == 0) | (images == 1)).all()) == binary
    assert 0 <= images.min() < images.max() <= 1
    plain = originals if mode == "none" else originals.round()
    assert not torch.equal(images, plain)
    distances = (images - originals[:, None, :].squeeze(1)).square().mean((1, 2, 3))
    others = (images - originals.roll(1, 0)).square().mean((1, 2, 3))
    assert distances.mean() < 0.8 * others.mean(), "nearer to their originals than to other images"


def test_an_affine_map_is_small_each_images_own_and_repeats() -> None:
    images = torch.zeros(200, 3, 20, 30)
    images[:, :, 8:12, 13:17] = 1
    moved = random_affine(images, generator=Generator().manual_seed(0))
    assert torch.equal(moved, random_affine(images, generator=Generator().manual_seed(0)))
    assert moved.shape == images.shape
    assert torch.equal(moved[:, 0], moved[:, 2]), "all channels in the same way"
    assert len({tuple(image.flatten().tolist()) for image in moved[:, 0]}) == 200
    ink = moved[:, 0].sum((1, 2)) / 16
    assert ((ink > 0.6) & (ink < 1.6)).all()
    rows, columns = torch.arange(20.0), torch.arange(30.0)
    centre = torch.stack(
        [
            (moved[:, 0].sum(2) * rows).sum(1) / moved[:, 0].sum((1, 2)),
            (moved[:, 0].sum(1) * columns).sum(1) / moved[:, 0].sum((1, 2)),
        ]
    )  # [2, 200]
    shift = (centre - torch.tensor([[9.5], [14.5]])).abs()
    # a zoom moves the shift along; pixels at the rim of a shape round
    most = 1.5 * LARGEST_SHIFT * torch.tensor([[20.0], [30.0]]) + 0.3
    assert (shift < most).all()
    assert (shift.amax(1) > 0.5).all()


def test_images_are_turned_and_not_squeezed_where_they_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgrad.data.labelled.LARGEST_ROTATION", math.pi / 2)
    for name, value in (("SHEAR", 0.0), ("ZOOM", 1.0), ("SHIFT", 0.0)):
        monkeypatch.setattr(f"dgrad.data.labelled.LARGEST_{name}", value)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(*shape))
    images = torch.zeros(1, 1, 20, 40)
    images[..., 8:12, 14:26] = 1  # 4 high, 12 wide
    turned = random_affine(images, generator=Generator())
    expected = torch.zeros(1, 1, 20, 40)
    expected[..., 4:16, 18:22] = 1
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=0)


# What a step makes of them


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[4, 3, 5]`, labels `[4, 3]` of which some are unknown, and codes `[2, 4, 3, 5]`, in float64."""
    generator = Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 4, 2], [-1, -1, -1], [1, -1, 3], [-1, 0, -1]])
    return logits, labels, dgrad.latent("3x5").sample(logits, 2, generator=generator)


def _quadratic(codes: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, 15, dtype=codes.dtype).view(3, 5)
    return ((weights * codes).sum((-2, -1)) - 0.3).square() * 10 + codes[..., 0, 0] * codes[..., 2, 3]


def test_the_label_objective_costs_its_weight_for_each_wrong_variable_and_sweeps_as_enumerated() -> None:
    _, labels, codes = _problem()
    objective = LabelObjective(7.0, labels)
    wrong = ((codes.argmax(-1) != labels) & (labels >= 0)).sum(-1)
    assert wrong.max() > 1
    torch.testing.assert_close(objective(codes), 7.0 * wrong.double())
    truth = FunctionObjective(objective).sweep(codes)
    torch.testing.assert_close(objective.sweep(codes), truth)
    torch.testing.assert_close(objective.at(codes).sweep(), truth)


def test_one_variable_takes_labels_without_an_axis_for_it() -> None:
    known, codes = known_codes(torch.tensor([2, -1]), (1, 3))
    assert known.tolist() == [[[True]], [[False]]]
    assert codes.tolist() == [[[0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]]


def test_what_is_observed_is_held_at_its_label() -> None:
    _, labels, codes = _problem()
    known, labelled = known_codes(labels, (3, 5), torch.float64)
    objective = ObservedObjective(FunctionObjective(_quadratic), known, labelled)
    values = torch.where(labels >= 0, labels, codes.argmax(-1))
    torch.testing.assert_close(objective(codes), _quadratic(F.one_hot(values, 5).double()))
    truth = FunctionObjective(objective).sweep(codes)
    assert (truth[:, 0] == truth[:, 0, :1, :1]).all(), "nothing of the first is free"
    assert truth[:, 1].std() > 0.1
    torch.testing.assert_close(objective.sweep(codes), truth)
    torch.testing.assert_close(objective.at(codes).sweep(), truth)


def _gradient(estimator: str, logits: Tensor, objective: object, **hyperparameters: float) -> Tensor:
    logits = logits.clone().requires_grad_()
    estimate = dgrad.estimator(estimator, **hyperparameters)(
        dgrad.latent("3x5"), logits, objective, generator=Generator().manual_seed(0)
    )
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    return gradient


def test_the_gradient_of_the_label_objective_is_that_of_the_probability_of_the_label() -> None:
    logits, labels, _ = _problem()
    leaf = logits.clone().requires_grad_()
    _, labelled = known_codes(labels, (3, 5), torch.float64)
    expected_loss = 7.0 * ((labels >= 0).sum(-1) - (labelled * leaf.softmax(-1)).sum((-2, -1)))
    (truth,) = torch.autograd.grad(expected_loss.sum(), leaf)
    for name in ("exact", "leg"):
        torch.testing.assert_close(_gradient(name, logits, LabelObjective(7.0, labels)), truth)


def test_direct_takes_the_label_as_the_perturbed_argmax() -> None:
    """With a large weight: `(z - label) / epsilon`; without noise the cross-entropy's gradient over epsilon."""
    logits, labels, _ = _problem()
    known, labelled = known_codes(labels, (3, 5), torch.float64)
    objective = LabelObjective(1000.0, labels)
    direct = _gradient("direct", logits, objective, epsilon=0.05)
    codes = torch.where(known, 0.05 * direct + labelled, 0)  # z again
    assert torch.equal(codes.round().sum(-1), known.squeeze(-1).double())
    torch.testing.assert_close(codes, codes.round(), atol=1e-6, rtol=0)
    assert (direct[~known.expand_as(direct)] == 0).all()
    smooth = _gradient("direct-rb", logits, objective, epsilon=0.05)
    torch.testing.assert_close(smooth, known * (logits.softmax(-1) - labelled) / 0.05, rtol=1e-4, atol=1e-4)


def test_labelled_images_train_the_bound_of_image_and_label() -> None:
    """With labels alone: the loss at the label, no KL of the code, no gradient but the cross-entropy's."""
    config = {**SETTINGS, "estimator": "leg", "balance-weight": 0, "label-weight": 0, "kl": "inside"}
    trainer = Trainer(configure(config))
    shown = trainer.batches.labelled.draw(30)
    trainer.loss.set_step(0)
    loss = trainer.loss(shown)
    codes = F.one_hot(shown.labels, 10).float().view(1, 30, 1, 10)
    torch.testing.assert_close(loss, trainer.model.reconstruction(shown.images)(codes).mean())
    loss.backward()
    assert trainer.model.encoder.body[0].weight.grad.abs().max() < 1e-6
    assert trainer.model.decoder.first.weight.grad.abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("label_loss", ["code", "cross-entropy"])
def test_hidden_labels_change_nothing(
    digits: Dataset, label_loss: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    labels = digits.train.labels
    others = torch.ones(len(labels), dtype=torch.bool)
    others[choose_labelled(labels, 50, seed=0)] = False
    weights = []
    for name, hidden in (("true", labels), ("false", torch.where(others, labels.roll(7), labels))):
        dataset = replace(digits, train=Split(digits.train.images, hidden))
        monkeypatch.setattr("dgrad.training.build.Build.dataset", dataset)
        monkeypatch.setattr("dgrad.training.batches.choose_labelled", lambda *_, **__: (~others).nonzero().squeeze(-1))
        trainer = Trainer(configure({**SETTINGS, "estimator": "direct", "label-loss": label_loss, "augment": True}))
        trainer.train(Run.create(tmp_path / name, trainer.config))
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# The KL's weight


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_the_weight_of_the_kl_follows_its_schedule(place: str) -> None:
    settings = {"latent": "3x4", "estimator": "leg", "kl": place, "steps": 10, "device": "cpu"}
    gradients = []
    for weight, step in (("geometric:10:0.1", 5), ("1", 0), ("geometric:10:0.1", 0)):
        trainer = Trainer(configure({**settings, "kl-weight": weight}))
        trainer.loss.set_step(step)
        trainer.loss(next(trainer.batches)).backward()
        gradients.append(trainer.model.encoder.body[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[2], gradients[1])


def test_a_run_from_before_these_settings_goes_on(tmp_path: Path) -> None:
    config = configure({"latent": "3x4", "estimator": "rloo", "epochs": 1, "kl-weight": 0.5, "device": "cpu"})
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(config)
    config = trainer.config
    trainer.save(run)
    old = {name: value for name, value in json.loads(config.to_json()).items() if "label" not in name}
    old["kl_weight"] = 0.5
    del old["augment"], old["balance_weight"], old["gaussian"]
    run.config_file.write_text(json.dumps(old))
    tensors, state = load_checkpoint(run.checkpoint_file)
    save_checkpoint(run.checkpoint_file, tensors, {**state, "config": {k: v for k, v in old.items() if k != "device"}})
    assert read_config(run.config_file) == config
    resume(run.path)


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        {"estimator": "direct", "augment": True, "kl-weight": "geometric:10:1", "model": "mixture", "gaussian": 3},
        {"estimator": "reinforce", "label-loss": "code", "binarize": "dynamic"},
        {"estimator": "leg", "adversarial-weight": 1},
    ],
    ids=["augmented", "dynamic", "adversarial"],
)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path: Path, variant: dict[str, object]) -> None:
    config = configure({**SETTINGS, **variant})
    whole, broken = (Run.create(tmp_path / name, config) for name in ("whole", "broken"))
    Trainer(config).train(whole)
    listener = StopAt()
    listener.trainer = Trainer(config, listener)
    with pytest.raises(Interrupted, match="stopped at step 15 of "):
        listener.trainer.train(broken)
    trainer, run = resume(broken.path)
    trainer.train(run)
    ours, theirs = (load_checkpoint(one.checkpoint_file)[0] for one in (broken, whole))
    assert ours.keys() == theirs.keys()
    assert "supervision.mean" in ours
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    lines = [[{**line, "seconds": 0} for line in one.metrics()] for one in (broken, whole)]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        {"estimator": "direct", "label-loss": "code", "label-weight": 1000, "set": {"epsilon": "0.05"}},
        {"estimator": "direct"},
        {"estimator": "leg", "label-loss": "code", "label-weight": 200},
        {"estimator": "gumbel-softmax", "label-loss": "code", "label-weight": 200},
        {"estimator": "rloo", "label-loss": "code", "label-weight": 200},
    ],
    ids=lambda variant: f"{variant['estimator']}-{variant.get('label-loss', 'cross-entropy')}",
)
def test_few_labels_teach_the_classes_with_any_estimator(train: Callable[..., Run], variant: dict[str, object]) -> None:
    run = train(**{**SETTINGS, "epochs": 10, "labels": 100, **variant})
    summary = run.summary()
    assert summary is not None
    assert summary["accuracy"] == summary["best"]["test_accuracy"] > 0.65, "without labels: 0.1 on average"
    best = max(line["valid_accuracy"] for line in run.metrics())
    assert summary["best"]["valid_accuracy"] == best, "chosen by validation"


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["bound", "reconstruction", "accuracy"])
def test_the_best_weights_are_those_with_the_best_figure_that_choose_by_names(
    train: Callable[..., Run], criterion: str
) -> None:
    settings = {**SETTINGS, "estimator": "leg", "lr": 0.01, "kl-weight": "geometric:0.01:100", "label-weight": 1}
    run = train(**{**settings, "epochs": 12, "choose-by": criterion})
    lines = run.metrics()
    best = {
        "bound": min(lines, key=lambda line: line["valid_bound"]),
        "reconstruction": min(lines, key=lambda line: line["valid_reconstruction"]),
        "accuracy": max(lines, key=lambda line: (line["valid_accuracy"], -line["valid_bound"])),
    }
    assert len({line["epoch"] for line in best.values()}) == 3, "settings with which they differ"
    assert run.summary()["best"]["epoch"] == best[criterion]["epoch"]


def test_accuracy_is_the_share_of_labels_that_are_most_probable(train: Callable[..., Run], digits: Dataset) -> None:
    run = train(**{**SETTINGS, "estimator": "leg"})
    model, _ = load_model(run)
    test = binarize(digits, "threshold", seed=0).test
    predicted = model.encoder(unit(test.images)).squeeze(1).argmax(-1)
    assert evaluate_accuracies(model, test)["accuracy"] == pytest.approx(
        float((predicted == test.labels).float().mean())
    )
    assert run.summary()["accuracy"] == pytest.approx(evaluate_accuracies(model, test)["accuracy"])


def test_a_run_without_labels_has_no_accuracy(train: Callable[..., Run]) -> None:
    run = train()
    assert "accuracy" not in run.summary()
    assert not any("accuracy" in name for name in run.metrics()[0])


@pytest.mark.slow
def test_the_commands_show_the_accuracy_and_the_grid_has_a_column_for_each_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    mixture = ["--model", "mixture", "--gaussian", 2, "--augment", "--estimator", "leg"]
    assert run_dgrad("train", *options, *mixture, "--out", "run") == 0
    out = capsys.readouterr().out
    accuracy = json.loads(Path("run/summary.json").read_text())["accuracy"]
    assert out.count(" accuracy ") >= 2
    assert f"accuracy {100 * accuracy:.2f} %" in out
    assert run_dgrad("evaluate", "run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy
    assert run_dgrad("sample", "run", "--grid", "--rows", 3, "--out", "grid.png") == 0
    from PIL import Image

    with Image.open("grid.png") as picture:
        assert picture.size == (10 * 60 + 4, 3 * 60 + 4)
    capsys.readouterr()
    assert run_dgrad("sample", "run", "--grid", "--columns", 3, "--out", "no.png") == 2
    assert "--grid has a column for each value" in capsys.readouterr().err


def _unlabelled() -> str:
    images = np.random.RandomState(0).randint(0, 256, (40, 4, 4)).astype(np.uint8)
    np.savez("unlabelled.npz", images=images)
    return "unlabelled.npz"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": 1298}, r"--labels 1298; expected at least one for each of the 10 classes and at most 1297"),
        ({"labels": 9}, r"--labels 9; expected at least one for each of the 10 classes"),
        (
            {"latent": "20x10"},
            r"needs a code of one variable with as many values as classes; got --latent 20x10, expected 1x10",
        ),
        ({"latent": "1x9"}, r"got --latent 1x9, expected 1x10"),
        ({"dataset": "unlabelled"}, r"unlabelled.npz has no labels; leave --labels out"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    if settings.get("dataset") == "unlabelled":
        settings = {"dataset": _unlabelled()}
    with pytest.raises(dgrad.InputError, match=message):
        Trainer(configure({**SETTINGS, "estimator": "leg", **settings}))


def test_labelled_images_need_labels() -> None:
    with pytest.raises(dgrad.InputError, match="expected a split with labels"):
        LabelledImages(Split(torch.zeros(3, 1, 2, 2)), torch.arange(3), generator=Generator())


def test_a_batch_keeps_its_shape_for_attributes() -> None:
    """A label for each variable travels through the objectives of a step."""
    batch = Batch(torch.zeros(4, 1, 2, 2), _problem()[1], torch.arange(4))
    config = configure({"labels": 10, "label-loss": "code"})
    from dgrad.registry import code_losses

    (loss,) = code_losses(batch, config)
    assert loss(_problem()[2].float()).shape == (2, 4)


# Pretraining

PRETRAINED = {**SETTINGS, "estimator": "direct", "pretrain-steps": 30, "batch-size": 40, "balance-weight": 0}


def test_pretraining_sees_the_labelled_images_alone_and_comes_before_the_first_step(tmp_path: Path) -> None:
    trainer = Trainer(configure(PRETRAINED))
    chosen = set(trainer.batches.labelled.index.tolist())  # type: ignore[union-attr]
    seen: list[Batch] = []
    update = trainer.training_step.update

    def watch(batch: Batch) -> None:
        seen.append(batch)
        update(batch)

    trainer.training_step.update = watch  # type: ignore[method-assign]
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.begin(Run.create(tmp_path / "run", trainer.config), tmp_path)
    assert (len(seen), trainer.step, float(trainer.training_step.loss_sum)) == (30, 0, 0.0)
    for batch in seen:
        assert batch.labels is not None
        assert len(batch.labels) == 40
        assert set(batch.index.tolist()) <= chosen
        assert (batch.labels >= 0).all()
    assert all(not torch.equal(now, then) for now, then in zip(trainer.model.parameters(), before, strict=True)), (
        "every parameter moves"
    )


@pytest.mark.slow
def test_pretraining_teaches_the_labels() -> None:
    """Without labelled images in the run's own steps; chance names 10 % of the classes."""
    found = {}
    for steps in (0, 300):
        trainer = Trainer(configure({**PRETRAINED, "pretrain-steps": steps, "labelled-batch": 20 if steps == 0 else 0}))
        assert len(list(trainer.training_step.pretrain(steps))) == steps
        found[steps] = evaluate_accuracies(trainer.model, trainer.data.valid)["accuracy"]
    assert found[0] < 0.35
    assert found[300] > 0.7


def test_a_run_without_labelled_images_in_its_steps_hides_every_label() -> None:
    batch = next(Trainer(configure({**PRETRAINED, "labelled-batch": 0, "augment": True})).batches)
    assert batch.labels is not None
    assert len(batch.images) == 40
    assert (batch.labels == -1).all()


class _StopInPretraining(StopAt):
    def pretrained(self, progress: Progress) -> None:
        if progress.pretrained == 10:
            self.trainer.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [_StopInPretraining, StopAt])
def test_a_pretrained_run_that_was_stopped_equals_an_undisturbed_one(tmp_path: Path, kind: type[StopAt]) -> None:
    config = configure({**PRETRAINED, "labelled-batch": 0})
    whole, broken = (Run.create(tmp_path / name, config) for name in ("whole", "broken"))
    Trainer(config).train(whole)
    listener = kind()
    listener.trainer = Trainer(config, listener)
    with pytest.raises(Interrupted, match="train --resume"):
        listener.trainer.train(broken)
    trainer, run = resume(broken.path)
    trainer.train(run)
    ours, theirs = (load_checkpoint(one.checkpoint_file)[0] for one in (broken, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    lines = [[{**line, "seconds": 0} for line in one.metrics()] for one in (broken, whole)]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_seeds_in_parallel_are_pretrained_each_and_stop_in_it(tmp_path: Path) -> None:
    config = configure({**PRETRAINED, "labelled-batch": 0, "epochs": 1})
    listener = _StopInPretraining()
    stopped = Seeds.create(tmp_path / "seeds", config, 2, listener)
    listener.trainer = stopped.trainers[0]
    with pytest.raises(Interrupted, match=r"--resume .*seeds$"):
        stopped.train()
    again = Seeds.resume(tmp_path / "seeds")
    again.train()
    alone = Run.create(tmp_path / "alone", configure({"seed": 1}, config))
    Trainer(alone.config).train(alone)
    assert Run(tmp_path / "seeds" / "seed1").summary()["test_bound"] == alone.summary()["test_bound"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrain-steps": 5}, "--pretrain-steps must be given with --labels"),
        ({"pretrain-steps": -1, "labels": 10}, "--pretrain-steps must be a whole number of at least 0; got -1"),
        ({"labelled-batch": 0, "labels": 10}, "--labelled-batch must be at least 1, or given with --pretrain-steps"),
    ],
)
def test_pretraining_that_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configure(given)


def test_training_says_that_it_pretrains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "train --latent 1x10 --labels 20 --steps 2 --pretrain-steps 3 --labelled-batch 0 --device cpu --out"
    with pytest.raises(SystemExit, match=r"^\d+$") as exit_:
        main([*options.split(), str(tmp_path / "run")])
    assert exit_.value.code == 0
    assert "20 labelled images, 2 steps after 3 on labelled images alone, on" in capsys.readouterr().out
