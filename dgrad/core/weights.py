"""What each candidate of a group counts in a gradient, once its loss is known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgrad.errors import InputError, unknown_name

LARGEST_SET = 16
"""The most candidates drawn without replacement: their weights are sums over all subsets of them."""


def weights(name: str, losses: Tensor, log_probs: Tensor | None = None, **hyperparameters: Any) -> Tensor:
    """A weight for each candidate: the sum of `weight * grad log pi` over a group is the gradient of the mean loss.

    This is for policies whose candidates somebody else drew and scored. Lower losses are better: give minus the reward.

    | name | weight of a candidate with loss f, in a group of K |
    |---|---|
    | `reinforce` | `(f - baseline) / K`; the baseline, 0 by default, must not have seen the group |
    | `rloo` | `(f - mean of the others) / K` |
    | `direct-rb` | `[1/K - softmax(-epsilon f)] / epsilon`, epsilon 0.1 by default |
    | `unordered-set` | `p R [f - sum of the set's p' R' f']`, drawn without replacement |
    | `sum-and-sample` | `p (f - b)`, for the last one `(1 - P) (f - b)`; b is the mean over all but the last |

    `rloo` is the advantage of GRPO without the division by the deviation, times `1 / (K - 1)`. Candidates of the first
    three are independent draws of the policy. Those of `sum-and-sample` are fixed codes, then one draw from the rest.

    Args:
        name: of a formula in the table.
        losses: `[K, ...]`, candidates first. Other axes are groups of their own. Integers are read as float32.
        log_probs: `[K, ...]`, the log-probability of each candidate, which the last two need.
        hyperparameters: `baseline` of `reinforce`, `epsilon` of `direct-rb`.

    Returns:
        Weights in the shape of the losses, without gradient. Use them as `(weights * log_pi).sum(0)`.

    Bias: none, but for `direct-rb`. With many candidates its mean is the gradient of `-log E[exp(-epsilon f)] /
    epsilon`, whose limit as epsilon falls is that of `E[f]`.

    Cost: next to nothing, but for `unordered-set`: `K 2^K` numbers for each group.

    Raises:
        InputError: an unknown name or hyper-parameter, too few or too many candidates, or no log-probabilities.

    Reference: Kool et al. 2019 (`rloo`) and 2020 (`unordered-set`); Liu et al. 2019 (`sum-and-sample`).

    >>> weights("rloo", torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([ 0.2500, -0.0833, -0.0833, -0.0833])
    """
    if name not in _FORMULAS:
        raise unknown_name("weights", name, _FORMULAS)
    formula, least, most = _FORMULAS[name]
    known = [key for key, it in inspect.signature(formula).parameters.items() if it.kind is it.KEYWORD_ONLY]
    for key in hyperparameters:
        if key not in known:
            raise unknown_name(f"hyper-parameter of {name}", key, known)
    for what, given in (("losses", losses), ("log_probs", log_probs)):
        if given is not None and not isinstance(given, Tensor):
            raise InputError(f"{what} of type {type(given).__name__}; expected a tensor: torch.as_tensor({what})")
    if losses.ndim == 0 or not least <= len(losses) <= most:
        many = f"{least} to {most}" if most < math.inf else f"at least {least}"
        raise InputError(
            f"losses of shape {list(losses.shape)}; expected {many} candidates along the first axis for {name}"
        )
    needs_log_probs = "log_probs" in inspect.signature(formula).parameters
    if needs_log_probs and (log_probs is None or log_probs.shape != losses.shape):
        got = "no log_probs" if log_probs is None else f"log_probs of shape {list(log_probs.shape)}"
        raise InputError(f"{got}; {name} expects the log-probability of each candidate, {list(losses.shape)}")
    with torch.no_grad():
        losses = losses.detach() if losses.is_floating_point() else losses.float()
        if log_probs is None or not needs_log_probs:
            result: Tensor = formula(losses, **hyperparameters)
            return result
        groups = (tensor.detach().reshape(len(losses), -1) for tensor in (losses, log_probs))  # [K, groups] each
        return formula(*groups, **hyperparameters).view(losses.shape)


def leave_one_out(losses: Tensor) -> Tensor:
    """Each loss less the mean of the others, `[K, ...]`."""
    # f_m - mean of the others = (f_m - mean f) K / (K - 1)
    return (losses - losses.mean(0)) * len(losses) / (len(losses) - 1)


def unordered_set(losses: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The share `p_s R_s` of each candidate in the mean loss, and its weight; all `[m, B]`.

    The weight is `p_s R_s [f_s - sum_s' p_s' R_ss' f_s']`.
    """
    share, pairs = (table.to(losses.dtype) for table in set_weights(log_probs.double()))  # [m, B], [m, m, B]
    return share, share * (losses - (pairs * losses).sum(1))


def sum_and_sample(losses: Tensor, log_probs: Tensor, *, baseline: bool = True) -> tuple[Tensor, Tensor]:
    """The share of each candidate in the mean loss, and its weight; all `[C + 1, B]`.

    The share is `p_s` of each explicit candidate, `1 - P_C` of the last one. The weight is the share times `f - b`.

    Args:
        baseline: whether b is the explicit candidates' mean loss, weighted by probability; otherwise 0.
    """
    explicit = log_probs[:-1]  # [C, B]
    # 1 - P_C, which is no less than p_z, whatever the rounding
    rest = (1 - explicit.exp().sum(0, keepdim=True)).clamp_min(log_probs[-1:].exp())  # [1, B]
    share = torch.cat([explicit.exp(), rest]).to(losses.dtype)
    advantage = losses
    if baseline:
        # b = sum_s p_s f_s / P_C
        advantage = losses - (explicit.softmax(0).to(losses.dtype) * losses[:-1]).sum(0)
    return share, share * advantage


def set_weights(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """`p_s R_s` `[m, B]` and `p_s' R_ss'` `[m (s), m (s'), B]` of a set, from its `log p` `[m, B]`.

    With `W(A)` the probability of drawing the rest of `S` next when the codes of `A` are gone, `R_s = W({s}) / W({})`
    and `R_ss' = W({s, s'}) / W({s})`. All subsets `A` are computed at once, each a number whose bits say which codes it
    has.
    """
    m = len(log_p)
    singles = 1 << torch.arange(m, device=log_p.device)  # [m]
    subsets = torch.arange(2**m, device=log_p.device).unsqueeze(-1)  # [2^m, 1]
    member = (subsets & singles).bool().unsqueeze(-1)  # [2^m, m, 1]
    larger = subsets | singles  # [2^m, m], A + s
    # 1 - p(A) is no less than the probability of S without A, which has not lost its digits where p(A) is next to 1.
    others = log_p.masked_fill(member, -math.inf)  # [2^m, m, B]
    gone = log_p.masked_fill(~member, -math.inf).exp().sum(1).clamp_max(1)  # p(A), [2^m, B]
    log_remaining = torch.maximum(torch.log1p(-gone), others.logsumexp(1))  # [2^m, B]
    by_size = member.sum(1).flatten().argsort(stable=True)  # [2^m]
    log_w = torch.zeros_like(gone)  # W(S) = 1
    stop = 2**m - 1
    for size in reversed(range(m)):
        # W(A) = sum_{s not in A} p_s W(A + s) / (1 - p(A)), for all A of this size at once
        start = stop - math.comb(m, size)
        level = by_size[start:stop]
        log_w[level] = (others[level] + log_w[larger[level]]).logsumexp(1) - log_remaining[level]
        stop = start
    one = log_w[singles]  # [m, B]
    two = log_w[singles.unsqueeze(-1) | singles]  # [m, m, B]; its diagonal makes R_ss = 1
    return (log_p + one - log_w[0]).exp(), (log_p + two - one.unsqueeze(1)).exp()


def _reinforce(losses: Tensor, *, baseline: float | Tensor = 0.0) -> Tensor:
    return (losses - baseline) / len(losses)


def _rloo(losses: Tensor) -> Tensor:
    return leave_one_out(losses) / len(losses)


def _direct_rb(losses: Tensor, *, epsilon: float = 0.1) -> Tensor:
    if not epsilon > 0:
        raise InputError(f"epsilon must be above 0; got {epsilon}: rloo is the formula at 0")
    # [1/K - softmax(-eps f)] / eps
    return (1 / len(losses) - (-epsilon * losses).softmax(0)) / epsilon


def _unordered_set(losses: Tensor, log_probs: Tensor) -> Tensor:
    columns = max(1, 2**22 // (len(losses) * 2 ** len(losses)))  # a bound on memory
    parts = zip(losses.split(columns, 1), log_probs.split(columns, 1), strict=True)
    return torch.cat([unordered_set(*part)[1] for part in parts], 1)


def _sum_and_sample(losses: Tensor, log_probs: Tensor) -> Tensor:
    return sum_and_sample(losses, log_probs)[1]


_FORMULAS: dict[str, tuple[Callable[..., Tensor], int, float]] = {
    "direct-rb": (_direct_rb, 2, math.inf),
    "reinforce": (_reinforce, 1, math.inf),
    "rloo": (_rloo, 2, math.inf),
    "sum-and-sample": (_sum_and_sample, 2, math.inf),
    "unordered-set": (_unordered_set, 2, LARGEST_SET),
}
"""By name: the formula, the fewest and the most candidates."""
