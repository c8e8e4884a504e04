"""How a code is changed a little."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Generator, Tensor

import dgrad


def test_substitutions_set_each_integer_to_each_other_value() -> None:
    layer = dgrad.latent("2x3")
    moves = dgrad.Substitutions(layer.indices, layer.codes, variables=2, values=3)
    codes = layer.codes(torch.tensor([[[0, 2], [1, 1]]]))  # [1, 2, 2, 3]
    found = layer.indices(moves.neighbours(codes))  # [C, 1, 2, 2]
    assert len(found) == moves.count == 4
    assert sorted(found[:, 0, 0].tolist()) == [[0, 0], [0, 1], [1, 2], [2, 2]]
    assert sorted(found[:, 0, 1].tolist()) == [[0, 1], [1, 0], [1, 2], [2, 1]]


def test_exchanges_are_those_that_give_a_code() -> None:
    """Of the 20 codes with three of six ones 13 are kept, whatever their structure."""
    every = torch.zeros(20, 6).scatter(1, torch.tensor([*combinations(range(6), 3)]), 1.0)
    support = every[torch.randperm(20, generator=Generator().manual_seed(0))[:13]]

    def log_z(logits: Tensor) -> Tensor:
        return (logits @ support.to(logits.dtype).T).logsumexp(-1)

    moves = dgrad.Exchanges(log_z, shape=(6,), ones=3)
    neighbours = moves.neighbours(support.unsqueeze(0))[:, 0]  # [9, 13, 6]
    assert len(neighbours) == moves.count == 9
    for code, found in zip(support, neighbours.unbind(1), strict=True):
        expected = {tuple(other.tolist()) for other in support if (other != code).sum() == 2}
        changed = [tuple(other.tolist()) for other in found if not torch.equal(other, code)]
        assert set(changed) == expected
        assert len(changed) == len(expected)
