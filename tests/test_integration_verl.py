"""verl: what fusedpo registers agrees with verl's own functions, in value and gradient, and is reached by name.

Install verl without its dependencies (``pip install --no-deps verl``), then codetiming, omegaconf, orjson, ray and
tensordict.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import fusedpo
from fusedpo import backends
from fusedpo.integrations import _common, _versions, verl_plugin
from fusedpo.integrations import verl as adapter

core_algos = pytest.importorskip(
    "verl.trainer.ppo.core_algos", reason="verl, or something it imports, is not installed", exc_type=ImportError
)
np = pytest.importorskip("numpy")
functional = pytest.importorskip("verl.utils.torch_functional")
experimental = pytest.importorskip("verl.utils.experimental.torch_functional")
from omegaconf import OmegaConf  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32 sums of 60 terms; verl divides by counts + 1e-8
ROWS, WIDTH = 6, 10
LENGTHS = torch.tensor([10, 1, 7, 4, 9, 2])
MASK = torch.arange(WIDTH) < LENGTHS[:, None]
GLOBAL = {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16, "loss_scale_factor": 25}
MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
SHARED = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "dro", "cispo", "clip_cov", "kl_cov")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registered, with no options left over from another test."""
    monkeypatch.delenv("FUSEDPO_VERL", raising=False)
    monkeypatch.setattr(adapter, "_registered", {})
    adapter.register()


def actor(info=None, policy_loss=None, **settings):
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy_loss
        or PolicyLossConfig(dro_beta=0.3, clip_cov_ratio=1.0, clip_cov_lb=0.05, kl_cov_ratio=0.2),
        **settings,
    )
    config.global_batch_info.update(info or {})
    return config


def batch(spread=0.8):
    old = -torch.rand(ROWS, WIDTH) * 2 - 0.1
    advantages = torch.randn(ROWS, WIDTH)
    logprobs = (old + spread * torch.randn(ROWS, WIDTH)).clamp(max=-1e-3)
    return {"old_log_prob": old, "log_prob": logprobs, "advantages": advantages, "response_mask": MASK}


def value_and_gradient(name, tensors, mode, config, weights=None):
    logprobs = tensors["log_prob"].clone().requires_grad_()
    given = {**tensors, "log_prob": logprobs, "rollout_is_weights": weights}
    loss, metrics = core_algos.get_policy_loss_fn(name)(**given, loss_agg_mode=mode, config=config)
    (0.7 * loss).backward()
    return loss.detach(), logprobs.grad, metrics


def assert_same(name, tensors, mode, config, weights=None):
    want = value_and_gradient(name, tensors, mode, config, weights)
    got = value_and_gradient("fusedpo_" + name, tensors, mode, config, weights)
    assert want[1].abs().sum() > 0
    torch.testing.assert_close(got[0], want[0], **CLOSE)
    torch.testing.assert_close(got[1], want[1], **CLOSE)
    return got[2], want[2]


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHARED)
def test_losses_agree(name, mode, info):
    config = actor(info, clip_ratio_low=0.15, clip_ratio_high=0.3, clip_ratio_c=2.0, tau_pos=0.9, tau_neg=1.3)
    ours, theirs = assert_same(name, batch(), mode, config)
    if name not in ("gpg", "kl_cov"):  # one has no metrics in verl, the other takes |lp - olp|
        assert ours["actor/ppo_kl"] == pytest.approx(theirs["actor/ppo_kl"], rel=1e-4, abs=1e-6)
    if name == "vanilla":  # verl counts the dual clip apart
        clipped = theirs["actor/pg_clipfrac"] + theirs["actor/pg_clipfrac_lower"]
        assert ours["actor/pg_clipfrac"] == pytest.approx(clipped, rel=1e-5)
        assert theirs["actor/pg_clipfrac_lower"] > 0
    if name == "clip_cov":
        assert theirs["actor/pg_clipfrac"] > 0  # it drew some
    if name in ("dppo_tv", "dppo_kl", "gspo", "cispo"):
        assert ours["actor/pg_clipfrac"] == pytest.approx(theirs["actor/pg_clipfrac"], rel=1e-5)


@pytest.mark.parametrize("name", [*SHARED, "geo_mean"])
def test_rollout_weights_agree(name):
    """The weights of a mismatch with the rollout engine multiply the policy term."""
    mode = "seq-mean-token-mean" if name == "geo_mean" else "token-mean"
    tensors = batch()
    if name == "geo_mean":
        tensors["advantages"] = tensors["advantages"][:, :1].expand(ROWS, WIDTH)
    assert_same(name, tensors, mode, actor(), weights=torch.rand(ROWS, WIDTH) + 0.5)


