"""Short sentences and plain words: in README, CONTRIBUTING and docs, and in all sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sentences import LONG, pages, prose, sentences

ROOT = Path(__file__).resolve().parents[1]
MEAN, LONG_PART = 17, 0.08  # words a sentence; the part of the sentences that may be longer than LONG words
# Old-fashioned, or one more meaning for a word that has one. A comment's phrase may end its line.
_GAP = r"[\s#/]+"
WORDS_TO_LEAVE = re.compile(
    rf"\b(foretells?|foretold|lies?|lay|lying|h[eo]lds?{_GAP}(?:to|against)|anew|manners?|kin"
    rf"|(?:goes|go|went|gone|going){_GAP}on|stands?{_GAP}for|can(?:'t|not){_GAP}be{_GAP}had)\b",
    re.I,
)


def within_limits(lengths: list[int]) -> bool:
    return sum(lengths) <= MEAN * len(lengths) and sum(n > LONG for n in lengths) <= LONG_PART * len(lengths)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_pages_sentences_are_short(page: Path) -> None:
    lengths = sentences(page.read_text())
    assert lengths
    assert within_limits(lengths), f"{sum(lengths) / len(lengths):.1f} words a sentence, the longest has {max(lengths)}"


def test_long_sentences_are_counted_as_such() -> None:
    short, long = "Three short words. ", "word " * (LONG + 1) + "end. "
    assert sentences(short * 9 + long) == [3] * 9 + [LONG + 2]
    assert within_limits(sentences(short * 12 + long))
    assert not within_limits(sentences(short * 10 + long))  # too many of them are long
    assert not within_limits([MEAN + 1])
    assert sentences("# No heading\n\n| no | table |\n\n```\nno code\n```\n\n- An item counts.\n") == [3]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_pages_words_are_plain(page: Path) -> None:
    assert [found[0] for block in prose(page.read_text()) for found in WORDS_TO_LEAVE.finditer(block)] == []


def test_the_sources_words_are_plain() -> None:
    """Docstrings, help texts, messages, comments and names, of the tests too."""
    said = []
    for folder in ("svag_fast", "kernels", "csrc", "tests", "bench", "examples"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh") and path != Path(__file__).resolve():
                text = path.read_text()
                said += [f"{path.name}: {text[: m.end()][-40:]}" for m in WORDS_TO_LEAVE.finditer(text)]
    assert not said, "\n".join(said)
