"""What a model has to beat: the majority, and TF-IDF with logistic regression, fitted on the same training split."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from pipeline.tasks.visobert.reviews.sentiments import NOT_MENTIONED, SENTIMENTS, UNKNOWN, Labels, labelled
from pipeline.tasks.visobert.scoring.predictions import Prediction
from pipeline.tasks.visobert.scoring.scores import tuned_thresholds

INVERSE_REGULARISATION = 4.0
FEW_REVIEWS = 50  # so few that what occurs once counts too
WORD = r"\w+|[^\w\s]"


def majority(training: Labels, rows: int) -> Prediction:
    """Every aspect's most frequent sentiment; mentioned where more than half of the training reviews mention it."""
    counts = np.stack([(training == sentiment).sum(0) for sentiment in range(len(SENTIMENTS))])  # [3, A]
    mentioned = (training > NOT_MENTIONED).sum(0) * 2 > (training != UNKNOWN).sum(0)
    return Prediction(np.tile(counts.argmax(0).astype(np.int8), (rows, 1)), np.tile(mentioned, (rows, 1)))


class TfidfBaseline:
    """Logistic regression an aspect on TF-IDF of words, pairs of words and letters in words.

    One tells whether the aspect is mentioned, with a threshold tuned on the validation split like the model's own; one
    against the rest a sentiment tells which, from the labelled cells.
    """

    def __init__(self, texts: Sequence[str], labels: Labels, validation: tuple[Sequence[str], Labels]) -> None:
        """Fit on the features that there are.

        Raises:
            ValueError: there are none.
        """
        twice, thrice = (2, 3) if len(texts) > FEW_REVIEWS else (1, 1)
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=twice, token_pattern=WORD)
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=thrice)
        self.features, parts = list[TfidfVectorizer](), []
        for features in (words, letters):
            with suppress(ValueError):  # it has none: where words are not separated, hardly one comes twice
                parts.append(features.fit_transform(texts))
                self.features.append(features)
        if not parts:
            raise ValueError(f"no word is in {twice} of the training reviews, and no letters are in {thrice}")
        matrix = csr_matrix(hstack(parts))
        columns = range(labels.shape[1])
        self.detectors = [_fit(matrix, labels[:, column] > NOT_MENTIONED, labels[:, column] != UNKNOWN)
                          for column in columns]  # fmt: skip
        self.sentiments = [_fit(matrix, labels[:, column], labelled(labels[:, column])) for column in columns]
        self.thresholds = tuned_thresholds(validation[1], self._mentioned(self._matrix(validation[0])))

    def predict(self, texts: Sequence[str]) -> Prediction:
        matrix = self._matrix(texts)
        sentiment = np.stack([predict(matrix).argmax(1) for predict in self.sentiments], 1)
        return Prediction(sentiment.astype(np.int8), self._mentioned(matrix) >= self.thresholds)

    def _matrix(self, texts: Sequence[str]) -> csr_matrix:
        return csr_matrix(hstack([features.transform(texts) for features in self.features]))

    def _mentioned(self, matrix: csr_matrix) -> npt.NDArray[np.float64]:
        return np.stack([predict(matrix)[:, 1] for predict in self.detectors], 1)


def _fit(
    matrix: csr_matrix, target: npt.NDArray[np.generic], rows: npt.NDArray[np.bool_]
) -> Callable[[csr_matrix], npt.NDArray[np.float64]]:
    """A function from features to a column a class, at the class's own index (0 and 1 for a yes or no)."""
    classes = np.unique(target[rows]).astype(np.int64)
    width = 2 if target.dtype == np.bool_ else len(SENTIMENTS)
    if len(classes) < 2:  # nothing to tell apart
        constant = np.zeros(width)
        constant[classes] = 1
        return lambda other: np.tile(constant, (other.shape[0], 1))
    model = LogisticRegression(C=INVERSE_REGULARISATION, solver="liblinear", random_state=0)
    if len(classes) > 2:
        model = OneVsRestClassifier(model)  # liblinear tells two apart
    model.fit(matrix[rows], target[rows])

    def predict(other: csr_matrix) -> npt.NDArray[np.float64]:
        columns = np.zeros((other.shape[0], width))
        columns[:, classes] = model.predict_proba(other)
        return columns

    return predict
