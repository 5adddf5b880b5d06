"""Requests to S3, or to what speaks it, over botocore. Every request is repeated where that may help.

Credentials, region and endpoint come from where botocore looks for them: the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_ENDPOINT_URL, AWS_PROFILE …), ~/.aws, the role of the machine.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.objects.attempts import Retries, persist, refusal
from mindformers_ckpt.objects.errors import MissingObject

CONNECTIONS = 32
_READ_BYTES = 1 << 20
_TIMEOUTS = (10, 60)  # seconds: to connect, and for each piece of an answer
_SIGNED_SECONDS = 240.0  # temporary credentials are good for longer when they are used
_AMAZON = ".amazonaws.com"
_ENDPOINT = "AWS_ENDPOINT_URL"
_ADVICE = f"set {_ENDPOINT} to the OBS endpoint of the bucket's region, e.g. https://obs.cn-north-4.myhuaweicloud.com"


class Found(NamedTuple):
    """An object: its key, bytes, the tag of its content, and when it was written (whole seconds)."""

    key: str
    size: int
    tag: str
    modified: int


class Part(NamedTuple):
    """A part of an upload that the storage has."""

    number: int
    size: int
    tag: str


class Client:
    """Requests to one storage. Its methods may be called by many threads, of which 32 have a request at a time.

    Raises ObjectError when a request fails for good, MissingObject when there is no such thing, and ConfigError where
    packages or an endpoint are missing.
    """

    def __init__(self, scheme: str, retries: Retries | None = None) -> None:
        try:
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
            from botocore.httpsession import URLLib3Session
            from botocore.session import Session
            from botocore.utils import get_environ_proxies
        except ImportError as error:
            raise ConfigError(
                f"{scheme}://: object storage needs further packages ({error}); "
                "run pip install 'mindformers_ckpt[object-storage]'"
            ) from error
        # One attempt a request, of limited time: attempts and pauses are counted here. Checksums of botocore's own are
        # an extension that other servers than Amazon's refuse.
        config = Config(
            connect_timeout=_TIMEOUTS[0],
            read_timeout=_TIMEOUTS[1],
            retries={"total_max_attempts": 1},
            max_pool_connections=CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
            signature_version="s3v4",
        )
        session = Session()
        region = None if session.get_config_variable("region") else "us-east-1"  # other storages have none
        try:
            self._client: Any = session.create_client("s3", config=config, region_name=region)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"{scheme}://: the object storage cannot be reached: {error}") from error
        if scheme == "obs" and _AMAZON in self._client.meta.endpoint_url:
            raise ConfigError(f"obs://: {_ADVICE}")
        endpoint = self._client.meta.endpoint_url
        self._http = URLLib3Session(
            verify=session.get_config_variable("ca_bundle") or True,
            proxies=get_environ_proxies(endpoint),
            timeout=_TIMEOUTS,
            max_pool_connections=CONNECTIONS,
        )
        self._signed: dict[tuple[str, str], tuple[float, str]] = {}
        self._scheme, self._retries = scheme, retries
        self._slots = threading.BoundedSemaphore(CONNECTIONS)

    def list(self, bucket: str, prefix: str) -> Iterator[Found]:
        """The objects whose keys begin with `prefix`, in the order of their keys; a request for each thousand."""
        marker = ""
        while True:
            page = self._ask("list_objects", bucket, prefix, "Prefix", Marker=marker)
            for entry in page.get("Contents", ()):
                yield _found(entry["Key"], entry["Size"], entry)
                marker = entry["Key"]
            if not page.get("IsTruncated"):
                return
            marker = page.get("NextMarker", marker)

    def head(self, bucket: str, key: str) -> tuple[Found, Mapping[str, str]]:
        """What an object is, and what its writer noted of it."""
        answer = self._ask("head_object", bucket, key)
        return _found(key, answer["ContentLength"], answer), answer.get("Metadata", {})

    def read(self, bucket: str, found: Found, start: int, memory: memoryview) -> int:
        """Fill memory from an object, as it was when it was found; how many bytes there were up to its end.

        What has arrived stays: another attempt asks for the rest.
        """
        wanted = max(0, min(len(memory), found.size - start))
        done = 0

        def attempt() -> None:
            nonlocal done
            if done < wanted:
                with self._slots:
                    for data in self._pieces(bucket, found, start + done, start + wanted):
                        memory[done : done + len(data)] = data
                        done += len(data)

        persist(attempt, self.url(bucket, found.key), lambda: done, self._retries)
        return done

    def _pieces(self, bucket: str, found: Found, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of a range, as they come.

        By an address that is signed once for many ranges: the client takes milliseconds of the processor to ask.
        """
        from botocore.awsrequest import AWSRequest

        headers = {"Range": f"bytes={start}-{stop - 1}", **({"If-Match": found.tag} if found.tag else {})}
        request = AWSRequest("GET", self._address(bucket, found.key), headers, stream_output=True)
        answer = self._http.send(request.prepare())
        try:
            if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
                raise refusal(answer.status_code, answer.content, self.url(bucket, found.key))
            if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise ConnectionError("the storage sends other bytes than those that were asked for")
            while start < stop:
                data = answer.raw.read(min(_READ_BYTES, stop - start))
                if not data:
                    raise ConnectionError(f"the answer ends {stop - start} bytes too early")
                start += len(data)
                yield data
        except BaseException:
            answer.raw.close()  # one that is read to its end gives its connection back instead
            raise

    def _address(self, bucket: str, key: str) -> str:
        """Where an object is read for the next minutes."""
        until, address = self._signed.get((bucket, key), (0.0, ""))
        if time.monotonic() >= until:
            address = self._client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, 3600)
            self._signed[bucket, key] = time.monotonic() + _SIGNED_SECONDS, address
        return address

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write a small object."""
        self._ask("put_object", bucket, key, Body=data)

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(MissingObject):
            self._ask("delete_object", bucket, key)

    def begin(self, bucket: str, key: str, notes: Mapping[str, str]) -> str:
        """Begin to write an object in parts; the name of the upload. `notes` are what `head` tells of it later."""
        return str(self._ask("create_multipart_upload", bucket, key, Metadata=dict(notes))["UploadId"])

    def send(self, bucket: str, key: str, upload: str, number: int, data: bytes | bytearray) -> None:
        """Write a part (numbers begin at 1); the object does not change before `complete`."""
        self._ask("upload_part", bucket, key, UploadId=upload, PartNumber=number, Body=data)

    def parts(self, bucket: str, key: str, upload: str) -> dict[int, Part]:
        """The parts that are there of an upload."""
        found: dict[int, Part] = {}
        marker = 0
        while True:
            page = self._ask("list_parts", bucket, key, UploadId=upload, PartNumberMarker=marker)
            for entry in page.get("Parts", ()):
                part = Part(entry["PartNumber"], entry["Size"], entry["ETag"])
                found[part.number] = part
            if not page.get("IsTruncated"):
                return found
            marker = page["NextPartNumberMarker"]

    def complete(self, bucket: str, key: str, upload: str, parts: Sequence[Part]) -> None:
        """Put the object in place that the parts are, in one step."""
        listed = [{"PartNumber": part.number, "ETag": part.tag} for part in parts]
        self._ask("complete_multipart_upload", bucket, key, UploadId=upload, MultipartUpload={"Parts": listed})

    def abort(self, bucket: str, key: str, upload: str) -> None:
        """Give an upload up, if there is one; its parts go."""
        with contextlib.suppress(MissingObject):
            self._ask("abort_multipart_upload", bucket, key, UploadId=upload)

    def url(self, bucket: str, key: str) -> str:
        return f"{self._scheme}://{bucket}/{key}"

    def _ask(self, name: str, bucket: str, key: str, field: str = "Key", **arguments: Any) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            with self._slots:
                answer: dict[str, Any] = getattr(self._client, name)(Bucket=bucket, **{field: key}, **arguments)
                return answer

        return persist(attempt, self.url(bucket, key), retries=self._retries)


def _found(key: str, size: int, answer: Mapping[str, Any]) -> Found:
    return Found(key, size, answer.get("ETag", ""), int(answer["LastModified"].timestamp()))


_lock = threading.Lock()
_clients: dict[str, Client] = {}


def client_of(scheme: str) -> Client:
    """The client of this process for a scheme."""
    with _lock:
        if scheme not in _clients:
            _clients[scheme] = Client(scheme)
        return _clients[scheme]


def forget_clients() -> None:
    """Make clients anew: for a forked process, which must not use the connections of its parent, and for tests."""
    global _lock
    _lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=forget_clients)
