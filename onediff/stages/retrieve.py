"""Stage `retrieve` finds pairs of similar images in a captioned collection. The writer captions the pairs later."""

import numpy as np
from tqdm import tqdm

from onediff.config import load_params, load_runtime
from onediff.data.record import write_shards
from onediff.data.sources.collection import list_collection
from onediff.data.sources.retrieval import embed_collection, find_pairs, pair_records
from onediff.files import new_folder, write_json
from onediff.library_logs import silence_libraries
from onediff.paths import PAIRS, RAW
from onediff.stages.command import run


def retrieve(source: str) -> None:
    """Find pairs of similar images in data/raw/SOURCE, and write them to data/pairs/SOURCE/train-*.parquet.

    report.json in that folder lists the images that cannot be read. Raises ValueError if no two images have a
    similarity between the limits in data.retrieval of params.yaml.
    """
    data, runtime = load_params().data, load_runtime()
    settings, clip = data.retrieval, data.clip
    if settings is None or clip is None:
        raise ValueError(f"params.yaml: data.retrieval and data.clip must be set to find pairs in '{source}'; "
                         "presets/paper.yaml has both")
    silence_libraries()
    entries = list_collection(RAW / source)
    vectors, names, unreadable = [], [], dict[str, str]()
    with tqdm(total=len(entries), desc=f"embed {source}", unit="image") as bar:
        for part in embed_collection(entries, clip, runtime, max_megapixels=data.max_megapixels):
            bar.update(len(part.names) + len(part.unreadable))
            vectors += [part.vectors] if part.names else []
            names += part.names
            unreadable |= part.unreadable
    pairs = find_pairs(np.concatenate(vectors), names, settings) if vectors else []
    if not pairs:
        raise ValueError(f"data/raw/{source}: no two of {len(names)} images have a similarity from "
                         f"{settings.min_similarity} to {settings.max_similarity}; widen this range in "
                         "params.yaml: data.retrieval")
    readable = [entry for entry in entries if entry.name not in unreadable]
    with new_folder(PAIRS / source) as folder:
        records = tqdm(pair_records(source, readable, pairs), source, len(pairs), unit="pair")
        write_shards(records, folder, "train", shard_pairs=data.shard_pairs)
        report = {"images": len(entries), "pairs": len(pairs), "unreadable": unreadable}
        write_json(folder / "report.json", report, indent=1, sort_keys=True)
    print(f"{PAIRS / source}: {len(pairs):,} pairs of {len(names):,} images; "
          f"{len(unreadable):,} images cannot be read")


if __name__ == "__main__":
    run(retrieve)
