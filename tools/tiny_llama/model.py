"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; names as in MindFormers.

Each parameter is made as this rank's slice of a complete tensor that is drawn from the seed and the
parameter's name, so every strategy starts from the same model.
"""

from __future__ import annotations

import zlib

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from .parallel import Axes, CopyToRanks, GatherColumns, Mesh, SumOfRanks
from .settings import ModelSettings, Settings

INITIAL_DEVIATION = 0.08


class Slices:
    """Makes the parameters of a rank and remembers how each is cut."""

    def __init__(self, mesh: Mesh, seed: int) -> None:
        self.mesh = mesh
        self.seed = seed
        self.axes: dict[str, Axes] = {}

    def make(self, name: str, shape: tuple[int, ...], axes: Axes) -> Parameter:
        """Return this rank's slice of the complete tensor `name`; vectors start at 1, as norms do."""
        self.axes[name] = axes
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        full = random.normal(0.0, INITIAL_DEVIATION, shape) if len(shape) > 1 else np.ones(shape)
        return Parameter(Tensor(self.mesh.part(full.astype(np.float32), axes)), name=name.rpartition(".")[2])


class Linear(nn.Cell):  # type: ignore[misc]
    """y = x W^T with W [out, in], cut in `out` (axes "mp", None) or in `in` (None, "mp")."""

    def __init__(self, slices: Slices, name: str, shape: tuple[int, int], axes: Axes) -> None:
        super().__init__()
        self.weight = slices.make(f"{name}.weight", shape, axes)

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(x, self.weight.T)


class RMSNorm(nn.Cell):  # type: ignore[misc]
    """x / rms(x) * weight; the weight is whole on every rank."""

    def __init__(self, slices: Slices, name: str, model: ModelSettings) -> None:
        super().__init__()
        self.eps = model.rms_norm_eps
        self.weight = slices.make(f"{name}.weight", (model.hidden_size,), (None,))

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + self.eps) * self.weight


class Embedding(nn.Cell):  # type: ignore[misc]
    """Token vectors; the table whole on every rank, or cut in its vocabulary over mp."""

    def __init__(self, slices: Slices, name: str, model: ModelSettings, whole: bool) -> None:
        super().__init__()
        mesh = slices.mesh
        self.rows = model.vocab_size if whole else model.vocab_size // mesh.mp
        self.first = 0 if whole else mesh.mp_index * self.rows
        self.whole = whole
        shape, axes = (model.vocab_size, model.hidden_size), (None if whole else "mp", None)
        self.embedding_weight = slices.make(f"{name}.embedding_weight", shape, axes)
        self.sum_of_ranks = SumOfRanks(mesh)

    def construct(self, tokens: Tensor) -> Tensor:
        if self.whole:
            return ops.gather(self.embedding_weight, tokens, 0)
        row = tokens - self.first
        mine = ops.logical_and(row >= 0, row < self.rows)
        vectors = ops.gather(self.embedding_weight, ops.clamp(row, 0, self.rows - 1), 0)
        return self.sum_of_ranks(vectors * mine.astype(ms.float32).expand_dims(-1))


class Attention(nn.Cell):  # type: ignore[misc]
    """Causal attention; the heads are shared out over mp."""

    def __init__(self, slices: Slices, name: str, model: ModelSettings) -> None:
        super().__init__()
        mp = slices.mesh.mp
        self.dim, self.heads, self.kv_heads = model.head_dim, model.num_heads // mp, model.n_kv_heads // mp
        hidden, kv = model.hidden_size, model.n_kv_heads * model.head_dim
        self.wq = Linear(slices, f"{name}.wq", (hidden, hidden), ("mp", None))
        self.wk = Linear(slices, f"{name}.wk", (kv, hidden), ("mp", None))
        self.wv = Linear(slices, f"{name}.wv", (kv, hidden), ("mp", None))
        self.wo = Linear(slices, f"{name}.wo", (hidden, hidden), (None, "mp"))
        self.copy_to_ranks, self.sum_of_ranks = CopyToRanks(slices.mesh), SumOfRanks(slices.mesh)
        cosine, sine = rotary_tables(model)
        self.cosine, self.sine = Tensor(cosine), Tensor(sine)
        self.mask = Tensor(np.triu(np.full((model.seq_length,) * 2, -1.0e9, np.float32), 1))

    def rotate(self, x: Tensor) -> Tensor:
        """Turn the halves of each head by an angle that grows with the position."""
        half = self.dim // 2
        turned = ops.concat((-x[..., half:], x[..., :half]), -1)
        return x * self.cosine + turned * self.sine

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        batch, length, _ = x.shape
        return x.reshape(batch, length, heads, self.dim).transpose(0, 2, 1, 3)

    def construct(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = self.copy_to_ranks(x)
        queries = self.rotate(self.split_heads(self.wq(x), self.heads))
        keys = self.rotate(self.split_heads(self.wk(x), self.kv_heads))
        values = self.split_heads(self.wv(x), self.kv_heads)
        shared = self.heads // self.kv_heads
        keys, values = ops.repeat_interleave(keys, shared, 1), ops.repeat_interleave(values, shared, 1)
        scores = ops.matmul(queries, keys.transpose(0, 1, 3, 2)) * (self.dim**-0.5) + self.mask
        mixed = ops.matmul(ops.softmax(scores, -1), values)
        return self.sum_of_ranks(self.wo(mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)))


