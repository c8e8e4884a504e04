"""Spanning trees: `dgrad train --plugin examples/spanning_tree.py --latent tree:5 --estimator rloo`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dgrad
from dgrad.core.latent_layer import wide
from dgrad.core.random import gumbel


@dataclass(frozen=True)
class Tree(dgrad.LogLinear):
    """Spanning trees: `tree:N`, of N vertices, for example tree:5. Codes: 1 for an edge (0,1), (0,2) ... that is in."""

    n: int
    spec, least = "tree:{n}", 3

    shape = property(lambda self: (self.n * (self.n - 1) // 2,))
    support_size = property(lambda self: self.n ** (self.n - 2))  # Cayley
    moves = property(lambda self: dgrad.Exchanges(self.log_z, self.shape, ones=self.n - 1))

    def ends(self, like: Tensor) -> Tensor:
        return torch.triu_indices(self.n, self.n, 1, device=like.device)  # [2, E]

    def log_z(self, logits: Tensor) -> Tensor:  # Kirchhoff: a determinant, by the pivots of Gaussian elimination
        return torch.stack([graph[..., 0, 1:].logsumexp(-1) for graph in self._graphs(logits)]).sum(0)

    def _graphs(self, logits: Tensor) -> list[Tensor]:
        """Log-weights of n, n - 1 ... 2 vertices: one vertex after the other is eliminated. Diagonals are unused."""
        (i, j), number = self.ends(logits), torch.zeros(self.n, self.n, dtype=torch.long, device=logits.device)
        number[i, j] = number[j, i] = torch.arange(len(i), device=logits.device)
        graphs = [logits[..., number]]
        for _ in range(self.n - 2):
            row, rest = graphs[-1][..., 0, 1:], graphs[-1][..., 1:, 1:]
            # w_ij + w_i0 w_0j / sum_j w_0j, all of it positive: right in logs whatever the weights are
            around = row.unsqueeze(-1) + row.unsqueeze(-2) - row.logsumexp(-1)[..., None, None]
            graphs.append(torch.stack([rest, around]).logsumexp(0))
        return graphs

    def argmax(self, potentials: Tensor) -> Tensor:  # Prim
        (i, j), code = self.ends(potentials), torch.zeros_like(potentials)
        inside = (torch.arange(self.n, device=i.device) == 0).expand(*potentials.shape[:-1], -1)
        for _ in range(self.n - 1):
            edge = torch.where(inside[..., i] != inside[..., j], potentials, -torch.inf).argmax(-1, keepdim=True)
            code = code.scatter(-1, edge, 1.0)
            inside = inside.scatter(-1, i[edge], True).scatter(-1, j[edge], True)
        return code

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        graphs = [graph.expand(samples, *graph.shape) for graph in self._graphs(wide(logits.detach()))]
        tree = torch.zeros_like(graphs[-1][..., :1, :1])  # of the last vertex; the others come back one by one
        for graph, smaller in zip(graphs[::-1], [tree, *graphs[:0:-1]], strict=True):
            # An edge of the smaller tree was there with chance w_ij / w'_ij. Else it is a way around by vertex 0.
            tree = tree * ((-gumbel(tree, generator=generator)[0]).exp() >= smaller - graph[..., 1:, 1:])
            part = tree + tree.mT + torch.eye(tree.shape[-1], dtype=tree.dtype, device=tree.device)
            for _ in range(self.n.bit_length()):  # who is joined to whom
                part = (part @ part).clamp(max=1)
            score = graph[..., 0, 1:] + gumbel(graph[..., 0, 1:], generator=generator)[0]
            best = torch.where(part > 0, score.unsqueeze(-2), -torch.inf).argmax(-1)  # one edge from 0 to each part
            tree = F.pad(torch.cat([torch.zeros_like(score).scatter(-1, best, 1.0).unsqueeze(-2), tree], -2), (1, 0))
        return tree[(..., *self.ends(logits))].to(logits.dtype)


@dgrad.hookimpl
def dgrad_register_latents(register):
    register("tree", Tree.parse)
