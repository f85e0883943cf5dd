"""Faults planted in copies of the package, one a formula: `svag-fast verify` must catch each that it can reach.

python tests/verify/mutants.py            # all, one line each
python tests/verify/mutants.py NAME ...   # these
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file`` and becomes ``new``; the group of checks, or the unit test, that sees it."""

    name: str
    file: str
    old: str
    new: str
    group: str | None
    unit_test: str | None = None


STEP, OPTIONS, NOISE, THEORY = "ops/step.py", "ops/step_options.py", "noise/estimators.py", "theory/closeness.py"
EQUATION = "theory/equilibrium_equation.py"
ADAPTIVE, START, FIT = "ops/adaptive_step.py", "optim/initial_square_avg.py", "stats/limit_fit.py"
MUTANTS = (
    # the step
    Mutant("c2's sign", OPTIONS, "(1 - root) / 2", "(root - 1) / 2", "steps-4.7"),
    Mutant("l for 2l - 1", OPTIONS, "math.sqrt(2 * check_l(l) - 1)", "math.sqrt(check_l(l))", "steps-4.7"),
    Mutant(
        "coefficients swapped",
        OPTIONS,
        "return (1 + root) / 2, (1 - root) / 2",
        "return (1 - root) / 2, (1 + root) / 2",
        "steps-4.7",
    ),
    Mutant(
        "reference: decay dropped",
        STEP,
        "direction = combined + weight_decay * value",
        "direction = combined",
        "steps-4.7",
    ),
    Mutant(
        "reference: decay not scaled by the rate",
        STEP,
        "(x.to(dtype) - rate * direction).to(x.dtype)",
        "(x.to(dtype) - rate * combined - weight_decay * x.to(dtype)).to(x.dtype)",
        "steps-4.7",
    ),
    Mutant(
        "momentum: the time rule at the fixed rule's rate",
        OPTIONS,
        "StepScalars(lr, l * l,",
        "StepScalars(lr, l,",
        "steps-momentum",
    ),
    Mutant(
        "momentum: rounded to float32",
        STEP,
        "(direction + (mu - kept) * v)",
        "direction",
        None,
        "tests/ops/test_step_momentum.py",
    ),
    Mutant("svag_loss: c2 dropped", "optim/svag.py", "c1 * loss1 + c2 * loss2", "c1 * loss1 - c2 * loss2", "steps-4.7"),
    Mutant(
        "hold_gradient: batches swapped",
        "optim/two_batch.py",
        "list(zip(pair.grads, second, strict=True))",
        "list(zip(second, pair.grads, strict=True))",
        "steps-4.7",
    ),
    Mutant("N: factor of 2", "ops/step_stats.py", "- 2 * inner) / 2", "- 2 * inner)", "steps-4.7"),
    Mutant("N: cross term once", "ops/step_stats.py", "- 2 * inner) / 2", "- inner) / 2", "steps-4.7"),
    Mutant(
        "G: |g1|² for <g1, g2>",
        "ops/step_stats.py",
        "self._estimate(self.raw.select(-1, _INNER))",
        "self._estimate(self.raw.select(-1, _SQ_NORM1))",
        "steps-4.7",
    ),
    # the adaptive steps and their start
    Mutant(
        "square-root scaling: ε the wrong way",
        "theory/scaling_rules.py",
        "eps / root,",
        "eps * root,",
        "steps-adaptive",
    ),
    Mutant(
        "Adam: first bias correction dropped",
        ADAPTIVE,
        "else self.lr / (1 - self.beta1**step)",
        "else self.lr",
        "steps-adaptive",
    ),
    Mutant(
        "Adam: second bias correction without its root",
        ADAPTIVE,
        "else math.sqrt(1 - self.beta2**step)",
        "else 1 - self.beta2**step",
        "steps-adaptive",
    ),
    Mutant(
        "adaptive: the rule at κ = 1/√l",
        ADAPTIVE,
        "            1 / options.l, batch_size=1,",
        "            options.l**-0.5, batch_size=1,",
        "steps-adaptive",
    ),
    Mutant(
        "adaptive: time by the linear rule",
        "optim/adaptive.py",
        "return lr * lr / l",
        "return lr / l",
        "steps-adaptive",
    ),
    Mutant(
        "RMSprop's start: not times l",
        START,
        "start = zeros + l * float(value)",
        "start = zeros + float(value)",
        "steps-adaptive",
    ),
    Mutant(
        "RMSprop's start: always zero",
        "optim/adaptive.py",
        '"square_avg": filled(state["square_avg"], start, group["l"])',
        '"square_avg": state["square_avg"]',
        "steps-adaptive",
    ),
    Mutant(
        "measured: c2 on both",
        START,
        "(c2 * g1 + c1 * g2 + decay).square()",
        "(c2 * g1 + c2 * g2 + decay).square()",
        "steps-adaptive",
    ),
    Mutant(
        "measured: sum of the two orders",
        START,
        "(c2 * g1 + c1 * g2 + decay).square()) / 2",
        "(c2 * g1 + c1 * g2 + decay).square())",
        "steps-adaptive",
    ),
    Mutant("measured: zero counts as the first", START, "1 / (count + 1)", "1 / (count + 2)", "steps-adaptive"),
    Mutant(
        "measured: counted as steps",
        "optim/adaptive.py",
        "take, moves=False",
        "take, moves=True",
        "steps-adaptive",
    ),
    Mutant(
        "measured: decay dropped",
        START,
        "decay = weight_decay * p.to(dtype)",
        "decay = 0 * p.to(dtype)",
        None,
        "tests/optim/test_initial_square_avg.py",
    ),
    Mutant(
        "measured: unseen entries stay zero",
        START,
        "mean = mean.where(seen, mean[seen].mean())",
        "pass",
        None,
        "tests/optim/test_initial_square_avg.py",
    ),
    # estimators
    Mutant("Bessel: B for B - 1", NOISE, "(B / (B - 1))", "1.0", "estimators"),
    Mutant("batch noise: s² for s²/B", NOISE, "noise = s2 / B *", "noise = s2 *", "estimators"),
    Mutant(
        "G from one batch not debiased",
        NOISE,
        "return NoiseEstimate(batch - noise, noise, sample)",
        "return NoiseEstimate(batch, noise, sample)",
        "estimators",
    ),
    Mutant("finite population: n for n - 1", NOISE, "s2 * ((population - 1) / population)", "s2", "estimators"),
    Mutant("pairs: 2B for 2B - 1", NOISE, "/ (2 * B - 1)", "/ (2 * B)", "estimators"),
    Mutant(
        "disjoint halves: correction dropped",
        NOISE,
        "grad = g12 + noise * (batch_size / population)",
        "grad = g12",
        "estimators",
    ),
    Mutant(
        "disjoint halves: n for n - B",
        NOISE,
        "noise = noise * ((population - batch_size) / population)",
        "noise = noise * 1.0",
        "estimators",
    ),
    Mutant("many batches: M for M - 1", NOISE, "(M / (M - 1))", "1.0", "estimators"),
    Mutant(
        "many batches: G not debiased",
        NOISE,
        "NoiseEstimate(s - noise / M, noise",
        "NoiseEstimate(s, noise",
        "estimators",
    ),
    Mutant(
        "BatchMoments: M for M - 1",
        NOISE,
        "noise = self._scatter / (self.batches - 1)",
        "noise = self._scatter / self.batches",
        "estimators",
    ),
    Mutant(
        "RunningNoise: N doubled",
        "noise/running.py",
        "((sq_norm1 - inner) + (sq_norm2 - inner)) / 2",
        "((sq_norm1 - inner) + (sq_norm2 - inner))",
        "estimators",
    ),
    Mutant(
        "RunningNoise: mean of |g1|² for G", "noise/running.py", "grad.add(inner)", "grad.add(sq_norm1)", "estimators"
    ),
    # per-sample norms
    Mutant(
        "mean loss: B for B²",
        "sample_norms/context.py",
        'sq_norms * float(B) ** 2 if self._loss_reduction == "mean"',
        'sq_norms * float(B) if self._loss_reduction == "mean"',
        "sample-norms",
    ),
    Mutant(
        "Linear: |b|⁴ for |a|²|b|²",
        "sample_norms/layers/linear.py",
        "b_sq_norms * row_sq_norms(x)",
        "b_sq_norms * row_sq_norms(b)",
        "sample-norms",
    ),
    Mutant(
        "reference product: weights ignored",
        "ops/weight_grad/op.py",
        "weights.to(dtype)\n",
        "torch.ones_like(weights.to(dtype))\n",
        "sample-norms",
    ),
    # theory
    Mutant(
        "5.2: C² for C² - 1",
        THEORY,
        "threshold = 1 / (_squared(C) - 1)",
        "threshold = 1 / _squared(C)",
        "certificates-attained",
    ),
    Mutant(
        "5.2: lr for 1/lr", THEORY, "ratio = ratio.affine(1 / lr)", "ratio = ratio.affine(lr)", "certificates-attained"
    ),
    Mutant(
        "5.5: 1/κ dropped",
        THEORY,
        "(1 - 1 / kappa) / (_squared(C) - 1) - 1 / kappa",
        "(1 - 1 / kappa) / (_squared(C) - 1)",
        "certificates-attained",
    ),
    Mutant(
        "5.6: C for C²",
        THEORY,
        '"exact": (square, square)',
        '"exact": (math.sqrt(square), math.sqrt(square))',
        "certificates-attained",
    ),
    Mutant(
        "5.6 tightened: C² for C² - 1",
        THEORY,
        '"tightened": (square, square - 1)',
        '"tightened": (square, square)',
        "certificates-attained",
    ),
    Mutant(
        "certificate's sign",
        THEORY,
        "ratio.affine(-1.0, threshold)",
        "ratio.affine(1.0, -threshold)",
        "certificates-attained",
    ),
    Mutant(
        "(11): λ² dropped",
        EQUATION,
        "(2 - lr * weight_decay / l) * weight_decay, lr / l, lr",
        "2 * weight_decay, lr / l, lr",
        "certificates-attained",
    ),
    Mutant(
        "(11): l not on G",
        EQUATION,
        "(2 - lr * weight_decay / l) * weight_decay, lr / l, lr",
        "(2 - lr * weight_decay / l) * weight_decay, lr, lr",
        "certificates-attained",
    ),
    Mutant("LSI: κ not on N", THEORY, '("noise_trace", kappa)', '("noise_trace", 1.0)', "certificates-attained"),
    Mutant(
        "delta method: sign of the covariance",
        THEORY,
        "(-ratio / G.value, 1 / G.value), _covariance_2(G, N, covariance)",
        "(ratio / G.value, 1 / G.value), _covariance_2(G, N, covariance)",
        "prediction",
    ),
    Mutant(
        "linear scaling: √κ",
        "theory/scaling_rules.py",
        "SGDRates(float(kappa * batch_size), kappa * lr)",
        "SGDRates(float(kappa * batch_size), math.sqrt(kappa) * lr)",
        "scaling-rules",
    ),
    Mutant(
        "square-root scaling: κ on lr",
        "theory/scaling_rules.py",
        "        root * lr,\n",
        "        kappa * lr,\n",
        "scaling-rules",
    ),
    Mutant(
        "square-root scaling: β unscaled",
        "theory/scaling_rules.py",
        "return beta - (kappa - 1) * (1 - beta)",
        "return beta",
        "scaling-rules",
    ),
    # predictions and verdicts
    Mutant(
        "predict: the whole phase for its end",
        "analysis/baseline.py",
        "    start = end - rows\n",
        "    start = begin\n",
        "prediction",
    ),
    Mutant(
        "predict: B* with B²",
        "analysis/prediction.py",
        "self.kappa[form].affine(self.baseline.batch_size)",
        "self.kappa[form].affine(self.baseline.batch_size**2)",
        "prediction",
    ),
    Mutant(
        "intervals: one standard error",
        FIT,
        "half = t_quantile(confidence, self.degrees_of_freedom) *",
        "half = 1.0 *",
        "verdict",
    ),
    Mutant(
        "limit: variance of a run for the mean's",
        FIT,
        "parts = weights**2 * variances / counts",
        "parts = weights**2 * variances",
        "verdict",
    ),
    Mutant(
        "limit: √l for l",
        FIT,
        "x = np.stack([np.ones(len(ls) - first), 1 / ls[first:]]",
        "x = np.stack([np.ones(len(ls) - first), ls[first:] ** -0.5]",
        "verdict",
    ),
    Mutant(
        "verdict: eight times the margin",
        "analysis/verdict.py",
        "if within(ends, margin) else",
        "if within(ends, 8 * margin) else",
        "verdict",
    ),
    Mutant(
        "phases: the whole for the last half",
        "analysis/phases.py",
        "((begin + end) / 2, end)",
        "(begin, end)",
        "verdict",
    ),
    Mutant(
        "limits' difference: sum",
        FIT,
        "            self.value - other.value,\n",
        "            self.value + other.value,\n",
        "verdict",
    ),
    # the processes and their closed forms
    Mutant(
        "SVAG's process: l² for l",
        "sde/processes.py",
        "svag_weights(self.l, self.batches) if w",
        "svag_weights(self.l**2, self.batches) if w",
        "lemma-4.7",
    ),
    Mutant(
        "Euler-Maruyama: lr/h for its root",
        "sde/processes.py",
        "GradientEstimate(noise_scale=math.sqrt(self.lr / self.h))",
        "GradientEstimate(noise_scale=self.lr / self.h)",
        "norms-toy",
    ),
    Mutant(
        "order 2: lr for lr/2",
        "sde/processes.py",
        "        return self.lr / 2\n",
        "        return self.lr\n",
        "order-2",
    ),
    Mutant(
        "process: decay twice",
        "sde/processes.py",
        "x.mul_(1 - h * self.weight_decay)",
        "x.mul_(1 - 2 * h * self.weight_decay)",
        "norms-toy",
    ),
    Mutant(
        "SDE moments: diffusion without lr",
        "sde/moments.py",
        "variance = lr * (problem",
        "variance = (problem",
        "theorem-4.3-exact",
    ),
    Mutant(
        "SDE moments: Itô's term doubled",
        "sde/moments.py",
        "p * (p - 1) / 2 * x",
        "p * (p - 1) * x",
        "theorem-4.3-exact",
    ),
    Mutant(
        "noise moments: third cumulant's sign",
        "sde/moments.py",
        "problem.law.third_cumulant * third",
        "-problem.law.third_cumulant * third",
        "steps-4.3",
    ),
    Mutant(
        "toy: N with d for d - 1",
        "sde/problems/scale_invariant.py",
        "            self.noise_std**2 * (self.dim - 1) / r,\n            r,",
        "            self.noise_std**2 * self.dim / r,\n            r,",
        "norms-toy",
    ),
    Mutant(
        "toy: relaxation at half the rate",
        "sde/problems/scale_invariant.py",
        "decay = -4 * weight_decay * time",
        "decay = -2 * weight_decay * time",
        "norms-toy",
    ),
    Mutant(
        "net: NGD's weights not centred",
        "sde/problems/network.py",
        "xi.sub_(xi.mean()).mul_(self.noise_scale)",
        "xi.mul_(self.noise_scale)",
        "noise-covariance",
    ),
    Mutant(
        "net: √(n/B) inverted",
        "sde/problems/network.py",
        "math.sqrt(n / self.batch_size)",
        "math.sqrt(self.batch_size / n)",
        "noise-covariance",
    ),
    Mutant(
        "regression: noise with B for 1/B",
        "sde/problems/regression.py",
        "return 1 / b if self.replacement",
        "return b if self.replacement",
        "noise-covariance",
    ),
    Mutant(
        "more batches: second weight's sign",
        "sde/weights.py",
        "1 / batches - radius * math.sqrt((batches - 1) / batches)",
        "1 / batches + radius * math.sqrt((batches - 1) / batches)",
        "scaling-rules",
    ),
    Mutant(
        "tail index: factor of 2",
        "theory/tail_index.py",
        "excess / (2 * math.log(block))",
        "excess / math.log(block)",
        "tail-known",
    ),
    Mutant(
        "means: the values' variance for their mean's",
        "stats/series.py",
        "covariance = centred @ centred.T / (freedom * centred.shape[1])",
        "covariance = centred @ centred.T / freedom",
        "prediction",
    ),
    # the formulas behind the answers, one by one
    Mutant(
        "fit: lack of fit ignored",
        FIT,
        "candidate = np.where(held, j, candidate)",
        "candidate = np.where(True, j, candidate)",
        "rules",
    ),
    Mutant(
        "fit: systematic dropped",
        FIT,
        "systematic = np.where(regime, 0.0, extrapolation)",
        "systematic = np.where(regime, 0.0, 0.0 * extrapolation)",
        "rules",
    ),
    Mutant("fit: long extrapolation trusted", FIT, "(count > 2) & (extrapolation <= margin)", "(count > 2)", "rules"),
    Mutant(
        "fit: Satterthwaite n for n-1",
        FIT,
        "df = _satterthwaite(variance, (parts**2 / (counts - 1)).sum(-1))",
        "df = _satterthwaite(variance, (parts**2 / counts**2).sum(-1))",
        "rules",
    ),
    Mutant("fit: departs to one side only", FIT, "(low > margin) | (high < -margin)", "(low > margin)", "verdict"),
    Mutant("fit: matches by one end", FIT, "(-margin < low) & (high < margin)", "(high < margin)", "verdict"),
    Mutant("limits' difference: one variance", FIT, "variance = parts[0] + parts[1]", "variance = parts[0]", "verdict"),
    Mutant(
        "limits' difference: systematic dropped",
        FIT,
        "self.systematic + other.systematic,",
        "self.systematic,",
        "rules",
    ),
    Mutant(
        "fit: SGD in its own limit",
        FIT,
        "firsts = [j + 1 for j in range(count - 2)]",
        "firsts = [j for j in range(count - 2)]",
        "rules",
    ),
    Mutant("verdict: rounding floor dropped", "analysis/verdict.py", "floor = step**2 / 12", "floor = 0.0", "rules"),
    Mutant(
        "verdict: variance n for n-1", "analysis/verdict.py", "float(v.var(ddof=1))", "float(v.var(ddof=0))", "rules"
    ),
    Mutant(
        "verdict: one match is enough",
        "analysis/verdict.py",
        'set(answers) == {"matches"}',
        '"matches" in answers',
        "rules",
    ),
    Mutant(
        "verdict: departs needs all",
        "analysis/verdict.py",
        'if "departs" in answers',
        'if set(answers) == {"departs"}',
        "rules",
    ),
    Mutant(
        "verdict: survivors judged",
        "analysis/verdict.py",
        "if group and not diverged[l] and (l == 1 or l > worst)",
        "if group",
        "rules",
    ),
    Mutant(
        "verdict: SVAG converged by any",
        "analysis/verdict.py",
        'if l == 1 or self.distances[l].answer != "matches"',
        'if l == 1 or self.distances[l].answer == "departs"',
        "verdict",
    ),
    Mutant("seeds needed: gap doubled", "analysis/verdict.py", "* error < gap)", "* error < 2 * gap)", "rules"),
    Mutant(
        "end: first value",
        "analysis/runs.py",
        "float(values[-1]) if len(steps) and",
        "float(values[0]) if len(steps) and",
        "rules",
    ),
    Mutant(
        "margin: percents taken whole",
        "analysis/margins.py",
        "cls(size / 100, relative=True)",
        "cls(size, relative=True)",
        "rules",
    ),
    Mutant(
        "margin: negative level", "analysis/margins.py", "self.size * abs(level)", "self.size * max(level, 0)", "rules"
    ),
    Mutant(
        "same_sde: lr B",
        "analysis/shared_limit.py",
        "a.lr * b.batch_size / (b.lr * a.batch_size)",
        "a.lr * a.batch_size / (b.lr * b.batch_size)",
        None,
        "tests/analysis/test_verdict.py",
    ),
    Mutant(
        "Fieller: covariance dropped",
        "stats/estimate.py",
        "numerator.value * denominator.value - t2 * covariance",
        "numerator.value * denominator.value",
        "rules",
    ),
    Mutant(
        "Fieller: no error of the numerator",
        "stats/estimate.py",
        "numerator.value**2 - t2 * numerator.standard_error**2",
        "numerator.value**2",
        "prediction",
    ),
    Mutant(
        "Fieller: normal for t", "stats/estimate.py", "min(freedoms, default=None)) ** 2", "None) ** 2", "prediction"
    ),
    Mutant(
        "interval: normal for t",
        "stats/estimate.py",
        "return quantile(confidence, self.degrees_of_freedom) *",
        "return quantile(confidence, None) *",
        "rules",
    ),
    Mutant("series: tau without its 1", "stats/series.py", ".sum()) - 1.0", ".sum())", "rules"),
    Mutant("series: tau halved", "stats/series.py", "tau = 2.0 * float(", "tau = 1.0 * float(", "rules"),
    Mutant(
        "series: correlations' sign",
        "stats/series.py",
        "correlations: Array = unit @ unit.T",
        "correlations: Array = -unit @ unit.T",
        "rules",
    ),
    Mutant(
        "series: runs for runs - 1",
        "stats/series.py",
        "freedom = centred.shape[1] - 1.0",
        "freedom = centred.shape[1] + 0.0",
        "rules",
    ),
    Mutant(
        "detector: always within",
        "theory/equilibrium.py",
        "within = max(abs(low), abs(high)) <= tolerance",
        "within = True",
        "rules",
    ),
    Mutant(
        "detector: drift's scale",
        "theory/equilibrium.py",
        "* count / (count - 1) / mean.value",
        "/ mean.value",
        "rules",
    ),
    Mutant(
        "detector: residual ignored",
        "theory/equilibrium.py",
        "if low > tolerance or high < -tolerance:",
        "if False:",
        "rules",
    ),
    Mutant(
        "detector: never drifts", "theory/equilibrium.py", "if p_value < level and not within:", "if False:", "rules"
    ),
    Mutant(
        "predict: relaxation times",
        "analysis/baseline.py",
        "relaxation_times=4 * rate *",
        "relaxation_times=2 * rate *",
        "rules",
    ),
    Mutant(
        "predict: outlook's κ",
        "analysis/prediction.py",
        "Outlook(size, size / baseline.batch_size, _verdict",
        "Outlook(size, baseline.batch_size / size, _verdict",
        "rules",
    ),
    Mutant(
        "predict: silent for fails",
        "analysis/prediction.py",
        '"fails" if kappa > high else "silent" if kappa < low',
        '"silent" if kappa > high else "fails" if kappa < low',
        "rules",
    ),
    Mutant("predict: distinct draws not undone", THEORY, "affine(batch_size / factor)", "affine(batch_size)", "rules"),
    Mutant(
        "κ* interval: constant dropped",
        THEORY,
        "return constant + slope * low, constant + slope * high",
        "return slope * low, slope * high",
        "prediction",
    ),
    Mutant(
        "C-closeness: inverse ratio kept",
        THEORY,
        "return replace(worst, value=1 / worst.value, standard_error",
        "return replace(worst, value=worst.value, standard_error",
        "rules",
    ),
    Mutant(
        "LSI: κ inverse",
        THEORY,
        "ratio = a.value / (factor * b.value)",
        "ratio = a.value * factor / b.value",
        "certificates",
    ),
    Mutant("weights: 1 - q dropped", NOISE, "/ (w != 0).sum() / (1 - q)", "/ (w != 0).sum()", "rules"),
    Mutant("weights: G not debiased", NOISE, "NoiseEstimate(batch - q * sample,", "NoiseEstimate(batch,", "rules"),
    Mutant(
        "noise factor: n for n - 1",
        "stats/sampling.py",
        "(population - batch_size) / (population - 1)",
        "(population - batch_size) / population",
        "estimators",
    ),
    Mutant(
        "RunningNoise: nsr's error over G²",
        "noise/running.py",
        "self._rounding_error()) / abs(G.mean)",
        "self._rounding_error()) / G.mean**2",
        None,
        "tests/noise/test_running.py",
    ),
    Mutant("BatchMoments: scatter", NOISE, "(before * (g - mean)).sum()", "(before * before).sum()", "estimators"),
    Mutant(
        "SVAG.time: lr for lr/l", "optim/two_batch.py", "return lr / l", "return lr", None, "tests/optim/test_svag.py"
    ),
    Mutant(
        "RMSprop α: unscaled",
        "optim/initial_square_avg.py",
        "lerp(new, 1 / (count + 1))",
        "lerp(new, 1 / 100)",
        "steps-adaptive",
    ),
)


