"""What scripts/benchmark.py shows of a result: a line per row, tables in Markdown, and plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from machine import machine_in_words
from tasks import draw, line

MARKS = ("<!-- benchmark -->", "<!-- /benchmark -->")
LABELS = {
    "ours": "xLSTM (ours)",
    "transformers (inference)": "xLSTM (Transformers)",
    "llama": "Llama",
    "mamba2": "Mamba2",
}
MET, MISSED, MEASURED = "#2a7f9e", "#d98032", "#9aa5ab"

Result = dict[str, Any]


def verdict(claim: Result) -> str:
    """The ratio, and its target if it has one."""
    for bound, sign in (("at_least", "≥"), ("at_most", "≤")):
        if bound in claim:
            return f"{claim['value']:.2f} ({sign} {claim[bound]:g}{'' if is_met(claim) else ', missed'})"
    return f"{claim['value']:.2f}"


def is_met(claim: Result) -> bool:
    at_least, at_most = claim.get("at_least", -float("inf")), claim.get("at_most", float("inf"))
    return bool(at_least <= claim["value"] <= at_most)


def summary(row: Result) -> str:
    """One line of a row, while others are still measured."""
    for reason in ("left_out", "refused"):
        if reason in row:
            return f"{row['work']:42} {reason.replace('_', ' ')}: {row[reason]}"
    ratios = ", ".join(f"{claim['what']} {verdict(claim)}" for claim in row["claims"])
    speeds = ", ".join(f"{name} {value:,.0f}" for name, value in row.get("tokens_per_second", {}).items())
    memory = ", ".join(f"{name} {m['peak'] / 2**20:,.0f} MiB" for name, m in row.get("memory", {}).items())
    return f"{row['work']:42} {ratios or 'no target'}; " + "; ".join(
        f"{what} {found}" for what, found in (("tokens/s:", speeds), ("memory:", memory)) if found
    )


def tables(result: Result) -> str:
    """Everything measured, in Markdown."""
    measured = [row for row in result["rows"] if not {"left_out", "refused"} & row.keys()]
    parts: list[str] = []
    for kind, write in (("peer", peer_table), ("itself", self_table), ("other", other_table)):
        if rows := [row for row in measured if row["kind"] == kind]:
            parts.append(write(rows))
    if models := result.get("contexts", {}).get("models"):
        parts.append(context_table(result["contexts"]["lengths"], models))
    absent = [(row["work"], row[why]) for row in result["rows"] for why in ("left_out", "refused") if why in row]
    if absent:
        parts.append("\n".join(f"- not timed: {work}, {why}" for work, why in absent))
    about = result["about"]
    least = f"medians of at least {about['rounds']} turns"
    parts.append(f"`{about['command']}`, {least}; {machine_in_words(about)}.")
    return "\n\n".join(parts) + "\n"


def table(lines: Iterable[list[str]]) -> str:
    """A Markdown table whose columns are aligned; every column but the first to the right."""
    head, *body = lines
    widths = [max(3, *(len(cells[i]) for cells in (head, *body))) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def pad(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    return "\n".join(pad(cells) for cells in (head, rule, *body))


def claim_of(row: Result, *names: str) -> str:
    return next((verdict(claim) for claim in row["claims"] if claim["what"] in names), "")


def per_second(row: Result, contestant: str) -> str:
    speed = row.get("tokens_per_second", {}).get(contestant)
    return "" if speed is None else f"{speed:,.0f}"


def mebibytes(row: Result, contestant: str) -> str:
    memory = row.get("memory", {}).get(contestant)
    return "" if memory is None else f"{memory['peak'] / 2**20:,.0f}"


def peer_table(rows: list[Result]) -> str:
    head = ["Same weights, same results", "fastest peer", "ours, tokens/s", "peer's", "times as fast"]
    head += ["ours, MiB", "peer's", "part of its memory"]
    lines = [head]
    for row in rows:
        peer = row["fastest_peer"]
        least = f" (floor {per_second(row, 'floor')})" if "floor" in row["tokens_per_second"] else ""
        speed = [per_second(row, "ours") + least, per_second(row, peer), claim_of(row, "speed")]
        memory = [mebibytes(row, "ours"), mebibytes(row, peer), claim_of(row, "memory")]
        lines.append([row["work"], peer, *speed, *memory])
    return table(lines)


def self_table(rows: list[Result]) -> str:
    lines = [["Long against short, ours", "long, tokens/s", "short", "time per token", "memory per token"]]
    for row in rows:
        speeds = [f"{speed:,.0f}" for speed in row.get("tokens_per_second", {}).values()] or ["", ""]
        lines.append([row["work"], *speeds, claim_of(row, "time per token"), claim_of(row, "memory per token")])
    return table(lines)


def other_table(rows: list[Result]) -> str:
    """Models of another function: nothing to check, nothing asked."""
    names = list(rows[0]["tokens_per_second"])
    lines = [["Models of about as many parameters, tokens/s (MiB)", *(LABELS[name] for name in names)]]
    for row in rows:
        memory = {name: f" ({mebibytes(row, name)})" if "memory" in row else "" for name in names}
        lines.append([row["work"], *(per_second(row, name) + memory[name] for name in names)])
    return table(lines)


def context_table(lengths: list[int], models: dict[str, Result]) -> str:
    names = {name: f"{LABELS[name]}, {found['parameters'] / 1e6:.1f}M" for name, found in models.items()}
    lines = [["After tokens: ms a token (MiB of state)", *names.values()]]
    for i, length in enumerate(lengths):
        cells = (f"{m['milliseconds'][i]:.1f} ({m['state_bytes'][i] / 2**20:.1f})" for m in models.values())
        lines.append([f"{length:,}", *cells])
    return table(lines)


def marked_document(word: str) -> Path:
    """A document that has both marks, in their order."""
    try:
        text = Path(word).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must name a document of UTF-8 text; {error}") from None
    if MARKS[1] not in text.partition(MARKS[0])[2]:
        raise argparse.ArgumentTypeError(
            f"must have the lines {MARKS[0]} and {MARKS[1]} where tables go; {word} has not"
        )
    return Path(word)


def write_between_marks(path: Path, text: str) -> None:
    """Put the text between the marks of a document, for what stood there."""
    before, begin, rest = path.read_text("utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{begin}\n{text}{end}{after}", "utf-8")


def draw_plots(result: Result, folder: Path) -> None:
    """Draw ratios.png, throughput.png, time_per_token.png and state.png, as far as they were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = [{**claim, "work": row["work"]} for row in result["rows"] for claim in row["claims"]]
    if claims:
        draw(lambda figure: bars(figure, claims), (9.0, 2.2 + 0.25 * len(claims)), folder / "ratios.png")
    if others := [row for row in result["rows"] if row["kind"] == "other" and "tokens_per_second" in row]:
        draw(lambda figure: throughput(figure, others), (6.0, 0.6 + 1.2 * len(others)), folder / "throughput.png")
    if models := result.get("contexts", {}).get("models"):
        lengths = result["contexts"]["lengths"]
        time = curves(lengths, models, "milliseconds", 1.0, "Decoding one token, batch 1", "milliseconds per token")
        memory = curves(lengths, models, "state_bytes", 2**-20, "State or key-value cache, batch 1", "MiB")
        draw(time, (6.0, 4.2), folder / "time_per_token.png")
        draw(memory, (6.0, 4.2), folder / "state.png")


