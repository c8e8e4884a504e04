"""Independent categorical variables of unequal sizes."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from dgrad import InputError, LatentLayer
from dgrad.core.restricted import Restricted
from dgrad_plugins.latents._categorical import Categorical


def parse_categorical(spec: str) -> LatentLayer:
    """Categorical variables: `NxK`, as 20x10, or a size for each, as 2+3+5.

    Raises:
        InputError: the text is neither, or a number in it is too small.
    """
    if "+" not in spec:
        return Categorical.parse(spec)
    if not re.fullmatch(r"[0-9]{1,9}(\+[0-9]{1,9})+", spec):
        raise InputError(f"cannot read {spec!r} as sizes of categorical variables; expected for example 2+3+5")
    sizes = tuple(map(int, spec.split("+")))
    return Categorical(len(sizes), sizes[0]) if len(set(sizes)) == 1 else UnequalCategorical(sizes)


class UnequalCategorical(Restricted):
    """Independent categorical variables of unequal sizes: rows as long as the largest, with forbidden values.

    Logits of values that a variable does not have are ignored. Its codes are 0 there.

    >>> import torch
    >>> layer = UnequalCategorical((2, 3, 5))
    >>> str(layer), layer.shape, layer.support_size
    ('2+3+5', (3, 5), 30)
    >>> layer.mean(torch.zeros(1, 3, 5))[0, 0]
    tensor([0.5000, 0.5000, 0.0000, 0.0000, 0.0000])
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        if min(sizes) < 2:
            raise InputError(f"a categorical variable needs at least 2 values; got sizes {'+'.join(map(str, sizes))}")
        self.sizes = sizes
        allowed = torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(-1)  # [n, k]
        super().__init__(Categorical(len(sizes), max(sizes)), allowed.unsqueeze(0), allowed.unsqueeze(0))
        self._on_devices: dict[torch.device, Tensor] = {}

    def __str__(self) -> str:
        return "+".join(map(str, self.sizes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnequalCategorical) and other.sizes == self.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    @property
    def support_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def log_prior(self) -> float:
        return -math.log(self.support_size)

    def allowed_on(self, device: torch.device) -> Tensor:
        if device not in self._on_devices:  # a copy would wait for the device
            self._on_devices[device] = self.allowed.to(device)
        return self._on_devices[device]

    def prior_on(self, device: torch.device) -> Tensor:
        return self.allowed_on(device)
