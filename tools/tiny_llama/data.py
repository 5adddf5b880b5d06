"""Synthetic token batches: a function of seed and global step, the same under every strategy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .settings import Settings

# Steps are not negative, so this batch is never trained on.
EVALUATION_STEP = 2**31 - 1
# Of the tokens, one in ten is noise: the loss has something to learn and never reaches zero.
NOISE = 0.1


def global_batch(settings: Settings, step: int) -> NDArray[np.int32]:
    """Return the global batch of a step, int32 [batch_size, seq_length + 1].

    A token mostly follows from the one before it by a fixed rule. The last column is only a label.
    """
    model, rows = settings.model, settings.runner.batch_size
    random = np.random.default_rng([settings.seed, step])
    tokens = np.empty((rows, model.seq_length + 1), np.int32)
    tokens[:, 0] = random.integers(model.vocab_size, size=rows)
    noise = random.random(tokens.shape) < NOISE
    strays = random.integers(model.vocab_size, size=tokens.shape)
    for column in range(1, tokens.shape[1]):
        follower = (tokens[:, column - 1] * 3 + 7) % model.vocab_size
        tokens[:, column] = np.where(noise[:, column], strays[:, column], follower)
    return tokens


def local_batch(settings: Settings, step: int, dp_index: int) -> NDArray[np.int32]:
    """Return the rows of the global batch that one data-parallel rank trains on."""
    rows = settings.runner.batch_size // settings.parallel.data_parallel
    return global_batch(settings, step)[dp_index * rows : (dp_index + 1) * rows]
