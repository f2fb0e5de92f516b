"""Class, special tokens and options of a tokenizer, from the files beside its vocabulary.

They are tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json and
generation_config.json, interpreted as in ``transformers``. What is missing in the files is taken
from the class (GPT-2's published tokenizer_config.json contains only a length), except options of
BERT's normalizer, which a tokenizer.json has too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame

CONFIG_FILE = "tokenizer_config.json"
RECORD = "flax_transformers"
"""The key of this package's record in CONFIG_FILE."""
ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
FACT_FILES = (
    CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json",
)  # fmt: skip
TEMPLATE_FILE = "chat_template.jinja"
"""The chat template, which is kept beside the vocabulary."""
MODEL_FILES = ("config.json", "generation_config.json")
"""Files that belong to the model."""
_MODEL_FIELDS = ("model_type", "tokenizer_class", "pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class TokenizerClass:
    """The defaults of a class of ``transformers``.

    ``before`` and ``after``: roles of the tokens around a text, for folders without a
    tokenizer.json with a post-processor.
    """

    roles: Mapping[str, str]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_FAIRSEQ = {
    "bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>",
    "mask": "<mask>",
}  # fmt: skip
_MBART50 = {role: name for role, name in _FAIRSEQ.items() if role != "bos"}
_GPT2 = {"unk": "<|endoftext|>", "bos": "<|endoftext|>", "eos": "<|endoftext|>"}
_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_LLAMA = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
_QWEN2 = {"unk": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}
_GEMMA = {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "mask": "<mask>"}

CLASSES: dict[str, TokenizerClass] = {
    "BertTokenizer": TokenizerClass(_BERT, ("cls",), ("sep",)),
    "DistilBertTokenizer": TokenizerClass(_BERT, ("cls",), ("sep",)),
    "ElectraTokenizer": TokenizerClass(_BERT, ("cls",), ("sep",)),
    "GPT2Tokenizer": TokenizerClass(_GPT2),
    "RobertaTokenizer": TokenizerClass(_FAIRSEQ, ("cls",), ("sep",)),
    "BartTokenizer": TokenizerClass(_FAIRSEQ, ("cls",), ("sep",)),
    "XLMRobertaTokenizer": TokenizerClass(_FAIRSEQ, ("cls",), ("sep",)),
    "CamembertTokenizer": TokenizerClass(_FAIRSEQ, ("cls",), ("sep",)),
    "MBartTokenizer": TokenizerClass(_FAIRSEQ, (), ("eos", "language")),
    "MBart50Tokenizer": TokenizerClass(_MBART50, ("language",), ("eos",)),
    "T5Tokenizer": TokenizerClass(_T5, (), ("eos",)),
    "ByT5Tokenizer": TokenizerClass(_T5, (), ("eos",)),
    "MarianTokenizer": TokenizerClass(_T5, (), ("eos",)),
    "LlamaTokenizer": TokenizerClass(_LLAMA, ("bos",)),
    "GemmaTokenizer": TokenizerClass(_GEMMA, ("bos",)),
    "Qwen2Tokenizer": TokenizerClass(_QWEN2),
}
_CLASS_OF_MODEL = {
    "bert": "BertTokenizer", "distilbert": "DistilBertTokenizer", "electra": "ElectraTokenizer",
    "gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "bart": "BartTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer",
    "mbart": "MBartTokenizer", "t5": "T5Tokenizer", "mt5": "T5Tokenizer", "umt5": "T5Tokenizer",
    "byt5": "ByT5Tokenizer", "marian": "MarianTokenizer", "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer", "mixtral": "LlamaTokenizer", "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
    "albert": "AlbertTokenizer", "deberta-v2": "DebertaV2Tokenizer", "siglip": "SiglipTokenizer",
    "clip": "CLIPTokenizer",
}  # fmt: skip


@dataclass(frozen=True)
class AddedToken:
    """A token that is added to the model's vocabulary, as files describe it: the fields of the
    `tokenizers` library, in the order of a tokenizer.json."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class Facts:
    """See the module. ``named``: tokens by role, None if the files say that there is no such token.
    ``added``: added tokens by id. ``extra``: additional special tokens without an id. ``options``:
    all other fields of tokenizer_config.json. ``model``: fields of config.json and
    generation_config.json for the tokenizer. ``record``: this package's record."""

    tokenizer_class: str | None = None
    named: Mapping[str, str | None] = field(default_factory=dict)
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known_class(self) -> TokenizerClass | None:
        return CLASSES.get(self.tokenizer_class or "")

    @property
    def trained_here(self) -> bool:
        """Whether this package trained it; the objective then decides how texts are framed."""
        return bool(self.record) and not self.record.get("published")

    @property
    def run_frame(self) -> Frame | None:
        """The special tokens that the run that saved it puts around texts; None if not recorded."""
        noted, second = self.record.get("frame"), self.record.get("before_second")
        if noted is None:
            return None
        before, after = (tuple(map(int, side)) for side in noted)
        return Frame(before, after, None if second is None else tuple(map(int, second)))

    def model_id(self, role: str, size: int) -> int | None:
        """The (first) id of a role in config.json or generation_config.json."""
        found: Any = self.model.get(f"{role}_token_id")
        first: Any = found[0] if isinstance(found, list) and found else found
        known = isinstance(first, int) and not isinstance(first, bool) and 0 <= first < size
        return int(first) if known else None

    def role(self, name: str) -> str | None:
        """The token with a role, from the files or else from the class."""
        if name in self.named:
            return self.named[name]
        return None if self.known_class is None else self.known_class.roles.get(name)

    def flag(self, name: str) -> bool | None:
        """A boolean option; None if it is not set."""
        value = self.options.get(name)
        return value if isinstance(value, bool) else None


NO_FACTS = Facts()
TRAINED_HERE = Facts(record={"trained": True})


def read_facts(files: Mapping[str, bytes], where: object = "the folder") -> Facts:
    """Reads the FACT_FILES among ``files``. Raises UserError for a damaged one."""
    config, names, added, model, generation = (
        parsed(files, name, where) if name in files else {} for name in FACT_FILES
    )
    record = config.get(RECORD)
    record = record if isinstance(record, dict) else {}
    try:
        model = {**record.get("model", {}), **_of_model(model, generation)}
        return _facts(config, names, added, model, record)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"The tokenizer in {where} has a {CONFIG_FILE}, special_tokens_map.json or "
            f"added_tokens.json that cannot be read ({error}); compare it with a published one."
        ) from error


