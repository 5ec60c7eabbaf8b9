"""Training against the clock."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from heimdall_onnx import fit as module
from heimdall_onnx.fit import Captures, fit
from heimdall_onnx.ground import distance_m
from heimdall_onnx.localization_net import LocalizationNet
from heimdall_onnx.simulate import simulate_captures


def captures(seed, count):
    features, positions = simulate_captures(np.random.default_rng(seed), count)
    return Captures(torch.from_numpy(features), torch.from_numpy(positions))


class Run:
    """A training by a clock of its own, so that the number of steps depends on no machine.

    A step takes 1 s without the residual blocks and 20 s with them, as it is in proportion.
    """

    def __init__(self, pool, unseen, seconds):
        self.pool, self.now, self.shares, self.messages = pool, 0.0, [], []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        before = torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
            self.fitted = fit(
                pool, unseen.features, seconds=seconds, seed=0, progress=self._progress
            )
        self.generator_restored = torch.equal(torch.get_rng_state(), before)
        self.threads_restored = torch.get_num_threads() == 1
        torch.set_num_threads(threads)

    def _progress(self, share, what):
        self.shares.append(share)
        self.messages.append(what)
        if what != "evaluating":
            self.now += 1.0 if share < 0.45 else 20.0


@pytest.fixture(scope="module")
def run(unseen):
    return Run(captures(0, 192), unseen, seconds=160.0)


@pytest.fixture(scope="module")
def few():
    return captures(1, 16)


@pytest.fixture(scope="module")
def shortest(few):
    return Run(captures(0, 32), few, seconds=1e-3)


@pytest.fixture(scope="module")
def unseen():
    return captures(1, 64)


def answers(model, features):
    with torch.inference_mode():
        return [torch.cat(parts) for parts in zip(*map(model, features.split(32)), strict=True)]


def test_it_learns_positions(run, unseen):
    positions, _ = answers(run.fitted.model, unseen.features)
    torch.testing.assert_close(positions, run.fitted.positions)
    truth = unseen.positions.numpy()
    centre = np.broadcast_to(run.pool.positions.mean(0).numpy(), truth.shape)
    error = np.median(distance_m(positions.numpy(), truth))
    assert error < 0.6 * np.median(distance_m(centre, truth))


def test_it_keeps_to_the_time_and_leaves_some_for_evaluation(run):
    first, second = run.fitted.steps
    assert first == pytest.approx(0.45 * 160, abs=1)
    assert second >= 2
    last_look = run.now - 20
    left_for_batches = (4 + 2) * 20 / 3
    assert last_look + left_for_batches <= 160 + 20  # one step late at most
    assert run.shares == sorted(run.shares)
    assert max(run.shares) <= 1
    assert all(message.startswith("training, loss ") for message in run.messages[:-1])
    assert run.messages[-1] == "evaluating"


def test_the_residual_blocks_are_back_and_take_part(run, unseen):
    model = run.fitted.model
    fresh = LocalizationNet(backbone_size="tiny").state_dict()
    assert model.state_dict().keys() == fresh.keys()
    scales = {n: v for n, v in model.state_dict().items() if n.endswith("layer_scale")}
    assert min(v.abs().mean() for v in scales.values()) > 1e-5
    with_blocks, _ = answers(model, unseen.features[:16])
    kept = {n: v.clone() for n, v in scales.items()}
    model.load_state_dict({n: torch.zeros_like(v) for n, v in scales.items()}, strict=False)
    without_blocks, _ = answers(model, unseen.features[:16])
    model.load_state_dict(kept, strict=False)
    assert (with_blocks - without_blocks).abs().mean() > 1e-5


def test_uncertainties_lie_within_their_limits_and_differ(run, unseen):
    _, sigma = answers(run.fitted.model, unseen.features)
    assert sigma.min() >= 0.01
    assert sigma.max() <= 1.0
    assert sigma.std() > 0.01  # they have not all run into the limit


def test_the_model_is_in_eval_mode_and_the_globals_are_as_before(run):
    assert not run.fitted.model.training
    assert run.generator_restored
    assert run.threads_restored


def test_the_shortest_time_gives_a_usable_model(shortest):
    assert shortest.fitted.steps == (2, 2)
    distance = (shortest.fitted.positions - shortest.pool.positions.mean(0)).abs().max()
    assert distance < 5  # near the middle where it started, as the running averages are sane


def test_the_same_seed_gives_the_same_model(shortest, few):
    again = Run(shortest.pool, few, seconds=1e-3).fitted.model.state_dict()
    for name, value in shortest.fitted.model.state_dict().items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_the_learning_rate_rises_then_falls():
    rates = [module._cycle(share) for share in np.linspace(0, 1, 101)]
    peak = int(np.argmax(rates))
    assert 5 <= peak <= 10
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
