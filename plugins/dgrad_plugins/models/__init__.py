"""The built-in models."""

from dgrad_plugins.models._convolutional import conv_vae
from dgrad_plugins.models._dense import linear_vae, mlp_vae
from dgrad_plugins.models._mixture import mixture_vae

__all__ = ["conv_vae", "linear_vae", "mixture_vae", "mlp_vae"]
