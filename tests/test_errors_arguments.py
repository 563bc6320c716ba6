"""What arguments may be: kinds of tensors, numbers of NumPy and of YAML, numbers that float32 does not hold."""

import io
import sys

import numpy as np
import pytest
import torch

import fusedpo
from fusedpo import _checks, advantages, corrections, covariance, objectives
from fusedpo.backends import NATIVE_MISSING
from fusedpo.objectives import CISPO, DRO, KL, SAPO, VESPO, ForwardTrace, LogClip, Objective, PPOClip, Trace
from fusedpo.ops.policy_loss import encode

B, T, V, H = 2, 4, 9, 5
TENSORS = {
    "logits": torch.randn(B, T, V),
    "hidden": torch.randn(B, T, H),
    "weight": torch.randn(V, H),
    "bias": torch.randn(V),
    "token_ids": torch.randint(0, V, (B, T)),
    "logprobs": -torch.rand(B, T),
    "old_logprobs": -torch.rand(B, T),
    "advantages": torch.randn(B, T),
    "mask": torch.ones(B, T),
    "ref_logprobs": -torch.rand(B, T),
    "is_weights": torch.rand(B, T),
    "entropy": torch.rand(B, T),
    "temperature": torch.rand(B, T) + 0.5,
    "loss_scale": torch.tensor(1.5),
    "denominator": torch.tensor(3.0),
    "values": torch.rand(B, T),
    "old_values": torch.rand(B, T),
    "returns": torch.rand(B, T),
    "tokens": torch.rand(B, T),
    "rollout_logprobs": -torch.rand(B, T),
    "rewards": torch.rand(B * 4),
    "lengths": torch.arange(B * 4),
    "group_ids": torch.arange(B * 4) // 4,
}
LOSS = ("old_logprobs", "advantages", "mask", "ref_logprobs", "is_weights", "loss_scale", "denominator")
OBJECTIVE = objectives.nfpo(2, kl=KL("k3", 0.1), entropy_coef=0.1)

# The functions, and the tensors that they take, those that may be differentiated first.
FUNCTIONS = {
    "policy_loss": (lambda **x: fusedpo.policy_loss(objective=OBJECTIVE, **x).loss, ("logprobs", "entropy", *LOSS)),
    "policy_loss_from_logits": (
        lambda **x: fusedpo.policy_loss_from_logits(objective=OBJECTIVE, **x).loss,
        ("logits", "token_ids", "temperature", *LOSS),
    ),
    "policy_loss_from_hidden": (
        lambda **x: fusedpo.policy_loss_from_hidden(objective=OBJECTIVE, **x).loss,
        ("hidden", "weight", "bias", "token_ids", "temperature", *LOSS),
    ),
    "token_logprobs": (lambda **x: fusedpo.token_logprobs(**x), ("logits", "token_ids", "temperature", "mask")),
    "linear_token_logprobs": (
        lambda **x: fusedpo.linear_token_logprobs(**x),
        ("hidden", "weight", "bias", "token_ids", "temperature", "mask"),
    ),
    "value_loss": (
        lambda **x: fusedpo.value_loss(clip=0.2, **x).loss,
        ("values", "old_values", "returns", "mask", "loss_scale", "denominator"),
    ),
    "aggregate": (lambda **x: fusedpo.aggregate(**x), ("tokens", "mask", "denominator")),
    "kl_cov_penalty": (
        lambda **x: covariance.kl_cov_penalty(**x),
        ("logprobs", "old_logprobs", "advantages", "mask"),
    ),
    "importance_weights": (
        lambda **x: corrections.importance_weights(**x)[0],
        ("old_logprobs", "rollout_logprobs", "mask"),
    ),
    "opo": (lambda **x: advantages.opo(**x), ("rewards", "lengths", "group_ids")),
}
every = pytest.mark.parametrize(("function", "names"), FUNCTIONS.values(), ids=FUNCTIONS)
implementations = pytest.mark.parametrize("backend", ["auto", "reference"])


# ----------------------------------------------------------------------------------------------------- kinds of tensors


