"""Scaling laws: optimal sizes from parabolas, the law of the loss, two-step forecasts, and a study to run oneself.

Names load on first use, so that the fits need no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_edu.scaling.downstream import DownstreamFit, fit_downstream
    from llama_edu.scaling.isoflop import IsoflopFit, Optimum, Parabola, fit_isoflops
    from llama_edu.scaling.laws import PowerLaw, best_split
    from llama_edu.scaling.parametric import ParametricFit, fit_parametric
    from llama_edu.scaling.study import MarkovSource, Run, load_runs, plan_study, run_study, save_runs, train_run

_HOME = {
    "DownstreamFit": "downstream",
    "IsoflopFit": "isoflop",
    "MarkovSource": "study",
    "Optimum": "isoflop",
    "Parabola": "isoflop",
    "ParametricFit": "parametric",
    "PowerLaw": "laws",
    "Run": "study",
    "best_split": "laws",
    "fit_downstream": "downstream",
    "fit_isoflops": "isoflop",
    "fit_parametric": "parametric",
    "load_runs": "study",
    "plan_study": "study",
    "run_study": "study",
    "save_runs": "study",
    "train_run": "study",
}

__all__ = [
    "DownstreamFit",
    "IsoflopFit",
    "MarkovSource",
    "Optimum",
    "Parabola",
    "ParametricFit",
    "PowerLaw",
    "Run",
    "best_split",
    "fit_downstream",
    "fit_isoflops",
    "fit_parametric",
    "load_runs",
    "plan_study",
    "run_study",
    "save_runs",
    "train_run",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"llama_edu.scaling.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
