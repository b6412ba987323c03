"""model.py: parity with transformers, known sizes, generation. Run: pytest tests/model/test_gpt.py"""

import pytest
import torch

from topogpt.model.generate import sample_from
from topogpt.model.gpt import GPT, sheet_names
from topogpt.settings import GPTConfig
from topogpt.topo import LAYOUTS

SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=96)
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out) by transformers


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    with torch.no_grad():  # far from the initial near-uniform predictions, so that differences would show
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stock(model):
    """transformers' GPT-2 with the same weights, and biases of zero."""
    transformers = pytest.importorskip("transformers")
    cfg = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=96, activation_function="gelu",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(cfg).eval()
    weights = {n: torch.zeros_like(p) for n, p in theirs.state_dict().items() if n.endswith("bias")}
    for name, p in model.state_dict().items():
        weights[name] = p.T if name.endswith(CONV1D) else p
    theirs.load_state_dict(weights)
    return theirs


def test_logits_and_loss_equal_transformers(model, stock, tokens):
    targets = tokens.roll(-1, dims=1)
    with torch.no_grad():
        ours = model(tokens, targets)
        theirs = stock(tokens).logits
    assert theirs.std() > 1
    torch.testing.assert_close(ours.logits, theirs, atol=1e-4, rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours.loss, expected)


def test_gradients_equal_transformers(model, stock, tokens):
    model.zero_grad()
    stock.zero_grad()
    model(tokens, tokens.roll(-1, dims=1)).loss.backward()
    logits = stock(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, dims=1).flatten()).backward()
    theirs = dict(stock.named_parameters())
    for name, p in model.named_parameters():
        expected = theirs[name].grad.T if name.endswith(CONV1D) else theirs[name].grad
        torch.testing.assert_close(p.grad, expected, atol=1e-5, rtol=1e-3, msg=name)


def test_greedy_text_equals_transformers(model, stock, tokens):
    start = tokens[:1, :4]
    ours = model.generate(start, 12, temperature=0, n_vocab=96)
    theirs = stock.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.tolist() == theirs.tolist()


def test_targets_of_minus_one_do_not_count(model, tokens):
    targets = tokens.roll(-1, dims=1).clone()
    targets[:, 5:] = -1
    part = model(tokens, targets).loss
    torch.testing.assert_close(part, model(tokens[:, :5], targets[:, :5]).loss)


def test_the_loss_without_stored_logits_is_the_same(model, tokens):
    targets = tokens.roll(-1, dims=1)
    targets[:, 3] = -1
    out = model(tokens, targets, keep_logits=False)
    assert out.logits is None
    torch.testing.assert_close(out.loss, model(tokens, targets).loss)


def test_activations_are_the_outputs_of_the_branches_before_the_residual_addition(model, tokens):
    out = model(tokens, activations=True)
    assert list(out.activations) == sheet_names(2)
    x = model.transformer.wte(tokens) + model.transformer.wpe.weight
    for i, block in enumerate(model.transformer.h):
        attn = block.attn(block.ln_1(x))
        mlp = block.mlp(block.ln_2(x + attn))
        torch.testing.assert_close(out.activations[f"layer.{i}.attn"], attn)
        torch.testing.assert_close(out.activations[f"layer.{i}.mlp"], mlp)
        x = x + attn + mlp
    assert model(tokens).activations == {}


def test_activations_by_name(model, tokens):
    """Outputs of c_fc as a hook sees them, and all branches side by side; nothing else changes."""
    seen = []
    hooks = [
        block.mlp.c_fc.register_forward_hook(lambda module, inputs, out: seen.append(out))
        for block in model.transformer.h
    ]
    names = ["all", "layer.1.fc", "layer.0.attn", "layer.0.fc"]
    out, branches = model(tokens, activations=names), model(tokens, activations=True)
    for hook in hooks:
        hook.remove()
    assert list(out.activations) == names
    assert torch.equal(out.activations["layer.0.fc"], seen[0])
    assert torch.equal(out.activations["layer.1.fc"], seen[1])
    assert torch.equal(out.activations["layer.0.attn"], branches.activations["layer.0.attn"])
    assert torch.equal(out.activations["all"], torch.cat(list(branches.activations.values()), -1))
    assert torch.equal(out.logits, branches.logits)


