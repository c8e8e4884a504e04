"""The server against bare onnxruntime calls, in one run: `python -m benchmarks.serving MODEL [--run RUN]`.

MODEL is what `dgrad export` wrote; with --run, the run it was made from, torch is measured too. Ratios are of medians of calls that
take turns. What a client costs by itself is measured with a socket that sends the server's answers, stored before, and computes
nothing. May import tritonclient, onnxruntime, numpy; torch only for --run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.http as triton

from dgrad_export.serve.served_model import Served, open_models

Images = npt.NDArray[np.float32]


@contextmanager
def serving(model: Path) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process id."""
    command = [sys.executable, "-m", "dgrad_cli", "serve", str(model), "--port", "0"]
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
    """Median milliseconds of each call; they take turns, so that what the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def bare(models: dict[str, Served], images: Images) -> None:
    """Encode and decode with nothing but the sessions."""
    (code,) = models["encoder"]._session.run(["code"], {"image": images})
    models["decoder"]._session.run(["image"], {"code": code})


class Plain:
    """A client of http.client and numpy, binary mode: it copies less than tritonclient."""

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


@contextmanager
def stored(port: int, images: Images) -> Iterator[int]:
    """The port of a process that computes nothing: it sends what the server answered when `images` were encoded and decoded."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        # Not forked: that maps this process's memory anew, which the bare calls and the clients would pay for.
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_answer_stored, args=(listener, port), daemon=True)
        process.start()
        Plain(listener.getsockname()[1]).both(images)
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.join()


def _answer_stored(listener: socket.socket, port: int) -> None:
    """Ask the server what the first client asks; give its answers to all that follow."""
    answers: list[bytes] = []

    def serve_one(client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(2**22)
        while request := _read_message(client, buffer):
            client.sendall(answers[b"/decoder/" in bytes(request[:100])])

    buffer = bytearray(2**22)
    with closing(listener.accept()[0]) as client, closing(socket.create_connection(("127.0.0.1", port))) as server:
        for _ in range(2):
            server.sendall(_read_message(client, buffer))
            answers.append(bytes(_read_message(server, buffer)))
            client.sendall(answers[-1])
    while True:
        threading.Thread(target=serve_one, args=(listener.accept()[0],), daemon=True).start()


def _read_message(connection: socket.socket, buffer: bytearray) -> memoryview:
    """A request or an answer with its length; nothing at the end."""
    view, filled, size = memoryview(buffer), 0, len(buffer)
    while filled < size:
        count = connection.recv_into(view[filled:size])
        if count == 0:
            break
        filled += count
        if size == len(buffer) and (end := buffer.find(b"\r\n\r\n", 0, filled)) >= 0:
            length = re.search(rb"\r\ncontent-length: (\d+)", buffer[:end].lower())
            assert length
            size = end + 4 + int(length[1])
    return view[:filled]


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
    result: npt.NDArray[np.int64] = client.infer(
        "encoder", [given], outputs=[triton.InferRequestedOutput("code")]
    ).as_numpy("code")
    return result


def resident_mebibytes(process: int) -> float:
    """The memory of a process that is in RAM (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_server(model: Path, rounds: int, requests: int) -> None:
    """Print what the server costs beside the bare calls."""
    models = open_models(model)
    shape = models["encoder"].inputs["image"].shape
    images = np.random.default_rng(0).random((256, *shape), dtype=np.float32)
    with serving(model) as (port, process), triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        for size in (1, 256):
            measure_batch(port, models, images[:size], rounds)
        print(f"a refusal: {medians({'bad': lambda: bad_request(port)}, rounds)['bad']:.2f} ms")
        one_by_one = np.concatenate([encode(client, images[i : i + 1]) for i in range(len(images))])
        seconds, codes = concurrent(port, images, 2000)
        same = bool((codes == one_by_one[np.arange(2000) % len(images)]).all())
        print(f"2000 requests from 16 connections: {2000 / seconds:.0f} a second, codes equal to one by one: {same}")
        text = _metrics(port)
        print("\n".join(line for line in text.splitlines() if re.search(r"_(sum|count)\{", line)))
    with serving(model) as (port, process):  # fresh: memory freed after large requests would hide what grows
        concurrent(port, images, 500)
        before = resident_mebibytes(process)
        for part in range(4):
            concurrent(port, images, requests // 4)
            more = resident_mebibytes(process) - before
            print(f"memory after {(part + 1) * requests // 4}: {more:+.2f} MiB of {before:.0f}")


def measure_batch(port: int, models: dict[str, Served], images: Images, rounds: int) -> None:
    """Print what encoding and decoding `images` costs by the server, by a client alone and by neither.

    Each client takes turns with the bare calls and with no other client, whose memory and caches it would not share in use.
    """
    with stored(port, images) as nothing:
        for name, client in (("tritonclient", _triton), ("http.client", _plain)):
            calls = {name: client(port, images), f"{name}, client alone": client(nothing, images)}
            _print_times(models, images, calls, rounds)
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    calls = {"tritonclient, JSON": lambda: through_client(client, images, binary=False)}
    _print_times(models, images, calls, 10)


def _triton(port: int, images: Images) -> Callable[[], object]:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    return lambda: through_client(client, images, binary=True)


def _plain(port: int, images: Images) -> Callable[[], object]:
    client = Plain(port)
    return lambda: client.both(images)


def _print_times(
    models: dict[str, Served], images: Images, calls: dict[str, Callable[[], object]], rounds: int
) -> None:
    times = medians({"bare": lambda: bare(models, images), **calls}, rounds)
    print(f"encode and decode {len(images)}:")
    for name, time_ in times.items():
        print(f"  {name:28} {time_:8.3f} ms, {time_ / times['bare']:6.2f} times bare, {time_ - times['bare']:+.2f} ms")


def _metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def measure_torch(model: Path, run: Path, rounds: int) -> None:
    """Print what torch, eager and with one thread, costs beside onnxruntime."""
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
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000, help="over which memory is watched")
    arguments = parser.parse_args()
    measure_server(arguments.model, arguments.rounds, arguments.requests)
    if arguments.run:
        measure_torch(arguments.model, arguments.run, arguments.rounds)


if __name__ == "__main__":
    main()
