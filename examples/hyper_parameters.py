"""Search the best parameters of a classifier on a cluster: scikit-learn, through joblib.

On a cluster of its own, which lives as long as the script does::

    python -m achilles.local examples/hyper_parameters.py

On one that runs already, with its configuration on this machine::

    python examples/hyper_parameters.py

The caller and the nodes need scikit-learn (`pip install scikit-learn`). The script looks for the parameters with
which a support vector machine reads handwritten digits best. It tries twelve combinations of two parameters. Each is
fitted five times, and scored on the fifth of the digits that was left out. These 60 fits run on the cluster. The
script prints the three best combinations, and the score of the first on digits that no fit has seen::

    0.993  C=10 gamma=0.0003
    0.992  C=10 gamma=0.001
    0.992  C=100 gamma=0.001
    0.991  C=10 gamma=0.0003 on new digits

Nothing here is random. So the script prints the same on any number of nodes.
"""

import joblib
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.svm import SVC

from achilles import register_joblib_backend

PARAMETERS = {"C": [1, 10, 100], "gamma": [0.0001, 0.0003, 0.001, 0.003]}


def show(score, parameters, note=""):
    """Print a line of the result."""
    print(f"{score:.3f}  C={parameters['C']} gamma={parameters['gamma']}{note}")


def main():
    """Search and print."""
    images, digits = load_digits(return_X_y=True)
    images, new_images, digits, new_digits = train_test_split(images, digits, random_state=0)
    search = GridSearchCV(SVC(), PARAMETERS, cv=5)

    register_joblib_backend()
    with joblib.parallel_config(backend="achilles"):  # the only difference to a search on one machine
        search.fit(images, digits)

    tried = zip(search.cv_results_["mean_test_score"], search.cv_results_["params"])
    for score, parameters in sorted(tried, key=lambda each: -each[0])[:3]:
        show(score, parameters)
    show(search.score(new_images, new_digits), search.best_params_, " on new digits")


if __name__ == "__main__":
    main()
