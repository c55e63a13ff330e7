"""Which SAE a pattern, a release or a repository means, layer by layer; everything else is one clear line."""

import shutil
from pathlib import Path

import pytest
import torch

from refusalscope.inputs import hub, presets, releases
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; conftest keeps the hub offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def repository(cache: Path, name: str) -> Path:
    """The empty snapshot of a cached repository."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def test_of_several_ids_a_layer_the_one_nearest_an_l0_of_100_is_taken() -> None:
    ids = ["layer_1/l0_90", "layer_1/l0_110", "layer_1/l0_10", "layer_12/l0_300", "embedding/l0_100", "layer_2/x"]
    found = releases.matching(ids, "layer_{layer}/l0_{l0}")
    assert found == {1: "layer_1/l0_90", 12: "layer_12/l0_300"}


def test_a_layer_that_stands_twice_in_a_pattern_is_one_number() -> None:
    ids = ["L3/block_3", "L3/block_4"]
    assert releases.matching(ids, "L{layer}/block_{layer}") == {3: "L3/block_3"}


def test_special_characters_of_a_pattern_are_plain_text() -> None:
    assert releases.matching(["a.b/3", "aXb/3"], "a.b/{layer}") == {3: "a.b/3"}


@pytest.mark.parametrize("name", [name for name, preset in presets.presets().items() if "sae_release" in preset])
def test_every_preset_names_one_sae_a_layer_of_a_release_that_saelens_knows(name: str) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    preset = presets.presets()[name]
    entry = get_pretrained_saes_directory()[preset["sae_release"]]
    found = releases.matching(entry.saes_map, preset["sae_id"])
    expected = {
        "gemma-2-2b": range(26),
        "gemma-2-9b": range(42),
        "gemma-2-9b-it-saes": (9, 20, 31),
        "llama-3.1-8b": range(32),
        "llama-3.1-8b-andyrdt": range(3, 28, 4),
        "gemma-3-270m": range(18),
        "gemma-3-1b": range(26),
        "gemma-3-4b": range(34),
        "gemma-3-12b": range(48),
        "gemma-3-27b": range(62),
        "qwen-2.5-7b": range(3, 28, 4),
        "qwen-3.5-27b": range(64),
    }
    assert tuple(found) == tuple(expected[name])


def test_gemma_2_2b_uses_the_saes_that_neuronpedia_shows() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    registry = get_pretrained_saes_directory()
    preset = presets.presets()["gemma-2-2b"]
    found = releases.matching(registry["gemma-scope-2b-pt-res"].saes_map, preset["sae_id"])
    canonical = registry["gemma-scope-2b-pt-res-canonical"]
    for layer, name in found.items():
        same = f"layer_{layer}/width_65k/canonical"
        assert canonical.saes_map[same] == name
        assert canonical.neuronpedia_id[same] == preset["neuronpedia"].format(layer=layer)


def test_a_release_with_one_sae_a_layer_needs_no_pattern(cache: Path) -> None:
    repository(cache, "fnlp/Llama3_1-8B-Base-LXR-8x")
    source = releases.from_release("llama_scope_lxr_8x", None)
    assert source.names == {layer: f"l{layer}r_8x" for layer in range(32)}
    assert COMMIT in source.identity


@pytest.mark.parametrize(
    ("release", "pattern", "message"),
    [
        ("llama_scope_lxr_8", None, "did you mean llama_scope_lxr_8x"),
        ("gemma-scope-2b-pt-res", None, "several SAEs a layer, such as embedding/width_4k/average_l0_6"),
        ("gemma-scope-2b-pt-res", "width_65k", r"--sae-id width_65k: write \{layer\} where"),
        ("gemma-scope-2b-pt-res", "layer_{layer}/width_7k", "no id of gemma-scope-2b-pt-res fits; there are"),
        ("llama_scope_lxr_8x", None, r"is not in the local cache \(.*hub\) and HF_HUB_OFFLINE is set"),
    ],
)
def test_what_a_release_does_not_hold_is_named(release: str, pattern: str | None, message: str, cache: Path) -> None:
    with pytest.raises(ValueError, match=message):
        releases.from_release(release, pattern)


def test_a_repository_of_saelens_folders(cache: Path, tmp_path: Path) -> None:
    folders = tiny.save_saes(tmp_path / "made", layers=3)
    snapshot = repository(cache, "someone/saes")
    for layer in (0, 2):
        shutil.copytree(folders[layer], snapshot / "v1" / f"resid_{layer}")
    source = releases.from_repository("someone/saes:v1/resid_{layer}")
    assert source.names == {0: "v1/resid_0", 2: "v1/resid_2"}
    assert torch.equal(
        source.loaders[2]("cpu").W_dec,
        releases.from_folders(f"{tmp_path}/made/layer_{{layer}}").loaders[2]("cpu").W_dec,
    )
    with pytest.raises(ValueError, match=r"someone/saes holds no SAE folder .* that fits v2/\{layer\}"):
        releases.from_repository("someone/saes:v2/{layer}")


def test_only_some_layers(tmp_path: Path) -> None:
    tiny.save_saes(tmp_path, layers=4)
    source = releases.from_folders(f"{tmp_path}/layer_{{layer}}")
    assert list(source.only([3, 1]).loaders) == [1, 3]
    with pytest.raises(ValueError, match=r"--layers \[7\]: .* has SAEs for layers \[0, 1, 2, 3\]"):
        source.only([1, 7])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folders = tiny.save_saes(tmp_path, layers=1)
    weights = folders[0] / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot load an SAE from .*layer_0"):
        releases.from_folders(f"{tmp_path}/layer_{{layer}}").loaders[0]("cpu")


@pytest.mark.parametrize("name", ["a/b/c", "-/x"])
def test_a_name_that_no_repository_can_have(name: str, cache: Path) -> None:
    with pytest.raises(ValueError, match="is no Hugging Face repository name"):
        hub.snapshot(name)


def test_a_repository_without_saes_named_for_it_is_told_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"SAELens knows llama-3.1-8b-instruct-andyrdt, .*llama_scope_lxr_8x"
    ) as raised:
        presets.resolve("meta-llama/Llama-3.1-8B-Instruct")
    assert "it is the model of the preset llama-3.1-8b and of llama-3.1-8b-andyrdt" in str(raised.value)
    assert "llama_scope_lxa" not in str(raised.value)


def test_identity_changes_with_commit_and_layers(cache: Path, tmp_path: Path) -> None:
    repository(cache, "google/gemma-scope-2-270m-it")
    model = repository(cache, "google/gemma-3-270m-it")
    (model / "config.json").write_text("{}")
    whole = presets.resolve("gemma-3-270m", revision="main")
    assert (whole.requested, whole.revision, whole.prompts, len(whole.saes.names)) == ("main", COMMIT, None, 18)
    assert presets.resolve("gemma-3-270m", revision="main", layers=[3]).identity != whole.identity
    (cache / "models--google--gemma-3-270m-it" / "refs" / "main").write_text("f" * 40)
    model.rename(model.parent / ("f" * 40))
    assert presets.resolve("gemma-3-270m", revision="main").identity != whole.identity


def test_the_documents_list_every_preset_with_its_model_and_release() -> None:
    rows = (Path(presets.__file__).parents[2] / "docs" / "models.md").read_text("utf-8").splitlines()
    for name, preset in presets.presets().items():
        row = next((row for row in rows if row.startswith(f"| `{name}` |")), "")
        assert preset.get("sae_release", "ships with the package") in row
        assert preset["model"] in row or name == "testbed"