def kinds(x):
    if x.is_floating_point() and x.dim() == 2:
        yield x.to_mkldnn()
    if x.dim() == 2:
        yield torch.nested.as_nested_tensor(list(x), layout=torch.jagged)
        yield torch.nested.as_nested_tensor(list(x))
    yield x.to_sparse() if x.dim() else x[None].to_sparse()
    yield x.to(torch.complex64)
    yield x.float().to(torch.float8_e4m3fn)
    yield torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)
    yield torch.zeros(x.shape, dtype=torch.uint16)


@every
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_kinds_of_tensors_are_refused_by_name(function, names):
    arguments = {name: TENSORS[name] for name in names}
    for name, given in arguments.items():
        for kind in kinds(given):
            with pytest.raises(TypeError, match=rf"^{name} must be|^{name} must have"):
                function(**{**arguments, name: kind})


@every
@implementations
def test_tensors_made_under_inference_mode_are_taken(function, names, backend):
    arguments = {name: TENSORS[name] for name in names}
    with torch.inference_mode():
        made = {name: x.clone() for name, x in arguments.items()}
    source = arguments[names[0]]
    with fusedpo.backend(backend):
        for name in names[1:]:
            x = source.clone().requires_grad_(source.is_floating_point() and function is not FUNCTIONS["opo"][0])
            given, expected = (function(**{**arguments, names[0]: x, name: y}) for y in (made[name], arguments[name]))
            assert torch.equal(given, expected)
            if given.requires_grad:
                gradients = (torch.autograd.grad(y.sum(), x)[0] for y in (given, expected))
                assert torch.equal(*gradients), name
        # all of them at once, and nothing is differentiated
        assert torch.equal(function(**made), function(**arguments))
        with torch.inference_mode():
            assert torch.equal(function(**made), function(**arguments))


# -------------------------------------------------------------------------------------------------------------- numbers


def loss(**options):
    tensors = {name: TENSORS[name] for name in ("logits", "token_ids", "old_logprobs", "advantages")}
    return fusedpo.policy_loss_from_logits(**{**tensors, "objective": objectives.ppo(), **options}).loss


@implementations
@pytest.mark.parametrize("number", [np.float32, np.float64, lambda x: np.array(x, dtype=np.float32)])
def test_numpy_numbers_are_numbers_to_advantages(number, backend):
    def numbers(of, whole) -> list[torch.Tensor]:
        r, rows = torch.arange(12).float().square(), torch.arange(12).float().view(3, 4) / 8
        half, one, four = of(0.5), of(1.0), whole(4)
        return [
            advantages.grpo(r, group_size=four, eps=half),
            advantages.maxpo(r, group_size=four, k=whole(2)),
            advantages.order_statistic(r, group_size=four, k=whole(2), weights=[half, one]),
            advantages.pkpo(r, group_size=four, k=whole(2)),
            *advantages.gae(rows, rows, gamma=half, lam=half),
            *advantages.vtrace(
                rows, rows, logprobs=rows, old_logprobs=rows, gamma=half, lam=one, rho_bar=half, c_bar=half
            ),
            advantages.reward_to_go(rows, gamma=half),
            advantages.reinforce_plus_plus(rows, gamma=half),
        ]

    with fusedpo.backend(backend):
        assert all(map(torch.equal, numbers(number, np.int64), numbers(float, int)))
        r = torch.arange(8).float().square()
        given, same = (
            advantages.order_statistic(r, group_size=4, k=2, weights=weights)
            for weights in (np.array([0.25, 0.5]), [0.25, 0.5])
        )
        assert torch.equal(given, same)


