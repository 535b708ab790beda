"""What people run on a Pool, an Executor or joblib, each on a cluster and on one core, with the same result.

Run by `tox -e ecosystem`; a package that is not installed is skipped.
"""

from __future__ import annotations

import random

import pytest
from pages import block, table

from achilles import Executor, LocalCluster, Pool, register_joblib_backend

pytestmark = pytest.mark.filterwarnings("default")  # what other packages warn of is theirs


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(nodes=1, cpu_count=2) as made:
        yield made


@pytest.fixture(scope="module")
def where(cluster):
    return {"host": cluster.host, "port": cluster.port, "username": cluster.username, "secret_key": cluster.secret_key}


@pytest.fixture(scope="module")
def pool(where):
    with Pool(**where) as made:
        yield made


def test_each_line_of_the_page_works_as_written(pool, where):
    rows = table("docs/dropin.md", "Packages that take a Pool or an Executor", "package")
    lines, numpy = {package: line.strip("`") for package, _, line in rows}, pytest.importorskip("numpy")
    assert lines.keys() == {"scipy", "emcee", "dynesty", "DEAP", "adaptive", "tqdm"}
    scipy, emcee = pytest.importorskip("scipy.optimize"), pytest.importorskip("emcee")
    dynesty, adaptive = pytest.importorskip("dynesty"), pytest.importorskip("adaptive")
    toolbox, tqdm = pytest.importorskip("deap.base").Toolbox(), pytest.importorskip("tqdm").tqdm

    def minus(x):
        return -0.5 * (x ** 2).sum()

    names = {"pool": pool, "differential_evolution": scipy.differential_evolution, "f": scipy.rosen}
    assert eval(lines["scipy"], names | {"bounds": [(0, 2)] * 2}).fun < 0.01
    sampler = eval(lines["emcee"], vars(emcee) | names | {"n": 8, "d": 2, "log_prob": minus})
    assert numpy.isfinite(sampler.run_mcmc(numpy.random.default_rng(1).normal(size=(8, 2)), 5).log_prob).all()
    sampler = eval(lines["dynesty"], vars(dynesty) | names | {"like": minus, "prior": lambda u: 4 * u - 2, "d": 2})
    sampler.run_nested(maxiter=50, print_progress=False)
    assert len(sampler.results.logl) > 50
    eval(lines["DEAP"], names | {"toolbox": toolbox})
    assert toolbox.map(abs, [-1, 2]) == [1, 2]
    learner = adaptive.Learner1D(lambda x: x * x, bounds=(-1, 1))
    with Executor(**where) as executor:
        eval(lines["adaptive"], vars(adaptive) | {
            "learner": learner, "executor": executor, "goal": lambda learner: learner.npoints >= 10})
    assert all(y == x * x for x, y in learner.data.items()) and learner.npoints >= 10
    assert list(eval(lines["tqdm"], names | {"tqdm": tqdm, "f": abs, "args": [-1, 2], "n": 2})) == [1, 2]


def test_the_pages_lines_for_joblib_work_as_written(where, monkeypatch):
    pytest.importorskip("joblib")
    search = pytest.importorskip("sklearn.model_selection").GridSearchCV
    from sklearn.datasets import load_iris
    from sklearn.tree import DecisionTreeClassifier

    code = block("docs/dropin.md", "python", "parallel_config")
    for name in ("host", "port", "username"):
        monkeypatch.setenv(f"ACHILLES_{name.upper()}", str(where[name]))
    monkeypatch.setenv("ACHILLES_SECRET_KEY", where["secret_key"].reveal())
    X, y = load_iris(return_X_y=True)
    search = search(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2]})
    exec(code, {"search": search, "X": X, "y": y})
    assert search.best_params_ == {"max_depth": 2}


def test_a_seed_is_numpys_too(pool):
    numpy = pytest.importorskip("numpy")

    def draw(_):
        return float(numpy.random.random())

    first = pool.map(draw, range(20), 1, seed=3)
    assert first == pool.map(draw, range(20), 7, seed=3) and len(set(first)) == 20


def test_scipy_differential_evolution(pool):
    optimize = pytest.importorskip("scipy.optimize")
    found = [
        optimize.differential_evolution(
            optimize.rosen, [(-2, 2)] * 3, maxiter=15, popsize=5, rng=7, updating="deferred", workers=workers)
        for workers in (1, pool.map)
    ]
    assert found[0].x.tolist() == found[1].x.tolist() and found[0].nfev == found[1].nfev > 100


def test_scipy_brute(pool):
    optimize = pytest.importorskip("scipy.optimize")

    def bowl(x, shift):
        return ((x - shift) ** 2).sum()

    found = [
        optimize.brute(bowl, [(-2, 2)] * 2, args=(0.3,), Ns=9, full_output=True, workers=workers)
        for workers in (1, pool.map)
    ]
    assert found[0][0].tolist() == found[1][0].tolist() and (found[0][3] == found[1][3]).all()


