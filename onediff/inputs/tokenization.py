"""TextTokenizer: tokenizes users' text as text, so that no control token can come out of it.

A tokenizer of transformers turns the text "</s>" into the token that ends a sentence, and "<image>" into a placeholder
for visual tokens. In captions and instructions, these texts are only letters. The option `split_special_tokens` of
transformers is not enough: added tokens that are not special still come out, and so do control tokens that are pieces
of a Unigram or WordLevel vocabulary.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Encoding, Tokenizer

from onediff.inputs.prompt import FENCE


class TextTokenizer:
    """A copy of a tokenizer in which every control token has a name that no text can contain.

    Token ids are those of the original tokenizer. Control tokens are all special and added tokens, except single
    characters and white space, which some tokenizers add as ordinary text.
    """

    def __init__(self, tokenizer: Any, marks: Mapping[str, str]) -> None:
        """Copy a fast tokenizer of transformers.

        `marks` maps those control tokens that a prompt may contain to the marks that stand for them in the text.
        Raises ValueError if the tokenizer is not a fast one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer must be a fast one with a tokenizer.json, "
                             f"because only these can treat '</s>' in a caption as text, got "
                             f"{type(tokenizer).__name__}; use a model with a tokenizer.json")
        state = json.loads(backend.to_str())
        added = [token for token in state["added_tokens"] if len(token["content"]) > 1 and token["content"].strip()]
        names = {token["content"]: marks.get(token["content"]) or f"{FENCE}{token['id']}{FENCE}" for token in added}
        for token in added:
            token |= {"content": names[token["content"]], "normalized": False}
        _rename(state["model"], names)
        state |= {"truncation": None, "padding": None, "post_processor": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        allowed = {*marks, state["model"].get("unk_token"), tokenizer.unk_token}
        self._control = {token["id"] for token in added} - {backend.token_to_id(name) for name in allowed if name}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without tokens for its beginning and end.

        The text must come from `prompt.plain` or from a prompt, so that it contains no marks except those of a prompt.
        """
        ids: list[int] = self.encoding(text).ids
        return ids

    def encoding(self, text: str) -> Encoding:
        """Return what `encode` returns as an object, to which the original tokenizer can add tokens at both ends."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        assert self._control.isdisjoint(encoding.ids), f"a control token came out of the text {text[:200]!r}"
        return encoding


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens in the vocabulary of a tokenizer model, and remove the BPE merges that would produce them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # A Unigram model has a list of (token, score).
        model["vocab"] = [(names.get(token, token), score) for token, score in vocabulary]
        return
    model["vocab"] = {names.get(token, token): id_ for token, id_ in vocabulary.items()}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [(left, right) for left, right in model["merges"]
                           if not {left, right, left + right.removeprefix(prefix)} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
