"""A file or a link has its old content or its new one, and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.whole import lead, written_whole


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("first", "second"):
        with written_whole(path) as draft:
            draft.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), written_whole(path) as draft, draft.open("w") as file:
        file.write("half" * 10_000 + "\udcff")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_one_file_do_not_share_a_draft(tmp_path: Path) -> None:
    """Containers that share a disk: in each, tuner is process 1."""
    path = tmp_path / "copy"
    with written_whole(path) as one, written_whole(path) as other:
        one.write_text("half of")
        other.write_text("the whole")
    assert path.read_text() == "half of"
    assert list(tmp_path.iterdir()) == [path]


def test_where_no_file_can_be_written_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), written_whole(tmp_path / "file" / "below") as draft:
        draft.write_text("lost")


def test_a_link_leads_to_one_target_after_the_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lead(tmp_path / "link", tmp_path / name)
        assert (tmp_path / "link").readlink() == Path(name)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "link"}
