"""What must agree before a contrastive run: end and padding ids, channels, patches."""

from __future__ import annotations

import dataclasses

import pytest

from flax_transformers.data.dataset import prepare
from flax_transformers.data.images.image_text import ClassTexts, ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.families.clip import ClipConfig, ClipVision
from flax_transformers.families.siglip import SiglipConfig, SiglipVision
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.testing import tiny_config
from flax_transformers.training.check_run import check_config, check_run
from flax_transformers.training.config import Phase
from tests.data.images.test_dataset import SIDE, write_idx

SIZES = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
IMAGES = {"image_size": SIDE, "patch_size": 4, "num_channels": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function from changes of the model to its config, and the prepared data."""
    folder = tmp_path_factory.mktemp("run")
    data = ImageTextData(
        source=ImageSource(str(write_idx(folder / "digits"))),
        channels=1,
        tokenizer=TokenizerConfig("bytes"),
        captions=(ClassTexts(("a", "b", "c")),),
        store=str(folder / "store"),
    )
    prepared = prepare(data)

    def make(model, **changes):
        plain = tiny_config("text.txt", "store")
        objective = ImageTextContrastive(image_size=SIDE)
        fields = {"objective": objective, "data": data, "phases": (Phase(4, 8, 8),)}
        return dataclasses.replace(plain, model=model, **fields | changes), prepared

    return make


def clip(**changes):
    vision = ClipVision(**SIZES, **IMAGES)
    fields = {"vocab_size": 262, "pad_id": 0, "bos_id": None, "eos_ids": (1,), "vision": vision}
    return ClipConfig(**SIZES, **fields | changes)


def test_the_end_of_a_text_is_that_of_the_tokenizer_and_padding_does_not_matter(run):
    for model in (clip(), clip(pad_id=7), clip(eos_ids=())):
        config, prepared = run(model)
        check_config(config)
        check_run(config, prepared)
    config, prepared = run(clip(eos_ids=(9,)))
    with pytest.raises(UserError, match=r"ends a text with id 1, but model\.eos_ids is \(9,\)"):
        check_run(config, prepared)


def test_a_model_that_reads_padding_pads_as_the_tokenizer(run):
    vision = SiglipVision(**SIZES, **IMAGES)
    model = SiglipConfig(**SIZES, vocab_size=262, max_positions=8, vision=vision)
    config, prepared = run(dataclasses.replace(model, pad_id=0))
    check_run(config, prepared)
    config, prepared = run(model)
    with pytest.raises(UserError, match=r"pads with id 0, but model\.pad_id is 1"):
        check_run(config, prepared)


def test_images_have_the_channels_and_the_patches_of_the_model(run):
    vision = ClipVision(**SIZES, **IMAGES | {"num_channels": 3})
    config, _ = run(clip(vision=vision))
    with pytest.raises(UserError, match=r"data\.channels is 1, but model\.num_channels is 3"):
        check_config(config)
    config, _ = run(clip(), objective=ImageTextContrastive(image_size=10))
    with pytest.raises(UserError, match=r"objective\.image_size is 10, of which patches"):
        check_config(config)
