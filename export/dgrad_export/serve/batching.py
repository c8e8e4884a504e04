"""Answers to inference requests: those that wait at the same time are computed as one batch."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dgrad.errors import InputError, RunError
from dgrad_export.serve.protocol import Inference, read_request, write_response
from dgrad_export.serve.served_model import Served

BATCH_LIMIT = 64
"""Examples up to which requests are joined. A larger batch takes no less time for an example."""
LOOP_SECONDS = 0.005
"""Seconds of work done in one turn of the event loop, during which every other client waits."""


@dataclass(frozen=True)
class InferenceRequest:
    """An inference request as it came.

    Args:
        body: JSON, then binary tensors.
        json_length: the bytes of JSON, as the HTTP header says it. None for all of them.
    """

    model: Served
    body: bytes
    json_length: str | None

    @property
    def kind(self) -> tuple[str, bool, int]:
        """Requests of one kind take about the same time."""
        return self.model.name, self.json_length is None, len(self.body).bit_length()


@dataclass
class Answer:
    """The body of an answer, with its bytes of JSON where tensors follow, its examples and its seconds of work."""

    status: int
    body: bytes
    json_length: int | None = None
    examples: int = 0
    seconds: float = 0.0


class Batcher:
    """Decides where a request is computed.

    A short request is not worth a thread's waking up. The event loop computes it after the current turn, together with
    every other that came in this turn. A long one would hold up the loop, so a thread computes it.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="model")
        self._last_seconds: dict[tuple[str, bool, int], float] = {}
        self._waiting: list[tuple[InferenceRequest, asyncio.Future[Answer]]] = []
        self._waiting_seconds = 0.0

    async def answer(self, request: InferenceRequest) -> Answer:
        """The answer to one request."""
        loop = asyncio.get_running_loop()
        expected = self._last_seconds.get(request.kind, math.inf)
        if self._waiting_seconds + expected > LOOP_SECONDS:
            (answer,) = await loop.run_in_executor(self._threads, answer_all, [request])
        else:
            if not self._waiting:
                loop.call_soon(self._answer_waiting)
            future: asyncio.Future[Answer] = loop.create_future()
            self._waiting.append((request, future))
            self._waiting_seconds += expected
            answer = await future
        # A refusal takes less time than the work that it replaces.
        if answer.status == 200 or answer.seconds > expected:
            self._last_seconds[request.kind] = answer.seconds
        return answer

    def _answer_waiting(self) -> None:
        waiting, self._waiting, self._waiting_seconds = self._waiting, [], 0.0
        answers = answer_all([request for request, _ in waiting])
        for (_, future), answer in zip(waiting, answers, strict=True):
            if not future.done():  # cancelled as the server ends
                future.set_result(answer)


def answer_all(requests: Sequence[InferenceRequest]) -> list[Answer]:
    """An answer to each request. An error in one does not reach the others. Threads may call this at once."""
    start = time.perf_counter()
    answers: dict[int, Answer] = {}
    groups: dict[tuple[str, ...], list[tuple[int, Inference]]] = {}
    for index, request in enumerate(requests):
        try:
            inference = read_request(request.model, request.body, request.json_length)
            request.model.check(inference.values)
        except Exception as error:
            answers[index] = _refusal(error, request.model)
        else:
            key = (request.model.name, *(name for name, _ in inference.outputs))
            groups.setdefault(key, []).append((index, inference))
    for group in groups.values():
        for batch in _batches(group):
            indices, inferences = zip(*batch, strict=True)
            answers.update(zip(indices, _run(requests[indices[0]].model, inferences), strict=True))
    seconds = (time.perf_counter() - start) / len(requests)
    for answer in answers.values():
        answer.seconds = seconds
    return [answers[index] for index in range(len(requests))]


def _batches(group: Sequence[tuple[int, Inference]]) -> Iterator[list[tuple[int, Inference]]]:
    batch: list[tuple[int, Inference]] = []
    examples = 0
    for index, inference in group:
        if batch and examples + inference.examples > BATCH_LIMIT:
            yield batch
            batch, examples = [], 0
        batch.append((index, inference))
        examples += inference.examples
    yield batch


def _run(model: Served, inferences: Sequence[Inference]) -> list[Answer]:
    """Answers to checked requests for the same outputs."""
    try:
        values = inferences[0].values
        if len(inferences) > 1:
            values = {name: np.concatenate([inference.values[name] for inference in inferences]) for name in values}
        results = model.run(values, [name for name, _ in inferences[0].outputs])
        answers, start = [], 0
        for inference in inferences:
            end = start + inference.examples
            body, json_length = write_response(model, inference, [result[start:end] for result in results])
            answers.append(Answer(200, body, json_length, inference.examples))
            start = end
        return answers
    except Exception as error:
        return [_refusal(error, model) for _ in inferences]


def _refusal(error: Exception, model: Served) -> Answer:
    if isinstance(error, InputError | RunError):
        status, message = 400 if isinstance(error, InputError) else 500, str(error)
    elif isinstance(error, MemoryError):
        status, message = 500, "not enough memory for this request; send fewer examples"
    else:
        # A bug. Without an answer the client would wait for ever.
        logging.getLogger("dgrad").error("a request to %s failed", model.name, exc_info=error)
        status, message = 500, "the server failed; its error output says how"
    return Answer(status, json.dumps({"error": message}, separators=(",", ":")).encode())
