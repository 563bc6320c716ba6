"""Objectives by name and as plain data, numbers for parts, and hints for the names that others use."""

import json

import pytest
import torch

import fusedpo
from fusedpo import objectives as O

yaml = pytest.importorskip("yaml")
NEEDED = {"dro": {"beta": 0.5}}
LOGPROBS, OLD, ADVANTAGES = (x - 1 for x in torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)).unbind())


def odd_ones() -> dict[str, O.Objective]:
    """What no preset has: both ends of a trace, a KL with all its options, bounds that JSON has no number for."""
    return {
        "trace": O.Objective(O.Trace("all", 3), O.LogClip(0.1, 0.2, None, 0.5), O.KL("k3+", 0.1, 10.0, True), 0.01),
        "no clip above": O.ppo(0.2, float("inf"), dual=3.0),
        "length": O.dr_grpo(length_norm=4096, kl=0.04),
        "differentiated": O.nfpo(8, differentiate=True, trust_region=O.BinaryTV(0.1, 0.2, cap=None)),
    }


@pytest.mark.parametrize("dump", [(json.dumps, json.loads), (yaml.safe_dump, yaml.safe_load)], ids=["json", "yaml"])
def test_every_objective_survives_a_configuration_file(dump):
    write, read = dump
    presets = {name: O.make(name, **NEEDED.get(name, {})) for name in O.available()}
    for name, objective in {**presets, **odd_ones()}.items():
        assert O.Objective.from_dict(read(write(objective.to_dict()))) == objective, name


def test_what_is_left_out_has_its_default():
    assert O.Objective.from_dict({}) == O.Objective()
    got = O.Objective.from_dict({"ratio": {"type": "ForwardTrace", "n": 4}, "kl": 0.04})
    assert got == O.nfpo(4, kl=O.KL("k3", 0.04))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], TypeError, r"Objective must be given as a dict, got \[\]"),
        ({"ratios": {}}, TypeError, r"Objective has no 'ratios', it has .*; did you mean ratio\?"),
        ({"beta": 0.1}, TypeError, r"did you mean kl, "),
        ({"ratio": {"n": 4}}, ValueError, "ratio must be a dict with a type among .*'ForwardTrace'"),
        ({"ratio": "ForwardTrace"}, ValueError, "ratio must be a dict with a type among"),
        ({"trust_region": {"type": "PPOclip"}}, ValueError, r"did you mean PPOClip\?"),
        ({"trust_region": {"type": "PPOClip", "epsilon": 0.1}}, TypeError, r"did you mean clip_low and clip_high\?"),
        ({"ratio": {"type": "ForwardTrace", "n": 4, "ahead": 2}}, TypeError, "ForwardTrace has no 'ahead'"),
        ({"trust_region": {"type": "PPOClip", "low": "0.2"}}, TypeError, "PPOClip: low must be a float, got str"),
        ({"kl": {"coeff": 0.1}}, TypeError, r"KL has no 'coeff', .*; did you mean coef\?"),
    ],
)
def test_errors_of_plain_data(values, error, message):
    with pytest.raises(error, match=message):
        O.Objective.from_dict(values)


def test_make_is_the_preset():
    assert O.make("nfpo", n=4, clip_high=0.28) == O.nfpo(4, clip_high=0.28)
    assert O.available() == tuple(sorted(O.PRESETS))
    with pytest.raises(ValueError, match=r"name must be one of cispo, .*; got 'grop'; did you mean grpo\?"):
        O.make("grop")
    with pytest.raises(TypeError, match="name must be a str, got Objective"):
        O.make(O.ppo())


@pytest.mark.parametrize(
    ("preset", "argument", "hint"),
    [
        ("grpo", "beta", "kl, the coefficient of k3 or a KL"),
        ("grpo", "epsilon", "clip_low and clip_high"),
        ("dapo", "epsilon_high", "clip_high, how far the ratio may rise above 1"),
        ("grpo", "delta", "delta of two_sided_grpo, or dual of ppo and dapo"),
        ("dr_grpo", "max_completion_length", "length_norm of dr_grpo"),
        ("ppo", "loss_agg_mode", "aggregation"),
        ("nfpo", "temperature", "temperature of policy_loss_from_logits"),
        ("ppo", "clip_hihg", "clip_high"),
    ],
)
def test_the_names_of_others_are_understood(preset, argument, hint):
    for call in (lambda: O.PRESETS[preset](**{argument: 0.1}), lambda: O.make(preset, **{argument: 0.1})):
        with pytest.raises(TypeError, match=rf"{preset} has no argument '{argument}', it has \[.*did you mean {hint}"):
            call()
    with pytest.raises(TypeError, match=r"grpo has no argument 'zzz', it has \[.*\]$"):
        O.grpo(zzz=1)
    with pytest.raises(TypeError, match="defaults must be among .*did you mean kl"):
        fusedpo.nn.PolicyLoss("grpo", beta=0.04)


