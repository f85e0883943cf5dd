"""Reads the one kernel of a PTX file into a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"[$%\w]+:\s*$")


class UnsupportedError(Exception):
    """PTX that the simulator has no meaning for: it says so, and guesses nothing."""


@dataclass(frozen=True)
class Instruction:
    """``@[!]guard op operands``; a vector operand keeps its braces."""

    op: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.op.split("."))

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.op} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Program:
    """A kernel: its parameters' types in order, its threads a block, its code, and where its labels point."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    tables: dict[str, tuple[str, ...]]
    """The labels that an indexed branch chooses from, by the table's own."""


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return tuple(part for part in (*found, text[start:].strip()) if part)


def parse(ptx: str) -> Program:
    """Read the entry point; directives say nothing about what it does, but for the threads of a block."""
    head, _, rest = ptx[ptx.index(".entry") :].partition("{")
    name, parameters = re.search(r"\.entry\s+(\w+)", head), re.findall(r"\.param\s+\.(\w+)", head)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    if name is None or threads is None:
        raise UnsupportedError("a kernel without a name or a number of threads")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    tables: dict[str, tuple[str, ...]] = {}
    label = ""
    for statement in _statements(re.sub(r"//[^\n]*", "", rest)):
        if statement.endswith(":"):
            label = statement[:-1]
            labels[label] = len(code)
        elif statement.startswith(".branchtargets"):
            tables[label] = split_operands(statement.removeprefix(".branchtargets"))
        elif not statement.startswith("."):
            found = _STATEMENT.fullmatch(statement)
            if found is None:
                raise UnsupportedError(f"{name[1]}: {statement!r}")
            negated, guard, op, operands = found.groups()
            code.append(Instruction(op.replace("::cta", ""), split_operands(operands), guard, bool(negated)))
    return Program(name[1], tuple(parameters), int(threads[1]), tuple(code), labels, tables)


def _statements(body: str) -> list[str]:
    """Cut at semicolons and labels, up to the brace that closes the kernel; a scope's braces bound nothing here."""
    found, current, depth = [], "", 1
    for line in body.splitlines(keepends=True):
        if not current.strip() and re.match(r"\s*\.(loc|file|pragma)\b", line):
            continue
        for c in line:
            outside = not current.strip()
            if c == "{" and outside:
                depth += 1
            elif c == "}" and outside:
                depth -= 1
                if depth == 0:
                    return found
            elif c == ";":
                found.append(current.strip())
                current = ""
            else:
                current += c
                if c == ":" and _LABEL.fullmatch(current.strip()):
                    found.append(current.strip())
                    current = ""
    raise UnsupportedError("the kernel's closing brace is missing")
