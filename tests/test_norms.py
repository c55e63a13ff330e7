"""RMS norms in few launches give what the modules give; whatever only looks like one stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from refusalscope.inputs import norms
from refusalscope.inputs.chat import Batch, ChatModel
from refusalscope.mechanism.attribution import gradient, trace
from tests import families, tiny

RMS = [family for family in families.FAMILIES if family != "neox"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def language_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """With norms as uneven as trained ones: those of a fresh model are all ones, which hides what is rounded when."""
    model = families.language_model(family, dtype=dtype)
    for seed, module in enumerate(modules(model)):
        module.weight.data += (0.3 * drawn(*module.weight.shape, seed=seed)).to(dtype)
    return model


def chat_model(family: str, dtype: torch.dtype = torch.float32) -> ChatModel:
    """With its norms replaced as on a card."""
    model = ChatModel(language_model(family, dtype), tiny.tokenizer(), name="tiny", identity="tiny")
    assert model._norms == {}
    model._norms = norms.fused(model.model, "cpu")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", RMS)
def test_every_norm_is_recognised_and_gives_its_own_results(family: str, dtype: torch.dtype) -> None:
    model = language_model(family, dtype).to(DEVICE)
    found = norms.fused(model, DEVICE)
    assert set(found) == set(modules(model))
    for module, norm in found.items():
        inputs = 7 * drawn(2, 5, 3, module.weight.numel(), seed=1).to(DEVICE, dtype)  # type: ignore[reportCallIssue]
        own, ours = results(module, inputs), results(norm, inputs)
        if dtype == torch.float32:
            for theirs, mine in zip(own, ours, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        else:
            assert ours[0].dtype == own[0].dtype
            assert (ours[0] == own[0]).float().mean() >= 0.99
            torch.testing.assert_close(ours[1], own[1], rtol=0, atol=0.02 * float(own[1].abs().max()))


def results(norm: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient."""
    given = inputs.clone().requires_grad_(True)
    output = norm(given)
    (found,) = torch.autograd.grad(output, given, drawn(*output.shape, seed=2).to(output))
    return output.detach(), found


@pytest.mark.parametrize("family", RMS)
def test_logits_and_gradients_of_a_model_are_its_own(family: str) -> None:
    model = chat_model(family)
    tokens, found, replaced = model.tokens(tiny.prompts()), [], model._norms
    for model._norms in ({}, replaced):
        logits = model.run(tokens, logits=1).logits
        traced = trace(model, tokens, tiny.direction(), layers=range(4), scheme=gradient())
        found.append((logits, traced.gradient, traced.clean))
    for own, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_a_model_in_half_precision_says_what_it_said(family: str) -> None:
    model = chat_model(family, torch.bfloat16)
    tokens = model.tokens(tiny.prompts())
    ours = model.run(tokens, logits=1).logits
    model._norms = {}
    own = model.run(tokens, logits=1).logits
    assert (ours == own).float().mean() >= 0.99


@pytest.mark.parametrize(("weight", "given"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_inputs_of_another_type_are_left_to_the_module(weight: str, given: str) -> None:
    module = LlamaRMSNorm(16).to(getattr(torch, weight))
    (norm,) = norms.fused(module, "cpu").values()
    inputs = drawn(3, 16).to(getattr(torch, given))
    assert norm(inputs).dtype == module(inputs).dtype == torch.float32
    assert norm(inputs).equal(module(inputs))


class Lookalike(nn.Module):
    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(16))


class MeanRMSNorm(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class OutsideRMSNorm(Lookalike):
    """Adds `eps` after the root: the same but for small inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class AllRMSNorm(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + self.eps)


class FlatRMSNorm(Lookalike):
    """Takes rows alone."""

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = x.shape
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1).view(rows, 1) + self.eps)


class GateRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


class BiasRMSNorm(LlamaRMSNorm):
    def __init__(self) -> None:
        super().__init__(16)
        self.register_buffer("bias", torch.zeros(16))


class NoEpsRMSNorm(LlamaRMSNorm):
    def __init__(self) -> None:
        super().__init__(16)
        self.variance_epsilon: Any = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states


class WideRMSNorm(LlamaRMSNorm):
    """Gives float32, whatever it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).float()


def offloaded() -> nn.Module:
    module = LlamaRMSNorm(16)
    module.forward = module.forward  # type: ignore[method-assign]
    return module


LOOKALIKES: list[Callable[[], nn.Module]] = [
    *(lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16, eps=1e-6), offloaded, lambda: LlamaRMSNorm(16).to("meta")),
    *(MeanRMSNorm, OutsideRMSNorm, AllRMSNorm, FlatRMSNorm, BiasRMSNorm, NoEpsRMSNorm),
    *(lambda: GateRMSNorm(16), lambda: WideRMSNorm(16).bfloat16(), lambda: LlamaRMSNorm(16).double()),
]


@pytest.mark.parametrize("make", LOOKALIKES)
def test_what_only_looks_like_one_stays_as_it_is(make: Callable[[], nn.Module]) -> None:
    assert norms.fused(nn.Sequential(make()), "cpu") == {}


def test_a_model_without_rms_norms_has_none() -> None:
    assert norms.fused(families.language_model("neox"), "cpu") == {}


def test_only_norms_on_such_a_device_are_replaced() -> None:
    model = nn.Sequential(LlamaRMSNorm(16))
    assert norms.fused(model) == {}
    assert list(norms.fused(model, "cpu")) == [model[0]]


def test_modules_are_as_they_were_whatever_happens_inside() -> None:
    model = chat_model("gemma2")
    seen: list[bool] = []

    def fail(_residual: Tensor, _batch: Batch) -> Tensor:
        seen.extend(vars(module)["forward"] is norm for module, norm in model._norms.items())
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        model.run(model.tokens(tiny.prompts()), edits={0: fail})
    assert seen == [True] * 17
    assert not any("forward" in vars(module) for module in modules(model.model))


def test_one_inside_the_other_ends_with_the_outer() -> None:
    module = LlamaRMSNorm(16)
    found = norms.fused(module, "cpu")
    with norms.quick(found):
        with norms.quick(found):
            pass
        assert vars(module)["forward"] is found[module]
    assert "forward" not in vars(module)


def test_a_forward_that_came_later_is_kept() -> None:
    module = LlamaRMSNorm(16)
    found = norms.fused(module, "cpu")
    module.forward = later = module.forward  # type: ignore[method-assign]
    with norms.quick(found):
        assert module.forward is later
    assert module.forward is later


def test_finding_draws_no_numbers_and_leaves_no_graph() -> None:
    module = LlamaRMSNorm(16)
    state = torch.get_rng_state()
    (norm,) = norms.fused(module, "cpu").values()
    assert torch.get_rng_state().equal(state)
    assert not norm(drawn(3, 16)).requires_grad


def test_a_cap_on_attention_logits_is_kept() -> None:
    made = families.language_model("gemma2")
    ids = torch.arange(20, 40)[None]
    eager = made(ids).logits
    made.config._attn_implementation = "sdpa"  # as some versions of transformers would have it
    model = ChatModel(made, tiny.tokenizer(), name="tiny", identity="tiny")
    assert model.model.config._attn_implementation == "eager"
    assert model.model(ids).logits.equal(eager)


def test_attention_without_a_cap_stays_as_it_is() -> None:
    assert tiny.chat_model("llama").model.config._attn_implementation == "sdpa"
