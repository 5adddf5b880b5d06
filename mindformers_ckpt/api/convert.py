"""Conversion as a call: Hugging Face weights to MindSpore and back, and between the names that MindSpore has had."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from mindformers_ckpt.api.checked import check_arguments, options_of
from mindformers_ckpt.api.transform import verify_crcs
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import ConversionReport
from mindformers_ckpt.convert.run import convert as run
from mindformers_ckpt.errors import did_you_mean
from mindformers_ckpt.objects.path import PathLike, as_path, path_or_none
from mindformers_ckpt.planning.model import DEFAULT_PREFIX
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.strategy.given import StrategyLike, strategy_or_none

_RENAMED = {"input_path", "model_options"}  # of a request, and what stands for further names here


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
    to_naming: str | None = None,
    from_naming: str | None = None,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    prefix: str = DEFAULT_PREFIX,
    allow_missing: bool | Sequence[str] = False,
    weights_only: bool = False,
    contents: str = "error",
    step: str | None = None,
    strip_prefix: str | None = None,
    write_tied: bool = False,
    processes: int = 1,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    resume: bool = False,
    hashes: bool = False,
    fingerprints: bool = False,
    sign: PathLike | None = None,
    fsync: bool = False,
    crc: bool = False,
    progress: Progress | None = None,
    **model_options: int | str | bool | None,
) -> ConversionReport:
    """Convert weights from Hugging Face to MindSpore, with `reverse` the other way, with `to_naming` to other names.

    Args:
        src: a Hugging Face folder or a file in it; with `reverse` or `to_naming` a MindSpore file or folder.
        dst: a file, when it ends in .ckpt or .safetensors, else a folder.
        model: name or alias, like "llama"; None for what config.json says.
        dtype: "fp32", "bf16" or "fp16" for all floating-point tensors; None keeps what they are.
        naming: "legacy" or "mcore" names on the MindSpore side; None for the model's usual.
        qkv_concat: query, key and value in one tensor, gate and up too; None for the model's usual.
        hf_config: folder of config.json and tokenizer, if it is not the source's own.
        format: "ckpt", "safetensors" or "checkpoint2", of MindSpore files.
        to_naming: from other names of MindSpore to these, optimizer states with them: "legacy", "mcore", or with
            settings of the network, like "mcore+mla_qkv_concat".
        from_naming: the names of the source; None where they tell themselves.
        src_strategy: with `to_naming`, the strategy of the source; None for complete weights.
        dst_strategy: cut for this strategy in the same pass. `prefix` and `allow_missing` are of its rank files.
        weights_only: with `to_naming`, leave optimizer states and counters aside.
        contents: with `to_naming`, what is done when samples of the source contradict its strategy.
        step: with `reverse` or `to_naming`, the file of a rank folder to read.
        strip_prefix: text in front of the source's names that the model's do not have.
        write_tied: write a tied output layer as a tensor of its own.
        model_options: what only some models have, under the names of the command line: n_head, hidden_size, layers,
            use_gmm, mlp_concat, ….

    The other arguments are those of `transform`. Raises CheckpointError; then `dst` is as it was.
    """
    _check_options(model_options)
    layers = {name: model_options.get(name) for name in ("num_layers", "num_nextn_predict_layers")}
    paths = {"src": src, "dst": dst, "hf_config": hf_config, "sign": sign}
    check_arguments(**paths, **layers, format=format, dtype=dtype, step=step, processes=processes, prefix=prefix)
    check_arguments(contents=contents)
    request = Request(
        model,
        as_path(src),
        reverse,
        dtype=dtype,
        naming=naming,
        qkv_concat=qkv_concat,
        hf_config=path_or_none(hf_config),
        write_tied=write_tied,
        strip_prefix=strip_prefix,
        step=step,
        to_naming=to_naming,
        from_naming=from_naming,
        src_strategy=strategy_or_none(src_strategy),
        weights_only=weights_only,
        contents=contents,
        **model_options,  # type: ignore[arg-type]  # the request tells which ones there are
    )
    return run(
        request,
        as_path(dst),
        format=format,
        target=strategy_or_none(dst_strategy),
        prefix=prefix,
        allow_missing=allow_missing,
        options=options_of(
            processes,
            sign,
            overwrite=overwrite,
            overwrite_anything=overwrite_anything,
            resume=resume,
            hashes=hashes,
            fingerprints=fingerprints,
            fsync=fsync,
            crc=crc,
        ),
        check_source=verify_crcs if crc else lambda plan: (),
        progress=progress,
    )


def _check_options(given: Iterable[str]) -> None:
    """Raise TypeError, as Python does, for a word that is not an argument; it suggests those that are like it."""
    known = {*Request.__dataclass_fields__, *inspect.signature(convert).parameters} - _RENAMED
    for name in given:
        if name not in known:
            like = did_you_mean(name, known)
            raise TypeError(f"convert() got an unexpected keyword argument {name!r}{'.' if like else ''}{like}")
