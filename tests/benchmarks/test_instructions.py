"""Instructions from real data: none is held out and learned, and rejected answers are wrong."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile

import pytest

from benchmarks import instructions

TAGS = ("NOUN", "VERB", "DET", "PUNCT")


def write_intents(data):
    def rows(split):
        return [[f"{split} sentence {n}", f"label_{n % 3}"] for n in range(12)]

    content = json.dumps({split: rows(split) for split in ("train", "test")})
    (data / "clinc150").mkdir()
    (data / "clinc150/data_full.json.gz").write_bytes(gzip.compress(content.encode()))


def write_tags(data):
    (data / "ud_english_ewt").mkdir()
    for split, lengths in (("train", (3, 4, 11)), ("test", (2, 5))):
        text = ""
        for sentence, length in enumerate(lengths):
            for word in range(length):
                text += f"{word + 1}\t{split}{sentence}{word}\tx\t{TAGS[word % 4]}\t_\t_\n"
            text += "\n"
        path = data / f"ud_english_ewt/en_ewt-ud-{split}.conllu.gz"
        path.write_bytes(gzip.compress(text.encode()))


def write_translations(data):
    (data / "tatoeba_laser").mkdir()
    with tarfile.open(data / "tatoeba_laser/pairs.tar.gz", "w:gz") as archive:
        for code in instructions.LANGUAGES:
            for side in (code, "eng"):
                content = "".join(f"{code} {side} line {n}\n" for n in range(10)).encode()
                info = tarfile.TarInfo(f"tatoeba.{code}-eng.{side}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    for write in (write_intents, write_tags, write_translations):
        write(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(instructions, "HELD_OUT", 4)
    patch.setattr(instructions, "DEMONSTRATIONS", dict.fromkeys(instructions.DEMONSTRATIONS, 5))
    patch.setattr(instructions, "PROMPTS", dict.fromkeys(instructions.PROMPTS, 4))
    patch.setattr(sys, "argv", ["instructions", str(folder / "out"), "--data", str(folder)])
    with patch.context():
        instructions.main()
    patch.undo()
    return {
        str(path.relative_to(folder / "out")): [json.loads(line) for line in path.open()]
        for path in (folder / "out").rglob("*.jsonl")
    }


def prompts(rows):
    return {row["prompt"] for row in rows}


def further(written):
    """The rows for reinforcement learning."""
    return [row for task in instructions.PROMPTS for row in written[f"prompts/{task}.jsonl"]]


def test_held_out_instructions_are_in_no_other_file(written):
    held_out = {
        prompt for name, rows in written.items() if name.startswith("held_out/")
        for prompt in prompts(rows)
    }  # fmt: skip
    assert len(held_out) == 18
    assert prompts(written["held_out_preferences.jsonl"]) == held_out
    learned = (written["demonstrations.jsonl"], written["preferences.jsonl"], further(written))
    for rows in learned:
        assert rows and not prompts(rows) & held_out


def test_prompts_of_reinforcement_learning_are_no_demonstrations(written):
    assert not prompts(further(written)) & prompts(written["demonstrations.jsonl"])


def test_right_answers_are_those_of_the_data(written):
    rows = written["demonstrations.jsonl"] + further(written)
    found = {row["prompt"]: row.get("completion") or f" {row['answer']}" for row in rows}
    assert found["train00 train01 train02 What are the tags?"] == " noun verb det"
    assert not any("train210" in prompt for prompt in found)  # more than ten words
    for prompt, answer in found.items():
        if prompt.endswith("="):
            assert sum(map(int, prompt.removesuffix("=").split("+"))) == int(answer)
        if prompt.startswith("Sort"):
            assert sorted(prompt[5:-2].split()) == answer.split()
        if "intent" in prompt:
            assert answer == f" label {int(prompt.split()[2]) % 3}"


def test_rejected_answers_are_wrong_and_of_the_same_form(written):
    for row in written["preferences.jsonl"] + written["held_out_preferences.jsonl"]:
        right, wrong = row["chosen"], row["rejected"]
        assert right != wrong and wrong.startswith(" ")
        if row["prompt"].startswith("Sort"):
            assert sorted(right.split()) == sorted(wrong.split()) or len(set(right.split())) == 1
        if row["prompt"].endswith("tags?"):
            differ = [a != b for a, b in zip(right.split(), wrong.split(), strict=True)]
            assert sum(differ) == 1
