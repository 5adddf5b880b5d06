"""The yaml keys of the checkpoint hook: one validated, frozen configuration.

Keys that belong to the rest of a training yaml are left alone. Values may come as strings, as
hyperparameters and environment values do: "True", "false" and "2" parse, nonsense is refused.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from mindformers_ckpt.convert.config import LAYOUT_SETTINGS
from mindformers_ckpt.errors import ConfigError, raise_problems
from mindformers_ckpt.job.misspelt import misplaced, misspelt
from mindformers_ckpt.job.object_store import check_url
from mindformers_ckpt.objects.path import is_url
from mindformers_ckpt.sources.source import MODES
from mindformers_ckpt.text_files import read_yaml_mapping

RUN_MODES = ("train", "finetune", "predict", "eval")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "")
_STEP_FILE = re.compile(r"-\d+_\d+$|\.(ckpt|safetensors)$")
# ${NAME}, ${NAME:-default}, and $NAME where it is a whole part of a path.
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|(?<![^/])\$([A-Za-z_]\w*)(?![^/])")
_NOTHING = "None"  # what the guide writes for a path that is not given


@dataclass(frozen=True)
class Config:
    """What the hook does, in the guide's words.

    Attributes:
        load_checkpoint: file of complete weights, folder of `rank_x` folders, checkpoint 2.0 or Hugging Face folder;
            "" loads nothing.
        src_strategy_path_or_dir: strategy that the checkpoint was saved under; "" for complete weights.
        auto_trans_ckpt: re-slice the checkpoint when its strategy is not the job's.
        auto_trans_save: save the re-sliced checkpoint under `output_dir` and load that (guide); False: every
            rank reads its own parts of the source straight into its parameters, nothing is written (our key).
        transform_process_num: processes that re-slice, of all nodes together.
        transform_by_rank: one target rank is the unit of work.
        output_dir: folder of `strategy`, `transformed_checkpoint` and what else the job writes.
        use_parallel: False for a job on one card.
        run_mode: train, finetune, predict or eval.
        resume_training: whether the state of the optimizer is loaded too; or the name of the file to resume
            from ("<prefix>-<epoch>_<step>.ckpt"). Left out: it is loaded into an optimizer that is there.
        allow_missing: parameters that the checkpoint may lack: True for all, or names and patterns such as
            "head.*" (our key). Others that a checkpoint of the model should have are an error.
        only_save_strategy: write the strategy and stop.
        load_ckpt_format: format of the transformed checkpoint, "ckpt" or "safetensors".
        check_contents: what to do about contents that contradict the source strategy: "error", "warn", or "off", which
            does not look (our key).
        verify_checkpoint: compare files with the CRC-32 or hashes that are recorded of them, before they are loaded
            (our key).
        share_reads: "auto": ranks on several nodes that need the same bytes read them from the storage once between
            them, where nothing is re-sliced to files and the job has a secret (MINDFORMERS_CKPT_SECRET, or a shared
            output_dir); "off": each reads for itself (our key).
        transform_timeout: seconds that ranks wait for each other at a step (our key).
        remote_save_url: folder in an object storage (obs:// or s3://) through which nodes without a shared disk
            exchange strategies and weights; "" for none.
        npu_num_per_node: ranks of such a node.
        layout_settings: what the yaml says of its network under `model.model_config` or `moe_config`: qkv_concat,
            mlp_concat, use_rearrange_rope, use_gmm, use_contiguous_weight_layout_attention and
            use_interleaved_weight_layout_mlp. Hugging Face weights are converted for these.
    """

    load_checkpoint: str = ""
    src_strategy_path_or_dir: str = ""
    auto_trans_ckpt: bool = False
    auto_trans_save: bool = True
    transform_process_num: int = 1
    transform_by_rank: bool = False
    output_dir: str = "./output"
    use_parallel: bool = True
    run_mode: str = "train"
    resume_training: bool | str | None = None
    allow_missing: tuple[str, ...] = ()
    only_save_strategy: bool = False
    load_ckpt_format: str = "ckpt"
    check_contents: str = "error"
    verify_checkpoint: bool = False
    share_reads: str = "auto"
    transform_timeout: float = 7200.0
    remote_save_url: str = ""
    npu_num_per_node: int = 8
    layout_settings: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Take the hook's keys out of a training configuration. Raises ConfigError listing all faults."""
        chosen: dict[str, Any] = {}
        problems = []
        for key, parse in _PARSERS.items():
            if values.get(key) is None:
                continue
            try:
                chosen[key] = parse(_expanded(values[key]))
            except ValueError as error:
                problems.append(f"{key}: {error}")
        problems += [*misspelt(values, KEYS), *misplaced(values, KEYS)]
        settings, wrong = _layout_settings(values)
        problems += wrong
        raise_problems(ConfigError, "the checkpoint keys of the configuration are wrong", problems)
        return cls(**chosen, layout_settings=settings)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Config:
        """Read the keys of a training yaml (anchors, merge keys and ${VARIABLE} values included).

        `overrides` win over the file. Raises ConfigError when the file cannot be read or a value is wrong.
        """
        content = read_yaml_mapping(Path(path), ConfigError)
        return cls.from_mapping({**content, **(overrides or {})})

    @property
    def strategy_dir(self) -> Path:
        """Where the strategy of this run is saved (guide: output/strategy)."""
        return Path(self.output_dir) / "strategy"

    @property
    def transformed_dir(self) -> Path:
        """Where re-sliced checkpoints go (guide: output/transformed_checkpoint)."""
        return Path(self.output_dir) / "transformed_checkpoint"

    @property
    def for_training(self) -> bool:
        """Whether states of an optimizer are wanted beside the weights."""
        return self.run_mode in ("train", "finetune")

    @property
    def has_remote_source(self) -> bool:
        """Whether the checkpoint or its strategy is in an object storage."""
        return is_url(self.load_checkpoint) or is_url(self.src_strategy_path_or_dir)

    @property
    def nothing_to_load(self) -> str | None:
        """A warning where keys ask for weights that no key names: the network would keep its initial ones."""
        if self.load_checkpoint or self.only_save_strategy:
            return None
        asking = [
            text
            for text, is_set in (
                ("auto_trans_ckpt: True", self.auto_trans_ckpt),
                ("src_strategy_path_or_dir", bool(self.src_strategy_path_or_dir)),
                (f"resume_training: {self.resume_training}", bool(self.resume_training)),
            )
            if is_set
        ]
        if not asking:
            return None
        return (
            f"load_checkpoint is empty or not set: nothing is loaded, the network keeps its initial weights, and "
            f"{' and '.join(asking)} {'has' if len(asking) == 1 else 'have'} no effect"
        )

    @property
    def step_file(self) -> str | None:
        """The file name to resume from, where resume_training names one."""
        return self.resume_training if isinstance(self.resume_training, str) else None


def _layout_settings(values: Mapping[str, Any]) -> tuple[tuple[tuple[str, bool], ...], list[str]]:
    """The settings of the network in a MindFormers configuration, and a line for each with another value.

    What a network does not have is not there.
    """

    def inside(mapping: Any, key: str) -> Any:
        return mapping.get(key) if isinstance(mapping, Mapping) else None

    network = inside(values.get("model"), "model_config")
    found: dict[str, bool] = {}
    problems = []
    for section in (values.get("moe_config"), inside(network, "moe_config"), network):
        for key in LAYOUT_SETTINGS:
            value = inside(section, key)
            if value is None:
                continue
            try:
                found[key] = parse_bool(value)
            except ValueError as error:
                problems.append(f"{key} of the network: {error}")
    return tuple(sorted(found.items())), problems


def parse_bool(value: Any) -> bool:
    """True and False as bool or text. Raises ValueError for anything else."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"True or False was expected, not {_shown(value)}")


def _expanded(value: Any) -> Any:
    """Put environment values in for variables, defaults also for empty ones as a shell does.

    Raises ValueError for a variable without a value: "" in its place would be another path, or none.
    """
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        found = os.environ.get(name)
        if found or default is not None:
            return found or default
        what = "not set" if found is None else "empty"
        raise ValueError(f"the environment variable {name} is {what}; set it, or write ${{{name}:-default}}")

    return _VARIABLE.sub(lookup, value)


def _shown(value: Any) -> str:
    """A value for a message, in about a line however large it is."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = 200
    return shortened.repr(value)


def _parse_path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"a path was expected, not {_shown(value)}")  # noqa: TRY004 (collected as ValueError)
    text = os.fspath(value)
    if text and not text.strip():
        raise ValueError(f"a path was expected, not {text!r}; write '' for none")
    if "\0" in text:
        raise ValueError(f"a path was expected, not {_shown(text)}: it holds a NUL character")
    return "" if text == _NOTHING else os.path.expanduser(text)


