"""Conversion as a call: Hugging Face weights to MindSpore and back."""

from __future__ import annotations

from pathlib import Path

from mindformers_ckpt.api.request import read_optional_strategy
from mindformers_ckpt.api.transform import PathLike, StrategyLike, given_strategy
from mindformers_ckpt.convert.run import ConversionReport, Request
from mindformers_ckpt.convert.run import convert as run
from mindformers_ckpt.execution import Options, Progress, affordable_processes


def convert(
    src: PathLike,
    dst: PathLike,
    *,
    model: str | None = None,
    reverse: bool = False,
    dtype: str | None = None,
    naming: str | None = None,
    qkv_concat: bool | None = None,
    hf_config: PathLike | None = None,
    format: str | None = None,
    dst_strategy: StrategyLike = None,
    step: str | None = None,
    strip_prefix: str | None = None,
    write_tied: bool = False,
    processes: int = 1,
    fingerprints: bool = False,
    sign: PathLike | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **model_options: int | str | bool | None,
) -> ConversionReport:
    """Convert weights from Hugging Face to MindSpore, or with `reverse` the other way.

    Args:
        src: a Hugging Face folder or a file in it; with `reverse` a MindSpore file or folder.
        dst: a file, when it ends in .ckpt or .safetensors, else a folder.
        model: name or alias, like "llama"; None for what config.json says.
        dtype: "fp32", "bf16" or "fp16" for all floating-point tensors; None keeps what they are.
        naming: "legacy" or "mcore" names on the MindSpore side; None for the model's usual.
        qkv_concat: query, key and value in one tensor, gate and up too; None for the model's usual.
        hf_config: folder of config.json and tokenizer, if it is not the source's own.
        format: "ckpt", "safetensors" or "checkpoint2", of MindSpore files.
        dst_strategy: cut for this strategy in the same pass.
        step: with `reverse`, the file of a rank folder to read.
        strip_prefix: text in front of the source's names that the model's do not have.
        write_tied: write a tied output layer as a tensor of its own.
        model_options: what only some models have, under the names of the command line: n_head, hidden_size, layers,
            use_gmm, mlp_concat, ….

    `processes`, `fingerprints`, `sign`, `overwrite`, `overwrite_anything`, `resume` and `progress` are those of
    `transform`.
    Raises CheckpointError; then `dst` is as it was.
    """
    request = Request(
        model,
        Path(src),
        reverse,
        dtype=dtype,
        naming=naming,
        qkv_concat=qkv_concat,
        hf_config=None if hf_config is None else Path(hf_config),
        write_tied=write_tied,
        strip_prefix=strip_prefix,
        step=step,
        **model_options,  # type: ignore[arg-type]  # the request tells which ones there are
    )
    target = given_strategy(dst_strategy)
    return run(
        request,
        Path(dst),
        format=format,
        target=None if target is None else read_optional_strategy(target),
        options=Options(
            processes=affordable_processes(processes),
            fingerprints=fingerprints,
            sign=None if sign is None else Path(sign),
            overwrite=overwrite,
            overwrite_anything=overwrite_anything,
            resume=resume,
        ),
        progress=progress,
    )
