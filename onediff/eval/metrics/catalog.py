"""Every figure of the score files, in the order in which tables show them. All lists of figures derive from this one.

Imports no numpy, so that commands and flows can read it at no cost.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure, whose least value is 0. `function`: computes it from tokenized captions, as "module:name"; metrics
    may share one. None: a figure of behaviour, which a grammar reads (onediff/eval/analysis/behaviour.py), or one that
    is no score of a model's captions.

    `label` and `counts`: the row of the report and what it counts. `headline`: summaries show it. `per_pair`:
    data/scored keeps its value for each pair, whose mean is the corpus score. `slow`: its Java program loads while the
    other metrics are computed. `optional`: computed only on request.
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
    Metric("SPICE", _COMPUTE + "spice_scores", slow=True, optional=True),  # needs a download of 384 MB
    Metric("change_found_rate", label="change found", counts="changed pairs for which a change is claimed"),
    Metric("change_type_accuracy", label="type right", counts="changed pairs", headline=True),
    Metric("changed_object_accuracy", label="object right", counts="changed pairs: color and shape", headline=True),
    Metric("change_accuracy", label="all right", counts="changed pairs: type, object and what became of it"),
    Metric("false_alarm_rate", label="false alarms", counts="unchanged pairs not recognised as unchanged",
           higher_is_better=False, headline=True),
    Metric("swap_consistency", label="swap consistency", headline=True,
           counts="pairs whose caption is undone when before and after are exchanged"),
    Metric("operation_accuracy", label="operation right", counts="all pairs", headline=True),
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
FIGURE_RANGES = {metric.name: (0.0, metric.high) for metric in CATALOG}  # wherever the name stands in a table
REQUIRED = ("num_pairs", "protocol", "references", *METRICS)  # keys that the table of every benchmark has
