"""Beams over the rows of a product of categoricals: its most probable codes, and codes drawn without replacement.

Both are exact. They cost `n` steps of `count * k` children each, however large the support.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from dgrad.core.random import gumbel


def top_codes(log_p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable codes, most probable first; all codes where there are fewer.

    Args:
        log_p: normalised logits `[B, n, k]`.

    Returns:
        Their log-probabilities `[count, B]` in float64, and their values `[count, B, n]`.
    """
    # No prefix of a best code is worse than the count-th best prefix: all have the same rows to come.
    return _search(log_p, count, lambda children, parents: children)


def codes_without_replacement(
    log_p: Tensor, count: int, *, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`count` codes drawn one after the other without replacement, in the order drawn.

    Arguments and result are those of `top_codes`. The codes have the largest Gumbel-perturbed log-probabilities of the
    whole support. The largest of all codes with one prefix is Gumbel too. So the beam goes down from prefixes to codes:
    children are perturbed given that the largest of them has the value of their parent.

    Reference: Kool, van Hoof & Welling 2019, Stochastic beams and where to find them (arXiv 1903.06059).
    """

    def perturb(children: Tensor, parents: Tensor) -> Tensor:
        first, second = gumbel(children, 2, generator=generator)  # [B, beam, k] each
        largest = (children + first).argmax(-1, keepdim=True)
        # The others are Gumbels truncated at the parent's value: -log(exp(-g) + exp(-parent))
        others = -torch.logaddexp(-(children + second), -parents)
        return others.scatter(-1, largest, parents)

    return _search(log_p, count, perturb)


@torch.no_grad()
def _search(log_p: Tensor, count: int, priority: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The beam: after every row the `count` prefixes of highest priority, which `priority(children, parents)` says."""
    batch, _, k = log_p.shape
    log_p = log_p.double()
    scores = log_p.new_zeros(batch, 1)  # log-probabilities of the prefixes
    # The largest perturbed log-probability of all. The order of the draws does not depend on it: any value will do.
    priorities = log_p.new_zeros(batch, 1)
    prefixes = torch.zeros(batch, 1, 0, dtype=torch.int64, device=log_p.device)
    for row in log_p.unbind(1):
        children = scores.unsqueeze(-1) + row.unsqueeze(1)  # [B, beam, k]
        candidates = priority(children, priorities.unsqueeze(-1)).flatten(1)  # [B, beam*k]
        priorities, chosen = candidates.topk(min(count, candidates.shape[1]))  # [B, new beam]
        scores = children.flatten(1).gather(1, chosen)
        parents = (chosen // k).unsqueeze(-1).expand(-1, -1, prefixes.shape[-1])
        prefixes = torch.cat([prefixes.gather(1, parents), (chosen % k).unsqueeze(-1)], -1)
    return scores.T, prefixes.transpose(0, 1)
