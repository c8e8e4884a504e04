"""The autoencoders of docs/choosing.md: each bottleneck trains, and ours is the same by lookup."""

from __future__ import annotations

import pytest
import torch

from benchmarks.codebooks import GRID, SIDE, VALUES, Autoencoder, evaluate


def _images() -> torch.Tensor:
    return torch.rand(2, 1, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["fsq", "vq-ema"])
def test_bottlenecks_of_the_other_library_train(name: str) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    model = Autoencoder(name, GRID[name][0])
    loss, indices = model(_images())
    loss.backward()
    assert indices.shape == (2, SIDE * SIDE)
    assert 0 <= int(indices.min()) <= int(indices.max()) < VALUES
    assert model.encoder[0].weight.grad.any()


def test_ours_has_the_same_gradients_by_lookup() -> None:
    gradients = []
    for by_lookup in (False, True):
        torch.manual_seed(0)
        model = Autoencoder("st-gumbel-softmax", {"rate": 0.001, "temperature": 1.0}, by_lookup=by_lookup)
        model(_images())[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for product, lookup in zip(*gradients, strict=True):
        torch.testing.assert_close(lookup, product, rtol=1e-4, atol=1e-5)


def test_the_figures_of_a_model() -> None:
    torch.manual_seed(0)
    model = Autoencoder("st-gumbel-softmax", {"rate": 0.001, "temperature": 1.0})
    model.encoder[-1].weight.data.zero_()
    model.encoder[-1].bias.data.copy_(torch.arange(VALUES))  # one value everywhere
    figures = evaluate(model, (255 * _images()).to(torch.uint8))
    assert figures["used"] == 1
    assert figures["bits"] == 0
    assert figures["psnr"] == pytest.approx(-10 * torch.tensor(figures["error"] / (4 * SIDE) ** 2).log10().item())
