"""Trains a BERT with Hugging Face's Trainer, and writes when each step ended and what it held.

This process may run in an environment without this package.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers


class Times(transformers.TrainerCallback):
    """Seconds since 1970 at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.time())


class Counted(transformers.DataCollatorForLanguageModeling):
    """The collator, which also counts the tokens of each batch, in all and without padding."""

    tokens: list[int]
    useful: list[int]

    def __call__(self, *args: object, **kwargs: object) -> dict:
        batch = super().__call__(*args, **kwargs)
        self.tokens.append(batch["attention_mask"].numel())
        self.useful.append(int(batch["attention_mask"].sum()))
        return batch


def rows(settings: dict, tokenizer: transformers.PreTrainedTokenizerFast) -> datasets.Dataset:
    """Tokenized rows, cached on the disk as datasets does."""
    folder, length = Path(settings["folder"]), settings["length"]
    file = folder / "lines.jsonl"
    if not file.exists():
        lines = json.loads((folder / "lines.json").read_text())
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(folder / "hf")
    )

    def tokenized(batch: dict) -> dict:
        if settings["variant"] == "lines":
            return tokenizer(batch["text"], truncation=True, max_length=length)
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    def grouped(batch: dict) -> dict:
        joined = {key: [one for part in parts for one in part] for key, parts in batch.items()}
        total = len(joined["input_ids"]) // length * length
        return {
            key: [values[i : i + length] for i in range(0, total, length)]
            for key, values in joined.items()
        }

    data = data.map(tokenized, batched=True, remove_columns=["text"])
    return data if settings["variant"] == "lines" else data.map(grouped, batched=True)


def main(settings: dict) -> None:
    datasets.disable_progress_bars()
    folder, model = Path(settings["folder"]), settings["model"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = transformers.BertConfig(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        max_position_embeddings=settings["length"],
        num_hidden_layers=model["num_layers"],
        hidden_size=model["hidden_size"],
        num_attention_heads=model["num_heads"],
        intermediate_size=model["intermediate_size"],
    )
    torch.manual_seed(0)
    times, collator = Times(), Counted(tokenizer)
    collator.tokens, collator.useful = [], []
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / f"{settings['variant']}_{settings['run']}"),
        per_device_train_batch_size=settings["batch"],
        max_steps=settings["steps"],
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=transformers.BertForMaskedLM(config),
        args=arguments,
        train_dataset=rows(settings, tokenizer),
        data_collator=collator,
        callbacks=[times],
    )
    trainer.train()
    steps = len(times.times)
    result = {
        "times": times.times,
        "useful_tokens": collator.useful[:steps],
        "tokens": collator.tokens[:steps],
    }
    Path(settings["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
