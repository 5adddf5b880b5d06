"""Do all ranks of a job have the same settings? What the main rank reads and does counts for all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields

from mindformers_ckpt.errors import ConfigError, raise_problems
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import name_ranks
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.log import log

# Nodes without a shared disk have output dirs of their own; shared_disk.py looks at the others.
_MAY_DIFFER = ("output_dir", "transform_timeout")
# Where nothing is re-sliced each rank loads what it is given, which may be a disk of its node.
_OWN_SOURCES = ("load_checkpoint", "src_strategy_path_or_dir", "resume_training")


def check_alike(config: Config, cluster: Cluster, reslices: bool) -> None:
    """Compare the hook's keys of all ranks, which all call it.

    Raises ConfigError on all of them where they differ; where nothing is re-sliced, other sources are a warning.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _MAY_DIFFER}
    found = differences(cluster, values)
    own = [] if reslices else [found.pop(key) for key in _OWN_SOURCES if key in found]
    raise_different(found)
    if own and cluster.rank == MAIN_RANK:
        log.warning("the ranks do not load the same checkpoint; %s", "; ".join(own))


def raise_different(found: Mapping[str, str]) -> None:
    """Raise ConfigError for settings that are not the same on all ranks."""
    raise_problems(
        ConfigError, "the ranks of this job have different settings; give all ranks the same ones", list(found.values())
    )


def differences(cluster: Cluster, values: Mapping[str, object]) -> dict[str, str]:
    """For each setting that is not the same on all ranks a line with its values. All ranks call it."""
    texts = {key: str(value) for key, value in values.items()}
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()
    if len(set(cluster.gather("digest of settings", digest))) == 1:
        return {}
    told = cluster.gather("settings", texts)
    found = {}
    for key in texts:
        ranks: dict[str, list[int]] = {}
        for rank, others in enumerate(told):
            ranks.setdefault(str(others.get(key)), []).append(rank)
        if len(ranks) > 1:
            parts = [f"{text!r:.200} on {name_ranks(of)}" for text, of in list(ranks.items())[:4]]
            found[key] = f"{key}: {', '.join(parts)}{', …' if len(ranks) > 4 else ''}"
    return found
