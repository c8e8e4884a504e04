"""Codes in files, a batch at a time: written as images are encoded, read to be decoded.

JSON lines have an object for each image:

- `image`, its file, and `index`, its place in a file of several;
- `code`, in a mixed model also `mean` and `log_variance`;
- `attributes`, each name with 0 or 1, where the variables of the code are attributes.

A .npz has these as arrays with a row for each image, without `attributes`. Its `image` is text.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dgrad.errors import InputError
from dgrad.files.atomic import atomic_file, check_place
from dgrad_export.codec.array_files import ArrayFile, names_in
from dgrad_export.codec.codec import Codec
from dgrad_export.codec.image_sources import Origin

Values = dict[str, npt.NDArray[Any]]
"""`code`, in a mixed model also `mean` and `log_variance`. Each has a row for each image."""
Write = Callable[[Sequence[Origin], Values], None]
LINES = (".jsonl", ".ndjson")
STYLES = ("style", "mean")
"""Names that the Gaussian variables may have in a file. The first that exists counts."""


def check_name(out: str) -> None:
    """Check, before any work, that codes can be written there.

    Raises:
        InputError: they cannot.
    """
    path = Path(out)
    if out == "-":
        return
    if path.suffix not in (".npz", *LINES):
        raise InputError(f"--out must end with .npz or .jsonl, or be - for lines on the standard output; got {out}")
    check_place("--out", path, "file")


def writing(out: str, codec: Codec, count: int, longest_name: int) -> AbstractContextManager[Write]:
    """A context whose value takes batches of codes. The file appears, whole, when the context ends well.

    Args:
        out: a path that ends with .npz or .jsonl, or `-` for lines on the standard output.
        longest_name: characters of the longest name of a file.
    """
    if out == "-":
        return _lines(sys.stdout, codec)
    return _npz(Path(out), count, longest_name) if out.endswith(".npz") else _lines_file(Path(out), codec)


@contextmanager
def _lines_file(path: Path, codec: Codec) -> Iterator[Write]:
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file, _lines(file, codec) as write:
        yield write


@contextmanager
def _lines(file: IO[str], codec: Codec) -> Iterator[Write]:
    def write(origins: Sequence[Origin], values: Values) -> None:
        for row, origin in enumerate(origins):
            line: dict[str, Any] = {"image": origin.file}
            if origin.index is not None:
                line["index"] = origin.index
            line |= {name: _plain(array[row]) for name, array in values.items()}
            if codec.attributes is not None:
                line["attributes"] = dict(zip(codec.attributes, line["code"], strict=True))
            file.write(json.dumps(line) + "\n")
        file.flush()

    yield write


def _plain(values: npt.NDArray[Any]) -> Any:
    """Numbers for JSON. Nine digits tell any two of float32 apart."""
    if values.dtype.kind == "f":
        return [float(f"{value:.9g}") for value in values.tolist()]
    return values.tolist()


@contextmanager
def _npz(path: Path, count: int, longest_name: int) -> Iterator[Write]:
    """Each array grows in a file of its own; at the end they become members of one archive."""
    with (
        atomic_file(path) as temporary,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder,
    ):
        files: dict[str, IO[bytes]] = {}

        def write(origins: Sequence[Origin], values: Values) -> None:
            names = np.array([origin.file for origin in origins], dtype=f"<U{max(1, longest_name)}")
            indices = np.array([origin.index or 0 for origin in origins])
            for name, array in {**values, "image": names, "index": indices}.items():
                if name not in files:
                    files[name] = (Path(folder) / f"{name}.npy").open("wb")
                    header = {"descr": array.dtype.str, "fortran_order": False, "shape": (count, *array.shape[1:])}
                    np.lib.format.write_array_header_1_0(files[name], header)
                files[name].write(np.ascontiguousarray(array).tobytes())

        try:
            yield write
        finally:
            for file in files.values():
                file.close()
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in files:
                member = zipfile.ZipInfo(f"{name}.npy")  # without the time: the same codes make the same file
                member.compress_type = zipfile.ZIP_DEFLATED
                whole = Path(folder) / f"{name}.npy"
                with whole.open("rb") as source, archive.open(member, "w", force_zip64=True) as to:
                    shutil.copyfileobj(source, to)


class Codes:
    """The codes in a file, with the Gaussian variables of each in a mixed model, where the file has them.

    Args:
        source: a .npz with `code`, for a mixed model also `style` or `mean`, a .npy with codes alone, JSON lines, or
            `-` for lines on the standard input.

    Raises:
        InputError: the file cannot be read, or can hold no codes of this model.
    """

    def __init__(self, source: str, codec: Codec) -> None:
        self.source = source
        self.codec = codec
        self.code: ArrayFile | None = None
        self.style: ArrayFile | None = None
        path = Path(source)
        if path.suffix in (".npz", ".npy"):
            self._open_arrays(path)
        elif source != "-" and path.suffix not in (*LINES, ".json"):
            raise InputError(
                f"{source} is of no known kind; expected .npz, .npy, .jsonl, or - for lines on the standard input"
            )
        elif source != "-" and not path.is_file():
            raise InputError(f"there is no file {source}; check the path")

    @property
    def count(self) -> int | None:
        """How many codes there are. None where only the end tells."""
        return None if self.code is None else len(self.code)

    def batches(self, size: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]:
        """Codes `[B, *code_shape]` and style `[B, g]` or None, at most `size` at a time.

        Raises:
            InputError: a line or an array is damaged.
        """
        if self.code is None:
            yield from self._lines(size)
            return
        styles = None if self.style is None else self.style.rows(size)
        for codes in self.code.rows(size):
            yield codes, None if styles is None else next(styles)

    def _open_arrays(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"there is no file {path}; check the path")
        self.code = ArrayFile(path, "code")
        if path.suffix == ".npz" and self.codec.gaussian and set(STYLES) & set(names_in(path)):
            self.style = ArrayFile(path, *STYLES)
        expected = [("code", self.code, self.codec.code_shape)]
        if self.style is not None:
            expected.append(("style", self.style, (self.codec.gaussian,)))
        for name, array, shape in expected:
            if array.shape != (len(self.code), *shape):
                wanted = ", ".join(map(str, [len(self.code), *shape]))
                raise InputError(
                    f"{array} has the shape {list(array.shape)}; expected [{wanted}], a {name} in each row"
                )

    def _lines(self, size: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]:
        codes: list[Any] = []
        styles: list[Any] = []
        stdin = self.source == "-"
        with nullcontext(sys.stdin) if stdin else Path(self.source).open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                code, style = self._parse(line, f"line {number} of {'the standard input' if stdin else self.source}")
                codes.append(code)
                styles.append(style)
                if len(codes) == size:
                    yield self._stacked(codes, styles)
                    codes, styles = [], []
        if codes:
            yield self._stacked(codes, styles)

    def _stacked(self, codes: list[Any], styles: list[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        return np.stack(codes), np.stack(styles) if self.codec.gaussian else None

    def _parse(self, text: str, where: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"{where} is no JSON ({error}); expected an object with code") from None
        if not isinstance(line, dict) or not ("code" in line or ("attributes" in line and self.codec.attributes)):
            also = " or attributes" if self.codec.attributes else ""
            raise InputError(f"{where} has no code; expected an object with code{also}, as dgrad encode writes it")
        code = _numbers(line["code"], self.codec.code_shape, f"{where}: code") if "code" in line else None
        if "attributes" in line and self.codec.attributes is not None:
            named = self._code_of(line["attributes"], self.codec.attributes, where)
            if code is not None and (code != named).any():
                raise InputError(f"{where}: code and attributes say different things; change both, or leave code out")
            code = named
        style = None
        if self.codec.gaussian:
            found = line.get("style", line.get("mean", [0.0] * self.codec.gaussian))
            style = _numbers(found, (self.codec.gaussian,), f"{where}: style")
        assert code is not None
        return code, style

    def _code_of(self, values: Any, names: tuple[str, ...], where: str) -> npt.NDArray[Any]:
        named = isinstance(values, dict) and set(values) == set(names)
        if not named or any(value not in (0, 1) for value in values.values()):
            raise InputError(
                f"{where}: attributes are {_short(values)}; expected 0 or 1 for each of {', '.join(names)}"
            )
        return np.array([int(values[name]) for name in names])


def _numbers(values: Any, shape: tuple[int, ...], name: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf" or array.shape != shape:
        raise InputError(f"{name} is {_short(values)}; expected numbers {list(shape)}")
    return array


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
