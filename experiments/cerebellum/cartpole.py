"""Cart and pole: a DQN whose network is a perceptron, or a granule layer without or with dendrites, of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from bioadapt.circuits.cerebellar import cerebellar_policy

TASK = "CartPole-v1"
MLP, GRANULE, GATED = "MLP, 40 + 40 hidden", "granule", "granule, dendrites"
# 1,922 trained parameters, and 1,874.
ARMS: Mapping[str, Mapping[str, Any]] = {MLP: {"net_arch": [40, 40]}, GRANULE: {"kappa": 0.0}, GATED: {"kappa": 2.0}}
RATES, TUNING_SEEDS = (1e-3, 3e-3), (1000, 1001)
STEPS, EVERY, LAST = 6000, 250, 10
NOISES, EPISODES, COPIES = (0.0, 0.5, 1.0), 10, 10
AREA, CURVE, RETURN = "area under the learning curve", "learning curve", "return after training"


@cache
def spread() -> np.ndarray:
    """Sd of each observation while actions are drawn at random: the unit of the noise, (4,)."""
    env = gym.make(TASK)
    env.action_space.seed(0)
    seen = [env.reset(seed=0)[0]]
    while len(seen) < 5000:
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        seen.append(observation)
        if terminated or truncated:
            seen.append(env.reset()[0])
    return np.std(seen, axis=0)


class NoisyEyes(gym.ObservationWrapper):
    """Gaussian noise on what is observed, of ``share`` times `spread`."""

    def __init__(self, env: gym.Env, share: float, seed: int) -> None:
        super().__init__(env)
        self.sd, self.generator = share * spread(), np.random.default_rng(seed)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return (observation + self.sd * self.generator.standard_normal(len(self.sd))).astype(np.float32)


def agent(arm: str, rate: float, seed: int, env: gym.Env) -> DQN:
    """A DQN with the arm's network; all else is the same for all arms."""
    own = dict(ARMS[arm])
    policy = own if arm == MLP else cerebellar_policy(seed=seed, **own)
    return DQN(
        "MlpPolicy",
        env,
        learning_rate=rate,
        batch_size=64,
        buffer_size=STEPS,
        learning_starts=1000,
        train_freq=256,
        gradient_steps=128,
        target_update_interval=10,
        exploration_fraction=0.2,
        exploration_final_eps=0.04,
        policy_kwargs=policy,
        seed=seed,
        device="cpu",
    )


def learning_curve(returns: Sequence[float], lengths: Sequence[int], steps: int) -> dict[int, float]:
    """After every 250 steps, the mean return of the last ten episodes that have ended by then; 0 before any has."""
    ends, curve = np.cumsum(lengths), {}
    for step in range(EVERY, steps + 1, EVERY):
        ended = int(np.searchsorted(ends, step, side="right"))
        curve[step] = float(np.mean(returns[max(ended - LAST, 0) : ended])) if ended else 0.0
    return curve


def learn(arm: str, rate: float, seed: int, steps: int) -> tuple[DQN, dict[int, float]]:
    """Train an agent; the learning curve is that of the training episodes, which explore."""
    env = Monitor(gym.make(TASK))
    trained = agent(arm, rate, seed, env)
    trained.learn(steps)
    return trained, learning_curve(env.get_episode_rewards(), env.get_episode_lengths(), steps)


def return_under_noise(trained: DQN, share: float, seed: int) -> float:
    """Mean return of 10 greedy episodes, up to 500."""
    makers = [lambda i=i: Monitor(NoisyEyes(gym.make(TASK), share, 100 * seed + i)) for i in range(COPIES)]
    env = DummyVecEnv(makers)
    env.seed(10_000 + seed)
    return float(evaluate_policy(trained, env, EPISODES)[0])


def steps_of(quick: bool) -> int:
    return 1250 if quick else STEPS


def _row(arm: str, trained: DQN, use: str, rate: float, seed: int, condition: str, measure: str, value: float) -> dict:
    size = sum(parameter.numel() for parameter in trained.q_net.parameters())
    return {"part": "cartpole", "arm": arm, "trained": size, "use": use, "rate": rate, "seed": seed,
            "condition": condition, "measure": measure, "value": value}  # fmt: skip


def tune(quick: bool = False) -> list[dict[str, Any]]:
    """Areas of every arm and rate, on seeds of their own; quick: one rate, one seed."""
    rows = []
    for arm in ARMS:
        for rate in RATES[:1] if quick else RATES:
            for seed in TUNING_SEEDS[:1] if quick else TUNING_SEEDS:
                trained, curve = learn(arm, rate, seed, steps_of(quick))
                area = float(np.mean(list(curve.values())))
                rows.append(_row(arm, trained, "tuning", rate, seed, "no noise", AREA, area))
    return rows


def best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each arm, the rate with the largest mean area on the tuning seeds."""
    areas: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["use"] == "tuning":
            areas.setdefault(row["arm"], {}).setdefault(row["rate"], []).append(row["value"])
    return {arm: max(of_rate, key=lambda rate: np.mean(of_rate[rate])) for arm, of_rate in areas.items()}


def run_seed(seed: int, quick: bool, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Learning curve, its area, and returns after training without and with noise, of every arm at its rate."""
    found = []
    for arm, rate in rates.items():
        trained, curve = learn(arm, rate, seed, steps_of(quick))
        values = {("no noise", AREA): float(np.mean(list(curve.values())))}
        values |= {(f"step {step}", CURVE): value for step, value in curve.items()}
        values |= {(noise_name(share), RETURN): return_under_noise(trained, share, seed) for share in NOISES}
        for (condition, measure), value in values.items():
            found.append(_row(arm, trained, "test", rate, seed, condition, measure, value))
    return found


def noise_name(share: float) -> str:
    return f"noise {share:g}" if share else "no noise"
