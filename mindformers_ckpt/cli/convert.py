"""`mindformers-ckpt convert`: Hugging Face weights to MindSpore and back, with the guide's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mindformers_ckpt.cli.dry import say_plan
from mindformers_ckpt.cli.making import How, making_options, next_with_checkpoint2
from mindformers_ckpt.cli.notices import amount, say, say_fingerprints, say_json, warn
from mindformers_ckpt.cli.options import (
    ALLOW_MISSING,
    BOOL,
    CONTENTS,
    PREFIX,
    PROCESSES,
    STEP,
    AnyPath,
    LocalPath,
    OneOf,
    StrategyPath,
    Whole,
    resumable,
)
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.convert.plugins import find_plugin, parse_extra, run_plugin
from mindformers_ckpt.convert.request import DTYPES, Request
from mindformers_ckpt.convert.run import CHECKPOINT2, convert, plan_conversion
from mindformers_ckpt.errors import did_you_mean
from mindformers_ckpt.strategy.given import strategy_or_none
from mindformers_ckpt.words import counted

_PATH = AnyPath()
_NOT_OF_PLUGINS = (
    *("format", "dst_strategy", "prefix", "allow_missing", "contents", "processes"),
    *(name for name in How._fields if name not in ("as_json", "quiet")),
)


def _models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of models that begin like this, for the completion of a shell."""
    from mindformers_ckpt.convert.model import models

    return sorted(name for name in models() if name.startswith(incomplete))


