"""Scaling laws: optimal sizes from parabolas, the law of the loss, two-step forecasts, and a study to run oneself.

Names load on first use, so that the fits need no PyTorch.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.scaling.downstream import DownstreamFit, fit_downstream
    from llama_edu.scaling.isoflop import IsoflopFit, Optimum, Parabola, fit_isoflops
    from llama_edu.scaling.laws import PowerLaw, best_split
    from llama_edu.scaling.parametric import ParametricFit, fit_parametric
    from llama_edu.scaling.study import MarkovSource, Run, load_runs, plan_study, run_study, save_runs, train_run

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

__getattr__, __dir__ = lazy(
    __name__,
    {
        "downstream": ("DownstreamFit", "fit_downstream"),
        "isoflop": ("IsoflopFit", "Optimum", "Parabola", "fit_isoflops"),
        "laws": ("PowerLaw", "best_split"),
        "parametric": ("ParametricFit", "fit_parametric"),
        "study": ("MarkovSource", "Run", "load_runs", "plan_study", "run_study", "save_runs", "train_run"),
    },
)
