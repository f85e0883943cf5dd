"""One grammar for what is wrong with an argument: ``NAME must be EXPECTED, got VALUE``, or torch.optim's sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svag_fast.numeric import integer, number
from svag_fast.optim import SVAG, SVAGAdam, SVAGRMSprop

ROOT = Path(__file__).resolve().parents[1]
# Of an argument; ConfigError is a ValueError, and BackendError is about an argument's value or what can serve it.
ERRORS = {"ValueError", "TypeError", "ConfigError", "BackendError"}
GRAMMAR = re.compile(r".+ must be .+, got .", re.S)
OTHERS = {
    r"\{(path|where|compressed|folder)\}": "says what is wrong in a file or a folder, by its path",
    r"EXPR must_be\(": "numeric.py's writer of this grammar",
    r"(\{scope\.label\}|param group \{i\} of the loaded state|replica \{s\}): \{error\}$": (
        "names the place of an error that was written elsewhere"
    ),
    r"\{str\(error\)\}$|EXPR str\(error\)|\{error\}\{advice\}": "hands on an error that was written elsewhere",
    r"its parts are larger than the file|the checksum of its part": "a checkpoint's, which CheckpointError names",
    r"\{(first\.name|seen\[numbers\]|first|name)\}( and|:)? (these )?(\{|has |differ )": "of runs that do not fit",
    r"unknown setting": "a key is wrong, and no value",
    r"--tensorboard needs a package": "a package is missing",
    r"backend \{name!r\}\{asked\} can't serve": "an op that the backend lacks; the name is right",
    r"something replaced the replicas' forward": "a state of the replicas",
    r"\{name\.format\(.* depend on other rows": "what the check of the model's rows found",
}


def body(node: ast.expr) -> str:
    """Return a message's text, its values in braces."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            body(v) if isinstance(v, ast.Constant) else ast.unparse(ast.JoinedStr([v]))[2:-1] for v in node.values
        )
    if isinstance(node, ast.BinOp):
        return body(node.left) + body(node.right)
    return f"EXPR {ast.unparse(node)}"


def messages() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of each error about an argument."""
    for path in sorted([*(ROOT / "svag_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if ast.unparse(node.exc.func) in {*ERRORS, "type(error)"} and node.exc.args:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", body(node.exc.args[0])


def test_errors_about_arguments_follow_the_grammar() -> None:
    found = list(messages())
    others = [(place, text) for place, text in found if not GRAMMAR.match(text)]
    assert len(others) < len(found) / 4
    assert [f"{place}: {text}" for place, text in others if not any(re.match(other, text) for other in OTHERS)] == []


@pytest.mark.parametrize("other", OTHERS, ids=OTHERS.values())
def test_each_exception_is_needed(other: str) -> None:
    assert any(re.match(other, text) and not GRAMMAR.match(text) for _, text in messages())


@pytest.mark.parametrize(
    "text",
    ["Invalid l: 0.5 (expected a number >= 1)", "inputs is int64: expected float32", "seeds is empty", "l must be 1"],
)
def test_other_sentences_do_not_pass_as_the_grammar(text: str) -> None:
    assert not GRAMMAR.match(text)
    assert not any(re.match(other, text) for other in OTHERS)


def test_numbers_are_refused_in_the_grammar() -> None:
    with pytest.raises(ValueError, match=r"^l must be a finite number >= 1, got 0\.5$"):
        number("l", 0.5, least=1)
    with pytest.raises(TypeError, match=r"^l must be a number, got '2' \(str\)$"):
        number("l", "2")
    with pytest.raises(ValueError, match=r"^seed must be an integer >= 0 and <= 3, got 4$"):
        integer("seed", 4, least=0, most=3)
    with pytest.raises(TypeError, match=r"^seed must be an integer, got 1\.0 \(float\)$"):
        integer("seed", 1.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "option"),
    [
        (SVAG, torch.optim.SGD, {"lr": -1.0}),
        (SVAG, torch.optim.SGD, {"momentum": -0.5}),
        (SVAG, torch.optim.SGD, {"weight_decay": -0.5}),
        (SVAG, torch.optim.SGD, {"lr": torch.ones(2)}),
        (SVAGAdam, torch.optim.Adam, {"lr": -1.0}),
        (SVAGAdam, torch.optim.Adam, {"betas": (1.5, 0.9)}),
        (SVAGAdam, torch.optim.Adam, {"betas": (0.9, 1.5)}),
        (SVAGAdam, torch.optim.Adam, {"eps": -1.0}),
        (SVAGAdam, torch.optim.Adam, {"weight_decay": -0.5}),
        (SVAGRMSprop, torch.optim.RMSprop, {"alpha": -0.5}),
        (SVAGRMSprop, torch.optim.RMSprop, {"eps": -1.0}),
    ],
)
def test_an_optimizers_error_begins_with_torchs(ours: type, theirs: type, option: dict[str, object]) -> None:
    option = {"lr": 0.1, **option}
    with pytest.raises(ValueError) as torchs:  # noqa: PT011 -- torch's text is what is asked for
        theirs([torch.ones(1)], **option)
    with pytest.raises(ValueError, match="^" + re.escape(str(torchs.value))):
        ours([torch.ones(1)], **({"l": 1} | option))
