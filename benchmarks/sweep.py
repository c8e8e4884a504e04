"""The forms of a linear Bernoulli decoder's sweep, against their arithmetic and what the machine can do of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import peaks, trials
from benchmarks.measuring import compared, take_turns
from benchmarks.naive import naive_sweep
from benchmarks.reporting import Bars, Table, milliseconds, ratio
from benchmarks.settings import PIXELS, Settings, sweep_problem, widely_spread
from dgrad.core.evaluations import Evaluation
from dgrad.core.objectives import FunctionObjective
from dgrad.kernels import cpu
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep, difference_sweep
from dgrad.vae.networks import Decoder

BATCH = 100
ABOUT = """Each form of the sweep does the same codes of a linear Bernoulli decoder with 784 pixels. Counted is what
a form does for each pixel of each code that it evaluates, and its matrix products; sigmoids and exponentials of
weights, once for an image or a row, are left out. Bytes are of arrays of that size, each time that torch or the
kernel reads or writes them; only the naive form's are too large for the caches. Shares are of peaks measured among
the forms: of the multiply-adds of a large matrix product; of elementwise speed, which is the time for the same
operations at the rates of a plain multiply-add loop and of torch's exponential and logarithm in the cache; of the
bytes of a copy in main memory (over 100 %: the arrays stay in the caches)."""
ELEMENTWISE = ("multiply_adds", "multiplications", "additions")


@dataclass(frozen=True)
class Work:
    """What a form does for each pixel of each code that it evaluates, or altogether.

    Left out is what is done once for an image or for a row of the weights: sigmoids, exponentials of weights. A
    softplus counts as an exponential and a logarithm.

    Attributes:
        bytes: of arrays as large as the evaluated pixels, 4 for each time that such a number is read or written.
    """

    multiply_adds: float = 0
    multiplications: float = 0
    additions: float = 0
    exponentials: float = 0
    logarithms: float = 0
    bytes: float = 0


PER_PIXEL = {
    # softplus(a) - x a, summed; a is written by the matrix product and read
    "naive": Work(multiply_adds=1, additions=1, exponentials=1, logarithms=1, bytes=8),
    # a - W_z + W_j, softplus(a) = max(a, 0) - log sigmoid(|a|) (on a CPU), x a, two sums: each an operation of
    # torch on an array of its own
    "difference": Work(multiplications=1, additions=8, exponentials=1, logarithms=1, bytes=104),
    # softplus((a - W_z) + W_j) - softplus(a), summed
    "exact": Work(additions=7, exponentials=1, logarithms=1, bytes=68),
    # p + q v; seven multiplications, one logarithm and one addition for eight pixels
    "grouped": Work(multiply_adds=1, multiplications=7 / 8, additions=1 / 8, logarithms=1 / 8, bytes=10),
    # a product of p + q v in registers, one logarithm for a code; v is read
    "compiled": Work(multiply_adds=1, multiplications=1, logarithms=1 / PIXELS, bytes=4),
}


def codes_evaluated(form: str, n: int, k: int) -> int:
    """How many codes a form evaluates for one example: all other values of each variable, or all that lie together."""
    one_less = form in ("difference", "compiled") or (k == 2 and form == "grouped")
    return n * (k - 1 if one_less else k)


def matrix_multiply_adds(form: str, batch: int, n: int, k: int, pixels: int) -> int:
    """Of the matrix products: naively all evaluations of the decoder, else `x W`; none where the loss does that."""
    if form == "difference":
        return 0
    return batch * n * k * pixels * (n * k if form == "naive" else 1)


def work(form: str, batch: int, n: int, k: int, pixels: int) -> Work:
    """What the whole sweep does, without its matrix products."""
    evaluated = batch * codes_evaluated(form, n, k) * pixels
    return Work(**{name: evaluated * each for name, each in asdict(PER_PIXEL[form]).items()})


def shares(done: Work, matrix: int, seconds: float, peak: dict[str, float]) -> dict[str, float]:
    """Shares of the peaks: of multiply-adds, of elementwise speed (a loop for each operation), of a copy's bytes."""
    arithmetic = sum(getattr(done, name) for name in ELEMENTWISE)
    elementwise = (
        matrix / peak["matrix"]
        + arithmetic / peak["elementwise"]
        + done.exponentials / peak["exponentials"]
        + done.logarithms / peak["logarithms"]
    )
    return {
        "multiply_adds": (matrix + arithmetic) / peak["matrix"] / seconds,
        "elementwise": elementwise / seconds,
        "bytes": done.bytes / peak["memory"] / seconds,
    }


