"""TFDS builders like public ones, prepared here and read without TensorFlow."""

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import read_documents
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.sources.tfds import how_to_prepare
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from tests.data.sources.test_hostile import spoilt

SENTENCES = ["Der Hund schläft.", "Es regnet.", "Guten Tag!"]


class Made(tfds.core.GeneratorBasedBuilder):
    """Prepared from ``rows`` as they are."""

    VERSION = tfds.core.Version("1.0.0")
    rows: list[dict]
    features: tfds.features.FeaturesDict

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=self.features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.rows)


def prepared(folder, name, features, rows):
    kind = type(name, (Made,), {"features": features, "rows": rows, "__module__": __name__})
    tfds.disable_progress_bar()
    builder = kind(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_dir}"


def documents(source):
    return sorted((document.text, document.labels) for _, document in read_documents(source))


def test_translations_as_of_wmt_are_pairs(tmp_path):
    rows = [{"de": text, "en": f"{text} (en)"} for text in SENTENCES]
    path = prepared(tmp_path, "Wmt", tfds.features.Translation(languages=("de", "en")), rows)
    found = documents(PairSource(path, source_field="de", target_field="en"))
    assert found == sorted(((row["de"], row["en"]), ()) for row in rows)


def test_rows_as_of_glue_are_texts_with_the_names_of_their_classes(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "premise": tfds.features.Text(),
            "hypothesis": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["entailment", "neutral"]),
            "idx": tfds.features.Scalar(np.int32),
        }
    )
    rows = [
        {"premise": text, "hypothesis": "Ja.", "label": i % 2, "idx": i}
        for i, text in enumerate(SENTENCES)
    ]
    path = prepared(tmp_path, "Mnli", features, rows)
    found = documents(LabelledSource(path, text_field="premise", second_field="hypothesis"))
    names = [("entailment",), ("neutral",), ("entailment",)]
    assert found == sorted(
        ((text, "Ja."), name) for text, name in zip(SENTENCES, names, strict=True)
    )
    assert [text for text, _ in documents(TextSource(path, text_field="premise"))] == sorted(
        SENTENCES
    )
    assert "tensorflow" not in sys.modules


def test_classes_have_the_order_of_tfds_in_new_stores(tmp_path, monkeypatch):
    features = tfds.features.FeaturesDict(
        {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["not_equivalent", "equivalent"]),
        }
    )
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(12)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = TextData(
        source=LabelledSource(prepared(tmp_path, "Mrpc", features, rows)),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.0,
        shards=1,
    )
    with monkeypatch.context() as patch:
        patch.setattr(LabelledSource, "store_version", 1)
        patch.setattr(LabelledSource, "known_classes", ())
        earlier = prepare(data)
    assert earlier.label_names == ("equivalent", "not_equivalent")
    assert prepare(data, of_run={"tokenizer": earlier.tokenizer}).directory == earlier.directory
    new = prepare(data)
    assert new.label_names == ("not_equivalent", "equivalent")
    names = "not_equivalent", "equivalent"
    for store in (earlier, new):
        starts = [0, *store.train.document_ends.tolist()]
        for i in range(12):
            text = store.train.tokens(starts[i], starts[i + 1] - starts[i])
            number = int(bytes((text - 3).astype(np.uint8)).split()[1])
            assert store.label_names[store.train.labels(i)[0]] == names[number % 2]
    given = replace(data.source, label_names=("equivalent", "not_equivalent"))
    assert prepare(replace(data, source=given)).label_names == given.label_names


def test_a_damaged_folder_yields_documents_or_one_user_error(tmp_path):
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    path = prepared(tmp_path, "Spoilt", features, [{"text": text} for text in SENTENCES])
    chance, sentences = random.Random(0), []
    files = sorted((tmp_path / "spoilt/1.0.0").iterdir())
    for _ in range(40):
        file = chance.choice(files)
        whole = file.read_bytes()
        file.write_bytes(spoilt(whole, chance))
        try:
            assert {document.text for _, document in read_documents(TextSource(path))} <= set(
                SENTENCES
            )
        except UserError as error:
            sentences.append(str(error))
        file.write_bytes(whole)
    assert len(sentences) > 10
    assert all("prepare it again." in one or "has no " in one for one in sentences)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("wikipedia/20230601.en", "TensorFlow and a Beam pipeline: .*`tfds build wikipedia/2023"),
        ("c4/en", "TensorFlow and a Beam pipeline"),
        ("imagenet2012", "ILSVRC2012_img_train.tar and .*_val.tar in downloads/manual"),
        ("cifar10", "it may need TensorFlow: install the extra 'prepare' .*`tfds build cifar10 "),
        ("mnist", "it may need TensorFlow"),
        ("glue/mnli", r"without TensorFlow: `python -c \"import tensorflow_datasets.text.glue, "),
        ("squad", r"`python -c \"import tensorflow_datasets; .*builder\('squad', file_format="),
        ("xnli:1.1.0", r"without TensorFlow: .*builder\('xnli:1.1.0', file_format='array_record'"),
        ("wmt14_translate/de-en", "without TensorFlow: .*tensorflow_datasets.translate.wmt14, "),
        ("wmt16_translate/de-en", "without TensorFlow: .*tensorflow_datasets.translate.wmt16, "),
    ],
)
def test_the_requirements_of_a_builder_are_one_sentence(name, needs):
    with pytest.raises(UserError, match=f"tfds:{name} is not prepared here .*{needs}") as refusal:
        list(read_documents(TextSource(f"tfds:{name}")))
    assert how_to_prepare(name) in str(refusal.value)
    assert str(refusal.value).count(". ") == 0