@click.command("convert", context_settings={"ignore_unknown_options": True, "show_default": True})
@click.option(
    "--model", shell_complete=_models, help="llama, glm-n, qwen, mixtral, deepseek, …; left out: what config.json says."
)
@click.option(
    "--reversed",
    "reverse",
    type=BOOL,
    is_flag=False,
    flag_value=True,
    default=False,
    help="From MindSpore to Hugging Face; alone, or with True or False.",
)
@click.option(
    "--input-path",
    "--src-checkpoint",
    "input_path",
    type=_PATH,
    required=True,
    help="Weights: a folder, or a file in it.",
)
@click.option(
    "--output-path",
    "--dst-checkpoint-dir",
    "--dst-checkpoint",
    "output_path",
    type=_PATH,
    required=True,
    help="File, or folder for several files.",
)
@click.option("--dtype", type=OneOf(list(DTYPES)), help="Element type of the result; left out: as it is.")
@click.option("--n-head", type=int, help="Attention heads, where config.json lacks them (BLOOM).")
@click.option("--hidden-size", type=int, help="Hidden size, where config.json lacks it (BLOOM).")
@click.option("--layers", type=int, help="Layers, where config.json lacks them (GPT2, WizardCoder).")
@click.option("--num-layers", type=Whole(1), help="Convert only this many layers, the first ones.")
@click.option("--num-nextn-predict-layers", type=Whole(0), help="Convert only this many prediction (MTP) layers.")
@click.option("--is-pretrain", type=BOOL, help="Swin: weights of pre-training.")
@click.option("--telechat-type", help="TeleChat: telechat_7b or telechat_12b.")
@click.option("--mlp-concat", type=BOOL, help="GLM4: gate and up in one tensor; left out: True.")
@click.option("--use-rearrange-rope", type=BOOL, help="GLM4: even rows of a head before odd ones, in query and key.")
@click.option("--use-gmm", type=BOOL, help="Mixtral: experts turned, for grouped multiplication in inference.")
@click.option("--use-gmm-training", type=BOOL, help="Mixtral: experts as in a network that trains with use_gmm.")
@click.option(
    "--use-contiguous-weight-layout-attention",
    type=BOOL,
    help="Fused tensors: all of query, all of key, all of value.",
)
@click.option(
    "--use-interleaved-weight-layout-mlp",
    type=BOOL,
    help="Fused tensors: false for all of gate, then all of up.",
)
@click.option("--mla-qkv-concat", type=BOOL, help="DeepSeek, mcore names: query, key and value start in one tensor.")
@click.option("--pynative", type=BOOL, help="DeepSeek, mcore names: as the PyNative network has them.")
@click.option(
    "--format",
    "--save-format",
    "format",
    type=OneOf(["ckpt", "safetensors", CHECKPOINT2]),
    help="Format of the MindSpore files.  [default: safetensors with mcore names, else ckpt]",
)
@click.option("--naming", type=OneOf(["legacy", "mcore"]), help="MindSpore names; left out: the model's usual.")
@click.option(
    "--qkv-concat",
    type=BOOL,
    is_flag=False,
    flag_value=True,
    help="Query, key, value in one tensor, gate and up too; alone or with true or false.",
)
@click.option("--hf-config", type=_PATH, help="Folder of config.json and tokenizer files.")
@click.option(
    "--dst-strategy",
    "--dst-ckpt-strategy",
    "dst_strategy",
    type=StrategyPath(),
    help="Cut for this strategy in the same pass.",
)
@PREFIX
@ALLOW_MISSING
@click.option(
    "--to",
    "--to-naming",
    "to_naming",
    metavar="NAMING",
    help="From other names of MindSpore to these, optimizer states with them: legacy, mcore, or with the settings of "
    "the network, like mcore+mla_qkv_concat.",
)
@click.option(
    "--from",
    "--from-naming",
    "from_naming",
    metavar="NAMING",
    help="With --to: the names of the source; left out: what the names themselves show.",
)
@click.option(
    "--src-strategy",
    "--src-ckpt-strategy",
    "src_strategy",
    type=StrategyPath(),
    help="With --to: strategy of the source. None, or left out, for complete weights.",
)
@click.option("--weights-only", is_flag=True, help="With --to: leave optimizer states and counters aside.")
@click.option("--strip-prefix", help="Text in front of the source's tensor names that the model's do not have.")
@click.option("--write-tied", is_flag=True, help="Write a tied output layer as a tensor of its own.")
@PROCESSES
@click.option("--plugin", type=LocalPath(), help="Folder with convert_weight.py and convert_reversed.py of your own.")
@STEP
@CONTENTS
@making_options
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
def command(
    model: str | None,
    reverse: bool,
    input_path: Path,
    output_path: Path,
    src_strategy: Path | None,
    dst_strategy: Path | None,
    prefix: str,
    allow_missing: bool,
    format: str | None,
    processes: int,
    plugin: Path | None,
    contents: str,
    how: How,
    extra: tuple[str, ...],
    **choices: Any,
) -> None:
    """Convert weights between Hugging Face and MindSpore.

    Options that no model of ours knows are passed on to a plugin.
    """
    converter = find_plugin(model or "", reverse, plugin)
    if converter is not None:
        _check_options_of_plugin()
        dtype = choices.pop("dtype")
        flags = {"write_tied", "weights_only"}  # false is what they are when they are not given
        choices |= {"src_strategy": src_strategy}
        given = {
            name: str(value) for name, value in choices.items() if value is not None and (value or name not in flags)
        }
        run_plugin(converter, input_path, output_path, dtype, {**given, **parse_extra(list(extra))})
        return
    if extra:
        raise click.UsageError(f"No such option or argument: {' '.join(extra)}.{_suggestion(extra)}")
    request = Request(
        model, input_path, reverse, src_strategy=strategy_or_none(src_strategy), contents=contents, **choices
    )
    files: dict[str, Any] = {"format": format, "target": strategy_or_none(dst_strategy), "prefix": prefix}
    files["allow_missing"] = allow_missing
    if how.dry_run:
        say_plan(plan_conversion(request, output_path, **files), output_path, how)
        return
    options = how.options(processes)
    with resumable(output_path), show_progress("convert", quiet=how.quiet) as progress:
        result = convert(
            request, output_path, **files, options=options, progress=progress, check_source=how.check_source
        )
    warn(result.warnings)
    if how.as_json:
        say_json(asdict(result))
    elif not how.quiet:
        say(
            f"{result.model} ({result.naming} names): {result.tensors} tensors, {amount(result.bytes_written)} in "
            f"{counted(result.files, 'file')} at {result.destination}, {result.seconds:.2f} s"
        )
        say_fingerprints(result.fingerprints, result.source_fingerprint, result.signature)
        say(_next_step(result.destination, reverse, dst_strategy, format))


def _check_options_of_plugin() -> None:
    """Refuse what a plugin would not be told: it writes its result itself. Raises UsageError."""
    context = click.get_current_context()
    given = [name for name in _NOT_OF_PLUGINS if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        names = {param.name: param.opts[0] for param in context.command.params}
        raise click.UsageError(
            f"{', '.join(names[name] for name in given)}: a plugin writes its result itself, and is not told of this; "
            "leave it out"
        )


def _suggestion(extra: Sequence[str]) -> str:
    """What the first option may have been meant to be, of words that no option takes."""
    known = [name for each in click.get_current_context().command.params for name in each.opts if name[:2] == "--"]
    word = next((word for word in extra if word.startswith("-")), "").partition("=")[0].replace("_", "-")
    return did_you_mean(word, known)


def _next_step(destination: Path, reverse: bool, strategy: Path | None, format: str | None) -> str:
    if reverse:
        return f"next: AutoModelForCausalLM.from_pretrained({str(destination)!r})"
    if format == CHECKPOINT2:
        return next_with_checkpoint2(destination)
    if strategy is not None:
        return f"next, in the yaml: load_checkpoint: {destination}, auto_trans_ckpt: False"
    return f"next, in the yaml: load_checkpoint: {destination}, auto_trans_ckpt: True"
