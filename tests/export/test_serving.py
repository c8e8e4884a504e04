"""`dgrad serve` as its clients see it: tritonclient, curl and plain HTTP against a server in a process of its own."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from helpers import serving
from tritonclient.utils import InferenceServerException

from dgrad.config import configure
from dgrad.errors import InputError, RunError
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer
from dgrad_export import Codec, export_run
from dgrad_export.serve.batching import InferenceRequest, answer_all
from dgrad_export.serve.protocol import read_request
from dgrad_export.serve.served_model import open_models
from dgrad_export.serve.server import serve

pytestmark = pytest.mark.processes

MEBIBYTE = 2**20

# The real command; at its end it says which libraries it never needed.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("serving")
    trainer = Trainer(configure({"latent": "6x4", "estimator": "rloo", "steps": 10, "device": "cpu"}))
    run = Run.create(home / "run", trainer.config)
    trainer.train(run)
    export_run(run.path, home / "model")
    return home / "model"


@pytest.fixture(scope="module")
def codec(bundle: Path) -> Codec:
    return Codec(bundle)


@pytest.fixture(scope="module")
def port(bundle: Path) -> Iterator[int]:
    with serving(bundle, "--body-limit", "1") as (_, number):
        yield number


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and parsed JSON of one request."""
    data = json.dumps(body) if isinstance(body, dict) else body
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def grey(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 8, 8), dtype=np.float32)


def tensor(name: str, values: Any, datatype: str, **more: Any) -> dict[str, Any]:
    array = np.asarray(values)
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.tolist(), **more}


def image(count: int = 1, **more: Any) -> dict[str, Any]:
    return tensor("image", grey(count), "FP32", **more)


# What is there


def test_routes(port: int) -> None:
    assert ask(port, "GET", "/v2")[1]["extensions"] == ["binary_tensor_data", "model_repository"]
    assert ask(port, "GET", "/v2/health/live") == (200, {"live": True})
    assert ask(port, "GET", "/v2/health/ready") == (200, {"ready": True})
    _, index = ask(port, "POST", "/v2/repository/index", {})
    assert [(entry["name"], entry["version"], entry["state"]) for entry in index] == [
        ("encoder", "1", "READY"),
        ("decoder", "1", "READY"),
    ]
    for path in ("/v2/models/encoder", "/v2/models/encoder/versions/1"):
        status, metadata = ask(port, "GET", path)
        assert status == 200 and metadata["name"] == "encoder" and metadata["versions"] == ["1"]
        assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
        assert metadata["outputs"] == [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 6, 4]},
            {"name": "code", "datatype": "INT64", "shape": [-1, 6]},
        ]
        assert ask(port, "GET", f"{path}/ready") == (200, {"name": "encoder", "ready": True})


@pytest.mark.parametrize(
    "path", ["/page.html", "/docs", "/v2/models", "/v2/models/encoder/config", "/manifest.json", "/../x"]
)
def test_nothing_else_is_served(port: int, path: str) -> None:
    status, answer = ask(port, "GET", path)
    assert status == 404 and "expected a route" in answer["error"]


def test_json_flat_and_nested_and_the_id(port: int, codec: Codec) -> None:
    nested = image(3)
    flat = {**nested, "data": np.asarray(nested["data"]).ravel().tolist()}
    for entry in (nested, flat):
        status, answer = ask(port, "POST", "/v2/models/encoder/infer", {"id": "a", "inputs": [entry]})
        assert status == 200
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a", "encoder", "1")
        logits, code = answer["outputs"]
        assert (logits["name"], logits["datatype"], logits["shape"]) == ("logits", "FP32", [3, 6, 4])
        np.testing.assert_allclose(np.reshape(logits["data"], (3, 6, 4)), codec.logits(grey(3)), atol=1e-6)
        np.testing.assert_array_equal(np.reshape(code["data"], code["shape"]), codec.encode(grey(3)))
    only = {"inputs": [nested], "outputs": [{"name": "code"}]}
    _, answer = ask(port, "POST", "/v2/models/encoder/versions/1/infer", only)
    assert [output["name"] for output in answer["outputs"]] == ["code"] and "id" not in answer


