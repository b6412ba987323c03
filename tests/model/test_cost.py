"""What a config costs, against the models, files and steps themselves. pytest tests/model/test_cost.py"""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_script
from topogpt.config import parse
from topogpt.distributed import Ranks
from topogpt.errors import UserError
from topogpt.model import cross_entropy
from topogpt.model.cost import CHUNK_ELEMENTS, TOKENIZER_BYTES, Cost, weight_shapes
from topogpt.model.gpt import GPT
from topogpt.settings import CostConfig, GPTConfig, TopoConfig, TrainConfig
from topogpt.sharing.export import write_topography, write_weights
from topogpt.spatial.layout import sheet_positions
from topogpt.spatial.topolm import TopoLMLoss
from topogpt.training.objective import Objective

CONFIGS = sorted((tiny.ROOT / "configs").glob("*.yaml"))
ODD = [
    GPTConfig(n_layer=1, n_head=1, n_embd=9, block_size=3, vocab_size=7),
    GPTConfig(n_layer=3, n_head=2, n_embd=30, block_size=11, vocab_size=50257, bias=True),
    GPTConfig(n_layer=12, n_head=12, n_embd=768, bias=True),
    GPTConfig(n_layer=2, n_head=4, n_embd=3072, block_size=1),
    GPTConfig(n_embd=768, n_head=12, norm="rmsnorm", position="rope", tied=False, scale_attention=True),
    GPTConfig(n_layer=2, n_head=4, n_embd=64, bias=True, norm="rmsnorm"),
    GPTConfig(n_layer=2, n_head=4, n_embd=64, tied=False),
]
SMALL = GPTConfig(n_layer=3, n_head=4, n_embd=144, block_size=128, vocab_size=512)


def cost_of(model: GPTConfig, device: str = "cpu", **settings) -> Cost:
    topo = settings.pop("topo", TopoConfig(radius=2))
    return Cost(TrainConfig(run_name="x", model=model, topo=topo, **settings), device)


def on_meta(cfg: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(cfg)


def check_parameters(cost: Cost) -> None:
    built = on_meta(cost.cfg.model)
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == cost.shapes
    assert cost.n_parameters == built.n_parameters() == sum(part.parameters for part in cost.parts)
    assert cost.palm_flops == built.flops_per_token()
    for part in cost.parts:
        if part.per_layer is not None:
            assert part.per_layer * cost.cfg.model.n_layer == part.parameters


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameters_of_a_config_are_those_of_its_model(path):
    check_parameters(Cost(parse(CostConfig, [str(path)])))


@pytest.mark.parametrize("cfg", ODD, ids=str)
def test_parameters_of_odd_shapes_are_those_of_their_models(cfg):
    check_parameters(cost_of(cfg))


def test_known_sizes():
    topolm = cost_of(GPTConfig(), topo=TopoConfig())
    assert (topolm.n_parameters, topolm.n_multiplied) == (128_771_216, 127_968_400)
    assert (topolm.n_sheets, topolm.n_neighbourhoods, topolm.chosen) == (24, 400, (5, 81))
    nanogpt = cost_of(GPTConfig(n_head=12, n_embd=768, vocab_size=50257, bias=True))
    assert nanogpt.n_parameters == 124_439_808  # GPT-2 small, 124.4M


# ---- FLOPs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_flops_are_those_that_torch_counts(bias):
    cost = cost_of(replace(SMALL, bias=bias))
    tokens = torch.randint(0, 512, (2, 128))
    net = GPT(cost.cfg.model)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = net(tokens, tokens).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == tokens.numel() * cost.forward_flops
    assert forward.get_total_flops() + backward.get_total_flops() == tokens.numel() * cost.training_flops


@pytest.mark.parametrize("neighbourhoods", [1, 5, 0])
def test_flops_of_the_spatial_loss_are_those_that_torch_counts(neighbourhoods):
    cost = cost_of(SMALL, topo=TopoConfig(radius=4, neighbourhoods=neighbourhoods))
    loss = spatial_loss(cost)
    activations = {name: torch.randn(1, 64, 144, requires_grad=True) for name in loss.sheets}
    with FlopCounterMode(display=False) as counted:
        loss(activations, loss.choose(0, 0, 0)).sum().backward()
    assert counted.get_total_flops() == 64 * cost.spatial_flops
    assert cost_of(SMALL, topo=TopoConfig(loss="none")).spatial_flops == 0


def test_palms_formula_counts_the_norms_too_and_nothing_else():
    for cfg in ODD:
        cost = cost_of(cfg)
        vectors = sum(shape[0] for shape in weight_shapes(cfg).values() if len(shape) == 1)
        assert cost.palm_flops - cost.training_flops == 6 * vectors
    topolm = cost_of(GPTConfig(), topo=TopoConfig())
    assert topolm.training_flops == 883_298_304
    assert round(topolm.spatial_flops / topolm.training_flops, 3) == 0.019


# ---- memory ------------------------------------------------------------------------------------------------


def spatial_loss(cost: Cost) -> TopoLMLoss:
    cfg = cost.cfg
    sheets = sheet_positions(cfg.topo, cfg.model)
    loss = TopoLMLoss(cfg.topo, sheets)
    loss.dense = True  # as on a GPU
    return loss


def measured_peak(cost: Cost, batch: int) -> int:
    """Most bytes that a step allocates over what it found, by torch's own account."""
    cfg = cost.cfg
    net, cpu = GPT(cfg.model), Ranks(0, 1, torch.device("cpu"))
    positions = sheet_positions(cfg.topo, cfg.model)
    objective = Objective(net, replace(cfg, dtype=cost.dtype), positions, cpu)
    tokens = torch.randint(0, cfg.model.vocab_size, (batch, cfg.model.block_size))
    chosen = objective.choose(0, 0, 0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        ce, spatial = objective(tokens, tokens, chosen)
        (ce + spatial.sum()).backward()
        del ce, spatial
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "model, settings",
    [
        ({}, {}),
        ({}, {"topo": TopoConfig(loss="none")}),
        ({"dropout": 0.1}, {"topo": TopoConfig(loss="none")}),
        ({"post_residual": True, "bias": True}, {"dtype": "bfloat16"}),
        ({"vocab_size": 20_000}, {"dtype": "bfloat16"}),
        ({"n_layer": 1, "vocab_size": 50304}, {}),
    ],
    ids=str,
)
def test_memory_is_within_a_tenth_of_what_a_step_takes(model, settings):
    cost = cost_of(replace(SMALL, **model), **({"topo": TopoConfig(radius=4)} | settings))
    estimate = cost.memory(4)
    assert estimate.total - estimate.weights == pytest.approx(measured_peak(cost, 4), rel=0.1)
    assert estimate.weights == 16 * cost.n_parameters


def test_chunks_are_those_of_the_loss():
    assert CHUNK_ELEMENTS == cross_entropy.CHUNK_ELEMENTS


# ---- files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["no_bias", "bias"])
def checkpoint(request, tmp_path_factory):
    from topogpt.runs.checkpoint import load_run

    shape = {"n_layer": 3, "n_embd": 144, "bias": request.param}
    run = tiny.random_run(tmp_path_factory.mktemp("run"), **shape)
    loaded = load_run(run)
    optimizer = torch.optim.AdamW(loaded.model.parameters())
    for p in loaded.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), loaded.folder / "optimizer.pt")  # random_run's has no moments yet
    return loaded