@pytest.mark.parametrize("number", [np.float32, np.float64, lambda x: np.array(x, dtype=np.float32)])
def test_numpy_numbers_are_numbers(number):
    def equal(a, b):
        assert torch.equal(a, b)

    equal(
        loss(temperature=number(0.75), denominator=number(3), loss_scale=number(0.5)),
        loss(temperature=0.75, denominator=3.0, loss_scale=0.5),
    )
    parts = Objective(
        ForwardTrace(np.int64(2)), PPOClip(number(0.25), number(0.5), cap=number(2)), KL("k3", number(0.5))
    )
    same = Objective(ForwardTrace(2), PPOClip(0.25, 0.5, cap=2.0), KL("k3", 0.5))
    assert parts == same
    assert hash(parts) == hash(same)
    assert repr(parts) == repr(same)
    assert all(type(value) is float for value in encode(parts)[1])
    hidden = {name: TENSORS[name] for name in ("hidden", "weight", "token_ids")}
    equal(
        fusedpo.linear_token_logprobs(**hidden, softcap=number(4), logit_scale=number(0.5), chunk_tokens=np.int64(3)),
        fusedpo.linear_token_logprobs(**hidden, softcap=4.0, logit_scale=0.5, chunk_tokens=3),
    )
    old, rollout, a = TENSORS["old_logprobs"], TENSORS["rollout_logprobs"], TENSORS["advantages"]
    equal(
        corrections.importance_weights(old, rollout, high=number(1.25))[0],
        corrections.importance_weights(old, rollout, high=1.25)[0],
    )
    equal(
        corrections.rejection_mask(old, rollout, {"token_k1": number(1.25)}),
        corrections.rejection_mask(old, rollout, {"token_k1": 1.25}),
    )
    equal(
        covariance.kl_cov_penalty(old, rollout, a, fraction=number(0.25), coef=number(0.5)),
        covariance.kl_cov_penalty(old, rollout, a, fraction=0.25, coef=0.5),
    )
    equal(fusedpo.value_loss(old, old, a, clip=number(0.25)).loss, fusedpo.value_loss(old, old, a, clip=0.25).loss)
    rewards = TENSORS["rewards"]
    equal(
        advantages.maxpo(rewards, k=np.int64(2), group_size=np.int64(4)), advantages.maxpo(rewards, k=2, group_size=4)
    )
    equal(
        advantages.gae(old, a, gamma=number(0.5), lam=number(0.25))[0], advantages.gae(old, a, gamma=0.5, lam=0.25)[0]
    )


def test_numpy_numbers_are_numbers_when_compiled():
    torch._dynamo.reset()
    objective = objectives.nfpo(np.int64(2), np.float32(0.25))
    compiled = torch.compile(lambda x: fusedpo.policy_loss(x, x, x, objective=objective).loss, backend="aot_eager")
    x = TENSORS["logprobs"]
    torch.testing.assert_close(compiled(x), fusedpo.policy_loss(x, x, x, objective=objectives.nfpo(2, 0.25)).loss)


@pytest.mark.parametrize("wrong", [True, np.bool_(True), "0.5", [0.5], np.ones(1), None, 1j])
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(TypeError, match="temperature must be a float"):
        loss(temperature=wrong)
    with pytest.raises(TypeError, match="PPOClip: low must be a float"):
        PPOClip(low=wrong)
    with pytest.raises(ValueError, match="Trace: back and ahead must be integers"):
        Trace(ahead=wrong)
    with pytest.raises(ValueError, match="ForwardTrace: n must be an integer"):
        ForwardTrace(wrong)


