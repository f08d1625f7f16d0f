"""Optimizers by name, learning rates by component and pattern, and learning rate schedules.

Optimizers whose package is not installed are skipped; the error message for a missing package is always tested.
"""

import copy
import io
import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lora_diffusion.config.train import OptimizerConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.training.loop import new_accelerator
from lora_diffusion.training.optim.lr_groups import find_frozen, resolve_peak_rates
from lora_diffusion.training.optim.lr_schedule import lr_fraction
from lora_diffusion.training.optim.optimizers import KINDS, evaluation_mode, new_optimizer

MODULES = (
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.1.attentions.0.proj_in",
    "unet.mid_block.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
)
NAMES = tuple(f"{module}.{factor}" for module in MODULES for factor in ("down", "up"))
ENCODERS = ("text_encoder", "text_encoder_2")


def config_of(**settings: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate(settings)


def fresh(size: int = 8) -> dict[str, nn.Parameter]:
    """Make initial factors: normal `down`, zero `up`."""
    rng = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(size, size, generator=rng) for name in NAMES}
    return {name: nn.Parameter(x if name.endswith("down") else torch.zeros_like(x)) for name, x in drawn.items()}


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], number: int) -> None:
    """Take one step with gradients that depend on the parameters and the step number alone."""
    rng = torch.Generator().manual_seed(number)
    for p in parameters.values():
        p.grad = p.detach() + torch.randn(p.shape, generator=rng) if p.requires_grad else None
    optimizer.step()


def runnable(kind: str) -> str:
    """Return the optimizer name; skip the test if its package is missing or it needs another device."""
    pytest.importorskip(KINDS[kind][0].partition(".")[0])
    if kind.startswith("paged"):
        pytest.skip("needs a GPU")
    return kind


def rates_in(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_default_is_adamw_with_a_tenth_of_the_rate_for_text_encoders() -> None:
    ours, theirs = fresh(), fresh()
    optimizer = new_optimizer(ours, OptimizerConfig(), ENCODERS)
    oracle = torch.optim.AdamW(
        [
            {"params": [p for name, p in theirs.items() if name.startswith("unet.")], "lr": 1e-4},
            {"params": [p for name, p in theirs.items() if not name.startswith("unet.")], "lr": 1e-5},
        ],
        weight_decay=0.01,
    )
    for number in range(3):
        step(optimizer, ours, number)
        step(oracle, theirs, number)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-9) for name in NAMES)


