"""Dense models made sparse: what is converted, to what, and what is left and why. And patterns on the command line."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from typer.testing import CliRunner, Result

import lowprec as lp
from lowprec import sparse
from lowprec.cli import app
from lowprec.sparse.patterns.picture import draw_patterns

ROOT = Path(__file__).resolve().parent.parent
DTYPE = torch.float64  # in which sums are torch's own, on any machine

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128, bias=False), nn.ReLU(), nn.Linear(128, 10)
    ).to(DTYPE)


def blocks_of(weight: Tensor, block: int) -> Tensor:
    """[input blocks, output blocks, block, block] of the weight [outputs, inputs] of a linear layer."""
    outputs, inputs = weight.shape
    return weight.T.reshape(inputs // block, block, outputs // block, block).transpose(1, 2)


# What layers become.


@settings(max_examples=20)
@given(st.sampled_from([8, 16, 32]), st.floats(0, 1), st.sampled_from(sparse.patterns.NAMES), st.integers(0, 9))
def test_layers_hold_the_blocks_of_the_pattern(block: int, density: float, pattern: str, seed: int) -> None:
    dense = perceptron()
    share = None if pattern == "dense" else density
    model = sparse.sparsify(copy.deepcopy(dense), pattern, share, block, init="keep", seed=seed)
    assert isinstance(model, nn.Sequential)
    for path in ("0", "2"):
        layer, before = model.get_submodule(path), dense.get_submodule(path)
        assert type(layer) is sparse.Linear
        assert layer.layout.block == block
        rows, columns = layer.layout.shape
        if pattern not in ("dense", "block_diagonal"):
            assert layer.layout.blocks == sparse.patterns.budget(rows, columns, density)
        expected = blocks_of(before.weight.detach(), block) * layer.layout.mask[:, :, None, None]
        assert torch.equal(blocks_of(layer.to_dense().weight.detach(), block), expected)
    assert torch.equal(model[0].bias, dense[0].bias)
    assert model[2].bias is None
    assert model[4] is not dense[4]
    assert type(model[4]) is nn.Linear


def test_outputs_keep_their_variance() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(1024, 512, bias=False, dtype=DTYPE)
    x = torch.randn(500, 1024, dtype=DTYPE)
    layer = sparse.sparsify(copy.deepcopy(dense), "barabasi_albert", 0.1, 16)
    counts = layer.layout.mask.sum(0)
    assert counts.max() > 3 * counts.min()
    scale = (64 / counts.double()).sqrt().repeat_interleave(16)
    kept = sparse.sparsify(copy.deepcopy(dense), "barabasi_albert", 0.1, 16, init="keep")
    torch.testing.assert_close(layer.to_dense().weight, kept.to_dense().weight * scale[:, None], rtol=1e-12, atol=0)
    assert float(layer(x).std().detach() / dense(x).std().detach()) == pytest.approx(1, abs=0.03)
    by_column = layer(x).detach().view(500, 32, 16).std(dim=(0, 2))
    assert float((by_column / dense(x).detach().std() - 1).abs().max()) < 0.2


def test_magnitude_keeps_the_strongest_blocks_as_they_are() -> None:
    dense = perceptron()
    model = sparse.sparsify(copy.deepcopy(dense), "magnitude", 0.3, 16)
    for path in ("0", "2"):
        layer, before = model.get_submodule(path), blocks_of(dense.get_submodule(path).weight.detach(), 16)
        norms = before.square().sum((2, 3)).flatten()
        strongest = norms.sort(descending=True).indices[: round(0.3 * norms.numel())]
        assert sorted(strongest.tolist()) == layer.layout.mask.flatten().nonzero()[:, 0].tolist()
        assert torch.equal(layer.weight.detach(), before[layer.layout.mask])


def test_fresh_weights_are_those_of_a_new_layer() -> None:
    torch.manual_seed(3)
    model = sparse.sparsify(perceptron(), "watts_strogatz", 0.3, 16, init="fresh", only="0")
    torch.manual_seed(1)
    perceptron()
    expected = sparse.Linear(model[0].layout, dtype=DTYPE)
    assert model[0].weight.shape == expected.weight.shape
    fan_in = model[0].layout.mask.sum(0) * 16
    bounds = fan_in.double().rsqrt()[model[0].layout.coordinates[:, 1], None, None]
    assert (model[0].weight.detach().abs() <= bounds).all()
    assert (model[0].weight.detach().abs() > 0.9 * bounds).any()


def test_each_layer_has_its_own_mask_and_the_seed_decides() -> None:
    def masks(seed: int, **options: str) -> list[Tensor]:
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
        sparse.sparsify(model, "balanced_random", 0.2, 16, seed=seed, **options)
        return [each.layout.mask for each in model.modules() if isinstance(each, sparse.Linear)]

    one, same, other, last = masks(4), masks(4), masks(5), masks(4, only="2")
    assert all(torch.equal(left, right) for left, right in zip(one, same, strict=True))
    assert not any(torch.equal(left, right) for left, right in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])
    assert torch.equal(last[0], one[2])  # whichever others are converted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_layers_are_stays(dtype: torch.dtype, device: torch.device) -> None:
    dense = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)).to(device, dtype).eval()
    dense[0].weight.requires_grad_(False)
    dense[1].bias.requires_grad_(False)
    model = sparse.sparsify(dense, "watts_strogatz", 0.5, 8)
    assert model is dense
    for layer in model:
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.weight.device.type == device.type
        assert not layer.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, False]


def test_patterns_may_be_functions() -> None:
    calls = []

    def lower(inputs: int, outputs: int, density: float | None, seed: int) -> Tensor:
        calls.append((inputs, outputs, density, seed))
        return torch.ones(inputs, outputs, dtype=torch.bool).tril()

    model = sparse.sparsify(nn.Linear(32, 48), lower, block=8)
    assert calls[0][:3] == (4, 6, None)
    assert torch.equal(model.layout.mask, torch.ones(4, 6, dtype=torch.bool).tril())
    assert sparse.report(model).converted[""].pattern == "lower"
    with pytest.raises(ValueError, match=r"pattern must give a mask of shape \(4, 6\), got \(6, 4\)"):
        sparse.sparsify(nn.Linear(32, 48), lambda i, o, *_: torch.ones(o, i, dtype=torch.bool), block=8)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        sparse.sparsify(nn.Linear(32, 48), lambda i, o, *_: torch.ones(i, o), block=8)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_take_torchs_images(stride: int, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 48, 1, stride, padding=1, dtype=DTYPE)
    layer = sparse.sparsify(copy.deepcopy(conv), "watts_strogatz", 0.4, 16, init="keep")
    assert isinstance(layer, sparse.ChannelsLast)
    mask = layer.layer.layout.mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    x = torch.randn(3, 32, 5, 6, dtype=DTYPE).to(memory_format=memory_format)
    expected = nn.functional.conv2d(x, conv.weight * mask.T[:, :, None, None], conv.bias, stride, 1)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-12, atol=1e-12)


# Which layers.


class Tied(nn.Module):
    """An embedding whose table is the weight of the last layer, a layer used twice, and layers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.first = self.again = nn.Linear(32, 32)
        self.block = nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32), "odd": nn.Linear(32, 20)})
        self.attention = nn.MultiheadAttention(32, 2)
        self.images = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 1, groups=2), nn.Conv2d(32, 64, 1))
        self.hooked, self.normed, self.pruned = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda *_: None)
        parametrizations.weight_norm(self.normed)
        prune.l1_unstructured(self.pruned, "weight", 0.5)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(self.embedding(x)))
        return self.head(self.norm(self.block["down"](self.block["up"](x))))


