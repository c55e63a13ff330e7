"""How weights are held and where: types, quantisation, layers spread over devices and the disk."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.loading import DeviceMap, choose_device, choose_dtype, find_layers
from refusalscope.mechanism.attribution import gradient, sound, trace
from refusalscope.mechanism.interventions import RemoveDirection, editor
from tests import families, tiny

# Half of the layers are on the disk; each is read when it is needed and again for the backward pass.
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    **{f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)},
    "model.norm": "disk",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    families.language_model("llama").save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


def load(folder: Path, **placing: object) -> ChatModel:
    return ChatModel.load(folder, name="tiny", identity="tiny", device="cpu", **placing)  # type: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("dtype", "held"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_weights_are_held_in_the_type_asked_for(folder: Path, dtype: str, held: torch.dtype) -> None:
    model = load(folder, dtype=dtype)
    run = model.run(model.tokens(tiny.prompts()), keep=[1], logits=1)
    assert model.model.dtype == run.residuals[1].dtype == held
    assert run.logits.dtype == torch.float32


def test_a_checkpoints_own_type_is_kept_off_the_cpu_alone() -> None:
    assert choose_dtype("auto", "cpu") == torch.float32
    assert choose_dtype("auto", "cuda") == choose_dtype("auto", "mps") == "auto"


def test_what_cannot_be_had_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int3' is not known: choose one of auto, float32, bfloat16, float16"):
        choose_dtype("int3", "cpu")
    with pytest.raises(ValueError, match="device 'tpu' is not available here: choose one of auto, cpu"):
        choose_device("tpu")
    with pytest.raises(ValueError, match=r"^cannot load tiny as a causal language model: [^\n]+$"):
        load(tmp_path)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantising_says_what_it_needs(folder: Path, bits: str) -> None:
    with pytest.raises(ValueError, match=rf"{bits} weights need bitsandbytes.*pip install 'refusalscope\[quantized\]'"):
        load(folder, quantize=bits)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.05), ("4bit", 0.5)])
def test_quantised_models_run_and_give_gradients(folder: Path, bits: str, error: float) -> None:
    whole, held = load(folder), load(folder, quantize=bits)
    tokens = whole.tokens(tiny.prompts())
    ours, theirs = (model.run(tokens, keep=[3], logits=1) for model in (held, whole))
    assert (ours.residuals[3] - theirs.residuals[3]).norm() < error * theirs.residuals[3].norm()
    found = trace(held, tokens, tiny.direction(), layers=range(4), scheme=gradient())
    assert (found.gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("spread", ["auto", "disk"])
def test_a_model_spread_over_devices_answers_as_a_whole_one(folder: Path, tmp_path: Path, spread: str) -> None:
    device_map: DeviceMap = "auto" if spread == "auto" else SPREAD
    whole, parts = load(folder), load(folder, device_map=device_map, offload_folder=tmp_path)
    assert any(weight.is_meta for weight in parts.model.parameters()) == (spread == "disk")
    tokens = whole.tokens(tiny.prompts())
    edits = editor(RemoveDirection(tiny.direction()), layers=4).edits
    ours, theirs = (model.run(tokens, edits=edits, keep=range(4), logits=1) for model in (parts, whole))
    for layer in range(4):
        torch.testing.assert_close(ours.residuals[layer], theirs.residuals[layer])
    torch.testing.assert_close(ours.logits, theirs.logits)
    ours, theirs = (model.generate(tokens, edits=edits, max_new_tokens=6) for model in (parts, whole))
    assert ours == theirs
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert parts.promoted(vectors, 5) == whole.promoted(vectors, 5)


def test_gradients_reach_layers_that_lie_on_the_disk(folder: Path, tmp_path: Path) -> None:
    whole, parts = load(folder), load(folder, device_map=SPREAD, offload_folder=tmp_path)
    tokens = whole.tokens(tiny.prompts())
    ours, theirs = (trace(model, tokens, tiny.direction(), layers=range(4), scheme=sound()) for model in (parts, whole))
    torch.testing.assert_close(ours.gradient, theirs.gradient)
    assert all(weight.grad is None for weight in parts.model.parameters())


def test_an_unknown_structure_says_what_was_looked_for() -> None:
    model = families.language_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="looked for one list of 7 decoder layers in LlamaForCausalLM"):
        find_layers(model, "odd")


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name.endswith("-multimodal")])
def test_the_text_stack_is_meant_where_there_are_two(family: str) -> None:
    model = families.language_model(family)
    assert find_layers(model, family) is model.get_decoder().layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4]
    assert len(lists) > 1