@given(
    rate=st.floats(1e-6, 1),
    text=st.one_of(st.none(), st.floats(1e-6, 1), st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1))),
    factors=st.dictionaries(
        st.sampled_from(["*", "unet.*", "*.up", "unet.down_blocks", "*.proj_in", MODULES[2], "text_encoder.*"]),
        st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    ),
)
def test_every_parameter_has_its_rate_and_equal_rates_share_a_group(
    rate: float, text: float | tuple[float, float] | None, factors: dict[str, float]
) -> None:
    assume(factors.get("*") != 0.0)
    parameters = fresh(1)
    config = config_of(learning_rate=rate, text_encoder_learning_rate=text, rates=factors)
    rates, optimizer = resolve_peak_rates(NAMES, config, ENCODERS), new_optimizer(parameters, config, ENCODERS)
    encoders = text if isinstance(text, tuple) else (text if text is not None else rate * 0.1,) * 2
    component = {"unet": rate, **dict(zip(ENCODERS, encoders, strict=True))}
    named = {
        "*": bool,
        "unet.*": lambda name: name.startswith("unet."),
        "*.up": lambda name: name.endswith(".up"),
        "unet.down_blocks": lambda name: name.startswith("unet.down_blocks."),
        "*.proj_in": lambda name: ".proj_in." in name,
        MODULES[2]: lambda name: name.startswith(MODULES[2] + "."),
        "text_encoder.*": lambda name: name.startswith("text_encoder."),
    }
    for name in NAMES:
        factor = math.prod(value for pattern, value in factors.items() if named[pattern](name))
        assert rates[name] == pytest.approx(component[name.partition(".")[0]] * factor, rel=1e-12)
    inside = rates_in(optimizer)
    assert inside == {id(parameters[name]): rates[name] for name in NAMES if rates[name] > 0}
    assert len(optimizer.param_groups) == len({group["lr"] for group in optimizer.param_groups})
    frozen = find_frozen(NAMES, config)
    assert set(frozen) == {name for name, p in parameters.items() if id(p) not in inside}
    assert all(p.requires_grad == (name not in frozen) for name, p in parameters.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"text_encoder_learning_rate": (1e-5, 1e-5, 1e-5)},
            "has 3 values; expected one.*, or 2 values.*text_encoder_2",
        ),
        ({"text_encoder_learning_rate": (1e-5,)}, "has 1 values"),
        ({"rates": {"unet.down_block.*": 0.5}}, "matches no trained module; did you mean 'unet.down_blocks'"),
        ({"rates": {"*.proj_inn": 0.5}}, r"did you mean '\*.proj_in'"),
        ({"rates": {"*": 0.0}}, "freezes all trained parameters"),
        ({"kind": "adamm"}, "did you mean 'adamw'"),
        ({"kind": "torch.optim.AdanW"}, "torch.optim has no optimizer 'AdanW'"),
        ({"kind": "torch.nn:Linear"}, "torch.nn has no optimizer 'Linear'"),
        ({"kind": "no_such_package.Adam"}, "needs no_such_package, which cannot be imported.*check its spelling"),
        ({"options": {"betaz": [0.9, 0.99]}}, "AdamW has no option 'betaz'; did you mean 'betas'"),
        ({"options": {"quux": 1}}, "expected one of betas, eps"),
        ({"options": {"lr": 1}}, "set optimizer.learning_rate instead"),
        ({"options": {"weight_decay": 1}}, "set optimizer.weight_decay instead"),
        ({"options": {"betas": [2.0, 0.99]}}, "AdamW rejects"),
        ({"kind": "torch.optim.Rprop"}, "Rprop has no weight decay; set optimizer.weight_decay to 0"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_optimizer(fresh(1), config_of(**settings), ENCODERS)


def test_rate_of_untrained_text_encoders_is_rejected() -> None:
    unet = {name: p for name, p in fresh(1).items() if name.startswith("unet.")}
    with pytest.raises(ConfigError, match="no text encoder is trained"):
        new_optimizer(unet, config_of(text_encoder_learning_rate=1e-5), ENCODERS)
    new_optimizer(unet, OptimizerConfig(), ENCODERS)


@pytest.mark.parametrize("kind", ["prodigy", "lion", "schedule-free", "adamw-8bit"])
def test_error_names_the_missing_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = KINDS[kind][0].partition(".")[0]
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{kind}.*cannot be imported.*pip install {package}"):
        new_optimizer(fresh(1), config_of(kind=kind), ENCODERS)


@pytest.mark.parametrize("path", ["torch.optim.SGD", "torch.optim:SGD"])
def test_optimizer_by_import_path_gets_its_options(path: str) -> None:
    config = config_of(kind=path, options={"momentum": 0.9}, weight_decay=0.0, learning_rate=0.5)
    optimizer = new_optimizer(fresh(1), config, ENCODERS)
    assert type(optimizer) is torch.optim.SGD
    assert all(group["momentum"] == 0.9 and group["weight_decay"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit", "adafactor", "lion", "schedule-free"])
def test_first_step_moves_zero_factors_by_the_learning_rate(kind: str) -> None:
    parameters = {name: p for name, p in fresh(64).items() if name.startswith("unet.")}
    optimizer = new_optimizer(parameters, config_of(kind=runnable(kind), learning_rate=1e-3), ())
    step(optimizer, parameters, 0)
    for name, p in parameters.items():
        if name.endswith(".up"):
            moved = float(p.detach().square().mean().sqrt())
            assert moved == pytest.approx(1e-3, rel=0.1)  # Adafactor's second moment is a rank-one estimate


@pytest.mark.parametrize("kind", [*KINDS])
def test_resumed_optimizer_is_bit_identical(kind: str) -> None:
    config = config_of(kind=runnable(kind), rates={"unet.mid_block.*": 0.0})
    straight, parts = fresh(64), fresh(64)
    first, optimizer = new_optimizer(parts, config, ENCODERS), new_optimizer(straight, config, ENCODERS)
    for number in range(6):
        step(optimizer, straight, number)
    for number in range(3):
        step(first, parts, number)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "parameters": parts}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in state["parameters"].items()}
    second = new_optimizer(resumed, config, ENCODERS)
    second.load_state_dict(state["optimizer"])
    for number in range(3, 6):
        step(second, resumed, number)
    assert all(torch.equal(straight[name], resumed[name]) for name in NAMES)
    assert all(torch.equal(straight[name], fresh(64)[name]) == ("mid_block" in name) for name in NAMES)


@pytest.mark.parametrize("kind", [*KINDS])
def test_evaluation_mode_does_not_change_the_run(kind: str) -> None:
    config = config_of(kind=runnable(kind), learning_rate=1e-2)
    unseen, seen = fresh(64), fresh(64)
    plain = new_optimizer(unseen, config, ENCODERS)
    wrapped = new_accelerator(cpu=True).prepare(new_optimizer(seen, config, ENCODERS))
    for number in range(5):
        step(plain, unseen, number)
        step(wrapped, seen, number)
        trained = copy.deepcopy(seen)
        with evaluation_mode(wrapped):
            same = all(torch.equal(trained[name], seen[name]) for name in NAMES)
        assert same == (kind != "schedule-free" or number == 0)  # the average of one step is the step itself
        assert all(torch.equal(trained[name], seen[name]) for name in NAMES)
    assert all(torch.equal(unseen[name], seen[name]) for name in NAMES)


def test_schedule_free_evaluates_the_average_of_its_steps() -> None:
    """With a constant rate, x is the mean of the iterates z [arXiv:2405.15682, eq. 5]."""
    parameters = fresh()
    optimizer = new_optimizer(parameters, config_of(kind=runnable("schedule-free")), ENCODERS)
    points: list[torch.Tensor] = []
    up = parameters[NAMES[1]]
    for number in range(6):
        step(optimizer, parameters, number)
        points.append(optimizer.state[up]["z"].clone())
    with evaluation_mode(optimizer):
        # x is computed from y and z, whose difference is divided by 0.9
        torch.testing.assert_close(up.detach(), torch.stack(points).mean(0), rtol=0, atol=40 * 2**-24 * 1e-3)


def test_prodigy_estimates_the_learning_rate() -> None:
    """On a quadratic function, the step size grows by orders of magnitude and the minimum is nearly reached."""
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = new_optimizer({"unet.x.up": p}, config_of(kind=runnable("prodigy"), weight_decay=0.0), ())
    goal = torch.ones(4, 4)
    for _ in range(200):
        p.grad = p.detach() - goal
        optimizer.step()
    assert optimizer.param_groups[0]["d"] > 1e3 * optimizer.param_groups[0]["d0"]
    assert float((p.detach() - goal).abs().max()) < 0.1


def test_prodigy_supports_one_rate_only() -> None:
    kind = runnable("prodigy")
    optimizer = new_optimizer(fresh(1), config_of(kind=kind), ENCODERS)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0]
    new_optimizer(fresh(1), config_of(kind=kind, rates={"unet.mid_block.*": 0.0}), ENCODERS)
    for settings in ({"text_encoder_learning_rate": 0.5}, {"rates": {"unet.mid_block.*": 0.5}}):
        with pytest.raises(ConfigError, match="finds one learning rate"):
            new_optimizer(fresh(1), config_of(kind=kind, **settings), ENCODERS)


