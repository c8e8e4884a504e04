"""The server beside bare onnxruntime calls, in one run: `python -m benchmarks.serving MODEL`.

MODEL is what `dgrad export` wrote. All ratios are of medians of calls that take turns.
With --beside, the dgrad of another Python serves the same model and takes turns too.
With --run, the run that MODEL was made from, torch is measured as well.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.http as triton

from dgrad_export.serve.served_model import Served, open_models

Images = npt.NDArray[np.float32]


@contextmanager
def serving(model: Path, python: str = sys.executable) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process id."""
    command = [python, "-P", "-m", "dgrad_cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    match = re.search(r":(\d+)/v2", process.stdout.readline())
    assert match
    try:
        yield int(match[1]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call. Calls take turns, so that other work on the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def bare(models: dict[str, Served], images: Images) -> None:
    """Encode and decode with the sessions alone."""
    (code,) = models["encoder"]._session.run(["code"], {"image": images})
    models["decoder"]._session.run(["image"], {"code": code})


class Plain:
    """A client of http.client and numpy in binary mode. It copies less than tritonclient."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port)

    def infer(self, model: str, given: tuple[str, str, npt.NDArray[Any]], asked: tuple[str, str]) -> npt.NDArray[Any]:
        """The output `asked`, a name and a numpy type, for one input: name, data type and values."""
        name, datatype, values = given
        size = {"binary_data_size": values.nbytes}
        inputs = [{"name": name, "datatype": datatype, "shape": list(values.shape), "parameters": size}]
        outputs = [{"name": asked[0], "parameters": {"binary_data": True}}]
        header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        self.connection.putrequest("POST", f"/v2/models/{model}/infer")
        self.connection.putheader("Content-Length", str(len(header) + values.nbytes))
        self.connection.putheader("Inference-Header-Content-Length", str(len(header)))
        self.connection.endheaders(header)
        self.connection.send(values.data.cast("B"))
        response = self.connection.getresponse()
        start = int(response.headers["Inference-Header-Content-Length"])
        body = response.read()
        return np.frombuffer(body, asked[1], offset=start).reshape(json.loads(body[:start])["outputs"][0]["shape"])

    def both(self, images: Images) -> npt.NDArray[Any]:
        """Encode and decode by two requests; the images."""
        code = self.infer("encoder", ("image", "FP32", images), ("code", "<i8"))
        return self.infer("decoder", ("code", "INT64", code), ("image", "<f4"))


def through_client(client: triton.InferenceServerClient, images: Images, *, binary: bool) -> npt.NDArray[np.int64]:
    """Encode and decode by two requests; the codes."""
    given = triton.InferInput("image", list(images.shape), "FP32")
    given.set_data_from_numpy(images, binary_data=binary)
    asked = [triton.InferRequestedOutput("code", binary_data=binary)]
    code: npt.NDArray[np.int64] = client.infer("encoder", [given], outputs=asked).as_numpy("code")
    codes = triton.InferInput("code", list(code.shape), "INT64")
    codes.set_data_from_numpy(code, binary_data=binary)
    client.infer("decoder", [codes], outputs=[triton.InferRequestedOutput("image", binary_data=binary)])
    return code


def bad_request(port: int) -> None:
    """A request that is refused, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v2/models/encoder/infer", b"no JSON")
    assert connection.getresponse().status == 400
    connection.close()


def concurrent(port: int, images: Images, requests: int) -> tuple[float, npt.NDArray[np.int64]]:
    """Seconds and codes of single images from 16 connections at once."""

    def work(worker: int) -> dict[int, npt.NDArray[np.int64]]:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            return {i: encode(client, images[i % len(images)][None]) for i in range(worker, requests, 16)}

    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        codes = {index: code for part in pool.map(work, range(16)) for index, code in part.items()}
    return time.perf_counter() - start, np.concatenate([codes[index] for index in range(requests)])


def encode(client: triton.InferenceServerClient, images: Images) -> npt.NDArray[np.int64]:
    """The codes by one request."""
    given = triton.InferInput("image", list(images.shape), "FP32")
    given.set_data_from_numpy(images)
    asked = [triton.InferRequestedOutput("code")]
    result: npt.NDArray[np.int64] = client.infer("encoder", [given], outputs=asked).as_numpy("code")
    return result


def resident_mebibytes(process: int) -> float:
    """The memory of a process that is in RAM (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_server(model: Path, beside: str | None, rounds: int, requests: int) -> None:
    """Print what the server costs beside the bare calls, and beside another server."""
    models = open_models(model)
    shape = models["encoder"].inputs["image"].shape
    images = np.random.default_rng(0).random((256, *shape), dtype=np.float32)
    with ExitStack() as stack:
        ports = {"this server": stack.enter_context(serving(model))[0]}
        if beside:
            ports["the other"] = stack.enter_context(serving(model, beside))[0]
        for size in (1, 32, 256):
            measure_batch(ports, models, images[:size], rounds)
        for name, port in ports.items():
            measure_many(name, port, images, rounds)
    with serving(model) as (port, process):  # fresh: memory freed after large requests would hide growth
        concurrent(port, images, 500)
        before = resident_mebibytes(process)
        for part in range(4):
            concurrent(port, images, requests // 4)
            more = resident_mebibytes(process) - before
            print(f"memory after {(part + 1) * requests // 4}: {more:+.2f} MiB of {before:.0f}")


def measure_batch(ports: dict[str, int], models: dict[str, Served], images: Images, rounds: int) -> None:
    """Print what encoding and decoding `images` costs by each client and server."""
    for client, call in (("http.client", _plain), ("tritonclient", _triton), ("tritonclient, JSON", _triton_json)):
        calls = {name: call(port, images) for name, port in ports.items()}
        count = rounds if call is not _triton_json else rounds // 20
        times = medians({"bare": lambda: bare(models, images), **calls}, count)
        print(f"encode and decode {len(images)}, {client}:")
        for name, milliseconds in times.items():
            print(f"  {name:12} {milliseconds:8.3f} ms, {milliseconds / times['bare']:6.2f} times bare")


def measure_many(name: str, port: int, images: Images, rounds: int) -> None:
    """Print how long a refusal takes, and how many requests of 16 connections are answered in a second."""
    print(f"{name}: a refusal {medians({'bad': lambda: bad_request(port)}, rounds)['bad']:.2f} ms", end="; ")
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        one_by_one = np.concatenate([encode(client, images[i : i + 1]) for i in range(len(images))])
    seconds, codes = concurrent(port, images, 2000)
    same = bool((codes == one_by_one[np.arange(2000) % len(images)]).all())
    print(f"16 connections {2000 / seconds:.0f} requests a second, codes equal to one by one: {same}")
    print("\n".join(line for line in _metrics(port).splitlines() if re.search(r"_(sum|count)\{", line)))


def _triton(port: int, images: Images, *, binary: bool = True) -> Callable[[], object]:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    return lambda: through_client(client, images, binary=binary)


_triton_json = partial(_triton, binary=False)


def _plain(port: int, images: Images) -> Callable[[], object]:
    client = Plain(port)
    return lambda: client.both(images)


def _metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def measure_torch(model: Path, run: Path, rounds: int) -> None:
    """Print what eager torch with one thread costs beside onnxruntime."""
    import torch

    from dgrad.training.run_directory import Run
    from dgrad.training.trained_model import load_model

    torch.set_num_threads(1)
    models = open_models(model)
    trained, _ = load_model(Run.open(run))
    shape = models["encoder"].inputs["image"].shape
    images = np.random.default_rng(0).random((256, *shape), dtype=np.float32)

    @torch.inference_mode()
    def eager(batch: Images) -> None:
        logits = trained.encoder((torch.from_numpy(batch) >= 0.5).float())
        trained.decode(trained.layer.argmax(logits))

    for size in (1, 256):
        batch = images[:size]
        times = medians(
            {"onnxruntime": lambda batch=batch: bare(models, batch), "torch": lambda batch=batch: eager(batch)}, rounds
        )
        print(f"batch {size}: onnxruntime {times['onnxruntime']:.3f} ms, torch {times['torch']:.3f} ms", end="")
        print(f"; torch / onnxruntime {times['torch'] / times['onnxruntime']:.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--beside", metavar="PYTHON", help="of another dgrad, whose server takes turns")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000, help="over which memory is watched")
    arguments = parser.parse_args()
    measure_server(arguments.model, arguments.beside, arguments.rounds, arguments.requests)
    if arguments.run:
        measure_torch(arguments.model, arguments.run, arguments.rounds)


if __name__ == "__main__":
    main()
