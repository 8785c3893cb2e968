from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from tests.data import tiny
from tests.unsynced import on_the_disk
from tuner.data import Examples, PreparedData
from tuner.data.files import downloads, located
from tuner.errors import DataError

PLAIN = tiny.byte_level()


def outputs(examples: Examples) -> list[str]:
    return [str(PLAIN.decode(e.input_ids[e.is_target])).removesuffix("</s>") for e in examples]


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe("/bucket/eval.jsonl", jsonl(50, 53))
    yield files
    files.store.clear()


def jsonl(first: int, last: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in tiny.alpaca_rows(last)[first:]).encode()


def prepared(path: str, cache: Path | None = None, **more: object) -> PreparedData:
    held_out = [{"path": "memory://bucket/eval.jsonl", "format": "alpaca"}]
    train = [{"path": path, "format": "alpaca", **more}]
    return tiny.prepared(PLAIN, cache=cache, train=train, eval=held_out)


def test_a_pattern_is_its_files_by_name(tmp_path: Path, bucket: fsspec.AbstractFileSystem) -> None:
    for number in (3, 10, 2):
        (tmp_path / f"part-{number:02}.jsonl").write_bytes(jsonl(number, number + 1))
    (tmp_path / "part-00.jsonl").mkdir()
    for pattern in ("part-*.jsonl", "part-[01]?.jsonl", "**/part*"):
        assert outputs(prepared(str(tmp_path / pattern)).train) == [
            f"It is {number}, of course." for number in (2, 3, 10)
        ]
    with pytest.raises(DataError, match=r"none-\*.jsonl: no file matches this pattern"):
        prepared(str(tmp_path / "none-*.jsonl"))


def test_rows_of_a_source_that_cannot_be_reached_any_more_come_from_the_cache(
    tmp_path: Path, bucket: fsspec.AbstractFileSystem
) -> None:
    """As on a node without a network that was sent the tables; what was never opened is still refused."""
    bucket.pipe("/bucket/train.jsonl", jsonl(0, 20))
    before = prepared("memory://bucket/train.jsonl", tmp_path / "cache")
    for left in (tmp_path / "cache").iterdir():
        if left.name != "sources" and not (left / "table.json").exists():
            shutil.rmtree(left)  # copies of the files: a node is not sent them
    bucket.store.clear()
    after = prepared("memory://bucket/train.jsonl", tmp_path / "cache")
    assert after.fingerprint == before.fingerprint
    with pytest.raises(DataError, match=r"other\.jsonl"):
        prepared("memory://bucket/other.jsonl", tmp_path / "cache")
    with pytest.raises(DataError, match=r"train\.jsonl"):
        prepared("memory://bucket/train.jsonl", tmp_path / "cache", template="chatml")  # no table has these


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1].jsonl"
    path.write_bytes(b"")
    (tmp_path / "a1.jsonl").write_bytes(b"")
    assert [file.path for file in located(str(path), tmp_path)] == [path]


def test_files_behind_a_url_are_read(tmp_path: Path, bucket: fsspec.AbstractFileSystem) -> None:
    bucket.pipe("/bucket/b.jsonl", jsonl(5, 9))
    bucket.pipe("/bucket/a.jsonl", jsonl(0, 5))
    bucket.pipe("/bucket/log", b"one\ntwo\n")
    for cache in (None, tmp_path):
        assert len(prepared("memory://bucket/b.jsonl", cache).train) == 4
        assert outputs(prepared("memory://bucket/[ab]*.jsonl", cache).train) == [
            f"It is {number}, of course." for number in range(9)
        ]
    assert len(prepared("memory://bucket/log", tmp_path, format="text", split_on="line").train) == 2
    with pytest.raises(DataError, match=r"^memory://bucket/x\*: no file matches"):
        prepared("memory://bucket/x*")
    with pytest.raises(DataError, match=r"^memory://bucket/x\.jsonl: there is no such file"):
        prepared("memory://bucket/x.jsonl")


def test_a_signed_url_is_read_and_its_signature_neither_shown_nor_kept(
    tmp_path: Path, bucket: fsspec.AbstractFileSystem
) -> None:
    signed = "?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2"
    bucket.pipe(f"/bucket/a.jsonl{signed}", jsonl(0, 5))
    bucket.pipe(f"/bucket/b.jsonl{signed}", b"{\n")
    assert len(prepared(f"memory://bucket/a.jsonl{signed}", tmp_path).train) == 5
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 2
    assert [path for path in kept if b"hunter2" in path.read_bytes() or "hunter2" in path.name] == []
    for file, said in (("b", ":1: not one JSON object"), ("c", ": there is no such file")):
        with pytest.raises(DataError) as raised:
            prepared(f"memory://bucket/{file}.jsonl{signed}")
        shown = f"memory://bucket/{file}.jsonl?X-Amz-Credential=***&X-Amz-Signature=***{said}"
        assert str(raised.value).startswith(shown)