def test_size_of_a_checkpoint(checkpoint):
    files = cost_of(checkpoint.model.cfg).checkpoint_files
    assert (checkpoint.folder / "model.safetensors").stat().st_size == files["model.safetensors"]
    moments = (checkpoint.folder / "optimizer.pt").stat().st_size
    assert files["optimizer.pt"] == pytest.approx(moments, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_size_of_an_export(checkpoint, dtype, tmp_path):
    write_weights(tmp_path, checkpoint.model, dtype)
    write_topography(tmp_path, checkpoint)
    written = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert written == cost_of(checkpoint.model.cfg).export_files(dtype)
    assert "padding.safetensors" in written


@pytest.mark.parametrize("model", [{"tied": False, "n_inner": 24}, {"tied": True, "bias": True}])
def test_size_of_an_export_with_rotary_positions(model, tmp_path):
    from topogpt.runs.checkpoint import load_run

    loaded = load_run(tiny.random_run(tmp_path, norm="rmsnorm", position="rope", **model))
    write_weights(tmp_path, loaded.model, "float32")
    expected = cost_of(loaded.model.cfg).export_files("float32")
    for name in ("model.safetensors", "padding.safetensors"):
        assert (tmp_path / name).stat().st_size == expected[name], name


def test_size_of_the_tokenizers_files(gpt2, tmp_path):
    from topogpt.sharing.tokenizer_files import write_tokenizer

    write_tokenizer(tmp_path, gpt2, 1024)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == TOKENIZER_BYTES


# ---- the command -------------------------------------------------------------------------------------------


def test_what_it_says_of_topolm(capsys):
    model_script.main([str(tiny.ROOT / "configs" / "topolm.yaml"), "--keep_last", "1"])
    said = capsys.readouterr().out
    for words in (
        "128,771,216  100.0 %",
        "127,968,400",
        "6N + 12 L C T = 883.42 M",
        "sheets: 24 of 28x28 units, 18,816 units in all",
        "400 of 81 units (9x9) a sheet, 5 of them",
        "2 checkpoints: keep_last and the best",
        "written a parameter    3.7 kB",  # 28 B of 128,771,216 parameters over 983,040 tokens
    ):
        assert words in said
    batches = [line.split()[0] for line in said.splitlines() if line[:1].isdigit()]
    assert batches[:7] == ["1", "2", "4", "8", "16", "32", "48"]


def test_the_command_line_wins_and_mistakes_are_one_line():
    cfg = parse(CostConfig, [str(tiny.ROOT / "configs" / "debug.yaml"), "--model.n_layer", "7"])
    assert (cfg.model.n_layer, cfg.model.n_embd) == (7, 144)
    with pytest.raises(UserError, match="n_embd = 784 is not divisible by model.n_head = 15"):
        model_script.main(["--model.n_head", "15"])
    with pytest.raises(UserError, match="configs/topolmm.yaml does not exist"):
        model_script.main(["configs/topolmm.yaml"])


def test_the_script_takes_no_torch_until_a_name_of_the_gpt_is_asked_for():
    code = "import sys, model; model.main([]); assert 'torch' not in sys.modules; from model import GPT"
    code += ", sheet_names; import topogpt.model.gpt as gpt; assert GPT is gpt.GPT"
    subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, check=True, capture_output=True, timeout=60)
    assert model_script.GPTConfig is GPTConfig
    with pytest.raises(AttributeError, match="no attribute GTP"):
        model_script.GTP  # noqa: B018
