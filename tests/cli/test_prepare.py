import pytest

from flax_transformers.cli.main import main
from flax_transformers.data.store.files import StoreReader
from flax_transformers.testing import write_corpus

CONFIG = """
from flax_transformers.testing import tiny_config

def get_config():
    return tiny_config({text!r}, {store!r})
"""


SETS = """
from dataclasses import replace
from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.sources.text import TextSource

def with_sets(config):
    sets = (EvaluationSet("other", TextSource({path!r})),)
    return replace(config, evaluation=replace(config.evaluation, sets=sets))

without = get_config
get_config = lambda: with_sets(without())
"""


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "text.txt", 20)
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(text=str(tmp_path / "text.txt"), store=str(tmp_path / "store")))
    return str(path)


@pytest.mark.slow
def test_a_store_is_prepared_in_shares_and_verified(config, tmp_path, capsys):
    shards = ("--data.shards", "2")
    assert main(["prepare", config, "--begin", *shards]) == 0
    assert main(["prepare", config, "--shard", "1/2", *shards]) == 0
    assert "share 1/2 is done; other shares are not" in capsys.readouterr().out
    assert main(["prepare", config, "--shard", "0/2", *shards]) == 0
    assert "training tokens in" in capsys.readouterr().out
    assert main(["prepare", config, "--verify", *shards]) == 0
    path = tmp_path / "store/train/00001.tokens"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert main(["prepare", config, *shards, "--data.verify", "False"]) == 0  # sizes alone
    assert main(["prepare", config, *shards]) == 2
    assert main(["prepare", config, "--verify", *shards]) == 2
    assert "train/00001.tokens of the token store" in capsys.readouterr().err


def test_verifying_a_finished_store_reads_every_file_once(config, capsys, monkeypatch):
    verify = (
        "--data.verify",
        "True",
        "--data.tokenizer.kind",
        "bytes",
        "--data.tokenizer.lowercase",
        "False",
    )
    assert main(["prepare", config, *verify]) == 0
    read, check = [], StoreReader._check_content
    monkeypatch.setattr(
        StoreReader,
        "_check_content",
        lambda self, name, *rest: read.append(name) or check(self, name, *rest),
    )
    assert main(["prepare", config, "--verify", *verify]) == 0
    assert read and len(read) == len(set(read))
    assert "every file matches its checksum" in capsys.readouterr().out


def test_verifying_reads_the_sources_of_evaluation_sets(config, tmp_path, capsys):
    held_out = tmp_path / "held_out.txt"
    write_corpus(held_out, 20)
    with open(config, "a") as file:
        file.write(SETS.format(path=str(held_out)))
    own = ("--data.tokenizer.kind", "bytes", "--data.tokenizer.lowercase", "False")
    assert main(["prepare", config, *own]) == 0
    raw = held_out.read_bytes()
    held_out.write_bytes(raw[:-3] + b"x" + raw[-2:])
    assert main(["prepare", config, *own]) == 0  # sizes alone
    assert main(["prepare", config, "--verify", *own]) == 2
    assert "held_out.txt" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["2/2", "1", "a/b", "-1/2"])
def test_shares_that_do_not_exist_are_refused(config, capsys, job):
    assert main(["prepare", config, f"--shard={job}"]) == 2
    assert f"--shard is {job!r}; give the index of the job" in capsys.readouterr().err


def test_shares_need_a_store(config, capsys):
    assert main(["prepare", config, "--shard", "0/1", "--data.store", "None"]) == 2
    assert "set data.store or --output" in capsys.readouterr().err
