"""Paths in an object storage by themselves, and what is refused without asking a storage."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

import mindformers_ckpt as mc
from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.objects.errors import MissingObject, NotOnDisk, ObjectError
from mindformers_ckpt.objects.path import ObjectPath, absolute, as_path, is_url


@pytest.mark.parametrize("given", ["s3://bucket/a/rank_0", "s3:/bucket/a//rank_0/", Path("s3://bucket/a/rank_0")])
def test_a_url_however_it_is_given(given: str | Path) -> None:
    path = as_path(given)
    assert isinstance(path, ObjectPath)
    assert str(path) == "s3://bucket/a/rank_0"
    assert path == absolute(given)
    assert path.place == ("s3", "bucket", "a/rank_0")
    assert is_url("obs://bucket")
    assert not is_url("http://bucket")


def test_it_is_a_path() -> None:
    path = as_path("obs://bucket/model/rank_0/x.ckpt")
    assert (path.name, path.stem, path.suffix) == ("x.ckpt", "x", ".ckpt")
    assert str(path.parent) == "obs://bucket/model/rank_0"
    assert str(path.with_name("y.ckpt")) == "obs://bucket/model/rank_0/y.ckpt"
    assert str(path.parent / "z" / "w") == "obs://bucket/model/rank_0/z/w"
    assert str(path.relative_to(path.parent.parent)) == "rank_0/x.ckpt"
    assert Path("/tmp", path.relative_to(path.parent.parent)) == Path("/tmp/rank_0/x.ckpt")
    assert path.is_relative_to(as_path("obs://bucket/model"))
    assert not path.is_relative_to(Path("/tmp"))
    assert path.is_absolute()
    assert path.absolute() == path.resolve() == path
    assert sorted([path, path.with_name("a")])[0].name == "a"
    assert len({path, as_path("obs://bucket/model/rank_0/x.ckpt"), as_path("s3://bucket/model/rank_0/x.ckpt")}) == 2
    found = pickle.loads(pickle.dumps(path))
    assert (found, type(found), str(found)) == (path, ObjectPath, str(path))


def test_the_system_is_not_asked_for_it(tmp_path: Path) -> None:
    path = as_path("s3://bucket/x")
    for ask in (os.fspath, os.listdir, os.path.isdir, open, os.stat):
        with pytest.raises(NotOnDisk, match="s3://bucket/x is in an object storage"):
            ask(path)
    with pytest.raises(NotOnDisk, match="not written in place"):
        path.write_bytes(b"")
    assert os.listdir(tmp_path) == []


def test_errors_read_like_those_of_files() -> None:
    error = MissingObject(2, "there is no such object", "s3://bucket/x", is_final=True)
    assert isinstance(error, FileNotFoundError)
    assert (error.strerror, error.filename, str(error)) == (
        "there is no such object",
        "s3://bucket/x",
        "s3://bucket/x: there is no such object",
    )
    again = pickle.loads(pickle.dumps(ObjectError(5, "the storage answers 503", "s3://bucket/x", is_final=False)))
    assert (type(again), str(again), again.is_final) == (ObjectError, "s3://bucket/x: the storage answers 503", False)


def test_a_whole_bucket_is_no_source_and_no_target(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="s3://bucket is a whole bucket"):
        mc.open_checkpoint("s3://bucket")


def test_obs_needs_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(ConfigError, match="set AWS_ENDPOINT_URL to the OBS endpoint"):
        mc.open_checkpoint("obs://bucket/model")
