"""Pages: one run, and several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

from matplotlib.figure import Figure
from PIL import Image

from flowopd.evaluation import Shots
from flowopd.report import plots
from flowopd.report.blocks import Block, Cards, Figures, Film, Grid, Page, Picture, Points, Section, Text, encoded, slug
from flowopd.report.plots import COLOURS, MUTED, Line, Path2D
from flowopd.report.runs import BEFORE, Curve, Run
from flowopd.report.words import (
    changes,
    comparison,
    duration,
    evaluated_otherwise,
    headline,
    near,
    number,
    origin,
    signed,
)

FRAMES, COLUMNS, THUMB = 12, 8, 128
"""Most rows of a film, most prompts, and most pixels a side of a picture on the page."""

PANELS, ROWS = 12, 200
"""Most plots of one kind, and most rows of numbers."""

CLOSER = 8
"""Most runs that are looked at more closely, as many as there are colours."""

T = TypeVar("T")


def page_of_run(run: Run) -> Page:
    """All there is to know of one run."""
    progress = f"iteration {run.iterations}" + (f" of {run.asked}" if run.asked else "")
    about = " · ".join(filter(None, [_kind(run), progress if run.fit else "", run.state, duration(run.seconds())]))
    sections = [
        Section("What changed", _told(run)),
        Section("Models", _models(run)),
        Section("Pictures", _pictures(run)),
        Section("Scores along training", _scores([run])),
        Section("Seesaw", _seesaws([run])),
        Section("Film", _film(run)),
        Section("Losses", _losses(run)),
        Section("Drift", _drift([run])),
        Section("What it took", _cost([run])),
        Section("Configuration", _configuration(run)),
    ]
    return Page(run.name, about, headline(run), _key(run), [section for section in sections if section.blocks])


def page_of_runs(runs: Sequence[Run], title: str) -> Page:
    """Several runs side by side."""
    states = ", ".join(dict.fromkeys(run.state for run in runs))
    warning = evaluated_otherwise(runs)
    closer = sorted(runs, key=lambda run: -(run.after("average") or 0))[:CLOSER] if len(runs) > CLOSER else runs
    told = f"Curves and pictures are those of the {CLOSER} runs with the highest average." * (len(runs) > CLOSER)
    texts = [text for text in (warning, told) if text]
    sections = [
        Section("Side by side", [*([Text(texts)] if texts else []), *_side_by_side(runs)]),
        Section("Scores along training", _scores(closer)),
        Section("Seesaw", _seesaws(closer)),
        Section("Drift", _drift(closer)),
        Section("What they took", _cost(runs)),
        Section("Settings that differ", _settings_apart(runs)),
    ]
    for run in closer:
        inner = [Text([headline(run)]), *_models(run), *_pictures(run, prefix=slug(run.name))]
        sections.append(Section(run.name, inner))
    key = [(run.name, number(run.after("average"))) for run in runs if run.after("average") is not None][:6]
    about = f"{len(runs)} runs · {states}"
    return Page(title, about, comparison(runs), key, [section for section in sections if section.blocks])


def _kind(run: Run) -> str:
    model = run.config.get("model")
    return str(model.get("class_path", "")).rpartition(".")[2] if isinstance(model, Mapping) else ""


def _key(run: Run) -> list[tuple[str, str]]:
    """A few numbers that are seen first: where scores stand, and what moved them."""
    found = [(change.score, f"{number(change.after)} ({signed(change.by)})") for change in changes(run)]
    return [*found[-1:], *found[:-1]][:6] if found and found[-1][0] == "average" else found[:6]


def _told(run: Run) -> list[Block]:
    """Every score before and after, beside the base and the best of its teachers."""
    start, rows = origin(run), []
    base = ["base"] if start != "base" and "base" in run.table else []
    teachers = ["best teacher", "its score", "against it"] if run.teachers() else []
    for score, before, after in changes(run):
        best = run.best_teacher(score)
        against = [best[0], number(best[1]), signed(after - best[1])] if best else [""] * len(teachers)
        beside = [number(run.number(model, score)) for model in base]
        rows.append([score, number(before), number(after), signed(after - before), *beside, *against])
    header = ["score", start, run.ours, "change", *base, *teachers]
    count = _of(run.config.get("data"), "evaluation_count")
    held = f"Every score is a mean over {count} held-out prompts per task" if count else "Scores are means"
    note = f"{held}, of one model with one seed; small differences may be chance."
    return [Grid(header, rows), Text([note])] if rows else []


# -------------------------------------------------------------------------------------------------------------- models


def _models(run: Run) -> list[Block]:
    found: list[Block] = []
    if run.table:
        found.append(_table(run.table, run.scores, run.ours))
    if run.merge:
        found.append(_table(run.merge, (), summary="What the merge kept of each adapter"))
    return found


def _table(table: Mapping[str, Mapping[str, str]], scores: Sequence[str], ours: str = "", summary: str = "") -> Grid:
    """Cells as they stand in the file; the best of every score is marked, and so is the trained model."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = [[model, *(row.get(name, "") for name in names)] for model, row in table.items()]
    best = set()
    for column, name in enumerate(names, start=1):
        values = [_float(row[column]) for row in rows]
        known = [value for value in values if value is not None]
        if name in scores and known:
            best |= {(i, column) for i, value in enumerate(values) if value == max(known)}
    marked = frozenset(i for i, row in enumerate(rows) if row[0] == ours)
    return Grid(["model", *names], rows, frozenset(best), marked, summary)