def _facts(
    config: dict[str, Any],
    names: dict[str, Any],
    added: dict[str, Any],
    model: dict[str, Any],
    record: dict[str, Any],
) -> Facts:
    listed = config.get("added_tokens_decoder")
    # As in transformers, the older files are used only without that field.
    if listed is None:
        config = config | names
    named = {role: _content(config[f"{role}_token"]) for role in ROLES if f"{role}_token" in config}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    more = tuple(text for text in map(_content, extra) if text is not None)
    tokens = {int(i): _added(token) for i, token in (listed or {}).items()}
    if listed is None:
        special = {*named.values(), *more}
        for content, i in added.items():
            plain = content not in special
            tokens[int(i)] = AddedToken(content, normalized=plain, special=not plain)
    return Facts(
        tokenizer_class=_class(config, model),
        named=named,
        added=tokens,
        extra=more,
        options={k: v for k, v in config.items() if k not in (RECORD, "added_tokens_decoder")},
        model=model,
        record=record,
    )


def _class(config: dict[str, Any], model: dict[str, Any]) -> str | None:
    """The name of the class without "Fast", or else the class of the model's type."""
    for source in (config, model):
        name = source.get("tokenizer_class")
        if isinstance(name, str) and name not in ("PreTrainedTokenizer", "TokenizersBackend"):
            plain = name if name == "PreTrainedTokenizerFast" else name.removesuffix("Fast")
            return "T5Tokenizer" if plain == "MT5Tokenizer" else plain
    return _CLASS_OF_MODEL.get(str(model.get("model_type")))


def _of_model(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    found = {name: config[name] for name in _MODEL_FIELDS if config.get(name) is not None}
    ids = [name for name in _MODEL_FIELDS if name.endswith("_id")]
    return found | {name: generation[name] for name in ids if generation.get(name) is not None}


def _content(token: Any) -> str | None:
    """The content of a token, which is a string or a record."""
    if token is None:
        return None
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"a token is {token!r}, not a string")
    return text


def _added(token: Any) -> AddedToken:
    known = {name: token[name] for name in AddedToken.__dataclass_fields__ if name in token}
    return AddedToken(**{"special": False} | known)


def parsed(files: Mapping[str, bytes], name: str, where: object) -> dict[str, Any]:
    """A JSON file as a dict. Raises UserError if it is not JSON."""
    try:
        content = json.loads(files[name].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"The file {where}/{name} is damaged: it is not JSON ({error}).") from error
    return content if isinstance(content, dict) else {}
