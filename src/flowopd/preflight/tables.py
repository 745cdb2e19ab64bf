"""A plan, printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from flowopd.preflight.costs import Speed
from flowopd.preflight.forwards import DECODED, TRAINED
from flowopd.preflight.plan import CARDS, UTILISATION, Hardware, Plan

Unit = tuple[float, str]
BYTES: Sequence[Unit] = ((1e9, "GB"), (1e6, "MB"))
FLOP: Sequence[Unit] = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def show_plan(planned: Plan, hardware: Hardware) -> None:
    """Print a plan."""
    console = Console()
    console.print(_memory_table(planned))
    console.print(_work_table(planned, hardware))
    console.print(_hours(planned), soft_wrap=True)
    for note in dict.fromkeys(planned.notes):
        console.print(f"note: {note}", soft_wrap=True)


def _memory_table(planned: Plan) -> Table:
    unit = _unit(planned.peak(), BYTES)
    table = Table("memory of every device", unit[1], title_justify="left")
    table.columns[1].justify = "right"
    sections = {
        f"always ({_in(unit, planned.static())} {unit[1]})": planned.resident,
        "while a step is trained (estimate)": planned.training,
        "at other moments, one at a time": planned.transient,
        "for comparison, not in the sum": planned.for_comparison,
    }
    for title, parts in sections.items():
        table.add_row(title, "", style="bold")
        for name, size in parts.items():
            table.add_row(f"  {name}", _in(unit, size))
        table.add_section()
    table.add_row("peak (estimate)", _in(unit, planned.peak()), style="bold")
    return table


def _work_table(planned: Plan, hardware: Hardware) -> Table:
    each = f", each of {hardware.ranks} ranks" if hardware.ranks > 1 else ""
    whole = sum(planned.flop.values())
    unit = _unit(whole, FLOP)
    table = Table(f"work of every optimiser step{each}", "forwards", unit[1])
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys([*planned.forwards, *planned.flop]):
        rows = planned.forwards.get(name)
        table.add_row(name, "" if rows is None else f"{rows:.0f}", _in(unit, planned.flop.get(name, 0), 1))
    table.add_section()
    table.add_row("in all", f"{planned.rows():.0f}", _in(unit, whole, 1), style="bold")
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


def _unit(largest: float, units: Sequence[Unit]) -> Unit:
    """The first unit of which there is a whole one, else the last."""
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def _in(unit: Unit, size: float, digits: int = 3) -> str:
    return f"{size / unit[0]:.{digits}f}"
