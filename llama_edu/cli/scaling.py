"""`llama-edu scaling fit DATA.csv`: optimal sizes, power laws and the law of the loss from a table of runs."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from llama_edu.errors import UserError
from llama_edu.scaling import IsoflopFit, ParametricFit, PowerLaw, fit_isoflops, fit_parametric

COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}


@dataclass(frozen=True)
class Table:
    """Runs read from a file: one array for each column, and what was refused, as (line, reason)."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    refused: list[tuple[int, str]]


def fit(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    flops: str = "flops",
    params: str = "params",
    tokens: str = "tokens",
    loss: str = "loss",
    where: tuple[str, ...] = (),
    window: float | None = None,
    bootstrap: int = 1000,
    budget: float | None = None,
    seed: int = 0,
    figure: Path = Path("scaling.png"),
) -> int:
    """Fit scaling laws to finished runs: print the table, write the figure.

    The file has one run a row and names its columns in the first line. A unit stands in brackets behind the name:
    `params [M]`, `tokens [B]`, `flops [PFLOP]`. Two of flops, params and tokens are enough (flops = 6 params tokens).
    Rows whose numbers are missing, not finite or not positive are refused, with their line numbers.

    Args:
        data: CSV file.
        flops: name of the column of training FLOPs.
        params: name of the column of parameters.
        tokens: name of the column of training tokens.
        loss: name of the column of final losses.
        where: keep rows with these values only, as COLUMN=VALUE.
        window: fit each parabola to the runs within this factor of the one with the lowest loss.
        bootstrap: resamples behind the intervals of the law of the loss.
        budget: predict the best model for so many FLOPs; ten times the largest budget if left out.
        seed: of all random draws.
        figure: where the figure is written.
    """
    table = read_table(data, {"flops": flops, "params": params, "tokens": tokens, "loss": loss}, where)
    runs = (table.params, table.tokens, table.loss)
    print(f"{data}: {len(table.loss)} runs, {len(table.refused)} rows refused")
    for line, reason in table.refused:
        print(f"  line {line}: {reason}")
    isoflops = law = None
    try:
        isoflops = fit_isoflops(table.flops, *runs, window=window, seed=seed)
        print_isoflops(isoflops)
    except UserError as error:
        print(f"\nNo parabolas: {error}")
    try:
        law = fit_parametric(*runs, bootstrap=bootstrap, seed=seed)
        print_parametric(law)
    except UserError as error:
        print(f"\nNo law of the loss: {error}")
    if isoflops is None and law is None:
        raise UserError(f"{data}: neither method can fit these runs, for the reasons above")
    budget = 10 * float(table.flops.max()) if budget is None else budget
    print_forecast(budget, isoflops, law)
    write_figure(figure, table, isoflops, law, budget)
    print(f"\nfigure: {figure}")
    return 0


def study(out: Path = Path("scaling_study.csv"), *, workers: int = 2) -> int:
    """Train the 52 small models of lesson 32 and write them as a table for `scaling fit`: minutes on two cores.

    Args:
        out: CSV file to write.
        workers: processes, each on one core.
    """
    from llama_edu.scaling import run_study, save_runs

    runs = run_study(workers=workers)
    save_runs(runs, out)
    print(f"{out}: {len(runs)} runs; fit them with `llama-edu scaling fit {out} --where arm=fit`")
    return 0


# What `llama-edu scaling` offers, as tyro reads it: one of two commands.
scaling = (
    Annotated[int, tyro.conf.subcommand("fit", constructor=fit)]
    | Annotated[int, tyro.conf.subcommand("study", constructor=study)]
)


