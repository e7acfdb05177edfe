import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssr_deepspeed.kernels import fused_route, launch
from ssr_deepspeed.routing import route

pytest.importorskip("triton")
# The interpreter computes in numpy, which warns where a GPU gives the same infinity or NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
INF, NAN = float("inf"), float("nan")

# Tokens are no multiple of a tile's rows, and several programs run where that is cheap.
SHAPES = [(1, 1, 1), (150, 3, 1), (150, 3, 2), (133, 8, 2), (133, 8, 8), (70, 64, 1), (70, 64, 2), (33, 100, 8)]
SHAPES += [(1, 256, 2), (19, 256, 8), (5, 1000, 16)]


def problem(tokens, experts, scale=2.0):
    return scale * torch.randn(tokens, experts), torch.randn(experts)


def exact(scores, potentials, entropy, experts_TK):
    """Log plan mass of the given routes in fp64."""
    shifted = scores.detach().double() + (0 if potentials is None else potentials.detach().double())
    return torch.log_softmax(shifted / entropy, dim=1).gather(1, experts_TK)


def renormalised(mass_TK):
    return mass_TK / mass_TK.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("with_potentials", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
def test_the_kernel_routes_like_torch(tokens, experts, k, with_potentials):
    scores, potentials = problem(tokens, experts)
    potentials = potentials if with_potentials else None
    entropy = 0.4 if with_potentials else 1.0
    used = torch.arange(tokens) % 3 != 1
    plain = route(scores, potentials, k=k, entropy=entropy, mask=used)
    experts_TK, mass_TK, log_mass_TK, demand_E = fused_route(scores, potentials, k=k, entropy=entropy, used_T=used)
    assert torch.equal(experts_TK, plain.experts_TK)
    assert torch.equal(demand_E, plain.demand_E)
    torch.testing.assert_close(mass_TK, plain.mass_TK, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(log_mass_TK, plain.log_mass_TK, rtol=2e-6, atol=2e-6)
    unmasked = fused_route(scores, potentials, k=k, entropy=entropy)
    assert torch.equal(unmasked[3], torch.bincount(experts_TK.flatten(), minlength=experts))


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0, 1e4])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_the_kernels_error_is_at_most_twice_that_of_torch(scale, k):
    scores, potentials = problem(60, 64, scale)
    experts_TK, mass_TK, log_mass_TK, _ = fused_route(scores, potentials, k=k, entropy=0.3)
    plain = route(scores, potentials, k=k, entropy=0.3)
    assert torch.equal(experts_TK, plain.experts_TK)
    log_exact = exact(scores, potentials, 0.3, experts_TK)
    mass_exact = (exact(scores, None, 1.0, experts_TK) if k == 1 else log_exact).exp()
    for ours, torchs, truth in ((mass_TK, plain.mass_TK, mass_exact), (log_mass_TK, plain.log_mass_TK, log_exact)):
        # Where torch happens to be exact, two units in the last place of the largest value remain.
        floor = 2.0**-23 * float(truth.abs().max())
        assert float((ours - truth).abs().max()) <= 2 * float((torchs - truth).abs().max()) + floor


def test_equal_scores_go_to_the_lowest_expert_first():
    scores = torch.randn(90, 16).bfloat16().float().div(0.5).round()
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    assert torch.equal(fused_route(scores, None, k=5, entropy=1.0)[0], order[:, :5])
    assert torch.equal(
        fused_route(torch.zeros(3, 7), torch.zeros(7), k=7, entropy=2.0)[0], torch.arange(7).expand(3, 7)
    )


@pytest.mark.parametrize("k", [2, 3])
def test_the_gradient_is_that_of_torch(k):
    scores, potentials = problem(140, 12)
    flow = torch.randn(140, k)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [scores.to(dtype).requires_grad_(), potentials.to(dtype).requires_grad_()]
        if dtype == torch.float32:
            mass_TK = fused_route(*inputs, k=k, entropy=0.6)[1]
        else:
            mass_TK = route(*inputs, k=k, entropy=0.6).mass_TK
        found.append(torch.autograd.grad((mass_TK * flow.to(dtype)).sum(), inputs))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_potentials", [False, True])
