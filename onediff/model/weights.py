"""Load checkpoints and reject those that are incomplete, contain executable code, or do not fit their tokenizer.

All checkpoints that this project reads, pretrained or trained by OneDiff, are loaded with these functions.
"""

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
SHOWN = 3  # largest number of weights or files that an error message lists


def load_trained(folder: Path) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """Load the model and the processor that `save_pretrained` wrote into the folder.

    Raises FileNotFoundError if the model or one of its files is missing, and ValueError if the folder contains another
    kind of model, or a tokenizer with which the model was not trained.
    """
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} must contain a OneDiff model, but it has no config.json; train one with "
                                "'make run'")
    kind = read_config(folder, where="model").model_type
    if kind != OneDiffForConditionalGeneration.config_class.model_type:
        raise ValueError(f"{folder} must contain a OneDiff model, but the model_type in config.json is '{kind}'; use "
                         "a model folder that OneDiff's training wrote")
    for name in ("processor_config.json", "tokenizer.json"):
        if not (Path(folder) / name).exists():
            raise FileNotFoundError(f"{folder} must contain a OneDiff model, but it has no {name}, so the folder is "
                                    "incomplete; copy or download it again")
    model = load_strictly(OneDiffForConditionalGeneration, folder, where="model")
    assert isinstance(model, OneDiffForConditionalGeneration), "from_pretrained returns an instance of the class"
    processor = OneDiffProcessor.from_pretrained(folder)
    check_vocabulary(processor.tokenizer, model.language.get_input_embeddings().num_embeddings, where=str(folder))
    check_placeholders(processor.tokenizer, where=str(folder),
                       saved={IMAGE: model.config.image_token_id, DELTA: model.config.delta_token_id})
    return model, processor


def read_config(name: str | Path, *, where: str) -> PreTrainedConfig:
    """Load the configuration of a pretrained model without running code that comes with the checkpoint.

    `where` is the key of params.yaml or the option that an error message names. Raises ValueError if the architecture
    of the model is not part of transformers.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{where}: {name}: the architecture in config.json must be part of transformers, because "
                         f"OneDiff does not run code from checkpoints ({first_line(error)}); use another "
                         "model") from None


def load_strictly(kind: Any, name: str | Path, *, where: str, ignored: Iterable[str] = (), **options: Any) -> Any:
    """Load a pretrained model with `kind.from_pretrained(name)`, and check that the files have exactly its weights.

    Weights whose names begin with one of `ignored` are not checked. `options` are passed to `from_pretrained`. The
    files may be safetensors, or pickles that contain only tensors; code in a pickle is never run.
    Raises FileNotFoundError for a missing file, and ValueError for missing, additional or unreadable weights.
    """
    check_files(name, where=where)
    try:
        model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True,
                                             weights_only=True, trust_remote_code=False, **options)
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL (\S+)", str(error))
        content = f"this pickle calls {call[1]}" if call else f"this file has other content ({first_line(error)})"
        raise ValueError(f"{where}: {name}: a weight file must contain only tensors, but {content}; no code in the "
                         "file was run; get this model as safetensors") from None
    except (SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(f"{where}: {name}: the weights cannot be read ({first_line(error)}), so the file is "
                         "incomplete or damaged; download it again") from error
    check_report(report, where=where, name=name, kind=type(model).__name__, ignored=tuple(ignored))
    return model


def check_files(name: str | Path, *, where: str) -> None:
    """Raise FileNotFoundError, before anything is loaded, if a model folder has no weights or a shard is missing."""
    folder = Path(name)
    if not folder.is_dir():
        return  # This is a model of the Hugging Face Hub, and transformers downloads all of its files.
    first = next((folder / file for file in FILES if (folder / file).exists()), None)
    if first is None:
        raise FileNotFoundError(f"{where}: {folder} must contain weights ({' or '.join(FILES[:3])}), but it "
                                "has none; download the complete model")
    if first.suffix != ".json":
        return
    try:
        shards = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{where}: {first} must contain the key weight_map, which maps each weight to a file; "
                         "download the file again") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{where}: {folder} must contain {len(shards)} weight files, but {len(missing)} are "
                                f"missing ({_few(missing)}); download the complete model")


def check_report(report: dict[str, Any], *, where: str, name: str | Path, kind: str, ignored: tuple[str, ...]) -> None:
    """Raise ValueError if `from_pretrained` reports weights that are missing, additional or of another shape.

    `kind` is the class name of the model for the error message. Weights with a prefix in `ignored` are not checked.
    """
    missing, unexpected = (sorted(key for key in report[part] if not key.startswith(ignored))
                           for part in ("missing_keys", "unexpected_keys"))
    reshaped = [f"{key} {list(shape)} instead of {list(needed)}"
                for key, shape, needed in sorted(report["mismatched_keys"])]
    wrong = [f"{len(keys)} {what} ({_few(keys)})" for keys, what in
             ((missing, "missing"), (unexpected, "additional"), (reshaped, "of another shape")) if keys]
    if wrong:
        raise ValueError(f"{where}: {name} must contain exactly the weights of the {kind} that config.json describes, "
                         f"got {', '.join(wrong)}; use a config.json and weights that belong to one model")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, *, where: str) -> None:
    """Raise ValueError if a token id of the tokenizer is not below `rows`, the number of rows of the embedding table.

    The ids of the image and delta placeholders may be larger, because the model never looks up their embeddings.
    """
    ids = {token: id_ for token, id_ in tokenizer.get_vocab().items() if token not in (IMAGE, DELTA)}
    last = max(ids, key=lambda token: ids[token])
    if ids[last] >= rows:
        raise ValueError(f"{where}: token ids must be below {rows}, the vocabulary size of the language model, but the "
                         f"tokenizer has ids up to {ids[last]} ({last!r}); use the tokenizer with which the language "
                         "model was trained")


def check_placeholders(tokenizer: PreTrainedTokenizerBase, *, where: str, saved: dict[str, int]) -> None:
    """Raise ValueError if the image or delta placeholder has the id of another token, or another id than in `saved`.

    `saved` maps each placeholder to its id in config.json.
    """
    placeholders = {token: tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, DELTA)}
    roles = {role: getattr(tokenizer, role + "_id") for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    words = {id_: token for token, id_ in tokenizer.get_vocab().items() if token not in placeholders}
    for token, id_ in placeholders.items():
        clashes = [role for role, other in roles.items() if other == id_]
        clashes += [repr(words[id_])] if id_ in words else []
        clashes += [other for other in placeholders if other != token and placeholders[other] == id_]
        if clashes:
            raise ValueError(f"{where}: no other token may have the id of the placeholder {token}, but id {id_} also "
                             f"belongs to {' and '.join(clashes)} of the tokenizer; give one of them another id")
        if saved.get(token, id_) != id_:
            raise ValueError(f"{where}: the placeholder {token} must have id {saved[token]}, as in config.json, but it "
                             f"has id {id_} in the tokenizer; use the tokenizer with which the model was trained")


def first_line(error: BaseException) -> str:
    """Return the first line of an error message that is not blank, or the class name of an error without a message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _few(names: list[str]) -> str:
    """Join the first `SHOWN` names with commas, followed by "..." if there are more names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
