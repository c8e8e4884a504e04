"""The KL as an objective of the code."""

from __future__ import annotations

from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.curvature import Curvature
from dgrad.core.evaluations import Evaluation
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import without_gradient
from dgrad.core.objectives import Objective, check_examples
from dgrad.core.sites import Problem, both, prepare


class KLObjective(Objective):
    """`log q(z) - log p(z)` of the code: the KL inside the objective, where an estimator sees the whole bound.

    `log q` carries no gradient to the logits: the mean of `grad log q` is 0. With reparameterised codes this saves
    variance (Roeder et al. 2017). The sweep is closed-form, because `log q` is linear in the code.

    In a call of an estimator it takes over the call's `mask`, `allowed` and `credit`. They are arguments here for use
    outside of a call.
    """

    def __init__(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        *,
        mask: Tensor | None = None,
        allowed: Tensor | None = None,
        credit: str = "example",
    ) -> None:
        self.as_given = (layer, logits)
        self.problem = prepare(layer, logits.detach(), mask=mask, allowed=allowed, credit=credit, local_losses=True)
        self.layer = self.problem.layer
        self.logits = self.problem.logits.to(logits.dtype)

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch *sites"]:
        log_prior = self.layer.log_prior
        if isinstance(log_prior, Tensor):
            log_prior = log_prior.to(self.logits.dtype)
        loss = self.layer.log_prob(self.logits, self.problem.folded_codes(codes)) - log_prior
        return loss.unflatten(-1, (-1, self.problem.sites or 1)) if self.problem.folded else loss

    def of_call(self, problem: Problem) -> KLObjective:
        own, (layer, logits) = self.problem, self.as_given
        check_examples(len(own.given), len(problem.given))
        if problem.mask is None and problem.permitted is None and problem.credit == own.credit:
            return self
        mask, allowed = both(own.mask, problem.mask), both(own.permitted, problem.permitted)
        return KLObjective(layer, logits, mask=mask, allowed=allowed, credit=problem.credit)

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self(codes.unsqueeze(1))

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        if codes.shape[2:] != self.layer.shape:  # of sequences
            return super().evaluate(codes)
        return _KLEvaluation(self, codes, self(codes))

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        if codes.shape[2:] != self.layer.shape:  # of sequences
            return super().curvature(codes, generator=generator)
        nothing = codes.new_zeros(0, *codes.shape[2:])
        return Curvature(nothing, nothing)  # linear

    def takes_rows(self, codes: Float[Tensor, "samples batch sites n k"]) -> bool:
        return self.layer.one_hot_rows and not self.problem.folded


class _KLEvaluation(Evaluation):
    objective: KLObjective

    @without_gradient
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        return self.loss[..., None, None] + self.objective.layer.linear_sweep(self.objective.logits, self.codes)

    def full_sweep_is_free(self, rows: int) -> bool:
        return True

    def potentials(self, layer: LatentLayer) -> Float[Tensor, "samples batch *code"]:
        if layer.one_hot_rows:
            return self.sweep()
        # log q is <logits, z> but for a constant: exact whatever is changed, not for one variable alone
        return self.objective.logits.expand_as(self.codes)
