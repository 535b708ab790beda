"""Estimators of scikit-learn that a script defines: in pipelines, in searches, through a Pool and through joblib."""

import sys

import joblib
import numpy
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted

sys.path.insert(0, sys.argv[-1])
from peer import case, expect, gives, main, program  # noqa: E402

X, Y = load_iris(return_X_y=True)
FLOOR = 1e-9


class Scaler(TransformerMixin, BaseEstimator):
    def __init__(self, power=1.0, shift=True):
        self.power, self.shift = power, shift

    def fit(self, X, y=None):
        self.mean_ = X.mean(axis=0) if self.shift else numpy.zeros(X.shape[1])
        self.scale_ = numpy.maximum(X.std(axis=0), FLOOR) ** self.power
        return self

    def transform(self, X):
        check_is_fitted(self)
        return (X - self.mean_) / self.scale_


class Nearest(ClassifierMixin, BaseEstimator):
    _parameter_constraints = {"order": [int]}

    def __init__(self, order=2):
        self.order = order

    def fit(self, X, y):
        self.classes_ = numpy.unique(y)
        self.centres_ = numpy.array([X[y == c].mean(axis=0) for c in self.classes_])
        return self

    def predict(self, X):
        distances = [numpy.linalg.norm(X - centre, self.order, axis=1) for centre in self.centres_]
        return self.classes_[numpy.argmin(distances, axis=0)]


def first_two(X):
    return X[:, :2]


def accuracy(y, predicted):
    return float((y == predicted).mean())


def pipeline():
    return Pipeline([("scale", Scaler()), ("near", Nearest())])


FITTED = pipeline().fit(X, Y)


@case("an unfitted estimator is fitted there", [Scaler(0.5)],
      lambda r: type(r) is Scaler and r.power == 0.5 and numpy.allclose(r.mean_, X.mean(axis=0)))
def fitted(scaler):
    assert clone(scaler).get_params() == {"power": 0.5, "shift": True}
    return scaler.fit(X)


@gives("a pipeline that was fitted here", 3, [0, 0, 0])
def predicted(n):
    return [int(each) for each in FITTED.predict(X[:n])]


@gives("a pipeline as the argument", FITTED, (True, True))
def scored(model):
    return model.score(X, Y) > 0.8, type(model["near"]) is Nearest


case("a method of an estimator", [X[:2]], lambda r: r.shape == (2, 4))(Scaler().fit(X).transform)


@gives("made in the worker, with the script's functions", 1, (True, True))
def made(_):
    model = make_pipeline(FunctionTransformer(first_two), Scaler(), LogisticRegression())
    score = cross_val_score(model, X, Y, cv=3, scoring=make_scorer(accuracy))
    return score.mean() > 0.7, type(clone(model)[1]) is Scaler


@gives("repr and tags", Scaler(power=2), ("Scaler(power=2)", True))
def shown(scaler):
    return repr(scaler), Nearest().__sklearn_tags__().estimator_type == "classifier"


def search():
    grid = {"scale__power": [0.5, 1.0], "near__order": [1, 2]}
    found = GridSearchCV(pipeline(), grid, cv=3, scoring=make_scorer(accuracy)).fit(X, Y)
    return found.best_params_, found.cv_results_["mean_test_score"].tolist(), type(found.best_estimator_["scale"])


NO_CLUSTER = "joblib's backend needs a cluster"


@program("a search through joblib's backend is that of one process", fork=NO_CLUSTER, payload=NO_CLUSTER)
def searched(peer):
    from achilles import register_joblib_backend
    register_joblib_backend()
    right = search()
    with joblib.parallel_config(backend="achilles", n_jobs=2):
        expect(search(), right)
        expect(cross_val_score(FITTED, X, Y, cv=3).tolist(), cross_val_score(FITTED, X, Y, cv=3, n_jobs=1).tolist())


@program("candidates of a search by hand, in several calls")
def candidates(peer):
    right = [candidate((power, order)) for power in (0.5, 1.0) for order in (1, 2)]
    for _ in range(2):
        expect(peer.map(candidate, [(power, order) for power in (0.5, 1.0) for order in (1, 2)]), right)
    results = peer.map(fitted, [Scaler(0.5)] * 2)
    assert [type(each) for each in results] == [Scaler] * 2, results


def candidate(parameters):
    power, order = parameters
    return pipeline().set_params(scale__power=power, near__order=order).fit(X[::2], Y[::2]).score(X[1::2], Y[1::2])


main()