def _side_by_side(runs: Sequence[Run]) -> list[Block]:
    """Where every run ends, and how far that is from where it began."""
    scores = list(dict.fromkeys(score for run in runs for score in run.scores))
    rows = []
    for run in runs:
        moved = {change.score: change for change in changes(run)}
        cells = [
            f"{number(run.after(score))} ({signed(moved[score].by)})" if score in moved else number(run.after(score))
            for score in scores
        ]
        rows.append([run.name, *cells, run.state])
    best = set()
    for column, score in enumerate(scores, start=1):
        values = [run.after(score) for run in runs]
        known = [value for value in values if value is not None]
        best |= {(i, column) for i, value in enumerate(values) if known and value == max(known)}
    return [Grid(["run", *scores, "state"], rows, frozenset(best))] if scores else []


# ------------------------------------------------------------------------------------------------------------ pictures


def _pictures(run: Run, prefix: str = "models") -> list[Block]:
    """Before, teachers and after on the same prompts and noise, with scores."""
    if run.models is None:
        return []
    shots = run.models
    early = next((one for one in run.shots if one.iteration == 0), None)
    shown = dict(shots.pictures)
    scores = dict(shots.scores)
    if early is not None and run.ours in early.pictures and list(early.prompts) == list(shots.prompts):
        before = {model: shown.pop(model) for model in ("base",) if model in shown}
        shown = {**before, "before training": early.pictures[run.ours], **shown}
        scores["before training"] = early.scores.get(run.ours, {})
    cards = []
    for column, prompt in list(enumerate(shots.prompts))[:COLUMNS]:
        card = []
        for row, (model, pictures) in enumerate(shown.items()):
            score = _first_score(scores.get(model, {}), column)
            file = f"{prefix}-{column}-{row}"
            card.append((model, score, _thumb(pictures[column], file, f"{model}: {prompt}")))
        cards.append((prompt, card))
    return [
        Text(["The same prompt and the same noise for every model, each with its score on its task."]),
        Cards(cards),
    ]


def _first_score(scores: Mapping[str, Sequence[float | None]], column: int) -> str:
    found = [(name, values[column]) for name, values in scores.items() if column < len(values)]
    return next((f"{name} {value:.2f}" for name, value in found if value is not None), "")


def _thumb(picture: Image.Image, file: str, alt: str) -> Picture:
    small = picture.copy()
    small.thumbnail((THUMB, THUMB))
    return Picture(f"{file}.{_ending(small)}", encoded(small), alt, pixels=small.height <= 64)


