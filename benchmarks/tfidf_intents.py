"""A baseline of intent classification: TF-IDF and logistic regression.

    python benchmarks/tfidf_intents.py data/clinc150/data_full.json.gz

Needs scikit-learn, which is not a dependency of the package: install it in a separate environment.
The regularisation is chosen on the split "val"; the score is that of "test". With scikit-learn 1.x:
single words 91.6 %, and 91.0 % with pairs of words.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

STRENGTHS = (1.0, 10.0, 100.0)
FEATURES = {
    "words": lambda: TfidfVectorizer(ngram_range=(1, 1)),
    "words, one and two": lambda: TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
}


def main(path: str) -> None:
    raw = Path(path).read_bytes()
    splits = json.loads(gzip.decompress(raw) if path.endswith(".gz") else raw)
    texts, labels = (
        {name: [row[place] for row in splits[name]] for name in ("train", "val", "test")}
        for place in (0, 1)
    )
    for name, features in FEATURES.items():
        found = []
        for strength in STRENGTHS:
            model = make_pipeline(features(), LogisticRegression(C=strength, max_iter=300))
            model.fit(texts["train"], labels["train"])
            found.append((model.score(texts["val"], labels["val"]), strength, model))
        val, strength, model = max(found, key=lambda one: one[0])
        test = model.score(texts["test"], labels["test"])
        print(f"{name}: C={strength:g}, val {100 * val:.1f}%, test {100 * test:.1f}%", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