def read_table(path: Path, names: dict[str, str], where: tuple[str, ...] = ()) -> Table:
    """Read the named columns of a CSV file, in the units their headers give.

    Raises:
        UserError: the file or a column is missing, a unit is unknown, no row is left, or params, tokens and flops do
            not fit together (then one of them is in another unit than its header says).
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            headers = {_bare(h): h for h in reader.fieldnames or []}
            found = {role: headers[_bare(name)] for role, name in names.items() if _bare(name) in headers}
            if "loss" not in found or len(found) < 3:
                missing = [f"{role} (looked for {name!r})" for role, name in names.items() if role not in found]
                raise UserError(
                    f"{path} lacks {', '.join(missing)}; its columns are {', '.join(reader.fieldnames or ['none'])}. "
                    "loss and two of flops, params, tokens are needed: name them with --loss, --params, ..."
                )
            keep = [_condition(w, headers) for w in where]
            units = {role: _unit(header, role) for role, header in found.items()}
            rows, refused = [], []
            for row in reader:
                if not all((row[header] or "").strip() == value for header, value in keep):
                    continue
                numbers = {role: _number(row[header]) for role, header in found.items()}
                bad = [f"{found[role]} is {row[found[role]]!r}" for role, value in numbers.items() if value is None]
                if bad:
                    refused.append((reader.line_num, ", ".join(bad)))
                else:
                    rows.append({role: value * units[role] for role, value in numbers.items()})
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no UTF-8 text (byte 0x{error.object[error.start]:02x}): save it as CSV in UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: {error}; is it a CSV file?") from None
    if not rows:
        raise UserError(f"{path} has no usable row{' with ' + ' and '.join(where) if where else ''}")
    columns = {role: np.array([row[role] for row in rows]) for role in found}
    if "flops" not in columns:
        columns["flops"] = 6 * columns["params"] * columns["tokens"]
    elif len(found) == 3:
        absent, present = ("tokens", "params") if "params" in columns else ("params", "tokens")
        columns[absent] = columns["flops"] / (6 * columns[present])
    else:
        ratio = float(np.median(columns["flops"] / (6 * columns["params"] * columns["tokens"])))
        if not 0.2 < ratio < 5:
            raise UserError(
                f"{path}: flops is {ratio:.3g} times 6 * params * tokens, so one of the three is in another unit than "
                "its header says; write the unit behind the name, such as `params [M]` or `tokens [B]`"
            )
    return Table(**columns, refused=refused)


def _bare(header: str) -> str:
    """A header without its unit, in small letters."""
    return re.sub(r"\s*\[[^]]*\]\s*$", "", header).strip().lower()


def _unit(header: str, role: str) -> float:
    unit = re.search(r"\[([^]]*)\]\s*$", header)
    if unit is None or role == "loss":
        return 1.0
    letter = re.sub(r"(flops?|params?|parameters|tokens?)$", "", unit[1].strip().lower())
    if letter not in COUNTS:
        raise UserError(
            f"the unit of {header!r} is unknown; known are [k] [M] [B] [T] [P] [E] [Z] and [PFLOP] and so on"
        )
    return COUNTS[letter]


def _condition(text: str, headers: dict[str, str]) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or _bare(name) not in headers:
        raise UserError(f"--where {text}: it must be COLUMN=VALUE with a column of the file")
    return headers[_bare(name)], value.strip()


def _number(text: str | None) -> float | None:
    """A finite positive number, or None."""
    try:
        value = float((text or "").replace("_", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def print_isoflops(fit: IsoflopFit) -> None:
    print("\nIsoFLOP parabolas       N*       +-         D*       +-    D*/N*     loss   runs")
    for o in fit.optima:
        print(
            f"  {o.flops:10.3g} FLOPs {o.params:10.4g} {o.params_error:6.1%} {o.tokens:10.4g} {o.tokens_error:6.1%} "
            f"{o.tokens / o.params:8.3g} {o.loss:8.4f} {o.params_curve.runs:6d}"
        )
    for budget, reason in fit.refused:
        print(f"  {budget:10.3g} FLOPs refused: {reason}")
    for name, power in (("N*", fit.params_law), ("D*", fit.tokens_law)):
        print("  " + _power(name, power))


def _power(name: str, power: PowerLaw) -> str:
    text = f"{name}(C) = {power.coefficient:.4g} * C^{power.exponent:.4f}"
    if len(power.draws):
        low, high = power.exponent_interval()
        text += f"   exponent {low:.3f} to {high:.3f} (95 %)"
    return text


def print_parametric(fit: ParametricFit) -> None:
    print("\nL(N, D) = E + A / N^alpha + B / D^beta")
    interval = fit.interval() if len(fit.samples) else {}
    for name in ("E", "A", "alpha", "B", "beta"):
        span = "   {:.5g} to {:.5g} (95 %)".format(*interval[name]) if interval else ""
        print(f"  {name:6}{getattr(fit, name):12.5g}{span}")
    print(f"  root mean square of log(predicted / measured): {np.sqrt(np.mean(fit.residuals**2)):.3g}")
    for name, power in (("N*", fit.params_law), ("D*", fit.tokens_law)):
        print("  " + _power(name, power))
    for note in fit.notes:
        print(f"  note: {note}")


def print_forecast(budget: float, isoflops: IsoflopFit | None, law: ParametricFit | None) -> None:
    print(f"\nBest model for {budget:.3g} FLOPs (95 %)")
    for name, found in (("parabolas", isoflops), ("law of the loss", law)):
        if found is None:
            continue
        parts = []
        for size, power in (("params", found.params_law), ("tokens", found.tokens_law)):
            span = " ({:.3g} to {:.3g})".format(*power.interval(budget)) if len(power.draws) else ""
            parts.append(f"{power.predict(budget):.4g} {size}{span}")
        print(f"  {name}: {', '.join(parts)}")


def write_figure(
    path: Path, table: Table, isoflops: IsoflopFit | None, law: ParametricFit | None, budget: float
) -> None:
    """IsoFLOP curves on the left, N* and D* with bands on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from llama_edu import plotting
    from llama_edu.scaling.figures import draw_isoflops, draw_laws

    plotting.use_style()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_isoflops(left, table.flops, table.params, table.loss, isoflops)
    draw_laws(right, isoflops, law, (float(table.flops.min()), budget))
    if path.parent != Path():
        path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
