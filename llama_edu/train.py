"""`torchrun --nproc-per-node N -m llama_edu.train`: `llama-edu train` on many ranks; without torchrun, on one.

torchrun --nproc-per-node 4 -m llama_edu.train --config run.yaml --parallel.tp 2 --steps 100
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch.distributed as dist

from llama_edu.errors import UserError
from llama_edu.generation.samples import make_sampler
from llama_edu.parallel.dims import ParallelPlan
from llama_edu.parallel.engine import ParallelEngine
from llama_edu.parallel.launch import RankError
from llama_edu.parallel.resilience import last_words
from llama_edu.training.command import run_command

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _Plan(ParallelPlan):
    dp: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.dp == 0:
            rest = max(1, self.tp * self.pp * self.cp)
            object.__setattr__(self, "dp", max(1, int(os.environ.get("WORLD_SIZE", 1)) // rest))
        if not 1 <= self.timeout <= 1e8:
            raise UserError(f"parallel.timeout is {self.timeout}; it must be from 1 to 1e8 seconds, which is 3 years")
        super().__post_init__()


_Plan.__doc__ = (
    (ParallelPlan.__doc__ or "")
    .replace("dp: data parallel:", "dp: 0: all that the others leave. Data parallel:")
    .replace("    Raises:", "        timeout: seconds that ranks wait for one that does not answer.\n\n    Raises:", 1)
)


def main(argv: list[str] | None = None) -> int:
    """Train on the ranks of torchrun, or on one.

    Returns:
        The exit code: 0; 2 for a mistake of the user's; 1 where a rank failed, which is told in one sentence.
    """
    try:
        with last_words():
            code = _run(sys.argv[1:] if argv is None else argv)
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            return code
    except RankError:  # its sentence is on stderr already; the ranks that are left cannot end together
        return 1


def _run(argv: list[str]) -> int:
    try:
        return run_command(
            argv,
            prog="torchrun --nproc-per-node N -m llama_edu.train",
            sections={"parallel": _Plan},
            make_engine=lambda sections: ParallelEngine(sections["parallel"], timeout=sections["parallel"].timeout),
            make_sampler=make_sampler,
        )
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # all ranks raise the same sentence: once is enough
            print(f"llama-edu: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
