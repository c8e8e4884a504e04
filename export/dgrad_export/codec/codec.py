"""Running an exported model: images to codes and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dgrad.errors import InputError
from dgrad_export.codec.manifest import graph_file, read_manifest
from dgrad_export.codec.session import open_listed, run_session

CHUNK = 1024
"""Images or codes in one run of a graph."""

Seed: TypeAlias = int | np.random.Generator | None


class Codec:
    """The encoder and decoder that `export_run` wrote.

    Several threads may use one codec at once: it never changes.

    Images are uint8 (0 to 255) or floats (0 to 1). Send grey images: where the run's `binarize` was `threshold`, the
    encoder rounds them at 0.5. Accepted shapes, for images of C channels, H rows and W columns:

    - `[N, C, H, W]`;
    - `[N, H, W]` where C is 1, else `[C, H, W]`, a single image;
    - `[H, W]` where C is 1, a single image.

    Results always have the axis N, which is 1 for a single image and may be 0.

    Args:
        directory: the exported folder.
        threads: threads that one call may use, 0 for as many as there are cores.

    Raises:
        InputError: there is no exported model, or a file of it is missing, damaged or not the one that was written. The
            methods raise it for arguments of another shape, dtype or range, and for what the model has not.
    """

    def __init__(self, directory: str | os.PathLike[str], *, threads: int = 1) -> None:
        if threads < 0:
            raise InputError(f"threads must be at least 0; got {threads}: use 1, or 0 for as many as there are cores")
        path = Path(directory)
        self.manifest: dict[str, Any] = read_manifest(path)
        latent = self.manifest["latent"]
        self.latent: str = latent["spec"]
        """The spec of the latent layer, for example `20x10`."""
        self.image_shape: tuple[int, int, int] = tuple(self.manifest["image_shape"])
        """Channels, height, width."""
        self.logits_shape: tuple[int, ...] = tuple(latent["shape"])
        """The shape of the logits of one image, `(n, k)` for categorical variables."""
        self.code_shape: tuple[int, ...] = tuple(latent["code_shape"])
        """The shape of the code of one image, `(n,)` for categorical variables."""
        self.values: int | None = latent["values"]
        """Values of each number of a code. None where the latent is no row of independent variables."""
        self.sizes: tuple[int, ...] | None = tuple(latent["sizes"]) if latent.get("sizes") else None
        """How many values each number of a code has, where they differ, as of `2+3+5`. `values` is the largest."""
        self.gaussian: int = self.manifest.get("gaussian", 0)
        """Gaussian variables beside the code. 0 where the model has a code alone."""
        self.sampling: bool = self.manifest.get("sampling", False)
        """Whether the run was exported with sampling, so that `draw` can be called."""
        attributes = self.manifest.get("attributes")
        self.attributes: tuple[str, ...] | None = None if attributes is None else tuple(attributes)
        """The attribute of each variable of the code, off (0) or on (1). None where they stand for none."""
        self._encoder = open_listed(path, graph_file(self.manifest, "encoder"), self.manifest, threads)
        self._decoder = open_listed(path, graph_file(self.manifest, "decoder"), self.manifest, threads)

    def __repr__(self) -> str:
        return f"Codec({self.latent}, images {list(self.image_shape)})"

    def encode(self, images: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The most probable code of each image, int64 `[N, *code_shape]`."""
        return self._run_encoder(images, ["code"])["code"]

    def logits(self, images: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The logits of the distribution of each image's code, float32 `[N, *logits_shape]`."""
        return self._run_encoder(images, ["logits"])["logits"]

    def posterior(self, images: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
        """`logits` and `code` of each image, in a mixed model also `mean` and `log_variance`."""
        return self._run_encoder(images, ["logits", "code"] + ["mean", "log_variance"] * (self.gaussian > 0))

    def draw(self, images: npt.ArrayLike, seed: Seed = None) -> npt.NDArray[np.int64]:
        """A code of each image, drawn from its distribution, int64 `[N, *code_shape]`.

        Args:
            images: as for `encode`.
            seed: a number for the same codes every time, a generator, or None.
        """
        if not self.sampling:
            raise InputError(
                "this model was exported without --sampling, so it draws no codes; export the run again with it"
            )
        return self._run_encoder(images, ["sample"], _generator(seed))["sample"]

    def style(self, images: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The mean of the Gaussian variables of each image, float32 `[N, gaussian]`."""
        self._check_gaussian()
        return self._run_encoder(images, ["mean"])["mean"]

    def decode(self, codes: npt.ArrayLike, style: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """The expected image of each code, float32 in [0, 1], `[N, C, H, W]`.

        Args:
            codes: integers `[N, *code_shape]`, or `[*code_shape]` for a single code.
            style: the Gaussian variables of a mixed model, finite numbers `[N, gaussian]`. By default zero, the mean of
                their prior.
        """
        codes = self._check_codes(codes)
        feed: dict[str, npt.NDArray[Any]] = {"code": codes.astype(np.int64)}
        if style is not None:
            feed["style"] = self._check_style(style, len(codes))
        elif self.gaussian:
            feed["style"] = np.zeros((len(codes), self.gaussian), np.float32)
        images = np.empty((len(codes), *self.image_shape), np.float32)
        for start in range(0, len(codes), CHUNK):
            chunk = {name: np.ascontiguousarray(values[start : start + CHUNK]) for name, values in feed.items()}
            images[start : start + CHUNK] = run_session(self._decoder, ["image"], chunk)[0]
        return images

    def sample_codes(self, count: int, seed: Seed = None) -> npt.NDArray[np.int64]:
        """Codes drawn from the uniform prior, int64 `[count, *code_shape]`.

        Args:
            count: how many, 0 or more.
            seed: a number for the same codes every time, a generator to draw from, or None.

        Raises:
            InputError: also for a latent whose codes are not rows of independent variables.
        """
        if self.values is None:
            raise InputError(
                f"cannot draw codes of latent {self.latent} here: its variables are not independent; "
                "draw them with its LatentLayer.sample"
            )
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise InputError(f"count must be a whole number of at least 0; got {count!r}")
        return _generator(seed).integers(self.sizes or self.values, size=(count, *self.code_shape), dtype=np.int64)

    def sample(self, count: int, seed: Seed = None) -> npt.NDArray[np.float32]:
        """Images of codes drawn from the uniform prior, float32 in [0, 1], `[count, C, H, W]`.

        The same as `decode(sample_codes(count, seed))`. Gaussian variables come from their prior.
        """
        generator = _generator(seed)
        codes = self.sample_codes(count, generator)
        return self.decode(codes, self.sample_style(count, generator) if self.gaussian else None)

    def sample_style(self, count: int, seed: Seed = None) -> npt.NDArray[np.float32]:
        """Gaussian variables drawn from their prior, N(0, 1), float32 `[count, gaussian]`."""
        self._check_gaussian()
        return _generator(seed).standard_normal((count, self.gaussian), dtype=np.float32)

    def _run_encoder(
        self, images: npt.ArrayLike, names: list[str], generator: np.random.Generator | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        images = self._check_images(images)
        kinds: dict[str, tuple[tuple[int, ...], type]] = {
            "logits": (self.logits_shape, np.float32),
            "code": (self.code_shape, np.int64),
            "sample": (self.code_shape, np.int64),
            "mean": ((self.gaussian,), np.float32),
            "log_variance": ((self.gaussian,), np.float32),
        }
        results: dict[str, npt.NDArray[Any]] = {
            name: np.empty((len(images), *kinds[name][0]), kinds[name][1]) for name in names
        }
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            pixels = np.ascontiguousarray(chunk, dtype=np.float32)
            if chunk.dtype == np.uint8:
                pixels /= np.float32(255)
            feed = {"image": pixels}
            if self.sampling:
                feed["uniform"] = self._uniform(len(pixels), generator)
            for name, values in zip(names, run_session(self._encoder, names, feed), strict=True):
                results[name][start : start + CHUNK] = values
        return results

    def _uniform(self, count: int, generator: np.random.Generator | None) -> npt.NDArray[np.float32]:
        """Noise for the encoder. Without a generator nothing is drawn, so any noise will do."""
        shape = (count, *self.logits_shape)
        if generator is None:
            return np.full(shape, 0.5, np.float32)
        # Odd multiples of 2**-24, which float32 has: never 0, never 1.
        return (generator.integers(2**23, size=shape).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)

    def _check_gaussian(self) -> None:
        if not self.gaussian:
            raise InputError("this model has no Gaussian variables beside its code; leave the style out")

    def _check_style(self, style: npt.ArrayLike, count: int) -> npt.NDArray[np.float32]:
        self._check_gaussian()
        array = _array(style, "style")
        if array.dtype.kind not in "iuf" or array.shape != (count, self.gaussian):
            raise InputError(
                f"style is {list(array.shape)} of {array.dtype}; "
                f"expected numbers [{count}, {self.gaussian}], a row for each code"
            )
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError("style holds numbers that are not finite in float32; expected finite ones")
        return array

    def _check_images(self, images: npt.ArrayLike) -> npt.NDArray[Any]:
        array = _array(images, "images")
        channels, height, width = self.image_shape
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise InputError(f"images are of {array.dtype}; expected uint8 (0 to 255) or floats (0 to 1): convert them")
        whole = array
        if array.ndim == 2 and channels == 1:
            whole = array[None, None]
        elif array.ndim == 3:
            whole = array[:, None] if channels == 1 else array[None]
        if whole.shape[1:] != self.image_shape:
            size = f"{height}, {width}]"
            more = [f"[N, {size}", f"[{size}"] if channels == 1 else [f"[{channels}, {size}"]
            shapes = [f"[N, {channels}, {size}", *more]
            raise InputError(f"images of shape {list(array.shape)}; expected {' or '.join(shapes)}: resize them")
        if whole.dtype != np.uint8 and whole.size:
            low, high = float(whole.min()), float(whole.max())
            if not (low >= 0 and high <= 1):  # written so that nan fails
                found = "hold nan" if np.isnan(low) else f"go from {low:g} to {high:g}"
                raise InputError(
                    f"pixels {found}; expected 0 to 1 in {array.dtype}: scale or clip them, or give uint8 (0 to 255)"
                )
        return whole

    def _check_codes(self, codes: npt.ArrayLike) -> npt.NDArray[Any]:
        array = _array(codes, "codes")
        if array.dtype.kind not in "iu":
            raise InputError(f"codes are of {array.dtype}; expected integers: convert them to int64")
        whole = array[None] if array.ndim == len(self.code_shape) else array
        if whole.shape[1:] != self.code_shape:
            one = ", ".join(map(str, self.code_shape))
            many = ", ".join(["N", *map(str, self.code_shape)])
            raise InputError(f"codes of shape {list(array.shape)}; expected [{many}] or [{one}]: reshape them")
        if self.values is not None and whole.size:
            low, high = int(whole.min()), int(whole.max())
            if low < 0 or high >= self.values:
                raise InputError(
                    f"codes go from {low} to {high}; expected 0 to {self.values - 1} for latent {self.latent}: "
                    "use codes that this model's encode gave"
                )
            if self.sizes is not None and (whole >= np.array(self.sizes)).any():
                raise InputError(
                    f"a code has a value that its variable lacks; expected values below {list(self.sizes)} for latent "
                    f"{self.latent}: use codes that this model's encode gave"
                )
        return whole


def _generator(seed: Seed) -> np.random.Generator:
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError):
        raise InputError(
            f"seed must be a whole number of at least 0, a numpy Generator or None; got {seed!r}"
        ) from None


def _array(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"{name} are no array ({detail}); expected a numpy array: convert them") from None
