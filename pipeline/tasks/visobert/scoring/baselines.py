"""Baselines on the same splits: majority, and TF-IDF with logistic regression."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from pipeline.maths.arrays import Flags, Floats
from pipeline.runtime.console import optional
from pipeline.tasks.visobert.reviews.sentiments import NOT_MENTIONED, SENTIMENTS, UNKNOWN, Labels, labelled
from pipeline.tasks.visobert.reviews.splits import Splits
from pipeline.tasks.visobert.scoring.predictions import PredictedLabels
from pipeline.tasks.visobert.scoring.scores import score, tuned_thresholds

BASELINES = ("majority", "tfidf")
BASELINE_METRICS = ("aspect_f1_macro", "sentiment_f1_macro", "pair_f1_micro", "pair_f1_macro")

INVERSE_REGULARISATION = 4.0
FEW_REVIEWS = 50  # with at most this many training reviews, terms that occur only once are used too
WORD = r"\w+|[^\w\s]"


class Baselines:
    """Scores of the baselines on the splits of a run, computed on first use."""

    def __init__(self, reviews: Splits) -> None:
        self.reviews = reviews
        self.scores = cache(self._scores)

    def _scores(self, split: str) -> dict[str, float]:
        """BASELINE_METRICS of each baseline, named `<metric>_<baseline>`."""
        reviews = self.reviews.by_name[split]
        predictions = {"majority": majority(self.reviews.train.labels, len(reviews))}
        if self._tfidf:
            predictions["tfidf"] = self._tfidf.predict(reviews.texts)
        metrics: dict[str, float] = {}
        for name, predicted in predictions.items():
            scores = score(reviews.labels, predicted, reviews.aspects, self.reviews.polar)
            metrics |= {f"{metric}_{name}": scores[metric] for metric in BASELINE_METRICS if metric in scores}
        return metrics

    @cached_property
    def _tfidf(self) -> "TfidfBaseline | None":
        train, valid = self.reviews.train, self.reviews.valid
        with optional("the TF-IDF baseline"):
            return TfidfBaseline(train.texts, train.labels, (valid.texts, valid.labels))
        return None


def majority(training: Labels, rows: int) -> PredictedLabels:
    """Predict each aspect's most frequent sentiment, and a mention if over half of the training reviews have one."""
    counts = np.stack([(training == sentiment).sum(0) for sentiment in range(len(SENTIMENTS))])  # [3, A]
    mentioned = (training > NOT_MENTIONED).sum(0) * 2 > (training != UNKNOWN).sum(0)
    return PredictedLabels(np.tile(counts.argmax(0).astype(np.int8), (rows, 1)), np.tile(mentioned, (rows, 1)))


class TfidfBaseline:
    """Logistic regressions on TF-IDF features of words, word pairs and character n-grams.

    For each aspect, one regression predicts whether it is mentioned, with a threshold tuned on the validation split as
    for the model. Sentiments are predicted by one-vs-rest regressions, fitted on the labelled cells.
    """

    def __init__(self, texts: Sequence[str], labels: Labels, validation: tuple[Sequence[str], Labels]) -> None:
        """Fit on the training reviews.

        Raises:
            ValueError: no term is frequent enough.
        """
        min_words, min_letters = (2, 3) if len(texts) > FEW_REVIEWS else (1, 1)
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=min_words, token_pattern=WORD)
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=min_letters)
        self.vectorizers, matrices = list[TfidfVectorizer](), []
        for vectorizer in (words, letters):
            with suppress(ValueError):  # no term left: if words are not separated, few occur twice
                matrices.append(vectorizer.fit_transform(texts))
                self.vectorizers.append(vectorizer)
        if not matrices:
            raise ValueError(f"no word is in {min_words} of the training reviews, and no letters are in {min_letters}")
        matrix = csr_matrix(hstack(matrices))
        self.detectors = [_fit(matrix, column > NOT_MENTIONED, column != UNKNOWN) for column in labels.T]
        self.sentiments = [_fit(matrix, column, labelled(column)) for column in labels.T]
        self.thresholds = tuned_thresholds(validation[1], self._mentioned(self._matrix(validation[0])))

    def predict(self, texts: Sequence[str]) -> PredictedLabels:
        matrix = self._matrix(texts)
        sentiment = np.stack([predict(matrix).argmax(1) for predict in self.sentiments], 1)
        return PredictedLabels(sentiment.astype(np.int8), self._mentioned(matrix) >= self.thresholds)

    def _matrix(self, texts: Sequence[str]) -> csr_matrix:
        return csr_matrix(hstack([vectorizer.transform(texts) for vectorizer in self.vectorizers]))

    def _mentioned(self, matrix: csr_matrix) -> Floats:
        return np.stack([predict(matrix)[:, 1] for predict in self.detectors], 1)


def _fit(matrix: csr_matrix, target: npt.NDArray[np.generic], rows: Flags) -> Callable[[csr_matrix], Floats]:
    """Fit a classifier on some rows; returns a function from features to probabilities, with one column per class."""
    classes = np.unique(target[rows]).astype(np.int64)
    width = 2 if target.dtype == np.bool_ else len(SENTIMENTS)
    if len(classes) < 2:  # only one class: nothing to fit
        constant = np.zeros(width)
        constant[classes] = 1
        return lambda features: np.tile(constant, (features.shape[0], 1))
    model = LogisticRegression(C=INVERSE_REGULARISATION, solver="liblinear", random_state=0)
    if len(classes) > 2:
        model = OneVsRestClassifier(model)  # liblinear is binary
    model.fit(matrix[rows], target[rows])

    def predict(features: csr_matrix) -> Floats:
        columns = np.zeros((features.shape[0], width))
        columns[:, classes] = model.predict_proba(features)
        return columns

    return predict
