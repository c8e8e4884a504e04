"""The built-in latent layers, one file each."""

from dgrad_plugins.latents._categorical import Categorical

__all__ = ["Categorical"]