def test_what_is_left_is_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    model = sparse.sparsify(Tied(), "watts_strogatz", 0.5, 8)
    found = sparse.report(model)
    assert set(found.converted) == {"first", "block.up", "block.down", "images.2"}
    assert {path: each.reason for path, each in found.left.items()} == {
        "embedding": "no linear layer or 1x1 convolution",
        "block.odd": "20 outputs: no multiple of 8",
        "attention": "no linear layer or 1x1 convolution",
        "attention.out_proj": "a subclass, whose weight others may read",
        "images.0": "a 3x3 convolution in 1 groups",
        "images.1": "a 1x1 convolution in 2 groups",
        "hooked": "has hooks",
        "normed": "parametrized",
        "pruned": "has hooks",
        "head": "weight is also that of embedding",
    }
    assert model.first is model.again
    assert model.head.weight is model.embedding.weight
    model(torch.randint(0, 64, (3, 4))).sum().backward()
    text = str(found)
    assert text.startswith("4 layers are sparse: ")
    assert all(path in text and each.reason in text for path, each in found.left.items())
    assert str(pickle.loads(pickle.dumps(found))) == text
    assert str(sparse.report(pickle.loads(pickle.dumps(sparse.sparsify(perceptron(), "dense", block=8))))).startswith(
        "2"
    )


