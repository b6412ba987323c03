"""Rotary positions, RMS norms, a head of its own, scaled attention: parity with transformers' Arcee.

Run: pytest tests/model/test_connectome_gpt.py
"""

import math
from dataclasses import replace

import pytest
import torch

from topogpt.errors import UserError
from topogpt.model.gpt import GPT, RMSNorm, Rotation
from topogpt.settings import GPTConfig
from topogpt.topo import sheet_names

CONNECTOME = {"norm": "rmsnorm", "position": "rope", "tied": False, "scale_attention": True}
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=96, **CONNECTOME)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stock(model):
    """transformers' Arcee with the same weights, norms of 1, and the attention's scale in o_proj."""
    transformers = pytest.importorskip("transformers")
    cfg = transformers.ArceeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, hidden_act="gelu", max_position_embeddings=16, rms_norm_eps=1e-6,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.ArceeForCausalLM(cfg).eval()
    weights = {name: torch.ones_like(p) for name, p in theirs.state_dict().items() if "norm" in name}
    weights |= {
        "model.embed_tokens.weight": model.transformer.wte.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.chunk(3)
        attn = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": block.attn.c_proj.weight / math.sqrt(2 * 2)}
        weights |= {f"model.layers.{i}.self_attn.{name}.weight": w for name, w in attn.items()}
        mlp = {"up_proj": block.mlp.c_fc.weight, "down_proj": block.mlp.c_proj.weight}
        weights |= {f"model.layers.{i}.mlp.{name}.weight": w for name, w in mlp.items()}
    theirs.load_state_dict(weights)
    return theirs


def test_logits_and_loss_equal_transformers(model, stock, tokens):
    targets = tokens.roll(-1, dims=1)
    with torch.no_grad():
        ours, theirs = model(tokens, targets), stock(tokens).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours.logits, theirs, atol=1e-4, rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(model(tokens, targets, keep_logits=False).loss, expected)


def test_gradients_equal_transformers(model, stock, tokens):
    for one in (model, stock):
        one.zero_grad()
    targets = tokens.roll(-1, dims=1)
    model(tokens, targets).loss.backward()
    torch.nn.functional.cross_entropy(stock(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(stock.named_parameters())
    for i, block in enumerate(model.transformer.h):
        at = f"model.layers.{i}"
        q, k, v = block.attn.c_attn.weight.grad.chunk(3)
        pairs = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        pairs |= {"mlp.up_proj": block.mlp.c_fc.weight.grad, "mlp.down_proj": block.mlp.c_proj.weight.grad}
        for name, grad in pairs.items():
            expected = theirs[f"{at}.{name}.weight"].grad
            torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-3, msg=name)
    torch.testing.assert_close(model.lm_head.weight.grad, stock.lm_head.weight.grad, atol=1e-5, rtol=1e-3)
    wte = stock.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.transformer.wte.weight.grad, wte, atol=1e-5, rtol=1e-3)


def test_greedy_text_equals_transformers_with_the_cache_and_beyond_the_context(model, stock, tokens):
    start = tokens[:1, :4]
    ours = model.generate(start, 30, temperature=0, n_vocab=96)  # 34 tokens; the context is 16
    theirs = stock.generate(start, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.tolist() == theirs.tolist()
    with torch.no_grad():
        whole = model(ours).logits[0, 3:-1].argmax(-1)
    assert whole.tolist() == ours[0, 4:].tolist()  # the same without the cache


def test_rotations_depend_on_distance_alone_and_keep_lengths():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        at = [Rotation.at(torch.tensor([p]), 8) for p in (i, j)]
        return float((at[0](q) * at[1](k)).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-5) != pytest.approx(score(5, 3), abs=1e-3)
    assert score(0, 0) == pytest.approx(float((q * k).sum()))
    assert Rotation.at(torch.tensor([7]), 8)(q).norm() == pytest.approx(float(q.norm()), abs=1e-6)
    # known answer: the first pair of position 1 turns by one radian, the last of width 8 by 10000^(-3/4)
    turned = Rotation.at(torch.tensor([1]), 8)(torch.eye(8)[[0, 3]].view(1, 2, 1, 8))
    assert turned[0, 0, 0, [0, 4]].tolist() == pytest.approx([math.cos(1), math.sin(1)])
    assert turned[0, 1, 0, [3, 7]].tolist() == pytest.approx([math.cos(1e-3), math.sin(1e-3)])


def test_the_norm_has_no_parameters_and_stays_in_float32():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
    out = RMSNorm()(x)
    assert out.dtype == torch.float32 and out.tolist() == [pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])]
    assert not list(RMSNorm().parameters())


def test_the_papers_size_and_its_start():
    with torch.device("meta"):
        paper = GPT(GPTConfig(n_embd=768, n_head=12, **CONNECTOME))
    assert paper.n_parameters() == 162_201_600 and paper.flops_per_token() == 6 * 123_568_128 + 113_246_208
    torch.manual_seed(0)
    fresh = GPT(replace(SMALL, n_embd=64, vocab_size=512))
    assert fresh.lm_head.weight is not fresh.transformer.wte.weight
    assert fresh.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert fresh.transformer.h[0].attn.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_the_attention_sheet_shows_what_joins_the_stream(model, tokens):
    out = model(tokens, activations=True)
    assert list(out.activations) == sheet_names(2)
    x = model.transformer.wte(tokens)
    for name in sheet_names(2):
        x = x + out.activations[name]
    torch.testing.assert_close(model.lm_head(model.transformer.ln_f(x)), out.logits)


def test_rotary_positions_take_pairs_and_learned_ones_end_at_the_context(model, tokens):
    with pytest.raises(UserError, match="model.position = rope turns pairs .* gives each 7"):
        replace(SMALL, n_embd=28)
    learned = GPT(replace(SMALL, position="learned"))
    longer = torch.cat([tokens, tokens], 1)
    with pytest.raises(ValueError, match="32 tokens do not fit the context of 16"):
        learned(longer)
    assert torch.allclose(model(longer).logits[:, :16], model(tokens).logits, atol=1e-5)


def test_compiles_into_one_graph(model, tokens):
    out = torch.compile(lambda x: model(x, x, activations=True), fullgraph=True, backend="aot_eager")(tokens)
    torch.testing.assert_close(out.loss, model(tokens, tokens).loss)
