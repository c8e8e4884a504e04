"""An objective with a sweep of its own, for a training loop of your own."""

import torch
from torch import Tensor

import dgrad


class Distance(dgrad.Objective):
    """`|target - sum_i E[i, z_i]|^2`: how far a sum of embeddings, one for each row of the code, is from a target."""

    def __init__(self, embeddings: Tensor, targets: Tensor) -> None:
        self.embeddings = embeddings  # [n, k, d]
        self.targets = targets  # [B, d]

    def __call__(self, codes: Tensor) -> Tensor:
        return self.residual(codes).square().sum(-1)  # [S, B]

    def residual(self, codes: Tensor) -> Tensor:
        return self.targets - torch.einsum("sbnk,nkd->sbd", codes, self.embeddings)  # [S, B, d]

    def evaluate(self, codes: Tensor) -> dgrad.Evaluation:
        return DistanceEvaluation(self, codes, self.residual(codes))


class DistanceEvaluation(dgrad.Evaluation):
    """It keeps the residual r: with row i set to j, the loss is `|r + E[i, z_i] - E[i, j]|^2`."""

    def __init__(self, objective: Distance, codes: Tensor, residual: Tensor) -> None:
        super().__init__(objective, codes, residual.square().sum(-1))
        self.embeddings, self.residual = objective.embeddings, residual

    @torch.no_grad()
    def sweep(self) -> Tensor:
        own = torch.einsum("sbnk,nkd->sbnd", self.codes, self.embeddings)  # [S, B, n, d]
        return ((self.residual.unsqueeze(2) + own).unsqueeze(3) - self.embeddings).square().sum(-1)  # [S, B, n, k]
