"""Many GPUs: meshes, every way to cut a model, the engine that trains across them, and the cluster on paper.

Names load on first use, so that one part does not pay for the imports of the others.
"""

from typing import TYPE_CHECKING

from llama_edu._lazy import lazy

if TYPE_CHECKING:
    from llama_edu.parallel.cost import Link, collective_cost
    from llama_edu.parallel.dims import ParallelPlan, build_mesh
    from llama_edu.parallel.divide import parallelize
    from llama_edu.parallel.engine import ParallelEngine, join_ranks
    from llama_edu.parallel.failures import daly_interval, effective_time, simulate, spares_needed, young_interval
    from llama_edu.parallel.launch import RankError, run_ranks
    from llama_edu.parallel.planner import (
        GPU,
        GPUS,
        ClusterReport,
        PlanSearch,
        plan_cluster,
        search_plans,
        shard_shapes,
    )
    from llama_edu.parallel.resilience import FlightRecorder, FlightReport, first_cause, last_words, read_flight_records
    from llama_edu.parallel.simulated import Cluster, Ledger

__all__ = [
    "GPU",
    "GPUS",
    "Cluster",
    "ClusterReport",
    "FlightRecorder",
    "FlightReport",
    "Ledger",
    "Link",
    "ParallelEngine",
    "ParallelPlan",
    "PlanSearch",
    "RankError",
    "build_mesh",
    "collective_cost",
    "daly_interval",
    "effective_time",
    "first_cause",
    "join_ranks",
    "last_words",
    "parallelize",
    "plan_cluster",
    "read_flight_records",
    "run_ranks",
    "search_plans",
    "shard_shapes",
    "simulate",
    "spares_needed",
    "young_interval",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "cost": ("Link", "collective_cost"),
        "dims": ("ParallelPlan", "build_mesh"),
        "engine": ("ParallelEngine", "join_ranks"),
        "failures": ("daly_interval", "effective_time", "simulate", "spares_needed", "young_interval"),
        "launch": ("RankError", "run_ranks"),
        "divide": ("parallelize",),
        "planner": ("GPU", "GPUS", "ClusterReport", "PlanSearch", "plan_cluster", "search_plans", "shard_shapes"),
        "resilience": ("FlightRecorder", "FlightReport", "first_cause", "last_words", "read_flight_records"),
        "simulated": ("Cluster", "Ledger"),
    },
)
