"""Every Python block of the README and of the documentation is run, or says why it is not."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dgrad

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
EXAMPLES = "\n".join(path.read_text("utf-8") for path in sorted(ROOT.glob("examples/**/*.py")))
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n+)?```python\n(.*?)```", re.DOTALL)
ELSEWHERE = {
    "docs/guides/in-your-own-model.md": "test_in_your_own_model.py",  # each block
    'codec = Codec("model")': "test_readme.py",  # needs a trained model
    "check_estimator(dgrad.estimator(": "test_docs.py",  # takes seconds
}
"""Pages, and lines of blocks, that another test of this folder runs."""


def _sequences() -> dict[str, Any]:
    sites, encoder, decoder = 5, torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)
    return {
        "torch": torch,
        "dgrad": dgrad,
        "T": sites,
        "lengths": torch.tensor([5, 2, 3]),
        "x": torch.rand(3, sites, 4),
        "encoder": lambda x: encoder(x).unsqueeze(-2),
        "decoder": lambda codes, mask: decoder(codes.squeeze(-2)) * mask.unsqueeze(-1),
        "loss_of": lambda outputs, x: (outputs - x).square().sum((-2, -1)),
        "estimator": dgrad.estimator("rloo"),
    }


def _estimators() -> dict[str, Any]:
    layer, policy = dgrad.latent("1x3"), torch.nn.Linear(2, 3)
    log_probs, encoder = torch.randn(4, 5, requires_grad=True), torch.nn.Linear(2, 3)
    return {
        "dgrad": dgrad,
        "layer": layer,
        "encoder": lambda x: encoder(x).unsqueeze(-2),
        "x": torch.rand(6, 2),
        "target": layer.sample(torch.zeros(6, 1, 3))[0],
        "estimator": _Either(),
        "policy": lambda observation: policy(observation).unsqueeze(-2),
        "observation": torch.rand(6, 2),
        "environment": SimpleNamespace(step=lambda actions: actions.squeeze(-1).float()),
        "logits": torch.zeros(6, 1, 3, requires_grad=True),
        "model": lambda codes: codes[..., 0, 0],
        "losses": torch.rand(4, 5),
        "log_probs": log_probs,
    }


class _Either:
    """What the page calls an estimator: one that draws, or one whose codes have a gradient."""

    draw = staticmethod(dgrad.estimator("reinforce").draw)
    codes = staticmethod(dgrad.estimator("st-gumbel-softmax").codes)


def _refining() -> dict[str, Any]:
    layer = dgrad.latent("2x3")
    return {"dgrad": dgrad, "layer": layer, "logits": torch.zeros(4, 2, 3), "loss": lambda codes: codes[..., 0].sum(-1)}


def _edges() -> dict[str, Any]:
    return {"estimator": dgrad.estimator("direct", epsilon="geometric:1:0.1"), "steps": 3}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/sequences.md": _sequences,
    "docs/estimators.md": _estimators,
    "docs/refining.md": _refining,
    "docs/guides/engineering-edges.md": _edges,
}
"""The names that a page takes from its reader's program."""


def _to_run() -> list[tuple[str, str]]:
    return [
        (page, block)
        for page, text in PAGES.items()
        for reason, block in BLOCK.findall(text)
        if not reason and page not in ELSEWHERE and not _in_an_example(block)
    ]


def _in_an_example(block: str) -> bool:
    return any(textwrap.indent(block, " " * columns) in EXAMPLES for columns in (0, 4, 8))


@pytest.mark.parametrize("page", sorted({page for page, _ in _to_run()}))
def test_the_blocks_of_a_page_run_one_after_the_other(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = GIVEN[page]() if page in GIVEN else {}
    for block in (block for of_page, block in _to_run() if of_page == page):
        if not any(line in block for line in ELSEWHERE):
            exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("text", ELSEWHERE)
def test_what_is_run_elsewhere_is_there(text: str) -> None:
    assert text in PAGES or any(text in page for page in PAGES.values())
    assert (Path(__file__).parent / ELSEWHERE[text]).exists()


def test_python_stands_in_fences_that_say_so() -> None:
    """Where no test would find it: indented, or in a fence without a language."""
    for page, text in PAGES.items():
        without = re.sub(r"```\w+\n.*?```", "", text, flags=re.DOTALL)
        for block in re.findall(r"(?:^|\n\n)((?:    [^\n]*\n)+)", without) + re.findall(
            r"```\n(.*?)```", without, re.S
        ):
            try:
                tree = ast.parse(textwrap.dedent(block))
            except SyntaxError:
                continue
            assert not any(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in tree.body), (
                page,
                block,
            )