def test_paths_choose() -> None:
    model = sparse.sparsify(Tied(), "dense", block=8, only=["block", "first"], skip="*.down")
    found = sparse.report(model)
    assert set(found.converted) == {"first", "block.up"}
    assert found.left["block.down"].reason == "in skip"
    assert found.left["images.2"].reason == "not in only"
    sparse.sparsify(model, "watts_strogatz", 0.5, 16, only="images.*")
    found = sparse.report(model)
    assert {path: each.layout.block for path, each in found.converted.items()} == {
        "first": 8,
        "block.up": 8,
        "images.2": 16,
    }
    assert "images.2" not in found.left
    assert found.left["block.down"].reason == "not in only"


def test_weights_are_counted() -> None:
    model = sparse.sparsify(perceptron(), "watts_strogatz", 0.25, 16)
    found = sparse.report(model)
    assert [each.before for each in found.converted.values()] == [64 * 128, 128 * 128]
    assert [each.after for each in found.converted.values()] == [64 * 128 // 4, 128 * 128 // 4]
    assert found.left["4"].weights == 1280
    assert str(found).splitlines() == [
        "2 layers are sparse: 6,144 of 24,576 weights, 25.0%",
        "  0  watts_strogatz  64 -> 128   8 blocks of 16   25.0%",
        "  2  watts_strogatz  128 -> 128  16 blocks of 16  25.0%",
        "1 layer is as before: 1,280 weights",
        "  4  Linear  1,280  10 outputs: no multiple of 16",
    ]


def test_encoder_layers_take_no_fast_path_past_sparse_weights() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
    sparse.sparsify(encoder, "watts_strogatz", 0.5, 16)
    x, padding = torch.randn(2, 3, 32), torch.tensor([[False, False, True], [False, False, False]])
    expected = encoder.train()(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding), expected)


def test_a_layer_alone_is_returned_new() -> None:
    linear = nn.Linear(32, 32)
    layer = sparse.sparsify(linear, "watts_strogatz", 0.5, 8)
    assert isinstance(layer, sparse.Linear)
    assert sparse.report(layer).converted[""].layout is layer.layout
    assert "(model)" in str(sparse.report(layer))
    assert type(linear) is nn.Linear


