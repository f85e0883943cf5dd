"""`svag-fast verify --fast` passes, and a wrong formula makes its check fail."""

import json

import pytest
from click.testing import CliRunner

from svag_fast.cli.main import main
from svag_fast.sde.problems import affine
from svag_fast.verify import convergence, lemmas
from svag_fast.verify import suite as battery
from svag_fast.verify.check import Check, Group, Outcome, SuiteSettings
from svag_fast.verify.suite import GROUPS, run

# Simulated again what "theorem-4.3-exact" and "norms-toy" check; and the battery's own errors over seeds.
SIMULATIONS = ("theorem-4.3-simulated", "equilibrium-toy", "z-scores")


@pytest.mark.parametrize("left_out", [SIMULATIONS, pytest.param((), marks=pytest.mark.nightly)], ids=["most", "all"])
def test_fast_battery_passes_and_writes_its_picture(tmp_path, left_out):
    """Every group's checks at their own bounds; the picture is a PNG, the JSON says what the exit code says."""
    wanted = [name for name in GROUPS if name not in left_out]
    only = [argument for name in wanted for argument in ("--only", name)] if left_out else []
    result = CliRunner().invoke(main, ["verify", "--fast", "--json", "--out", str(tmp_path), *only])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["passed"]
    assert {check["group"] for check in report["checks"]} == set(wanted)
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_check_is_exit_code_one_and_named(tmp_path, monkeypatch):
    wrong = Outcome([Check("eq. 0", "two and two", "4", "5", False)])
    monkeypatch.setattr(battery, "GROUPS", {"lemma-4.7": Group("sums", lambda settings: wrong, 1)})
    monkeypatch.setattr("svag_fast.cli.verify.GROUPS", battery.GROUPS)
    result = CliRunner().invoke(main, ["verify", "--only", "lemma-4.7", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "two and two: 4, expected 5" in result.output.replace("\n", " ")


def test_wrong_coefficients_fail_lemma_4_7(monkeypatch):
    """Were the covariance l + 10 % in place of l, (ii) would not pass."""
    right = affine.AffineProblem.batch_grad

    def wrong(self, x, weights, draws):
        grad = right(self, x, weights, draws)
        mean = self.mean_grad(x)
        return mean + 1.05 * (grad - mean)

    monkeypatch.setattr(affine.AffineProblem, "batch_grad", wrong)
    assert not all(check.passed for check in lemmas.lemma_4_7(SuiteSettings(fast=True)).checks)


def test_a_process_that_does_not_converge_fails_theorem_4_3(monkeypatch):
    """SGD at lr/l with SVAG's name, without the amplified noise: its limit is gradient flow, not the SDE."""
    real = convergence.SVAGProcess

    class NoNoise(real):
        @property
        def estimates(self):
            return (convergence.NGD(1.0).estimates[0]._replace(noise_scale=0.0),)

    monkeypatch.setattr(convergence, "SVAGProcess", NoNoise)
    checks = convergence.exact(SuiteSettings(fast=True)).checks
    assert any(not check.passed for check in checks)
    assert all(check.passed for check in checks if check.name.startswith("Ornstein-Uhlenbeck, g = x,"))


def test_unknown_group_is_refused():
    with pytest.raises(ValueError, match=r"group must be one of steps-4\.7, steps-4\.3, steps-adaptive,"):
        run(SuiteSettings(fast=True), ["lemma-5"])