def test_a_mistake_in_a_file_behind_a_url_names_the_url(bucket: fsspec.AbstractFileSystem) -> None:
    bucket.pipe("/bucket/b.jsonl", jsonl(5, 9) + b"{\n")
    with pytest.raises(DataError, match=r"^memory://bucket/b\.jsonl:5: not one JSON object a line"):
        prepared("memory://bucket/b.jsonl")
    with pytest.raises(
        DataError, match=r"^memory://bucket/b\.jsonl: split and config apply only to datasets"
    ):
        prepared("memory://bucket/b.jsonl", split="train")


def test_a_file_behind_a_url_is_copied_once_and_again_when_it_changed(
    tmp_path: Path, bucket: fsspec.AbstractFileSystem
) -> None:
    bucket.pipe("/bucket/b.jsonl", jsonl(0, 3))
    [first], [again] = (located("memory://bucket/b.jsonl", tmp_path) for _ in range(2))
    assert first == again
    written = first.path.stat().st_mtime_ns
    assert located("memory://bucket/b.jsonl", tmp_path)[0].path.stat().st_mtime_ns == written
    bucket.pipe("/bucket/b.jsonl", jsonl(0, 4))
    [changed] = located("memory://bucket/b.jsonl", tmp_path)
    assert changed.path.read_bytes() == jsonl(0, 4)
    assert first.path.read_bytes() == jsonl(0, 3)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_a_file_that_arrives_in_part_is_refused_and_not_kept(
    tmp_path: Path, bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_half(_: object, path: str, local: str) -> None:
        content = bucket.cat(path)
        Path(local).write_bytes(content[: len(content) // 2])

    monkeypatch.setattr(type(bucket), "get_file", get_half)
    with pytest.raises(DataError, match=r"^memory://bucket/eval.jsonl: \d+ of \d+ bytes arrived; try again"):
        located("memory://bucket/eval.jsonl", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves a whole copy or none, since a copy that has its name is never fetched again."""
    synced = on_the_disk(monkeypatch)
    [file] = located("memory://bucket/eval.jsonl", tmp_path)
    assert file.path.stat().st_ino in synced


def test_copies_outside_of_a_cache_do_not_stay(bucket: fsspec.AbstractFileSystem) -> None:
    with downloads(None) as copies:
        [file] = located("memory://bucket/eval.jsonl", copies)
        assert file.path.exists()
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("s3", r"pip install 'fsspec\[s3\]'"),
        ("gs", r"pip install 'fsspec\[gs\]'"),
        ("nosuch", "no file system"),
    ],
)
def test_what_is_missing_for_a_url_is_said(tmp_path: Path, scheme: str, said: str) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme)
    if package in installed_packages():
        pytest.skip(f"needs an environment without {package}")
    with pytest.raises(DataError, match=rf"^{scheme}://a/b.jsonl: .*{said}"):
        located(f"{scheme}://a/b.jsonl", tmp_path)


def installed_packages() -> set[str]:
    from importlib.util import find_spec

    return {name for name in ("s3fs", "gcsfs") if find_spec(name)}


def test_files_in_an_archive_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("b.jsonl", jsonl(2, 4))
        archive.writestr("a.jsonl", jsonl(0, 2))
    found = located(f"zip://*.jsonl::{tmp_path}/rows.zip", tmp_path / "copies")
    assert [file.path.read_bytes() for file in found] == [jsonl(0, 2), jsonl(2, 4)]
    with pytest.raises(DataError, match=r"rows\.zip: there is no such file$"):
        located(f"zip://c.jsonl::{tmp_path}/rows.zip", tmp_path)
    with pytest.raises(DataError, match=r"none\.zip: there is no such file$"):
        located(f"zip://a.jsonl::{tmp_path}/none.zip", tmp_path)


class Unwilling(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """Says "not found" of everything, as the file systems for http and S3 do, and why."""

    causes: ClassVar[dict[str, tuple[str, Exception | None]]] = {
        "missing": ("missing", None),
        "no-bucket": ("The specified bucket does not exist", None),
        "down": ("down", ConnectionRefusedError("nobody listens")),
    }

    def info(self, path: str, **_: object) -> dict[str, object]:
        said, cause = self.causes[path]
        raise FileNotFoundError(said) from cause


def test_why_a_file_behind_a_url_is_not_there_is_said(tmp_path: Path) -> None:
    fsspec.register_implementation("unwilling", Unwilling, clobber=True)
    for path, said in {
        "missing": "there is no such file",
        "no-bucket": "there is no such file: The specified bucket does not exist",
        "down": "cannot be read: nobody listens",
    }.items():
        with pytest.raises(DataError, match=rf"^unwilling://{path}: {said}$"):
            located(f"unwilling://{path}", tmp_path)
    with pytest.raises(DataError, match=r"^ftp://127\.0\.0\.1:1/a\.jsonl: cannot be read: .*refused"):
        located("ftp://127.0.0.1:1/a.jsonl", tmp_path)
