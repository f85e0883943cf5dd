"""The text of the GPU report: a verdict on every section, then tables of what they found."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def markdown(about: Row, sections: list[Row], *, dry: bool) -> str:
    """The report to read, from what the JSON file holds."""
    lines = [f"# GPU report: {about['device']}", ""]
    if dry:
        lines += ["Dry run on a CPU: no time in it means anything.", ""]
    lines += ["## Verdicts", ""]
    lines += [f"- **{s['name']}** {s['status']}" + (f" ({s['seconds']} s)" if s["seconds"] else "") for s in sections]
    lines += ["", "## Machine and sources", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    for section in sections:
        name, rows = section["name"], section["rows"]
        if name.endswith("float64"):
            lines += _checks(name, rows)
        elif name == "times":
            lines += _times(rows, dry=dry)
        elif name == "ncu" and rows:
            lines += ["## ncu", "", *table(rows)]
        if section["lines"] and (not section["status"].startswith("passed") or name.startswith(("compute", "tests"))):
            lines += [f"## {name}: output", "", "```", *section["lines"], "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(rows: list[Row], columns: list[str] | None = None) -> list[str]:
    """A Markdown table, and an empty line after it; numbers with three digits that count."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = [_number(v) if isinstance(v := row.get(c, ""), float) else str(v) for c in columns]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*lines, ""]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _checks(name: str, rows: list[Row]) -> list[str]:
    """A line a kernel, and each check that was not passed."""
    if not rows:
        return []
    summary = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_it = [row for row in rows if row["kernel"] == kernel]
        counts = {
            status: sum(row["status"] == status for row in of_it) for status in ("ok", "wrong", "failed", "skipped")
        }
        worst = max((row for row in of_it if row["status"] == "ok"), key=lambda row: row["worst"], default=None)
        named = f"{worst['worst']:.2g} ({worst['case']})" if worst else ""
        summary.append({"kernel": kernel, **counts, "largest error over its bound, of the ok": named})
    lines = [f"## {name}", "", *table(summary)]
    bad = [
        {k: row[k] for k in ("kernel", "case", "status", "why")} for row in rows if row["status"] in ("wrong", "failed")
    ]
    return lines + (table(bad) if bad else [])


def _times(rows: list[Row], *, dry: bool) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Times", "",
        "Medians of GPU time; L2 cache written over before each. \"MB\" is the memory that has to be moved at least; "
        "\"of peak\" is the fraction of the rate measured on this device that is named beside it.", "",
    ]  # fmt: skip
    lines += [] if dry else targets(rows)
    order = ["kernel", "us", "spread %", "GB/s", "TFLOP/s", "of peak", "peak", "MB", "timed by"]
    for group in dict.fromkeys(row["group"] for row in rows):
        timed = [row for row in rows if row["group"] == group and "us" in row]
        lines += [f"### {group}", ""]
        lines += table(timed, [c for c in order if any(c in row for row in timed)]) if timed else []
        for row in rows:
            if row["group"] == group and "skipped" in row:
                lines.append(f"- {row['kernel']}: skipped: {row['skipped']}")
        lines += [] if lines[-1] == "" else [""]
    return lines


def times_verdict(rows: list[Row]) -> str:
    """The figures that matter most, in half a line."""
    found = []
    of_peak = {(row["group"], row["kernel"]): row["of peak"] for row in rows if "of peak" in row}
    steps = [f"{b} {of_peak[key]:.2f}" for b in ("cuda", "triton") if (key := ("update, 60M", f"step, {b}")) in of_peak]
    if steps:
        found.append(f"the step on 60 M parameters at {', '.join(steps)} of the copy rate")
    layers = [value for (group, kernel), value in of_peak.items() if group.endswith(", tf32") and kernel == "the tiles"]
    if layers:
        found.append(f"the weight gradient with norms (tf32) at {min(layers):.2f} to {max(layers):.2f} of its peak")
    return "".join(f"; {text}" for text in found)


def targets(rows: list[Row]) -> list[str]:
    """Say of each target whether it was met, and by how much not."""

    def value(group: str, kernel: str, column: str) -> float:
        found = [row[column] for row in rows if (row["group"], row["kernel"]) == (group, kernel) and column in row]
        return float(found[0]) if found else float("nan")

    def line(what: str, found: float, bound: float, *, least: bool) -> Row:
        met = found >= bound if least else found <= bound
        verdict = "not measured" if found != found else "met" if met else "MISSED"
        return {
            "target": what,
            "bound": f"{'>=' if least else '<='} {bound}",
            "found": f"{found:.2f}",
            "verdict": verdict,
        }

    found = []
    for backend in ("cuda", "triton"):
        ratio = value("update, 60M", f"step, {backend}", "of peak")
        found.append(line(f"60 M parameters, {backend}: of the copy rate", ratio, 0.92, least=True))
    name = "update, preresnet32"
    ratio = value(name, "eager PyTorch", "us") / value(name, "step, cuda", "us")
    found.append(line("preresnet32's list: eager / ours, GPU time", ratio, 8, least=True))
    for net in ("preresnet32", "vgg16", "mlp"):
        ratio = value(f"norms, {net}", "with norms", "us") / value(f"norms, {net}", "plain", "us")
        found.append(line(f"{net}: with norms / plain", ratio, 1.10, least=False))
    return table(found)