def curves(
    lengths: list[int], models: dict[str, Result], field: str, scale: float, title: str, unit: str
) -> Callable[[Any], None]:
    """One value of every model over the length of its context, both axes logarithmic."""

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for i, (name, found) in enumerate(models.items()):
            label = f"{LABELS[name]}, {found['parameters'] / 1e6:.1f}M"
            axes.plot(lengths, [scale * value for value in found[field]], label=label, **line(i))
        axes.set(xscale="log", yscale="log", xlabel="tokens read before", ylabel=unit, title=title)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    from matplotlib.ticker import LogLocator

    return plot


def throughput(figure: Any, rows: list[Result]) -> None:
    """Tokens per second of models of about one size, a panel for each row."""
    for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        names, speeds = zip(*row["tokens_per_second"].items(), strict=True)
        axes.barh(range(len(names)), speeds, color=[MET, *[MEASURED] * (len(names) - 1)], height=0.7)
        for i, speed in enumerate(speeds):
            axes.annotate(f"{speed:,.0f}", (speed, i), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=8)
        axes.set_title(f"{row['work'].replace(' others', '')}, tokens/s", fontsize=10)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)


def bars(figure: Any, claims: list[Result]) -> None:
    """Speed above, memory and long against short below; a black mark is the target."""
    faster = [claim for claim in claims if claim["what"] == "speed"]
    lower = [claim for claim in claims if claim["what"] != "speed"]
    titles = ("Times as fast as the fastest peer", "Part of the peer's memory; per token, long against short")
    groups = [(group, title) for group, title in zip((faster, lower), titles, strict=True) if group]
    heights = [2 + len(group) for group, _ in groups]
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (group, title) in zip(panels, groups, strict=True):
        axes.set_title(title, fontsize=10)
        draw_bars(axes, group)
    handles = [panels[0].barh([0], [0], color=colour) for colour in (MET, MISSED, MEASURED)]
    handles += panels[0].plot([], [], color="black", linewidth=2)
    figure.legend(handles, ["target met", "missed", "no target", "target"], loc="outside lower center", ncols=4)


def draw_bars(axes: Any, group: list[Result]) -> None:
    names = [c["work"] if c["what"] == "speed" else f"{c['work']}: {c['what']}" for c in group]
    targets = [claim.get("at_least", claim.get("at_most")) for claim in group]
    for i, (claim, target) in enumerate(zip(group, targets, strict=True)):
        colour = MEASURED if target is None else MET if is_met(claim) else MISSED
        axes.barh(i, claim["value"], color=colour, height=0.7)
        if target is not None:
            axes.plot([target, target], [i - 0.42, i + 0.42], color="black", linewidth=2)
        right = max(claim["value"], target or 0.0)
        axes.annotate(f"{claim['value']:.2f}", (right, i), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(group)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlim(left=0.0)
    axes.spines[["top", "right"]].set_visible(False)