# Real clients


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("count", [1, 40])
def test_tritonclient(port: int, codec: Codec, binary: bool, count: int) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("encoder") and client.is_model_ready("decoder", "1")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "dgrad"
        assert client.get_model_metadata("decoder")["inputs"][0]["shape"] == [-1, 6]
        assert len(client.get_model_repository_index()) == 2

        images = triton.InferInput("image", [count, 1, 8, 8], "FP32")
        images.set_data_from_numpy(grey(count), binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "code")]
        result = client.infer("encoder", [images], outputs=outputs, request_id="7")
        assert result.get_response()["id"] == "7"
        code = result.as_numpy("code")
        np.testing.assert_array_equal(code, codec.encode(grey(count)))
        np.testing.assert_allclose(result.as_numpy("logits"), codec.logits(grey(count)), atol=1e-6)

        codes = triton.InferInput("code", [count, 6], "INT64")
        codes.set_data_from_numpy(code, binary_data=binary)
        asked = None if binary else [triton.InferRequestedOutput("image", binary_data=False)]
        decoded = client.infer("decoder", [codes], outputs=asked).as_numpy("image")
        assert decoded.dtype == np.float32
        np.testing.assert_allclose(decoded, codec.decode(code), atol=1e-6)

        codes.set_data_from_numpy(code + 4, binary_data=binary)
        with pytest.raises(InferenceServerException, match="expected 0 to 3") as caught:
            client.infer("decoder", [codes])
        assert caught.value.status() == "400"


def test_tritonclient_is_told_to_switch_compression_off(port: int) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        images = triton.InferInput("image", [1, 1, 8, 8], "FP32")
        images.set_data_from_numpy(grey(1))
        with pytest.raises(InferenceServerException, match="switch compression off"):
            client.infer("encoder", [images], request_compression_algorithm="gzip")
        client.infer("encoder", [images], response_compression_algorithm="gzip")  # which a server may decline


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(port: int, codec: Codec, tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"inputs": [image(2)], "outputs": [{"name": "code"}]}))

    def curl(file: Path) -> tuple[str, Any]:
        url = f"http://127.0.0.1:{port}/v2/models/encoder/infer"
        command = ["curl", "-sS", "-w", "\n%{http_code}", "--data-binary", f"@{file}", url]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        body, _, status = done.stdout.rpartition("\n")
        return status, json.loads(body)

    status, answer = curl(request)
    assert status == "200"
    np.testing.assert_array_equal(np.reshape(answer["outputs"][0]["data"], (2, 6)), codec.encode(grey(2)))
    request.write_bytes(b" " * (3 * MEBIBYTE))
    status, answer = curl(request)
    assert status == "413" and "expected at most 1048576 (1 MiB)" in answer["error"]


# What is refused

INFER = "/v2/models/encoder/infer"


