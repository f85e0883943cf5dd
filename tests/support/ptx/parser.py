"""Reads a kernel of a PTX file into a list of instructions, with its parameters and its shared variables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"[$%\w]+:\s*$")
# A parameter or a shared variable: perhaps aligned, of a number's type or an array of bytes, the dots before words.
_VARIABLE = re.compile(r"\.(?:param|shared)((?:\s+\.\w+(?:\s+\d+)?)+)\s+([$\w]+)(?:\[(\d+)\])?")


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

    @cached_property
    def by_warps(self) -> bool:
        """Whether the threads of a warp, or those of them that its mask names, do it together."""
        return self.parts[0] in ("shfl", "ldmatrix", "mma") or self.parts[:2] in (("bar", "warp"), ("barrier", "warp"))

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.op} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Variable:
    """A parameter, or a variable in shared memory: bytes from an address of its own space on."""

    name: str
    address: int
    size: int


@dataclass(frozen=True)
class Program:
    """A kernel: its parameters in order, its shared variables, its code, and where its labels point."""

    name: str
    parameters: tuple[Variable, ...]
    shared: tuple[Variable, ...]
    threads: int
    """Of a block: as many, or at most so many; 0 where the kernel does not say."""
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    tables: dict[str, tuple[str, ...]]
    """The labels that an indexed branch chooses from, by the table's own."""

    def unit(self, space: str) -> int:
        """Bytes, no more than any access to the space has."""
        sizes = {8}
        for i in self.code:
            if i.parts[0] == "cp" and len(i.operands) > 2:
                sizes.add(int(i.operands[2], 0))
            elif i.parts[0] in ("ld", "st", "atom") and space in i.parts:
                sizes.add(int(i.parts[-1][1:]) // 8)
        return min(sizes)


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return tuple(part for part in (*found, text[start:].strip()) if part)


def parse(ptx: str, kernel: str = r"\w+") -> Program:
    """Read one entry point; directives say nothing about what it does, but for the threads of a block."""
    entry = re.search(rf"\.entry\s+({kernel})\s*\(", ptx)
    if entry is None:
        raise UnsupportedError(f"no kernel {kernel}")
    name, end = entry[1], ptx.find(".entry", entry.end())
    head, _, rest = re.sub(r"//[^\n]*", "", ptx[entry.end() : end if end > 0 else None]).partition("{")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    shared: list[str] = []
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    tables: dict[str, tuple[str, ...]] = {}
    label = ""
    for statement in _statements(rest):
        if statement.endswith(":"):
            label = statement[:-1]
            labels[label] = len(code)
        elif statement.startswith(".branchtargets"):
            tables[label] = split_operands(statement.removeprefix(".branchtargets"))
        elif statement.startswith(".shared"):
            shared.append(statement)
        elif not statement.startswith((".reg", ".loc", ".file", ".pragma")):
            found = _STATEMENT.fullmatch(statement)
            if found is None:
                raise UnsupportedError(f"{name}: {statement!r}")
            negated, guard, op, operands = found.groups()
            code.append(Instruction(op.replace("::cta", ""), split_operands(operands), guard, bool(negated)))
    bound = int(threads[1]) if threads else 0
    return Program(name, _variables(head), _variables("\n".join(shared)), bound, tuple(code), labels, tables)


def _variables(text: str) -> tuple[Variable, ...]:
    """Place declarations one behind the other, each at a multiple of its alignment."""
    found: list[Variable] = []
    end = 0
    for words, name, count in _VARIABLE.findall(text):
        bits, aligned = re.findall(r"\.[bfsu](\d+)", words), re.findall(r"\.align\s+(\d+)", words)
        size = int(bits[0]) // 8
        alignment = int(aligned[0]) if aligned and ".ptr" not in words else size
        start = -(-end // alignment) * alignment
        found.append(Variable(name, start, size * int(count or 1)))
        end = start + found[-1].size
    return tuple(found)


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
