from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from onediff.config import Config
from onediff.data.record import Record, write_shards
from onediff.data.synthesis.edits.records import edit_records
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.questions import PARAPHRASES
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.model.assemble import build
from onediff.model.captioner import Captioner
from onediff.stages.caption import caption

PRESET = Path("presets/micro.yaml").resolve()
TASK = 'tasks: {mine: {instruction: "Say it.", targets: drawn, max_new_tokens: null, num_beams: null}}'


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: Config) -> list[Record]:
    """Create a project with an untrained model, and test and gate pairs of four benchmarks. Captions are short."""
    monkeypatch.chdir(tmp_path)
    text = PRESET.read_text().replace("max_new_tokens: 40", "max_new_tokens: 3").replace("raw: [] ", "raw: [mine] ")
    Path("params.yaml").write_text(text.replace("tasks: {}", TASK).replace("num_paraphrased: 6", "num_paraphrased: 3"))
    made = [record for split in ("test", "gate") for record in (
        *scene_records(micro, split, 0), *scene_records(micro, split, 0, source="scenes_far"),
        *(pair for index in range(3) for pair in edit_records(micro, split, index)))]
    made += [Record(f"mine-{split}", "mine", split, split, made[0].before, made[1].after, ["a dog left"], "Own?",
                    "unlabelled", {}) for split in ("test", "gate")]
    for split in ("test", "gate"):
        write_shards([record for record in made if record.split == split], Path("data/diffcap"), split, shard_pairs=99)
    for part in build(micro.model, seed=7):
        part.save_pretrained("data/models/tune")
    return made


def lines_of(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of each file in a folder of captions, as {name of the benchmark: lines}."""
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(Path(f"data/captions/{folder}").glob("*.jsonl"))}


def test_every_benchmark_is_asked_one_question_and_generated_ones_also_their_own_and_ten_others(
        records: list[Record]) -> None:
    caption()
    for split in ("test", "gate"):
        pairs = [record for record in records if record.split == split]
        got = lines_of(split)
        assert {name: [line["pair_id"] for line in lines] for name, lines in got.items()} == {
            name: [pair.pair_id for pair in pairs if pair.source == name] for name in sorted({p.source for p in pairs})}
        asked = {name: {line["question"] for line in lines} for name, lines in got.items()}
        assert asked.pop("mine") == {"Say it."}  # The instruction of the source's task in params.yaml.
        assert all(questions == {DEFAULT_INSTRUCTION} for questions in asked.values())

    own = {line["pair_id"]: line["question"] for lines in lines_of("own_question").values() for line in lines}
    assert own == {pair.pair_id: pair.instruction for pair in records if pair.split == "test" and pair.source != "mine"}

    paraphrased = lines_of("paraphrases")
    assert set(paraphrased) == {"scenes", "scenes_far", "edits"}
    for lines in paraphrased.values():
        assert tuple(dict.fromkeys(line["question"] for line in lines)) == PARAPHRASES
        counts = Counter(line["pair_id"] for line in lines)
        assert 3 <= len(counts) <= 4 and set(counts.values()) == {len(PARAPHRASES)}
    last = paraphrased["edits"][-1]
    [pair] = [(open_image(record.before), open_image(record.after)) for record in records
              if record.pair_id == last["pair_id"]]
    captioner = Captioner.load(Path("data/models/tune"))
    assert captioner.caption([pair], instructions=[PARAPHRASES[-1]], max_new_tokens=3) == [last["prediction"]]