def test_geo_mean_agrees_and_knows_the_global_batch():
    """verl's own ignores ``global_batch_info``, so that its gradient grows with the number of micro-batches."""
    tensors = batch(spread=0.3)
    tensors["advantages"] = tensors["advantages"][:, :1].expand(ROWS, WIDTH)
    config = actor(clip_ratio_low=0.15, clip_ratio_high=0.3)
    assert_same("geo_mean", tensors, "token-mean", config)
    local = value_and_gradient("fusedpo_geo_mean", tensors, "token-mean", config)
    scaled = value_and_gradient(
        "fusedpo_geo_mean", tensors, "token-mean", actor(GLOBAL, clip_ratio_low=0.15, clip_ratio_high=0.3)
    )
    torch.testing.assert_close(scaled[0], local[0] * ROWS / GLOBAL["global_batch_size"] * GLOBAL["dp_size"])
    torch.testing.assert_close(scaled[1], local[1] * ROWS / GLOBAL["global_batch_size"] * GLOBAL["dp_size"])


@pytest.mark.parametrize("name", ["vanilla", "nfpo"])
def test_micro_batches_add_up(name):
    config = actor({"dp_size": 1, "batch_num_tokens": int(MASK.sum()), "global_batch_size": ROWS})
    tensors = batch()
    loss, gradient, _ = value_and_gradient("fusedpo_" + name, tensors, "token-mean", config)
    parts = [{key: value[rows] for key, value in tensors.items()} for rows in (slice(0, 2), slice(2, None))]
    results = [value_and_gradient("fusedpo_" + name, part, "token-mean", config) for part in parts]
    torch.testing.assert_close(sum(r[0] for r in results), loss, **CLOSE)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), gradient, **CLOSE)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_count_of_the_global_batch_is_needed(mode):
    missing = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    for name in ("vanilla", "fusedpo_ppo"):
        with pytest.raises(ValueError, match=missing):
            value_and_gradient(name, batch(), mode, actor({"dp_size": 2}))


def test_garbage_at_masked_tokens_and_an_empty_micro_batch():
    tensors = batch()
    clean = value_and_gradient("fusedpo_nfpo", tensors, "token-mean", actor())
    for key in ("old_log_prob", "log_prob", "advantages"):
        tensors[key] = tensors[key].masked_fill(~MASK, float("nan"))
    dirty = value_and_gradient("fusedpo_nfpo", tensors, "token-mean", actor())
    torch.testing.assert_close(dirty[:2], clean[:2], rtol=0, atol=0)
    tensors["response_mask"] = torch.zeros_like(MASK)
    loss, gradient, _ = value_and_gradient("fusedpo_nfpo", tensors, "token-mean", actor())
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("preset", sorted(_common.PRESETS))
def test_every_preset_runs_by_name(preset):
    """With verl's thresholds and aggregation, and the preset's own defaults for the rest."""
    options = {"delta": 4.0} if preset == "two_sided_grpo" else {}
    adapter.register(**{preset: options})
    tensors = batch()
    if preset == "gmpo":
        tensors["advantages"] = tensors["advantages"][:, :1].expand(ROWS, WIDTH)
    config = actor(clip_ratio_low=0.15, clip_ratio_high=0.3, clip_ratio_c=2.0)
    loss, gradient, metrics = value_and_gradient("fusedpo_" + preset, tensors, "seq-mean-token-mean", config)
    assert gradient[MASK].any()
    assert all(isinstance(value, float) for value in metrics.values())
    own = {"clip_low": 0.15, "clip_high": 0.3, "low": 0.15, "high": 0.3, "dual": 2.0, "cap": 2.0, "beta": 0.3}
    own = {key: value for key, value in own.items() if key in _common.THRESHOLDS.get(preset, ())}
    own = {{"low": "clip_low", "high": "clip_high"}.get(key, key): value for key, value in own.items()}
    objective = _common.objective(preset, {**own, **options}, aggregation="seq-mean-token-mean")
    want = fusedpo.policy_loss(
        tensors["log_prob"], tensors["old_log_prob"], tensors["advantages"], objective=objective, mask=MASK
    )
    torch.testing.assert_close(loss, want.loss)


# -------------------------------------------------------------------------------------------------------------- options


