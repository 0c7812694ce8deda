"""The simulation of devices does what torch does on real ones."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.devices,
    pytest.mark.any_transformers,  # torch alone
]

HERE, THERE = "cuda:0", "cuda:1"
TWICE = pytest.mark.devices(count=2)


@pytest.fixture
def a():
    return torch.arange(6.0, device=HERE).view(2, 3)


@pytest.fixture
def b():
    return torch.ones(2, 3)


def test_the_runtime_shows_devices():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == torch.accelerator.device_count() >= 1
    assert torch.cuda.get_device_properties(0).total_memory
    torch.cuda.synchronize()
    torch.accelerator.synchronize(HERE)
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.ones(1, device="cuda:9")


def test_tensors_are_plain_and_know_their_device(a):
    assert type(a) is torch.Tensor
    assert a.is_cuda
    assert str(a.device) == HERE
    assert a.untyped_storage().device == torch.device(HERE)
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert a.cpu().numpy()[1, 2] == 5
    assert a.to("cuda").device == torch.device(HERE)
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        a.numpy()


@TWICE
def test_tensors_go_to_another_device(a):
    there = torch.device(THERE)
    assert a.to(THERE).device == a.cuda(1).device == there
    with there:
        assert torch.zeros(2).device == there


@TWICE
@pytest.mark.parametrize("op", [
    lambda a, b: a + b,
    lambda a, b: b + a,
    lambda a, b: a + b.to(THERE),
    lambda a, b: a.add_(b),
    lambda a, b: b.add_(a),
    lambda a, b: a @ b.T,
    lambda a, b: a @ torch.ones(3),
    lambda a, b: torch.cat([a, b]),
    lambda a, b: torch.stack([a.sum(), a.to(THERE).sum()]),
    lambda a, b: torch.ones(3) + a.sum(),
    lambda a, b: torch.tensor(1.0).add_(a.sum()),
    lambda a, b: a.sum() + a.to(THERE).sum(),
    lambda a, b: torch.where(b > 0, a, a),
    lambda a, b: a.masked_fill(b > 0, 0),
    lambda a, b: a.index_select(0, torch.tensor([0])),
    lambda a, b: a.gather(1, torch.zeros(2, 1, dtype=torch.long)),
    lambda a, b: nn.functional.embedding(torch.tensor([0]), a),
    lambda a, b: nn.Linear(3, 4).to(HERE)(b),
    lambda a, b: b[torch.tensor([1], device=HERE)],
    lambda a, b: a[torch.tensor([1], device=THERE)],
    lambda a, b: a.__setitem__(torch.tensor([0]), b[:1]),
    lambda a, b: torch.equal(a, b),
    lambda a, b: torch.allclose(a, b),
])  # fmt: skip
def test_devices_do_not_mix(op, a, b):
    with pytest.raises(RuntimeError, match="device"):
        op(a, b)


def test_scalars_and_indices_of_the_cpu_may_go_along(a):
    here = torch.device(HERE)
    one = torch.tensor(1.0)
    assert (a + one).device == (one * a).device == (a * 2).device == here
    assert torch.where(a > 2, a, one).device == here
    assert a[torch.tensor([1])].tolist() == [[3, 4, 5]]
    assert a[torch.tensor([True, False])].tolist() == [[0, 1, 2]]
    a[torch.tensor([0])] = 7
    a[0, 0] = torch.tensor(9.0)
    assert a.tolist() == [[9, 7, 7], [3, 4, 5]]


def test_views_share_memory_and_clones_do_not(a):
    clone = a.clone()
    a.view(3, 2)[0, 0] = 100
    assert a[0, 0].item() == 100
    assert clone[0, 0].item() == 0
    assert a.t().contiguous().tolist() == [[100, 3], [1, 4], [2, 5]]
    out = torch.empty(0, device=HERE)
    torch.add(clone, clone, out=out)
    assert out.shape == (2, 3)
    assert out[1, 2].item() == 10


def test_results_are_the_cpus(a):
    assert torch.equal(a, a.clone())
    assert not torch.equal(a, a + 1)
    assert a.sum(0).argmax().item() == 2
    assert torch.unique(a).numel() == 6
    assert torch.nonzero(a > 2).shape == (3, 2)
    assert a.topk(1).indices.device == torch.device(HERE)
    heads = torch.ones(1, 2, 3, 4, device=HERE)
    attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
    assert attended.device == torch.device(HERE)
    with torch.autocast("cuda", torch.bfloat16):
        assert (a @ a.T).dtype == torch.bfloat16


@TWICE
def test_gradients_go_back_across_devices():
    x = torch.tensor([1.0, 2.0], device=HERE, requires_grad=True)
    ((x * 3).to(THERE).square().sum() * 2).backward()
    assert x.grad.device == torch.device(HERE)
    assert x.grad.tolist() == [36, 72]


@pytest.mark.parametrize("is_fused", [True, False])
def test_modules_train(a, is_fused):
    layer = nn.Linear(3, 4).to(HERE)
    before = layer.weight.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=is_fused)
    layer(a).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert copy.deepcopy(layer).weight.device == torch.device(HERE)


@TWICE
def test_devices_draw_apart(a):
    torch.manual_seed(5)
    drawn = torch.cuda.get_rng_state(0)
    first = torch.rand(2, device=HERE)
    torch.rand(2), torch.rand(2, device=THERE)
    assert not torch.equal(torch.rand(2, device=HERE), first)
    torch.cuda.set_rng_state(drawn, 0)
    assert torch.equal(torch.rand(2, device=HERE), first)
    generator = torch.Generator(HERE).manual_seed(1)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type"):
        torch.randn(3, generator=generator)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type"):
        torch.randn(3, generator=torch.Generator(), device=HERE)


def test_tensors_are_saved_and_loaded(a):
    file = io.BytesIO()
    torch.save({"a": a}, file)
    file.seek(0)
    assert torch.load(file)["a"].device == torch.device(HERE)
    file.seek(0)
    assert torch.load(file, map_location="cpu")["a"].device.type == "cpu"
    assert pickle.loads(pickle.dumps(a)).device == torch.device(HERE)
    assert repr(a)


def test_kernels_that_cuda_lacks_raise(a):
    whole = torch.ones(2, 2, dtype=torch.long, device=HERE)
    with pytest.raises(RuntimeError, match="not implemented"):
        whole @ whole
    with pytest.raises(RuntimeError, match="gels"):
        torch.linalg.lstsq(a, a, driver="gelsd")


def test_memory_is_counted():
    before = torch.cuda.memory_allocated(HERE)
    torch.cuda.reset_peak_memory_stats(HERE)
    held = torch.zeros(1 << 20, device=HERE)  # 4 MiB
    view = held.view(2, -1)
    assert torch.cuda.memory_allocated(HERE) - before == held.nbytes
    twice = held * 2
    del twice
    assert torch.cuda.max_memory_allocated(HERE) - before == 2 * held.nbytes
    del held, view
    assert torch.cuda.memory_allocated(HERE) == before


def test_softmax_of_half_numbers_in_float():
    """As routers of experts take it: one kernel of CUDA."""
    given = [
        torch.tensor([[1.0, 2.0, 4.0]]).half().to(device).requires_grad_()
        for device in ("cpu", HERE)
    ]
    made = [one.softmax(-1, dtype=torch.float32) for one in given]
    for one in made:
        assert one.dtype == torch.float32
        one[0, 1].backward()
    assert torch.equal(made[1].cpu(), made[0])
    assert given[1].grad.dtype == torch.float16
    assert torch.equal(given[1].grad.cpu(), given[0].grad)
