"""Requests to an object storage are tried again, after pauses that become longer, where that may help."""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.log import log
from mindformers_ckpt.objects.errors import MissingObject, ObjectError
from mindformers_ckpt.words import in_one_line

A = TypeVar("A")
T = TypeVar("T")

_CREDENTIALS = "check the credentials (environment, ~/.aws, role of the machine) and the rights that they give"
_BUSY = {408, 429}
_BUSY_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "OperationAborted"}


class Retries(NamedTuple):
    """How often a request is repeated that got nowhere, and after which pauses (seconds, doubled each time)."""

    attempts: int = 8
    first_pause: float = 0.5
    longest_pause: float = 20.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait after an attempt, counted from 1; a little less by chance, so that not all come at once."""
        longest = min(self.first_pause * 2.0 ** (attempt - 1), self.longest_pause)
        return longest * random.uniform(0.5, 1)


RETRIES = Retries()
ONCE = Retries(attempts=1)  # for who repeats more than a request, and counts


def persist(
    action: Callable[[], T],
    place: str,
    progress: Callable[[], int] = lambda: 0,
    retries: Retries | None = None,
) -> T:
    """Try until it succeeds, cannot succeed, or attempts have run out: raises ObjectError that names `place`.

    `progress` tells how far it has come: attempts are counted anew after each that got further. `retries` are RETRIES
    where none are given.
    """
    retries = retries or RETRIES
    attempt, reached = 0, progress()
    while True:
        try:
            return action()
        except Exception as error:
            found = _as_object_error(error, place)
            if found is None:
                raise
            if progress() > reached:
                attempt, reached = 0, progress()
            attempt += 1
            if found.is_final or retries.attempts == 1:
                raise found from error
            if attempt >= retries.attempts:
                advice = f"given up after {attempt} attempts; check the storage and its endpoint, then go on"
                raise type(found)(found.errno or 0, f"{found.strerror} ({advice})", place, is_final=True) from error
        say = log.warning if attempt > 2 else log.info
        say("%s; attempt %d of %d follows", found, attempt + 1, retries.attempts)
        time.sleep(retries.pause(attempt))


def at_once(action: Callable[[A], T], items: Iterable[A], most: int = 16) -> list[T]:
    """Do something with all items, some at a time; what comes of it, in their order.

    The first failure goes through, and what has not begun by then is not done.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(most, "requests") as pool:
        return list(pool.map(action, items))


def _as_object_error(error: Exception, place: str) -> ObjectError | None:
    """What an error of the libraries below means; None for one that is not theirs."""
    import botocore.exceptions as known
    import urllib3.exceptions

    if isinstance(error, ObjectError):
        return error
    if isinstance(error, known.ClientError):
        answer = error.response
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _refusal(int(status), str(answer.get("Error", {}).get("Code", "")), place)
    if isinstance(error, (known.NoCredentialsError, known.PartialCredentialsError, known.CredentialRetrievalError)):
        return ObjectError(errno.EACCES, f"{in_one_line(error)}; {_CREDENTIALS}", place, is_final=True)
    if isinstance(error, (known.ConnectionError, known.HTTPClientError, urllib3.exceptions.HTTPError)):
        return ObjectError(errno.EIO, in_one_line(error), place, is_final=False)
    if isinstance(error, (known.IncompleteReadError, known.ReadTimeoutError, known.ResponseStreamingError)):
        return ObjectError(errno.EIO, in_one_line(error), place, is_final=False)
    if isinstance(error, known.BotoCoreError):
        return ObjectError(errno.EINVAL, in_one_line(error), place, is_final=True)
    if isinstance(error, OSError) and not isinstance(error, ConfigError):
        return ObjectError(errno.EIO, in_one_line(error), place, is_final=False)
    return None


def refusal(status: int, body: bytes, place: str) -> ObjectError:
    """What an answer means that is an error, by its status and its text."""
    code = re.search(rb"<Code>(\w+)</Code>", body)
    return _refusal(status, code[1].decode() if code else "", place)


def _refusal(status: int, code: str, place: str) -> ObjectError:
    text = " ".join(f"{status} {code if code != str(status) else ''}".split())
    if code == "NoSuchBucket":
        return ObjectError(errno.ENOENT, "there is no such bucket", place, is_final=True)
    if code == "NoSuchUpload":
        text = "its upload is gone; has another run for the same place begun?"
        return MissingObject(errno.ENOENT, text, place, is_final=True)
    if status == 404:
        return MissingObject(errno.ENOENT, "there is no such object", place, is_final=True)
    if status == 412:
        return ObjectError(errno.ESTALE, "it was written again while it was read", place, is_final=True)
    if status in (401, 403):
        return ObjectError(errno.EACCES, f"the storage refuses ({text}); {_CREDENTIALS}", place, is_final=True)
    is_busy = status >= 500 or status in _BUSY or code in _BUSY_CODES
    return ObjectError(errno.EIO, f"the storage answers {text}", place, is_final=not is_busy)
