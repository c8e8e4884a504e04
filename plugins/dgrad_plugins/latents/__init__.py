"""The built-in latent layers, one file each."""

from dgrad_plugins.latents._categorical import Categorical
from dgrad_plugins.latents._pairs import Pairs
from dgrad_plugins.latents._unequal import UnequalCategorical, parse_categorical

__all__ = ["Categorical", "Pairs", "UnequalCategorical", "parse_categorical"]