def nfpo_loss(config):
    torch.manual_seed(1)
    return value_and_gradient("fusedpo_nfpo", batch(), "token-mean", config)[0]


def want_nfpo(n):
    torch.manual_seed(1)
    tensors = batch()
    return fusedpo.policy_loss(
        tensors["log_prob"],
        tensors["old_log_prob"],
        tensors["advantages"],
        objective=fusedpo.objectives.nfpo(n, 0.2, 0.2),
        mask=MASK,
    ).loss


def test_options_of_losses(monkeypatch):
    """The configuration counts before register(), and that before the environment."""
    assert len({float(want_nfpo(n)) for n in (2, 3, 4, 6)}) == 4
    torch.testing.assert_close(nfpo_loss(actor()), want_nfpo(4))  # the preset's default
    monkeypatch.setenv("FUSEDPO_VERL", "nfpo.n=2, maxpo.k=3, maxpo.scale=unbiased")
    adapter.register()
    torch.testing.assert_close(nfpo_loss(actor()), want_nfpo(2))
    assert adapter._registered["maxpo"] == {"k": 3, "scale": "unbiased"}
    adapter.register(nfpo={"n": 3})
    torch.testing.assert_close(nfpo_loss(actor()), want_nfpo(3))
    configured = adapter.policy_loss_config(fusedpo={"n": 6}, loss_mode="fusedpo_nfpo")
    assert isinstance(configured, PolicyLossConfig)
    torch.testing.assert_close(nfpo_loss(actor(policy_loss=configured)), want_nfpo(6))


def test_options_that_do_not_exist(monkeypatch):
    with pytest.raises(ValueError, match="nfpo has no option 'window'"):
        adapter.register(nfpo={"window": 3})
    with pytest.raises(ValueError, match="'nfqo' is neither"):
        adapter.register(nfqo={"n": 3})
    assert adapter._registered == {}
    configured = adapter.policy_loss_config(fusedpo={"window": 3}, loss_mode="fusedpo_nfpo")
    with pytest.raises(ValueError, match="nfpo has no option 'window'"):
        nfpo_loss(actor(policy_loss=configured))
    with pytest.raises(ValueError, match="'k'"):
        advantage("fusedpo_maxpo", AlgoConfig())
    monkeypatch.setenv("FUSEDPO_VERL", "nfpo=3")
    with pytest.raises(ValueError, match="FUSEDPO_VERL must look like"):
        adapter.register()


# ----------------------------------------------------------------------------------------------------------- advantages

UIDS = np.array([f"prompt-{i}" for i in (1, 0, 1, 1, 0, 0)], dtype=object)
IDS = torch.tensor([1, 0, 1, 1, 0, 0])
OUTCOMES = torch.tensor([1.0, 0.0, 0.5, -1.0, 1.0, 0.25])
REWARDS = torch.zeros(ROWS, WIDTH).scatter(1, LENGTHS[:, None] - 1, OUTCOMES[:, None])


def advantage(name, config, rewards=REWARDS, mask=MASK):
    return core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards.clone(), response_mask=mask.float(), index=UIDS, config=config
    )


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("name", ["rloo", "opo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline"])
def test_advantages_agree(name, std):
    config = AlgoConfig(norm_adv_by_std_in_grpo=std)
    for got, want in zip(advantage("fusedpo_" + name, config), advantage(name, config), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("std", [True, False])
def test_grpo_agrees(std):
    want, _ = core_algos.compute_grpo_outcome_advantage(
        REWARDS.clone(), MASK.float(), UIDS, norm_adv_by_std_in_grpo=std
    )
    got, returns = advantage("fusedpo_grpo", AlgoConfig(norm_adv_by_std_in_grpo=std))
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(returns, want, **CLOSE)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_agrees(gamma):
    rewards, config = torch.randn(ROWS, WIDTH) * MASK, AlgoConfig(gamma=gamma)
    got = advantage("fusedpo_reinforce_plus_plus", config, rewards)
    want = advantage("reinforce_plus_plus", config, rewards)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs * MASK, **CLOSE)


