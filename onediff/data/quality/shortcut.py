"""The shortcut check: whether plain pixel differences separate changed from unchanged pairs.

If they do, a model can detect changes without understanding the images, so good scores on these pairs prove little.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from onediff.data.record import Record
from onediff.inputs.images import open_image

GRID = 8
PERCENTILES = (5, 25, 50, 75, 90, 95, 99)


def difference_features(record: Record) -> NDArray[np.float64]:
    """Return a vector of features of |after - before|, the absolute pixel difference of a pair.

    The features are the mean of each color channel in each cell of a GRID x GRID grid, then the mean, the maximum, the
    standard deviation and percentiles of the difference over the complete image.
    """
    before = open_image(record.before)
    delta = np.abs(np.asarray(open_image(record.after).resize(before.size), dtype=np.float64) - np.asarray(before))
    rows = [part.mean(axis=0) for part in np.array_split(delta, GRID, axis=0)]
    cells = [part.mean(axis=0) for row in rows for part in np.array_split(row, GRID, axis=0)]
    overall = [delta.mean(), delta.max(), delta.std(), *np.percentile(delta, PERCENTILES)]
    return np.concatenate([*cells, np.array(overall)])


def pixel_difference_auc(train: Iterable[Record], test: Iterable[Record]) -> float | None:
    """Return how well pixel differences predict whether a pair is changed: the area under the ROC curve on `test`.

    Two classifiers are fitted on `train` (logistic regression and gradient boosting), and the larger area is returned;
    0.5 is chance. Return None unless `train` and `test` both contain changed and unchanged pairs.
    """
    from sklearn import ensemble, linear_model, metrics, pipeline, preprocessing

    x, y = _examples(train)
    x_test, y_test = _examples(test)
    if len(set(y)) < 2 or len(set(y_test)) < 2:
        return None
    models = [pipeline.make_pipeline(preprocessing.StandardScaler(),
                                     linear_model.LogisticRegression(C=0.1, max_iter=2000)),
              ensemble.HistGradientBoostingClassifier(learning_rate=0.05, max_iter=100, random_state=0)]
    return max(float(metrics.roc_auc_score(y_test, model.fit(x, y).predict_proba(x_test)[:, 1])) for model in models)


def _examples(records: Iterable[Record]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    examples = [(difference_features(record), record.change_type != "none") for record in records]
    return np.array([features for features, _ in examples]), np.array([changed for _, changed in examples])