def test_lists_are_tuples():
    old, rollout = TENSORS["old_logprobs"], TENSORS["rollout_logprobs"]
    for criterion in ("token_k1", "seq_mean_k1"):
        as_list, as_tuple = (
            corrections.rejection_mask(old, rollout, {criterion: x}) for x in ([0.8, 1.25], (0.8, 1.25))
        )
        assert torch.equal(as_list, as_tuple)
    for wrong in ([0.8, 1.25, 2.0], [2.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="criteria\\['token_k1'\\] must be \\(low, high\\)"):
            corrections.rejection_mask(old, rollout, {"token_k1": wrong})
    with pytest.raises(ValueError, match="criteria\\['token_k2'\\] must be one number"):
        corrections.rejection_mask(old, rollout, {"token_k2": [0.5, 1.0]})
    rewards = TENSORS["rewards"]
    as_list, as_tuple = (
        advantages.order_statistic(rewards, k=2, weights=w, group_size=4) for w in ([np.float32(0.5), 1], (0.5, 1.0))
    )
    assert torch.equal(as_list, as_tuple)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("wrong", [float("inf"), float("nan"), 0.0, 1e-46, 1e39, -1.0])
def test_temperatures_are_positive_and_finite(wrong, backend):
    tensors = {name: TENSORS[name] for name in ("logits", "token_ids")}
    with fusedpo.backend(backend):
        with pytest.raises(ValueError, match="temperature must be"):
            fusedpo.token_logprobs(**tensors, temperature=wrong)
        for given in (torch.tensor(wrong, dtype=torch.float64), torch.full((B, T), wrong, dtype=torch.float64)):
            for function in (
                lambda given=given: fusedpo.token_logprobs(**tensors, temperature=given),
                lambda given=given: loss(temperature=given),
                lambda given=given: loss(temperature=given, logits=TENSORS["logits"].clone().requires_grad_()),
            ):
                with pytest.raises(ValueError, match="temperature must be positive and finite"):
                    function()


@pytest.mark.parametrize("number", [1e-46, 1e-40, 1e39, -1e-46, 10**400])
def test_numbers_that_float32_does_not_hold_are_refused(number):
    refused = pytest.raises(ValueError, match="range of float32|must be|positive")
    for make in (
        lambda: objectives.dr_grpo(length_norm=number),
        lambda: PPOClip(number),
        lambda: PPOClip(cap=number),
        lambda: CISPO(high=number),
        lambda: LogClip(0.1, 0.1, power=number),
        lambda: KL("k1", number),
        lambda: KL("k1", 1.0, clamp=number),
        lambda: SAPO(number),
        lambda: VESPO(number),
        lambda: DRO(number),
        lambda: objectives.ppo(entropy_coef=number),
        lambda: loss(loss_scale=number),
        lambda: loss(denominator=number),
        lambda: fusedpo.linear_token_logprobs(*(TENSORS[x] for x in ("hidden", "weight", "token_ids")), softcap=number),
        lambda: fusedpo.linear_token_logprobs(
            *(TENSORS[x] for x in ("hidden", "weight", "token_ids")), logit_scale=number
        ),
    ):
        with refused:
            make()


def test_infinite_numbers_are_refused_where_they_are_no_bound():
    for make in (SAPO, VESPO, DRO, lambda x: objectives.dr_grpo(length_norm=x)):
        with pytest.raises(ValueError, match="must be finite"):
            make(float("inf"))
    assert PPOClip(high=float("inf")).high == float("inf")


@implementations
@pytest.mark.parametrize("count", [2**62, 2**63 - 1, 2**64, 10**30, sys.maxsize])
def test_windows_longer_than_any_sequence_are_all_of_it(count, backend):
    x, old, adv = (TENSORS[name] for name in ("logprobs", "old_logprobs", "advantages"))

    def of(ratio):
        return fusedpo.policy_loss(x, old, adv, objective=Objective(ratio)).loss

    with fusedpo.backend(backend):
        assert torch.equal(of(ForwardTrace(count)), of(Trace(0, "all")))
        assert torch.equal(of(Trace(count, count)), of(Trace("all", "all")))
        assert torch.equal(of(Trace(np.uint64(2**63), 0)), of(Trace("all", 0)))
        assert torch.equal(of(ForwardTrace(2**62 - 1)), of(Trace(0, "all")))


# ------------------------------------------------------------------------------------------------------------- messages


def test_messages_are_short():
    many = torch.arange(200_000)
    many[-2] = 0
    huge = "x" * 100_000
    tokens = -torch.rand(int(many[-1]))
    for call in (
        lambda: fusedpo.aggregate(tokens, cu_seqlens=many),
        lambda: Objective(ratio=huge),
        lambda: Objective(trust_region=[1.0] * 100_000),
        lambda: Objective(kl=huge),
        lambda: Objective(aggregation=huge),
        lambda: KL(huge, 0.1),
        lambda: PPOClip(on=huge),
        lambda: ForwardTrace(-(10**4000)),
        lambda: Trace(-(10**4000)),
        lambda: PPOClip(-(10**4000)),
        lambda: fusedpo.backend(huge),
        lambda: fusedpo.nn.PolicyLoss(Objective(), **{huge: 1}),
        lambda: fusedpo.policy_loss(tokens, tokens, tokens, objective=Objective(), reduction=huge),
        lambda: loss(denominator=-(10**4000)),
        lambda: loss(temperature=10**4000),
        lambda: corrections.rejection_mask(tokens, tokens, {huge: 1.0}),
        lambda: corrections.rejection_mask(tokens, tokens, {"token_k2": [1.0] * 100_000}),
        lambda: corrections.importance_weights(tokens, tokens, level=huge),
        lambda: corrections.importance_weights(tokens, tokens, mode=huge),
        lambda: advantages.maxpo(TENSORS["rewards"], k=2, group_size=4, scale=huge),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert len(str(error.value)) < 1000


def test_what_has_no_memory_says_so():
    logits = torch.empty(1, dtype=torch.bfloat16).expand(1 << 20, 1 << 20)
    with pytest.raises(RuntimeError, match="memory"):
        fusedpo.policy_loss_from_logits(
            logits.requires_grad_(),
            torch.zeros(1 << 20, dtype=torch.int64),
            None,
            torch.zeros(1 << 20),
            objective=objectives.ppo(),
        )


# ------------------------------------------------------------------------------------------------- saved and exported


@pytest.mark.parametrize(
    "objective",
    [
        *(getattr(objectives, name)() for name in ("ppo", "gspo", "vespo", "ctpo", "cispo", "sapo", "cppo", "gmpo")),
        *(objectives.dppo_tv(), objectives.dppo_kl(), objectives.opo(), objectives.dro(0.1)),
        objectives.nfpo(3, kl=KL("k3", 0.1, weighted=True)),
    ],
)
def test_objectives_load_with_weights_only(objective):
    file = io.BytesIO()
    torch.save({"objective": objective}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {"objective": objective}


def test_the_numbers_of_an_operator_are_finite():
    parts = [PPOClip(), PPOClip(high=float("inf")), LogClip(0.1, 0.1), objectives.BinaryTV(cap=None), DRO(0.1)]
    for part in parts:
        ratio = objectives.OnPolicy() if isinstance(part, DRO) else objectives.TokenRatio()
        _, values = encode(Objective(ratio, part, KL("k3", 0.1)))
        assert all(abs(value) <= _checks.FLOAT32_MAX for value in values)


def test_exported_programs_hold_finite_numbers_only():
    """AOTInductor writes them into C++, where an infinite one is no literal."""

    class Loss(torch.nn.Module):
        def forward(self, logprobs, old, advantages):
            objective = objectives.dppo_tv(cap=None, length_norm=7.0)
            return fusedpo.policy_loss(logprobs, old, advantages, objective=objective).loss

    given = tuple(TENSORS[name] for name in ("logprobs", "old_logprobs", "advantages"))
    program = torch.export.export(Loss(), given)
    lists = [x for node in program.graph.nodes for x in node.args if isinstance(x, list | tuple)]
    assert all(abs(x) < float("inf") for numbers in lists for x in numbers if isinstance(x, float))
    torch.testing.assert_close(program.module()(*given), Loss()(*given))


@pytest.mark.slow
@pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
def test_aot_inductor_loads_a_compiled_loss(tmp_path):
    class Loss(torch.nn.Module):
        def forward(self, logits, ids, old, advantages):
            objective = objectives.dppo_tv(cap=None, length_norm=7.0)
            return fusedpo.policy_loss_from_logits(logits, ids, old, advantages, objective=objective).loss

    given = tuple(TENSORS[name] for name in ("logits", "token_ids", "old_logprobs", "advantages"))
    program = torch.export.export(Loss(), given)
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "loss.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False},
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*given), Loss()(*given))