def test_maxpo_by_every_kind_of_configuration():
    want = fusedpo.advantages.to_tokens(fusedpo.advantages.maxpo(OUTCOMES, k=2, group_ids=IDS), MASK)
    assert want.any()
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "gamma": 1.0, "fusedpo": {"k": 2}})
    OmegaConf.set_struct(config, True)  # as hydra leaves it
    torch.testing.assert_close(advantage("fusedpo_maxpo", config)[0], want)
    adapter.register(maxpo={"k": 2})
    torch.testing.assert_close(advantage("fusedpo_maxpo", AlgoConfig())[0], want)
    OmegaConf.set_struct(config, False)
    del config["fusedpo"]
    OmegaConf.set_struct(config, True)
    torch.testing.assert_close(advantage("fusedpo_maxpo", config)[0], want)


@pytest.mark.parametrize("name", adapter.ESTIMATORS)
def test_every_estimator_runs_by_name(name):
    options = {"k": 2} if name in ("maxpo", "pkpo", "passk", "order_statistic") else {}
    if name == "order_statistic":
        options["weights"] = [0.25, 0.75]
    adapter.register(**{name: options})
    binary = (OUTCOMES > 0).float()
    rewards = torch.zeros(ROWS, WIDTH).scatter(1, LENGTHS[:, None] - 1, binary[:, None])
    result, returns = advantage("fusedpo_" + name, AlgoConfig(), rewards)
    assert result.shape == returns.shape == MASK.shape
    assert result.isfinite().all()
    assert not result[~MASK].any()


def test_groups_need_an_index():
    with pytest.raises(ValueError, match="index"):
        core_algos.get_adv_estimator_fn("fusedpo_rloo")(REWARDS, MASK.float(), None, AlgoConfig())


# ------------------------------------------------------------------------------------------------------------ log-probs


