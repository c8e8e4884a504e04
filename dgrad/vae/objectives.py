"""`dgrad.objective`: what an objective is made of, said once."""

from __future__ import annotations

from torch import nn

from dgrad.core.index_objectives import IndexObjective
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import CodeLoss, FunctionObjective, Objective
from dgrad.errors import InputError
from dgrad.vae.reconstruction import DecoderObjective, OutputLoss


def objective(
    f: CodeLoss | None = None,
    *,
    indices: bool = False,
    layer: LatentLayer | None = None,
    decoder: nn.Module | None = None,
    loss: OutputLoss | None = None,
    couples_examples: bool = False,
    compiled: bool | None = None,
    bytes_per_call: int | None = None,
) -> Objective:
    """The loss of each example as a function of its code, with the fastest sweep there is.

    - `objective(f)`: any function of codes, `[S, B, *code] -> [S, B]`, for any number of samples S
    - `objective(f, indices=True)`: a function of their integers, `[S, B, n]` for one-hot rows: lookups, experts
    - `objective(decoder=net, loss=dgrad.bernoulli(x))`: a decoder that sees nothing but the code. Sweeps are fast where
      it begins with an `nn.Linear` for the whole code, and nearly free where it is one

    The losses of a batch are independent: an example's loss depends on that example's code alone. Say
    `couples_examples=True` where it does not, and estimators that need it refuse the objective.

    Random numbers from torch's own generator, as in dropout, are the same for a code and its changed codes. A sweep
    with random numbers makes one call for each change. A sweep refuses BatchNorm in training mode.

    Args:
        f: the function, or an objective, which stays as it is. On a CPU the function may be called with codes that all
            examples share, `[K, 1, *code]`. The result is used where it broadcasts to the batch and agrees.
        indices: whether `f` gets the integers of codes, int64, in the place of codes.
        layer: whose integers these are, where codes are no one-hot rows.
        decoder: a module. It gets codes with one batch axis, `[S*B, n*k]` where its first layer is an `nn.Linear` of so
            many inputs, else `[S*B, *code]`. To an `nn.Embedding` as its first layer one-hot rows are indices. A first
            layer with hooks is called for every changed code.
        loss: of the decoder's outputs: `dgrad.bernoulli(x)`, `dgrad.squared_error(x)`, or any function `[S, B,
            *outputs] -> [S, B]`.
        couples_examples: whether an example's loss depends on the codes of others.
        compiled: whether a linear decoder may use compiled kernels. The first use on a machine takes a second or two
            to compile them. With None they are used where there is a compiler.
        bytes_per_call: what changed codes, or a decoder's outputs for them, may take in one call of a sweep.

    Raises:
        InputError: the arguments do not go together.

    >>> import torch, dgrad
    >>> decoder, x = torch.nn.Linear(12, 5), torch.ones(2, 5)
    >>> codes = torch.nn.functional.one_hot(torch.zeros(1, 2, 3, dtype=torch.long), 4).float()
    >>> dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x)).at(codes).sweep().shape
    torch.Size([1, 2, 3, 4])
    """
    if (f is None) == (decoder is None):
        raise InputError(
            f"an objective of {'nothing' if f is None else 'a function and a decoder'}; expected a function of codes, "
            "or decoder= and loss="
        )
    if bytes_per_call is not None and bytes_per_call < 1:
        raise InputError(f"bytes_per_call must be at least 1; got {bytes_per_call}")
    if f is None:
        if loss is None or indices:
            raise InputError(
                f"a decoder {'of indices' if indices else 'without a loss'}; expected decoder= with loss=, such as "
                "dgrad.bernoulli(x), and indices for a function of codes alone"
            )
        assert decoder is not None
        return DecoderObjective(
            decoder, loss, compiled=compiled, couples_examples=couples_examples, bytes_per_call=bytes_per_call
        )
    if loss is not None or compiled is not None:
        raise InputError("loss= and compiled= belong to a decoder; expected them with decoder= alone")
    if isinstance(f, Objective):
        if indices or couples_examples or bytes_per_call is not None:
            raise InputError("an objective has options of its own; expected a function of codes with these")
        return f
    if indices:
        return IndexObjective(f, layer=layer, couples_examples=couples_examples, bytes_per_call=bytes_per_call)
    return FunctionObjective(f, couples_examples=couples_examples, bytes_per_call=bytes_per_call)
