"""The curvature that a batch shares, and the surrogate of a sweep made of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import dgrad
from dgrad.core.curvature import Curvature, combined, mean_of_products, mean_of_squares
from dgrad.testing import small_logits

LAYER = dgrad.latent("2x3")


def _symmetric() -> Tensor:
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.T


def _of(matrix: Tensor) -> Curvature:
    values, vectors = torch.linalg.eigh(matrix)
    left = vectors.T.unflatten(-1, (2, 3))
    return Curvature(left, values[:, None, None] * left)


def _quadratic(codes: Tensor) -> Tensor:
    flat = codes.flatten(2)
    return torch.einsum("sbi,ij,sbj->sb", flat, _symmetric(), flat) / 2


def _in_row(table: Tensor) -> Tensor:
    return table - table.mean(-1, keepdim=True)


def test_products_with_the_matrix() -> None:
    matrix, vectors = _symmetric(), small_logits(LAYER, batch=4).unsqueeze(0)
    curvature = _of(matrix)
    flat = vectors.flatten(2)
    torch.testing.assert_close(curvature.times(vectors).flatten(2), flat @ matrix)
    torch.testing.assert_close(curvature.along(vectors), ((flat @ matrix) * flat).sum(-1) / 2)
    table = curvature.within_rows(vectors)
    for row, value in itertools.product(range(2), range(3)):
        moved = torch.zeros_like(vectors)
        moved[..., row, :] = torch.eye(3, dtype=torch.float64)[value] - vectors[..., row, :]
        table[..., row, value] -= curvature.along(moved)
    torch.testing.assert_close(_in_row(table), torch.zeros_like(table))  # but for a constant in each row


def test_the_surrogate_of_a_quadratic_is_its_sweep() -> None:
    codes = LAYER.sample(small_logits(LAYER, batch=4), 2)
    at = dgrad.objective(_quadratic).at(codes, differentiable=True)
    surrogate = _of(_symmetric()).sweep(codes, at.slope(), codes)
    torch.testing.assert_close(_in_row(surrogate), _in_row(at.sweep()))


def test_at_the_mean_the_surrogate_is_the_mean_over_the_other_rows() -> None:
    logits = small_logits(LAYER)
    support = LAYER.enumerate(like=logits).unsqueeze(1)  # [9, 1, 2, 3]
    at = dgrad.objective(_quadratic).at(support, differentiable=True)
    weights = LAYER.log_prob(logits, support).exp()[..., None, None]
    expected = (weights * at.sweep()).sum(0)  # row i of a table does not depend on row i of its code
    surrogate = _of(_symmetric()).sweep(support, at.slope(), LAYER.mean(logits))
    torch.testing.assert_close(_in_row(surrogate), _in_row(expected).expand_as(surrogate))


def _every_sign(like: Tensor, generator: object) -> Tensor:
    """Every vector of signs once, one for each example."""
    size = like.flatten(2).shape[-1]
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=size)), dtype=like.dtype)
    return signs.view_as(like)


def test_the_curvature_of_a_function_is_its_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgrad.core.objectives.random_signs", _every_sign)
    codes = LAYER.sample(torch.zeros(1, 2, 3, dtype=torch.float64)).expand(1, 64, 2, 3)
    found = dgrad.objective(_quadratic).curvature(codes)
    torch.testing.assert_close(found.times(torch.eye(6).double().view(6, 2, 3)).flatten(1), _symmetric())


def test_the_curvature_of_a_decoder_is_its_gauss_newton_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgrad.vae.reconstruction.random_signs", _every_sign)
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    codes = LAYER.sample(torch.zeros(1, 2, 3, dtype=torch.float64)).expand(1, 8, 2, 3)
    jacobian = torch.func.jacrev(decoder)(codes[0, 0].flatten())  # [3, 6]
    outputs = decoder(codes[0, 0].flatten()).detach()
    bernoulli, squared = torch.sigmoid(outputs), (1 + torch.tanh(outputs)) / 2
    curvatures = {dgrad.bernoulli: bernoulli * (1 - bernoulli), dgrad.squared_error: 8 * (squared * (1 - squared)) ** 2}
    for loss, weights in curvatures.items():
        found = dgrad.objective(decoder=decoder, loss=loss(torch.ones(8, 3).double())).curvature(codes)
        expected = jacobian.T @ (weights[:, None] * jacobian)
        torch.testing.assert_close(found.times(torch.eye(6).double().view(6, 2, 3)).flatten(1), expected)


def test_a_convolutional_decoder_of_maps_has_a_surrogate() -> None:
    """Codes as maps of one-hot vectors, with dropout behind: no linear first layer is needed."""
    torch.manual_seed(0)
    layer = dgrad.latent("4x3")
    decoder = nn.Sequential(
        *(nn.Unflatten(1, (2, 2)), _ChannelsFirst(), nn.ConvTranspose2d(3, 4, 2, 2), nn.SiLU()),
        *(nn.Dropout(0.2), nn.Conv2d(4, 1, 3, padding=1)),
    )
    logits = torch.zeros(5, 4, 3, requires_grad=True)
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(torch.rand(5, 1, 4, 4)))
    for estimator in (
        dgrad.estimator("direct-rb", sweep="surrogate", samples=2),
        dgrad.estimator("leg", sweep="corrected", sweep_share=0.5),
        dgrad.estimator("double-cv", control="quadratic"),
    ):
        (gradient,) = torch.autograd.grad(estimator(layer, logits, objective).loss.sum(), logits)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


class _ChannelsFirst(nn.Module):
    def forward(self, codes: Tensor) -> Tensor:
        return codes.permute(0, 3, 1, 2)


def test_sums_scale_and_add_and_the_kl_is_linear() -> None:
    logits = small_logits(LAYER, batch=4)
    codes = LAYER.sample(logits)
    kl = dgrad.KLObjective(LAYER, logits)
    assert not kl.curvature(codes).left.numel()
    objective = 0.5 * dgrad.objective(_quadratic) + kl
    state = torch.Generator().manual_seed(1)
    alone = dgrad.objective(_quadratic).curvature(codes, generator=torch.Generator().manual_seed(1))
    together = objective.curvature(codes, generator=state)
    torch.testing.assert_close(together.times(codes), 0.5 * alone.times(codes))
    difference = combined(torch.sub, [alone, alone])
    assert difference.times(codes).abs().max() < 1e-12


def test_a_linear_loss_has_none_to_the_last_bit() -> None:
    logits = small_logits(LAYER, batch=4)
    codes = LAYER.sample(logits)
    found = dgrad.objective(lambda codes: codes[..., 0].sum(-1)).curvature(codes)
    assert not found.times(codes).any()
    assert not found.within_rows(codes).any()


def test_means() -> None:
    ours, theirs = (small_logits(LAYER, batch=3, seed=seed) for seed in (0, 1))
    vector = small_logits(LAYER, seed=2)
    u, v, x = ours.flatten(1), theirs.flatten(1), vector.flatten()
    torch.testing.assert_close(mean_of_squares(ours).times(vector).flatten(), u.T @ (u @ x) / 3)
    expected = (u.T @ (v @ x) + v.T @ (u @ x)) / 6
    torch.testing.assert_close(mean_of_products(ours, theirs).times(vector).flatten(), expected)


def test_no_more_examples_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgrad.vae.reconstruction.EXAMPLES", 3)
    objective = dgrad.objective(decoder=nn.Linear(6, 4), loss=dgrad.bernoulli(torch.ones(5, 4)))
    assert len(objective.curvature(LAYER.sample(torch.zeros(5, 2, 3))).left) == 3


def test_batch_statistics_are_refused() -> None:
    decoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(torch.ones(5, 4)))
    with pytest.raises(dgrad.InputError, match="BatchNorm in training mode"):
        objective.curvature(LAYER.sample(torch.zeros(5, 2, 3)))


def test_what_has_no_slope_has_no_surrogate() -> None:
    estimator = dgrad.estimator("leg", sweep="surrogate")
    table = torch.rand(2, 3)
    with pytest.raises(dgrad.InputError, match="an objective of indices has no gradient in the codes"):
        estimator(LAYER, torch.zeros(1, 2, 3), dgrad.objective(lambda i: table[0][i].sum(-1), indices=True))
    with pytest.raises(dgrad.InputError, match=r"direct-rb with sweep=surrogate needs a code of independent .* rows"):
        dgrad.estimator("direct-rb", sweep="surrogate")(
            dgrad.latent("pairs:4"), torch.zeros(1, 10), lambda codes: codes.sum(-1)
        )