def test_post_residual_shows_the_residual_stream(model, tokens):
    after = GPT(GPTConfig(**{**vars(SMALL), "post_residual": True})).eval()
    after.load_state_dict(model.state_dict())
    before, now = model(tokens, activations=True), after(tokens, activations=True)
    torch.testing.assert_close(now.logits, before.logits)
    x = model.transformer.wte(tokens) + model.transformer.wpe.weight
    for name in sheet_names(2):
        x = x + before.activations[name]
        torch.testing.assert_close(now.activations[name], x)


def test_initial_loss_is_that_of_a_uniform_guess_and_branches_start_scaled():
    torch.manual_seed(0)
    fresh = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=64, block_size=32, vocab_size=512))
    x = torch.randint(0, 512, (4, 32))
    assert fresh(x, x.roll(-1, 1)).loss.item() == pytest.approx(6.238, abs=0.1)  # ln 512
    block = fresh.transformer.h[3]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # / sqrt(2 * 8)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize("new", [5, 40])  # 40: far beyond the context of 16
def test_generation_with_the_cache_equals_generation_without(model, new):
    text = torch.tensor([[5, 7], [3, 1]])
    cached = model.generate(text, new, temperature=0, n_vocab=96)
    for _ in range(new):
        logits = model(text[:, -16:]).logits[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert cached.tolist() == text.tolist()


def test_a_text_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_generation_leaves_the_mode_and_never_draws_padding(model):
    model.train()
    text = model.generate(torch.zeros(64, 1, dtype=torch.long), 4, temperature=5.0, n_vocab=7)
    assert model.training and text.max() < 7
    model.eval()


def test_generation_stops_when_every_row_has_stopped(model):
    start = torch.tensor([[5, 7]])
    first = model.generate(start, 1, temperature=0, n_vocab=96)[0, -1].item()
    assert model.generate(start, 10, temperature=0, n_vocab=96, stop=first).shape == (1, 3)


def drawn(logits, n=4000, **how):
    g = torch.Generator().manual_seed(0)
    draws = sample_from(torch.tensor([logits]).repeat(n, 1), generator=g, **how)[:, 0]
    return torch.bincount(draws, minlength=len(logits)) / n


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = [0.0, 1.0, 2.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(0)
        assert (drawn(logits, temperature=temperature) - expected).abs().max() < 0.03


def test_top_k_keeps_the_k_likeliest():
    assert (drawn([0.0, 1.0, 2.0, 3.0], top_k=2) > 0).tolist() == [False, False, True, True]
    assert (drawn([0.0, 1.0], top_k=99) > 0).all()


@pytest.mark.parametrize(
    "p, kept", [(0.0, [3]), (0.5, [3]), (0.65, [2, 3]), (0.95, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    probabilities = [0.05, 0.1, 0.25, 0.6]
    found = drawn(torch.tensor(probabilities).log().tolist(), top_p=p)
    assert found.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_into_one_graph(model, tokens, layout):
    names = sheet_names(2, layout)
    out = torch.compile(lambda x: model(x, x, activations=names), fullgraph=True, backend="aot_eager")(tokens)
    torch.testing.assert_close(out.loss, model(tokens, tokens).loss)
    assert list(out.activations) == names


def test_biases_start_at_zero_and_gpt2_small_has_its_published_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(n_embd=768, n_head=12, vocab_size=50257, bias=True))
    assert model.n_parameters() == 124_439_808
    fresh = GPT(GPTConfig(**{**vars(SMALL), "bias": True}))
    biases = [p for name, p in fresh.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 2 * 6 + 1 and all(b.abs().sum() == 0 for b in biases)


@pytest.mark.parametrize(
    "sizes, parameters",
    [
        ({}, 128_771_216),  # TopoLM
        ({"n_embd": 768, "n_head": 12}, 124_373_760),  # TopoNets' nanoGPT: 124.4M
    ],
)
def test_known_parameter_counts(sizes, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    assert model.n_parameters() == parameters
    assert model.n_parameters(position_embedding=False) == parameters - 1024 * model.cfg.n_embd


def test_flops_per_token_of_topolm_are_the_published_ones():
    with torch.device("meta"):
        assert GPT(GPTConfig()).flops_per_token() == pytest.approx(0.883e9, rel=1e-3)
