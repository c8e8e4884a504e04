"""Sum and sample: the most probable codes summed, the rest sampled."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Traits, replace_gradient
from dgrad.core.estimator_tools import check_choice, check_count, needs_one_hot_rows, weighted
from dgrad.core.latent_layer import Logits
from dgrad.core.weights import sum_and_sample
from dgrad_plugins.estimators._beam import codes_without_replacement, top_codes

BASELINES = ("none", "explicit-mean")


class SumAndSample(GradientEstimator):
    """Sum and sample: the most probable codes summed, the rest sampled.

    `sum_{s in C} p_s (f_s - b) grad log p_s + (1 - P_C) (f_z - b) grad log p_z`. `C` are the `explicit` most probable
    codes of the joint space, `P_C` is their probability, and `z` is drawn from q without them. `b` is the mean of `f`
    over `C`, weighted by probability, which depends on no draw. `baseline="none"` is the paper's estimator, `b = 0`. A
    support that the evaluations can cover is summed in full.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[C + 1, B, n, k]`: the explicit ones and `z`, not equally weighted.

    Bias: none. Little variance where few codes have most of the probability, that of REINFORCE where none has.

    Cost: `explicit + 1` evaluations of any objective.

    Reference: Liu, Regier, Tripuraneni, Jordan & McAuliffe 2019, Rao-Blackwellized stochastic gradients for discrete
    distributions (arXiv 1810.04777).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("sum-and-sample")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, explicit: int = 3, baseline: str = "explicit-mean") -> None:
        super().__init__()
        self.explicit = check_count("explicit", explicit)
        self.baseline = check_choice("baseline", baseline, BASELINES)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: self._explicit(layer) + 1,
            reference="Liu et al. 2019",
            why_unsupported=needs_one_hot_rows("sum-and-sample"),
            one_pass=True,
        )

    def _explicit(self, layer: LatentLayer) -> int:
        """With all codes but one explicit, the one drawn is the last: nothing is left to chance."""
        return min(self.explicit, layer.support_size - 1)

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        log_p = logits.detach().double().log_softmax(-1)
        log_explicit, explicit = top_codes(log_p, self._explicit(layer))  # [C, B], [C, B, n]
        # Of C + 1 codes drawn without replacement, the first outside C is a draw from q restricted to the outside.
        log_drawn, drawn = codes_without_replacement(log_p, len(explicit) + 1, generator=generator)
        inside = (drawn.unsqueeze(1) == explicit).all(-1).any(1)  # [C+1, B]
        first = (~inside).int().argmax(0, keepdim=True)  # [1, B]
        other = drawn.gather(0, first.unsqueeze(-1).expand(-1, -1, drawn.shape[-1]))  # [1, B, n]
        codes = layer.codes(torch.cat([explicit, other]), logits.dtype)  # [C+1, B, n, k]
        return Drawn(codes, (torch.cat([log_explicit, log_drawn.gather(0, first)]),))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        (log_probs,) = drawn.kept  # [C+1, B]
        with torch.no_grad():
            # p_s and p_s (f_s - b), the last ones (1 - P_C) and (1 - P_C) (f_z - b), [C+1, B] each
            share, weight = sum_and_sample(loss, log_probs, baseline=self.baseline == "explicit-mean")
            direction = weighted(drawn.codes - layer.mean(logits), weight)
        # sum_{s in C} p_s f_s + (1 - P_C) f_z
        return Estimate(loss=replace_gradient(share * loss, logits, direction).sum(0), codes=drawn.codes)
