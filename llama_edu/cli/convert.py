"""`llama-edu convert`: between the Hugging Face and the Meta layout of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

Dtype = Literal["float32", "float16", "bfloat16"]


def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    format: Literal["hf", "meta"] = "hf",
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    model_parallel: int = 1,
) -> None:
    """Read a model in either layout and write it in the other, or the same one with another dtype or shard size.

    Args:
        source: folder of the model, or its Hub id; the layout is recognised.
        target: folder to write. A model that is there is replaced once the new one is complete.
        format: layout to write: "hf" is config.json and safetensors, "meta" is params.json and consolidated.NN.pth.
        dtype: cast the weights; by default they keep theirs.
        max_shard_size: largest safetensors file, such as 5GB or 512MiB.
        model_parallel: number of consolidated.NN.pth to split into.
    """
    import torch

    from llama_edu.model import checkpoint

    checkpoint.convert(
        source,
        target,
        format=format,
        dtype=dtype and getattr(torch, dtype),
        max_shard_size=max_shard_size,
        model_parallel=model_parallel,
    )
    print(f"wrote {target}")