def test_a_number_is_a_kl():
    assert O.grpo(kl=0.04) == O.grpo(kl=O.KL("k3", 0.04))
    assert O.nfpo(kl=1).kl == O.Objective(kl=1.0).kl == O.KL("k3", 1)
    assert O.ppo(kl=0.0).kl is None
    for wrong in (True, "k3"):
        with pytest.raises(TypeError, match="Objective: kl must be a KL, a float or None"):
            O.reinforce(kl=wrong)


def test_a_name_is_taken_where_an_objective_is():
    weight, ids = torch.randn(7, 3), torch.randint(0, 7, (2, 5))
    hidden = torch.randn(2, 5, 3)
    calls = (
        lambda objective: fusedpo.policy_loss(LOGPROBS, OLD, ADVANTAGES, objective=objective).loss,
        lambda objective: (
            fusedpo.policy_loss_from_logits(hidden @ weight.T, ids, OLD, ADVANTAGES, objective=objective).loss
        ),
        lambda objective: (
            fusedpo.policy_loss_from_hidden(hidden, weight, ids, OLD, ADVANTAGES, objective=objective).loss
        ),
        lambda objective: fusedpo.nn.PolicyLoss(objective)(LOGPROBS, OLD, ADVANTAGES).loss,
        lambda objective: fusedpo.global_denominator(ADVANTAGES > -0.5, objective),
    )
    for call in calls:
        assert torch.equal(call("gspo"), call(O.gspo()))
        assert not torch.equal(call("gspo"), call("dapo"))
        with pytest.raises(ValueError, match=r"did you mean gspo\?"):
            call("gpso")
        with pytest.raises(TypeError, match="objective must be a fusedpo.Objective or a preset's name, got int"):
            call(3)


def test_names_and_numbers_work_where_torch_compile_traces():
    @torch.compile(fullgraph=True, backend="eager")
    def loss(x):
        own = O.grpo(clip_low=0.1, kl=0.1)
        by_name = fusedpo.policy_loss(x, OLD, ADVANTAGES, objective="gspo").loss
        return by_name + fusedpo.policy_loss(x, OLD, ADVANTAGES, objective=own, ref_logprobs=OLD).loss

    own = O.grpo(0.1, kl=O.KL("k3", 0.1))
    want = fusedpo.policy_loss(LOGPROBS, OLD, ADVANTAGES, objective=O.gspo()).loss
    want = want + fusedpo.policy_loss(LOGPROBS, OLD, ADVANTAGES, objective=own, ref_logprobs=OLD).loss
    assert torch.equal(loss(LOGPROBS), want)


def test_metrics_are_floats_in_one_wait(monkeypatch):
    out = fusedpo.policy_loss(LOGPROBS, OLD, ADVANTAGES, objective="ppo")
    waits = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(x.shape) or tolist(x))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: waits.append(x.shape))
    got = fusedpo.to_floats({"loss": out.loss, **out.metrics, "lr": 0.1})
    assert len(waits) == 1
    monkeypatch.undo()
    assert got == {"loss": float(out.loss.detach()), **{k: float(v) for k, v in out.metrics.items()}, "lr": 0.1}
    assert list(got) == ["loss", *out.metrics, "lr"]
    assert fusedpo.to_floats({"wide": torch.tensor(1 / 3, dtype=torch.float64), "n": torch.tensor(3)}) == {
        "wide": 1 / 3,
        "n": 3.0,
    }
    assert fusedpo.to_floats({}) == {}
    with pytest.raises(ValueError, match=r"metrics\['x'\] must have shape \[\]"):
        fusedpo.to_floats({"x": torch.ones(2)})
