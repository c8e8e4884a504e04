"""What a code is used for: against enumeration, in parts, and where it is collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor, nn

import dgrad
from dgrad.core.latent_layer import LatentLayer
from dgrad.data import Split
from dgrad.vae import usage
from dgrad.vae.likelihoods import Bernoulli
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.usage import CodeUsage, code_usage

IMAGES = 40


class Numbered(nn.Module):
    """An encoder that has the logits of images whose one pixel is their number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[(images.flatten() * len(self.logits)).round().long()]


def _usage(spec: str, logits: Tensor) -> CodeUsage:
    layer, count = dgrad.latent(spec), len(logits)
    model = DiscreteVAE(layer, (1, 1, 1), Bernoulli(), Numbered(logits), nn.Linear(math.prod(layer.decoded_shape), 1))
    split = Split(torch.arange(count).view(count, 1, 1, 1) / count)
    return code_usage(model, split, generator=Generator().manual_seed(0))


def _random(spec: str, images: int = IMAGES) -> tuple[LatentLayer, Tensor]:
    layer = dgrad.latent(spec)
    return layer, 2 * torch.randn(images, *layer.shape, generator=Generator().manual_seed(0))


def _certain(spec: str, indices: Tensor) -> Tensor:
    """Logits of q with these codes alone, `[N, n]`."""
    return 50.0 * dgrad.latent(spec).codes(indices)


@pytest.mark.parametrize("spec", ["1x5", "3x4", "2+3+5", "pairs:3"])
def test_figures_are_those_of_every_code_listed(spec: str) -> None:
    layer, logits = _random(spec)
    found = _usage(spec, logits)
    codes = layer.enumerate(logits)
    q = layer.log_prob(logits, codes.unsqueeze(1)).double().exp().T  # [N, K]
    information = torch.special.entr(q.mean(0)).sum() - torch.special.entr(q).sum(1).mean()
    assert found.information == pytest.approx(float(information), abs=1e-5)
    assert found.information_limit == pytest.approx(math.log(min(layer.support_size, IMAGES)))
    assert found.distinct_codes == len(q.argmax(1).unique())
    indices = layer.indices(codes)  # [K, n]
    assert found.variables is not None
    assert len(found.variables.values) == indices.shape[1]
    best = indices[q.argmax(1)]  # [N, n]
    for variable, of_codes in enumerate(indices.T):
        values = of_codes.unique()
        of_values = torch.stack([q[:, of_codes == value].sum(1) for value in values], 1)  # [N, k]
        mean_entropy = torch.special.entr(of_values).sum(1).mean()
        entropy = torch.special.entr(of_values.mean(0)).sum()
        assert found.variables.values[variable] == len(values)
        assert found.variables.used[variable] == len(best[:, variable].unique())
        assert found.variables.perplexity[variable] == pytest.approx(float(entropy.exp()), rel=1e-5)
        assert found.variables.information[variable] == pytest.approx(float(entropy - mean_entropy), abs=1e-5)


@pytest.mark.parametrize("spec", ["3x4", "pairs:5"])
def test_information_of_larger_supports_is_estimated(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    """Within 5 standard errors of 400 draws that deviate by less than 1 nat: false alarms below one in a million."""
    _, logits = _random(spec, 400)
    exact = _usage(spec, logits)
    monkeypatch.setattr(usage, "LISTED", 1)
    monkeypatch.setattr(usage, "NUMBERS_KEPT", 400 * logits[0].numel())  # codes in many parts
    estimated = _usage(spec, logits)
    assert exact.information is not None and estimated.information is not None
    assert exact.information > 0.5
    assert estimated.information == pytest.approx(exact.information, abs=5 * 0.05)
    assert estimated.information != exact.information
    monkeypatch.setattr(usage, "COMPARED", 20)
    assert _usage(spec, logits).information_limit == pytest.approx(math.log(20))


@pytest.mark.parametrize("listed", [1, 4096])
def test_images_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch, listed: int) -> None:
    monkeypatch.setattr(usage, "LISTED", listed)
    _, logits = _random("3x4")
    whole = _usage("3x4", logits).to_json()
    monkeypatch.setattr(usage, "IMAGES_AT_ONCE", 7)
    parts = _usage("3x4", logits).to_json()
    assert parts.pop("variables") == {name: pytest.approx(values) for name, values in whole.pop("variables").items()}
    assert parts == pytest.approx(whole)


def test_three_codes_for_320_images_are_collapsed() -> None:
    codes = torch.randint(10, (3, 20), generator=Generator().manual_seed(0))
    found = _usage("20x10", _certain("20x10", codes[torch.arange(320) % 3]))
    assert found.collapsed == "3 distinct codes for 320 images"
    assert found.information == pytest.approx(math.log(3), abs=1e-2)


def test_few_values_of_one_variable_are_collapsed() -> None:
    found = _usage("1x40", _certain("1x40", (torch.arange(320) % 15).unsqueeze(1)))
    assert found.collapsed == "15 of 40 values in use for 320 images"


def test_a_code_that_says_nothing_is_collapsed() -> None:
    """Every value is the most probable one of some image, by next to nothing."""
    _, logits = _random("1x10", 320)
    found = _usage("1x10", 0.01 * logits)
    assert found.variables is not None
    assert found.variables.used == [10]
    assert found.collapsed == "0.00 nats of information of 2.30 for 320 images"


@pytest.mark.parametrize("spec", ["20x10", "3x2", "1x10", "1x1024"])
def test_a_code_in_use_is_not_collapsed(spec: str) -> None:
    layer, logits = _random(spec, 320)
    codes = layer.indices(layer.argmax(logits))
    assert _usage(spec, _certain(spec, codes)).collapsed is None


def test_one_image_says_nothing_about_a_collapse() -> None:
    assert _usage("3x4", torch.zeros(1, 3, 4)).collapsed is None
