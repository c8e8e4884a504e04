"""The built-in latent layers, one file each."""

from dgrad_plugins.latents._categorical import Categorical
from dgrad_plugins.latents._mixed import MixedCategorical, parse_categorical
from dgrad_plugins.latents._pairs import Pairs

__all__ = ["Categorical", "MixedCategorical", "Pairs", "parse_categorical"]