class FeedForward(nn.Cell):  # type: ignore[misc]
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, slices: Slices, name: str, model: ModelSettings) -> None:
        super().__init__()
        hidden, inner = model.hidden_size, model.intermediate_size
        self.w1 = Linear(slices, f"{name}.w1", (inner, hidden), ("mp", None))
        self.w2 = Linear(slices, f"{name}.w2", (hidden, inner), (None, "mp"))
        self.w3 = Linear(slices, f"{name}.w3", (inner, hidden), ("mp", None))
        self.copy_to_ranks, self.sum_of_ranks = CopyToRanks(slices.mesh), SumOfRanks(slices.mesh)

    def construct(self, x: Tensor) -> Tensor:
        x = self.copy_to_ranks(x)
        gate = self.w1(x)
        return self.sum_of_ranks(self.w2(gate * ops.sigmoid(gate) * self.w3(x)))


class DecoderLayer(nn.Cell):  # type: ignore[misc]
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, slices: Slices, name: str, model: ModelSettings) -> None:
        super().__init__()
        self.attention = Attention(slices, f"{name}.attention", model)
        self.attention_norm = RMSNorm(slices, f"{name}.attention_norm", model)
        self.feed_forward = FeedForward(slices, f"{name}.feed_forward", model)
        self.ffn_norm = RMSNorm(slices, f"{name}.ffn_norm", model)

    def construct(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Cell):  # type: ignore[misc]
    """Embedding, layers, last norm: int32 [batch, length] -> float32 [batch, length, hidden]."""

    def __init__(self, slices: Slices, name: str, model: ModelSettings, whole_embedding: bool) -> None:
        super().__init__()
        self.tok_embeddings = Embedding(slices, f"{name}.tok_embeddings", model, whole_embedding)
        self.layers = nn.CellList(
            [DecoderLayer(slices, f"{name}.layers.{index}", model) for index in range(model.num_layers)]
        )
        self.norm_out = RMSNorm(slices, f"{name}.norm_out", model)

    def construct(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm_out(x)


class TinyLlama(nn.Cell):  # type: ignore[misc]
    """Mean next-token loss of int32 tokens [batch, seq_length + 1]; the last column is only a label."""

    def __init__(self, settings: Settings, mesh: Mesh) -> None:
        super().__init__()
        slices = Slices(mesh, settings.seed)
        model = settings.model
        self.model = Decoder(slices, "model", model, settings.parallel.vocab_emb_dp)
        self.lm_head = Linear(slices, "lm_head", (model.vocab_size, model.hidden_size), ("mp", None))
        self.copy_to_ranks, self.gather_columns = CopyToRanks(mesh), GatherColumns(mesh)
        self.axes = slices.axes

    def construct(self, tokens: Tensor) -> Tensor:
        hidden = self.copy_to_ranks(self.model(tokens[:, :-1]))
        columns = self.lm_head(hidden)
        logits = self.gather_columns(columns.reshape(-1, columns.shape[-1]))
        return ops.cross_entropy(logits, tokens[:, 1:].reshape(-1))


def rotary_tables(model: ModelSettings) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosine and sine of the position angles, float32 [seq_length, head_dim]."""
    exponents = np.arange(0, model.head_dim, 2) / model.head_dim
    angles = np.outer(np.arange(model.seq_length), model.rope_theta**-exponents)
    angles = np.concatenate((angles, angles), axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
