"""One HTML page about a finished run: figures, curves, pictures, tables, and how to repeat it."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lightning_plugins.files import write_atomically

__all__ = ["write_report"]

_MAX_TILES = 6
_HEADLINES = ("acc", "robust_acc", "robust_acc_balanced", "ece_after")  # of the tiles, where they were measured
_MAX_CHARTS = 12
_MAX_ROWS = 50
_MAX_POINTS = 300
_SERIES = 6  # colours in the style sheet, hence lines in a chart

_LOSSES = {"loss", "nll", "brier", "mse", "mae"}
_ACCURACIES = {"acc", "accuracy", "auroc", "f1", "precision", "recall"}
_WORDS = {"acc": "accuracy", "lr": "learning rate", "avg": "average"}
_ABBREVIATIONS = {"nll", "ece", "mce", "auroc", "kl", "kde", "mse", "mae", "mmd"}

Point = tuple[float, float]


def write_report(
    folder: str | Path, *, title: str | None = None, description: str | None = None, headline: Sequence[str] = ()
) -> Path:
    """Write ``report.html`` into the folder of a run: one file that opens without a network and without scripts.

    What the folder holds is shown and what it lacks is left out: the curves of ``metrics.csv`` (Lightning's CSVLogger),
    the newest picture and table of each key below ``media/``, ``config.yaml``, and ``results.json``, a dictionary with
    any of ``recipe``, ``description``, ``metrics`` (figures by name), ``command``, ``seed``, ``seconds`` (a number, or
    one for each phase by name), ``date``, ``hardware``, ``versions`` (by package), ``weights_tested``, ``checkpoints``
    and ``exports`` (lists of paths), and ``highlights``, the keys of tables and pictures that come before everything
    else. The page follows the reader's light or dark scheme.

    Args:
        folder: the run's folder.
        title: heading. Default: the recipe's name, else the folder's.
        description: one sentence on what the run did. Default: the one in ``results.json``.
        headline: names of the figures that become tiles, in this order. Default: six ``test/...``, or of all if nothing
            was tested: accuracy, robust accuracy and calibrated ECE first, then the others, and of a net in several
            states (``test/acc_8bit``, ``test/acc_4bit``) one figure of each quantity.

    Returns:
        The path of the report. An earlier one is replaced, whole or not at all.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if ``results.json`` is damaged, or ``headline`` names a figure that it does not have.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = write_report(folder, title="quickstart").read_text()
        >>> "<h1>quickstart</h1>" in text
        True
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be the folder that a run left, but there is none at {folder}")
    results = _read_results(folder / "results.json")
    configuration = _read_text(folder / "config.yaml")
    title = title or results.get("recipe") or folder.resolve().name
    description = results.get("description") if description is None else description
    figures = results.get("metrics") or {}
    if missing := [name for name in headline if name not in figures]:
        raise ValueError(f"headline names {missing}, but the figures are {sorted(figures)}; name some of those")
    if not headline:
        headline = _headline([name for name in figures if name.startswith("test/")] or list(figures))
    tiles = {name: figures[name] for name in headline}
    others = [
        [_path(_without_stage(name)), _figure(name, value)] for name, value in figures.items() if name not in tiles
    ]
    first = results.get("highlights") or []
    tables = [_table("Further figures", ["figure", "value"], others)] if others else []
    media = {suffix: _newest_media(folder / "media", suffix) for suffix in (".csv", ".png")}
    tables += [_table_file(medium) for medium in media[".csv"] if medium.key not in first]
    pictures = [_picture(medium) for medium in media[".png"] if medium.key not in first]
    highlights = [_table_file(medium, readable=True) for medium in media[".csv"] if medium.key in first]
    highlights += [_picture(medium) for medium in media[".png"] if medium.key in first]

    seconds = results.get("seconds")
    phases = seconds if isinstance(seconds, dict) else {}
    date = re.sub(r"(?<=\d)T(?=\d)", " ", str(results.get("date") or ""))
    total = "" if seconds is None else _duration(sum(phases.values()) if phases else seconds)
    facts = {
        "Recipe": results.get("recipe"),
        "Seed": results.get("seed"),
        "Date": date,
        "Time": ", ".join(f"{name} {_duration(value)}" for name, value in phases.items()) or total,
        "Hardware": results.get("hardware"),
        "Versions": ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()),
        "Weights tested": results.get("weights_tested"),
        "Checkpoints": ", ".join(map(str, results.get("checkpoints") or [])),
        "Exports": ", ".join(map(str, results.get("exports") or [])),
    }
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(description)}</p>' if description else "",
        _line_of(date, total, facts["Hardware"]),
        "</header>",
        f'<ul class="tiles">{"".join(_tile(name, value) for name, value in tiles.items())}</ul>' if tiles else "",
        _section("Result", "tables", highlights),
        _section("Curves", "curves", _charts(folder / "metrics.csv")),
        _section("Pictures", "pictures", pictures),
        _section("Tables", "tables", tables),
        _section("How to repeat it", "repeat", _repeat(results.get("command"), facts)),
        f"<details><summary>Resolved configuration</summary><pre>{escape(configuration)}</pre></details>"
        if configuration
        else "",
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    # Undecodable file names reach us as lone surrogates, which UTF-8 cannot hold.
    return write_atomically(folder / "report.html", page.encode(errors="replace"))


