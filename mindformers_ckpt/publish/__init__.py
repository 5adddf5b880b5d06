"""Results come into being whole: written aside, described by a manifest, put in place in one step."""

from mindformers_ckpt.publish.manifest import MANIFEST_FILE, read_manifest, read_manifests
from mindformers_ckpt.publish.replace import recover
from mindformers_ckpt.publish.staging import Staging, check_free_space
from mindformers_ckpt.publish.strays import Stray, find_strays

__all__ = [
    "MANIFEST_FILE",
    "Staging",
    "Stray",
    "check_free_space",
    "find_strays",
    "read_manifest",
    "read_manifests",
    "recover",
]
