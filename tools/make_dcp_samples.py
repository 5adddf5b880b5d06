"""Write distributed checkpoints with PyTorch's own code: `python tools/make_dcp_samples.py FOLDER [--only NAME …]`.

Needs torch, on a CPU; jobs of 2 and 4 processes talk over gloo. Each sample is a folder with the checkpoint, and the
whole tensors of it, gathered by PyTorch, in whole.safetensors. tests/data/dcp are those of `--golden`.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The samples in tests/data, which are small.
GOLDEN = ("fsdp2", "two_dimensions", "types", "safetensors", "consolidated", "own_metadata")
# A Llama whose dimensions no number of ranks divides.
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 7,
    "vocab_size": 11,
    "tie_word_embeddings": False,
}
_LAYER = "model.layers.0."
LLAMA: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (11, 8),
    f"{_LAYER}input_layernorm.weight": (8,),
    f"{_LAYER}self_attn.q_proj.weight": (16, 8),
    f"{_LAYER}self_attn.k_proj.weight": (8, 8),
    f"{_LAYER}self_attn.v_proj.weight": (8, 8),
    f"{_LAYER}self_attn.o_proj.weight": (8, 16),
    f"{_LAYER}post_attention_layernorm.weight": (8,),
    f"{_LAYER}mlp.gate_proj.weight": (7, 8),
    f"{_LAYER}mlp.up_proj.weight": (7, 8),
    f"{_LAYER}mlp.down_proj.weight": (8, 7),
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}
SMALL: Mapping[str, tuple[int, ...]] = {"embedding.weight": (5, 3), "layer.weight": (3, 7), "layer.bias": (3,)}


class Sample(NamedTuple):
    """A checkpoint: how many ranks save it, and what a rank does, which returns what was saved."""

    ranks: int
    save: Callable[[Path, int], Mapping[str, Any]]


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tensors every element of which is another number."""
    import torch

    found, start = {}, 1
    for name, shape in shapes.items():
        size = math.prod(shape)
        found[name] = torch.arange(start, start + size, dtype=torch.float32).reshape(shape)
        start += size
    return found


def _module(tensors: Mapping[str, Any]) -> Any:
    """A module with parameters of these names."""
    import torch

    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, torch.nn.Parameter(tensor))
    return root


def _fsdp2(shapes: Mapping[str, tuple[int, ...]], optimizer: bool) -> Callable[[Path, int], Mapping[str, Any]]:
    """What a job with FSDP2 saves: the model, and the states of AdamW after a step."""

    def save(folder: Path, ranks: int) -> Mapping[str, Any]:
        import torch
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = _module(values(shapes))
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        saved: dict[str, Any] = {}
        if optimizer:
            adam = torch.optim.AdamW(model.parameters(), lr=0.01)
            for parameter in model.parameters():
                parameter.grad = parameter.detach() * 0.5
            adam.step()
            saved["optim"] = get_optimizer_state_dict(model, adam)
            saved["step"] = torch.tensor(1)
        saved["model"] = get_model_state_dict(model)
        dcp.save(saved, checkpoint_id=folder)
        return saved

    return save


def _two_dimensions(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[Path, int], Mapping[str, Any]]:
    """Tensors that a mesh of two dimensions cuts along both, one of them twice, or not at all."""

    def save(folder: Path, ranks: int) -> Mapping[str, Any]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
        ways = ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)], [Replicate(), Shard(1)])
        saved = {}
        for number, (name, tensor) in enumerate(values(shapes).items()):
            way = ways[number % len(ways)] if tensor.ndim > 1 else [Replicate(), Shard(0)]
            saved[name] = distribute_tensor(tensor, mesh, way)
        dcp.save(saved, checkpoint_id=folder)
        return saved

    return save


def _types(folder: Path, _: int) -> Mapping[str, Any]:
    """Element types and shapes, in nested dictionaries and lists, beside what is no tensor."""
    import torch
    import torch.distributed.checkpoint as dcp

    kinds = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64),
    )
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    more = {"scalar": torch.tensor(2.5), "nothing": torch.zeros(0, 3), "rows": torch.arange(24.0).reshape(4, 6)[1:3]}
    saved = {"kinds": tensors, "more": [more, {"text": "not a tensor"}], "number": 3}
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    return saved


def _safetensors(consolidated: bool) -> Callable[[Path, int], Mapping[str, Any]]:
    def save(folder: Path, ranks: int) -> Mapping[str, Any]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (ranks,))
        saved = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in values(SMALL).items()}
        files = {name: 1 + number % 2 for number, name in enumerate(SMALL)}
        writer = HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=consolidated
        )
        dcp.save(saved, storage_writer=writer)
        return saved

    return save


def _own_metadata(folder: Path, ranks: int) -> Mapping[str, Any]:
    """Every rank writes the metadata of its own part, without talking to the others."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    saved = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in values(SMALL).items()}
    dcp.save(saved, checkpoint_id=folder, use_collectives=False)
    return saved


SAMPLES: Mapping[str, Sample] = {
    "fsdp2": Sample(2, _fsdp2(SMALL, optimizer=True)),
    "two_dimensions": Sample(4, _two_dimensions(SMALL)),
    "types": Sample(2, _types),
    "safetensors": Sample(2, _safetensors(consolidated=False)),
    "consolidated": Sample(2, _safetensors(consolidated=True)),
    "own_metadata": Sample(2, _own_metadata),
    "llama_fsdp2_2": Sample(2, _fsdp2(LLAMA, optimizer=True)),
    "llama_fsdp2_4": Sample(4, _fsdp2(LLAMA, optimizer=True)),
    "llama_two_dimensions": Sample(4, _two_dimensions(LLAMA)),
}


def write_samples(folder: Path, names: Sequence[str]) -> None:
    """Write samples; jobs of as many ranks are one."""
    import torch.multiprocessing as multiprocessing

    for ranks in sorted({SAMPLES[name].ranks for name in names}):
        own = [name for name in names if SAMPLES[name].ranks == ranks]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.spawn(_rank, (ranks, port, folder, own), nprocs=ranks)


def _rank(rank: int, ranks: int, port: int, folder: Path, names: Sequence[str]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for name in names:
        alone = name == "types"
        place = folder / name / "checkpoint"
        if rank == 0:
            place.mkdir(parents=True)
        dist.barrier()
        if not alone or rank == 0:
            saved = SAMPLES[name].save(place, ranks)
            whole = dict(_whole(saved))
            if rank == 0:
                _write_whole(folder / name / "whole.safetensors", whole)
        dist.barrier()
    dist.destroy_process_group()


def _whole(saved: Any, path: tuple[str, ...] = ()) -> Any:
    """The tensors of nested dictionaries and lists under joined names, each whole. All ranks call it."""
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(saved, Mapping):
        children = [(str(key), value) for key, value in saved.items()]
    elif isinstance(saved, (list, tuple)):
        children = [(str(number), value) for number, value in enumerate(saved)]
    elif isinstance(saved, torch.Tensor):
        yield ".".join(path), (saved.full_tensor() if isinstance(saved, DTensor) else saved)
        return
    else:
        return
    for key, value in children:
        yield from _whole(value, (*path, key))


def _write_whole(path: Path, tensors: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, str(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(SAMPLES))
    parser.add_argument("--golden", action="store_true", help="those of tests/data/dcp")
    options = parser.parse_args()
    write_samples(options.folder.absolute(), options.only or (GOLDEN if options.golden else tuple(SAMPLES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