def forms(latent: str, batch: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """A sweep of the same codes in every form that there is here."""
    model, codes, images = sweep_problem(latent, batch, device)
    assert isinstance(model.decoder, Decoder)
    first, pixels = model.decoder.first, images.flatten(1)
    with torch.no_grad():
        logits = first(codes.flatten(2))
        loss = model.likelihood.loss(logits, pixels)
    weight = first.weight.detach()
    rows = torch.arange(codes.shape[2], device=device).expand(codes.shape[:3])
    by_calls = Evaluation(FunctionObjective(lambda codes: loss), codes, loss)

    def linear(weight: Tensor, *, compiled: bool) -> Callable[[], Tensor]:
        return lambda: bernoulli_linear_sweep(codes, weight, logits, pixels, loss, compiled=compiled)

    @torch.no_grad()
    def naive() -> Tensor:
        return naive_sweep(first, codes[0], pixels)

    result: dict[str, Callable[[], Tensor]] = {
        "naive": naive,
        "difference": lambda: difference_sweep(
            codes, *by_calls.changes(rows), weight, logits, lambda outputs: model.likelihood.loss(outputs, pixels), loss
        ),
    }
    if device.type == "cpu":
        result["exact"] = linear(widely_spread(weight), compiled=False)
        result["grouped"] = linear(weight, compiled=False)
    else:
        result["exact"] = linear(weight, compiled=False)
    if device.type != "cpu" or cpu.available():
        result["compiled"] = linear(weight, compiled=True)
    return result


def measure(settings: Settings) -> dict[str, Any]:
    """Times, work and shares of each form by latent, the machine's peaks measured among them."""
    batch = 10 if settings.quick else BATCH
    return {"batch": batch, "latents": {latent: _forms(settings, latent, batch) for latent in settings.latents}}


def _forms(settings: Settings, latent: str, batch: int) -> dict[str, Any]:
    tried = trials(settings.device, small=settings.quick)
    swept = forms(latent, batch, settings.device)
    actions = {**{name: trial.action for name, trial in tried.items()}, **swept}
    times = take_turns(actions, settings.rounds_or(30), settings.device)
    peak = peaks(tried, times)
    rows = compared({name: times[name] for name in swept}, "naive", list(swept)[-1])
    n, k = map(int, latent.split("x"))
    for name, row in rows.items():
        done, matrix = work(name, batch, n, k, PIXELS), matrix_multiply_adds(name, batch, n, k, PIXELS)
        row["work"] = {"matrix_multiply_adds": matrix, **asdict(done)}
        row["shares"] = shares(done, matrix, row["median"], peak)
    return {"peaks": peak, "forms": rows}


def tables(figures: dict[str, Any]) -> list[Table]:
    """The forms of each latent, then the peaks."""
    columns = ["form", "median, ms", "quartiles, ms", "naive / this"]
    columns += ["matrix multiply-adds", "multiply-adds, products, sums", "exponentials", "logarithms", "bytes"]
    columns += ["of the multiply-adds", "of elementwise speed", "of a copy's bytes"]
    result = [
        Table(f"{latent}, batch {figures['batch']}", columns, [_line(*item) for item in each["forms"].items()])
        for latent, each in figures["latents"].items()
    ]
    names = list(next(iter(figures["latents"].values()))["peaks"])
    lines = [[latent, *(_short(each["peaks"][name]) for name in names)] for latent, each in figures["latents"].items()]
    return [*result, Table("peaks, in a second", ["measured with", *names], lines)]


def _line(name: str, row: dict[str, Any]) -> list[str]:
    done = row["work"]
    counts = [done["matrix_multiply_adds"], sum(done[each] for each in ELEMENTWISE)]
    counts += [done["exponentials"], done["logarithms"], done["bytes"]]
    percents = [f"{100 * share:.0f} %" for share in row["shares"].values()]
    return [name, *milliseconds(row), ratio(row, "naive", inverse=True), *map(_short, counts), *percents]


def _short(number: float) -> str:
    """A count with two digits and a unit.

    >>> _short(15_700_000), _short(0), _short(2_100)
    ('16 M', '0', '2.1 k')
    """
    if number == 0:
        return "0"
    thousands = max(0, min(4, math.floor(math.log10(number) / 3)))
    value = number / 1000**thousands
    return f"{value:.{0 if value >= 10 else 1}f} {['', 'k', 'M', 'G', 'T'][thousands]}".strip()


def plots(figures: dict[str, Any]) -> list[Bars]:
    """How many times faster than the naive form, and shares of the elementwise speed."""
    faster: dict[str, dict[str, float]] = {}
    share: dict[str, dict[str, float]] = {}
    for latent, each in figures["latents"].items():
        faster[latent] = {name: 1 / row["ratios"]["naive"] for name, row in each["forms"].items()}
        share[latent] = {name: row["shares"]["elementwise"] for name, row in each["forms"].items()}
    return [
        Bars("sweep", "sweep, linear Bernoulli decoder: naive form's median / this", faster, logarithmic=True),
        Bars("sweep-share", "sweep: share of elementwise speed in the cache", share),
    ]
