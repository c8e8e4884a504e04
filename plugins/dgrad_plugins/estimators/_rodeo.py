"""Leave-one-out with control variates from a discrete Stein operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from dgrad import Estimate, GradientEstimator, LatentLayer, Objective, Traits, add_gradient, replace_gradient
from dgrad.core.estimator_tools import check_choice, check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import full_precision
from dgrad_plugins.estimators._baselines import DECAY, read_average
from dgrad_plugins.estimators._coefficients import Coefficients
from dgrad_plugins.estimators._double_cv import leave_one_out

SURROGATES = ("quadratic", "network")


class Rodeo(GradientEstimator):
    """RODEO: leave-one-out on the loss plus `A h`, a function of the code with mean 0.

    `sum_m (F_m - mean F) s_m / (S - 1) + mean_m L h_m(z_m)`, with `F_m = f_m + (A h_m)(z_m)` and `s_m = z_m - p`. `(A
    h)(z) = sum_i E_q[h(z) | all rows but i] - h(z)` is the Stein operator of Gibbs sampling. `(L h)_ij = p_ij (h(z, row
    i = j) - E_q[h(z) | all rows but i])` is the local expectation gradient of h: it takes off the mean of `-(A h) s`.
    The surrogate of sample m knows the other samples alone: `h_m(y) = mean over m' != m of a_1 t + a_2 t^2`, `t =
    slope_m' . (y - z_m')`.

    A of a polynomial has a closed form, free of evaluations and of memory for all flips. a_1 and a_2 are the
    coefficients that would have been best in the earlier steps, and start at 1 and 0. With a_2 = 0 this is `double-cv`.

    `surrogate="network"` adds the paper's learned control variates. A network with `hidden` units turns `f_m'` and t
    into two numbers u and v for each code. `-(A u_m')(z_m') s_m` takes variance off the baseline, `A(v_m s)(z_m)` off
    the gradient. The network learns by lowering the squared norm of the gradient. It starts at 0, and its inputs are in
    units of their moving averages.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`. Memory `S^2 B n`, beside that of the codes. With the
    network `S^2 B n k hidden`.

    Bias: none, because the coefficients, the network and the averages have not seen the draw.

    Cost: S >= 2 evaluations and one backward pass through a differentiable objective. The network is evaluated at all
    `S (S - 1) n k` changed codes.

    Reference: Shi, Zhou, Hwang, Titsias & Mackey 2022, Gradient estimation with discrete Stein operators (arXiv
    2202.09497). There for binary variables; the formula holds for any number of values.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("rodeo")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, samples: int = 4, surrogate: str = "quadratic", hidden: int = 100) -> None:
        super().__init__()
        self.samples = check_count("samples", samples, least=2)
        self.surrogate = check_choice("surrogate", surrogate, SURROGATES)
        self.hidden = check_count("hidden", hidden)
        self.coefficients = Coefficients([1.0, 0.0])
        self.network = SurrogateNetwork(hidden) if surrogate == "network" else None

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Shi et al. 2022",
            why_unsupported=needs_one_hot_rows("rodeo"),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        at = objective.at(codes, differentiable=True)
        slope = at.slope()
        with torch.no_grad():
            p = layer.mean(logits)  # [B, n, k]
            score = codes - p
            plain = leave_one_out(at.loss, score)  # [S, B, n, k]
            variates = [leave_one_out(stein, score) + local for stein, local in _surrogates(p, codes, slope)]
            direction = plain
            for coefficient, variate in zip(self.coefficients.current(), variates, strict=True):
                direction = direction + coefficient.to(variate.dtype) * variate
        learned = None if self.network is None else self.network(p.detach(), codes, at.loss.detach(), slope)
        if learned is not None:
            direction = direction + learned  # with a gradient for the network's parameters alone
        loss = replace_gradient(at.loss, logits, direction).mean(0)
        if learned is not None:
            # The mean of the squared norm is the variance and a constant.
            loss = add_gradient(loss, direction.mean(0).square().flatten(1).sum(-1).to(loss.dtype))
            plain = plain + learned.detach()
        if self.learning():
            self.coefficients.learn(plain.mean(0), [variate.mean(0) for variate in variates])
            if self.network is not None:
                self.network.learn(at.loss.detach(), codes, slope)
        return Estimate(loss=loss, codes=codes)


