"""Hard codes times a table: the product, by lookup."""

from __future__ import annotations

import pytest
import torch

import dgrad


def test_a_lookup_is_the_product_with_its_derivatives() -> None:
    layer, generator = dgrad.latent("3x4"), torch.Generator().manual_seed(0)
    logits = torch.zeros(5, 3, 4, dtype=torch.float64)
    codes = layer.sample(logits, 2, generator=generator).requires_grad_()
    table = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(6, dtype=torch.float64, generator=generator)
    for create_graph in (False, True):
        results = []
        for vectors in (dgrad.lookup(codes, table), codes @ table):
            loss = (vectors @ weight).sin().sum()
            gradients = torch.autograd.grad(loss, (codes, table), create_graph=create_graph)
            if create_graph:
                gradients = torch.autograd.grad(sum(each.square().sum() for each in gradients), (codes, table))
            results.append((loss, *gradients))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_a_straight_through_estimator_has_the_same_gradient_by_lookup() -> None:
    layer, draws = dgrad.latent("3x4"), torch.Generator().manual_seed(1)
    table = torch.randn(4, 2, dtype=torch.float64, generator=draws)
    logits = torch.randn(5, 3, 4, dtype=torch.float64, generator=draws).requires_grad_()
    gradients = []
    for vectors in (dgrad.lookup, torch.matmul):
        generator = torch.Generator().manual_seed(0)
        codes = dgrad.estimator("st-gumbel-softmax").codes(layer, logits, generator=generator)
        gradients.append(torch.autograd.grad(vectors(codes, table).square().sum(), logits)[0])
    torch.testing.assert_close(*gradients)


def test_transforms_of_torch_func_see_the_product() -> None:
    draws = torch.Generator().manual_seed(1)
    codes = torch.eye(4, dtype=torch.float64)[torch.randint(4, (5, 3), generator=draws)]
    table = torch.randn(4, 2, dtype=torch.float64, generator=draws)
    gradients = [
        torch.func.vmap(torch.func.grad(lambda code, vectors=vectors: vectors(code, table).square().sum()))(codes)
        for vectors in (dgrad.lookup, torch.matmul)
    ]
    torch.testing.assert_close(*gradients)


def test_a_table_of_another_size_is_refused() -> None:
    with pytest.raises(dgrad.InputError, match="a table of 5 vectors for codes of 4 values; expected a vector"):
        dgrad.lookup(torch.zeros(1, 2, 4), torch.zeros(5, 3))
