"""Labels that spread along the graph of nearest neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgrad.config import configure
from dgrad.data.propagation import NEIGHBOURS, graph, nearest, poisson_scores, propagated
from dgrad.errors import InputError
from dgrad.training.build import build_dataset
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer, resume
from dgrad_cli.main import main


def rings(count: int) -> tuple[Tensor, Tensor]:
    """Points of two rings, one inside the other, which no nearest labelled point tells apart."""
    angles = torch.arange(count) * (2 * torch.pi / count)
    radii = torch.tensor([1.0, 2.0]).repeat_interleave(count)
    angles = angles.repeat(2)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1), (radii > 1.5).long()


def test_the_nearest_are_those_of_all_distances() -> None:
    points = torch.randn(300, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index, squares = nearest(points, 5)
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    expected = distances.topk(5, largest=False)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(squares.sqrt(), expected.values)


def test_the_graph_is_symmetric_and_joins_no_point_to_itself() -> None:
    points = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    weights = graph(points).to_dense()
    assert torch.equal(weights, weights.T)
    assert (weights.diagonal() == 0).all()
    assert ((weights > 0).sum(1) >= NEIGHBOURS).all()


def test_scores_solve_the_poisson_equation() -> None:
    """Where diffusion has come to rest."""
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, labels, index = graph(points), torch.tensor([0, 1, 2]), torch.tensor([3, 17, 30])
    scores = poisson_scores(weights, index, labels, steps=1000)
    dense = weights.to_dense()
    laplacian = dense.sum(1).diag() - dense
    source = torch.zeros(40, 3, dtype=torch.float64)
    source[index] = torch.eye(3, dtype=torch.float64) - 1 / 3
    torch.testing.assert_close(laplacian @ scores, source, rtol=0, atol=1e-6)


def test_one_label_of_each_ring_is_enough() -> None:
    points, truth = rings(100)
    scores = poisson_scores(graph(points), torch.tensor([0, 150]), torch.tensor([0, 1]))
    assert torch.equal(scores.argmax(1), truth)


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
    known, labels = propagated(images, index, shown, 0.5)
    assert len(known) == 60
    assert torch.equal(known, known.unique())
    assert set(index.tolist()) <= set(known.tolist())
    assert labels[known == 0].item() == 1
    others = ~torch.isin(known, index)
    assert (labels[others] == truth[known[others]]).float().mean() >= 0.95


def test_without_a_share_the_labelled_ones_are_all() -> None:
    images, truth = stripes(50)
    index = torch.tensor([4, 9])
    known, labels = propagated(images, index, truth[index], 0.0)
    assert known.tolist() == [4, 9]
    assert torch.equal(labels, truth[index])


def test_images_that_no_label_reaches_get_none() -> None:
    """Two kinds of images far apart, each with more than its neighbours: two graphs that do not touch."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.rand(60, 1, 8, 8, generator=generator)
    images[30:] += 0.9
    known, labels = propagated(images, torch.tensor([0, 5]), torch.tensor([0, 1]), 1.0)
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


def test_training_draws_images_whose_labels_were_propagated() -> None:
    trainer = Trainer(configure(SETTINGS))
    labels = trainer.data.train.labels
    assert labels is not None
    pool = trainer.batches.labelled  # type: ignore[union-attr]
    assert len(pool.index) == round(0.8 * len(labels))
    assert (pool.labels == labels[pool.index]).float().mean() > 0.8  # of ten classes, two images of each shown


@pytest.mark.parametrize("share", [0, 0.8])
def test_training_says_how_many_images_are_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    options = "train --latent 1x10 --labels 20 --steps 2 --device cpu --propagate-labels"
    with pytest.raises(SystemExit, match=r"^\d+$") as exit_:
        main([*options.split(), str(share), "--out", str(tmp_path / "run")])
    assert exit_.value.code == 0
    images = len(build_dataset(configure(SETTINGS)).train)
    count = max(20, round(share * images))
    assert f"latent 1x10, {count} labelled images, 2 steps" in capsys.readouterr().out


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
