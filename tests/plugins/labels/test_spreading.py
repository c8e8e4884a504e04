"""Labels that spread along the graph of nearest neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dgrad.config import configure
from dgrad.errors import InputError
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer, resume
from dgrad_cli.main import main
from dgrad_plugins.labels._spreading import NEIGHBOURS, neighbour_graph, poisson_scores, spread_labels


def rings(count: int) -> tuple[Tensor, Tensor]:
    """Points of two rings, one inside the other, which no nearest labelled point tells apart."""
    angles = torch.arange(count) * (2 * torch.pi / count)
    radii = torch.tensor([1.0, 2.0]).repeat_interleave(count)
    angles = angles.repeat(2)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1), (radii > 1.5).long()


def test_the_graph_is_symmetric_and_weighs_the_nearest_other_points() -> None:
    """Against all distances; two points at the same place are neighbours all the same."""
    points = torch.randn(100, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[1] = points[0]
    squares = torch.cdist(points, points).square().fill_diagonal_(torch.inf)
    squares[0, 1] = squares[1, 0] = 0
    nearest = squares.topk(NEIGHBOURS, largest=False)
    expected = torch.zeros(100, 100, dtype=torch.float64)
    expected.scatter_(1, nearest.indices, torch.exp(-4 * nearest.values / nearest.values[:, -1:]))
    assert expected[0, 1] == 1
    weights = torch.from_numpy(neighbour_graph(points.numpy()).toarray())
    torch.testing.assert_close(weights, expected + expected.T)


def test_scores_solve_the_poisson_equation() -> None:
    """Where diffusion has come to rest."""
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = neighbour_graph(points.numpy())
    index = np.array([3, 17, 30])
    scores = poisson_scores(weights, index, np.arange(3), steps=1000)
    dense = weights.toarray()
    laplacian = np.diag(dense.sum(1)) - dense
    source = np.zeros((40, 3))
    source[index] = np.eye(3) - 1 / 3
    np.testing.assert_allclose(laplacian @ scores, source, rtol=0, atol=1e-6)


def test_one_label_of_each_ring_is_enough() -> None:
    points, truth = rings(100)
    scores = poisson_scores(neighbour_graph(points.numpy()), np.array([0, 150]), np.array([0, 1]))
    assert (scores.argmax(1) == truth.numpy()).all()


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Images of a bar, upright or lying, at random places and with noise; and which."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.zeros(count, 1, 12, 12), torch.arange(count) % 2
    for image, label, place in zip(
        images, labels, torch.randint(1, 10, (count,), generator=generator).tolist(), strict=True
    ):
        if label == 0:
            image[0, :, place : place + 2] = 1
        else:
            image[0, place : place + 2] = 1
    return (images + 0.05 * torch.rand(images.shape, generator=generator)).clamp(0, 1), labels


def test_the_clearest_share_is_labelled_and_labels_that_are_known_stay() -> None:
    images, truth = stripes(120)
    index = torch.arange(24)
    shown = truth[index].clone()
    shown[0] = 1  # against all of its neighbours
    known, labels = spread_labels(images, index, shown, 0.5)
    assert len(known) == 60
    assert torch.equal(known, known.unique())
    assert set(index.tolist()) <= set(known.tolist())
    assert labels[known == 0].item() == 1
    others = ~torch.isin(known, index)
    assert (labels[others] == truth[known[others]]).float().mean() >= 0.95


def test_without_a_share_the_labelled_ones_are_all() -> None:
    images, truth = stripes(50)
    index = torch.tensor([4, 9])
    known, labels = spread_labels(images, index, truth[index], 0.0)
    assert known.tolist() == [4, 9]
    assert torch.equal(labels, truth[index])


def test_images_that_no_label_reaches_get_none() -> None:
    """Two kinds of images far apart, each with more than its neighbours: two graphs that do not touch."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.rand(60, 1, 8, 8, generator=generator)
    images[30:] += 0.9
    known, labels = spread_labels(images, torch.tensor([0, 5]), torch.tensor([0, 1]), 1.0)
    assert known.max() < 30
    assert len(known) == len(labels)


SETTINGS = {
    "dataset": "digits",
    "latent": "1x10",
    "labels": 20,
    "propagate-labels": 0.8,
    "steps": 30,
    "batch-size": 50,
    "eval-every": 1,
}


def test_training_draws_images_whose_labels_were_spread_labels() -> None:
    trainer = Trainer(configure(SETTINGS))
    labels = trainer.data.train.labels
    assert labels is not None
    pool = trainer.batches.labelled  # type: ignore[union-attr]
    assert len(pool.index) == round(0.8 * len(labels))
    assert (pool.labels == labels[pool.index]).float().mean() > 0.8  # of ten classes, two images of each shown


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.8])
def test_training_says_how_many_images_are_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    options = "train --latent 1x10 --labels 20 --steps 2 --device cpu --propagate-labels"
    with pytest.raises(SystemExit, match=r"^\d+$") as exit_:
        main([*options.split(), str(share), "--out", str(tmp_path / "run")])
    assert exit_.value.code == 0
    images = len(Build(configure(SETTINGS)).dataset.train)
    count = max(20, round(share * images))
    assert f"latent 1x10, {count} labelled images, 2 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    config = configure(SETTINGS)
    runs = [Run.create(tmp_path / name, config) for name in ("whole", "broken")]
    Trainer(config).train(runs[0])
    trainer = Trainer(config)
    while trainer.step < 10:
        trainer.train_step()
    trainer.save(runs[1])
    again, run = resume(runs[1].path)
    again.train(run)
    bounds = [[line["valid_bound"] for line in run.metrics()][-1] for run in runs]
    assert bounds[0] == bounds[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"propagate-labels": 0.5}, "--propagate-labels must be given with --labels"),
        ({"propagate-labels": 1.5, "labels": 10}, "--propagate-labels must be a share of 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configure(given)
