"""What `flax-transformers inspect` shows of prepared rows."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from flax_transformers.cli.inspect import rich_line, show_images
from flax_transformers.cli.main import main
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.objectives.base import ExampleView
from flax_transformers.testing import write_corpus

TOKENIZER = ByteTokenizer()


def ids(text):
    return TOKENIZER.encode_batch([text])[0]


def styles(text):
    """Each styled stretch of a line, by its style."""
    return {(text.plain[span.start : span.end], str(span.style)) for span in text.spans}


def test_labels_are_shown_after_the_input_if_they_differ():
    vocab = TOKENIZER.vocabulary
    labels = np.full(4, -1)
    labels[1], labels[2] = ids("b")[0], ids("c")[0]
    row = np.append(ids("axc"), vocab.sep_id)
    row[1] = vocab.mask_id
    text = rich_line(ExampleView("row", row, labels), TOKENIZER)
    assert text.plain == "row: a [MASK]→b c [SEP] "
    assert styles(text) == {
        ("row: ", "bold"),
        ("[MASK]", "bold red"),
        ("b", "bold green"),
        ("c", "bold green"),
        ("[SEP]", "dim"),
    }


def test_each_segment_begins_with_its_number():
    text = rich_line(ExampleView("row", ids("abcd"), segments=np.array([1, 1, 2, 2])), TOKENIZER)
    assert text.plain == "row: «1» a b «2» c d "


def test_classes_without_names_are_shown_by_their_numbers():
    view = ExampleView("row", ids("abc"), classes=np.array([0, 1, -1]), label=2)
    assert rich_line(view, TOKENIZER).plain == "row: a/0 b/1 c 2"
    assert rich_line(view, TOKENIZER, ("no", "yes", "both")).plain == "row: a/no b/yes c both"


def test_what_is_said_of_the_whole_row_comes_last():
    text = rich_line(ExampleView("row", ids("a"), note="B follows A"), TOKENIZER)
    assert text.plain == "row: a (B follows A)"


CONFIG = """
from flax_transformers.objectives.{module} import {name}
from flax_transformers.testing import tiny_config

def get_config():
    return tiny_config({corpus!r}, {store!r}, sequence_length=64, objective={name}())
"""


@pytest.mark.parametrize(
    ("module", "name", "shown"),
    [
        ("masked_lm", "MaskedLM", ["row: [CLS]", "→"]),
        ("next_sentence", "NextSentence", ["row: «0» [CLS]", "«1»", "(B "]),
        ("causal_lm", "CausalLM", ["row: «1» </s>"]),
        ("prefix_lm", "PrefixLM", ["prefix: </s>", "rest: "]),
        ("span_corruption", "SpanCorruption", ["encoder: ", "decoder: <pad> <0xFF>"]),
        ("mixture_of_denoisers", "MixtureOfDenoisers", ["encoder: ", "decoder: "]),
        ("denoising", "Denoising", ["encoder: ", "decoder: ", "[MASK]"]),
    ],
)
def test_any_objective_shows_its_rows(capsys, tmp_path, module, name, shown):
    write_corpus(tmp_path / "text.txt")
    config = tmp_path / "config.py"
    corpus, store = str(tmp_path / "text.txt"), str(tmp_path / "store")
    config.write_text(CONFIG.format(module=module, name=name, corpus=corpus, store=store))
    assert main(["inspect", str(config), "--examples", "16"]) == 0
    lines = capsys.readouterr().out
    assert lines.count("example ") == 16
    assert all(part in lines for part in shown)


def test_fewer_than_one_example_is_refused(capsys, tmp_path):
    assert main(["inspect", "configs/bert_tiny.py", "--examples", "0"]) == 2
    assert "--examples is 0" in capsys.readouterr().err


def test_a_class_in_brackets_is_shown_as_it_is(capsys, tmp_path):
    batch = {
        "pixel_values": np.zeros((1, 3, 4, 4), np.uint8),
        "labels": np.array([[0]]),
        "label_weights": np.ones((1, 1), np.float32),
        "example_id": np.array([7]),
    }
    path = str(tmp_path / "[bold].png")
    show_images(Console(soft_wrap=True), batch, ["[/x] :cat:"], path)
    shown = capsys.readouterr().out
    assert path in shown and "1.1  image 7: [/x] :cat:\n" in shown
