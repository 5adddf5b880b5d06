"""How a rank and the coordinator show each other that they know one key, before anything else is read.

    coordinator -> rank   GREETING, number of the secret, nonce
    rank -> coordinator   nonce, HMAC of all that was said
    coordinator -> rank   HMAC of all that was said, or NO

All of these have a fixed length, so that nothing of a stranger is parsed. The two HMACs begin with the role of
the one who sends it: none can be sent back as an answer. A nonce is new for every connection: none can be sent again.
"""

from __future__ import annotations

import hmac
import secrets

from mindformers_ckpt.job.cluster.messages import ProtocolError

GREETING = b"mindformers_ckpt meeting 2\n"
NUMBER = 8  # bytes that tell the ranks which secret is meant
NONCE = 32
DIGEST = 32
CHALLENGE = len(GREETING) + NUMBER + NONCE  # lengths of the three
ANSWER = NONCE + DIGEST
NO = bytes(DIGEST)


def new_challenge(number: bytes) -> bytes:
    """The first words of a coordinator whose secret has that number."""
    return GREETING + number + secrets.token_bytes(NONCE)


def number_in(challenge: bytes) -> bytes:
    """The number of the secret that a challenge names. Raises ProtocolError when it is not a challenge."""
    if not challenge.startswith(GREETING):
        raise ProtocolError("an unexpected greeting")
    return challenge[len(GREETING) : len(GREETING) + NUMBER]


def new_answer(key: bytes, challenge: bytes) -> bytes:
    """The answer of a rank that knows the key."""
    nonce = secrets.token_bytes(NONCE)
    return nonce + _proof(key, b"rank", challenge, nonce)


def is_answer(key: bytes, challenge: bytes, answer: bytes) -> bool:
    """Whether the one who answers knows the key."""
    return hmac.compare_digest(answer[NONCE:], _proof(key, b"rank", challenge, answer[:NONCE]))


def confirmation(key: bytes, challenge: bytes, answer: bytes) -> bytes:
    """What only a coordinator that knows the key can say to an answer."""
    return _proof(key, b"coordinator", challenge, answer[:NONCE])


def _proof(key: bytes, role: bytes, challenge: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, role + challenge + nonce, "sha256")
