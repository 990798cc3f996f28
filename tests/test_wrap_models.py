"""Real models under a policy: transformers, a convolutional net, recurrent classifiers; trained, compiled, sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lowprec as lp

FP8 = lp.Policy.recipe("fp8")
EMPTY = lp.Policy()

SIZES = {"vocab_size": 64, "attn_implementation": "sdpa"}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0, **SIZES
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SIZES
    )
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


class Residual(nn.Module):
    """A block of a ResNet: two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.first(x)))
        y = self.norm2(self.second(y))
        y += self.shortcut(x)
        return self.relu(y)


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    body = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2))
    return nn.Sequential(stem, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class Classifier(nn.Module):
    """Embedding, recurrent layers, a linear head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.layers = kind(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens))[0].mean(1))


class Translator(nn.Module):
    """torch.nn.Transformer between embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.head(self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True))


def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "gpt2": (gpt2, tokens),
    "bert": (bert, tokens),
    "llama": (llama, tokens),
    "resnet": (resnet, images),
    "lstm classifier": (lambda: Classifier(nn.LSTM), tokens),
    "gru classifier": (lambda: Classifier(nn.GRU), tokens),
    "nn.Transformer": (Translator, tokens),
}
KINDS = {
    "gpt2": {"embedding", "addmm", "attention", "linear"},
    "bert": {"embedding", "linear", "attention"},
    "llama": {"embedding", "linear", "attention"},
    "resnet": {"conv2d", "linear"},
    "lstm classifier": {"embedding", "lstm", "linear"},
    "gru classifier": {"embedding", "gru", "linear"},
    "nn.Transformer": {"embedding", "multi_head_attention", "linear"},
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for part in ("attn_pdrop", "attention_probs_dropout_prob"):
        if hasattr(getattr(model, "config", None), part):
            setattr(model.config, part, 0.0)
    return model, inputs()


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one pass; leaves no gradients behind."""
    y = output(model, x)
    y.float().log_softmax(-1)[..., 0].mean().neg().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return y.detach(), gradients


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_policy_and_unwrapping_change_no_bit(name: str) -> None:
    model, x = build(name)
    expected = step(copy.deepcopy(model), x)
    assert_same(step(lp.wrap(copy.deepcopy(model), EMPTY), x), expected)
    assert_same(step(lp.unwrap(lp.wrap(copy.deepcopy(model), FP8)), x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_product_is_covered_and_training_works(name: str) -> None:
    model, x = build(name)
    plain = step(copy.deepcopy(model), x)
    lp.wrap(model, FP8, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    before = {key: p.clone() for key, p in model.named_parameters()}
    losses = []
    for _ in range(4):
        loss = output(model, x).float().log_softmax(-1)[..., 0].mean().neg()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any(torch.equal(p, before[key]) for key, p in model.named_parameters() if p.grad.any())
    y, _ = step(lp.wrap(build(name)[0], FP8), x)
    assert not torch.equal(y, plain[0])
    torch.testing.assert_close(y, plain[0], rtol=0.3, atol=0.3)
    report = lp.report(model)
    assert {row.kind for row in report.rows} == KINDS[name]
    assert all(row.calls == 4 and row.gradient.elements for row in report.rows)
    assert not report.not_covered


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_exact_policy(name: str) -> None:
    model, x = build(name)
    y, gradients = step(lp.wrap(copy.deepcopy(model), lp.Policy("fp32", "fp32", "fp32", "fp32")), x)
    expected, wanted = step(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for key in wanted:
        torch.testing.assert_close(gradients[key], wanted[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_sums_without_error(name: str) -> None:
    """Every sum in the model and in its backward pass."""
    model, x = build(name)
    policy = lp.Policy(accumulator="exact:fp32", reduction="exact:fp32")
    y, gradients = step(wrapped := lp.wrap(copy.deepcopy(model), policy, strict=True), x)
    expected, wanted = step(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for key in wanted:
        torch.testing.assert_close(gradients[key], wanted[key], rtol=1e-3, atol=1e-5)
    assert {row.sums for row in lp.report(wrapped).rows} == {"policy's"}


def compiled_steps(model: nn.Module, x: Tensor, **options: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Two passes of the compiled model; the second may compile nothing."""
    torch.compiler.reset()
    compiled = torch.compile(model, **options)
    passes = [step(compiled, x)]
    with torch.compiler.set_stance("fail_on_recompile"):
        passes.append(step(compiled, x))
    return [(y, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}) for y, grads in passes]


def first_layer_only(model: nn.Module) -> nn.Module:
    """Compiling takes long."""
    if isinstance(model, transformers.PreTrainedModel):
        model.transformer.h = model.transformer.h[:1]
    elif isinstance(model, nn.Sequential):
        model[1] = Residual(8, 16, 2)
    return model


@pytest.mark.parametrize("name", ["gpt2", "resnet", "nn.Transformer"])
def test_compiled_whole(name: str) -> None:
    model, x = build(name)
    lp.wrap(first_layer_only(model), FP8)
    eager = step(copy.deepcopy(model), x)
    for compiled in compiled_steps(model, x, fullgraph=True, backend="aot_eager"):
        assert_same(compiled, eager)
    assert {row.calls for row in lp.report(model).rows} == {2}
    step(once := lp.wrap(copy.deepcopy(model), FP8), x)
    counted = {(row.path, row.kind): row.counts for row in lp.report(model).rows}
    for row in lp.report(once).rows:
        for role, count in row.counts.items():
            if name != "resnet":  # whose batch norms have moved on
                # A role's sums add up several tensors, here in another order: exact but for their last bits.
                twice = pytest.approx(astuple(count + count), rel=1e-12)
                assert astuple(counted[row.path, row.kind][role]) == twice