class SurrogateNetwork(nn.Module):
    """Control variates from a network of two numbers: the loss of another sample, and t, its linear prediction.

    The network has two outputs, u and v. The Stein operator turns both into functions of the code with mean 0.
    """

    averages: Tensor
    weight: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(2, hidden)
        self.outputs = nn.Linear(hidden, 2)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)
        self.register_buffer("averages", torch.zeros(3))  # of f, (f - mean f)^2 and t^2
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, p: Tensor, codes: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
        """What is added to the gradient of each code, `[S, B, n, k]`, differentiable in the network's parameters.

        Args:
            p: `[B, n, k]`.
            codes, slope: `[S, B, n, k]`.
            loss: `[S, B]`.
        """
        samples, n = len(codes), codes.shape[-2]
        t, changed, other = _predictions(codes, slope)  # [P, B], [P, B, n, k] for the pairs of m and m'
        loss = loss[other]
        at_code = self._variates(loss, t)  # u and v at z_m, [P, B, 2]
        at_changed = self._variates(loss[..., None, None], changed)  # and with row i set to j, [P, B, n, k, 2]
        u, v = at_code.unflatten(0, (samples, -1)).mean(1).to(p.dtype).unbind(-1)  # [S, B]
        u_changed, v_changed = at_changed.unflatten(0, (samples, -1)).mean(1).to(p.dtype).unbind(-1)  # [S, B, n, k]
        score = codes - p
        # (A u)(z) = mean_i E[u | all rows but i] - u(z)
        stein = (p * u_changed).sum(-1).mean(-1) - u  # [S, B]
        baseline = (stein.sum(0) - stein) / (samples - 1)
        # A(v s): row i of s changes with the row, the others' do not
        row_means = (p * v_changed).sum(-1, keepdim=True)  # E[v | all rows but i], [S, B, n, 1]
        change = row_means.mean(-2, keepdim=True) - v[..., None, None]
        return (change - baseline[..., None, None]) * score + (p * v_changed - codes * row_means) / n

    def _variates(self, loss: Tensor, t: Tensor) -> Tensor:
        mean, variance, square = read_average(self.averages, self.weight).unbind()
        deviation, unit = (torch.where(each > 0, each.sqrt(), 1.0) for each in (variance, square))
        inputs = torch.stack(torch.broadcast_tensors((loss - mean) / deviation, t / unit), -1)
        return unit * self.outputs(F.leaky_relu(self.inputs(inputs.to(self.inputs.weight.dtype)), 0.3))

    @torch.no_grad()
    @full_precision
    def learn(self, loss: Tensor, codes: Tensor, slope: Tensor) -> None:
        """Take the losses `[S, B]` and their predictions into the averages."""
        at_code = torch.einsum("xbik,ybik->xyb", codes, slope)
        t = at_code - at_code.diagonal().T
        mean = read_average(self.averages, self.weight)[0]
        mean = torch.where(self.weight > 0, mean, loss.mean())
        pairs = len(codes) * (len(codes) - 1)
        now = torch.stack([loss.mean(), (loss - mean).square().mean(), t.square().mean(-1).sum() / pairs])
        self.averages.mul_(DECAY).add_((1 - DECAY) * now)
        self.weight.mul_(DECAY).add_(1 - DECAY)


@full_precision
def _predictions(codes: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`t = slope_m' . (y - z_m')` for each pair of samples: at `y = z_m`, and at every change of one row of it.

    Returns:
        `[P, B]` and `[P, B, n, k]` for `P = S (S - 1)` pairs, ordered by m, and the m' of each pair.
    """
    samples = len(codes)
    pairs = torch.arange(samples * (samples - 1), device=codes.device)
    first, shift = pairs // (samples - 1), pairs % (samples - 1) + 1
    other = (first + shift) % samples
    weights = slope[other]
    own = (codes[first] * weights).sum(-1)  # [P, B, n]
    t = own.sum(-1) - (codes[other] * weights).sum((-2, -1))
    return t, t[..., None, None] - own.unsqueeze(-1) + weights, other


@full_precision
def _surrogates(p: Tensor, codes: Tensor, slope: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`(A h_m)(z_m)` `[S, B]` and `(L h_m)(z_m)` `[S, B, n, k]`, for h the others' mean of t and of t^2."""
    others = (1 - torch.eye(len(codes), dtype=codes.dtype, device=codes.device)) / (len(codes) - 1)  # [m, m']
    # A slope is defined up to a constant in each row. With E_p[w_i] = 0, replacing row i of z by j turns t into
    # t - w_i(z) + w_ij.
    w = slope - (p * slope).sum(-1, keepdim=True)  # [m', B, n, k]
    spread = (p * w.square()).sum(-1)  # [m', B, n], the variance of w_i under p
    at_code = torch.einsum("xbik,ybik->xybi", codes, w)  # [m, m', B, n], w_i(z_m) of sample m'
    total = at_code.sum(-1)  # [m, m', B]
    t = total - total.diagonal().T  # slope_m' . (z_m - z_m')

    # A t = -sum_i w_i(z);  L t = p w
    linear = -torch.einsum("xy,xyb->xb", others, total)
    local_linear = p * torch.einsum("xy,ybik->xbik", others, w)
    # A t^2 = sum_i E[(t - w_i(z) + w_ij)^2] - t^2 = sum_i (w_i(z)^2 - 2 t w_i(z) + E[w_ij^2])
    change = at_code.square() - 2 * t.unsqueeze(-1) * at_code + spread
    quadratic = torch.einsum("xy,xybi->xb", others, change)
    # L t^2 = p_ij (2 (t - w_i(z)) w_ij + w_ij^2 - E[w_ij^2])
    rest = 2 * (t.unsqueeze(-1) - at_code) * others[..., None, None]  # [m, m', B, n]
    bend = torch.einsum("xy,ybik->xbik", others, w.square() - spread.unsqueeze(-1))
    local_quadratic = p * (torch.einsum("xybi,ybik->xbik", rest, w) + bend)
    return [(linear, local_linear), (quadratic, local_quadratic)]
