"""The training yaml of the tiny model, as one validated, frozen object.

The keys and their places are those of MindFormers. The five keys of the checkpoint hook are not read
here: the hook reads them from the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

Section = TypeVar("Section")

# Keys that a command line may set although the yaml leaves them out.
OPTIONAL_KEYS = frozenset(
    {
        "auto_trans_ckpt",
        "load_checkpoint",
        "only_save_strategy",
        "output_dir",
        "resume_training",
        "run_mode",
        "seed",
        "src_strategy_path_or_dir",
        "transform_by_rank",
        "transform_process_num",
        "use_parallel",
    }
)


class SettingsError(ValueError):
    """The yaml or the command line asks for something that the tiny model cannot do."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Sizes of the decoder; all in elements."""

    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 8
    n_kv_heads: int = 4
    seq_length: int = 32
    rms_norm_eps: float = 1.0e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class ParallelSettings:
    """Sizes of the device axes. Ranks count row-major over (data_parallel, model_parallel)."""

    data_parallel: int = 1
    model_parallel: int = 1
    pipeline_stage: int = 1
    vocab_emb_dp: bool = True
    """True: every rank holds the whole embedding table. False: it is cut in its vocabulary over mp."""


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """Length of the run. `steps` counts the steps of this run, on top of those already in a checkpoint."""

    epochs: int = 1
    steps: int = 10
    batch_size: int = 8
    """Sequences in one global batch; each data-parallel rank takes its part."""


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """Learning rate: linear warm-up, then a cosine down to a tenth, as a function of the global step."""

    learning_rate: float = 1.0e-2
    warmup_steps: int = 5
    total_steps: int = 200


@dataclass(frozen=True, slots=True)
class SaveSettings:
    """What is saved when. 0 steps: only at the end of the run."""

    prefix: str = "tiny_llama"
    save_checkpoint_steps: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """One training job of the tiny model."""

    seed: int
    output_dir: Path
    use_parallel: bool
    model: ModelSettings
    parallel: ParallelSettings
    runner: RunnerSettings
    schedule: ScheduleSettings
    save: SaveSettings


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a training yaml into a dict; SettingsError if it is missing or is not a mapping."""
    if not path.is_file():
        raise SettingsError(f"--config {path}: no such file (paths count from {Path.cwd()})")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: expected a mapping of keys, found {type(content).__name__}")
    return content


def parse_overrides(arguments: Sequence[str], content: Mapping[str, Any]) -> dict[str, Any]:
    """Read `--key value` pairs; a dotted key reaches into a section: `--runner_config.steps 20`.

    Values are read as yaml, so `False` is a bool and `20` an int.
    """
    if len(arguments) % 2:
        raise SettingsError(f"options come in pairs, --key value; got {' '.join(arguments)}")
    overrides: dict[str, Any] = {}
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        key = option.removeprefix("--")
        section = key.split(".")[0]
        if key == option or (section not in content and section not in OPTIONAL_KEYS):
            known = ", ".join(sorted({*content, *OPTIONAL_KEYS}))
            raise SettingsError(f"unknown option {option}; the yaml knows {known}")
        overrides[key] = yaml.safe_load(value)
    return overrides


def merge(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with `overrides` applied, dotted keys in their sections; the input stays as it is."""
    merged = dict(content)
    for key, value in overrides.items():
        section, _, rest = key.partition(".")
        if rest:
            inner = merged.get(section) or {}
            if not isinstance(inner, Mapping):
                raise SettingsError(f"--{key}: the yaml has no section {section}")
            merged[section] = merge(inner, {rest: value})
        else:
            merged[section] = value
    return merged


def build_settings(content: Mapping[str, Any]) -> Settings:
    """Validate a merged training yaml. All faults are in one SettingsError."""
    problems: list[str] = []
    model = _section(ModelSettings, content, ("model", "model_config"), problems)
    parallel = _section(ParallelSettings, content, ("parallel_config",), problems)
    settings = Settings(
        seed=int(content.get("seed", 0)),
        output_dir=Path(content.get("output_dir") or "./output"),
        use_parallel=bool(content.get("use_parallel", True)),
        model=model,
        parallel=parallel if content.get("use_parallel", True) else ParallelSettings(),
        runner=_section(RunnerSettings, content, ("runner_config",), problems),
        schedule=_section(ScheduleSettings, content, ("lr_schedule",), problems),
        save=_section(SaveSettings, content, ("save_config",), problems),
    )
    if content.get("run_mode", "train") != "train":
        problems.append(f"run_mode: {content['run_mode']}: the tiny model only knows train")
    problems += _size_problems(settings)
    if problems:
        raise SettingsError("\n  - ".join(["the training yaml has faults:", *problems]))
    return settings


def _section(
    kind: type[Section],
    content: Mapping[str, Any],
    path: tuple[str, ...],
    problems: list[str],
) -> Section:
    values: Any = content
    for key in path:
        values = values.get(key) or {}
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = sorted(set(values) - set(known))
    if unknown:
        problems.append(f"{'.'.join(path)}: unknown {', '.join(unknown)} (known: {', '.join(known)})")
    return kind(**{key: value for key, value in values.items() if key in known})


def _size_problems(settings: Settings) -> list[str]:
    model, parallel = settings.model, settings.parallel
    problems = []
    if parallel.pipeline_stage != 1:
        problems.append("parallel_config.pipeline_stage: the tiny model has no pipeline, only 1 is possible")
    divisible = {
        "num_heads": model.num_heads,
        "n_kv_heads": model.n_kv_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }
    problems += [
        f"model.model_config.{name} ({size}) is not divisible by model_parallel ({parallel.model_parallel})"
        for name, size in divisible.items()
        if size % parallel.model_parallel
    ]
    if settings.runner.batch_size % parallel.data_parallel:
        problems.append(
            f"runner_config.batch_size ({settings.runner.batch_size}) is not divisible by "
            f"data_parallel ({parallel.data_parallel})"
        )
    return problems