# Reading what the run left


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); run the recipe again, or delete the file to do without"
        ) from error
    if not isinstance(results, dict):
        raise ValueError(
            f"{path} must hold a dictionary, found a {type(results).__name__}; delete the file to do without it"
        )
    return results


def _read_series(path: Path) -> dict[str, list[Point]]:
    """Return the finite (step, value) points by metric; Lightning's rows are sparse."""
    series: dict[str, list[Point]] = {}
    for row in csv.DictReader(io.StringIO(_read_text(path))):
        step = _finite(row.get("step"))
        for name, cell in row.items():
            value = _finite(cell)
            if name in ("step", "epoch", "hp_metric", None) or name.startswith("test/"):
                continue
            if step is not None and value is not None:
                series.setdefault(name, []).append((step, value))
    return series


def _finite(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class _Medium:
    """The newest file of a key below ``media/``."""

    path: Path
    key: str
    step: int | None
    earlier: int

    def caption(self, text: str = "") -> str:
        notes = [] if self.step is None else [f"step {self.step:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")]
        if self.earlier:
            notes.append(f"{self.earlier} earlier in media/")
        text = f"<br>{escape(text)}" if text else ""
        return f'<strong>{escape(_path(self.key))}</strong>{text}<span class="note">{escape(", ".join(notes))}</span>'


def _newest_media(folder: Path, suffix: str) -> list[_Medium]:
    by_key: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.rglob(f"*{suffix}")):
        if path.is_file() and not path.name.startswith("."):
            name = path.relative_to(folder).as_posix().removesuffix(suffix)
            found = re.fullmatch(r"(.+)-step_(\d+)", name)
            key, step = (found[1], int(found[2])) if found else (name, -1)
            by_key.setdefault(key, []).append((step, path))
    newest = {key: max(files) for key, files in by_key.items()}
    return [
        _Medium(path, key, None if step < 0 else step, len(by_key[key]) - 1) for key, (step, path) in newest.items()
    ]


# Words and numbers


def _headline(names: Sequence[str]) -> list[str]:
    quantities: dict[str, str] = {}
    for name in names:
        quantities.setdefault(re.sub(r"_(\d+bit|fp32)$", "", _without_stage(name)), name)
    first = [quantities.pop(quantity) for quantity in _HEADLINES if quantity in quantities]
    return [*first, *quantities.values()][:_MAX_TILES]


def _without_stage(name: str) -> str:
    return name.removeprefix("test/")


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^0-9A-Za-z]+", name.lower()) if word]


def _pretty(name: str) -> str:
    words = re.split("[-_ ]+", name)
    words = [word.upper() if word.lower() in _ABBREVIATIONS else _WORDS.get(word, word) for word in words]
    return " ".join(words)


def _path(key: str) -> str:
    return " / ".join(map(_pretty, key.split("/")))


def _is_share(name: str, values: Iterable[float]) -> bool:
    """Whether a percentage reads better: an accuracy or an agreement on the scale from 0 to 1."""
    return bool((_ACCURACIES | {"agreement"}) & set(_words(name))) and all(0 <= value <= 1 for value in values)