def faulty_text(mutant: Mutant) -> str:
    """The file with the fault in it."""
    text = (ROOT / "svag_fast" / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} holds {count} times what should stand there once")
    return text.replace(mutant.old, mutant.new)


def plant(mutant: Mutant, folder: Path) -> None:
    """Copy the package into ``folder`` with the fault in it."""
    package = folder / "svag_fast"
    shutil.copytree(ROOT / "svag_fast", package, ignore=shutil.ignore_patterns("__pycache__"), copy_function=os.symlink)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / mutant.file).unlink()  # a link to the real one
    (package / mutant.file).write_text(faulty_text(mutant))


def caught(mutant: Mutant) -> bool:
    """Whether `svag-fast verify`, or the unit test, fails on the copy with the fault in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(mutant, folder)
        if mutant.group is not None:
            command = ["-m", "svag_fast", "verify", "--fast", "--only", mutant.group, "--out", str(folder / "out")]
        else:
            assert mutant.unit_test is not None, mutant.name
            command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(ROOT / mutant.unit_test)]
        environment = {**os.environ, "PYTHONPATH": name, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        broken = mutant.group is not None and not (folder / "out" / "verify.json").exists()
        if done.returncode not in (0, 1) or broken:  # it did not get as far as a check
            raise RuntimeError(f"{mutant.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1


if __name__ == "__main__":
    wanted = [m for m in MUTANTS if not sys.argv[1:] or m.name in sys.argv[1:]]
    survivors = 0
    for mutant in wanted:
        try:
            verdict = "caught" if caught(mutant) else "SURVIVES"
        except RuntimeError as error:
            verdict = f"BREAKS: {error}"
        survivors += verdict != "caught"
        print(f"{verdict}: {mutant.name} ({mutant.group or mutant.unit_test})", flush=True)
    sys.exit(survivors > 0)
