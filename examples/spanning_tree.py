"""Spanning trees: `dgrad train --plugin examples/spanning_tree.py --latent tree:5 --estimator rloo`."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dgrad
from dgrad.core.latent_layer import wide
from dgrad.core.random import gumbel


@dataclass(frozen=True)
class Tree(dgrad.LogLinear):
    """Spanning trees of n vertices: codes `[n(n - 1)/2]`, 1 for an edge that is in, in the order (0,1), (0,2) ..."""

    n: int

    @classmethod
    def parse(cls, text: str) -> "Tree":
        """Spanning trees of N vertices: `tree:N`, for example tree:5."""
        if not re.fullmatch("[0-9]{1,3}", text) or int(text) < 3:
            raise dgrad.InputError(f"cannot read {text!r} as a number of at least 3; expected for example tree:5")
        return cls(int(text))

    def __str__(self) -> str:
        return f"tree:{self.n}"

    shape = property(lambda self: (self.n * (self.n - 1) // 2,))
    support_size = property(lambda self: self.n ** (self.n - 2))  # Cayley
    moves = property(lambda self: Exchanges(self))

    def ends(self, like: Tensor) -> Tensor:
        return torch.triu_indices(self.n, self.n, 1, device=like.device)  # [2, E]

    def log_z(self, logits: Tensor) -> Tensor:
        # Kirchhoff: the determinant of the Laplacian is the product of the pivots of Gaussian elimination
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
            # Vertex 0 is joined to each part by one edge.
            score = graph[..., 0, 1:] + gumbel(graph[..., 0, 1:], generator=generator)[0]
            best = torch.where(part > 0, score.unsqueeze(-2), -torch.inf).argmax(-1)
            tree = F.pad(torch.cat([torch.zeros_like(score).scatter(-1, best, 1.0).unsqueeze(-2), tree], -2), (1, 0))
        return tree[(..., *self.ends(logits))].to(logits.dtype)


class Exchanges(dgrad.Moves):
    """An edge comes in, one of the circle that it closes goes out. Where another should go out nothing changes."""

    def __init__(self, layer: Tree) -> None:
        self.layer, self.count = layer, (layer.n - 1) * (layer.shape[0] - layer.n + 1)

    def neighbours(self, codes: Tensor) -> Tensor:
        vertex, edge = (codes.new_ones(size).diag() for size in (self.layer.n, codes.shape[-1]))
        incidence = vertex[self.layer.ends(codes)].diff(dim=0)[0]  # [E, n]
        # A current between the ends of an edge of the tree lets the voltage drop between its two sides alone.
        inverse = torch.linalg.inv_ex(incidence.T @ (codes.unsqueeze(-1) * incidence) + 1).inverse
        closes = (incidence @ inverse @ incidence.T).abs().round()  # [S, B, in, out]
        out, into = torch.argsort(codes, stable=True, descending=True).tensor_split([self.layer.n - 1], -1)
        possible = closes.take_along_dim(into[..., None], -2).take_along_dim(out[..., None, :], -1)
        steps = edge[into].unsqueeze(-2) - edge[out].unsqueeze(-3)  # [S, B, in, out, E]
        return (codes[..., None, None, :] + possible.unsqueeze(-1) * steps).flatten(2, 3).movedim(2, 0)


@dgrad.hookimpl
def dgrad_register_latents(register):
    register("tree", Tree.parse)