def test_inductor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.ReLU(inplace=True))
    lp.wrap(model, lp.Policy("1-4-3", "1-3-4", "1-5-2:emax=1", "1-4-3", overrides={"2": "bf16"}))
    x = torch.randn(4, 8)
    y, gradients = step(copy.deepcopy(model), x)
    for compiled, others in compiled_steps(model, x, fullgraph=True):
        torch.testing.assert_close(compiled, y, rtol=1e-6, atol=1e-6)
        for name in gradients:
            torch.testing.assert_close(others[name], gradients[name], rtol=0.13, atol=1e-6)
    step(once := lp.wrap(copy.deepcopy(model), FP8), x)
    for row, single in zip(lp.report(model).rows, lp.report(once).rows, strict=True):
        assert row.calls == 2
        assert {role: count.elements for role, count in row.counts.items()} == {
            role: 2 * count.elements for role, count in single.counts.items()
        }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_recurrent_classifier(whole: bool) -> None:
    """Torch's compiler breaks the graph at an LSTM unless told otherwise; a policy changes nothing about that."""
    model, x = build("lstm classifier")
    x = x[:, :3]
    lp.wrap(model, FP8)
    eager = step(copy.deepcopy(model), x)
    with torch._dynamo.config.patch(allow_rnn=whole):
        for compiled in compiled_steps(model, x, fullgraph=whole, backend="eager"):
            assert_same(compiled, eager)
    assert {row.calls for row in lp.report(model).rows} == {2}


def test_blocks_compiled_one_by_one_share_their_code() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).tanh()

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = lp.wrap(nn.Sequential(*[Block() for _ in range(12)]), FP8)
    x = torch.randn(4, 8, requires_grad=True)
    eager = step(copy.deepcopy(model), x)
    for block in model:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_same(step(model, x), eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_wrapping_and_unwrapping_what_is_compiled() -> None:
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(x)
    lp.wrap(model, FP8)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), plain)
    lp.wrap(model, "bf16")
    assert torch.equal(compiled(x), model(x))
    lp.unwrap(model)
    assert torch.equal(compiled(x), plain)
    lp.wrap(compiled, FP8)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), plain)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, x = build(name)
    lp.wrap(model, FP8)
    expected = step(copy.deepcopy(model), x)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same(step(model, x), expected)


def test_autocast_and_grad_scaler() -> None:
    model, x = build("resnet")
    policy = lp.Policy("1-4-3", "1-4-3", "e5m2", "e5m2")
    lp.wrap(model, policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model[4].weight.clone()
    with torch.autocast("cpu", torch.float16):
        loss = output(model, x).pow(2).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(model[4].weight, before)
    loss = output(model, x).pow(2).mean() * 1e9
    scaler.scale(loss).backward()
    before = model[4].weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9, "an overflow in an ieee format is seen, and the step is skipped"
    assert torch.equal(model[4].weight, before)


@pytest.fixture
def one_process() -> Any:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("outside", [False, True])
def test_distributed_data_parallel(one_process: None, outside: bool) -> None:
    model, x = build("gpt2")
    expected = step(lp.wrap(copy.deepcopy(model), FP8), x)
    if outside:
        parallel = lp.wrap(nn.parallel.DistributedDataParallel(model), FP8)
    else:
        parallel = nn.parallel.DistributedDataParallel(lp.wrap(model, FP8))
    y, gradients = step(parallel, x)
    assert_same((y, {name.removeprefix("module."): grad for name, grad in gradients.items()}), expected)


def test_fully_sharded(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model, x = build("llama")
    lp.wrap(model, FP8)
    y, gradients = step(copy.deepcopy(model), x)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded, others = step(model, x)
    assert torch.equal(sharded, y)
    assert all(torch.equal(others[name].full_tensor(), gradients[name]) for name in gradients)
    assert {row.calls for row in lp.report(model).rows} == {1}


def test_generation_with_a_cache() -> None:
    model, x = build("gpt2")
    lp.wrap(model.eval(), "fp8-forward")
    generated = model.generate(x[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (3, 8)


def test_an_average_of_a_wrapped_model() -> None:
    model, x = build("lstm classifier")
    average = torch.optim.swa_utils.AveragedModel(lp.wrap(model, FP8))
    average.update_parameters(model)
    assert torch.equal(average(x), model(x))
    with torch.no_grad():
        model.head.weight.add_(1)
    assert not torch.equal(average(x), model(x))


# On the GPU.


@pytest.mark.gpu
def test_a_captured_step_counts_at_every_replay() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = lp.wrap(nn.Sequential(layer, nn.Linear(32, 8)).cuda(), FP8)
    x = torch.randn(4, 16, 32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            y, gradients = step(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, others = step(model, x)
    before = lp.report(model).rows
    for _ in range(4):
        graph.replay()
    torch.testing.assert_close(captured, y)
    torch.testing.assert_close(others["1.weight"], gradients["1.weight"], rtol=0.26, atol=1e-4)
    for row, first in zip(lp.report(model).rows, before, strict=True):
        assert row.calls == first.calls + 4
        assert row.forward.elements * first.calls == first.forward.elements * row.calls


@pytest.mark.gpu
def test_compiled_into_a_cuda_graph() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = lp.wrap(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).cuda(), FP8)
    x = torch.randn(32, 64, device="cuda")
    y, _ = step(copy.deepcopy(model), x)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        result, _ = step(compiled, x)
        torch.testing.assert_close(result, y, rtol=0.05, atol=0.05)
    assert {row.calls for row in lp.report(model).rows} == {5}
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
