"""Small token stores for the tests of this folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from flax_transformers.data.prepare.shard_writer import ShardWriter
from flax_transformers.data.store.token_store import (
    SPLITS,
    Split,
    TokenStore,
    add_counts,
    write_manifest,
)
from flax_transformers.storage.folders import open_folder

Documents = Sequence[Sequence[Sequence[int]]]  # documents of sentences of ids


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """make_store(shard, shard, ...): a store whose training shards hold these documents."""

    def make(
        *shards: Documents, vocab_size: int = 1000, directory: object = None, split: Split = "train"
    ) -> TokenStore:
        folder = open_folder(str(directory or tmp_path / "store"))
        records: dict[Split, list] = {split: [] for split in SPLITS}
        ids = [
            i for documents in shards for sentences in documents for ids in sentences for i in ids
        ]
        counts = {name: np.zeros(vocab_size, np.int64) for name in SPLITS}
        add_counts(counts[split], np.array(ids, np.int64))
        for number, documents in enumerate(shards):
            for name in SPLITS:
                with ShardWriter(folder, name, number, vocab_size) as writer:
                    for document in documents if name == split else ():
                        writer.add_document([np.array(ids, np.int32) for ids in document])
                    records[name].append(writer.finish())
        write_manifest(
            folder,
            records,
            vocab_size=vocab_size,
            tokenizer="tok",
            corpus={"settings": {}},
            unigrams=counts,
        )
        return TokenStore(folder.path, split)

    return make
