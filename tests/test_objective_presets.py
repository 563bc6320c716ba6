"""Presets by name, the arguments that they share, and the parts that are written in two ways."""

import dataclasses
import inspect
import io
import pickle
import warnings

import pytest
import torch

import fusedpo
from fusedpo import objectives as O
from fusedpo.integrations import _common


def test_presets_are_the_functions_of_the_module():
    functions = {
        name for name in O.__all__ if inspect.isfunction(preset := getattr(O, name)) and preset.__module__ == O.__name__
    }
    assert set(O.PRESETS) == functions - {"available", "make"}
    assert all(getattr(O, name) is preset for name, preset in O.PRESETS.items())
    assert not any({"low", "high"} & set(inspect.signature(preset).parameters) for preset in O.PRESETS.values())


@pytest.mark.parametrize("name", O.OLD_NAMES)
def test_old_names_warn_at_the_line_that_used_them(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old = O.PRESETS[name](low=0.01, high=0.02)
        (own,) = {w.filename for w in caught}
        assert own == __file__
    assert [str(w.message) for w in caught] == [f"{name}: {x} is called clip_{x} now" for x in ("low", "high")]
    assert old == O.PRESETS[name](clip_low=0.01, clip_high=0.02) == O.PRESETS[name](0.01, 0.02)
    with (
        pytest.warns(DeprecationWarning, match="low"),
        pytest.raises(TypeError, match="low and clip_low are the same argument"),
    ):
        O.PRESETS[name](low=0.01, clip_low=0.02)


def test_old_names_in_the_options_of_an_adapter():
    thresholds = {"low": 0.3, "high": 0.4, "clip_low": 0.1}
    assert _common.objective("gmpo", thresholds=thresholds) == O.gmpo(0.3, 0.4)
    with pytest.warns(DeprecationWarning, match="gmpo: low is called clip_low now"):
        assert _common.objective("gmpo", {"low": 0.2}, thresholds=thresholds) == O.gmpo(0.2, 0.4)
    assert _common.for_function({"low": 1, "other": 2}, O.gmpo) == {"low": 1}
    _common.check_options("gmpo", ["low", "clip_low"], O.gmpo)
    with pytest.raises(ValueError, match="ppo has no option 'low'"):
        _common.check_options("ppo", ["low"], O.ppo)


def test_a_forward_trace_is_a_trace():
    part = O.ForwardTrace(4, differentiate=True)
    assert isinstance(part, O.Trace)
    assert (part.back, part.ahead, part.n) == (0, 3, 4)
    assert repr(part) == "ForwardTrace(n=4, differentiate=True)"
    assert part == O.ForwardTrace(4, True) != O.ForwardTrace(4)
    assert hash(part) == hash(O.ForwardTrace(4, True))
    assert part != O.Trace(0, 3, True)
    assert dataclasses.replace(part, n=2) == O.ForwardTrace(2, True)
    assert vars(part) == {"n": 4, "differentiate": True}
    assert O.ForwardTrace(2**63).ahead == "all"


def test_it_is_saved_and_loaded():
    objective, file = O.nfpo(3), io.BytesIO()
    assert pickle.loads(pickle.dumps(objective)) == objective
    torch.save(objective, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded == objective
    assert loaded.ratio.ahead == 2


def test_it_can_be_built_and_used_where_torch_compile_traces():
    x, old, advantages = torch.randn(3, 2, 5).unbind()

    @torch.compile(fullgraph=True, backend="eager")
    def loss(x):
        return fusedpo.policy_loss(x, old, advantages, objective=O.nfpo(3)).loss

    @torch.compile(fullgraph=True, backend="eager")
    def loss_of(x, objective):
        return fusedpo.policy_loss(x, old, advantages, objective=objective).loss

    want = fusedpo.policy_loss(x, old, advantages, objective=O.nfpo(3)).loss
    assert torch.equal(loss(x), want)
    assert torch.equal(loss_of(x, O.nfpo(3)), want)
    assert torch.equal(loss_of(x, O.dppo_kl(clip_low=0.1)), loss_of(x, O.dppo_kl(0.1)))
