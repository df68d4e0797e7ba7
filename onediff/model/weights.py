"""Pretrained weights: whole, plain tensors, and beside a tokenizer that fits them. One way in for every checkpoint."""

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from onediff.inputs.processing import OneDiffProcessor
from onediff.inputs.prompt import DELTA, IMAGE
from onediff.model.onediff import OneDiffForConditionalGeneration

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SHOWN = 3  # names of weights in a message


def load_trained(folder: Path) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """A folder that `save_pretrained` of model and processor wrote.

    Raises FileNotFoundError if the folder holds no model or lacks a file, and ValueError if it holds another model or a
    tokenizer with which the model was not trained.
    """
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no OneDiff model (no config.json): train one with 'make run'")
    kind = read_config(folder, where="model").model_type
    if kind != OneDiffForConditionalGeneration.config_class.model_type:
        raise ValueError(f"{folder} must hold a OneDiff model, but its config.json says '{kind}'; give the folder that "
                         "a training phase wrote")
    model = load_strictly(OneDiffForConditionalGeneration, folder, where="model")
    assert isinstance(model, OneDiffForConditionalGeneration), "from_pretrained returns an instance of the class"
    processor = OneDiffProcessor.from_pretrained(folder)
    check_vocabulary(processor.tokenizer, model.language.get_input_embeddings().num_embeddings, where=str(folder))
    check_placeholders(processor.tokenizer, where=str(folder),
                       saved={IMAGE: model.config.image_token_id, DELTA: model.config.delta_token_id})
    return model, processor


def read_config(name: str | Path, *, where: str) -> PreTrainedConfig:
    """Raises ValueError for a model whose code is not part of transformers."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{where}: {name}: its config.json must name a model that transformers has itself, for code "
                         f"that a checkpoint brings along is not run ({first_line(error)}); take another") from None


def load_strictly(kind: Any, name: str | Path, *, where: str, ignored: Iterable[str] = (), **options: Any) -> Any:
    """`kind.from_pretrained(name)`, but only if the checkpoint has every weight of the model, and no other.

    Names that begin with one of `ignored` may be absent on either side. Files are safetensors or, where there are none,
    pickles of tensors alone: code in them is not run. Raises FileNotFoundError for a missing file, ValueError else.
    """
    check_files(name, where=where)
    try:
        model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True,
                                             weights_only=True, trust_remote_code=False, **options)
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL (\S+)", str(error))
        content = f"this pickle calls {call[1]}" if call else f"this one holds something else ({first_line(error)})"
        raise ValueError(f"{where}: {name}: a weight file must hold tensors alone, but {content}, which was not run; "
                         "take the model as safetensors") from None
    except (SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(f"{where}: {name}: weights cannot be read ({first_line(error)}); the file is cut off or "
                         "corrupt: fetch it again") from error
    check_report(report, where=where, name=name, kind=type(model).__name__, ignored=tuple(ignored))
    return model


def check_files(name: str | Path, *, where: str) -> None:
    """Raises FileNotFoundError, before anything is loaded, for a folder that lacks weights or one shard of them."""
    folder = Path(name)
    if not folder.is_dir():
        return  # a name of the hub, which sends what its index names
    first = next((folder / file for file in FILES if (folder / file).exists()), None)
    if first is None:
        raise FileNotFoundError(f"{where}: {folder} holds no weights ({' or '.join(FILES[:3])}); fetch the whole model")
    if first.suffix != ".json":
        return
    try:
        shards = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{where}: {first} must map each weight to its file (weight_map); fetch it again") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{where}: {folder} lacks {len(missing)} of the {len(shards)} files of its weights "
                                f"({_few(missing)}); fetch the whole model")


def check_report(report: dict[str, Any], *, where: str, name: str | Path, kind: str, ignored: tuple[str, ...]) -> None:
    """Raises ValueError if `from_pretrained` reports weights that are missing, left over, or of another shape."""
    missing, unexpected = (sorted(key for key in report[part] if not key.startswith(ignored))
                           for part in ("missing_keys", "unexpected_keys"))
    reshaped = [f"{key} {list(shape)} for {list(needed)}" for key, shape, needed in sorted(report["mismatched_keys"])]
    wrong = [f"{len(keys)} {what} ({_few(keys)})" for keys, what in
             ((missing, "missing"), (unexpected, "unexpected"), (reshaped, "of another shape")) if keys]
    if wrong:
        raise ValueError(f"{where}: {name} must hold the weights of the {kind} that its config.json describes, but of "
                         f"these are {', '.join(wrong)}: a checkpoint of another architecture; take config.json and "
                         "weights of one model")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, *, where: str) -> None:
    """Raises ValueError if the tokenizer gives an id without a row in the embedding; placeholders are never looked up.
    """
    ids = {token: id_ for token, id_ in tokenizer.get_vocab().items() if token not in (IMAGE, DELTA)}
    last = max(ids, key=lambda token: ids[token])
    if ids[last] >= rows:
        raise ValueError(f"{where}: the language model embeds {rows} tokens, but its tokenizer has ids up to "
                         f"{ids[last]} ({last!r}): wrong vocabulary size; put the tokenizer beside it that it was "
                         "trained with")


def check_placeholders(tokenizer: PreTrainedTokenizerBase, *, where: str, saved: dict[str, int]) -> None:
    """Raises ValueError unless image and delta tokens have ids of their own, those of `saved` where it names them."""
    placeholders = {token: tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, DELTA)}
    roles = {role: getattr(tokenizer, role + "_id") for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    words = {id_: token for token, id_ in tokenizer.get_vocab().items() if token not in placeholders}
    for token, id_ in placeholders.items():
        clashes = [role for role, other in roles.items() if other == id_]
        clashes += [repr(words[id_])] if id_ in words else []
        clashes += [other for other in placeholders if other != token and placeholders[other] == id_]
        if clashes:
            raise ValueError(f"{where}: the placeholder {token} must have a token id of its own, but {id_} is also "
                             f"{' and '.join(clashes)} of the tokenizer; give {token} or the other another id")
        if saved.get(token, id_) != id_:
            raise ValueError(f"{where}: the placeholder {token} has id {saved[token]} in config.json, but {id_} in the "
                             "tokenizer; put the tokenizer beside it that it was trained with")


def first_line(error: BaseException) -> str:
    """The first line of the error's message that is not blank, else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