def _number(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    text = str(value) if isinstance(value, int) else f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _figure(name: str, value: Any) -> str:
    if isinstance(value, float) and _is_share(name, [value]):
        return f"{100 * value:.2f}\N{NARROW NO-BREAK SPACE}%"
    return _number(value)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 60:
        return f"{_number(float(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# Parts of the page


def _section(title: str, name: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return f'<section class="{name}"><h2>{title}</h2>\n<div class="{name}-parts">{"".join(parts)}</div></section>'


def _line_of(*facts: Any) -> str:
    shown = [f"<span>{escape(str(fact))}</span>" for fact in facts if fact]
    return f'<p class="facts">{"".join(shown)}</p>' if shown else ""


def _tile(name: str, value: Any) -> str:
    bad = ' class="bad"' if isinstance(value, float) and not math.isfinite(value) else ""
    return (
        f'<li{bad} title="{escape(name)}"><span class="label">{escape(_path(_without_stage(name)))}</span> '
        f'<span class="value">{escape(_figure(name, value))}</span></li>'
    )


def _repeat(command: Any, facts: Mapping[str, Any]) -> list[str]:
    shown = [f"<dt>{name}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items() if fact not in (None, "")]
    # Each word by itself, since browsers would break a line inside of "--option".
    words = re.sub(r"\S+", lambda word: f"<span>{escape(word[0])}</span>", str(command))
    parts = [f"<pre>{words}</pre>"] if command else []
    return [*parts, f"<dl>{''.join(shown)}</dl>"] if shown else parts


def _picture(medium: _Medium) -> str:
    from PIL import Image

    content = medium.path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            (width, height), text = image.size, str(image.info.get("Description", ""))
    except (OSError, SyntaxError):  # PIL's words for a damaged PNG
        return f"<figure><figcaption>{medium.caption('This picture is damaged.')}</figcaption></figure>"
    style = ' class="long"' if width > 2.2 * height else ""
    if width < 200:  # a few pixels: enlarged by a whole factor, with hard edges
        style = f' style="width:{width * math.ceil(240 / width)}px;image-rendering:pixelated"'
    name = escape(text or medium.key)
    data = base64.b64encode(content).decode()
    return (
        f"<figure{' class=wide' if width > 1.3 * height else ''}>"
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{name}"{style}>'
        f"<figcaption>{medium.caption(text)}</figcaption></figure>"
    )


def _table_file(medium: _Medium, *, readable: bool = False) -> str:
    rows = list(csv.reader(io.StringIO(_read_text(medium.path))))
    columns, cells = (rows[0], rows[1:]) if rows else ([], [])
    note = f"The first {_MAX_ROWS} of {len(cells)} rows." if len(cells) > _MAX_ROWS else ""
    cells = cells[:_MAX_ROWS]
    if readable:
        columns, cells = _readable(columns, cells)
    return _table(medium.caption(note), columns, cells, escaped=True, rounded=readable)


def _readable(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Name columns in words and round what they hold, accuracies in per cent."""
    shares = [
        _is_share(column, [float(row[i]) for row in rows if i < len(row) and _is_number(row[i])])
        for i, column in enumerate(columns)
    ]

    def rounded(text: str, share: bool) -> str:
        if not _is_number(text) or re.fullmatch(r"[+-]?\d+", text):
            return text
        value = 100 * float(text) if share else float(text)
        return f"{value:.1f}" if share or abs(value) >= 10 else f"{value:.3f}"

    names = [_pretty(column) + " (%)" * share for column, share in zip(columns, shares, strict=True)]
    return names, [[rounded(text, share) for text, share in zip(row, shares, strict=False)] for row in rows]


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    escaped: bool = False,
    rounded: bool = False,
) -> str:
    def cell(text: str, tag: str = "td") -> str:
        number = _is_number(text)
        # Whole numbers as they are: 4 digits would turn 12345678 into another one.
        whole = rounded or re.fullmatch(r"[+-]?\d+", text)
        shown = _number(float(text)) if number and not whole else text
        return f"<{tag}{' class=number' if number else ''}>{escape(shown)}</{tag}>"

    numeric = [any(_is_number(row[i]) for row in rows if i < len(row)) for i in range(len(columns))]
    head = "".join(
        f"<th{' class=number' if number else ''}>{escape(column)}</th>"
        for column, number in zip(columns, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f"<figure><figcaption>{caption if escaped else f'<strong>{escape(caption)}</strong>'}</figcaption>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>'
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# Curves


def _charts(path: Path) -> list[str]:
    series = {name: points for name, points in _read_series(path).items() if len({step for step, _ in points}) > 1}
    groups: dict[str, dict[str, list[Point]]] = {"Loss": {}, "Accuracy": {}}
    for name, points in series.items():
        if name.endswith("_step") and f"{name.removesuffix('_step')}_epoch" in series:
            continue  # Lightning's on_step=True, on_epoch=True: the epoch's mean says the same with less noise
        quantity = re.sub(r"_(epoch|step|before|after|\d+bit)$", "", name.split("/")[-1])
        words = set(_words(quantity))
        group = "Loss" if words & _LOSSES else "Accuracy" if words & _ACCURACIES else _capital(_pretty(quantity))
        groups.setdefault(group, {})[name] = sorted(points)
    charts: list[str] = []
    for group, lines in groups.items():
        names = sorted(lines)
        for start in range(0, len(names), _SERIES):
            part = {name: lines[name] for name in names[start : start + _SERIES]}
            number = "" if len(names) <= _SERIES else f" ({start // _SERIES + 1})"
            charts.append(_chart(group + number, part, f"chart{len(charts)}"))
    if len(charts) > _MAX_CHARTS:
        charts[_MAX_CHARTS:] = [f"<p>{len(charts) - _MAX_CHARTS} further charts are left out; see metrics.csv.</p>"]
    return charts


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _chart(title: str, lines: Mapping[str, Sequence[Point]], identifier: str) -> str:
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    # Colours that stand for the style sheet's variables, so that one drawing serves the light and the dark scheme.
    variables = {"#000100": "--muted", "#000200": "--line"}
    variables |= {f"#00030{number}": f"--series-{number}" for number in range(_SERIES)}
    text, line, *colours = variables
    share = all(_is_share(name, [value for _, value in points]) for name, points in lines.items())
    legend, thinned = [], 0
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": identifier, "font.size": 11}):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for colour, (name, points) in zip(colours, lines.items(), strict=False):
            x, y = np.array(points).T
            if len(x) > _MAX_POINTS:
                thinned = max(thinned, math.ceil(len(x) / _MAX_POINTS))
                x, y = (np.array([part.mean() for part in np.array_split(v, _MAX_POINTS)]) for v in (x, y))
            axes.plot(x, y, color=colour, linewidth=1.8, solid_capstyle="round", solid_joinstyle="round")
            axes.plot(x[-1], y[-1], "o", color=colour, markersize=4.5, clip_on=False)
            last = _figure(name, points[-1][1]) if share else _number(points[-1][1])
            swatch = f'<i style="background:var({variables[colour]})"></i>'
            legend.append(f"<li>{swatch}{escape(name)} <b>{escape(last)}</b></li>")
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(line)
        axes.tick_params(length=0, labelcolor=text, pad=5)
        axes.grid(axis="y", color=line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if max(step for points in lines.values() for step, _ in points) >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol="\N{NARROW NO-BREAK SPACE}%"))
        axes.set_xlabel("step", color=text, loc="right")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    drawing = drawing[drawing.index("<svg") :]
    # Inside HTML the drawing needs no namespaces, takes its size from the page, and shares no id with another one.
    box = re.search(r'viewBox="[^"]*"', drawing)
    label = escape(f"{title} by step: {', '.join(lines)}")
    drawing = f'<svg role="img" aria-label="{label}" {box[0] if box else ""}{drawing[drawing.index(">") :]}'
    drawing = re.sub(r'\bid="', f'id="{identifier}-', drawing)
    drawing = drawing.replace("xlink:href", "href").replace('href="#', f'href="#{identifier}-')
    drawing = drawing.replace("url(#", f"url(#{identifier}-")
    for colour, variable in variables.items():
        drawing = drawing.replace(colour, f"var({variable})")
    note = f'<span class="note">each point the mean of up to {thinned} values</span>' if thinned else ""
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong>{note}<ul class=legend>{''.join(legend)}</ul>"
        f"</figcaption>{drawing.strip()}</figure>"
    )


_STYLE = """
:root {
  --page: #f7f6f3; --card: #fff; --text: #1f2328; --muted: #646b73; --line: #e4e2dc; --accent: #2f62a3; --bad: #b3261e;
  --series-0: #2f62a3; --series-1: #d0702a; --series-2: #2b8a6b; --series-3: #8a55a8; --series-4: #b8405e;
  --series-5: #7a7f87;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --card: #1d2125; --text: #e6e8ea; --muted: #9ba3ab; --line: #32373d; --accent: #86b3ec;
    --bad: #ff9b92; --series-0: #7eb0ee; --series-1: #f0a068; --series-2: #6cc7a6; --series-3: #c79be0;
    --series-4: #ee8ba3; --series-5: #aab0b7;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 {
  margin: 0; font-size: 2.1rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; overflow-wrap: anywhere;
}
h2 { margin: 3rem 0 1rem; font-size: 1.15rem; font-weight: 620; }
.lead { margin: 0.7rem 0 0; font-size: 1.1rem; max-width: 44rem; }
.facts { margin: 0.9rem 0 0; color: var(--muted); font-size: 0.9rem; }
.facts span:not(:last-child)::after { content: "\\00b7"; margin: 0 0.55em; }
ul { margin: 0; padding: 0; list-style: none; }
figure { margin: 0; }
.tiles { display: grid; gap: 0.9rem; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); margin-top: 2.2rem; }
.tiles li, figure, .repeat-parts, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0;
}
.tiles li { display: flex; flex-direction: column; justify-content: space-between; padding: 0.85rem 1rem 0.9rem; }
.label { color: var(--muted); font-size: 0.86rem; line-height: 1.35; overflow-wrap: anywhere; }
.value {
  margin-top: 0.2rem; font-size: 1.4rem; line-height: 1.25; font-weight: 600; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; letter-spacing: -0.015em;
}
.bad .value { color: var(--bad); }
.curves-parts, .pictures-parts { display: grid; gap: 0.9rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.pictures-parts { grid-auto-flow: dense; }
.tables-parts { display: grid; gap: 0.9rem; grid-template-columns: minmax(0, 1fr); }
figure { padding: 1rem 1.1rem; }
figcaption { font-size: 0.9rem; }
figcaption strong { font-weight: 600; }
.note { color: var(--muted); float: right; margin-left: 1em; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; margin: 0.3rem 0 0.5rem; color: var(--muted); }
.legend b { color: var(--text); font-weight: 550; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 0.95em; height: 0.22em; border-radius: 2px; margin: 0 0.45em 0.25em 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit !important; }
img { display: block; max-width: 100%; height: auto; margin: auto; border-radius: 5px; }
.pictures figure { display: flex; flex-direction: column; justify-content: space-between; gap: 0.8rem; }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; margin-top: 0.6rem; }
table { border-collapse: collapse; min-width: min(100%, 24rem); font-size: 0.9rem; }
th, td {
  padding: 0.38rem 2rem 0.38rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap;
}
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; white-space: normal; vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.repeat-parts { padding: 1.1rem; }
pre {
  margin: 0; font: 0.86rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.repeat pre { padding: 0.75rem 0.95rem; border-radius: 7px; background: var(--page); }
.repeat pre span { display: inline-block; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1.4rem; margin: 1rem 0 0; font-size: 0.93rem; }
dl:first-child { margin-top: 0; }
dt { color: var(--muted); white-space: nowrap; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
details { margin-top: 3rem; padding: 0.9rem 1.1rem; }
summary { cursor: pointer; font-weight: 600; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 4px; border-radius: 4px; }
details pre { margin-top: 0.9rem; }
@media (max-width: 44rem) {
  main { padding: 2rem 1rem 3.5rem; }
  h1 { font-size: 1.65rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.7rem; margin-top: 1.6rem; }
  .tiles li { padding: 0.7rem 0.85rem 0.75rem; }
  th, td { padding-right: 1.4rem; }
  svg text { font-size: 13.5px !important; } /* the drawing is scaled down here */
  .curves-parts, .pictures-parts { grid-template-columns: minmax(0, 1fr); }
  figure { padding: 0.9rem; }
  .wide:has(.long) { overflow-x: auto; }
  .long { max-width: none; width: 48rem; } /* several panels side by side: to scroll rather than to guess */
}
@media print { body { background: #fff; } figure, .tiles li { break-inside: avoid; } }
"""