def test_emcee(pool):
    emcee, numpy = pytest.importorskip("emcee"), pytest.importorskip("numpy")
    data = numpy.random.default_rng(1).normal(3, 1, 10_000)

    def log_prob(theta):
        return -0.5 * ((data - theta[0]) ** 2).sum() / len(data) - 0.5 * (theta[1:] ** 2).sum()

    chains = []
    for each in (None, pool):
        numpy.random.seed(5)
        sampler = emcee.EnsembleSampler(8, 3, log_prob, pool=each)
        sampler.run_mcmc(numpy.random.default_rng(2).normal(size=(8, 3)), 10)
        chains.append(sampler.get_chain())
    assert (chains[0] == chains[1]).all() and chains[0].std() > 0


def test_dynesty(pool):
    dynesty, numpy = pytest.importorskip("dynesty"), pytest.importorskip("numpy")

    def log_likelihood(x):
        return -0.5 * (x ** 2).sum()

    def prior(u):
        return 10 * u - 5

    evidence = []
    for each in ({"pool": pool, "queue_size": 2}, {"pool": _Serial(), "queue_size": 2}):
        sampler = dynesty.NestedSampler(
            log_likelihood, prior, 2, nlive=50, rstate=numpy.random.default_rng(3), **each)
        sampler.run_nested(maxiter=150, print_progress=False)
        evidence.append(sampler.results.logz[-1])
    assert evidence[0] == evidence[1]


class _Serial:
    """A pool of this one process."""

    size = 2

    def map(self, func, args):
        return [*map(func, args)]


def test_deap(pool):
    base = pytest.importorskip("deap.base")
    from deap import algorithms, creator, tools

    creator.create("FitnessMax", base.Fitness, weights=(1.0,))
    creator.create("Individual", list, fitness=creator.FitnessMax)

    def evaluate(individual):
        assert type(individual).__name__ == "Individual" and not individual.fitness.valid
        return (sum(individual),)

    best = []
    for each in (map, pool.map):
        random.seed(11)
        toolbox = base.Toolbox()
        toolbox.register("bit", random.randint, 0, 1)
        toolbox.register("individual", tools.initRepeat, creator.Individual, toolbox.bit, 30)
        toolbox.register("population", tools.initRepeat, list, toolbox.individual)
        toolbox.register("evaluate", evaluate)
        toolbox.register("mate", tools.cxTwoPoint)
        toolbox.register("mutate", tools.mutFlipBit, indpb=0.05)
        toolbox.register("select", tools.selTournament, tournsize=3)
        toolbox.register("map", each)
        population, _ = algorithms.eaSimple(toolbox.population(n=30), toolbox, 0.5, 0.2, 8, verbose=False)
        best.append([*population])
    assert best[0] == best[1] and max(map(sum, best[0])) > 20


def test_adaptive(where):
    adaptive = pytest.importorskip("adaptive")

    def peak(x, width=0.01):
        return x + width ** 2 / (width ** 2 + x ** 2)

    learners = []
    for executor in (None, Executor(**where)):
        learner = adaptive.Learner1D(peak, bounds=(-1, 1))
        if executor is None:
            adaptive.runner.simple(learner, npoints_goal=30)
        else:
            with executor:
                adaptive.BlockingRunner(learner, npoints_goal=30, executor=executor, ntasks=1, shutdown_executor=False)
        learners.append(learner)
    assert learners[0].data == learners[1].data and len(learners[0].data) >= 30


def test_scikit_learn(where):
    pytest.importorskip("sklearn")
    joblib = pytest.importorskip("joblib")
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.tree import DecisionTreeClassifier

    register_joblib_backend()
    X, y = load_iris(return_X_y=True)
    found = []
    for backend in ({"backend": "sequential"}, {"backend": "achilles", **where}):
        with joblib.parallel_config(**backend):
            grid = {"max_depth": [1, 2, 3], "min_samples_leaf": [1, 5]}
            search = GridSearchCV(DecisionTreeClassifier(random_state=0), grid).fit(X, y)
            scores = cross_val_score(DecisionTreeClassifier(random_state=0), X, y, cv=5)
        found.append((search.best_params_, search.cv_results_["mean_test_score"].tolist(), scores.tolist()))
    assert found[0] == found[1]


def test_tqdm_over_the_calls_of_an_executor(where, capsys):
    """Bars that count calls put a submit of their own into the executor."""
    tqdm = pytest.importorskip("tqdm").tqdm
    with Executor(**where) as executor, tqdm(total=20) as bar:
        submit = executor.submit

        def counted(*args, **more):
            future = submit(*args, **more)
            future.add_done_callback(lambda _: bar.update())
            return future

        executor.submit = counted
        assert [*executor.map(abs, range(-20, 0), chunksize=7)] == [*range(20, 0, -1)]
        del executor.submit
    assert "20/20" in capsys.readouterr().err


def test_tqdm(pool, capsys):
    tqdm = pytest.importorskip("tqdm").tqdm
    assert [*tqdm(pool.imap(abs, range(-20, 0), chunksize=7), total=20)] == [*range(20, 0, -1)]
    assert "20/20" in capsys.readouterr().err
