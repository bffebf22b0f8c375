from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.flow import path, solvers

MEAN, STD = 1.5, 0.4  # of the toy data, N(MEAN, STD^2) in each coordinate


def exact_velocity(x_t, t):
  """E[noise - x | x_t], in closed form."""
  t = t[..., None, None]
  variance = (1 - t) ** 2 * STD**2 + t**2
  return -MEAN + (t - (1 - t) * STD**2) / variance * (x_t - (1 - t) * MEAN)


@functools.partial(jax.jit, static_argnames=("steps", "eta"))
def stochastic(noise: jax.Array, keys: jax.Array, steps: int, eta: float) -> jax.Array:
  return solvers.solve(exact_velocity, noise, path.grid(steps, 2.0), eta=eta, keys=keys)


@pytest.fixture(scope="module")
def keys() -> jax.Array:
  return jax.random.split(jax.random.key(1), 256)


@pytest.fixture(scope="module")
def noise(keys: jax.Array) -> jax.Array:
  return solvers.start(keys, (2, 4, 4))


def error(method: str, steps: int, noise: jax.Array) -> float:
  """Greatest distance from where the exact flow ends: the same quantile of the data as the noise is of N(0,1)."""
  end = solvers.solve(exact_velocity, noise, path.grid(steps, 2.0), method=method)
  return float(jnp.abs(end - (MEAN + STD * noise)).max())


# One Euler step at the end errs by the square of its length: it leaves the order of the whole as it is.
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_a_solver_converges_at_its_order(method: str, order: int, noise: jax.Array):
  coarse, fine = error(method, 32, noise), error(method, 64, noise)
  assert abs(np.log2(coarse / fine) - order) < 0.2
  assert fine < (0.1 if order == 1 else 0.01)


def test_the_exact_field_carries_noise_to_the_data(noise: jax.Array):
  end = np.asarray(solvers.solve(exact_velocity, noise, path.grid(64, 2.0), method="heun"))
  assert abs(end.mean() - MEAN) < 4 * STD / np.sqrt(end.size)
  assert abs(end.std() - STD) < 4 * STD / np.sqrt(2 * end.size)


def deviation(steps: int, eta: float) -> float:
  """The standard deviation with which the stochastic sampler ends on the toy data, by its definition, step by step."""
  times = np.asarray(path.grid(steps, 2.0))
  variance = 1.0
  for t, s in itertools.pairwise(times):
    around = (1 - t) ** 2 * STD**2 + t**2
    clean, noise = (1 - t) * STD**2 / around, t / around  # slopes of E[x | x_t] and E[noise | x_t]
    kept = (1 - s) * clean + s * np.sqrt(1 - eta**2) * noise
    variance = kept**2 * variance + (s * eta) ** 2
  return np.sqrt(variance)


# Not the data's deviation: noise that is all fresh forgets what the steps before it had decided.
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_keeps_the_mean_and_ends_with_the_deviation_of_its_definition(eta, noise, keys):
  end = np.asarray(stochastic(noise, keys, 20, eta))
  expected = deviation(20, eta)
  assert abs(end.mean() - MEAN) < 4 * expected / np.sqrt(end.size)
  assert abs(end.std() - expected) < 4 * expected / np.sqrt(2 * end.size)


def test_noise_and_trajectory_of_a_row_do_not_depend_on_the_rows_around_it(noise, keys):
  others = jnp.roll(keys, 7).at[3].set(keys[3])
  changed = solvers.start(others, (2, 4, 4))
  np.testing.assert_array_equal(changed[3], noise[3])
  assert not np.isclose(changed[4], noise[4]).any()
  there, here = stochastic(noise, keys, 20, 1.0), stochastic(changed, others, 20, 1.0)
  np.testing.assert_array_equal(here[3], there[3])


@pytest.mark.parametrize("method", solvers.METHODS)
def test_one_step_is_a_single_euler_step_whatever_the_method(method: str, noise: jax.Array):
  end = solvers.solve(exact_velocity, noise, path.grid(1, 1.0), method=method)
  np.testing.assert_allclose(end, noise - exact_velocity(noise, jnp.ones(noise.shape[:2])), atol=1e-6)


def test_an_unknown_method_and_missing_keys_are_errors():
  noise = jnp.zeros((1, 1, 1, 1))
  with pytest.raises(ValueError, match="'rk4' is unknown; choose one of euler, heun, midpoint"):
    solvers.solve(exact_velocity, noise, path.grid(2, 1.0), method="rk4")
  with pytest.raises(ValueError, match="pass keys"):
    solvers.solve(exact_velocity, noise, path.grid(2, 1.0), eta=0.5)


def test_the_state_is_in_float32_whatever_it_begins_as(noise: jax.Array):
  rounded, times = noise.astype(jnp.bfloat16), path.grid(4, 2.0)
  end = solvers.solve(exact_velocity, rounded, times)
  np.testing.assert_array_equal(end, solvers.solve(exact_velocity, rounded.astype(jnp.float32), times))
  assert solvers.advance(exact_velocity, rounded, times, 0, 2)[0].dtype == end.dtype == jnp.float32


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_way_begins_as_noise_and_its_last_step_leads_to_the_end(eta: float, noise: jax.Array, keys: jax.Array):
  times = path.grid(4, 2.0)
  end, way = solvers.walk(exact_velocity, noise, times, eta=eta, keys=keys)
  assert way.shape == (4, *noise.shape)
  np.testing.assert_array_equal(way[0], noise)
  last = way[-1] + (times[-1] - times[-2]) * exact_velocity(way[-1], jnp.full(noise.shape[:-2], times[-2]))
  np.testing.assert_allclose(end, last, atol=1e-5)
  np.testing.assert_array_equal(end, solvers.solve(exact_velocity, noise, times, eta=eta, keys=keys))


def test_solving_keeps_nothing_of_the_way(noise: jax.Array, keys: jax.Array):
  def memory(steps: int) -> int:
    run = jax.jit(lambda x: solvers.solve(exact_velocity, x, path.grid(steps, 2.0), eta=1.0, keys=keys))
    return run.lower(noise).compile().memory_analysis().temp_size_in_bytes

  assert memory(64) - memory(4) < noise.nbytes


@pytest.mark.parametrize("method, eta", [("heun", 0.0), ("euler", 1.0)])
def test_a_walk_in_stretches_ends_where_the_whole_one_does(method: str, eta: float, noise: jax.Array, keys: jax.Array):
  times = path.grid(5, 2.0)
  how = dict(method=method, eta=eta, keys=keys)
  advance = jax.jit(functools.partial(solvers.advance, exact_velocity, **how))
  end, way = solvers.walk(exact_velocity, noise, times, **how)
  x, foreseen = noise, []
  for first, last in [(0, 0), (0, 2), (2, 4)]:
    x, clean = advance(x, jnp.pad(times, (0, 3)), first, last)  # of more times than the walk has
    np.testing.assert_allclose(x, way[last], atol=1e-5)
    foreseen.append(float(jnp.abs(clean - end).mean()))
  np.testing.assert_allclose(clean, end, atol=1e-5)
  assert min(foreseen[:-1]) > 0.01 and advance._cache_size() == 1
