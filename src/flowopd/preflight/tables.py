"""A plan, printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table

from flowopd.preflight.costs import Speed
from flowopd.preflight.forwards import DECODED, TRAINED
from flowopd.preflight.plan import CARDS, UTILISATION, Hardware, Plan

GB = 1e9


def show_plan(planned: Plan, hardware: Hardware) -> None:
    """Print a plan."""
    console = Console()
    console.print(_memory_table(planned))
    console.print(_work_table(planned, hardware))
    console.print(_hours(planned), soft_wrap=True)
    for note in dict.fromkeys(planned.notes):
        console.print(f"note: {note}", soft_wrap=True)


def _memory_table(planned: Plan) -> Table:
    table = Table("memory of every device", "GB", title_justify="left")
    table.columns[1].justify = "right"
    sections = {
        f"always ({_gb(planned.static())} GB)": planned.resident,
        "while a step is trained (estimate)": planned.training,
        "at other moments, one at a time": planned.transient,
        "for comparison, not in the sum": planned.for_comparison,
    }
    for title, parts in sections.items():
        table.add_row(title, "", style="bold")
        for name, size in parts.items():
            table.add_row(f"  {name}", _gb(size))
        table.add_section()
    table.add_row("peak (estimate)", _gb(planned.peak()), style="bold")
    return table


def _work_table(planned: Plan, hardware: Hardware) -> Table:
    each = f", each of {hardware.ranks} ranks" if hardware.ranks > 1 else ""
    table = Table(f"work of every optimiser step{each}", "forwards", "TFLOP")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys([*planned.forwards, *planned.flop]):
        rows = planned.forwards.get(name)
        table.add_row(name, "" if rows is None else f"{rows:.0f}", f"{planned.flop.get(name, 0) / 1e12:.1f}")
    table.add_section()
    table.add_row("in all", f"{planned.rows():.0f}", f"{sum(planned.flop.values()) / 1e12:.1f}", style="bold")
    table.add_row("for a picture, a backward as two", f"{planned.per_picture():.1f}", "")
    table.add_section()
    for name, count in planned.evaluation.items():
        table.add_row(f"besides, an evaluation: {name}", f"{count:.0f}", "")
    return table


def show_speed(planned: Plan, measure: Callable[[], Speed]) -> None:
    """Print the seconds of an optimiser step, measured on the device that is here; or that it does not fit there."""
    try:
        said = f"{seconds(planned.forwards, measure()):.1f} s for an optimiser step, without rewards"
    except torch.OutOfMemoryError:
        said = "not even the transformer and one micro-batch fit in what is free of the device; lower data.batch_size"
    Console().print(f"measured here: {said}", soft_wrap=True)


def _hours(planned: Plan, updates: int = 1000) -> str:
    hours = ", ".join(f"{planned.hours(card, updates):.2g} on {card}" for card in CARDS)
    speeds = " and ".join(f"{speed:.0f}" for speed in CARDS.values())
    return (
        f"estimate, measured nowhere: {updates} updates take hours {hours}, at {UTILISATION:.0%} of {speeds} TFLOP a "
        "second, without evaluations and text encoders"
    )


def seconds(forwards: Mapping[str, float], speed: Speed) -> float:
    """Seconds per optimiser step, without rewards and pictures."""
    plain = sum(rows for name, rows in forwards.items() if name not in (TRAINED, DECODED))
    return plain * speed.forward + forwards.get(TRAINED, 0.0) * speed.trained


def _gb(size: float) -> str:
    return f"{size / GB:.3f}"
