"""How the house is written: expected errors name their message, and pages are easy to read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dgrad", "plugins", "cli", "export", "tests", "benchmarks", "examples")

# Expected errors


def without_message(source: str) -> list[int]:
    """The lines of each `pytest.raises` and `pytest.warns` that any error of its type satisfies.

    >>> without_message("pytest.raises(ValueError)\\npytest.raises(ValueError, match='at least 1')")
    [1]
    >>> without_message("raises(ValueError, match='.*')\\npytest.warns(UserWarning, match=pattern)")
    [1]
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).removeprefix("pytest.") not in ("raises", "warns"):
            continue
        patterns = [keyword.value for keyword in node.keywords if keyword.arg == "match"]
        if not patterns or any(isinstance(it, ast.Constant) and _matches_anything(it.value) for it in patterns):
            lines.append(node.lineno)
    return sorted(lines)


def _matches_anything(pattern: object) -> bool:
    return isinstance(pattern, str) and all(re.search(pattern, text) for text in ("x", "?", "x\n?"))


def test_every_expected_error_names_its_message() -> None:
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(sources) > 200
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources
        for line in without_message(path.read_text(encoding="utf-8"))
    ]
    assert places == []


# Pages

REWRITTEN = [
    "docs/architecture.md",
    "docs/attributes.md",
    "docs/guides/deep-decoders.md",
    "docs/guides/engineering-edges.md",
    "docs/guides/epsilon.md",
    "docs/guides/in-your-own-model.md",
    "docs/serving.md",
    "docs/settings.md",
]
"""The pages that are held to the limits below. Whoever rewrites a page adds it."""
WORDS_A_SENTENCE, LONGEST_SENTENCE, WORDS_A_PARAGRAPH, COLUMNS = 17, 35, 60, 100


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a Markdown text that are no code, table, heading or comment, with their numbers. Empty ones too."""
    fenced = comment = False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        comment = comment or line.startswith("<!--")
        if not (fenced or fence or comment or line.startswith(("#", "|", "    "))):
            yield number, line
        elif not fenced:
            yield number, ""
        fenced ^= fence
        comment = comment and "-->" not in line


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items, each in one line. A picture and a link count as their words, code as one word.

    >>> paragraphs("One\\ntwo.\\n\\n- [Three](a.md)\\n- `four five`\\n  six.")
    ['One two.', 'Three', 'x six.']
    """
    blocks: list[list[str]] = [[]]
    for _, line in prose(text):
        item = re.match(r"\s*([-*]|\d+\.)\s+", line)
        if item or not line.strip():
            blocks.append([])
        if line.strip():
            blocks[-1].append(line[item.end() if item else 0 :].strip())
    joined = (" ".join(block) for block in blocks if block)
    return [
        re.sub(r"`[^`]*`", "x", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", block)).replace("**", "") for block in joined
    ]


def sentences(paragraph: str) -> list[str]:
    """Its sentences: each ends with a mark that a capital letter, a number or code follows.

    >>> sentences("It is 1.5 s. Is it? x does, e.g. here.")
    ['It is 1.5 s.', 'Is it?', 'x does, e.g. here.']
    """
    return re.split(r"(?<=[.!?:])\s+(?=[A-Z0-9]|x\b)", paragraph)


def faults(text: str) -> list[str]:
    """What in a page is above the limits."""
    found = [
        f"line {number} has {len(line)} columns; expected at most {COLUMNS}"
        for number, line in prose(text)
        if len(line) > COLUMNS
    ]
    blocks = paragraphs(text)
    for block in blocks:
        if (words := len(block.split())) >= WORDS_A_PARAGRAPH:
            found.append(f"{words} words in a paragraph, expected under {WORDS_A_PARAGRAPH}: {block}")
    lengths = []
    for sentence in (sentence for block in blocks for sentence in sentences(block)):
        lengths.append(words := len(sentence.split()))
        if words > LONGEST_SENTENCE:
            found.append(f"{words} words in a sentence, expected at most {LONGEST_SENTENCE}: {sentence}")
    if lengths and mean(lengths) > WORDS_A_SENTENCE:
        found.append(f"{mean(lengths):.1f} words a sentence; expected at most {WORDS_A_SENTENCE}")
    return found


@pytest.mark.parametrize("page", REWRITTEN)
def test_rewritten_pages_are_easy_to_read(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert paragraphs(text)
    assert faults(text) == []


def _words(count: int) -> str:
    return " ".join(["a"] * (count - 1) + ["end."])


def test_a_page_within_the_limits_has_no_faults() -> None:
    sentence = _words(17).capitalize()
    assert faults(f"# {_words(40)}\n\n{sentence}\n{sentence} {sentence[:5]}.\n") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_words(36), ["36 words in a sentence", "36.0 words a sentence"]),
        ("Short. Short. Short. " + _words(36).capitalize(), ["36 words in a sentence"]),
        (f"{_words(18)}\n\n- {_words(18)}", ["18.0 words a sentence; expected at most 17"]),
        ("\n".join(["Few words here."] * 20), ["60 words in a paragraph, expected under 60"]),
        ("Short.\n\n" + "x" * 101, ["line 3 has 101 columns"]),
        ("Short.\n\n<!-- " + _words(70) + " -->", []),
        ("Short.\n\n```sh\n" + _words(70) + "\n\n# no heading\n```\n\n    " + _words(70), []),
        ("| a | " + _words(70) + " |\n|---|---|", []),
        ("\n".join(f"{number}. {_words(12)}" for number in range(10)), []),
        ("See [it](https://" + "a" * 50 + ") and `" + "code " * 60 + "`.", ["line 1 has 376 columns"]),
    ],
)
def test_what_is_above_the_limits_is_found(text: str, expected: list[str]) -> None:
    found = faults(text)
    assert len(found) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(found, expected, strict=True))


def test_a_page_that_is_missing_fails() -> None:
    with pytest.raises(FileNotFoundError, match="no_such_page"):
        test_rewritten_pages_are_easy_to_read("docs/no_such_page.md")