def _ending(image: Image.Image) -> str:
    return "png" if image.height <= 64 else "jpg"


def _film(run: Run) -> list[Block]:
    """Rows are iterations, columns prompts, all from the same noise."""
    shots = _spread(run.shots, FRAMES)
    if len(shots) < 2:
        return []
    prompts = shots[0].prompts
    rows = [(f"iteration {one.iteration}", _strip(one, prompts)) for one in shots if list(one.prompts) == list(prompts)]
    told = (
        "Each row is the trained model after so many iterations; each column is one prompt, always from the same noise."
    )
    return [Text([told]), Film(list(prompts)[:COLUMNS], rows)]


def _spread(found: Sequence[T], most: int) -> list[T]:
    """At most so many of them, the first and the last among them."""
    if len(found) <= most:
        return list(found)
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def _strip(shots: Shots, prompts: Sequence[str]) -> Picture:
    pictures = [picture.copy() for picture in next(iter(shots.pictures.values()))[:COLUMNS]]
    for picture in pictures:
        picture.thumbnail((96, 96))
    width, height = pictures[0].size
    gap = max(width // 16, 2)
    strip = Image.new("RGB", (len(pictures) * (width + gap), height), "white")
    for column, picture in enumerate(pictures):
        strip.paste(picture, (column * (width + gap) + gap // 2, 0))
    alt = f"iteration {shots.iteration}: {'; '.join(list(prompts)[:COLUMNS])}"
    return Picture(f"film-{shots.iteration:05d}.{_ending(strip)}", encoded(strip), alt, pixels=strip.height <= 64)


# -------------------------------------------------------------------------------------------------------------- curves


def _scores(runs: Sequence[Run]) -> list[Block]:
    scores = list(dict.fromkeys(score for run in runs for score in run.scores if run.curve(score)))
    scores.sort(key=lambda score: score != "average")
    figures = [_drawn(f"score {score}", plots.lines(score, _score_lines(runs, score)), score) for score in scores]
    if not figures:
        return []
    return [*_numbers(runs, scores), Figures(figures[:PANELS])]


def _score_lines(runs: Sequence[Run], score: str) -> list[Line]:
    """One run beside its base and the best of its teachers; several beside one another."""
    if len(runs) > 1:
        own = [(run.name, run.curve(score)) for run in runs]
        return [Line(name, curve, COLOURS[i % len(COLOURS)]) for i, (name, curve) in enumerate(own) if curve]
    (run,) = runs
    found = [Line(run.ours, run.curve(score), COLOURS[0])]
    base, best = run.number("base", score), run.best_teacher(score)
    found += [Line("base", [(0, base)], MUTED, level=True)] if base is not None else []
    found += [Line(best[0], [(0, best[1])], COLOURS[1], level=True)] if best is not None else []
    return found


def _numbers(runs: Sequence[Run], scores: Sequence[str]) -> Iterator[Grid]:
    """What the curves draw, in numbers."""
    for run in runs:
        curves = {score: dict(run.curve(score)) for score in scores}
        iterations = _spread(sorted({iteration for curve in curves.values() for iteration in curve}), ROWS)
        rows = [
            [str(iteration), *(_exact(curves[score].get(iteration)) for score in scores)] for iteration in iterations
        ]
        of = f" of {run.name}" if len(runs) > 1 else ""
        yield Grid(["iteration", *scores], rows, summary=f"The curves{of} in numbers")


def _seesaws(runs: Sequence[Run]) -> list[Block]:
    """One task's score against another's, for the scores that count in the average."""
    names = [score for score in runs[0].scores if score != "average" and all(run.curve(score) for run in runs)]
    asides = {one["name"] for run in runs for one in run.callbacks("RewardCallback") if one.get("in_average") is False}
    main = [name for name in names if name not in asides][:4]
    figures = []
    for x, y in combinations(main, 2):
        paths = [
            Path2D(
                run.ours if len(runs) == 1 else run.name,
                _together(run.curve(x), run.curve(y)),
                COLOURS[i % len(COLOURS)],
            )
            for i, run in enumerate(runs)
        ]
        paths = [path for path in paths if path.points]
        if paths:
            drawn = plots.seesaw((x, y), paths, _fixed_points(runs, x, y))
            figures.append(_drawn(f"seesaw {x} {y}", drawn, f"{y} against {x} along training"))
    told = (
        "Up and to the right is better at both. Open circles are starts, full ones the newest figures; squares are the "
        "base and the teachers."
    )
    return [Text([told]), Figures(figures)] if figures else []


def _together(x: Curve, y: Curve) -> list[tuple[float, float]]:
    other = dict(y)
    return [(value, other[iteration]) for iteration, value in x if iteration in other]


def _fixed_points(runs: Sequence[Run], x: str, y: str) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for run in runs:
        for model in [BEFORE[1], *run.teachers()]:
            a, b = run.number(model, x), run.number(model, y)
            if a is not None and b is not None:
                found.setdefault(model, (a, b))
    return found


def _losses(run: Run) -> list[Block]:
    found = []
    by_task = _named(run, lambda name: name.startswith("loss_by_task/"))
    whole = _named(run, lambda name: name.endswith("/loss") and not name.startswith("loss_by_"))
    rewards = _named(run, lambda name: name.startswith("reward/") and not name.endswith("/failed"))
    for name, curve in list(whole.items())[:4]:
        drawn = plots.lines(name, [Line("", curve, COLOURS[0])], smooth=True)
        found.append(_drawn(f"loss {name}", drawn, name))
    if by_task:
        found.append(_drawn("loss by task", _together_drawn("loss by task", by_task, "loss_by_task/"), "loss by task"))
    if profile := _by_step(run):
        figure = plots.lines("loss by step", profile, x="step of the grid, from noise to picture")
        found.append(_drawn("loss by step", figure, "Mean loss of every step, in the thirds of the training so far"))
    if rewards:
        found.append(
            _drawn("rewards", _together_drawn("rewards in training", rewards, "reward/"), "rewards in training")
        )
    return [Figures(found)] if found else []


def _by_step(run: Run) -> list[Line]:
    """A profile over the steps for each third of the iterations; steps are drawn, so one iteration has few of them."""
    steps = {int(name.rpartition("/")[2]): curve for name, curve in run.curves.items() if _is_step(name)}
    if len(steps) < 2:
        return []
    third = max(math.ceil(run.iterations / 3), 1)
    names = ("first third", "second third", "last third")
    found = []
    for part, name in enumerate(names):
        profile = []
        for step, curve in sorted(steps.items()):
            seen = [value for iteration, value in curve if part * third < iteration <= (part + 1) * third]
            profile += [(step, sum(seen) / len(seen))] if seen else []
        found += [Line(name, profile, ("#9cc4bf", "#4f9a95", COLOURS[0])[part])] if profile else []
    return found


def _is_step(name: str) -> bool:
    stage, _, step = name.partition("/")
    return stage == "loss_by_step" and step.isdigit()


def _drift(runs: Sequence[Run]) -> list[Block]:
    """How pictures changed since the start, and how far the policy is from its teachers on states that stay."""
    figures = []
    for run in runs:
        of = f" · {run.name}" if len(runs) > 1 else ""
        for stage, title in (("drift", "pictures against the start"), ("rollout_drift", "rollouts against the start")):
            changed = [name for name in run.curves if name.startswith(f"{stage}/") and name.endswith("_change")]
            if changed:
                curves = {name.removesuffix("_change"): run.curves[name] for name in changed}
                figure = _together_drawn(title + of, curves, f"{stage}/", smooth=False)
                figures.append(_drawn(f"{stage} {run.name}", figure, f"Relative change since the start{of}"))
        kl = _named(run, lambda name: name.startswith("fixed_kl/"))
        if kl:
            figure = _together_drawn("KL to every teacher on its own states" + of, kl, "fixed_kl/", smooth=False)
            figures.append(_drawn(f"fixed kl {run.name}", figure, f"Nats per latent dimension{of}"))
    return [Figures(figures[: 2 * PANELS])] if figures else []


def _named(run: Run, wanted: Callable[[str], bool]) -> dict[str, Curve]:
    return {name: curve for name, curve in run.curves.items() if wanted(name)}


def _together_drawn(title: str, curves: Mapping[str, Curve], stem: str, smooth: bool = True) -> Figure:
    named = list(curves.items())[: len(COLOURS)]
    drawn = [Line(name.removeprefix(stem), curve, COLOURS[i]) for i, (name, curve) in enumerate(named)]
    return plots.lines(title, drawn, smooth=smooth)


def _drawn(name: str, figure: Figure, caption: str) -> Picture:
    return Picture(f"{slug(name)}.png", plots.png(figure), caption)


# ---------------------------------------------------------------------------------------------------- cost, provenance


def _cost(runs: Sequence[Run]) -> list[Block]:
    rows = []
    for run in runs:
        spent = {name: _last(run, f"spent/{name}") for name in ("pictures", "forwards", "backwards")}
        per = spent["pictures"]
        rows.append(
            {
                "iterations": str(run.iterations) if run.fit else "–",
                "pictures": _count(per),
                "forwards": _count(spent["forwards"]) + _per(spent["forwards"], per),
                "backwards": _count(spent["backwards"]) + _per(spent["backwards"], per),
                "time": duration(run.seconds()),
                "device": str(run.facts().get("device", "unknown")),
            }
        )
    if len(runs) > 1:
        return [Grid(["run", *rows[0]], [[run.name, *row.values()] for run, row in zip(runs, rows, strict=True)])]
    (run,), (row,) = runs, rows
    times = sum(line.get("event") == "begin" for line in run.history)
    begun = [("begun", f"{times} times")] if times > 1 else []
    told = "Forwards are rows of the backbone, of student and teachers together; evaluations are in the time alone."
    return [Points([*row.items(), *begun]), Text([told])]


def _last(run: Run, name: str) -> float | None:
    curve = run.curves.get(name)
    return curve[-1][1] if curve else None


def _count(value: float | None) -> str:
    return "not counted" if value is None else f"{value:,.0f}"


def _per(value: float | None, pictures: float | None) -> str:
    return f", {value / pictures:.1f} a picture" if value is not None and pictures else ""


def _configuration(run: Run) -> list[Block]:
    """What differs from the defaults, where the run has said so; versions and git."""
    facts = run.facts()
    found: list[Block] = []
    settings = facts.get("settings") or {}
    if settings:
        summary = f"{len(settings)} settings that differ from their defaults"
        found.append(
            Grid(
                ["setting", "value"], [[name, _shown(value, run)] for name, value in settings.items()], summary=summary
            )
        )
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    told = [
        ("versions", versions),
        ("git", str(facts.get("git") or "")),
        ("command", _shown(facts.get("command") or "", run)),
    ]
    told = [(name, value) for name, value in told if value]
    return [*([Points(told)] if told else []), *found]


def _settings_apart(runs: Sequence[Run]) -> list[Block]:
    """Of the runs that say what they were given."""
    runs = [run for run in runs if run.facts().get("settings")]
    settings = [{name: _shown(value, run) for name, value in run.facts()["settings"].items()} for run in runs]
    names = list(dict.fromkeys(name for one in settings for name in one))
    apart = [name for name in names if len({one.get(name) for one in settings}) > 1]
    rows = [[name, *(one.get(name, "") for one in settings)] for name in apart]
    return [Grid(["setting", *(run.name for run in runs)], rows)] if rows else []


def _shown(value: object, run: Run) -> str:
    return near(", ".join(map(str, value)) if isinstance(value, list) else str(value), run.folder)


def _of(node: object, name: str) -> object:
    arguments = node.get("init_args") if isinstance(node, Mapping) else None
    return arguments.get(name) if isinstance(arguments, Mapping) else None


def _float(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
