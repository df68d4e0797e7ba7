"""The catalog of published sources: description, licence, origin, reader and official counts of each.

To add a source, write onediff/data/sources/readers/<source>.py with `read(files) -> Iterator[PublishedPair]`, and add
an entry to CATALOG that refers to it. A benchmark with published scores also needs a protocol in
onediff/eval/protocols.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from onediff.data.sources.published import Files, PublishedPair
from onediff.data.sources.readers import (
    birds_to_words,
    clevr_change,
    folder,
    image_editing_request,
    instruct_pix2pix,
    llava,
    spot_the_diff,
)

_SPOT = ("https://raw.githubusercontent.com/harsh19/spot-the-diff/f5c68a7128754c7a9d919fd4a8ae226331c8595f/"
         "data/annotations/")
_BIRDS = "https://github.com/google-research-datasets/birds-to-words/raw/master/birds-to-words-v1.0.tsv"
_LLAVA = "https://huggingface.co/datasets/liuhaotian/"
_VG = "https://cs.stanford.edu/people/rak248/VG_100K_2/"


@dataclass(frozen=True)
class CatalogEntry:
    """The facts about one published source.

    `addresses` maps the path of each file below data/raw/<source> to its download address. `manual` describes the files
    that users must download by hand. `annotations` lists the annotation files, without which no pair can be read.
    `expected` holds the published counts (records, pairs, references) of each split. `read` is the function that reads
    the pairs; the default function reads pairs.csv or pairs.jsonl.
    """

    what: str
    licence: str
    home: str
    size: str
    annotations: tuple[str, ...]
    manual: str
    addresses: dict[str, str] = field(default_factory=dict)
    expected: dict[str, dict[str, int]] = field(default_factory=dict)
    read: Callable[[Files], Iterator[PublishedPair]] = folder.read


CATALOG = {
    "spot_the_diff": CatalogEntry(
        read=spot_the_diff.read,
        what="12,562 annotations of 11,329 pairs of surveillance frames, benchmark",
        licence="none stated", home="https://github.com/harsh19/spot-the-diff", size="not stated",
        annotations=("train.json", "val.json", "test.json"),
        manual="the images <img_id>.png and <img_id>_2.png, as archive or unpacked (resized_images on Google Drive, "
               "linked in data/get_images.txt of the home page)",
        addresses={f"{split}.json": f"{_SPOT}{split}.json" for split in spot_the_diff.ANNOTATIONS},
        expected={"train": {"records": 9524, "pairs": 8566, "references": 17676},
                  "val": {"records": 1634, "pairs": 1493, "references": 3310},
                  "test": {"records": 1404, "pairs": 1270, "references": 2107}}),
    "image_editing_request": CatalogEntry(
        read=image_editing_request.read,
        what="3,939 requests to edit a photograph with the result, benchmark",
        licence="none stated", home="https://github.com/airsplay/VisualRelationships", size="not stated",
        annotations=("train.json", "valid.json", "test.json"),
        manual="train.json, valid.json and test.json from the folder data/ of the home page, and the images from "
               "Google Drive (linked on the home page), as archive or unpacked",
        expected={"train": {"records": 3061, "pairs": 2507}, "val": {"records": 383, "pairs": 357},
                  "test": {"records": 495, "pairs": 446}}),
    "birds_to_words": CatalogEntry(
        read=birds_to_words.read,
        what="pairs of bird photographs with up to five paragraphs each, benchmark",
        licence="texts: see the home page; photographs: each photographer's own (iNaturalist)",
        home="https://github.com/google-research-datasets/birds-to-words", size="not stated",
        annotations=(birds_to_words.ANNOTATIONS,),
        manual="the photographs at the addresses in the columns img1ImgURL and img2ImgURL, each as <number in its "
               "address>.jpg; many no longer exist on the web, so add birds_to_words to data.partial",
        addresses={birds_to_words.ANNOTATIONS: _BIRDS}),
    "clevr_change": CatalogEntry(
        read=clevr_change.read,
        what="39,803 rendered scenes, each with a change and with another view only, benchmark",
        licence="none stated", home="https://github.com/Seth-Park/RobustChangeCaptioning", size="not stated",
        annotations=clevr_change.ANNOTATIONS,
        manual="clevr_change.tar.gz from Google Drive (linked on the home page), as archive or unpacked",
        expected={"train": {"records": 33830, "pairs": 67660}, "val": {"records": 1988, "pairs": 3976},
                  "test": {"records": 3985, "pairs": 7970}}),
    "instruct_pix2pix": CatalogEntry(
        read=instruct_pix2pix.read,
        what="313,010 edits made by InstructPix2Pix's authors (clip-filtered), without captions of differences",
        licence="see the home page (code: MIT; images made with Stable Diffusion: CreativeML Open RAIL-M)",
        home="https://github.com/timothybrooks/instruct-pix2pix", size="436 GB",
        annotations=("prompt.json",),
        manual="the shards, as archives or unpacked: wget -A zip,json -r -nd -P data/raw/instruct_pix2pix "
               "http://instruct-pix2pix.eecs.berkeley.edu/clip-filtered-dataset; the writer creates the captions, so "
               "add instruct_pix2pix to data.written too",
        expected={"train": {"records": 313010, "pairs": 313010}}),
    "llava_558k": CatalogEntry(
        read=llava.read_558k,
        what="558,128 single images with a caption, for phase align",
        licence="of CC-3M, LAION, SBU and BLIP (see the home page)", size="27 GB",
        home="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
        annotations=(llava.CAPTIONS,), manual="",
        addresses={llava.CAPTIONS: f"{_LLAVA}LLaVA-Pretrain/resolve/main/{llava.CAPTIONS}",
                   "images.zip": f"{_LLAVA}LLaVA-Pretrain/resolve/main/images.zip"},
        expected={"train": {"records": 558128}}),
    "llava_665k": CatalogEntry(
        read=llava.read_665k,
        what="665,298 conversations about one image or none, the general part of phase tune",
        licence="texts: CC BY 4.0 and OpenAI's terms; images: those of COCO, GQA, OCR-VQA, TextVQA and Visual Genome",
        home="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K", size="1 GB of text, 65 GB of images",
        annotations=(llava.CONVERSATIONS,),
        manual="OCR-VQA's images as ocr_vqa/images/*.jpg (see https://github.com/haotian-liu/LLaVA, README, 'Visual "
               "Instruction Tuning')",
        addresses={llava.CONVERSATIONS: f"{_LLAVA}LLaVA-Instruct-150K/resolve/main/{llava.CONVERSATIONS}",
                   "coco/train2017.zip": "http://images.cocodataset.org/zips/train2017.zip",
                   "gqa/images.zip": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
                   "textvqa/train_val_images.zip": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
                   "vg/images.zip": f"{_VG}images.zip", "vg/images2.zip": f"{_VG}images2.zip"},
        expected={"train": {"records": 665298}}),
}