def test_logprobs_and_entropy():
    logits, labels = torch.randn(3, 7, 101), torch.randint(0, 101, (3, 7))
    for ours, theirs, arguments in (
        (adapter.logprobs_from_logits, functional.logprobs_from_logits, (labels,)),
        (adapter.entropy_from_logits, functional.entropy_from_logits, ()),
    ):
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        upstream = torch.randn(3, 7)
        got, want = ours(a * 1, *arguments), theirs(b * 1, *arguments)
        torch.testing.assert_close(got, want)
        got.backward(upstream)
        want.backward(upstream)
        torch.testing.assert_close(a.grad, b.grad)
    flat = logits.flatten(0, 1)
    torch.testing.assert_close(
        adapter.entropy_from_logits_with_chunking(flat, chunk_size=4),
        functional.entropy_from_logits_with_chunking(flat, chunk_size=4),
    )


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason="the reference writes nothing in place")
def test_inplace_backward():
    """True, verl's default, writes into the logits; False leaves them."""
    labels = torch.randint(0, 11, (5,))
    for inplace in (True, False):
        leaf = torch.randn(5, 11, requires_grad=True)
        logits = leaf * 1
        before = logits.detach().clone()
        adapter.logprobs_from_logits(logits, labels, inplace_backward=inplace).sum().backward()
        assert torch.equal(logits.detach(), before) is not inplace


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_fused_linear(rows):
    upstream = torch.randn(2, *rows)
    results = []
    for module in (adapter.FusedLinearForPPO(chunk_size=4), experimental.FusedLinearForPPO(chunk_size=4)):
        torch.manual_seed(2)
        hidden, weight = torch.randn(*rows, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
        logprobs, entropy = module(hidden, weight, torch.arange(6).reshape(rows), temperature=0.7)
        (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def train():
    path = Path(__file__).parents[1] / "examples" / "train_with_verl_losses.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda loss, advantage, steps: module.train(
        Namespace(loss_mode=loss, adv_estimator=advantage, steps=steps, seed=0)
    )


def test_the_training_curve_does_not_change(train):
    """The same samples step by step, as long as rounding moves none of 640 draws over a boundary; a few may move."""
    theirs, ours = train("vanilla", "rloo", 12), train("fusedpo_vanilla", "fusedpo_rloo", 12)
    assert ours == pytest.approx(theirs, abs=0.02)
    assert ours[-1] > ours[0] + 0.3


def test_nfpo_and_maxpo_train(train):
    rewards = train("fusedpo_nfpo", "fusedpo_maxpo", 20)
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.5


# ------------------------------------------------------------------------------------------------- patches, the plugin


def functions_of_verl():
    """Every attribute of a loaded module of verl that is one of the patched objects."""
    names = ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking", "FusedLinearForPPO")
    return {
        (module, name): vars(sys.modules[module])[name]
        for module in sorted(sys.modules)
        if module.split(".")[0] == "verl" and sys.modules[module] is not None
        for name in names
        if name in vars(sys.modules[module])
    }


def test_patch_and_unpatch_leave_no_trace(monkeypatch):
    copy = types.ModuleType("verl._copy_of_a_name")  # from verl.utils.torch_functional import logprobs_from_logits
    copy.logprobs_from_logits = functional.logprobs_from_logits
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    before = functions_of_verl()
    adapter.patch_verl()
    try:
        patched = functions_of_verl()
        assert patched.keys() == before.keys()
        assert all(patched[key] is getattr(adapter, key[1]) for key in before)
        late = types.ModuleType("verl._loaded_while_patched")
        late.logprobs_from_logits = functional.logprobs_from_logits
        monkeypatch.setitem(sys.modules, late.__name__, late)
        adapter.patch_verl()  # twice is as once
    finally:
        adapter.unpatch_verl()
    after = functions_of_verl()
    assert after.pop((late.__name__, "logprobs_from_logits")) is before[copy.__name__, "logprobs_from_logits"]
    assert after == before


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_plugin_is_light():
    run(
        "import sys, torch, fusedpo.integrations.verl_plugin\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'verl', 'ray', 'transformers', 'tensordict', 'omegaconf', 'trl', 'vllm', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'fusedpo.integrations.verl' not in sys.modules\n"
    )


@pytest.mark.slow
def test_the_plugin_follows_verl_and_a_failure_shows():
    """verl loads it during ``import verl``, before its registry; here by the variable that names modules to load."""
    done = run(
        "import os\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as names\n"
        "print('vanilla' in names, 'fusedpo_nfpo' in names)\n"
        "del os.environ['FUSEDPO_VERL']\n"
        "from fusedpo.integrations import verl_plugin\n"
        "verl_plugin.register()\n"
        "print('fusedpo_nfpo' in names)\n",
        VERL_USE_EXTERNAL_MODULES="fusedpo.integrations.verl_plugin",
        FUSEDPO_VERL="nfpo.window=3",
    )
    assert done.stdout.split() == ["True", "False", "True"]
    assert done.stderr.count("verl has no fusedpo_* losses and advantages") == 1
    assert "nfpo has no option 'window'" in done.stderr


def test_the_plugin_registers_once_the_registry_has_run(monkeypatch, tmp_path):
    """The hook by itself, with a package in the place of verl: afterwards it is gone from ``sys.meta_path``."""
    package = tmp_path / "registry_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "registry.py").write_text("ready = True")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    monkeypatch.setattr(verl_plugin, "REGISTRY", "registry_package.registry")
    monkeypatch.setattr(verl_plugin, "register", lambda: seen.append(sys.modules["registry_package.registry"].ready))
    hook = verl_plugin.AfterImport()
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    importlib.import_module("registry_package")
    for _ in range(2):  # asking where it is loads nothing
        spec = importlib.util.find_spec("registry_package.registry")
        assert (spec.name, spec.origin) == ("registry_package.registry", str(package / "registry.py"))
        assert "ready = True" in spec.loader.get_source(spec.name)
    assert importlib.util.find_spec("registry_package.nothing") is None
    (package / "registry.py").write_text("raise RuntimeError('this import fails')")
    with pytest.raises(RuntimeError, match="this import fails"):
        importlib.import_module("registry_package.registry")
    assert seen == []
    (package / "registry.py").write_text("ready = True  # by now")
    module = importlib.import_module("registry_package.registry")
    assert seen == [True]
    assert hook not in sys.meta_path
    assert type(module.__loader__).__module__ == type(module.__spec__.loader).__module__ != verl_plugin.__name__


@pytest.mark.slow
def test_the_plugin_survives_a_look_for_the_registry():
    done = run(
        "import importlib.util\n"
        "from fusedpo.integrations import verl_plugin\n"
        "importlib.util.find_spec(verl_plugin.REGISTRY)\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as names\n"
        "print('fusedpo_nfpo' in names)\n",
        VERL_USE_EXTERNAL_PLUGINS="0",
    )
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize(
    ("found", "warned"), [("0.9.1", False), ("0.8.9", True), ("0.10", True), ("0.10.0rc1", True), (None, True)]
)
def test_versions_outside_the_tested_range_warn_once(monkeypatch, found, warned):
    def version(package):
        if found is None:
            raise _versions.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(_versions, "version", version)
    _versions.check_version.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter.register()
        adapter.register()
    _versions.check_version.cache_clear()
    assert len(caught) == warned
    if warned:
        assert "verl>=0.9,<0.10" in str(caught[0].message)
