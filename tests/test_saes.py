"""Encode, decode and slices equal SAELens's; one layer in memory; what does not fit is refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusalscope.inputs.saes import SaeBank
from tests import tiny


@pytest.mark.parametrize("subtract", [True, False])
def test_slices_equal_saelens(tmp_path: Path, subtract: bool) -> None:
    from sae_lens import SAE

    folders = tiny.save_saes(tmp_path, subtract=subtract)
    bank = SaeBank.from_folders(folders, identity="tiny")
    residual = 2 * torch.randn(7, 5, 32)
    chosen = [90, 3, 17, 4]
    for layer, folder in folders.items():
        theirs = SAE.load_from_disk(folder, dtype="float32")
        features = theirs.encode(residual)
        part = bank.layer(layer).slice(chosen)
        torch.testing.assert_close(bank.layer(layer).encode(residual), features)
        torch.testing.assert_close(bank.layer(layer).decode(features, residual), theirs.decode(features))
        torch.testing.assert_close(part.encode(residual), features[..., chosen], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.decoder, theirs.W_dec[chosen])
        assert (features[..., chosen] > 0).any()


def test_standard_saes_slice_with_threshold_zero(tmp_path: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    made = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, apply_b_dec_to_input=True, device="cpu"))
    made.b_enc.data.normal_()
    made.b_dec.data.normal_()
    made.save_model(str(tmp_path / "layer_0"))
    bank = SaeBank.from_folders({0: tmp_path / "layer_0"}, identity="tiny")
    residual = torch.randn(9, 32)
    expected = made.encode(residual)[:, [5, 60]]
    torch.testing.assert_close(bank.layer(0).slice([5, 60]).encode(residual), expected, atol=1e-5, rtol=1e-5)


def test_only_the_last_layer_stays_in_memory(tmp_path: Path) -> None:
    bank = tiny.bank(tmp_path)
    first = bank.layer(0)
    assert bank.layer(0) is first
    assert bank.layer(1).layer == 1
    assert bank.layer(0) is not first


def test_take_keeps_order_and_names_what_is_missing(tmp_path: Path) -> None:
    part = tiny.bank(tmp_path).layer(0).slice([8, 2, 5])
    assert part.take([5, 8]).features.tolist() == [5, 8]
    with pytest.raises(ValueError, match=r"does not hold features \[7\]"):
        part.take([7])


def test_foreign_width_and_missing_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width 16, but tiny has width 32"):
        tiny.bank(tmp_path / "narrow", width=16).check(32, "tiny")
    with pytest.raises(ValueError, match="layer 9 has no SAE"):
        tiny.bank(tmp_path / "bank").layer(9)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folders = tiny.save_saes(tmp_path, layers=1)
    weights = folders[0] / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="layer_0"):
        SaeBank.from_folders(folders, identity="tiny").layer(0)


def test_a_folder_without_one_of_its_weights_is_named_in_one_line(tmp_path: Path) -> None:
    folders = tiny.save_saes(tmp_path, layers=1)
    weights = folders[0] / "sae_weights.safetensors"
    save_file({name: part for name, part in load_file(weights).items() if name != "b_enc"}, weights)
    with pytest.raises(ValueError, match=r"layer_0: .*b_enc") as raised:
        SaeBank.from_folders(folders, identity="tiny").layer(0)
    assert "\n" not in str(raised.value)


def test_shipped_saes_equal_saelens_on_the_shipped_models_residuals() -> None:
    from sae_lens import SAE

    from refusalscope.inputs import presets, prompts
    from refusalscope.inputs.chat import ChatModel

    target = presets.resolve("testbed")
    model = ChatModel.load(target.model, name="testbed", identity="test", device="cpu")
    tokens = model.tokens(prompts.from_testbed(count=4, full=False).evaluation["harmful"])
    bank = SaeBank.from_source(target.saes)
    assert bank.layers == tuple(range(8))
    for layer, residual in model.run(tokens, keep=bank.layers).residuals.items():
        theirs = SAE.load_from_disk(target.saes.names[layer], dtype="float32")
        features = theirs.encode(residual)
        active = features.flatten(0, 1).sum(0).topk(30).indices.tolist()
        torch.testing.assert_close(bank.layer(layer).encode(residual), features)
        torch.testing.assert_close(bank.layer(layer).decode(features, residual), theirs.decode(features))
        part = bank.layer(layer).slice(active)
        # A pre-activation within rounding of its threshold may fall on either side of it.
        before = residual @ part.encoder + part.bias
        clear = (before - part.threshold).abs() > 1e-4
        expected = features[..., active]
        torch.testing.assert_close(part.encode(residual)[clear], expected[clear], atol=1e-3, rtol=1e-4)
        assert clear.float().mean() > 0.999