def test_sparse_models_train_save_and_wrap() -> None:
    model = sparse.sparsify(perceptron(), "barabasi_albert", 0.4, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(32, 64, dtype=DTYPE), torch.randint(0, 10, (32,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    other = sparse.sparsify(perceptron(), "barabasi_albert", 0.4, 16, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    wrapped = lp.wrap(copy.deepcopy(model), lp.Policy.recipe("bf16"))
    assert not torch.equal(wrapped(x), model(x))


# Wrong arguments.


def test_nothing_changes_where_an_argument_is_refused() -> None:
    model = perceptron()
    layers = list(model)
    for options, error, message in [
        ({"density": None}, ValueError, "density must be given"),
        ({"density": 2.0}, ValueError, "density must be from 0 to 1, got 2.0"),
        ({"pattern": "ring"}, ValueError, "unknown pattern 'ring'"),
        ({"pattern": "magnitude", "density": None}, ValueError, "density must be given for magnitude, got None"),
        ({"block": 12}, ValueError, "block must be one of 8, 16, 32, 64, got 12"),
        ({"init": "zero"}, ValueError, "init must be one of rescale, keep, fresh, got 'zero'"),
        ({"only": "7"}, ValueError, "only must match modules of the model, got '7', which matches none"),
        ({"skip": ["2", "x*"]}, ValueError, "skip must match modules of the model, got 'x*', which matches none"),
        ({"only": [3]}, TypeError, "only must be a pattern or several, got 3"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"only": "4"}, ValueError, "model has no layer to convert: 0: not in only; 2: not in only; 4: 10 outputs"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            sparse.sparsify(model, **{"pattern": "watts_strogatz", "density": 0.5, "block": 16, **options})
        assert all(before is after for before, after in zip(layers, model, strict=True))
    with pytest.raises(TypeError, match="model must be a module, got str"):
        sparse.sparsify("model", "dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none with a weight matrix"):
        sparse.sparsify(nn.ReLU(), "dense")
    with pytest.raises(ValueError, match="model was not made sparse"):
        sparse.report(model)


# Patterns on the command line.


def call(*words: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["patterns", *words], env={"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)})


def test_patterns_are_listed_with_what_they_hold() -> None:
    output = call("--inputs", "48", "--density", "0.2", "--steps", "3").stdout
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()[2:] if line.strip()}
    assert set(rows) == set(sparse.patterns.NAMES)
    for name, words in rows.items():
        mask = sparse.patterns.build(name, 48, 48, None if name == "dense" else 0.2)
        assert words[0] == str(int(mask.sum()))
        assert words[1] == f"{int(mask.sum()) / 48**2:.1%}"
        for written, dim in zip(words[2:4], (1, 0), strict=True):
            low, _, high = written.partition("..")
            counts = mask.sum(dim)
            assert (int(low), int(high or low)) == (int(counts.min()), int(counts.max()))
        assert words[4:] == [f"{100 * share:.0f}" for share in sparse.patterns.mixing(mask, 3)]
    assert all(len(line) <= 80 for line in output.splitlines())


def test_rectangles_are_not_mixed() -> None:
    output = call("barabasi_albert:extra=9", "--inputs", "16", "--outputs", "64", "--density", "0.3").stdout
    assert "not square" in output
    assert "307" in output


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_of_patterns(tmp_path: Path) -> None:
    names = ["watts_strogatz", "barabasi_albert"]
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    assert f"picture: {small}" in call(*names[:1], "--png", str(small)).stdout
    assert call(*names, "--png", str(large)).exit_code == 0
    sizes = [pixels(path).shape for path in (small, large)]
    assert sizes[1][1] > sizes[0][1]
    colours = pixels(small).reshape(-1, 3)
    assert (colours == (0, 0x72, 0xB2)).all(axis=1).sum() > 5000  # blocks are there
    draw_patterns({"wide": sparse.patterns.dense(4, 16)}, tmp_path / "wide.png")
    assert pixels(tmp_path / "wide.png").shape[0] < sizes[0][0]
    with pytest.raises(ValueError, match="at least one mask"):
        draw_patterns({}, tmp_path / "none.png")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["ring"], 2, "unknown pattern 'ring'"),
        (["--density", "1.5"], 2, "density must be from 0 to 1, got 1.5"),
        (["--inputs", "0"], 2, "n_in must be at least 1, got 0"),
        (["dense", "--png", "missing/x.png"], 1, "the picture cannot be saved"),
    ],
)
def test_wrong_words(words: list[str], code: int, message: str) -> None:
    result = call(*words)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_layers_load_without_pictures() -> None:
    script = "import sys, lowprec.sparse; print([name for name in sys.modules if name.startswith('matplotlib')])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
