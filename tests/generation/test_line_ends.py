"""The text that a model goes on with keeps its line ends and indentation."""

from __future__ import annotations

import pytest

from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.generation.prompts import read_prompts
from tests.data.tokenizers.test_byte_level_training import CONFIGS, CORPUS


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_and_generated_text_keep_line_ends(name, tmp_path):
    config: TokenizerConfig = CONFIGS[name]
    tokenizer = train_tokenizer(config, CORPUS)
    tokenizer.save(tmp_path)
    prompts = read_prompts(tmp_path, GPT2Config(vocab_size=tokenizer.vocabulary.size))
    given, written = "def f(x):\n\tif x:", "\r\n\t\treturn  1\n\n\n    # end\n"
    ids = [*prompts.encode(given), *tokenizer.encode_batch([written])[0].tolist()]
    assert prompts.decode(ids) == given + written
