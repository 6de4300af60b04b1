"""`llama-edu plan --model NAME --gpus N`: memory, time and traffic of a plan, or a search for the best one."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields
from json import dumps, loads
from pathlib import Path
from typing import Literal

from llama_edu.config import LlamaConfig
from llama_edu.errors import UserError
from llama_edu.parallel.planner import GPU, GPUS, KERNEL_EFFICIENCY, ClusterReport, find_gpu, plan_cluster, search_plans


def plan(
    *,
    model: str = "llama-3.1-405b",
    gpus: int = 16_384,
    gpu: str = "h100",
    seq_len: int = 8192,
    batch_tokens: int | None = None,
    batch_per_dp: int | None = None,
    tp: int | None = None,
    cp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    virtual_stages: int | None = None,
    trim_ends: bool | None = None,
    micro_batch: int | None = None,
    recompute: Literal["none", "selective", "full"] | None = None,
    zero: Literal[0, 1, 2, 3] | None = None,
    precision: Literal["bf16", "fp8"] = "bf16",
    kernel_efficiency: float = KERNEL_EFFICIENCY,
    tokens: float | None = None,
    top: int = 5,
    json: bool = False,
) -> int:
    """Plan the training of a Llama on a cluster: does it fit, how fast is it, how long does it take.

    With tp, cp, pp and dp given (one of them may be left out), that plan is reported. Otherwise all plans that agree
    with what is given are tried, and the quickest that fit are listed, with the reasons why the others were refused.

    Args:
        model: name of a published model, or a config.json or params.json file.
        gpus: number of GPUs, eight in a server.
        gpu: h100, h200, a100, b200, or a JSON file with a row of your own: name, memory, bf16, fp8, hbm, nvlink,
            network, watts (bytes, FLOP/s and bytes/s a GPU).
        seq_len: tokens of a sequence.
        batch_tokens: tokens of a step of the whole cluster; 16M if neither this nor batch_per_dp is given.
        batch_per_dp: sequences that each replica reads in a step; needs the degrees.
        tp: tensor parallel degree.
        cp: context parallel degree.
        pp: pipeline parallel degree.
        dp: data parallel degree (FSDP).
        virtual_stages: chunks of layers a pipeline rank holds; the quickest if left out.
        trim_ends: one layer less on the first and last stage; the quicker if left out.
        micro_batch: sequences of a micro-batch; 1 for a given plan, 1, 2 and 4 are tried in a search.
        recompute: what the backward pass computes again; selective for a given plan, all are tried in a search.
        zero: what is sharded over dp and cp; 2 for a given plan, 2 and 3 are tried in a search.
        precision: fp8 for the weight products of the blocks.
        kernel_efficiency: share of the peak that matrix products reach; fitted on Llama 3's cluster if left out.
        tokens: training tokens: adds days, GPU hours and energy.
        top: plans to list after a search.
        json: print JSON in place of tables.
    """
    cfg, row = read_model(model), read_gpu(gpu)
    if gpus < 1:
        raise UserError(f"gpus is {gpus}; it must be at least 1")
    counts = {"seq_len": seq_len, "micro_batch": micro_batch, "batch_tokens": batch_tokens}
    for name, value in {**counts, "batch_per_dp": batch_per_dp, "top": top}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if tokens is not None and not 0 < tokens < math.inf:
        raise UserError(f"tokens is {tokens:g}; it must be a finite number above 0")
    if batch_tokens is not None and batch_per_dp is not None:
        raise UserError("batch_tokens and batch_per_dp say the same in two ways: give one of them")
    degrees = complete({"tp": tp, "cp": cp, "pp": pp, "dp": dp}, gpus)
    stages = {"virtual_stages": virtual_stages, "trim_ends": trim_ends, "precision": precision}
    stages["kernel_efficiency"] = kernel_efficiency
    if None not in degrees.values():
        share = batch_per_dp or sequences_per_replica(batch_tokens or 2**24, seq_len, degrees["dp"])
        report = plan_cluster(
            cfg,
            gpus=gpus,
            **degrees,
            seq_len=seq_len,
            batch_per_dp=share,
            gpu=row,
            micro_batch=1 if micro_batch is None else micro_batch,
            recompute=recompute or "selective",
            zero=2 if zero is None else zero,
            **stages,
        )
        print(_json(report.to_dict(tokens)) if json else report.table(tokens))
        if not report.fits:
            raise UserError(too_much(report))
        return 0
    if batch_per_dp is not None:
        raise UserError("batch_per_dp needs all four degrees; for a search give batch_tokens")
    found = search_plans(
        cfg,
        gpus=gpus,
        seq_len=seq_len,
        batch_tokens=batch_tokens or 2**24,
        gpu=row,
        **degrees,
        **({} if micro_batch is None else {"micro_batches": (micro_batch,)}),
        **({} if recompute is None else {"recompute": (recompute,)}),
        **({} if zero is None else {"zero": (zero,)}),
        **stages,
    )
    best = found.best  # raises when none fits
    if json:
        plans = [report.to_dict(tokens) for report in found.plans[:top]]
        print(_json({"plans": plans, "fit": len(found.plans), "refused": found.reasons}))
    else:
        print(f"{model} on {gpus:,} x {row.name}, {seq_len:,} tokens a sequence\n\n{found.table(top)}\n\nThe best:\n")
        print(best.table(tokens))
    return 0


def read_model(name: str) -> LlamaConfig:
    """A preset by name, or the configuration in a file. Raises UserError that names the nearest preset."""
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        content = _read(path)
        return LlamaConfig.from_meta(content) if "dim" in content else LlamaConfig.from_hf(content)
    names = LlamaConfig.preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise UserError(f"no model is called {name!r}; did you mean {near!r}? There are: {', '.join(names)}")
    return LlamaConfig.preset(name)


def read_gpu(name: str) -> GPU:
    """A row of the table by name, or the row in a file."""
    path = Path(name)
    if name.lower() in GPUS or not (path.suffix == ".json" or path.is_file()):
        return find_gpu(name)
    content = {"fp8": None, "name": path.stem, **_read(path)}
    known = {f.name for f in fields(GPU)}
    missing, unknown = known - {"source"} - set(content), set(content) - known
    if missing or unknown:
        words = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
        words += [f"has unknown {', '.join(sorted(unknown))}"] * bool(unknown)
        raise UserError(f"{path} {' and '.join(words)}; a row has {', '.join(f.name for f in fields(GPU))}")
    for key in sorted(known - {"name", "source"}):
        value = content[key]
        if (key, value) != ("fp8", None) and not (isinstance(value, (int, float)) and value > 0):
            raise UserError(f"{path}: {key} is {value!r}; it must be a number above 0")
    return GPU(**content)


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        content = loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read; a model or a GPU is one flat JSON object") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold one JSON object")
    return content


def _json(content: dict) -> str:
    return dumps(content, indent=1)


def complete(degrees: dict[str, int | None], gpus: int) -> dict[str, int | None]:
    """The degrees, with the missing one filled in when only one is missing.

    Raises:
        UserError: one is below 1, or their product does not divide the number of GPUs.
    """
    product = 1
    for name, degree in degrees.items():
        if degree is not None and degree < 1:
            raise UserError(f"{name} is {degree}; it must be at least 1")
        product *= degree or 1
    missing = [name for name, degree in degrees.items() if degree is None]
    said = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree)
    if gpus % product or (not missing and product != gpus):
        verb = "does not divide" if missing else "is not"
        raise UserError(f"{said} is {product:,} GPUs, which {verb} {gpus:,}: change a degree or the number of GPUs")
    return {**degrees, missing[0]: gpus // product} if len(missing) == 1 else degrees


def sequences_per_replica(batch_tokens: int, seq_len: int, dp: int) -> int:
    share, over = divmod(batch_tokens, seq_len * dp)
    if over or not share:
        raise UserError(
            f"{batch_tokens:,} tokens a step are no whole sequences of {seq_len:,} tokens for each of {dp} replicas: "
            "change batch_tokens or dp"
        )
    return share


def too_much(report: ClusterReport) -> str:
    size, more, row = report.memory_bytes / 1e9, report.excess_bytes / 1e9, report.plan.gpu
    largest = max(report.memory, key=report.memory.__getitem__)
    return (
        f"this plan needs {size:.1f} GB a GPU, {more:.1f} GB more than the {row.memory / 1e9:.0f} GB of an {row.name}; "
        f"{report.memory[largest] / 1e9:.1f} GB of it are {largest}. Leave out the degrees to search for one that fits"
    )