def _parse_positive(value: Any) -> int:
    try:
        number = int(str(value).strip())
    except ValueError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"a whole number of at least 1 was expected, not {_shown(value)}")
    return number


def parse_seconds(value: Any) -> float:
    """A time. Raises ValueError for what is no positive number."""
    try:
        number = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"a positive number of seconds was expected, not {_shown(value)}")
    return number


def _parse_url(value: Any) -> str:
    """The URL of an object storage; what MindFormers' configurations have in its place counts as none."""
    if value in ("", "None", "Please input obs url on AICC platform."):
        return ""
    return check_url(str(value))


def _parse_output_dir(value: Any) -> str:
    path = _parse_path(value) or Config.output_dir
    if is_url(path):
        raise ValueError(f"a local folder was expected, not {path!r}; set remote_save_url to that")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"MindSpore cannot write to a folder whose name is not UTF-8: {path}") from None
    return path


def _parse_resume(value: Any) -> bool | str:
    try:
        return parse_bool(value)
    except ValueError:
        if isinstance(value, str) and _STEP_FILE.search(value):
            return value
    raise ValueError(f"True, False or a file name like llama-3_150.ckpt was expected, not {_shown(value)}")


def _parse_names(value: Any) -> tuple[str, ...]:
    """Patterns of names, with commas between them in text; True stands for all, False for none."""
    names = value.split(",") if isinstance(value, str) else value
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) and name.strip() for name in names):
        patterns = tuple(name.strip() for name in names)
        if len(patterns) != 1 or patterns[0].lower() not in (*_TRUE, *_FALSE):
            return patterns
        value = patterns[0]
    try:
        return ("*",) if parse_bool(value) else ()
    except ValueError:
        raise ValueError(f"True, False or a list of parameter names was expected, not {value!r}") from None


def _choice(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)} was expected, not {_shown(value)}")
        return str(value)

    return parse


def _choice_or_off(*choices: str) -> Callable[[Any], str]:
    """One of the choices, `off` among them; yaml reads a bare `off` as False."""
    return lambda value: _choice(*choices)("off" if value is False else value)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "load_checkpoint": _parse_path,
    "src_strategy_path_or_dir": _parse_path,
    "auto_trans_ckpt": parse_bool,
    "auto_trans_save": parse_bool,
    "transform_process_num": _parse_positive,
    "transform_by_rank": parse_bool,
    "output_dir": _parse_output_dir,
    "use_parallel": parse_bool,
    "run_mode": _choice(*RUN_MODES),
    "resume_training": _parse_resume,
    "allow_missing": _parse_names,
    "only_save_strategy": parse_bool,
    "load_ckpt_format": _choice("ckpt", "safetensors"),
    "check_contents": _choice_or_off(*MODES),
    "verify_checkpoint": parse_bool,
    "share_reads": _choice_or_off("auto", "off"),
    "transform_timeout": parse_seconds,
    "remote_save_url": _parse_url,
    "npu_num_per_node": _parse_positive,
}
KEYS = tuple(_PARSERS)
