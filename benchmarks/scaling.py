"""How long a bootstrap of the law of the loss takes, against scipy's L-BFGS-B on the same resamples.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

Made up runs: 240 of them on the law of Besiroglu et al., with 1 % of noise.
"""

import time

import numpy as np
from scipy.optimize import minimize

from llama_edu.scaling import fit_parametric

RUNS, RESAMPLES, PEERS = 240, 1000, 50


def main() -> None:
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7.5, 10.2, RUNS), 10 ** rng.uniform(9, 11.5, RUNS)
    loss = (1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658) * np.exp(0.01 * rng.standard_normal(RUNS))
    start = time.perf_counter()
    fit = fit_parametric(n, d, loss)
    once = time.perf_counter() - start
    start = time.perf_counter()
    fit = fit_parametric(n, d, loss, bootstrap=RESAMPLES)
    ours = time.perf_counter() - start - once
    print(f"full fit from 192 starts: {once:.2f} s; {RESAMPLES} resamples: {ours:.2f} s")

    order = np.lexsort((loss, d, n))
    x, y, log_loss = (np.log(c[order]) for c in (n, d, loss))
    x0, y0 = x.mean(), y.mean()
    x, y = x - x0, y - y0
    counts = rng.multinomial(RUNS, np.full(RUNS, 1 / RUNS), size=PEERS)

    def objective(p, weights):
        terms = np.exp([p[0] - p[3] * x, p[1] - p[4] * y, np.full(RUNS, p[2])])
        r = (np.log(terms.sum(axis=0)) - log_loss) / 1e-3
        share = terms / terms.sum(axis=0)
        pull = weights * np.clip(r, -1, 1) / 1e-3
        jacobian = np.stack([*share, -share[0] * x, -share[1] * y])
        return weights @ np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5), jacobian @ pull

    first = np.log([fit.A, fit.B, fit.E]) - [fit.alpha * x0, fit.beta * y0, 0]
    first = [*first, fit.alpha, fit.beta]
    options = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-8}
    start = time.perf_counter()
    for weights in counts:
        minimize(objective, first, args=(weights,), jac=True, method="L-BFGS-B", options=options)
    theirs = (time.perf_counter() - start) / PEERS * RESAMPLES
    print(
        f"scipy L-BFGS-B, one after the other, warm start: {theirs:.1f} s for {RESAMPLES} ({theirs / ours:.0f} times)"
    )


if __name__ == "__main__":
    main()
