from __future__ import annotations

import pydoc_data.topics
import subprocess
import sys

import pytest

from flax_transformers.data.sources import embedded
from flax_transformers.data.sources.read import fingerprint, read_documents
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError


@pytest.mark.slow
def test_embedded_text_is_about_two_megabytes_of_distinct_documents():
    documents = list(embedded.documents())
    assert len(documents) > 4000
    assert sum(map(len, documents)) > 1_500_000
    assert len(set(documents)) == len(documents)


@pytest.mark.slow
def test_help_topics_come_first_in_order_of_their_names():
    topics = [text.split() for _, text in sorted(pydoc_data.topics.topics.items())]
    distinct = [words for i, words in enumerate(topics) if words not in topics[:i]]
    first = [text.split() for text in list(embedded.documents())[: len(distinct)]]
    assert first == distinct


@pytest.mark.slow
def test_reading_imports_none_of_the_modules_read():
    code = (
        "import sys; from flax_transformers.data.sources import embedded;"
        "before = set(sys.modules);"
        "n = len(list(embedded.documents())); new = set(sys.modules) - before;"
        "print(n > 4000, sorted(m for m in new if not m.startswith('encodings')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True []\n"


@pytest.fixture
def library(tmp_path):
    """A small standard library."""
    long = "Some words that go on for long enough to count as text here."
    files = {
        "pydoc_data/topics.py": 'topics = {"zebra": "  Z topic.\\n", "ant": "A topic."}\n',
        "b.py": f'"""B module. {long}"""\ndef f():\n    """F.\n\n        {long}\n    """\n',
        "a.py": f'class C:\n    """C class. {long}"""\n    def m(self):\n        """{long}"""\n'
        f'try:\n    pass\nexcept E:\n    def g():\n        """G. {long}"""\n',
        "broken.py": "def (:\n",
        "short.py": '"""Too short."""\n',
        "site-packages/x.py": f'"""Not ours. {long}"""\n',
        "pkg/tests/y.py": f'"""A test. {long}"""\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path, long


def test_docstrings_are_cleaned_deduplicated_and_in_order_of_file_and_line(library):
    folder, long = library
    assert embedded._documents(folder) == (
        "A topic.", "Z topic.\n".strip(),
        f"C class. {long}", long, f"G. {long}",
        f"B module. {long}", f"F.\n\n{long}",
    )  # fmt: skip


def test_a_python_without_sources_raises_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no standard library sources"):
        embedded._documents(tmp_path)


@pytest.mark.slow
def test_the_embedded_source_reads_them_all_with_a_stable_fingerprint():
    found = [document.text for _, document in read_documents(TextSource())]
    assert found == list(embedded.documents())
    assert fingerprint(TextSource()) == fingerprint(TextSource())
