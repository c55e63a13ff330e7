"""Every family of chat models through the one door: residuals, padding, generation, gradients, and a second opinion."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from refusalscope.core.types import Prompts
from refusalscope.inputs.chat import Batch, ChatModel, Given
from refusalscope.mechanism.attribution import gradient, trace
from tests import families, tiny

LONG = "Why do trains that leave at night come back in the morning, and where do they go in between? " * 3
PROMPTS = tiny.prompts(texts=[*tiny.TEXTS[:4], LONG])
NEW = 8


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request: pytest.FixtureRequest) -> ChatModel:
    return tiny.chat_model(request.param)


def each(prompts: Prompts) -> list[Prompts]:
    return [prompts[row : row + 1] for row in range(len(prompts))]


def final_norm(model: ChatModel) -> Any:
    decoder = model.model.get_decoder()
    return decoder.final_layer_norm if hasattr(decoder, "final_layer_norm") else decoder.norm


def test_run_equals_output_hidden_states(model: ChatModel) -> None:
    tokens = model.tokens(PROMPTS)
    ours = model.run(tokens, keep=range(4), logits=1)
    theirs = model.model(
        input_ids=tokens.ids,
        attention_mask=tokens.mask.long(),
        position_ids=(tokens.mask.long().cumsum(1) - 1).clamp(min=0),
        output_hidden_states=True,
    )
    for layer in range(3):
        torch.testing.assert_close(ours.residuals[layer][tokens.mask], theirs.hidden_states[layer + 1][tokens.mask])
    last = final_norm(model)(ours.residuals[3])
    torch.testing.assert_close(last[tokens.mask], theirs.hidden_states[-1][tokens.mask])
    torch.testing.assert_close(ours.logits[:, -1], theirs.logits[:, -1])


def test_left_padded_batch_equals_single_prompts(model: ChatModel) -> None:
    batched = model.run(model.tokens(PROMPTS), keep=range(4), logits=1)
    for row, prompt in enumerate(each(PROMPTS)):
        tokens = model.tokens(prompt)
        single = model.run(tokens, keep=range(4), logits=1)
        for layer, residual in batched.residuals.items():
            ours = residual[row, -tokens.ids.shape[1] :]
            torch.testing.assert_close(ours, single.residuals[layer][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batched.logits[row], single.logits[0], atol=1e-4, rtol=1e-4)


def test_generate_equals_transformers_greedy_one_at_a_time(model: ChatModel) -> None:
    ours = model.generate(model.tokens(PROMPTS), max_new_tokens=NEW)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([model.template.encode(prompt.text).ids])
        for _ in range(NEW):
            following = model.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, following[None, None]], dim=1)
            if int(following) in model.end_tokens:
                break
        answer = ids[0, -ours[row].tokens :].tolist()
        assert ours[row].first_token == (None if answer[0] in model.end_tokens else answer[0])
        assert ours[row].text == model.tokenizer.decode(answer, skip_special_tokens=True)


def test_gradients_flow_to_every_layer_and_to_no_parameter(model: ChatModel) -> None:
    tokens = model.tokens(PROMPTS)
    hooks = [len(layer._forward_hooks) for layer in model.layers]  # transformers leaves some of its own
    found = trace(model, tokens, tiny.direction(), layers=range(4), scheme=gradient())
    assert found.gradient.isfinite().all()
    assert (found.gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert (found.gradient[:, ~tokens.mask] == 0).all()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.model.parameters())
    assert [len(layer._forward_hooks) for layer in model.layers] == hooks


def test_a_run_goes_on_from_a_known_residual(model: ChatModel) -> None:
    tokens, edits = model.tokens(PROMPTS), {2: lambda residual, batch: residual * 1.1}
    clean = model.run(tokens, keep=[1])
    assert model.resumable
    whole = model.run(tokens, edits=edits, keep=[2], logits=1)
    resumed = model.run(tokens, edits=edits, keep=[2], logits=1, given=Given(1, clean.residuals[1]))
    assert torch.equal(whole.logits, resumed.logits)
    assert torch.equal(whole.residuals[2], resumed.residuals[2])
    assert torch.equal(model.run(tokens, edits=edits, logits=1).logits, whole.logits)
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_the_last_layers_mlp_is_needed_at_the_last_position_alone(model: ChatModel) -> None:
    tokens, seen, found = model.tokens(PROMPTS), [], []
    mlp: Any = model.layers[-1].mlp
    watch = mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    for only_last in (False, True):
        layers: dict[int, torch.Tensor] = {}

        def keep(residual: torch.Tensor, _: Batch, layers: dict[int, torch.Tensor] = layers) -> torch.Tensor:
            layers[len(layers)] = residual if residual.requires_grad else residual.requires_grad_(True)
            return layers[len(layers) - 1]

        with torch.enable_grad():
            run = model.run(tokens, edits=dict.fromkeys(range(4), keep), logits=1, only_last=only_last)
            found.append([run.logits, *torch.autograd.grad(run.logits[..., 7].sum(), list(layers.values()))])
    watch.remove()
    assert seen == [tokens.ids.shape[1], 1]
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)
    assert model.run(tokens, logits=1).logits.equal(found[0][0])


def test_logits_of_some_tokens_are_those_of_all(model: ChatModel) -> None:
    tokens, wanted = model.tokens(PROMPTS), torch.tensor([7, 31, 300])
    every = model.run(tokens, logits=2).logits
    torch.testing.assert_close(model.run(tokens, logits=2, vocabulary=wanted).logits, every[..., wanted])
    head = model.model.get_output_embeddings()
    forward = head.forward
    head.forward = forward  # as where the weights lie elsewhere until they are needed
    assert model.run(tokens, logits=2, vocabulary=wanted).logits.equal(every[..., wanted])
    assert head.forward is forward
    del head.forward
    assert model.run(tokens, logits=2).logits.equal(every)


def test_a_trace_is_that_of_the_prompt_alone(model: ChatModel) -> None:
    tokens = model.tokens(PROMPTS)
    batched = trace(model, tokens, tiny.direction(), layers=range(4), scheme=gradient())
    single = trace(model, model.tokens(PROMPTS[3:4]), tiny.direction(), layers=range(4), scheme=gradient())
    width = single.gradient.shape[2]
    torch.testing.assert_close(batched.gradient[:, 3, -width:], single.gradient[:, 0], atol=1e-4, rtol=1e-4)
    # Removal moves the padding too: nothing of that may reach the prompt.
    torch.testing.assert_close(batched.patched[:, 3, -width:], single.patched[:, 0], atol=1e-4, rtol=1e-4)


def test_a_saved_model_is_loaded_as_it_was(model: ChatModel, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = ChatModel.load(tmp_path, name="saved", identity="saved", device="cpu")
    tokens = loaded.tokens(PROMPTS)
    assert torch.equal(tokens.ids, model.tokens(PROMPTS).ids)
    ours, theirs = (made.run(tokens, keep=[3], logits=1) for made in (loaded, model))
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.residuals[3], theirs.residuals[3])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_residuals_equal_those_of_transformer_lens(family: str) -> None:
    model = tiny.chat_model(family)
    hooked = hooked_transformer(model.model, family)
    for prompt in each(PROMPTS):
        tokens = model.tokens(prompt)
        ours = model.run(tokens, keep=range(4), logits=1)
        logits, cache = hooked.run_with_cache(tokens.ids, prepend_bos=False)
        torch.testing.assert_close(ours.logits[0, -1], logits[0, -1], atol=2e-5, rtol=1e-5)
        for layer in range(4):
            theirs = cache[f"blocks.{layer}.hook_resid_post"]
            torch.testing.assert_close(ours.residuals[layer], theirs, atol=2e-5, rtol=1e-5)


def hooked_transformer(model: Any, family: str) -> Any:
    """TransformerLens' own model of the same weights, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    shape = {"d_model": 32, "d_head": 16, "n_layers": 4, "n_heads": 2, "n_key_value_heads": 1, "d_mlp": 48}
    shape |= {"d_vocab": 320, "n_ctx": 512, "eps": 1e-6, "rotary_dim": 16, "device": "cpu"}
    kind = {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True, "final_rms": True}
    if family == "gemma2":
        kind |= {"act_fn": "gelu_pytorch_tanh", "attn_scale": 4.0, "use_normalization_before_and_after": True}
        kind |= {"attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0}
        kind |= {"use_local_attn": True, "window_size": 8, "attn_types": ["local", "global"] * 2}
        convert = convert_gemma_weights
    else:
        kind |= {"act_fn": "silu"}
        convert = convert_llama_weights
    made = HookedTransformerConfig(**shape, **kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is the old class whose numbers are published
        hooked = HookedTransformer(made)
    hooked.load_and_process_state_dict(
        convert(model, made),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked
