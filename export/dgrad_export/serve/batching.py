"""Inference requests to answers; those that wait at the same time are run as one batch. May import numpy and dgrad.errors; no HTTP."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dgrad.errors import InputError, RunError
from dgrad_export.serve.protocol import Inference, read_request, write_response
from dgrad_export.serve.served_model import Served

EXAMPLES_TOGETHER = 64
"""Up to which requests are joined: a larger batch takes no less time for an example."""


@dataclass(frozen=True)
class Asked:
    """An inference request: its body, of which `json_length` bytes are JSON, as the HTTP header says it (None: all)."""

    model: Served
    body: bytes | memoryview
    json_length: str | None


@dataclass
class Answer:
    """A body in pieces, how much of it is JSON where tensors follow, for how many examples it is and what it took."""

    status: int
    pieces: list[bytes | memoryview]
    json_length: int | None = None
    examples: int = 0
    seconds: float = 0.0


def refusal(status: int, message: str) -> Answer:
    """An answer that says what was expected."""
    return Answer(status, [json.dumps({"error": message}, separators=(",", ":")).encode()])


def answer_all(requests: Sequence[Asked]) -> list[Answer]:
    """An answer to each; what is wrong with one of them is no other's concern. May be called from several threads."""
    start = time.perf_counter()
    answers: dict[int, Answer] = {}
    groups: dict[tuple[str, ...], list[tuple[int, Inference]]] = {}
    for place, asked in enumerate(requests):
        try:
            inference = read_request(asked.model, asked.body, asked.json_length)
            asked.model.check(inference.values)
        except Exception as error:
            answers[place] = _refusal_for(error, asked.model)
        else:
            names = (asked.model.name, *(name for name, _ in inference.outputs))
            groups.setdefault(names, []).append((place, inference))
    for group in groups.values():
        for batch in _batches(group):
            places, inferences = zip(*batch, strict=True)
            answers.update(zip(places, _run(requests[places[0]].model, inferences), strict=True))
    each = (time.perf_counter() - start) / len(requests)
    for answer in answers.values():
        answer.seconds = each
    return [answers[place] for place in range(len(requests))]


def _batches(group: Sequence[tuple[int, Inference]]) -> Iterator[list[tuple[int, Inference]]]:
    batch: list[tuple[int, Inference]] = []
    for place, inference in group:
        if batch and sum(other.examples for _, other in batch) + inference.examples > EXAMPLES_TOGETHER:
            yield batch
            batch = []
        batch.append((place, inference))
    yield batch


def _run(model: Served, inferences: Sequence[Inference]) -> list[Answer]:
    """Answers to checked requests for the same outputs."""
    try:
        values = inferences[0].values
        if len(inferences) > 1:
            values = {name: np.concatenate([one.values[name] for one in inferences]) for name in model.inputs}
        results = model.run(values, [name for name, _ in inferences[0].outputs])
        answers, start = [], 0
        for one in inferences:
            end = start + one.examples
            pieces, json_length = write_response(model, one, [result[start:end] for result in results])
            answers.append(Answer(200, pieces, json_length, one.examples))
            start = end
        return answers
    except Exception as error:
        return [_refusal_for(error, model) for _ in inferences]


def _refusal_for(error: Exception, model: Served) -> Answer:
    if isinstance(error, InputError):
        return refusal(400, str(error))
    if isinstance(error, RunError):
        return refusal(500, str(error))
    if isinstance(error, MemoryError):
        return refusal(500, "not enough memory for this request; send fewer examples")
    # A bug; without an answer the client would wait for ever.
    logging.getLogger("dgrad").error("a request to %s failed", model.name, exc_info=error)
    return refusal(500, "the server failed; its error output says how")
