"""Stage `instruct` asks the writer (a language model) for one edit instruction per image of a captioned collection."""

from onediff.config import load_params, load_runtime
from onediff.data.sources.collection import list_collection
from onediff.data.writer.answers import parse
from onediff.data.writer.asking import ask_for_stage
from onediff.data.writer.jobs import writer_of
from onediff.data.writer.request import edit_of_caption
from onediff.files import write_jsonl
from onediff.paths import INSTRUCTED, RAW
from onediff.stages.command import run


def instruct(source: str) -> None:
    """Write one edit instruction per image of a source to data/instructed/SOURCE.jsonl.

    SOURCE.set_aside.jsonl lists the images for which the language model gave no usable instruction. Raises ValueError
    if it gave none for all images.
    """
    config = load_params()
    writer = writer_of(source, config, "instruct")
    answers = ask_for_stage(source, config, load_runtime(), "instruct")
    rows, unusable = [], []
    for image in list_collection(RAW / source):
        answer = answers[edit_of_caption(image.name, writer, caption=image.caption).key]
        if answer.status == "ok":
            rows.append({"name": image.name, "caption": image.caption, **parse(answer.text, "edit")})
        else:
            unusable.append({"name": image.name, "reason": f"{answer.status}: {answer.reason}"})
    if not rows:
        raise ValueError(f"{source}: the writer (language model) gave no usable edit instruction for any image; the "
                         f"first image is {unusable[0]['name']}, and the reason is: {unusable[0]['reason']}")
    write_jsonl(INSTRUCTED / f"{source}.jsonl", rows)
    write_jsonl(INSTRUCTED / f"{source}.set_aside.jsonl", unusable)
    print(f"{INSTRUCTED}/{source}.jsonl: {len(rows):,} edits, {len(unusable):,} images set aside")


if __name__ == "__main__":
    run(instruct)
