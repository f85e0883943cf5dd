"""How long the sentences of README and docs are: python tests/support/sentences.py prints a line a page."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONG = 30  # words
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|Fig|Eq|eq|approx|resp)\.")


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and docs/, as far as they are there."""
    every = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    return [page for page in every if page.exists()]


def prose(markdown: str) -> list[str]:
    """The paragraphs and list items of a page: no code, no tables, no headings, no pictures."""
    text = re.sub(r"^```.*?^```", "\n", markdown, flags=re.M | re.S)
    text = re.sub(r"^(#|\||!\[|<|    ).*$", "\n", text, flags=re.M)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def sentences(markdown: str) -> list[int]:
    """The number of words of each sentence."""
    found = []
    for block in prose(markdown):
        block = ABBREVIATIONS.sub(lambda m: m[1].replace(".", ""), block)
        for sentence in re.split(r"(?<=[.!?])[)\"*]*\s+(?=[\"(*]*[A-Z0-9a-z])", block):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > 1:
                found.append(len(words))
    return found


def summary(name: str, lengths: list[int]) -> str:
    """A line: how many sentences, how long on average, and which part of them is long."""
    mean, long = sum(lengths) / len(lengths), sum(n > LONG for n in lengths) / len(lengths)
    return f"{name:24} {len(lengths):4} sentences of {mean:5.1f} words, {long:5.1%} over {LONG}"


if __name__ == "__main__":
    found = {page.name: sentences(page.read_text()) for page in pages()}
    for name, lengths in found.items():
        print(summary(name, lengths))
    print(summary("all", [n for lengths in found.values() for n in lengths]))