def test_paged_optimizer_needs_a_gpu() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match="use 'adamw-8bit'"):
        new_optimizer(fresh(1), config_of(kind="paged-adamw-8bit"), ENCODERS)


def test_optimizers_have_their_own_defaults() -> None:
    assert config_of(kind="prodigy").learning_rate == config_of(kind="prodigy").embedding_learning_rate == 1
    assert config_of(kind="prodigy", learning_rate=0.5).learning_rate == 0.5
    free = config_of(kind="schedule-free")
    assert free.schedule == "constant"
    assert OptimizerConfig.model_validate(free.model_dump(mode="json")) == free
    for settings in ({"schedule": "cosine"}, {"ema_decay": 0.9}):
        with pytest.raises(ValidationError, match="a mean of its own"):
            config_of(kind="schedule-free", **settings)


@pytest.mark.parametrize(
    ("schedule", "oracle"),
    [
        ("constant", lambda o, config, _steps: get_constant_schedule_with_warmup(o, config.warmup_steps)),
        ("linear", lambda o, config, steps: get_linear_schedule_with_warmup(o, config.warmup_steps, steps)),
        ("cosine", lambda o, config, steps: get_cosine_schedule_with_warmup(o, config.warmup_steps, steps)),
        (
            "restarts",
            lambda o, config, steps: get_cosine_with_hard_restarts_schedule_with_warmup(
                o, config.warmup_steps, steps, config.restarts + 1
            ),
        ),
    ],
)
@pytest.mark.parametrize(("steps", "warmup", "restarts"), [(50, 0, 1), (50, 7, 3), (1, 0, 1), (13, 12, 2)])
def test_schedules_after_warmup_agree_with_transformers(
    schedule: str, oracle: Callable[..., torch.optim.lr_scheduler.LambdaLR], steps: int, warmup: int, restarts: int
) -> None:
    config = config_of(schedule=schedule, warmup_steps=warmup, restarts=restarts)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = oracle(optimizer, config, steps)
    for number in range(steps + 1):
        if number >= warmup:
            assert lr_fraction(number, config, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine", "restarts"]),
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    restarts=st.integers(1, 5),
)
def test_rates_rise_to_the_peak_and_stay_within_it(schedule: str, steps: int, warmup: int, restarts: int) -> None:
    config = config_of(schedule=schedule, warmup_steps=warmup, restarts=restarts)
    rates = [lr_fraction(number, config, steps) for number in range(steps + 1)]
    rising = rates[: warmup + 1]
    assert all(0 <= rate <= 1 for rate in rates) and rates[0] > 0
    assert rising == sorted(rising)
    if warmup < steps:
        assert rates[warmup] == 1
        assert rates[-1] == (1 if schedule == "constant" else 0)
    if schedule == "restarts" and steps - warmup >= 4 * (restarts + 1):
        rises = sum(after > before for before, after in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
        assert rises == restarts
