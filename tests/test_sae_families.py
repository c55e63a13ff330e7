"""Every family, bias and normalisation against SAELens's own encoding and decoding of the same folder.

Activations here are in residual units: SAELens's, times what its decoding multiplies each token by.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refusalscope.core.encoding import CHUNK
from refusalscope.core.types import Feature, FeatureSet, SaeSlice
from refusalscope.inputs.chat import Batch
from refusalscope.inputs.saes import LayerSae, SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism import attribution, features, reading
from refusalscope.mechanism.attribution import attribute, gauss_legendre, left_riemann, sound, trace
from refusalscope.mechanism.features import Residuals
from refusalscope.mechanism.interventions import Intervention, ScaleFeatures, SetFeatures, editor
from refusalscope.pipeline import select
from tests import naive, tiny

NORMALISATIONS = (
    "none",
    "expected_average_only_in",
    "constant_norm_rescale",
    "layer_norm",
    "covariance_whitening",
)
CHOSEN = [90, 3, 17, 4, 55, 61]

every = pytest.mark.parametrize(
    ("family", "subtract", "normalise"),
    [(f, s, n) for f in tiny.SAE_FAMILIES for s in (True, False) for n in NORMALISATIONS],
)
kinds = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def residuals(dtype: torch.dtype = torch.float32) -> Tensor:
    """Norms of about 50, and one token of about 1000, as the first token of a chat has."""
    made = 50 / 32**0.5 * torch.randn(7, 5, 32, generator=torch.Generator().manual_seed(1))
    made[0, 0] *= 20
    return made.to(dtype)


def ours_and_theirs(folder: Path, **options: Any) -> tuple[LayerSae, Any]:
    from sae_lens import SAE

    folders = tiny.save_saes(folder, layers=1, **options)
    return SaeBank.from_folders(folders, identity="tiny").layer(0), SAE.load_from_disk(folders[0], dtype="float32")


def edited(sae: LayerSae, residual: Tensor, intervention: Callable[[FeatureSet], Intervention]) -> Tensor:
    wanted = FeatureSet("test", tuple(Feature(0, index) for index in sorted(CHOSEN)), (1.0,) * len(CHOSEN))
    edits = editor(intervention(wanted), layers=1, slices={0: sae.slice(CHOSEN)}).edits
    rows = Batch(tuple(map(str, range(7))), torch.full((7, 5), int(Role.INSTRUCTION)))
    return edits[0](residual, rows)


def assert_near(found: Tensor, expected: Tensor, residual: Tensor, tolerance: float) -> None:
    """To `tolerance` of each token's own norm."""
    assert found.shape == expected.shape
    difference = (found.float() - expected.float()).norm(dim=-1) / residual.float().norm(dim=-1)
    assert difference.max() <= tolerance, f"{difference.max():.2e}"