def test_one_experts_gradient_is_the_dense_softmaxs_and_none_for_the_potentials(with_potentials):
    scores, potentials = problem(70, 40)
    scores.requires_grad_(), potentials.requires_grad_()
    flow = torch.randn(70, 1)
    chosen = potentials if with_potentials else None
    experts_TK, mass_TK, _, _ = fused_route(scores, chosen, k=1, entropy=0.6)
    ours, none = torch.autograd.grad((mass_TK * flow).sum(), [scores, potentials], allow_unused=True)
    again = scores.detach().double().requires_grad_()
    (torch.softmax(again, 1).gather(1, experts_TK) * flow).sum().backward()
    assert none is None
    torch.testing.assert_close(ours.double(), again.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_gradient_of_the_weights_agrees_with_finite_differences(k):
    """Of the formula in fp64, routes held: the constant total must cancel in the weights."""
    scores, potentials = problem(9, 6)
    scores.requires_grad_(), potentials.requires_grad_()
    experts_TK, mass_TK, _, _ = fused_route(scores, potentials, k=k, entropy=0.7)
    flow, step = torch.randn(9, k), 1e-5
    weights = mass_TK if k == 1 else renormalised(mass_TK)
    gradients = torch.autograd.grad((weights * flow).sum(), [scores, potentials], allow_unused=True)

    def value(scores, potentials):
        if k == 1:
            return float((exact(scores, None, 1.0, experts_TK).exp() * flow).sum())
        return float((renormalised(exact(scores, potentials, 0.7, experts_TK).exp()) * flow).sum())

    base = [scores.detach().double(), potentials.detach().double()]
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        direction = torch.randn_like(base[i])
        up = value(*[x + step * direction if j == i else x for j, x in enumerate(base)])
        down = value(*[x - step * direction if j == i else x for j, x in enumerate(base)])
        assert float((gradient * direction).sum()) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_bad_row_keeps_valid_experts_and_shows_in_its_mass_alone(k):
    good = [0.0, 1.0, 2.0, 3.0]
    bad = [[1.0, NAN, 3.0, 2.0], [INF, 1.0, 2.0, 3.0], [NAN] * 4, [-INF] * 4, [INF, INF, -INF, NAN]]
    scores = torch.tensor([good, *bad, good], requires_grad=True)
    experts_TK, mass_TK, _, demand_E = fused_route(scores, torch.zeros(4), k=k, entropy=0.5)
    assert ((experts_TK >= 0) & (experts_TK < 4)).all()
    assert all(len(set(row)) == k for row in experts_TK.tolist())
    assert experts_TK[1:3, 0].tolist() == [1, 0]  # a NaN or an infinity comes first, as in torch.topk
    assert demand_E.sum() == 7 * k
    assert mass_TK[1:-1].isnan().all() and mass_TK[[0, -1]].isfinite().all()
    (gradient,) = torch.autograd.grad(mass_TK.sum(), scores)
    assert gradient[[0, -1]].isfinite().all() and gradient[1:-1].isnan().any(dim=1).all()


def test_an_expert_ruled_out_by_minus_infinity_comes_last_with_no_mass():
    scores = torch.tensor([[-INF, 1.0, -INF, 0.0]])
    experts_TK, mass_TK, log_mass_TK, _ = fused_route(scores, None, k=3, entropy=1.0)
    assert experts_TK.tolist() == [[1, 3, 0]]
    assert float(mass_TK[0, 2]) == 0 and float(log_mass_TK[0, 2]) == -INF
    torch.testing.assert_close(mass_TK[0, :2], torch.softmax(torch.tensor([1.0, 0.0]), 0))


@pytest.mark.parametrize("k", [1, 2])
def test_programs_that_take_several_tiles_find_the_same(monkeypatch, k):
    scores, potentials = problem(300, 64)
    scores.requires_grad_(), potentials.requires_grad_()
    flow, found = torch.randn(300, k), []
    for programs in (launch.PROGRAMS, 2):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        routes = fused_route(scores, potentials, k=k, entropy=0.5)
        gradients = torch.autograd.grad((routes[1] * flow).sum(), [scores, potentials], allow_unused=True)
        found.append([*routes, gradients[0], torch.zeros(0) if k == 1 else gradients[1]])
    for many, two in zip(*found, strict=True):
        torch.testing.assert_close(two, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_no_tokens_ask_for_nothing(k):
    scores, potentials = torch.zeros(0, 8, requires_grad=True), torch.zeros(8, requires_grad=True)
    experts_TK, mass_TK, log_mass_TK, demand_E = fused_route(scores, potentials, k=k, entropy=1.0)
    assert experts_TK.shape == mass_TK.shape == log_mass_TK.shape == (0, k)
    assert demand_E.tolist() == [0] * 8
    mass_TK.sum().backward()
    assert scores.grad.shape == (0, 8)


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_of_the_scores_size_is_kept_but_the_scores(k):
    scores, sizes = torch.randn(64, 32, requires_grad=True), []

    def pack(tensor):
        if tensor.data_ptr() != scores.data_ptr():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_route(scores, torch.randn(32), k=k, entropy=0.5)
    assert max(sizes) <= 64 * k


def test_only_the_mass_carries_a_gradient():
    scores = torch.randn(5, 4, requires_grad=True)
    carries = [output.requires_grad for output in fused_route(scores, None, k=2, entropy=1.0)]
    assert carries == [False, True, False, False]


def test_scores_need_not_be_contiguous():
    scores, _ = problem(8, 30)
    turned = fused_route(scores.t(), torch.zeros(16)[::2], k=2, entropy=0.5)
    straight = fused_route(scores.t().contiguous(), torch.zeros(8), k=2, entropy=0.5)
    assert all(torch.equal(one, other) for one, other in zip(turned, straight, strict=True))


@pytest.mark.parametrize("k", [1, 2])
def test_torch_knows_the_operator(k):
    scores, potentials = problem(20, 8)
    scores.requires_grad_(), potentials.requires_grad_()
    operator = torch.ops.ssr_deepspeed.route.default
    torch.library.opcheck(operator, (scores, potentials, torch.arange(20) > 3, k, 0.5))
    torch.library.opcheck(operator, (scores, None, None, k, 0.5))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("k", [1, 2])
def test_it_compiles_into_one_graph(backend, k):
    def weigh(scores, potentials):
        experts_TK, mass_TK, log_mass_TK, demand_E = fused_route(scores, potentials, k=k, entropy=0.5)
        return (renormalised(mass_TK) * experts_TK + mass_TK).sum(), log_mass_TK, demand_E

    compiled = torch.compile(weigh, fullgraph=True, backend=backend)
    scores, potentials = problem(24, 8)
    scores.requires_grad_()
    plain, traced = weigh(scores, potentials), compiled(scores, potentials)
    for one, other in zip(plain, traced, strict=True):
        torch.testing.assert_close(other, one)
    gradients = [torch.autograd.grad(value[0], scores)[0] for value in (plain, traced)]
    torch.testing.assert_close(*gradients)


def test_fake_tensors_pass_forward_and_backward():
    with FakeTensorMode():
        scores, potentials = torch.empty(24, 8, requires_grad=True), torch.empty(8, requires_grad=True)
        experts_TK, mass_TK, log_mass_TK, demand_E = fused_route(scores, potentials, k=3, entropy=0.5)
        assert experts_TK.shape == mass_TK.shape == log_mass_TK.shape == (24, 3)
        assert (experts_TK.dtype, demand_E.dtype, demand_E.shape) == (torch.int64, torch.int64, (8,))
        mass_TK.sum().backward()
        assert scores.grad.shape == (24, 8) and potentials.grad.shape == (8,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores_TE": torch.zeros(3)}, r"scores must be \[tokens, experts\], got shape \(3,\)"),
        ({"scores_TE": torch.zeros(3, 4).double()}, "scores are torch.float64; allowed: torch.float32"),
        ({"scores_TE": torch.zeros(3, 1025)}, "scores have 1025 experts; allowed: 1 to 1024"),
        ({"k": 5}, "k = 5 experts a token out of 4; allowed: 1 to 4"),
        ({"scores_TE": torch.zeros(3, 40), "k": 17}, "k = 17 experts a token out of 40; allowed: 1 to 16"),
        ({"entropy": 0.0}, "entropy = 0.0; allowed: above 0"),
        ({"potentials_E": torch.zeros(3)}, r"potentials must be torch.float32 \[4\], got torch.float32 \[3\]"),
        ({"used_T": torch.ones(3)}, r"used_T must be torch.bool \[3\], got torch.float32 \[3\]"),
    ],
)
def test_what_no_kernel_takes_is_refused(changes, message):
    arguments = {"scores_TE": torch.zeros(3, 4), "potentials_E": None, "k": 2, "entropy": 1.0}
    with pytest.raises(ValueError, match=message):
        fused_route(**{**arguments, **changes})