def binary(size: object, payload: bytes = b"", **header: str) -> tuple[bytes, dict[str, str]]:
    entry = {"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [entry]}).encode()
    return text + payload, {"Inference-Header-Content-Length": header.get("length", str(len(text)))}


BAD: dict[str, tuple[str, str, Any, dict[str, str], int, str]] = {
    "model": ("POST", "/v2/models/other/infer", {}, {}, 404, "expected encoder or decoder"),
    "version": ("GET", "/v2/models/encoder/versions/2", None, {}, 404, "expected 1"),
    "method": ("GET", INFER, None, {}, 405, "method not allowed"),
    "text": ("POST", INFER, b"hello", {}, 400, "not JSON"),
    "bytes": ("POST", INFER, b"\xff\xfe\x00", {}, 400, "not JSON"),
    "deep": ("POST", INFER, b"[" * 200_000, {}, 400, "nested too deeply"),
    "nothing": ("POST", INFER, b"", {}, 400, "not JSON"),
    "array": ("POST", INFER, b"[1]", {}, 400, "expected a JSON object"),
    "no inputs": ("POST", INFER, {}, {}, 400, "inputs is missing; expected a JSON array"),
    "empty inputs": ("POST", INFER, {"inputs": []}, {}, 400, "input image is missing; model encoder takes image"),
    "input": ("POST", INFER, {"inputs": [image(), tensor("imge", [1], "FP32")]}, {}, 400, "did you mean 'image'"),
    "twice": ("POST", INFER, {"inputs": [image(), image()]}, {}, 400, "there twice"),
    "output": ("POST", INFER, {"inputs": [image()], "outputs": [{"name": "cod"}]}, {}, 400, "did you mean 'code'"),
    "classification": (
        "POST", INFER, {"inputs": [image()], "outputs": [{"name": "code", "parameters": {"classification": 3}}]}, {},
        400, "not offered",
    ),
    "datatype": ("POST", INFER, {"inputs": [{**image(), "datatype": "FP64"}]}, {}, 400, "expected FP32"),
    "shape": ("POST", INFER, {"inputs": [tensor("image", grey(1)[0], "FP32")]}, {}, 400, "[N of at least 1, 1, 8, 8]"),
    "count": ("POST", INFER, {"inputs": [{**image(), "shape": [2, 1, 8, 8]}]}, {}, 400, "64 values"),
    "negative": ("POST", INFER, {"inputs": [{**image(), "shape": [-1, 1, 8, 8]}]}, {}, 400, "-1 for any number"),
    "huge": ("POST", INFER, {"inputs": [{**image(), "shape": [2**62, 2**62]}]}, {}, 400, "[-1, 1, 8, 8]"),
    "none": ("POST", INFER, {"inputs": [tensor("image", grey(0), "FP32")]}, {}, 400, "N of at least 1"),
    "ragged": ("POST", INFER, {"inputs": [{**image(), "data": [[1], [1, 2]]}]}, {}, 400, "is no array"),
    "mixed": ("POST", INFER, {"inputs": [{**image(), "data": [0.5] * 63 + [[0.5]]}]}, {}, 400, "not all numbers"),
    "true": ("POST", INFER, {"inputs": [{**image(), "data": [True] * 64}]}, {}, 400, "not all numbers"),
    "long digits": ("POST", INFER, {"inputs": [{**image(), "data": [10**400] * 64}]}, {}, 400, "not all numbers"),
    "empty and huge": (
        "POST", INFER, {"inputs": [{**image(), "shape": [0, 2**39, 2**39], "data": []}]}, {}, 400,
        "[N of at least 1, 1,",
    ),
    "axes": ("POST", INFER, {"inputs": [{**image(), "shape": [1] * 100_000}]}, {}, 400, "[-1, 1, 8, 8]"),
    "one long string": (  # an array of strings has room for the longest in each place
        "POST", INFER, {"inputs": [{**image(), "shape": [300, 1, 8, 8], "data": ["a" * 500_000] + ["b"] * 19_199}]}, {},
        400, "not all numbers",
    ),
    "strings": ("POST", INFER, {"inputs": [{**image(), "data": ["a"] * 64}]}, {}, 400, "not all numbers"),
    "nan": ("POST", INFER, {"inputs": [{**image(), "data": [float("nan")] * 64}]}, {}, 400, "holds nan"),
    "infinite": ("POST", INFER, {"inputs": [{**image(), "data": [1e300] * 64}]}, {}, 400, "expected 0 to 1"),
    "range": (
        "POST", INFER, {"inputs": [{**image(), "data": [255] * 64}]}, {}, 400, "from 255 to 255; expected 0 to 1",
    ),
    "fraction": (
        "POST", "/v2/models/decoder/infer", {"inputs": [tensor("code", [[0.5] * 6], "INT64")]}, {}, 400,
        "expected integers",
    ),
    "large code": (
        "POST", "/v2/models/decoder/infer", {"inputs": [{**tensor("code", [[0] * 6], "INT64"), "data": [2**70] * 6}]},
        {}, 400, "integers",
    ),
    "cut": ("POST", INFER, *binary(256, bytes(100)), 400, "100 bytes of binary data left"),
    "odd size": ("POST", INFER, *binary(255, bytes(255)), 400, "multiple of 4"),
    "no size": ("POST", INFER, *binary("256", bytes(256)), 400, 'binary_data_size "256"'),
    "surrogate": ("POST", INFER, b'{"inputs": [{"name": "\\ud800"}]}', {}, 400, "known: image"),
    "left over": ("POST", INFER, *binary(256, bytes(300)), 400, "44 bytes are left"),
    "header too long": ("POST", INFER, *binary(256, bytes(256), length="9999"), 400, "cut short"),
    "header no number": ("POST", INFER, *binary(256, bytes(256), length="-5"), 400, "expected a number of bytes"),
    "header forgotten": ("POST", INFER, binary(256, b"\xff" * 256)[0], {}, 400, "not JSON"),
    "too large": ("POST", INFER, b" " * (2 * MEBIBYTE), {}, 413, "expected at most 1048576 (1 MiB)"),
    "compressed": ("POST", INFER, b"x", {"Content-Encoding": "gzip"}, 415, "switch compression off"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_answered_with_what_was_expected(port: int, name: str) -> None:
    method, path, body, headers, status, expected = BAD[name]
    got, answer = ask(port, method, path, body, headers)
    assert (got, list(answer)) == (status, ["error"])
    assert expected in answer["error"] and "\n" not in answer["error"] and len(answer["error"]) < 400
    assert ask(port, "POST", INFER, {"inputs": [image()]})[0] == 200


def test_a_body_without_a_length_is_limited_too(port: int) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("POST", INFER, (b" " * 65536 for _ in range(40)), encode_chunked=True)
        assert connection.getresponse().status == 413


def test_nan_in_binary_data(port: int) -> None:
    body, headers = binary(256, np.full(64, np.nan, "<f4").tobytes())
    status, answer = ask(port, "POST", INFER, body, headers)
    assert status == 400 and "holds nan; expected 0 to 1" in answer["error"]


@pytest.mark.slow
def test_a_slow_client_is_told_so_and_holds_up_nobody(bundle: Path) -> None:
    with (
        serving(bundle, "--timeout", "0.5") as (_, port),
        closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as slow,
    ):
        slow.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert ask(port, "POST", INFER, {"inputs": [image()]})[0] == 200
        received = b""
        while chunk := slow.recv(4096):  # until the server closes
            received += chunk
        assert b" 408 " in received.splitlines()[0] and b'"error":"the body took longer than 0.5 seconds' in received


# Connections


def infer_request(count: int = 1, seed: int = 0, *more: str, payload: bytes | None = None) -> bytes:
    """An inference request as bytes, binary both ways."""
    images = grey(count, seed)
    entry = {"name": "image", "shape": list(images.shape), "datatype": "FP32"}
    inputs = [{**entry, "parameters": {"binary_data_size": images.nbytes}}]
    text = json.dumps({"inputs": inputs, "outputs": [{"name": "code", "parameters": {"binary_data": True}}]}).encode()
    body = text + (images.tobytes() if payload is None else payload)
    lines = [f"POST {INFER} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, f"Inference-Header-Content-Length: {len(text)}", "", ""]).encode() + body


def read_response(stream: Any) -> tuple[int, dict[str, str], bytes]:
    status = int(stream.readline().split()[1])
    headers = {}
    while line := stream.readline().decode().strip():
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, stream.read(int(headers["content-length"]))


def read_codes(stream: Any) -> np.ndarray:
    status, headers, body = read_response(stream)
    assert status == 200, body
    return np.frombuffer(body, "<i8", offset=int(headers["inference-header-content-length"])).reshape(-1, 6)


@contextmanager
def connected(port: int) -> Iterator[tuple[socket.socket, Any]]:
    with (
        closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as client,
        closing(client.makefile("rb")) as stream,
    ):
        yield client, stream


def test_all_kinds_of_requests_on_one_connection(port: int, codec: Codec) -> None:
    other = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    body = json.dumps({"inputs": [image(2)], "outputs": [{"name": "code"}]}).encode()
    in_chunks = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode()
    in_chunks += body + b"\r\n0\r\n\r\n"
    with connected(port) as (client, stream):
        for _ in range(2):
            client.sendall(infer_request(3))
            np.testing.assert_array_equal(read_codes(stream), codec.encode(grey(3)))
            client.sendall(other)
            assert read_response(stream)[0] == 200
            client.sendall(infer_request(1, payload=b""))
            status, _, answer = read_response(stream)
            assert status == 400 and b"0 bytes of binary data left" in answer
            client.sendall(in_chunks)
            _, _, answer = read_response(stream)
            assert (
                np.reshape(json.loads(answer)["outputs"][0]["data"], (2, 6)).tolist() == codec.encode(grey(2)).tolist()
            )
        client.sendall(infer_request(2, 5, "Expect: 100-continue"))
        assert b" 100 " in stream.readline() and not stream.readline().strip()
        np.testing.assert_array_equal(read_codes(stream), codec.encode(grey(2, 5)))
        client.sendall(infer_request(2, 6, "Connection: close"))
        np.testing.assert_array_equal(read_codes(stream), codec.encode(grey(2, 6)))
        assert stream.read() == b""


def test_requests_in_pieces(port: int, codec: Codec) -> None:
    request = infer_request(2)
    with connected(port) as (client, stream):
        for piece in (request[:1], request[1:70], request[70:180], request[180:-1], request[-1:] + request[:9]):
            client.sendall(piece)
            time.sleep(0.02)
        np.testing.assert_array_equal(read_codes(stream), codec.encode(grey(2)))
        client.sendall(request[9:])
        np.testing.assert_array_equal(read_codes(stream), codec.encode(grey(2)))


def test_requests_sent_before_the_answers_are_answered_in_order(port: int, codec: Codec) -> None:
    seeds = range(400)  # more than is read ahead
    other = b"GET /v2/models/none HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(port) as (client, stream), ThreadPoolExecutor(1) as pool:
        requests = b"".join(infer_request(1 + seed % 3, seed) + other * (seed % 50 == 49) for seed in seeds)
        sending = pool.submit(client.sendall, requests)
        for seed in seeds:
            np.testing.assert_array_equal(read_codes(stream), codec.encode(grey(1 + seed % 3, seed)))
            if seed % 50 == 49:
                assert read_response(stream)[0] == 404
        sending.result()


@pytest.mark.slow
def test_a_client_that_reads_nothing_holds_up_nobody(port: int, codec: Codec) -> None:
    entry = {"inputs": [image(200)]}  # answers of 60 KiB
    body = json.dumps(entry).encode()
    request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with connected(port) as (client, stream):
        client.settimeout(1)
        with pytest.raises(TimeoutError, match="timed out"):
            for _ in range(1000):  # the server stops to read when it cannot write
                client.sendall(request)
        assert ask(port, "POST", INFER, entry)[0] == 200
        assert read_response(stream)[0] == 200


@pytest.mark.slow
def test_a_connection_without_a_request_is_closed(bundle: Path) -> None:
    first = "import dgrad_export.serve.connection as c\nc.HEAD_SECONDS = 0.4\n"
    with serving(bundle, first=first) as (_, port), connected(port) as (silent, _), connected(port) as (client, stream):
        silent.sendall(b"POST ")
        for count in range(3):
            time.sleep(0.25)
            if count == 0:
                silent.sendall(b"/v2")  # another byte gives no more time
            client.sendall(infer_request())
            read_codes(stream)
        assert silent.recv(1) == b""
        started = time.monotonic()
        assert client.recv(1) == b"" and time.monotonic() - started < 5


def test_a_head_is_limited(port: int) -> None:
    for head in (b"X: " + b"y" * 2**16, b"X: y\r\n" * 11_000):
        with connected(port) as (client, stream):
            client.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n")
            client.sendall(head)
            status, _, message = read_response(stream)
            assert status == 400 and b"more than 65536 bytes" in message and stream.read() == b""
    assert ask(port, "GET", "/v2/health/live")[0] == 200


# Many at once, and the end


def test_requests_that_wait_together_are_answered_as_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = open_models(bundle)
    codes = tensor("code", np.random.default_rng(0).integers(4, size=(5, 6)), "INT64")
    bodies: list[tuple[str, dict[str, Any]]] = [
        *(("encoder", {"inputs": [tensor("image", grey(1, seed), "FP32")], "id": str(seed)}) for seed in range(70)),
        ("encoder", {"inputs": [tensor("image", grey(1), "FP64")]}),
        ("decoder", {"inputs": [codes]}),
        ("encoder", {"inputs": [image(100)]}),
        ("encoder", {"inputs": [image(3)], "outputs": [{"name": "code"}]}),
        ("decoder", {"inputs": [{**codes, "data": [9] * 30}]}),
        ("encoder", {"inputs": [image(2)], "outputs": [{"name": "code"}]}),
    ]
    requests = [InferenceRequest(models[name], json.dumps(body).encode(), None) for name, body in bodies]
    alone = [answer_all([request])[0] for request in requests]
    assert [answer.status for answer in alone] == [200] * 70 + [400, 200, 200, 200, 400, 200]
    batches: list[int] = []
    for model in models.values():

        def counted(values: Any, outputs: Any, run: Any = model.run) -> Any:
            batches.append(len(next(iter(values.values()))))
            return run(values, outputs)

        monkeypatch.setattr(model, "run", counted)
    for one, together in zip(alone, answer_all(requests), strict=True):
        assert (one.status, one.examples) == (together.status, together.examples)
        one_body, body = json.loads(one.body), json.loads(together.body)
        outputs = zip(one_body.pop("outputs", []), body.pop("outputs", []), strict=True)
        assert one_body == body
        for expected, found in outputs:
            assert {**expected, "data": 0} == {**found, "data": 0}
            np.testing.assert_allclose(found["data"], expected["data"], atol=1e-6 * (found["datatype"] == "FP32"))
    assert sorted(batches) == [5, 5, 6, 64, 100]


def test_a_failure_is_answered_too(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_models(bundle)["encoder"]
    request = InferenceRequest(model, json.dumps({"inputs": [image()]}).encode(), None)
    for error, expected in (
        (MemoryError(), b"fewer examples"),
        (RunError("no; wait"), b"wait"),
        (KeyError(1), b"failed"),
    ):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(model, "run", fail)
        for answer in answer_all([request, request]):
            assert answer.status == 500 and expected in answer.body
    assert "KeyError" in caplog.text


def test_concurrent_requests_get_the_codes_of_one_by_one(port: int, codec: Codec) -> None:
    images = grey(64, seed=3)

    def encode(index: int) -> list[int]:
        request = {"inputs": [tensor("image", images[index : index + 1], "FP32")], "outputs": [{"name": "code"}]}
        return list(ask(port, "POST", INFER, request)[1]["outputs"][0]["data"])

    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(encode, range(64)))
    np.testing.assert_array_equal(codes, np.concatenate([codec.encode(images[i : i + 1]) for i in range(64)]))


@pytest.mark.slow
def test_metrics_count_answers_and_refusals_and_sigterm_ends_well_without_torch(bundle: Path) -> None:
    with serving(bundle) as (process, port):
        ask(port, "POST", INFER, {"inputs": [image(3)]})
        ask(port, "POST", INFER, {"inputs": [image(2)]})
        ask(port, "POST", INFER, b"?")
        ask(port, "POST", "/v2/models/invented/infer", b"?")
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            assert response.getheader("content-type", "").startswith("text/plain; version=0.0.4")
            lines = response.read().decode().splitlines()
        for line in (
            'dgrad_requests_total{model="encoder",status="200"} 2',
            'dgrad_requests_total{model="encoder",status="400"} 1',
            'dgrad_examples_total{model="encoder"} 5',
            'dgrad_request_seconds_bucket{model="encoder",le="+Inf"} 2',
            'dgrad_request_seconds_count{model="encoder"} 2',
        ):
            assert line in lines
        assert "invented" not in "".join(lines)

        idle = socket.create_connection(("127.0.0.1", port), timeout=20)  # must not keep it from ending
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
        idle.close()
        assert (process.returncode, output) == (0, "heavy:\n")


@pytest.mark.slow
def test_sigterm_finishes_what_is_running(bundle: Path) -> None:
    request = json.dumps({"inputs": [image(2)]}).encode()
    with (
        serving(bundle) as (process, port),
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection,
    ):
        connection.putrequest("POST", INFER)
        connection.putheader("Content-Length", str(len(request)))
        connection.endheaders(request[:50])
        assert ask(port, "GET", "/v2/health/live")[0] == 200  # so the first bytes, sent before, are read
        process.send_signal(signal.SIGTERM)
        _until_closed(port)
        connection.send(request[50:])
        assert connection.getresponse().status == 200
        assert process.wait(timeout=20) == 0


def _until_closed(port: int) -> None:
    for _ in range(1000):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError("the server still takes connections")


def test_addresses_and_folders_that_cannot_be_served(bundle: Path, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=r"cannot listen at 127\.0\.0\.1"):
            serve(bundle, port=port)
    with pytest.raises(InputError, match=r"cannot listen at nowhere\.invalid"):
        serve(bundle, host="nowhere.invalid")
    with pytest.raises(InputError, match="there is no such directory"):
        serve(tmp_path / "nothing")


@pytest.mark.parametrize("seed", range(5))
def test_no_body_whatever_does_more_than_be_refused(bundle: Path, seed: int) -> None:
    """Cut and changed requests either parse, and are checked by the model, or end in an InputError."""
    model = open_models(bundle)["encoder"]
    generator = np.random.default_rng(seed)
    body, headers = binary(256, bytes(256))
    length = headers["Inference-Header-Content-Length"]
    assert read_request(model, body, length).values["image"].shape == (1, 1, 8, 8)
    for _ in range(300):
        damaged = bytearray(body[: generator.integers(len(body) + 1)])
        for position in generator.integers(max(len(damaged), 1), size=generator.integers(4)):
            if damaged:
                damaged[position] = generator.integers(32, 127)
        refused_or_inferred(lambda data=bytes(damaged): read_request(model, data, length).values, model)


def refused_or_inferred(read: Callable[[], dict[str, Any]], model: Any) -> None:
    try:
        values = read()
        model.check(values)
        model.run(values, ["code"])
    except InputError as error:
        assert "\n" not in str(error)
