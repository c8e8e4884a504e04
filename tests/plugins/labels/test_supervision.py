"""The losses of the logits with few labels: cross-entropy, balance and independence."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dgrad
from dgrad.config import configure
from dgrad.data import Batch
from dgrad.training.labels import known_codes
from dgrad.vae.posterior import EncodedBatch, Gaussian, Posterior
from dgrad_plugins.labels._supervision import Supervision, label_frequencies


def encoded(logits: Tensor, known: Tensor, codes: Tensor, means: Tensor | None = None) -> EncodedBatch:
    """A batch with these logits, labels and means of Gaussian variables; of its images nothing is asked."""
    images = torch.zeros(len(logits), 1, 2, 2)
    posterior = Posterior(logits, None if means is None else Gaussian(means, torch.zeros_like(means)))
    batch = Batch(images, None, torch.arange(len(logits)))
    return EncodedBatch(batch, images, posterior, known, codes, lambda _: posterior, Generator())


def test_the_supervision_is_the_cross_entropy_of_the_labelled_and_the_balance_of_the_others() -> None:
    generator = Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 4, 2], [-1, -1, -1], [1, -1, 3], [-1, 0, -1]])
    known, labelled = known_codes(labels, (3, 5), torch.float64)
    config = configure({"labels": 10, "label-weight": 3, "balance-weight": 0})
    layer = dgrad.latent("3x5")
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(Supervision(config, layer)(encoded(logits, known, labelled)), 3 * cross_entropy / 4)
    by_code = replace(config, label_loss="code")
    assert Supervision(by_code, layer)(encoded(logits, known, labelled)) == 0

    supervision = Supervision(replace(by_code, balance_weight=2.0), layer)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(supervision(encoded(leaf, known, labelled)), leaf)
    q = logits.softmax(-1)
    means = torch.stack([q[~known[:, i, 0], i].mean(0) for i in range(3)])
    torch.testing.assert_close(supervision.mean.double(), 0.9 / 5 + 0.1 * means, rtol=1e-5, atol=1e-6)
    leaf = logits.clone().requires_grad_()
    means = torch.stack([leaf.softmax(-1)[~known[:, i, 0], i].mean(0) for i in range(3)])
    (truth,) = torch.autograd.grad(2 * (means * supervision.mean.log()).sum(), leaf)
    torch.testing.assert_close(gradient, truth)
    assert (gradient[known.squeeze(-1)] == 0).all()


def test_the_balance_is_that_of_the_labelled_images() -> None:
    labels = torch.tensor([[0, 1], [0, 0], [0, 1], [1, 1]])
    frequencies = label_frequencies(labels, 2)
    torch.testing.assert_close(frequencies, torch.tensor([[4 / 6, 2 / 6], [2 / 6, 4 / 6]]))
    layer, config = dgrad.latent("2x2"), configure({"labels": 4, "label-weight": 0, "balance-weight": 1})
    unknown, codes = torch.zeros(50, 2, 1, dtype=torch.bool), torch.zeros(50, 2, 2)
    logits = frequencies.log().expand(50, 2, 2).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Supervision(config, layer, frequencies)(encoded(logits, unknown, codes)), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-7, rtol=0)
    (gradient,) = torch.autograd.grad(Supervision(config, layer)(encoded(logits, unknown, codes)), logits)
    assert gradient.abs().max() > 1e-5, "equal frequencies would change it"


def test_the_independence_is_the_squared_covariance_of_code_and_gaussian_variables() -> None:
    """After one step the moving covariance is 0.1 times the batch's, and so is the gradient of `sum C^2 / 2`."""
    layer, generator = dgrad.latent("2x2"), Generator().manual_seed(0)
    config = configure({"labels": 4, "label-weight": 0, "balance-weight": 0, "independence-weight": 3})
    logits, means = torch.randn(50, 2, 2, generator=generator), torch.randn(50, 5, generator=generator).requires_grad_()
    known = torch.rand(50, 2, 1, generator=generator) < 0.3
    codes = known * layer.codes(torch.randint(0, 2, (50, 2), generator=generator))
    supervision = Supervision(config, layer, gaussian=5)
    (gradient,) = torch.autograd.grad(supervision(encoded(logits.requires_grad_(), known, codes, means)), means)
    values = torch.where(known, codes, logits.softmax(-1)).detach()
    covariances = [torch.cov(torch.cat([values.flatten(1), means], 1).T, correction=0)[:4, 4:]]
    (truth,) = torch.autograd.grad(3 * 0.1 * covariances[0].square().sum() / 2, means)
    torch.testing.assert_close(gradient, truth)
    torch.testing.assert_close(supervision.covariance.flatten(0, 1), 0.1 * covariances[0].detach())
