"""Reads InstructPix2Pix: images generated from a caption and from an edited version of the caption.

Each prompt has a folder, inside a shard or not, with prompt.json {"input", "edit", "output"}, metadata.jsonl with one
sample {"seed", "sim_image", ...} per line, and the images <seed>_0.jpg and <seed>_1.jpg. The data set contains no
captions of differences: the writer (data.written) creates them from "input", "edit" and "output".
Brooks et al., CVPR 2023.
"""

import itertools
from collections.abc import Iterator

from onediff.data.sources.entries import one_line, part
from onediff.data.sources.published import Files, PublishedPair
from onediff.text_files import read_json, read_lines

SIMILARITIES = ("sim_0", "sim_1", "sim_direction", "sim_image", "sim_text")


def read(files: Files) -> Iterator[PublishedPair]:
    """Yield one pair, without references, for each sample (two generated images) of each prompt.

    Raises ValueError if a file is broken, and FileNotFoundError if there is no prompt.json.
    """
    prompts = sorted(files.all_named("prompt.json"), key=lambda path: path.parent.name)
    if not prompts:
        files.require("prompt.json")
    for before, after in itertools.pairwise(prompts):
        if before.parent.name == after.parent.name:
            raise ValueError(f"{before.parent} and {after.parent} contain the same prompt; keep only one of these two "
                             "folders")
    for path in prompts:
        prompt = read_json(path, dict)
        caption, edit, edited = (one_line(part(prompt, key, str, str(path))) for key in ("input", "edit", "output"))
        samples, name = path.with_name("metadata.jsonl"), path.parent.name
        if not samples.exists():
            raise FileNotFoundError(f"{samples} does not exist: unpack the published archive of this folder again")
        for place, sample in read_lines(samples):
            seed = part(sample, "seed", int, place)
            yield PublishedPair(
                f"{name}_{seed}", "train", (f"{name}/{seed}_0.jpg", f"{name}/{seed}_1.jpg"), [], name,
                provenance={"edit": edit, "captions": [caption, edited], "seed": seed,
                            "similarity": {key: sample[key] for key in SIMILARITIES if key in sample}})
