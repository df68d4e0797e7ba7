"""Catalog of all figures in the score files, in the order in which tables show them.

All other lists of metrics in this project are derived from this catalog. The module does not import numpy, so that
commands and flows can import it quickly.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure in the score files. Its values lie between 0 and `high`.

    `function`: the function that computes the figure from tokenized captions, as "module:name"; some metrics share a
    function. It is None for a behaviour figure, which is computed by parsing captions
    (onediff/eval/analysis/behaviour.py), and for a figure that does not score the captions of a model.

    `label`: name of the figure in the report. `counts`: the pairs on which the figure is computed. `headline`: whether
    summaries show the figure. `per_pair`: whether data/scored contains the value of each pair; the corpus score is then
    the mean of these values. `slow`: whether the figure is computed last, because its Java program takes long to start.
    `optional`: whether the figure is computed only on request.
    """

    name: str
    function: str | None = None
    high: float = 1.0
    label: str = ""
    counts: str = ""
    higher_is_better: bool = True
    headline: bool = False
    per_pair: bool = False
    slow: bool = False
    optional: bool = False


_COMPUTE = "onediff.eval.metrics.compute:"
CATALOG = (
    Metric("BLEU-1", _COMPUTE + "bleu_scores"),
    Metric("BLEU-2", _COMPUTE + "bleu_scores"),
    Metric("BLEU-3", _COMPUTE + "bleu_scores"),
    Metric("BLEU-4", _COMPUTE + "bleu_scores", headline=True),
    Metric("METEOR", _COMPUTE + "meteor_scores", headline=True, slow=True),
    Metric("ROUGE-L", _COMPUTE + "rouge_scores", headline=True, per_pair=True),
    Metric("CIDEr", _COMPUTE + "cider_scores", high=10.0, headline=True, per_pair=True),
    Metric("SPICE", _COMPUTE + "spice_scores", slow=True, optional=True),  # SPICE needs a download of 384 MB.
    Metric("change_found_rate", label="change found", counts="changed pairs for which a change is claimed"),
    Metric("change_type_accuracy", label="type right", counts="changed pairs", headline=True),
    Metric("changed_object_accuracy", label="object right", counts="changed pairs: color and shape", headline=True),
    Metric("change_accuracy", label="all right", counts="changed pairs: type, object and result of the change"),
    Metric("no_change_accuracy", label="no change right", counts="unchanged pairs whose caption says that nothing "
           "changed"),
    Metric("false_alarm_rate", label="false alarms", counts="unchanged pairs whose caption claims a change",
           higher_is_better=False, headline=True),
    Metric("unreadable_rate", label="unreadable", counts="all pairs: captions that no grammar can read, which are "
           "right in no figure", higher_is_better=False),
    Metric("swap_consistency", label="swap consistency", headline=True,
           counts="pairs whose swapped pair (after, before) gets the inverse caption"),
    Metric("operation_accuracy", label="operation right", counts="all pairs", headline=True),
    Metric("swapped_accuracy", label="way back right", counts="swapped pairs of edits: the operation that leads back, "
           "with place, turn, tint and object"),
    Metric("pixel_difference_auc"),
    Metric("oracle_CIDEr", high=10.0),
)
METRICS = tuple(metric.name for metric in CATALOG if metric.function and not metric.optional)
OPTIONAL = tuple(metric.name for metric in CATALOG if metric.optional)
FAST_METRICS = tuple(metric.name for metric in CATALOG if metric.function and not metric.slow)
BEHAVIOUR = {metric.name: metric for metric in CATALOG if metric.label}
PAIR_METRICS = tuple(sorted(metric.name for metric in CATALOG if metric.per_pair))
CAPTION_HEADLINES = tuple(metric.name for metric in CATALOG if metric.headline and metric.function)
BEHAVIOUR_HEADLINES = tuple(metric.name for metric in CATALOG if metric.headline and metric.label)
HEADLINES = CAPTION_HEADLINES + BEHAVIOUR_HEADLINES
FIGURE_RANGES = {metric.name: (0.0, metric.high) for metric in CATALOG}  # lowest and highest possible value per figure
REQUIRED = ("num_pairs", "protocol", "references", *METRICS)  # keys that the score table of each benchmark must have