@kinds
@every
def test_encoding_decoding_and_slices_equal_saelens(
    family: str, subtract: bool, normalise: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sae, theirs = ours_and_theirs(tmp_path, family=family, subtract=subtract, normalise=normalise)
    residual = residuals(dtype)
    expected = naive.in_residual_units(theirs, residual)
    decoded = theirs.decode(theirs.encode(residual))
    active = sae.encode(residual)
    assert_near(active, expected, residual, 1e-5)
    assert_near(sae.decode(active, residual), decoded, residual, 1e-5)
    assert_near(sae.reconstruct(residual), decoded, residual, 1e-5)
    part = sae.slice(CHOSEN)
    assert_near(part.encode(residual), expected[..., CHOSEN], residual, 1e-5)
    assert_near(part.encode_own(residual), theirs.encode(residual)[..., CHOSEN], residual, 1e-5)
    assert 0 < (expected[..., CHOSEN] > 0).sum() < expected[..., CHOSEN].numel()
    assert {value.dtype for value in vars(part).values() if isinstance(value, Tensor)} == {torch.float32, torch.int64}


@every
def test_edits_preserve_the_error(family: str, subtract: bool, normalise: str, tmp_path: Path) -> None:
    """Scaling and setting, in the SAE's own units, equal SAELens's decoding of edited activations plus its error."""
    sae, theirs = ours_and_theirs(tmp_path, family=family, subtract=subtract, normalise=normalise)
    residual = residuals()
    error = residual - theirs(residual)

    def decoded(change: Callable[[Tensor], Tensor]) -> Tensor:
        own = theirs.encode(residual)
        own[..., CHOSEN] = change(own[..., CHOSEN])
        return theirs.decode(own) + error

    scaled = edited(sae, residual, lambda wanted: ScaleFeatures(wanted, -2.0))
    assert_near(scaled, decoded(lambda own: -2.0 * own), residual, 1e-4)
    constant = edited(sae, residual, lambda wanted: SetFeatures(wanted, 1.5))
    assert_near(constant, decoded(lambda own: torch.full_like(own, 1.5)), residual, 1e-4)
    assert (scaled != residual).any()
    assert (constant != residual).all(-1).all()


@kinds
@every
def test_scaling_by_one_changes_no_bit(
    family: str, subtract: bool, normalise: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sae, _ = ours_and_theirs(tmp_path, family=family, subtract=subtract, normalise=normalise)
    residual = residuals(dtype)
    assert torch.equal(edited(sae, residual, lambda wanted: ScaleFeatures(wanted, 1.0)), residual)


@every
def test_a_token_of_zeros_stays_finite(family: str, subtract: bool, normalise: str, tmp_path: Path) -> None:
    """Padding is all zeros in some models, and what an edit makes of it must not reach other tokens as NaN."""
    sae, _ = ours_and_theirs(tmp_path, family=family, subtract=subtract, normalise=normalise)
    zeros = torch.zeros(7, 5, 32)
    assert sae.encode(zeros).isfinite().all()
    torch.testing.assert_close(sae.slice(CHOSEN).encode(zeros), sae.encode(zeros)[..., CHOSEN])
    assert edited(sae, zeros, lambda wanted: SetFeatures(wanted, 1.5)).isfinite().all()


@pytest.mark.parametrize("family", ["topk", "topk-rescaled"])
def test_features_that_are_not_among_the_largest_are_silent(family: str, tmp_path: Path) -> None:
    sae, theirs = ours_and_theirs(tmp_path, family=family)
    residual = residuals()
    own = theirs.encode(residual)
    part = sae.slice(CHOSEN)
    positive = residual.float() @ part.encoder[:, part.features] + part.bias[part.features] > 0
    silent = own[..., CHOSEN] == 0
    assert (positive & silent).sum() > 10
    assert torch.equal(part.encode(residual) == 0, silent)
    assert (sae.encode(residual) > 0).sum(-1).max() <= 8


def test_a_part_of_a_topk_slice_shares_its_encoder(tmp_path: Path) -> None:
    sae, _ = ours_and_theirs(tmp_path, family="topk")
    whole = sae.slice(CHOSEN)
    part = whole.take([17, 90])
    assert part.encoder.data_ptr() == whole.encoder.data_ptr()
    assert torch.equal(part.encode(residuals()), whole.encode(residuals())[..., [2, 0]])


def test_a_topk_slice_encodes_any_number_of_tokens(tmp_path: Path) -> None:
    sae, _ = ours_and_theirs(tmp_path, family="topk")
    part, residual = sae.slice(CHOSEN), residuals()
    many = residual.view(-1, 32).repeat(CHUNK // 35 + 2, 1)
    assert len(many) > CHUNK
    torch.testing.assert_close(part.encode(many)[:35], part.encode(residual).view(35, -1))
    torch.testing.assert_close(sae.reconstruct(many)[-35:], sae.reconstruct(residual).view(35, -1))
    assert part.encode(residual[0, 0]).shape == (len(CHOSEN),)
    assert part.encode(residual[:0]).shape == (0, 5, len(CHOSEN))


def test_weights_are_read_in_float32(tmp_path: Path) -> None:
    from sae_lens import SAE

    folders = tiny.save_saes(tmp_path, layers=1)
    bank = SaeBank({0: lambda device: SAE.load_from_disk(folders[0], dtype="bfloat16")}, identity="tiny")
    assert bank.layer(0).encode(residuals()).dtype == torch.float32
    assert bank.layer(0).slice(CHOSEN).threshold.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "normalise"),
    [("topk", "none"), ("gated", "none"), ("jumprelu", "layer_norm"), ("topk-rescaled", "constant_norm_rescale")],
)
@pytest.mark.parametrize("scheme", ["sound", "paper"])
def test_factored_equals_naive(family: str, normalise: str, scheme: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    rule, chosen = (gauss_legendre(5), sound()) if scheme == "sound" else (left_riemann(10), attribution.paper())
    model, direction, prompts = tiny.chat_model(), tiny.direction(), tiny.prompts()
    folders = tiny.save_saes(tmp_path, family=family, normalise=normalise)
    saes = SaeBank.from_folders(folders, identity="tiny")
    ours = attribute(model, saes, prompts, direction, scheme=chosen, batch_size=len(prompts))
    theirs = {layer: SAE.load_from_disk(folder, dtype="float32") for layer, folder in folders.items()}
    for sae in theirs.values():
        if family == "topk-rescaled":
            sae.fold_W_dec_norm()
    tokens = model.tokens(prompts)
    oracle = naive.attribute(
        model.model,
        dict(enumerate(model.layers)),
        theirs,
        tokens,
        direction.unit,
        metric=(ours.answer, ours.refusal),
        nodes=rule.nodes,
        weights=rule.weights,
        ends_after_removal=scheme == "sound",
    )
    for layer, expected in oracle.attribution.items():
        expected = expected.detach() * tokens.mask[..., None]
        here = ours.layer == layer
        dense = torch.zeros_like(expected)
        at = (ours.prompt[here].long(), ours.position[here].long() + expected.shape[1], ours.feature[here].long())
        dense[at] = ours.value[here]
        # Which features are active may differ by rounding at a threshold, in one of a thousand at most.
        far = (dense - expected).abs() > 1e-4 * expected.abs().max()
        assert far.sum() <= 1e-3 * (expected != 0).sum(), f"layer {layer}: {int(far.sum())}"
        assert expected.abs().max() > 0


@pytest.mark.parametrize("family", ["topk", "jumprelu"])
def test_totals_are_the_attributions_summed_and_the_rest_of_the_way(family: str, tmp_path: Path) -> None:
    model, direction = tiny.chat_model(), tiny.direction()
    saes = tiny.bank(tmp_path, family=family, normalise="layer_norm")
    part = trace(model, model.tokens(tiny.prompts()), direction, layers=range(4), scheme=sound())
    for layer in range(4):
        totals = reading.layer_totals(saes.layer(layer), [part])
        entries = reading.layer_entries(saes.layer(layer), [part], None)[0]
        listed = torch.zeros(len(part.prompt_ids)).index_add_(0, entries.prompt, entries.value)
        torch.testing.assert_close(listed, totals.features, atol=1e-3, rtol=1e-3)
        way = ((part.patched - part.clean) * part.gradient)[layer].sum(-1)
        whole = (way * (part.roles != Role.PADDING)).sum(1)
        torch.testing.assert_close(totals.features + totals.error, whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_a_factor_that_is_missing_is_noted(normalise: str, tmp_path: Path) -> None:
    sae, theirs = ours_and_theirs(tmp_path, normalise=normalise)
    missing = normalise in ("expected_average_only_in", "covariance_whitening")
    assert (normalise in sae.note) == missing
    assert bool(sae.note) == missing
    if normalise == "expected_average_only_in":
        theirs.fold_activation_norm_scaling_factor(0.5)
        assert SaeBank({0: lambda device: theirs}, identity="tiny").layer(0).note == ""


def test_notes_say_which_layers_have_saes_and_how_they_are_read() -> None:
    assert select._sae_notes(range(4), 4, {}) == []
    assert select._sae_notes((1, 3), 4, {"read unscaled": [1, 3]}) == [
        "SAEs exist for layers 1, 3 of 4: features of other layers cannot be chosen.",
        "SAEs of layers 1, 3: read unscaled.",
    ]


def test_features_are_set_to_shares_of_their_own_units() -> None:
    """What is typical of a feature does not depend on how far the SAE's units are from the residual's."""
    part = SaeSlice(
        *(0, torch.tensor([0]), torch.eye(4)[:, :1], torch.zeros(1), torch.zeros(1), torch.eye(4)[:1]),
        normalisation="constant_norm_rescale",
    )
    read = Residuals(
        ("a", "b"), torch.tensor([0, 0, 1]), {0: torch.tensor([[8.0, 0, 0, 0], [3, 4, 0, 0], [0, 2, 0, 0]])}
    )
    assert features.highest(part, read, encode=part.encode_own).tolist() == [[2.0], [0.0]]
    assert features.highest(part, read).tolist() == [[8.0], [0.0]]


def named(hook: str | None, **metadata: Any) -> Any:
    """A JumpReLU SAE that says what it reads."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    told = SAEMetadata(hook_name=hook, **metadata)
    return JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=64, metadata=told))


def opened(made: Any, layer: int = 3) -> SaeSlice:
    return SaeBank({layer: lambda device: made}, identity="tiny").layer(layer).slice([0])


@pytest.mark.parametrize(
    "hook",
    [
        None,
        "blocks.3.hook_resid_post",
        "model.layers.3",
        "model.layers.3.output",
        "language_model.model.layers.3",
        "model.language_model.layers.3.output",
    ],
)
def test_the_residual_stream_after_its_layer_is_read(hook: str | None) -> None:
    assert opened(named(hook, hf_hook_name=hook)).layer == 3


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.3.hook_resid_pre",
        "blocks.3.hook_mlp_out",
        "blocks.3.attn.hook_z",
        "model.layers.3.mlp",
        "hook_embed",
        "blocks.3.hook_resid_post.extra",
    ],
)
def test_other_hooks_are_refused_by_name(hook: str) -> None:
    with pytest.raises(ValueError, match=rf"layer 3 reads '{hook}': supported is the residual stream after a layer"):
        opened(named(hook))
    with pytest.raises(ValueError, match=rf"layer 3 reads '{hook}'"):
        opened(named("blocks.3.hook_resid_post", hf_hook_name=hook))


def test_another_layers_sae_is_refused() -> None:
    with pytest.raises(ValueError, match=r"given for layer 3 reads 'blocks\.13\.hook_resid_post', another layer"):
        opened(named("blocks.13.hook_resid_post"))


def test_reshaped_activations_are_refused() -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    made = JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=64, reshape_activations="hook_z"))
    with pytest.raises(ValueError, match="reshapes activations \\('hook_z'\\): only 'none' is supported"):
        opened(made)


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "abstopk": {"k": 4},
    "matching_pursuit": {},
    "temporal": {"n_heads": 1, "bottleneck_factor": 1, "normalize_activations": "none", "kval_topk": 4},
    "transcoder": {"d_out": 32, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": 32, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": 32, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": 32, "apply_b_dec_to_input": False},
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_other_families_are_refused_by_name(family: str, tmp_path: Path) -> None:
    from sae_lens.registry import get_sae_class

    made, configuration = get_sae_class(family)
    made(configuration(d_in=32, d_sae=64, **UNSUPPORTED[family])).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"family '{family}': supported are standard, jumprelu, gated, topk"):
        SaeBank.from_folders({3: tmp_path}, identity="tiny").layer(3)
