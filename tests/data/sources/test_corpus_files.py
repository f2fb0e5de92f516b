"""Which files of a corpus are read, and that the others are counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flax_transformers.data.sources.corpus_files import ending, list_corpus, unread_text
from flax_transformers.errors import UserError

ENDINGS = (".txt", ".jsonl", ".parquet")


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def listed(path: Path | str) -> tuple[list[str], dict[str, int]]:
    found = list_corpus(str(path), ENDINGS)
    assert all(file.is_file() for _, file in found.files)
    return [name for name, _ in found.files], {k: count for k, (count, _) in found.unread.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ".txt"),
        ("A.TXT", ".txt"),
        ("a.txt.gz", ".txt"),
        ("a.jsonl.bz2", ".jsonl"),
        ("a.jsonl.XZ", ".jsonl"),
        ("a.b.jsonl.zst", ".jsonl"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.txt.gz.gz", None),
        ("a.gz", None),
        ("a.tar.gz", None),
        ("txt", None),
    ],
)
def test_an_ending_is_known_without_that_of_its_compression(name, expected):
    assert ending(Path(name), ENDINGS) == expected


def test_unread_files_of_a_folder_are_counted_by_kind(tmp_path):
    make(tmp_path, "a.txt", "b/c.txt.zst", "b/d.csv", "e.csv", "f.tar.gz", "g.tar", "wiki_00")
    make(tmp_path, ".hidden.txt", "b/.git/x.txt", "b/.git/y.txt", "h.parquet.gz")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    names, unread = listed(tmp_path)
    assert names == ["a.txt", "b/c.txt.zst"]
    assert unread == {
        ".csv": 2,
        ".tar.gz": 1,
        ".tar": 1,
        ".parquet.gz": 1,
        "extensionless file": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "broken link": 2,
        "special file": 1,
    }
    found = list_corpus(str(tmp_path), ENDINGS).unread
    assert found[".csv"] == (2, len("b/d.csv") + len("e.csv"))
    assert unread_text(found) == (
        "2 .csv, 2 broken links, 1 .parquet.gz, 1 .tar, 1 .tar.gz, 1 extensionless file, "
        "1 hidden file, 1 hidden folder, 1 special file"
    )


def test_linked_folders_and_files_are_read(tmp_path):
    make(tmp_path, "corpus/one.txt", "disk/two.txt", "disk/deep/three.txt", "four.txt")
    (tmp_path / "corpus/part").symlink_to("../disk")
    (tmp_path / "corpus/four.txt").symlink_to("../four.txt")
    names, unread = listed(tmp_path / "corpus")
    assert names == ["four.txt", "one.txt", "part/deep/three.txt", "part/two.txt"]
    assert unread == {}
    (tmp_path / "link").symlink_to("corpus")
    assert listed(tmp_path / "link") == (names, unread)
    patterns, unread = listed(tmp_path / "corpus" / "**" / "*.txt")
    assert patterns == [str(tmp_path / "corpus" / name) for name in names]
    assert unread == {}


def loop_to_itself(folder):
    (folder / "again").symlink_to(".")


def loop_above(folder):
    (folder / "up").symlink_to("..")


def loop_of_two(folder):
    (folder.parent / "other").mkdir()
    (folder / "there").symlink_to("../other")
    (folder.parent / "other" / "back").symlink_to("../corpus")


def linked_twice(folder):
    (folder.parent / "other").mkdir()
    (folder / "x").symlink_to("../other")
    (folder / "y").symlink_to("../other")


def linked_to_what_is_read(folder):
    (folder / "newest").symlink_to("b")


@pytest.mark.parametrize(
    ("link", "repeated"),
    [
        (loop_to_itself, 1),
        (loop_above, 0),  # what is above is a folder of its own, and the corpus below it known
        (loop_of_two, 1),
        (linked_twice, 1),
        (linked_to_what_is_read, 1),
    ],
)
def test_every_folder_is_read_once_whatever_links_to_it(link, repeated, tmp_path):
    make(tmp_path, "corpus/a.txt", "corpus/b/c.txt")
    link(tmp_path / "corpus")
    names, unread = listed(tmp_path / "corpus")
    assert names == ["a.txt", "b/c.txt"]
    assert unread == ({"repeated linked folder": repeated} if repeated else {})


def test_a_pattern_follows_cyclic_links_once(tmp_path):
    make(tmp_path, "corpus/a.txt", "corpus/b/c.txt")
    loop_to_itself(tmp_path / "corpus")
    names, unread = listed(tmp_path / "corpus" / "**" / "*.txt")
    assert names == [str(tmp_path / "corpus" / name) for name in ("a.txt", "b/c.txt")]
    assert unread["repeated linked file"] > 2


def test_folders_that_a_pattern_matches_are_counted(tmp_path):
    make(tmp_path, "a.txt", "b/c.txt", "d/e.txt")
    assert listed(tmp_path / "*") == ([str(tmp_path / "a.txt")], {"folder": 2})


def test_a_folder_without_files_to_read_says_what_there_is(tmp_path):
    make(tmp_path, "a.csv", "b.tar", "c.tar", "link/x")
    with pytest.raises(UserError, match=r"has no text files \(\.txt, .*\.zst\); it has ") as e:
        list_corpus(str(tmp_path), ENDINGS)
    assert str(e.value).endswith("2 .tar, 1 .csv, 1 extensionless file.")


def test_a_file_given_by_its_path_must_have_a_known_ending(tmp_path):
    make(tmp_path, "a.tar", "b.txt")
    for path in (tmp_path / "a.tar", tmp_path / "*"):
        with pytest.raises(
            UserError, match=r"ending of .*a\.tar is not supported; use one of \.txt, "
        ):
            list_corpus(str(path), ENDINGS)
