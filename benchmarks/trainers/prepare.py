"""Writes the text, the tokenizer and the settings that both trainers of a comparison use."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flax_transformers.data.sources import embedded
from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer


def main(settings: dict) -> None:
    folder = Path(settings["folder"])
    documents = [
        [" ".join(paragraph.split()) for paragraph in document.split("\n\n") if paragraph.strip()]
        for document in embedded.documents()
    ]
    with (folder / "documents.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": "\n\n".join(d)}) + "\n" for d in documents)
    lines = [line for document in documents for line in document]
    (folder / "lines.json").write_text(json.dumps(lines))
    tokenizer = train_tokenizer(
        TokenizerConfig("wordpiece", vocab_size=8192, lowercase=True), lines
    )
    tokenizer.save(folder / "tokenizer")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
