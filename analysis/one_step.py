"""Steps 1-5 of one training step of a run, for the analyses to look at: its keys, and what it draws."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import data
import grpo
import scope
import step as steps
from rollout import Rollout
from support import config as configs

RUN_KEYS = ("model", "prompt.", "prompts_per_step", "seed", "data.", "reward.grader", "group_size", "max_new_tokens",
            "temperature", "precision", "micro_batch", "selection.fraction", "forking_fraction",
            "rollout.", "evaluation.", "countdown", "toy.")
OWN_KEYS = {"run": "", "out": "analyses", "step": 0}  # step: whose problems of the training order are rolled out
# Of no interest here but read by the step; objective=forking_rl is what marks the forking tokens.
FIXED = {"reward.kind": "accuracy", "objective": "forking_rl", "selection.strategy": "scope",
         "grpo.updates_per_rollout": 1}


def keys_of_an_analysis(own: dict) -> dict:
    """Those of a run that matter to it, and its own, with their defaults."""
    return {key: value for key, value in configs.read_defaults().items() if key.startswith(RUN_KEYS)} | OWN_KEYS | own


def analysis_keys(arguments: list[str], own: dict, least: dict) -> dict:
    """The flat, checked config of an analysis: the keys of a run that matter, and its own, not below `least`."""
    configs.require(os.environ.get("WORLD_SIZE", "1") == "1", "an analysis is one process: start it with python")
    keys = keys_of_an_analysis(own)
    run = next((word.removeprefix("run=") for word in arguments if word.startswith("run=")), "")
    keys = configs.override(keys | (run_settings(Path(run), keys) if run else {}), arguments)
    configs.require(not Path(keys["out"]).is_file(), f"out={keys['out']} is a file: give a folder")
    configs.check(keys)
    for key, low in ({"step": 0} | least).items():
        configs.require(keys[key] >= low, f"{key}={keys[key]}: give at least {low}")
    return keys


def run_settings(folder: Path, keys: dict) -> dict:
    """What a run was made with, for the keys asked, and its trained model."""
    for file in ("config.yaml", "model/config.json"):
        configs.require((folder / file).is_file(), f"run={folder}: no {file} there; give the folder of a finished run")
    stored = configs.read_stored(folder / "config.yaml")
    if stored.get("selection.strategy") in scope.STRATEGIES:
        if not scope.STRATEGIES[stored["selection.strategy"]].selects:  # plain GRPO: show where SCOPE would act
            del stored["selection.strategy"]
    return {key: stored[key] for key in keys.keys() & stored.keys()} | {"model": str(folder / "model")}


def settings_of(keys: dict):
    """The config as attributes, complete for `draw_step`."""
    config = configs.namespace(configs.nest(FIXED | keys))
    steps.check_methods(config)
    return config


@dataclass
class Step:
    """Steps 1-5 of one training step: B rollouts, of len(problems) groups."""

    run: steps.Run
    problems: list[dict]  # B / group_size
    sampled: Rollout
    correct: Tensor  # [B] bool
    advantages: Tensor  # [B]
    selected: Tensor  # [B, C] bool
    forking: Tensor  # [B, C] bool
    scores: Tensor  # [B, C], Eq. 11


def draw_step(config, world) -> Step:
    """What train.py does in step number config.step of a run, up to the selection."""
    problems, _, _ = data.problem_sets(config)
    run = steps.set_up(config, problems, world, training=False)
    asked, rows = steps.draw_problems(run, config.step)
    sampled = steps.sample(run, asked, rows, config.step)
    rewards, correct, _ = steps.reward(run, asked, sampled)
    advantages = grpo.group_advantages(rewards, config.group_size)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, config.seed * 1_000_003 + config.step)
    scores = scope.redistribution_score(sampled.logprobs.exp(), advantages[:, None]) * sampled.mask
    return Step(run, asked[:: config.group_size], sampled, correct, advantages, selection.selected, selection.marked,
                scores)
