"""Policies: formats by role, recipes, overrides by path; values that compare, hash, copy and pickle."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

import lowprec as lp
from lowprec.policy import matches


def test_roles_are_formats() -> None:
    policy = lp.Policy("e4m3fn", weight=lp.format("1-4-3"), activation_grad=torch.float8_e5m2)
    assert policy.activation == lp.format("e4m3fn")
    assert policy.weight == lp.format("1-4-3")
    assert policy.activation_grad == lp.format("e5m2")
    assert policy.weight_grad is None
    assert not policy.overrides


def test_recipes() -> None:
    assert list(lp.recipes) == ["bf16", "fp8", "fp8-forward", "fp8-sampled", "mxfp8", "nvfp4"]
    forward, gradient = lp.format("1-4-3:emax=8"), lp.format("1-5-2:emax=1")
    assert lp.Policy.recipe("bf16") == lp.Policy("bf16", "bf16", "bf16", "bf16")
    assert lp.Policy.recipe("fp8") == lp.Policy(forward, forward, gradient, gradient)
    assert lp.Policy.recipe("fp8-forward") == lp.Policy(forward, forward)
    assert all(lp.Policy.recipe(name) is policy for name, policy in lp.recipes.items())


def test_values() -> None:
    policy = lp.Policy("1-4-3", "1-3-4", overrides={"head": None, "layers.*": "fp8"})
    same = lp.Policy("1-4-3", "1-3-4", overrides={"head": None, "layers.*": lp.recipes["fp8"]})
    assert policy == same
    assert hash(policy) == hash(same)
    assert policy != lp.Policy("1-4-3", "1-3-4", overrides={"layers.*": "fp8", "head": None}), "the order counts"
    assert policy != lp.Policy("1-4-3", "1-3-4")
    assert policy != "fp8"
    for copied in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy), copy.copy(policy)):
        assert copied == policy
        assert list(copied.overrides) == ["head", "layers.*"]
    assert dataclasses.replace(policy, weight=None) == lp.Policy("1-4-3", overrides=dict(policy.overrides))


def test_frozen() -> None:
    policy = lp.Policy("1-4-3", overrides=(given := {"head": None}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.weight = lp.format("1-4-3")
    with pytest.raises(TypeError):
        policy.overrides["head"] = policy
    given["body"] = None
    assert list(policy.overrides) == ["head"]


def test_repr_evaluates_to_the_policy() -> None:
    policy = lp.Policy("1-4-3", weight_grad="1-5-2:emax=1", overrides={"head": None, "body": lp.Policy("bf16")})
    assert eval(repr(policy), {"Policy": lp.Policy}) == policy
    assert repr(lp.Policy()) == "Policy()"


def test_empty() -> None:
    assert lp.Policy().is_empty
    assert lp.Policy(overrides={"head": "fp8"}).is_empty
    assert not lp.Policy(weight_grad="1-4-3").is_empty


@pytest.mark.parametrize(
    ("pattern", "path", "covers"),
    [
        ("head", "head", True),
        ("head", "head.linear", True),
        ("head", "ahead", False),
        ("head", "body.head", False),
        ("*.head", "body.head", True),
        ("*.head", "head", False),
        ("*head", "head", True),
        ("layers.*", "layers", True),
        ("layers.*", "layers.0.linear", True),
        ("layers.*", "", False),
        ("layers.[01]", "layers.1.linear", True),
        ("layers.[01]", "layers.2", False),
        ("layers.?", "layers.10", False),
        ("Head", "head", False),
        ("*", "", True),
        ("", "anything", True),
    ],
)
def test_patterns(pattern: str, path: str, covers: bool) -> None:
    assert matches(pattern, path) == covers


def test_the_first_pattern_wins_with_all_beneath_it() -> None:
    inner, outer = lp.Policy("1-5-2"), lp.Policy("1-4-3")
    policy = lp.Policy("bf16", overrides={"a.b": inner, "a": outer, "a.c": None})
    paths = {"": policy, "a": outer, "a.b": inner, "a.b.x": inner, "a.c": outer, "d": policy}
    assert {path: policy.for_module(path) for path in paths} == paths
    assert lp.Policy("bf16", overrides={"a": None}).for_module("a.b") is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"activation": "1-9"}, ValueError, "activation: unknown format '1-9'"),
        ({"weight": 8}, TypeError, "weight: expected a format"),
        ({"overrides": [("a", None)]}, TypeError, "overrides must be a mapping from patterns to policies, got list"),
        ({"overrides": {3: None}}, TypeError, "a pattern of overrides must be a string, got 3"),
        ({"overrides": {"a": 8}}, TypeError, "overrides['a'] must be a Policy or the name of a recipe, got int"),
        (
            {"overrides": {"a": "fp9"}},
            ValueError,
            "recipe must be one of bf16, fp8, fp8-forward, fp8-sampled, mxfp8, nvfp4, got 'fp9'",
        ),
        ({"overrides": {"a": lp.Policy(overrides={"b": None})}}, ValueError, "overrides['a'] has overrides of its own"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        lp.Policy(**arguments)
    assert str(raised.value).startswith(message)
