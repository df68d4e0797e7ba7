"""Compares the captioning speed of OneDiff with LLaVA of transformers, which reads both images; one table.

    python -m benchmarks.captioning                                    # tiny, 32 pairs a batch, 30 new tokens each
    python -m benchmarks.captioning --preset small --batch 8
    python -m benchmarks.captioning --preset paper --device cuda       # sizes of the paper, in bfloat16; never run

OneDiff runs `Captioner.caption`, like the stage `caption`. The peer runs `LlavaForConditionalGeneration.generate` with
SDPA. Both start from images in memory, use equal image processors, and generate exactly 30 tokens per pair with greedy
search. LLaVA reads all patches of both images. The contender "all patches" (patch_pool 1) reads all patches too, and in
addition the delta tokens. On a CPU the contenders take turns, one batch at a time (benchmarks/turns.py); on a GPU they
run one after the other. Weights are random, because they do not influence the speed.
"""

from collections.abc import Callable
from itertools import islice
from statistics import median
from typing import Annotated, Any

import torch
from PIL import Image
from rich.table import Table
from typer import Option

from benchmarks import models, rows, script, turns
from benchmarks.turns import Contender, Turn
from onediff.data.record import read_records
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION, pair_prompt
from onediff.model.captioner import Captioner

Pairs = list[tuple[Image.Image, Image.Image]]
NEW_TOKENS = 30
KINDS: dict[str, dict[str, Any]] = {
    "LLaVA, generate": {"peer": True},
    "OneDiff, all patches": {"model": models.ALL_PATCHES},
    "OneDiff, as preset": {"model": {}},
}
BATCH = {"tiny": 32, "small": 8, "paper": 32}


def main(preset: Annotated[str, Option(help=f"One of {', '.join(models.PRESETS)}.")] = "tiny",
         batch: Annotated[int | None, Option(help="Pairs per batch.")] = None, rounds: int = 5,
         units: Annotated[int, Option(help="Batches of each contender per round.")] = 2, device: str = "cpu",
         threads: int = 1) -> None:
    """Measure the captioning speed of OneDiff and of LLaVA."""
    models.settings(preset)
    shared = {"preset": preset, "batch": batch or BATCH[preset], "device": device, "threads": threads, "units": units}
    contenders = [Contender(kind, "benchmarks.captioning", shared | case) for kind, case in KINDS.items()]
    turns.race(contenders, rounds=rounds, units=units, threads=threads, together=device == "cpu")
    table = Table("contender", "pairs/s", "new tokens/s", "peak GiB", "times the peer",
                  title=f"{preset}, {shared['batch']} pairs, {NEW_TOKENS} new tokens each, {device}, {threads} threads")
    for contender in contenders:
        pairs_per_s = contender.facts["rows"] / median(contender.rounds)
        table.add_row(contender.name, f"{pairs_per_s:.2f}", f"{NEW_TOKENS * pairs_per_s:.0f}",
                      f"{contender.facts['memory_gib']:.2f}", "1" if contender is contenders[0] else
                      turns.with_range(turns.ratios(contender, contenders[0])))
    script.show(table)


def contender(case: dict[str, Any], turn: Turn) -> None:
    """Caption one batch of pairs in each turn. This function runs in the process of one contender."""
    if case["device"] == "cpu":
        torch.set_num_threads(case["threads"])
    turn.facts["rows"] = case["batch"] * case["units"]
    caption = (llava if case.get("peer") else onediff)(case)
    records = (record for record in read_records(rows.shards_of(models.settings(case["preset"])), "train-*.parquet")
               if record.num_images == 2)
    pairs = [(open_image(record.before), open_image(record.after)) for record in islice(records, case["batch"])]
    while True:
        assert len(caption(pairs)) == len(pairs), "every pair must get a caption"
        turn()


def onediff(case: dict[str, Any]) -> Callable[[Pairs], list[str]]:
    """Return a function that captions pairs with OneDiff."""
    model, processor = models.onediff(models.settings(case["preset"], **case["model"]), case["device"])
    model.language.generation_config.min_new_tokens = NEW_TOKENS
    captioner = Captioner(model, processor)
    return lambda pairs: captioner.caption(pairs, max_new_tokens=NEW_TOKENS)


def llava(case: dict[str, Any]) -> Callable[[Pairs], list[str]]:
    """Return a function that captions pairs with LLaVA of transformers."""
    config = models.settings(case["preset"])
    model, processor = models.llava(config, case["device"])
    tokenizer = processor.tokenizer
    prompt = pair_prompt(config.model.template, DEFAULT_INSTRUCTION)
    model.eval()

    @torch.inference_mode()
    def caption(pairs: Pairs) -> list[str]:
        batch = processor.questions([prompt] * len(pairs))
        del batch["image_counts"]
        batch["pixel_values"] = processor.pixels([image for pair in pairs for image in pair]).to(model.dtype)
        ids = model.generate(**{name: value.to(model.device) for name, value in batch.items()}, do_sample=False,
                             max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id,
                             eos_token_id=tokenizer.eos_token_id)
        return list(tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))

    return caption


if __name__ == "__main__":
    turns.run_script(main, contender)
