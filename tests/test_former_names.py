"""Names of version 0.1 that config files may still use."""

import importlib
import subprocess
import sys
import textwrap

import pytest

from flax_transformers import former_names
from flax_transformers.cli.config_file import load_config
from flax_transformers.data.config import TextData
from flax_transformers.data.prepare.filters import Filters
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError


@pytest.mark.parametrize("former", former_names.MODULES)
def test_a_module_that_moved_is_found_under_its_former_name(former):
    name = f"flax_transformers.{former}"
    sys.modules.pop(name, None)
    with pytest.warns(FutureWarning, match=f"{name} is called .* now"):
        found = importlib.import_module(name)
    current = importlib.import_module(f"flax_transformers.{former_names.MODULES[former]}")
    public = [name for name in vars(current) if not name.startswith("_")]
    assert all(getattr(found, name) is getattr(current, name) for name in public)


@pytest.mark.parametrize(
    "line",
    [
        "from flax_transformers.data.tokenizers import TokenizerConfig, load_tokenizer",
        "from flax_transformers.data.prepare import prepare_text",
        "from flax_transformers.data.sources import read_documents",
        "from flax_transformers.data.images import ImageData",
        "from flax_transformers.data.store import TokenStore",
        "from flax_transformers.data.gates import Gates",
        "from flax_transformers.models.config import Execution",
        "from flax_transformers.objectives.contract import Objective, Terms",
        "from flax_transformers.training.average import WeightAverage",
        "from flax_transformers.training.checkpoints import CheckpointConfig, find_checkpoint",
        "from flax_transformers.training.optimizers import AdamW",
    ],
)
def test_imports_of_version_0_1_work(line):
    with pytest.warns(FutureWarning, match="is called"):
        exec(f"import sys\nfor n in [n for n in sys.modules if 'gates' in n or "
             f"n.endswith(('contract', 'average', 'checkpoints', 'training.optimizers'))]:\n"
             f"    del sys.modules[n]\n{line}", {})  # fmt: skip


def test_other_names_are_still_an_import_error():
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from flax_transformers.data.tokenizers import Nothing", {})
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flax_transformers.training.nothing")


def test_former_fields_are_accepted_with_a_warning():
    filters = Filters(min_characters=3)
    with pytest.warns(FutureWarning, match="the field gates of TextData is called filters now"):
        data = TextData(source=TextSource("a"), tokenizer=TokenizerConfig("bytes"), gates=filters)
    assert data.filters == filters
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        TextData(source=TextSource("a"), tokenizer=TokenizerConfig("bytes"), other=1)


def test_a_field_by_its_former_name_is_named_with_that_of_today(tmp_path):
    file = tmp_path / "former.py"
    file.write_text(
        "from flax_transformers.testing import tiny_bert\n"
        "def get_config():\n    return tiny_bert(norm_place='pre')\n"
    )
    with pytest.raises(UserError, match="norm_place is called norm_position now; correct the file"):
        load_config(str(file))


def test_importing_the_package_imports_no_former_name_and_does_not_warn():
    code = """
        import warnings; warnings.simplefilter("error")
        import flax_transformers, flax_transformers.data.tokenizers.load
        import flax_transformers.training.config
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
